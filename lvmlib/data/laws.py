"""Stationary Gaussian laws of synthetic articles, and their optimal predictors in closed form (handbook §4.2).

Axes: A articles, L chunks an article, D vector dimension, P = D/2 planes, T context length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..baselines import Linear


@dataclass(frozen=True, eq=False)
class Part:
    """A vector autoregression in r planes: z_{t+1} = M·z_t + noise, stationary.

    `transition` M and `variance` E[z zᵀ], each (r, 2, 2). `delay`: the second axes are that many steps late.
    """

    transition: np.ndarray
    variance: np.ndarray
    delay: int = 0

    def covariance(self, lag: int) -> np.ndarray:
        """(r, 2, 2) E[z_{t+lag} z_tᵀ] = M^lag · variance, its transpose at −lag; shifted where one axis is late."""

        def undelayed(k):
            ahead = np.linalg.matrix_power(self.transition, abs(k)) @ self.variance
            return ahead if k >= 0 else ahead.mT

        found = undelayed(lag).copy()
        if self.delay:
            found[:, 0, 1] = undelayed(lag + self.delay)[:, 0, 1]
            found[:, 1, 0] = undelayed(lag - self.delay)[:, 1, 0]
        return found

    def sample(self, random: np.random.Generator, articles: int, length: int) -> np.ndarray:
        """(A, L, r, 2) float32 independent articles, each begun in the stationary state."""
        shape = (articles, length + self.delay, len(self.variance), 2)
        innovation = self.variance - self.transition @ self.variance @ self.transition.mT
        if np.abs(innovation).max() < 1e-12:  # nothing is ever added: one draw for the whole article
            start = _planes(_root(self.variance), random.standard_normal((articles, 1, *shape[2:]), np.float32))
            return np.broadcast_to(start, (articles, length, *shape[2:]))
        path = random.standard_normal(shape, np.float32)
        path[:, 0] = _planes(_root(self.variance), path[:, 0])
        path[:, 1:] = _planes(_root(innovation), path[:, 1:])
        if self.transition.any():
            for t in range(1, length + self.delay):
                path[:, t] += _planes(self.transition, path[:, t - 1])
        if self.delay:
            path = np.stack([path[:, self.delay :, :, 0], path[:, :length, :, 1]], -1)
        return path


@dataclass(frozen=True, eq=False)
class Law:
    """A chunk before it is normalised: x_t = mean + Σ parts, a stationary Gaussian process with E‖x_t‖² = 1.

    In coordinates `basis` (D, D), orthogonal, the process splits into P independent planes; a part of r planes lives in
    the first r. `common`: the share of the mean, the same vector in all articles. `time`: −1 for the reversed process.
    """

    dim: int
    common: float
    parts: tuple[Part, ...]
    basis: np.ndarray
    time: int = 1

    @property
    def mean(self) -> np.ndarray:
        """(D,) the mean of all chunks."""
        return self.basis.sum(1) * np.sqrt(self.common / self.dim)  # equally far along every axis of the basis

    def reversed(self) -> Law:
        """The law of the articles read from end to begin."""
        return replace(self, time=-self.time)

    def covariance(self, lag: int) -> np.ndarray:
        """(P, 2, 2) E[(x_{t+lag} − mean)(x_t − mean)ᵀ] in the planes; the transpose at −lag."""
        total = np.zeros((self.dim // 2, 2, 2))
        for part in self.parts:
            total[: len(part.variance)] += part.covariance(lag * self.time)
        return total

    def lag_cosine(self, lag: int) -> float:
        """E cos(x_t, x_{t+lag}) in high dimension: common + trace of the covariance. The same for reversed time."""
        return float(self.common + np.trace(self.covariance(lag), axis1=1, axis2=2).sum())

    def cosines(self, length: int) -> np.ndarray:
        """(L, L) expected cosines between positions, 1 on the diagonal."""
        by_lag = np.array([self.lag_cosine(k) for k in range(length)])
        return by_lag[np.abs(np.subtract.outer(np.arange(length), np.arange(length)))]

    def weights(self, horizon: int, context_length: int = 5) -> np.ndarray:
        """(T, P, 2, 2) K of the Gaussian conditional mean E[target | context] = mean + Σ_j K_j (context_j − mean)."""
        context = np.arange(context_length)
        planes = self.dim // 2
        within = np.stack([[self.covariance(i - j) for j in context] for i in context])  # (T, T, P, 2, 2)
        across = np.stack([self.covariance(context_length - 1 + horizon - j) for j in context])  # (T, P, 2, 2)
        gram = within.transpose(2, 0, 3, 1, 4).reshape(planes, 2 * context_length, 2 * context_length)
        moment = across.transpose(1, 2, 0, 3).reshape(planes, 2, 2 * context_length)
        solved = np.linalg.solve(gram, moment.mT).mT.reshape(planes, 2, context_length, 2)
        return solved.transpose(2, 0, 1, 3)

    def optimal(self, horizon: int, context_length: int = 5) -> Optimal:
        """The best predictor (in high dimension) by mean-square error, and so by cosine: a models.Predictor."""
        return self._linear(self.weights(horizon, context_length), self.mean)

    def ranking(self, horizon: int, context_length: int = 5, elsewhere: int = 20) -> Optimal:
        """The linear predictor that ranks an article's chunks by the likelihood ratio of the target's law to that of a
        chunk `elsewhere` steps after the last (Neyman and Pearson: no test separates the two better).

        Given the context both are Gaussian, with means m₁, m₀ and covariances S₁, S₀. The part of the log ratio at a
        chunk c that depends on c and the context is c·(S₁⁻¹ m₁ − S₀⁻¹ m₀). Zero where there is no order.
        """
        near, far = (self._precision_weights(h, context_length) for h in (horizon, elsewhere))
        return self._linear(near - far, np.zeros(self.dim))

    def _precision_weights(self, horizon: int, context_length: int) -> np.ndarray:
        """(T, P, 2, 2) S⁻¹ K, S the covariance of the target given the context."""
        kernel = self.weights(horizon, context_length)
        across = [self.covariance(context_length - 1 + horizon - j) for j in range(context_length)]
        residual = self.covariance(0) - sum(k @ c.mT for k, c in zip(kernel, across, strict=True))
        return np.linalg.inv(residual) @ kernel

    def _linear(self, kernel: np.ndarray, constant: np.ndarray) -> Optimal:
        """constant + Σ_j K_j (context_j − mean), of K (T, P, 2, 2) in the planes."""
        turned = self.basis.reshape(self.dim, -1, 2).transpose(1, 0, 2)  # (P, D, 2)
        full = np.stack([(turned @ k).transpose(1, 0, 2).reshape(self.dim, -1) @ self.basis.T for k in kernel])
        bias = constant - np.einsum("tde,e->d", full, self.mean)
        weights = full.transpose(0, 2, 1).reshape(-1, self.dim)  # (T·D, D): models.Linear multiplies from the right
        return Optimal(self.dim, torch.from_numpy(weights).float(), torch.from_numpy(bias).float())

    def sample(self, articles: int, length: int, seed: int) -> np.ndarray:
        """(A, L, D) float32 unit vectors."""
        random = np.random.default_rng(seed)
        x = np.zeros((articles, length, self.dim // 2, 2), np.float32)
        for part in self.parts:
            x[:, :, : len(part.variance)] += part.sample(random, articles, length)
        x = x.reshape(articles, length, self.dim) @ self.basis.T.astype(np.float32) + self.mean.astype(np.float32)
        x /= np.linalg.norm(x, axis=-1, keepdims=True)
        return x[:, :: self.time]


class Optimal(Linear):
    """raw = flatten(context) @ weights + bias: what follows from a Gaussian law."""

    def __init__(self, dim: int, weights: torch.Tensor, bias: torch.Tensor):
        super().__init__(dim, weights)
        self.register_buffer("bias", bias)

    def raw(self, context: torch.Tensor) -> torch.Tensor:
        return super().raw(context) + self.bias


def _root(matrices: np.ndarray) -> np.ndarray:
    """Symmetric square roots of (r, 2, 2) positive semidefinite matrices; Cholesky fails on singular ones."""
    values, vectors = np.linalg.eigh(matrices)
    return (vectors * np.sqrt(np.maximum(values, 0))[:, None, :]) @ vectors.mT


def _planes(matrices: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(r, 2, 2) matrices on (..., r, 2) vectors, in x's type."""
    m = matrices.astype(x.dtype)
    return np.stack(
        [m[:, 0, 0] * x[..., 0] + m[:, 0, 1] * x[..., 1], m[:, 1, 0] * x[..., 0] + m[:, 1, 1] * x[..., 1]], -1
    )
