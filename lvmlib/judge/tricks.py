"""Predictors that raise a margin without knowing the future (handbook §4.1 point 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..baselines import Weighted
from ..models import Predictor


class Flipped(Predictor):
    """The context's mean, with its part outside the leading `components` (K, D) multiplied by −strength."""

    def __init__(self, dim: int, context_length: int, components: Tensor, strength: float):
        super().__init__(dim, context_length)
        self.register_buffer("components", components.float())
        self.strength = strength

    def raw(self, context: Tensor) -> Tensor:
        mean = context.mean(1)
        leading = (mean @ self.components.T) @ self.components
        return leading - self.strength * (mean - leading)


def tricks(dim: int, length: int, strength: float, components: Tensor) -> dict[str, Predictor]:
    """Return the context's mean minus `strength` times context[-2], the same of context[-1], and `Flipped`.

    At strength 0 the first two are the mean; up to 1/T they only give that vector less weight.
    """
    out = {}
    for place in (-2, -1):
        weights = torch.full((length,), 1 / length)
        weights[place] -= strength
        out[f"mean − a·context[{place}]"] = Weighted(dim, weights)
    out["residual flip"] = Flipped(dim, length, components, strength)
    return out
