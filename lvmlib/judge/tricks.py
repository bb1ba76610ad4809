"""Predictors that raise a margin without any knowledge of the future (handbook §4.1 point 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..baselines import Weighted
from ..models import Predictor


class Flipped(Predictor):
    """The context's mean with all of it that lies outside the leading `components` (K, D) times −strength."""

    def __init__(self, dim: int, context_length: int, components: Tensor, strength: float):
        super().__init__(dim, context_length)
        self.register_buffer("components", components)
        self.strength = strength

    def raw(self, context: Tensor) -> Tensor:
        mean = context.mean(1)
        kept = (mean @ self.components.T) @ self.components
        return kept - self.strength * (mean - kept)


def tricks(dim: int, length: int, strength: float, components: Tensor) -> dict[str, Predictor]:
    """Predictors that buy a margin without any knowledge of the future (handbook §4.1 point 6).

    The context's mean minus `strength` times context[-2], minus `strength` times context[-1], and the mean whose part
    outside the leading `components` (K, D) is flipped and multiplied by `strength`. At strength 0 the first two are the
    mean; at a strength up to 1/T they only weigh that vector less.
    """
    out = {}
    for place in (-2, -1):
        weights = torch.full((length,), 1 / length)
        weights[place] -= strength
        out[f"mean − a·context[{place}]"] = Weighted(dim, weights)
    out["residual flip"] = Flipped(dim, length, components, strength)
    return out
