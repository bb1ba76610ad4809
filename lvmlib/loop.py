"""One training step and one epoch."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import torch

from . import models


@contextlib.contextmanager
def seeded(seed: int, epoch: int):
    """Inside, torch's random streams depend on (seed, epoch) alone; outside, CPU and CUDA go on as if nothing was."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1))
        yield


class Lowered:
    """A model's copy for steps in bfloat16: `model` has the weights of the products in bfloat16 and shares all others.

    Autocast casts each weight at each use and each gradient back, into new memory; here both are done once a step, into
    memory that stays. The numbers are the same ones.
    """

    def __init__(self, model: models.Predictor):
        self.model = copy.deepcopy(model)
        self.pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter, torch.Tensor]] = []
        for ours, theirs in zip(self.model.modules(), model.modules(), strict=True):
            for name, full in theirs.named_parameters(recurse=False):
                if full.ndim == 2 and isinstance(theirs, torch.nn.Linear | torch.nn.MultiheadAttention):
                    half = torch.nn.Parameter(full.detach().bfloat16())
                    self.pairs.append((full, half, torch.empty_like(full)))
                setattr(ours, name, half if self.pairs and self.pairs[-1][0] is full else full)

    def hand_over(self) -> None:
        """Give the gradients to the model itself, in float32."""
        for full, half, gradient in self.pairs:
            full.grad, half.grad = None if half.grad is None else gradient.copy_(half.grad), None

    @torch.no_grad()
    def renew(self) -> None:
        """Take over the weights of the model itself."""
        for full, half, _ in self.pairs:
            half.copy_(full)


def clip(model: torch.nn.Module, most: float) -> torch.Tensor:
    """The norm of the model's gradient, which is scaled down to `most` where it is larger.

    As `clip_grad_norm_`, which multiplies in any case: that is a pass over all gradients for nothing, where reading
    the norm costs nothing.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if norm.device.type != "cpu" or not norm <= most:  # also where it is NaN
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), most, norm)
    return norm
