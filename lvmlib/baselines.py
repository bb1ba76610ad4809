"""Predictors without gradient descent: constant, copy last, mean, weighted mean, ridge."""

from __future__ import annotations

import torch
from torch import Tensor

from .models import Predictor
from .windows import Windows


class Weighted(Predictor):
    """A fixed weight for each context position: raw = Σ_t w_t · context_t. Copy-last and the mean are cases of it."""

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
    """The same vector whatever the context: what is reached without reading it."""

    def __init__(self, dim: int, context_length: int, vector: Tensor):
        super().__init__(dim, context_length)
        self.register_buffer("vector", vector)

    def raw(self, context: Tensor) -> Tensor:
        return self.vector.expand(len(context), -1)


def fit_constant(train: Windows) -> Tensor:
    """(D,) the mean target of the training windows: of all constants, the one with the least mean-square error."""
    total = sum(target.double().sum(0) for _, target in train.batches(512))
    return (total / len(train)).float()


def fit_weights(train: Windows) -> Tensor:
    """(T,) weights that minimise Σ ‖Σ_t w_t·context_t − target‖² over the training windows, in float64."""
    gram = torch.zeros(train.context_length, train.context_length, dtype=torch.float64)
    moment = torch.zeros(train.context_length, dtype=torch.float64)
    for context, target in train.batches(512):
        context, target = context.double(), target.double()
        gram += torch.einsum("btd,bsd->ts", context, context)
        moment += torch.einsum("btd,bd->t", context, target)
    # lstsq, not solve: near-constant sequences make the five vectors collinear.
    return torch.linalg.lstsq(gram, moment[:, None], driver="gelsd").solution[:, 0].float()


def fit_ridge(train: Windows, strengths=(1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)) -> tuple[Tensor, float]:
    """(T·D, D) ridge weights, and the strength chosen: the best on every fifth training article, left out first."""
    held = torch.from_numpy(train.article % 5 == 0)
    size = train.context_length * train.store.dim
    sums = {part: [torch.zeros(size, size), torch.zeros(size, train.store.dim)] for part in (False, True)}
    for first, (context, target) in zip(range(0, len(train), 512), train.batches(512), strict=True):
        out = held[first : first + len(target)]
        for part, (gram, moment) in sums.items():
            x, y = context[out == part].flatten(1), target[out == part]
            gram += x.T @ x
            moment += x.T @ y

    def solve(gram: Tensor, moment: Tensor, strength: float) -> Tensor:
        factor = torch.linalg.cholesky(gram.double() + strength * torch.eye(size, dtype=torch.float64))
        return torch.cholesky_solve(moment.double(), factor).float()

    def error_on_held(weights: Tensor) -> float:  # ‖XW − Y‖² without the constant ‖Y‖²
        gram, moment = sums[True]
        return float((weights * (gram @ weights)).sum() - 2 * (weights * moment).sum())

    if bool(held.any()) and not bool(held.all()):
        strength = min(strengths, key=lambda s: error_on_held(solve(*sums[False], s)))
    else:
        strength = sorted(strengths)[len(strengths) // 2]  # too few articles to choose by
    gram, moment = (a + b for a, b in zip(*sums.values(), strict=True))
    return solve(gram, moment, strength), strength


def untrained(dim: int, length: int) -> dict[str, Predictor]:
    """The predictors that need no data: the last context vector, and the context's mean."""
    last = torch.zeros(length)
    last[-1] = 1.0
    return {"copy last": Weighted(dim, last), "mean": Weighted(dim, torch.full((length,), 1 / length))}


def baselines(train: Windows) -> dict[str, Predictor]:
    """The trivial predictors; constant, weighted mean and ridge are fitted to the training windows by least squares."""
    dim, length = train.store.dim, train.context_length
    return {
        "constant": Constant(dim, length, fit_constant(train)),
        **untrained(dim, length),
        "weighted mean": Weighted(dim, fit_weights(train)),
        "ridge": Linear(dim, fit_ridge(train)[0]),
    }
