"""The loss terms of handbook §3, one function each, and the table in which they are registered.

Axes: B batch, T context length, D vector dimension, S samples, C candidates. A term takes vectors, not a model, and
returns a scalar: `raw` and `unit` predictions p, the `target` y, and `prev`, the context vector that p is compared
with; each (B, D). A new term is one function of a `Batch` and one call of `register` (see docs/own-loss.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Losses
from .controller import Constraint
from .errors import LVMError

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


def floor(unit: Tensor, target: Tensor, tau: float) -> Tensor:
    """L_floor: mean relu(τ − cos(p, y))²: no prediction may turn away from its target."""
    return F.relu(tau - cosine(unit, target)).square().mean()


def norm(raw: Tensor) -> Tensor:
    """L_norm: mean (‖raw‖ − 1)². Of the unit vector it is always 0, as in the original."""
    return (raw.norm(dim=-1) - 1).square().mean()


def orthogonality(unit: Tensor, prev: Tensor) -> Tensor:
    """L_orth: mean cos(p, prev)²."""
    return cosine(unit, prev).square().mean()


class Rivals(NamedTuple):
    """What the listwise loss compares: chunks of the target's article outside the context, and of other articles."""

    ranker: Tensor  # (B, D) unit vectors that rank; (B, K, D) of K rankers
    chunks: Tensor  # (B, C, D) unit vectors, the target first
    counts: Tensor  # (B, C) whether a chunk counts; the others fill the rows
    scale: Tensor  # 1 / temperature


def listwise(r: Rivals) -> Tensor:
    """L_list: mean −log softmax(scale · cos(ranker, chunks))[target], over several rankers the mean of their losses.

    InfoNCE with the target's own article for negatives (van den Oord et al. 2018, eq. 4).
    """
    logits = r.scale * torch.einsum("b...d,bcd->b...c", r.ranker, r.chunks)
    counts = r.counts if r.ranker.ndim == 2 else r.counts[:, None]
    # Masked after the product with the scale, whose gradient would be 0 · ∞.
    return -logits.masked_fill(~counts, float("-inf")).log_softmax(-1)[..., 0].mean()


def shortfall(unit: Tensor, target: Tensor, context: Tensor, constraint: Constraint) -> Tensor:
    """How far the batch stays below its bound: c − mean cos(p, y), or m − min_t mean [cos(p, y) − cos(p, context_t)]
    over the constraint's places t in `context` (B, T, D). Its weight in the loss is the Lagrange multiplier."""
    reached = cosine(unit, target).mean()
    if constraint.measure == "margin":
        against = context[:, list(constraint.against)]  # (B, K, D)
        reached = reached - cosine(unit[:, None], against).mean(0).max()
    return constraint.at_least - reached


def energy(samples: Tensor, target: Tensor) -> Tensor:
    """(B,) energy score of `samples` (S, B, D) for `target` (B, D); lower is better.

        (1/S) Σ_s ‖x_s − y‖ − 1/(2 S (S−1)) Σ_{s≠s'} ‖x_s − x_s'‖

    Strictly proper: least in the mean where the samples are drawn from the target's own distribution, for any S
    (Gneiting & Raftery, JASA 102, 2007, eq. 22 with β = 1). One sample has no second term.
    """
    to_target, between = distances(samples, target)
    return to_target - between / 2


def distances(samples: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) mean distance of `samples` (S, B, D) from `target` (B, D), and from each other (0 where there is one)."""
    count = len(samples)
    to_target = (samples - target).norm(dim=-1).mean(0)
    members = samples.transpose(0, 1).contiguous()  # (B, S, D)
    # By differences, not by products: those round the distance of equal samples away from 0.
    between = torch.cdist(members, members, compute_mode="donot_use_mm_for_euclid_dist")
    return to_target, between.sum((1, 2)) / max(count * (count - 1), 1)


class Batch(NamedTuple):
    """What a loss term may look at. `rivals` and `samples` are None in a version whose terms do not need them."""

    raw: Tensor  # (B, D) prediction
    unit: Tensor  # (B, D) raw / ‖raw‖
    context: Tensor  # (B, T, D)
    target: Tensor  # (B, D)
    settings: Losses  # `losses` of the version
    margin: float = 0.0  # the schedule's m_gap of the epoch
    constraint: Constraint | None = None
    rivals: Rivals | None = None
    samples: Tensor | None = None  # (S, B, D)
    epoch: int = 1

    @property
    def prev(self) -> Tensor:
        """(B, D) the context vector that the directional loss compares with."""
        return self.context[:, self.settings.directional.prev]


def directional(b: Batch) -> Tensor:
    """L_dir: the mean hinge on the gap at m_gap, γ; from v2.1 on (`scale_aware`) α times it + (1 − α) times that on the
    ratio at m_ratio, γ. In a constrained version the `shortfall` takes its place."""
    d = b.settings.directional
    if b.constraint:
        return shortfall(b.unit, b.target, b.context, b.constraint)
    if d.kind == "none":
        return b.unit.new_zeros(())
    pos, neg = cosine(b.unit, b.target), cosine(b.unit, b.prev)
    by_gap = hinge(gap(pos, neg), b.margin, d.gamma)
    if d.kind == "smooth":
        return by_gap.mean()
    by_ratio = hinge(ratio(pos, neg), d.margin_ratio, d.gamma)
    return (d.alpha * by_gap + (1 - d.alpha) * by_ratio).mean()


class Term(NamedTuple):
    """A registered loss term: `weight` is its key in the version's `losses` (None: λ), `needs` what it acts on."""

    compute: Callable[[Batch], Tensor]
    weight: str | None
    needs: str = "raw"  # differentiated at the raw prediction; or "rivals", "samples": 0 where the batch has none


# L = μ·L_mse + λ_eff·L_dir + β·L_floor + η·L_norm + κ·L_orth + ω·L_list + ε·L_energy, summed in this order, which is
# also the order of the columns in a run's tables.
TERMS: dict[str, Term] = {
    "mse": Term(lambda b: mse(b.raw, b.target), "mean_square"),
    "directional": Term(directional, None),
    "floor": Term(lambda b: floor(b.unit, b.target, b.settings.floor.tau), "floor.weight"),
    "norm": Term(lambda b: norm(getattr(b, b.settings.norm_of)), "norm"),
    "orthogonality": Term(lambda b: orthogonality(b.unit, b.prev), "orthogonality"),
    "listwise": Term(lambda b: listwise(b.rivals), "listwise.weight", "rivals"),
    "energy": Term(lambda b: energy(b.samples, b.target).mean(), "energy.weight", "samples"),
}
OWN: dict[str, Term] = {}  # registered by users; a version names those that it trains with in `losses.extra`


def register(name: str, compute: Callable[[Batch], Tensor], needs: str = "raw") -> None:
    """Add a loss term: `compute(batch)` gives a scalar. Versions train with it by `losses: {extra: {name: weight}}`.

    Registering a name again replaces its function. Raises LVMError for the name of a built-in term.
    """
    if name in TERMS or not name.isidentifier():
        raise LVMError(f"loss term {name!r}: the name must be an identifier, and not that of a built-in term")
    OWN[name] = Term(compute, f"extra.{name}", needs)


def names(settings: Losses) -> tuple[str, ...]:
    """The names of a version's terms: the built-in ones, then its own."""
    return *TERMS, *settings.extra


def active(settings: Losses) -> dict[str, Term]:
    """The terms of a version by name. Raises LVMError for one of its own that is not registered."""
    for name in settings.extra:
        if name not in OWN:
            raise LVMError(f"losses.extra.{name}: no such term; call losses.register first (known: {[*OWN]})")
    return TERMS | {name: OWN[name] for name in settings.extra}


def needed(settings: Losses) -> set[str]:
    """What the terms of weight other than 0 act on: "raw", "rivals", "samples"."""
    return {active(settings)[name].needs for name in weights(settings, 0.0)}


def terms(batch: Batch) -> dict[str, Tensor]:
    """All terms of a batch by name, unweighted scalars; 0 for one whose `needs` the batch does not have."""
    found = {}
    for name, term in active(batch.settings).items():
        absent = term.needs != "raw" and getattr(batch, term.needs) is None
        found[name] = batch.unit.new_zeros(()) if absent else term.compute(batch)
    return found


def weights(settings: Losses, lambda_eff: float) -> dict[str, float]:
    """The weight of each term that has one other than 0, by name."""
    found = {n: lambda_eff if t.weight is None else attrgetter(t.weight)(settings) for n, t in TERMS.items()}
    return {name: weight for name, weight in (found | dict(settings.extra)).items() if weight}


@torch.no_grad()
def health(unit: Tensor, target: Tensor, context: Tensor, prev: int) -> dict[str, Tensor]:
    """What is watched (handbook §3), batch means: pos, neg, gap, ratio, escape.

    escape = Σ max(−w, 0) / Σ |w| over the batch's mean `context_weights` w: the share of negative weights.
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


def gradients(terms: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor | None]:
    """∂L_term/∂raw (B, D) by term, unweighted; None for a term that has none, or acts on another head.

    The gradient of a term of the samples is the one for moving all of a window's samples together.
    """
    found: dict[str, Tensor | None] = {}
    for name, term in active(batch.settings).items():
        value, sampled = terms[name], term.needs == "samples"
        if not value.requires_grad:
            found[name] = None
        elif sampled:
            found[name] = torch.autograd.grad(value, batch.samples, retain_graph=True)[0].sum(0)
        else:
            found[name] = torch.autograd.grad(value, batch.raw, retain_graph=True, allow_unused=True)[0]
    return found


def gradient_norms(gradients: Mapping[str, Tensor | None], raw: Tensor) -> dict[str, Tensor]:
    """The norm over the batch of each term's unweighted gradient at the prediction; NaN where there is none."""
    return {name: raw.new_full((), float("nan")) if g is None else g.norm() for name, g in gradients.items()}


def angle(gradients: Mapping[str, Tensor | None], raw: Tensor) -> Tensor:
    """The angle in degrees between the mean-square and the directional gradient; NaN where one vanishes."""
    a, b, nan = gradients["mse"], gradients["directional"], raw.new_full((), float("nan"))
    if b is None:
        return nan
    between = F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    return torch.where((a.norm() > 0) & (b.norm() > 0), torch.rad2deg(torch.acos(between.clamp(-1, 1))), nan)


def backward(
    terms: Mapping[str, Tensor], weights: Mapping[str, float], batch: Batch, gradients: Mapping[str, Tensor | None]
) -> None:
    """Add the gradients of Σ weight · term to the parameters, by the `gradients` at `raw` that are known already.

    Terms of rivals and samples go through the graph: they depend on more than `raw`.
    """
    needs = {name: term.needs for name, term in active(batch.settings).items()}
    known = [
        weight * gradients[name]
        for name, weight in weights.items()
        if needs[name] == "raw" and gradients[name] is not None
    ]
    rest = [weight * terms[name] for name, weight in weights.items() if needs[name] != "raw"]
    roots = ([(batch.raw, sum(known))] if known else []) + [(term, None) for term in rest]
    if roots:
        torch.autograd.backward(*map(list, zip(*roots, strict=True)))
