"""The loss terms of handbook §3, one function each, and their named sum.

Axes: B batch, D vector dimension. A loss takes vectors, not a model: `raw` and `unit` predictions, the `target` y and
`prev`, the context vector that the prediction is to leave behind; each (B, D). Each returns a scalar tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .params import Directional, Losses

EPSILON = 1e-6  # keeps the ratio defined where both cosines vanish


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(B,) cosines of two (B, D) batches."""
    return F.cosine_similarity(a, b, dim=-1)


def gap(pos: Tensor, neg: Tensor) -> Tensor:
    """How much nearer the prediction is to the target than to prev: cos(p, y) − cos(p, prev), (B,)."""
    return pos - neg


def ratio(pos: Tensor, neg: Tensor) -> Tensor:
    """The gap relative to the cosines' size: gap / (|cos(p, y)| + |cos(p, prev)| + 1e-6), (B,), within ±1."""
    return (pos - neg) / (pos.abs() + neg.abs() + EPSILON)


def hinge(x: Tensor, margin: float, gamma: float) -> Tensor:
    """Smooth hinge, elementwise: softplus(γ·(margin − x)) / γ. Tends to relu(margin − x) as γ grows."""
    return F.softplus(gamma * (margin - x)) / gamma


def mse(raw: Tensor, target: Tensor) -> Tensor:
    """L_mse: mean over batch and dimensions of (raw − y)²."""
    return F.mse_loss(raw, target)


def directional_smooth(unit: Tensor, target: Tensor, prev: Tensor, margin: float, gamma: float) -> Tensor:
    """L_dir of v1 and v2: mean softplus(γ(m_gap − gap)) / γ."""
    return hinge(gap(cosine(unit, target), cosine(unit, prev)), margin, gamma).mean()


def directional_scale_aware(
    unit: Tensor, target: Tensor, prev: Tensor, margin: float, gamma: float, alpha: float, margin_ratio: float
) -> Tensor:
    """L_dir from v2.1 on: the smooth hinge on the gap (weight α) and on the ratio (1 − α).

    The ratio keeps its pull where both cosines are small. It does not see two negative cosines (handbook
    §4.1 point 8): the floor and the sign guard are there for that.
    """
    pos, neg = cosine(unit, target), cosine(unit, prev)
    by_gap, by_ratio = hinge(gap(pos, neg), margin, gamma), hinge(ratio(pos, neg), margin_ratio, gamma)
    return (alpha * by_gap + (1 - alpha) * by_ratio).mean()


def floor(unit: Tensor, target: Tensor, tau: float) -> Tensor:
    """L_floor: mean relu(τ − cos(p, y))²: no prediction may turn away from its target."""
    return F.relu(tau - cosine(unit, target)).square().mean()


def norm(raw: Tensor) -> Tensor:
    """L_norm: mean (‖raw‖ − 1)². On raw: on the unit vector it would always be 0."""
    return (raw.norm(dim=-1) - 1).square().mean()


def orthogonality(unit: Tensor, prev: Tensor) -> Tensor:
    """L_orth: mean cos(p, prev)²."""
    return cosine(unit, prev).square().mean()


class Terms(NamedTuple):
    """Every term of a batch by name; scalar tensors. `directional` is 0 for a version without one."""

    mse: Tensor
    directional: Tensor
    floor: Tensor
    norm: Tensor
    orthogonality: Tensor

    def total(self, weights: Losses, lambda_eff: float) -> Tensor:
        """L = L_mse + λ_eff·L_dir + β·L_floor + η·L_norm + κ·L_orth; a term of weight 0 costs no gradient."""
        total = self.mse
        for weight, term in (
            (lambda_eff, self.directional),
            (weights.floor.weight, self.floor),
            (weights.norm, self.norm),
            (weights.orthogonality, self.orthogonality),
        ):
            if weight:
                total = total + weight * term
        return total


def directional(unit: Tensor, target: Tensor, prev: Tensor, margin: float, d: Directional) -> Tensor:
    """L_dir as the version has it."""
    if d.kind == "smooth":
        return directional_smooth(unit, target, prev, margin, d.gamma)
    if d.kind == "scale_aware":
        return directional_scale_aware(unit, target, prev, margin, d.gamma, d.alpha, d.margin_ratio)
    return unit.new_zeros(())


def terms(raw: Tensor, unit: Tensor, context: Tensor, target: Tensor, margin: float, weights: Losses) -> Terms:
    """All terms of a batch. `context` (B, T, D); `margin` is the schedule's m_gap of the epoch."""
    prev = context[:, weights.directional.prev]
    return Terms(
        mse(raw, target),
        directional(unit, target, prev, margin, weights.directional),
        floor(unit, target, weights.floor.tau),
        norm(raw),
        orthogonality(unit, prev),
    )


@torch.no_grad()
def health(unit: Tensor, target: Tensor, prev: Tensor) -> dict[str, Tensor]:
    """What is watched (handbook §3), batch means: pos, neg, gap, ratio."""
    pos, neg = cosine(unit, target), cosine(unit, prev)
    return {"pos": pos.mean(), "neg": neg.mean(), "gap": gap(pos, neg).mean(), "ratio": ratio(pos, neg).mean()}
