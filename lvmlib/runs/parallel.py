"""One run by several processes, a GPU or a part of the CPU each: `Team` inside the loop, `launch` around it.

**Around it.** A notebook's kernel cannot be several processes (and to fork it is unsafe once CUDA or OpenMP has
started), so it writes the run's folder, starts `torchrun … -m lvmlib parallel FOLDER`, and reads each epoch's row from
the folder as it appears: the folder is the interface, and a finished run looks the same however it was trained.
torchrun, because it ends all processes when one fails; a kernel that dies ends them, too, by their standard input.
For many hosts the researcher starts the same command, on every host or under srun; the notebook then finds the run
finished, and judges it. FOLDER must be seen by all hosts, at the same path; only the first process writes to it.

**Inside.** Every process goes through the same batches and sends its share of each through its copy of the model;
what the heads say is gathered, and every process computes the losses, what is watched, and λ of the *whole* batch. So
there is nothing to approximate in what couples a batch's windows (the escape share, pulls, a constraint's maximum), an
uneven share needs no weight, and the gradient is exact: each process differentiates the whole batch's loss by its own
rows, and the sum over processes is the gradient of one process. The price: the losses are not shared out. Without
dropout the losses are those of one process but for rounding; with it, each process has a stream of its own.

**Fabric** finds out where a process stands (torchrun, Slurm), picks its device and backend, and has the collectives.
Its wrapper of a model is not used: it averages gradients of losses that are means over shares, knows `forward` alone
and refuses a head that a version does not train. Nor is its precision: the loop's own autocast is the same one.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import config as params
from .. import errors
from ..config import Version
from ..data import open
from ..errors import LVMError
from ..io.paths import ROOT
from . import folder as runs
from . import run as training

PROCESS = ("lvmlib", "parallel")  # what the processes run, after `python -m`
ATTACHED = "--attached"  # the word by which they know that a notebook launched them
STRATEGIES = ("auto", "ddp")
EPOCH = "lvmlib.parallel: epoch"  # what the first process prints when a row stands in the folder
FAILED = "lvmlib.parallel: process "  # what a process that fails begins its last line with
GRACE = 20.0  # seconds for the launcher to end the others, before they speak up themselves
AGREE = 1e-5  # relative: as much may the processes differ on unlike hardware; on like hardware they do not


class Team:
    """The process of a run that has one: all of this does nothing."""

    rank, size = 0, 1
    device: torch.device | None = None  # None: as the version says

    @property
    def first(self) -> bool:
        """Whether this process writes the files and validates."""
        return self.rank == 0

    def from_first(self, make: Callable):
        """What `make()` gives in the first process; it is not called in the others."""
        return make()

    def seed(self, seed: int, epoch: int) -> None:
        """Begin this process's own random stream, for dropout and samples; all else draws from the common one."""

    def heads(self, model, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`model.heads` of the whole batch's `context` (B, T, D)."""
        return model.heads(context)

    def samples(self, model, context: Tensor, count: int) -> Tensor:
        """`model.samples` of the whole batch, (S, B, D)."""
        return model.samples(context, count)

    def add_gradients(self, model) -> None:
        """After backward: the gradients of all processes, added up in each."""

    def agree(self, loss: float, model) -> None:
        """Raise LVMError where the processes have come apart: another loss of the epoch, or other weights."""

    def leave(self) -> None:
        """At the end: wait for all."""


ALONE = Team()


class Lost(LVMError):
    """Another process ended: it says why."""


class Processes(Team):
    """One of several processes, on a launched Fabric."""

    def __init__(self, fabric):
        self.fabric, self.rank, self.size, self.device = fabric, fabric.global_rank, fabric.world_size, fabric.device
        self.generators = [torch.default_generator]
        if self.device.type == "cuda":
            self.generators.append(torch.cuda.default_generators[self.device.index or 0])
        self.stream: list[Tensor] = []

    def from_first(self, make: Callable):
        made = make() if self.first else None
        with _together():
            return self.fabric.broadcast(made)

    def seed(self, seed: int, epoch: int) -> None:
        # 1 + rank: SeedSequence takes a trailing 0 for nothing, and process 0 would draw from the common stream.
        number = int(np.random.SeedSequence([seed, epoch, 1 + self.rank]).generate_state(1, np.uint64)[0] >> 1)
        own = [torch.Generator(g.device).manual_seed(number) for g in self.generators]
        self.stream = [g.get_state() for g in own]

    @contextlib.contextmanager
    def _own_stream(self):
        common = [g.get_state() for g in self.generators]
        for g, state in zip(self.generators, self.stream, strict=True):
            g.set_state(state)
        yield
        self.stream = [g.get_state() for g in self.generators]
        for g, state in zip(self.generators, common, strict=True):
            g.set_state(state)

    def share(self, context: Tensor) -> Tensor:
        """This process's windows of a batch: (⌈B / processes⌉, T, D), the last window repeated where they run out."""
        each = math.ceil(len(context) / self.size)
        return context[(torch.arange(each, device=context.device) + self.rank * each).clamp(max=len(context) - 1)]

    def whole(self, own: Tensor, count: int) -> Tensor:
        """The batch (count, …) of every process's share `own`; backward gives each the gradient of its own rows."""
        return _Whole.apply(own, self, count)

    def heads(self, model, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with self._own_stream():
            raw, unit, ranker = model.heads(self.share(context))
        own_head = ranker is not unit
        raw = self.whole(raw, len(context))
        unit = F.normalize(raw, dim=-1)  # of the gathered raw, by which `losses.pulls` differentiates
        return raw, unit, self.whole(ranker, len(context)) if own_head else unit

    def samples(self, model, context: Tensor, count: int) -> Tensor:
        with self._own_stream():
            own = model.samples(self.share(context), count)  # (S, B / processes, D)
        return self.whole(own.transpose(0, 1).contiguous(), len(context)).transpose(0, 1)

    def add_gradients(self, model) -> None:
        # Of the model alone: what stands in the loss itself (the temperature) has the whole gradient everywhere.
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        with _together():
            flat = torch.cat([g.flatten() for g in gradients])
            torch.distributed.all_reduce(flat)  # Fabric's own waits for all processes first, at every step
        parts = flat.split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def agree(self, loss: float, model) -> None:
        length = torch.linalg.vector_norm(torch.stack([p.detach().norm() for p in model.parameters()]))
        figures = torch.zeros(self.size, 2, device=self.device)
        figures[self.rank] = torch.tensor([loss, float(length)])
        with _together():
            torch.distributed.all_reduce(figures)
        low, high = figures.amin(0), figures.amax(0)
        if not bool((high - low <= AGREE * high.abs()).all()):
            raise LVMError(
                f"the processes have come apart: losses of the epoch {figures[:, 0].tolist()}, lengths of the "
                f"weights {figures[:, 1].tolist()}; the data or the software differs between the hosts"
            )

    def leave(self) -> None:
        with _together():
            self.fabric.barrier()
        torch.distributed.destroy_process_group()


class _Whole(torch.autograd.Function):
    """All processes' shares as one batch. No communication backwards: the losses of every process are the same."""

    @staticmethod
    def forward(ctx, own: Tensor, team: Processes, count: int) -> Tensor:
        ctx.first, ctx.shape = team.rank * len(own), own.shape
        whole = own.new_zeros(count, *own.shape[1:])
        whole[ctx.first : ctx.first + len(own)] = own[: max(0, count - ctx.first)]
        with _together():  # each row is one process's own and 0 from all others: their sum is exact
            torch.distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx, gradient: Tensor):
        mine = gradient.new_zeros(ctx.shape)  # repeated windows, and a share of nothing else, have none
        rows = gradient[ctx.first : ctx.first + ctx.shape[0]]
        mine[: len(rows)] = rows
        return mine, None, None


@contextlib.contextmanager
def _together():
    """What fails in here fails because another process has ended."""
    try:
        yield
    except (LVMError, torch.OutOfMemoryError, torch.AcceleratorError):  # this process's own
        raise
    except RuntimeError as e:
        raise Lost(f"another process ended, or does not answer ({errors.said(e)})") from e


# Around the loop


class Group(NamedTuple):
    """How many processes a run is asked to have: one for each device of each host."""

    devices: int
    nodes: int

    @property
    def size(self) -> int:
        return self.devices * self.nodes


def group(version: Version, devices: int, nodes: int, strategy: str) -> Group | None:
    """The processes that these parameters ask for; None for one alone. Raises LVMError for what cannot be."""
    for name, value in (("devices", devices), ("nodes", nodes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LVMError(f"{name} is {value!r}; needed is a whole number, 1 or more")
    if strategy not in STRATEGIES:
        raise LVMError(
            f"strategy is {strategy!r}; needed is {' or '.join(STRATEGIES)}: every process holds the whole model, "
            "which is small; strategies that cut a model up are not supported"
        )
    asked = Group(devices, nodes)
    if asked.size == 1:
        return None
    if asked.size > version.batch_size:
        raise LVMError(
            f"devices {devices} times nodes {nodes} are more processes than a batch has windows ({version.batch_size}, "
            "which all share); raise batch_size, or ask for fewer"
        )
    if version.device not in ("auto", "cpu", "cuda"):
        raise LVMError(f"device {version.device!r}: several processes need auto, cpu or cuda")
    return asked


def commands(folder: Path, asked: Group) -> str:
    """What starts a prepared run on several hosts."""
    run = f"-m lvmlib parallel {shlex.quote(str(folder.resolve()))}"
    return (
        f"on each host, with the first one's name for HOST: torchrun --nnodes {asked.nodes} --nproc-per-node "
        f"{asked.devices} --rdzv-backend c10d --rdzv-endpoint HOST:29400 --rdzv-id lvmlib {run} — or once, under "
        f"Slurm: srun --nodes {asked.nodes} --ntasks-per-node {asked.devices} --kill-on-bad-exit=1 python {run}"
    )


def ready(asked: Group, device: str) -> None:
    """Raises LVMError where this machine cannot start the processes."""
    errors.extra("lightning_fabric", "parallel")
    gpus = torch.cuda.device_count()
    on_cpu = device == "cpu" or (device == "auto" and not gpus)
    if not on_cpu and asked.devices > gpus:
        raise LVMError(f"devices is {asked.devices}; this machine has {gpus} that CUDA sees. Ask for as many, or cpu")


def launch(folder: Path, asked: Group, device: str) -> Iterator[None]:
    """Train the run prepared in `folder` by processes on this machine; yields when an epoch's row stands there.

    Closing the iterator ends them. Raises LVMError where one fails, with what it said, or where the machine does not
    have the devices.
    """
    ready(asked, device)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_path("PYTHONPATH")])}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // asked.devices)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={asked.devices}"]
    command += ["-m", *PROCESS, str(folder.resolve()), ATTACHED]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    said: collections.deque[str] = collections.deque(maxlen=60)
    try:
        for line in process.stdout:
            if line.startswith(EPOCH):
                yield
            else:
                said.append(line.rstrip())
        code = process.wait()
    finally:
        process.stdin.close()  # the processes end with it
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        process.stdout.close()
    if code:
        raise LVMError(
            f"{folder}: the run was ended. {_why(list(said), asked.size)}\n"
            "What was finished is kept: the same call goes on from there"
        )


def _why(said: list[str], size: int) -> str:
    """What the first process that failed said, or what torchrun says of its end."""
    words = [line.removeprefix("lvmlib.parallel: ") for line in said if line.startswith(FAILED)]
    ended = re.search(r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", "\n".join(said), re.DOTALL)
    if not words and ended:
        code = int(ended[2])
        how = f"by signal {-code} (9 where memory ran out)" if code < 0 else f"with exit code {code}"
        words = [f"process {int(ended[1]) + 1} of {size}: ended without a word, {how}"]
    return words[0] if words else "The last lines were\n" + "\n".join(said)


def _path(name: str) -> list[str]:
    return [p for p in os.environ.get(name, "").split(os.pathsep) if p]


def told(record: dict) -> str:
    """A sentence on the processes of a run by its run.yaml; empty for a run by one alone."""
    counted = list(record.get("computed", {}).get("processes", {}).items())
    if not counted:
        return ""
    parts = [f"from epoch {first} on by {size}" for first, size in counted[1:]]
    later = f", {', '.join(parts)}: not bit for bit what it would be by one number of them" if parts else ""
    return f"Trained by {counted[0][1]} process{'es' if counted[0][1] > 1 else ''}{later}."


def counted(record: dict, done: int, size: int) -> bool:
    """Enter in run.yaml's record that `size` processes go on after `done` epochs. True where that is another number.

    `computed.processes`: from which epoch on by how many; missing where it was always one.
    """
    computed = record.setdefault("computed", {})
    before = computed.get("processes", {1: 1}) if done else {}
    now = before if before and list(before.values())[-1] == size else {**before, done + 1: size}
    computed.pop("processes", None)
    if now != {1: 1}:
        computed["processes"] = now
    return bool(before) and now != before


def join(device: str) -> Team:
    """This process's place among those that torchrun or srun started; ALONE where there is one."""
    e = os.environ
    if "TORCHELASTIC_RUN_ID" in e:
        size, local = int(e["WORLD_SIZE"]), int(e["LOCAL_WORLD_SIZE"])
    elif "SLURM_PROCID" in e and e.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        size = int(e.get("SLURM_NTASKS", 1))
        local = int(e.get("SLURM_NTASKS_PER_NODE", size))
    else:
        return ALONE
    if size == 1:
        return ALONE
    if size % local:
        raise LVMError(f"{size} processes, {local} on this host: start as many on every host")
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    fabric = errors.extra("lightning_fabric", "parallel").Fabric(
        accelerator=kind, devices=local, num_nodes=size // local, strategy="ddp"
    )
    fabric.launch()
    return Processes(fabric)


def main(arguments: list[str]) -> int:
    """`python -m lvmlib parallel FOLDER`: train the run that stands prepared or interrupted in FOLDER; one of the
    processes of torchrun or srun."""

    attached = arguments[1:] == [ATTACHED]
    if not arguments or (arguments[1:] and not attached):
        print("usage: torchrun … -m lvmlib parallel FOLDER", file=sys.stderr)
        return 2
    if attached:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    folder, team = Path(arguments[0]), ALONE
    try:
        version = params.resolved(runs.open_run(folder)[0]["parameters"], f"{folder / 'run.yaml'}: parameters")
        team = join(version.device)
        data = open.dataset(
            version.data, version.horizon, version.context_length, fast=version.fast, direction=version.direction
        )
        for row in training.train(version, data, folder, team=team):
            if team.first:
                print(f"{EPOCH} {row['epoch']:.0f}/{version.epochs}", flush=True)
        team.leave()
    except BaseException as e:
        return _failed(e, team)
    return 0


def _failed(e: BaseException, team: Team) -> int:
    """Say once what failed. What all processes ran into, the first says; of one that was lost, the lost one."""
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    if isinstance(e, Lost):
        time.sleep(GRACE)  # the launcher ends this process before
    elif rank:
        time.sleep(1)
    words = str(e)
    if not isinstance(e, LVMError):
        traceback.print_exception(e)
        place = traceback.extract_tb(e.__traceback__)[-1]
        words = f"{type(e).__name__}: {e} ({Path(place.filename).name}, line {place.lineno})"
    words = re.sub(r"\s+", " ", words)
    print(f"{FAILED}{rank + 1} of {os.environ.get('WORLD_SIZE', team.size)}: {words}", file=sys.stderr, flush=True)
    if team is ALONE and rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return 1
    os._exit(1)  # not by the interpreter's end, which may wait for the others


def _end_with_parent() -> None:
    while os.read(0, 1024):  # nothing to read when the notebook's kernel is gone, or has closed it
        pass
    os._exit(1)
