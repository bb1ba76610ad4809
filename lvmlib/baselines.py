"""Predictors without gradient descent: constant, copy last, mean, weighted mean, ridge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .models import Predictor
from .windows import Windows

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # of the ridge


class Weighted(Predictor):
    """raw = Σ_t w_t · context_t. Copy last and the mean are cases of it."""

    def __init__(self, dim: int, weights: Tensor):
        super().__init__(dim, len(weights))
        self.register_buffer("weights", weights)

    def raw(self, context: Tensor) -> Tensor:
        return torch.einsum("t,btd->bd", self.weights, context)


class Linear(Predictor):
    """raw = flatten(context) @ weights, weights (T·D, D)."""

    def __init__(self, dim: int, weights: Tensor):
        super().__init__(dim, len(weights) // dim)
        self.register_buffer("weights", weights)

    def raw(self, context: Tensor) -> Tensor:
        return context.flatten(1) @ self.weights


class Constant(Predictor):
    """The same vector whatever the context."""

    def __init__(self, dim: int, context_length: int, vector: Tensor):
        super().__init__(dim, context_length)
        self.register_buffer("vector", vector)

    def raw(self, context: Tensor) -> Tensor:
        return self.vector.expand(len(context), -1)


def fit_constant(train: Windows) -> Tensor:
    """(D,) the mean target, which is the constant with the least mean-square error."""
    total = sum(target.double().sum(0) for _, target in train.batches(512))
    return (total / len(train)).float()


def fit_weights(train: Windows) -> Tensor:
    """(T,) weights w that minimise Σ ‖Σ_t w_t·context_t − target‖² over the training windows, in float64."""
    gram = torch.zeros(train.context_length, train.context_length, dtype=torch.float64)
    moment = torch.zeros(train.context_length, dtype=torch.float64)
    for context, target in train.batches(512):
        context, target = context.double(), target.double()
        gram += torch.einsum("btd,bsd->ts", context, context)
        moment += torch.einsum("btd,bd->t", context, target)
    return least_squares(gram, moment)


def least_squares(gram: Tensor, moment: Tensor) -> Tensor:
    """(T,) float32 w of least norm with gram · w = moment; contexts may be collinear."""
    return torch.linalg.lstsq(gram, moment[:, None], driver="gelsd").solution[:, 0].float()


class Sums(NamedTuple):
    """All that a ridge regression needs of its windows, in float32."""

    gram: Tensor  # (T·D, T·D) Σ x xᵀ, x the flattened context
    moment: Tensor  # (T·D, D) Σ x yᵀ, y the target

    @classmethod
    def of(cls, windows: Windows, keep: np.ndarray | None = None, batch_size: int = 512) -> Sums:
        """Sum over the windows with `keep` (N,), by default over all."""
        keep = torch.from_numpy(np.ones(len(windows), bool) if keep is None else keep)
        size, dim = windows.context_length * windows.store.dim, windows.store.dim
        gram, moment = torch.zeros(size, size), torch.zeros(size, dim)
        for inside, (context, target) in zip(keep.split(batch_size), windows.batches(batch_size), strict=False):
            x = context[inside].flatten(1)
            gram += x.T @ x
            moment += x.T @ target[inside]
        return cls(gram, moment)

    def ridge(self, strength: float) -> Tensor:
        """(T·D, D) the W that minimises Σ ‖xW − y‖² + strength · ‖W‖², solved in float64."""
        gram = self.gram.double()
        gram.diagonal().add_(strength)
        return torch.cholesky_solve(self.moment.double(), torch.linalg.cholesky(gram)).float()

    def error(self, weights: Tensor) -> float:
        """Σ ‖xW − y‖² without the constant Σ ‖y‖²."""
        return float((weights * (self.gram @ weights)).sum() - 2 * (weights * self.moment).sum())


def fit_ridge(train: Windows, strengths: Sequence[float] = STRENGTHS) -> tuple[Tensor, float]:
    """(T·D, D) ridge weights of all windows, and their strength, chosen by the error on every fifth article."""
    left_out = train.article % 5 == 0
    inside, outside = Sums.of(train, ~left_out), Sums.of(train, left_out)
    if len(strengths) > 1 and left_out.any() and not left_out.all():
        strength = min(strengths, key=lambda s: outside.error(inside.ridge(s)))
    else:
        strength = sorted(strengths)[len(strengths) // 2]  # no choice, or too few articles to choose by
    return Sums(inside.gram + outside.gram, inside.moment + outside.moment).ridge(strength), strength


def untrained(dim: int, length: int) -> dict[str, Predictor]:
    """Return the predictors that need no data: the last context vector, and the context's mean."""
    last = torch.zeros(length)
    last[-1] = 1.0
    return {"copy last": Weighted(dim, last), "mean": Weighted(dim, torch.full((length,), 1 / length))}


def baselines(train: Windows) -> dict[str, Predictor]:
    """Return the trivial predictors. Constant, weighted mean and ridge are fitted to the training windows."""
    dim, length = train.store.dim, train.context_length
    return {
        "constant": Constant(dim, length, fit_constant(train)),
        **untrained(dim, length),
        "weighted mean": Weighted(dim, fit_weights(train)),
        "ridge": Linear(dim, fit_ridge(train)[0]),
    }
