"""The loss terms of handbook §3, one function each, and their named sum.

Axes: B batch, D vector dimension, S samples. A loss takes vectors, not a model: `raw` and `unit` predictions, the
`target` y and `prev`, the context vector that the prediction is to leave behind; each (B, D). Each returns a scalar
tensor; `energy` and `distances`, one number a window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Constraint, Directional, Losses

EPSILON = 1e-6  # keeps the ratio defined where both cosines vanish
AT_RAW = ("mse", "directional", "floor", "norm", "orthogonality")  # the terms that see the raw prediction alone


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


def listwise(unit: Tensor, rivals: Tensor, there: Tensor, scale: Tensor) -> Tensor:
    """L_list: mean −log softmax(scale · cos(p, ·))[0] over `rivals` (B, C, D), unit vectors with the target first.

    `there` (B, C): which of them count; `scale`: 1 / temperature. InfoNCE with the target's own article for negatives
    (van den Oord et al. 2018, eq. 4): it asks for the rank that the novel MRR measures, and for no norm or cosine.
    `unit` (B, D), or (B, K, D) for K rankers: the mean of their losses.
    """
    logits = scale * torch.einsum("b...d,bcd->b...c", unit, rivals)
    there = there if unit.ndim == 2 else there[:, None]
    # Left out after the product with the scale, whose gradient would be 0 · ∞.
    return -logits.masked_fill(~there, float("-inf")).log_softmax(-1)[..., 0].mean()


def shortfall(unit: Tensor, target: Tensor, context: Tensor, constraint: Constraint) -> Tensor:
    """How far the batch stays below its bound: c − mean cos(p, y), or m − min_t mean [cos(p, y) − cos(p, context_t)]
    over the constraint's places t; `context` (B, T, D).

    Above 0 where the constraint is violated; its weight in the loss is the Lagrange multiplier.
    """
    reached = cosine(unit, target).mean()
    if constraint.measure == "margin":
        against = context[:, list(constraint.against)]  # (B, K, D)
        reached = reached - cosine(unit[:, None], against).mean(0).max()
    return constraint.at_least - reached


def energy(samples: Tensor, target: Tensor) -> Tensor:
    """(B,) energy score of `samples` (S, B, D) for `target` (B, D); lower is better.

        (1/S) Σ_s ‖x_s − y‖ − 1/(2 S (S−1)) Σ_{s≠s'} ‖x_s − x_s'‖

    Strictly proper: least in the mean where the samples are drawn from the target's own distribution (Gneiting &
    Raftery, JASA 102, 2007, eq. 22 with β = 1). Its mean does not depend on S where the samples are independent draws;
    for members that are chosen to differ it is too low. One sample has no second term: the distance of a point.
    """
    off, apart = distances(samples, target)
    return off - apart / 2


def distances(samples: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) mean distance of `samples` (S, B, D) from `target` (B, D), and from each other (0 where there is one)."""
    count = len(samples)
    off = (samples - target).norm(dim=-1).mean(0)
    members = samples.transpose(0, 1).contiguous()  # (B, S, D)
    # By differences, not by products: those round the distance of equal samples away from 0.
    between = torch.cdist(members, members, compute_mode="donot_use_mm_for_euclid_dist")
    return off, between.sum((1, 2)) / max(count * (count - 1), 1)


class Terms(NamedTuple):
    """Every term of a batch by name; scalar tensors. `directional`, `listwise`, `energy`: 0 for a version without;
    `directional` of a constrained version is its `shortfall`."""

    mse: Tensor
    directional: Tensor
    floor: Tensor
    norm: Tensor
    orthogonality: Tensor
    listwise: Tensor
    energy: Tensor

    def weighted(self, weights: Losses, lambda_eff: float) -> dict[str, float]:
        """The weight of each term that has one, by its name."""
        all_of_them = {
            "mse": weights.mean_square,
            "directional": lambda_eff,
            "floor": weights.floor.weight,
            "norm": weights.norm,
            "orthogonality": weights.orthogonality,
            "listwise": weights.listwise.weight,
            "energy": weights.energy.weight,
        }
        return {name: weight for name, weight in all_of_them.items() if weight}

    def total(self, weights: Losses, lambda_eff: float) -> Tensor:
        """L = μ·L_mse + λ_eff·L_dir + β·L_floor + η·L_norm + κ·L_orth + ω·L_list + ε·L_energy; a term of weight
        0 costs no gradient. μ is 1 in all of the original's versions."""
        total = torch.zeros_like(self.mse)
        for name, weight in self.weighted(weights, lambda_eff).items():
            total = total + weight * getattr(self, name)
        return total


def directional(unit: Tensor, target: Tensor, prev: Tensor, margin: float, d: Directional) -> Tensor:
    """L_dir as the version has it."""
    if d.kind == "smooth":
        return directional_smooth(unit, target, prev, margin, d.gamma)
    if d.kind == "scale_aware":
        return directional_scale_aware(unit, target, prev, margin, d.gamma, d.alpha, d.margin_ratio)
    return unit.new_zeros(())


def terms(
    raw: Tensor,
    unit: Tensor,
    context: Tensor,
    target: Tensor,
    margin: float,
    weights: Losses,
    rivals: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    constraint: Constraint | None = None,
    samples: Tensor | None = None,
) -> Terms:
    """All terms of a batch. `context` (B, T, D); `margin` is the schedule's m_gap of the epoch; `rivals`: what
    `listwise` takes, the ranking prediction first, and `samples` (S, B, D) what `energy` does, for a version that has
    it; `constraint`: of a constrained version."""
    prev = context[:, weights.directional.prev]
    return Terms(
        mse(raw, target),
        shortfall(unit, target, context, constraint)
        if constraint
        else directional(unit, target, prev, margin, weights.directional),
        floor(unit, target, weights.floor.tau),
        norm(raw),
        orthogonality(unit, prev),
        unit.new_zeros(()) if rivals is None else listwise(*rivals),
        unit.new_zeros(()) if samples is None else energy(samples, target).mean(),
    )


@torch.no_grad()
def health(unit: Tensor, target: Tensor, context: Tensor, prev: int) -> dict[str, Tensor]:
    """What is watched (handbook §3), batch means: pos, neg, gap, ratio; and `escape`, the share of negative weights.

    `escape` is Σ max(−w, 0) / Σ |w| over the batch's mean weights w of the context vectors in the prediction
    (`context_weights`): 0 where no context vector is subtracted, 1 where all are.
    """
    pos, neg = cosine(unit, target), cosine(unit, context[:, prev])
    w = context_weights(unit, context).mean(0)
    escape = (-w).clamp(min=0).sum() / w.abs().sum().clamp(min=EPSILON)
    watched = {"pos": pos.mean(), "neg": neg.mean(), "gap": gap(pos, neg).mean(), "ratio": ratio(pos, neg).mean()}
    return watched | {"escape": escape}


def context_weights(unit: Tensor, context: Tensor) -> Tensor:
    """(B, T) weights w of the context vectors in the prediction: least ‖p − Σ_t w_t·context_t‖² for each window.

    A slight ridge (1e-4 of the vectors' mean square) keeps them finite where context vectors are all but equal.
    """
    gram = context @ context.transpose(1, 2)  # (B, T, T)
    size = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp(min=1e-12)
    eye = torch.eye(context.shape[1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + 1e-4 * size * eye, (context @ unit[..., None]))[..., 0]


def gradients(terms: Terms, raw: Tensor, samples: Tensor | None = None) -> dict[str, Tensor | None]:
    """∂L_term/∂raw (B, D) by term, unweighted; None for a term that has none, or acts on another head.

    The energy score does not see `raw`: its gradient is that at `samples` (S, B, D) when all of a window's move
    together, for equal samples the one at their one place.
    """
    out = {
        name: torch.autograd.grad(term, raw, retain_graph=True, allow_unused=True)[0] if term.requires_grad else None
        for name, term in terms._asdict().items()
        if name != "energy"
    }
    if samples is not None:
        out["energy"] = torch.autograd.grad(terms.energy, samples, retain_graph=True)[0].sum(0)
    return {"energy": None, **out}


def pulls(gradients: dict[str, Tensor | None], raw: Tensor) -> dict[str, Tensor]:
    """How hard each term pulls at the prediction: the norm over the batch of its gradient there (`gradients`), as
    `pull_<term>`; and `angle`, in degrees, between the mean-square and the directional gradient. NaN for a term that
    has no gradient, and for an angle with a gradient of 0.

    ρ compares the terms' values; these tell what each does to the weights (handbook §4.1 point 7). An angle above 90
    means that the two undo each other.
    """
    nan = raw.new_full((), float("nan"))
    out = {f"pull_{name}": nan if g is None else g.norm() for name, g in gradients.items()}
    out["angle"] = nan
    if gradients["directional"] is not None:
        turn = F.cosine_similarity(gradients["mse"].flatten(), gradients["directional"].flatten(), dim=0)
        both = (out["pull_mse"] > 0) & (out["pull_directional"] > 0)
        out["angle"] = torch.where(both, torch.rad2deg(torch.acos(turn.clamp(-1, 1))), nan)
    return out


def backward(
    terms: Terms, weights: Losses, lambda_eff: float, raw: Tensor, gradients: dict[str, Tensor | None]
) -> None:
    """As `terms.total(weights, lambda_eff).backward()`, but what is known of it at `raw` (`gradients`) is used.

    The ranking loss and the energy score see more than `raw`, and go through the graph.
    """
    acting = terms.weighted(weights, lambda_eff)
    known = [
        weight * gradients[name] for name, weight in acting.items() if name in AT_RAW and gradients[name] is not None
    ]
    rest = [weight * getattr(terms, name) for name, weight in acting.items() if name not in AT_RAW]
    roots = ([(raw, sum(known))] if known else []) + [(term, None) for term in rest]
    if roots:
        torch.autograd.backward(*map(list, zip(*roots, strict=True)))
