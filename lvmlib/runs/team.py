"""The processes that share a run's batches, a GPU or a part of the CPU each. `launch` starts them.

Every process sends its share of a batch through its copy of the model. The predictions are gathered, and every process
computes the losses, the watched figures and λ of the *whole* batch: nothing is approximated in what couples a batch's
windows. The gradient is exact, too: each process differentiates the whole batch's loss by its own rows, and the sum
over processes is the gradient of one process. Without dropout the losses are those of one process but for rounding;
with it, each process has a random stream of its own.

Lightning Fabric finds a process's place (torchrun, Slurm), its device and backend, and has the collectives. Its wrapper
of a model is not used: it averages gradients over shares, knows `forward` alone and refuses an untrained head.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import errors
from ..errors import LVMError
from ..loop import OneProcess

AGREE = 1e-5  # relative: how far the processes may differ on unlike hardware; on like hardware they do not


class Team(OneProcess):
    """The only process of a run: `loop.OneProcess` with what the run asks besides. `Processes` overrides all of it."""

    device: torch.device | None = None  # None: as the version has it

    @property
    def first(self) -> bool:
        """Whether this process writes the files and validates."""
        return self.rank == 0

    def from_first(self, make: Callable):
        """The result of `make()` in the first process; the others do not call it."""
        return make()

    def agree(self, loss: float, model) -> None:
        """Raise LVMError if the processes differ in the loss of the epoch, or in the weights."""

    def leave(self) -> None:
        """At the end: wait for all."""


ALONE = Team()


class Lost(LVMError):
    """Another process ended; its own message says why."""


class Processes(Team):
    """One of several processes, on a launched Fabric: computes its share of a batch and gathers those of all."""

    def __init__(self, fabric):
        self.fabric, self.rank, self.size, self.device = fabric, fabric.global_rank, fabric.world_size, fabric.device
        self.generators = [torch.default_generator]
        if self.device.type == "cuda":
            self.generators.append(torch.cuda.default_generators[self.device.index or 0])
        self.stream: list[Tensor] = []

    def from_first(self, make: Callable):
        made = make() if self.first else None
        with _communicating():
            return self.fabric.broadcast(made)

    def seed(self, seed: int, epoch: int) -> None:
        # 1 + rank: SeedSequence takes a trailing 0 for nothing, and process 0 would draw from the common stream.
        number = int(np.random.SeedSequence([seed, epoch, 1 + self.rank]).generate_state(1, np.uint64)[0] >> 1)
        own = [torch.Generator(g.device).manual_seed(number) for g in self.generators]
        self.stream = [g.get_state() for g in own]

    @contextlib.contextmanager
    def _own_stream(self):
        with torch.random.fork_rng(devices=[g.device.index for g in self.generators[1:]]):
            for g, state in zip(self.generators, self.stream, strict=True):
                g.set_state(state)
            yield
            self.stream = [g.get_state() for g in self.generators]

    def share(self, context: Tensor) -> Tensor:
        """This process's windows of a batch: (⌈B / processes⌉, T, D), the last window repeated if they run out."""
        each = math.ceil(len(context) / self.size)
        return context[(torch.arange(each, device=context.device) + self.rank * each).clamp(max=len(context) - 1)]

    def gather(self, own: Tensor, count: int) -> Tensor:
        """The batch (count, …) of every process's share `own`; backward gives each the gradient of its own rows."""
        return _Gathered.apply(own, self, count)

    def heads(self, model, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with self._own_stream():
            raw, unit, ranker = model.heads(self.share(context))
        own_head = ranker is not unit
        raw = self.gather(raw, len(context))
        unit = F.normalize(raw, dim=-1)  # of the gathered raw, by which `losses.gradients` differentiates
        return raw, unit, self.gather(ranker, len(context)) if own_head else unit

    def samples(self, model, context: Tensor, count: int) -> Tensor:
        with self._own_stream():
            own = model.samples(self.share(context), count)  # (S, B / processes, D)
        return self.gather(own.transpose(0, 1).contiguous(), len(context)).transpose(0, 1)

    def add_gradients(self, model) -> None:
        # Of the model only: a parameter of the loss itself (the temperature) has the whole gradient everywhere.
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        with _communicating():
            flat = torch.cat([g.flatten() for g in gradients])
            torch.distributed.all_reduce(flat)  # Fabric's own waits for all processes first, at every step
        parts = flat.split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def agree(self, loss: float, model) -> None:
        norm = torch.nn.utils.get_total_norm([p.detach() for p in model.parameters()])
        figures = self.gather(torch.tensor([[loss, float(norm)]], device=self.device), self.size)  # (processes, 2)
        low, high = figures.amin(0), figures.amax(0)
        if not bool((high - low <= AGREE * high.abs()).all()):
            raise LVMError(
                f"the processes differ: losses of the epoch {figures[:, 0].tolist()}, norms of the weights "
                f"{figures[:, 1].tolist()}; use the same data and software on every host"
            )

    def leave(self) -> None:
        with _communicating():
            self.fabric.barrier()
        torch.distributed.destroy_process_group()


class _Gathered(torch.autograd.Function):
    """All processes' shares as one batch. No communication backwards: the losses of every process are the same."""

    @staticmethod
    def forward(ctx, own: Tensor, team: Processes, count: int) -> Tensor:
        ctx.first, ctx.shape = team.rank * len(own), own.shape
        batch = own.new_zeros(count, *own.shape[1:])
        batch[ctx.first : ctx.first + len(own)] = own[: max(0, count - ctx.first)]
        with _communicating():  # each row is one process's own and 0 from all others: their sum is exact
            torch.distributed.all_reduce(batch)
        return batch

    @staticmethod
    def backward(ctx, gradient: Tensor):
        own = gradient.new_zeros(ctx.shape)  # repeated windows have none
        rows = gradient[ctx.first : ctx.first + ctx.shape[0]]
        own[: len(rows)] = rows
        return own, None, None


@contextlib.contextmanager
def _communicating():
    """Turn an error of a collective inside into Lost: another process has ended."""
    try:
        yield
    except (LVMError, torch.OutOfMemoryError, torch.AcceleratorError):  # this process's own
        raise
    except RuntimeError as e:
        raise Lost(f"another process ended, or does not answer ({errors.format_error(e)})") from e


def join(device: str) -> Team:
    """This process's place among those that torchrun or srun started; ALONE if there is only one."""
    e = os.environ
    size = local = 1
    if "TORCHELASTIC_RUN_ID" in e:
        size, local = int(e["WORLD_SIZE"]), int(e["LOCAL_WORLD_SIZE"])
    elif "SLURM_PROCID" in e and e.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        size = int(e.get("SLURM_NTASKS", 1))
        local = int(e.get("SLURM_NTASKS_PER_NODE", size))
    if size == 1:
        return ALONE
    if size % local:
        raise LVMError(f"{size} processes, {local} on this host: start as many on every host")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    make = errors.require("lightning_fabric", "parallel").Fabric
    fabric = make(accelerator=device, devices=local, num_nodes=size // local, strategy="ddp")
    fabric.launch()
    return Processes(fabric)
