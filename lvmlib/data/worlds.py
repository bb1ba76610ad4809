"""Synthetic worlds whose truth is known in closed form (handbook §4.2).

Axes: A articles, L chunks an article, D vector dimension, P = D/2 planes, T context length, K offsets.

- exchangeable: no order. Every figure of direction must read "none".
- rotation: some planes turn. An arrow to an order probe and to a fixed predictor put before both directions, but *none*
  to whoever trains anew in each direction: what turns the other way is as easy to learn and to predict.
- announcing: a faint part of each chunk announces what is loud in the next. An arrow to all of them: of two trained
  predictors the forward one is better.
- reversed, reversed_announcing: the same, time flipped. The sign of the answer flips.
- converging, diverging: coherence rises, falls. No order, though Δ and some margins see one.
- copy: hardly any change. Exposes the metrics that copying wins.

A world is a `Store`, as a corpus is: the store holds a sample, its `datasheet["truth"]` plain numbers, and `law` and
`cosines` the rest. Closed forms are those of high dimension, where a chunk has length 1 before it is normalised;
at D = 48 they are off by up to 0.02 (`simulated` gives the truth of any measure there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import pandas as pd
import torch

from ..baselines import Linear
from ..errors import LVMError
from ..windows import Store
from .store import make_store

SPLIT_PATTERN = ("train", "train", "train", "val", "ood")  # article i is in SPLIT_PATTERN[i % 5]

# Shares of a chunk's squared length. Together they give lag cosines 0.501, 0.456, 0.431, 0.417, … 0.400, and 0.025
# across articles; the embedded Wikipedia vectors have 0.501, 0.455, 0.431, 0.415 and 0.025.
COMMON, TOPIC, DRIFT = 0.025, 0.375, 0.184
FADING = 0.55  # of the drift from one chunk to the next
TURNING, TURNING_MEMORY = 0.2, 0.8  # the rotation's share, taken from the noise; a in y_{t+1} = a·R·y_t + noise
HINT = 0.05  # the share of what announces, likewise


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
    """What a chunk is before it is normalised: x_t = mean + Σ parts, a stationary Gaussian process with E‖x_t‖² = 1.

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
        """(D,)"""
        return self.basis.sum(1) * np.sqrt(self.common / self.dim)  # equally far along every axis of the basis

    def reversed(self) -> Law:
        """The law of the articles read from end to begin."""
        return replace(self, time=-self.time)

    def covariance(self, lag: int) -> np.ndarray:
        """(P, 2, 2) E[(x_{t+lag} − mean)(x_t − mean)ᵀ] in the planes; it is its transpose at −lag."""
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
        """The best predictor there is (in high dimension), of mean-square error and so of cosine: a models.Predictor.

        `law.reversed().optimal(h)` is the best one on reversed articles.
        """
        full = self._dense(self.weights(horizon, context_length))
        bias = self.mean - np.einsum("tde,e->d", full, self.mean)
        return self._linear(full, bias)

    def ranking(self, horizon: int, context_length: int = 5, elsewhere: int = 20) -> Optimal:
        """The linear predictor that ranks the article's chunks by the likelihood ratio: the target's law against that
        of a chunk `elsewhere`, so many steps after the last. By Neyman and Pearson no other test tells the two better.

        Both are Gaussian given the context, with means m₁, m₀ and covariances S₁, S₀. Of the logarithm of their ratio
        at a chunk c, what depends on c and the context is c·(S₁⁻¹ m₁ − S₀⁻¹ m₀): a product, as in a ranking by cosine
        (the rest, a square of c, is all but equal for all chunks in high dimension). What all chunks of the article
        share, its topic, is in both and falls out; `optimal` keeps it, since it is most of a chunk's length. Zero
        where there is no order.
        """
        near, far = (
            np.linalg.inv(self._residual(h, context_length)) @ self.weights(h, context_length)
            for h in (horizon, elsewhere)
        )
        full = self._dense(near - far)
        return self._linear(full, -np.einsum("tde,e->d", full, self.mean))

    def _residual(self, horizon: int, context_length: int) -> np.ndarray:
        """(P, 2, 2) the covariance of the target given the context."""
        kernel = self.weights(horizon, context_length)
        across = [self.covariance(context_length - 1 + horizon - j) for j in range(context_length)]
        return self.covariance(0) - sum(k @ c.mT for k, c in zip(kernel, across, strict=True))

    def _dense(self, kernel: np.ndarray) -> np.ndarray:
        """(T, D, D) from (T, P, 2, 2) in the planes."""
        turned = self.basis.reshape(self.dim, -1, 2).transpose(1, 0, 2)  # (P, D, 2)
        return np.stack([(turned @ k).transpose(1, 0, 2).reshape(self.dim, -1) @ self.basis.T for k in kernel])

    def _linear(self, full: np.ndarray, bias: np.ndarray) -> Optimal:
        weights = full.transpose(0, 2, 1).reshape(-1, self.dim)  # models.Linear multiplies from the right
        return Optimal(self.dim, torch.from_numpy(weights).float(), torch.from_numpy(bias).float())

    def sweep(self, horizon: int, context_length: int = 5, offsets=range(-8, 6), weights=None) -> dict[int, float]:
        """Expected cosine of a linear predictor with the chunk at each offset from the target, in high dimension.

        `weights` (T, P, 2, 2): those of `weights(...)` of this law if None; another law's to see how a predictor made
        for it (for the other direction, say) does here. E p·x = common + Σ_j tr K_j E[z_j z_mᵀ], over ‖p‖.
        """
        kernel = self.weights(horizon, context_length) if weights is None else weights
        context = range(len(kernel))

        def with_chunk(m):
            return self.common + sum(np.einsum("pij,pji->", kernel[j], self.covariance(j - m)) for j in context)

        square = self.common + sum(
            np.einsum("pij,pjk,pik->", kernel[i], self.covariance(i - j), kernel[j]) for i in context for j in context
        )
        return {k: float(with_chunk(len(kernel) - 1 + horizon + k) / np.sqrt(square)) for k in offsets}

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


def exchangeable(
    articles: int = 160,
    length: int = 40,
    dim: int = 384,
    topic: float = 0.425,
    basis: int = 0,
    seed: int = 0,
    splits: Sequence[str] = SPLIT_PATTERN,
) -> Store:
    """x_t = normalise(mean + topic + noise_t): every order of an article's chunks is equally probable.

    `topic`: its share; the cosine of any two chunks is COMMON + topic = 0.45, the mean of the real lags 1 to 4.
    """
    made = exchangeable_law(dim, topic, basis)
    return _sampled("exchangeable", made, 0, articles, length, seed, splits, topic=topic, basis=basis)


@lru_cache(maxsize=16)
def exchangeable_law(dim: int = 384, topic: float = 0.425, basis: int = 0) -> Law:
    return _law(dim, basis, [_even(dim, 1.0, topic), _even(dim, 0.0, 1 - COMMON - topic)])


def copy(
    articles: int = 160,
    length: int = 40,
    dim: int = 384,
    noise: float = 0.01,
    basis: int = 0,
    seed: int = 0,
    splits: Sequence[str] = SPLIT_PATTERN,
) -> Store:
    """Near-constant articles: exchangeable, with only the share `noise` of a chunk its own (cosines 1 − noise)."""
    made = copy_law(dim, noise, basis)
    return _sampled("copy", made, 0, articles, length, seed, splits, noise=noise, basis=basis)


def copy_law(dim: int = 384, noise: float = 0.01, basis: int = 0) -> Law:
    return exchangeable_law(dim, 1 - COMMON - noise, basis)


def rotation(
    articles: int = 160,
    length: int = 40,
    dim: int = 384,
    strength: float = 1.0,
    planes: int | None = None,
    basis: int = 0,
    seed: int = 0,
    splits: Sequence[str] = SPLIT_PATTERN,
) -> Store:
    """Topic, fading drift, noise, and in `planes` planes a rotation: y_{t+1} = 0.8·R·y_t + noise (`rotation_law`).

    `strength` 0…1: the share by which the turning forward outweighs the turning backward; at 0 both directions of time
    have one law, though there is still something to predict. R depends on `basis` and `dim` alone: worlds that differ
    in `seed` are samples of one law.

    The lag cosines are the same at every strength, since in each plane the covariance at lag k is
    0.8^k (cos kθ · I + strength · sin kθ · J): the arrow is in the antisymmetric part, and over the planes the cos kθ
    cancel. Mirroring every plane (J → −J) turns the reversed world into this one: training anew in each direction finds
    *no* difference here, in any measure that does not favour an axis. `announcing` is the world for that.
    """
    made = rotation_law(dim, strength, planes, basis)
    arrow = int(strength > 0)
    return _sampled(
        "rotation", made, arrow, articles, length, seed, splits, strength=strength, planes=planes, basis=basis
    )


@lru_cache(maxsize=16)
def rotation_law(dim: int = 384, strength: float = 1.0, planes: int | None = None, basis: int = 0) -> Law:
    """Planes turn by θ_p evenly between 0 and π: Σ_p cos kθ_p = 0 for every lag k < 2·planes. Default planes: D/8."""
    _check_strength(strength)
    planes = _check_planes(planes, dim, dim // 8)
    angle = (np.arange(planes) + 0.5) * np.pi / planes
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).transpose(2, 0, 1)  # (r, 2, 2)
    variance = np.broadcast_to(np.eye(2) * TURNING / (2 * planes), turn.shape)
    turning = [
        Part(TURNING_MEMORY * matrix, weight * variance)
        for matrix, weight in ((turn, (1 + strength) / 2), (turn.mT, (1 - strength) / 2))
        if weight
    ]
    noise = 1 - COMMON - TOPIC - DRIFT - TURNING
    return _law(dim, basis, [_even(dim, 1.0, TOPIC), _even(dim, FADING, DRIFT), _even(dim, 0.0, noise), *turning])


def announcing(
    articles: int = 160,
    length: int = 40,
    dim: int = 384,
    strength: float = 1.0,
    planes: int | None = None,
    delay: int = 0,
    basis: int = 0,
    seed: int = 0,
    splits: Sequence[str] = SPLIT_PATTERN,
) -> Store:
    """Topic, noise, and in `planes` planes a faint hint u_t and a loud, fading theme v_{t+1} = 0.55·v_t + news.

    news ∝ strength · u_t + √(1 − strength²) · noise: what the next chunk's theme will add stands in this chunk as a
    hint. Forward a loud thing is to be predicted from a faint one, backward a faint one from a loud one, so that the
    forward predictor explains more. At strength 0 both directions of time have one law. The lag cosines are the same
    at every strength, and those of `rotation`. `planes`, `basis`: as there. `delay`: the theme comes so many chunks
    later still; horizon − 1 makes as clear an arrow at that horizon (but none to a probe of adjacent pairs).
    """
    made = announcing_law(dim, strength, planes, delay, basis)
    arrow = int(strength > 0)
    arguments = {"strength": strength, "planes": planes, "delay": delay, "basis": basis}
    return _sampled("announcing", made, arrow, articles, length, seed, splits, **arguments)


@lru_cache(maxsize=16)
def announcing_law(
    dim: int = 384, strength: float = 1.0, planes: int | None = None, delay: int = 0, basis: int = 0
) -> Law:
    """In each plane (u, v) ← [[0, 0], [c, 0.55]] (u, v) + noise, u white; c makes strength² of v's news come from u.

    Default planes: D/16.
    """
    _check_strength(strength)
    planes = _check_planes(planes, dim, dim // 16)
    hears = strength * np.sqrt((1 - FADING**2) * DRIFT / HINT)
    transition = np.broadcast_to(np.array([[0.0, 0.0], [hears, FADING]]), (planes, 2, 2))
    variance = np.broadcast_to(np.diag([HINT, DRIFT]) / planes, (planes, 2, 2))
    noise = 1 - COMMON - TOPIC - DRIFT - HINT
    return _law(dim, basis, [_even(dim, 1.0, TOPIC), _even(dim, 0.0, noise), Part(transition, variance, delay)])


def reversed_(of: str = "rotation", **arguments) -> Store:
    """Another world with time flipped: what announces comes after, what turned right turns left."""
    return reverse(world(of, **arguments))


def converging(
    articles: int = 160,
    length: int = 40,
    dim: int = 384,
    first: float = 2.0,
    last: float = 0.6,
    seed: int = 0,
    splits: Sequence[str] = SPLIT_PATTERN,
) -> Store:
    """Articles that come nearer to their topic: x_t = normalise(topic + s_t · noise_t), s_t falling evenly.

    topic and noise_t are independent random unit vectors, so in high dimension
    cos(x_t, x_u) ≈ 1 / √((1 + s_t²)(1 + s_u²)) (`converging_cosine`): a chunk is nearer to the next one than to
    the one before it, Δ > 0, though the order holds nothing else to predict. The data of option C.
    """
    return _converging("converging", articles, length, dim, first, last, seed, splits)


def diverging(
    articles: int = 160,
    length: int = 40,
    dim: int = 384,
    first: float = 0.6,
    last: float = 2.0,
    seed: int = 0,
    splits: Sequence[str] = SPLIT_PATTERN,
) -> Store:
    """Articles that wander off their topic: `converging` with s_t rising, which is also its time reversal. Δ < 0."""
    return _converging("diverging", articles, length, dim, first, last, seed, splits)


def converging_scale(length: int, first: float, last: float) -> np.ndarray:
    """(L,) s_t."""
    return np.linspace(first, last, length)


def converging_cosine(length: int, first: float, last: float) -> np.ndarray:
    """(L, L) expected cosines between positions t ≠ u in the limit of high dimension (the diagonal is not 1)."""
    s = np.sqrt(1 + converging_scale(length, first, last) ** 2)
    return 1 / np.outer(s, s)


WORLDS = {
    "exchangeable": exchangeable,
    "rotation": rotation,
    "announcing": announcing,
    "reversed": reversed_,
    "reversed_announcing": partial(reversed_, "announcing"),
    "converging": converging,
    "diverging": diverging,
    "copy": copy,
}
LAWS = {
    "exchangeable": exchangeable_law,
    "rotation": rotation_law,
    "announcing": announcing_law,
    "reversed": lambda **parameters: rotation_law(**parameters).reversed(),
    "reversed_announcing": lambda **parameters: announcing_law(**parameters).reversed(),
    "copy": copy_law,
}


def world(name: str, **arguments) -> Store:
    """A world by name, with its default size unless `arguments` say otherwise. Raises LVMError for an unknown name."""
    if name not in WORLDS:
        raise LVMError(f"unknown world {name!r}; known: {', '.join(WORLDS)}")
    return WORLDS[name](**arguments)


def law(name: str, **parameters) -> Law:
    """The law behind a stationary world; `parameters`: those of the world but its size, seed and splits.

    Raises LVMError for a world without one (converging and diverging are not stationary: `converging_cosine`).
    """
    if name not in LAWS:
        raise LVMError(f"world {name!r} has no stationary law; those that have: {', '.join(LAWS)}")
    return LAWS[name](**parameters)


def cosines(name: str, length: int = 40, **parameters) -> np.ndarray:
    """(L, L) expected cosines between the positions of an article in high dimension, 1 on the diagonal; any world."""
    if name in ("converging", "diverging"):
        scale = {"converging": (2.0, 0.6), "diverging": (0.6, 2.0)}[name]
        found = converging_cosine(length, parameters.get("first", scale[0]), parameters.get("last", scale[1]))
        np.fill_diagonal(found, 1)
        return found
    return law(name, **parameters).cosines(length)


def lag_cosine(expected: np.ndarray, lag: int) -> float:
    """Mean over the positions of `cosines` (L, L): E cos(x_t, x_{t+lag})."""
    return float(np.diagonal(expected, lag).mean())


def weighted_sweep(expected: np.ndarray, weights, horizon: int = 2, offsets=range(-8, 6)) -> dict[int, float]:
    """Expected cosine of Σ_j w_j·context_j with the chunk at each offset from the target, in high dimension.

    `expected` (L, L): from `cosines`; `weights` (T,): (0, …, 0, 1) copies the last, (1/T, …) is the mean. Averaged, as
    a sweep over data is, over all windows of an article whose chunk at the offset exists; NaN where there is none.
    The margin against the last context vector is sweep[0] − sweep[−horizon].
    """
    weights = np.asarray(weights, float)
    length, span = len(weights), len(weights) - 1 + horizon  # span: from the window's first chunk to its target
    found = {k: [] for k in offsets}
    for start in range(len(expected) - span):
        context = expected[start : start + length]  # (T, L)
        towards = weights @ context / np.sqrt(weights @ context[:, start : start + length] @ weights)  # (L,)
        for k in offsets:
            if 0 <= start + span + k < len(expected):
                found[k].append(towards[start + span + k])
    return {k: float(np.mean(v)) if v else float("nan") for k, v in found.items()}


def simulated(
    measure: Callable[[Store], object], name: str, draws: int = 40, first_seed: int = 1_000_000, **arguments
) -> tuple[np.ndarray, np.ndarray]:
    """The truth of a measure that has no closed form: its mean over independent samples of a world, and its error.

    `measure(store)` gives a number or an array. The samples have seeds first_seed, first_seed + 1, …, out of the way of
    those of experiments. The mean is the expectation of the measure at just this size; choose the size of the
    experiment for a biased measure, any size for an unbiased one. Error: standard deviation / √draws.
    """
    values = np.array([measure(world(name, seed=first_seed + i, **arguments)) for i in range(draws)], float)
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(draws)


def reverse(store: Store) -> Store:
    """A store with every article read from its end, gaps kept, in memory; the truth of a world is flipped with it."""
    row, first, last = _article_ends(store)
    flipped = first + last - row  # in an article's run of rows, the row as far from its other end
    position = store.position[first] + store.position[last] - store.position[flipped]
    suffix = " reversed"
    name = store.name.removesuffix(suffix) if store.name.endswith(suffix) else store.name + suffix
    datasheet = {**store.datasheet, "reversed": not store.datasheet.get("reversed", False)}
    if "truth" in datasheet:
        truth = dict(datasheet["truth"])
        truth["arrow"] = -truth["arrow"]
        if "optimal_cosine" in truth:
            forward, backward = truth["optimal_cosine"]["forward"], truth["optimal_cosine"]["backward"]
            truth["optimal_cosine"] = {"forward": backward, "backward": forward}
        datasheet["truth"] = truth
    return make_store(name, np.asarray(store.vectors)[flipped], store.article, position, store.articles, datasheet)


def shuffled(store: Store, seed: int = 0) -> Store:
    """The same vectors, the chunks of each article in random order, in memory: real vectors without an order.

    All orders are equally probable, so any figure of direction is a draw from its null. Positions (and gaps) stay.
    """
    _, first, _ = _article_ends(store)
    order = np.lexsort((np.random.default_rng(seed).random(len(first)), first))
    datasheet = {**store.datasheet, "shuffled": seed, "truth": {"arrow": 0}}
    return make_store(
        f"{store.name} shuffled",
        np.asarray(store.vectors)[order],
        store.article,
        store.position,
        store.articles,
        datasheet,
    )


def _article_ends(store: Store) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(M,) each: the row, and the first and the last row of its article."""
    row = np.arange(len(store.article))
    begins = np.flatnonzero(np.diff(store.article, prepend=store.article[0] - 1))
    sizes = np.diff(begins, append=len(row))
    return row, np.repeat(begins, sizes), np.repeat(begins + sizes - 1, sizes)


def _converging(name, articles, length, dim, first, last, seed, splits) -> Store:
    random = np.random.default_rng(seed)
    noise_scale = converging_scale(length, first, last)[None, :, None]
    vectors = _unit(random, articles, 1, dim) + noise_scale * _unit(random, articles, length, dim)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    expected = cosines(name, length, first=first, last=last)
    truth = {"arrow": 0, "lag_cosine": _by_lag(lambda k: lag_cosine(expected, k), length)}
    return _store(name, vectors, {"first": first, "last": last, "seed": seed, "truth": truth}, splits)


def _unit(random: np.random.Generator, *shape: int) -> np.ndarray:
    x = random.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _law(dim: int, basis: int, parts: list[Part]) -> Law:
    return Law(dim, COMMON, tuple(parts), _basis(dim, basis))


def _even(dim: int, memory: float, share: float) -> Part:
    """A share spread evenly over all directions: memory 1 is a topic, 0 noise, between them an AR(1)."""
    if share < 0:
        raise LVMError(f"a share of {share:.4g} is left for a part of the world; the shares must sum to 1")
    eye = np.broadcast_to(np.eye(2), (dim // 2, 2, 2))
    return Part(memory * eye, share / dim * eye)


@lru_cache(maxsize=8)
def _basis(dim: int, seed: int) -> np.ndarray:
    """(D, D) a random orthogonal matrix, the same for all worlds of this seed."""
    if dim < 2 or dim % 2:
        raise LVMError(f"dim {dim}: these worlds are made of planes; choose an even number")
    basis = np.linalg.qr(np.random.default_rng([dim, seed]).standard_normal((dim, dim)))[0]
    basis.flags.writeable = False
    return basis


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise LVMError(f"strength {strength}: must lie between 0 and 1; for the other sign take the reversed world")


def _check_planes(planes: int | None, dim: int, default: int) -> int:
    planes = max(default, 1) if planes is None else planes
    if not 1 <= planes <= dim // 2:
        raise LVMError(f"planes {planes}: must lie between 1 and dim / 2 = {dim // 2}")
    return planes


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


def _by_lag(cosine: Callable[[int], float], length: int) -> dict[int, float]:
    return {k: round(float(cosine(k)), 6) for k in range(1, min(9, length))}


def _sampled(name, law, arrow, articles, length, seed, splits, **arguments) -> Store:
    by_lag, optimal = _truth(law)
    truth = {
        "arrow": arrow,
        "lag_cosine": {k: c for k, c in by_lag.items() if k < length},
        "optimal_cosine": {direction: dict(cosine) for direction, cosine in optimal.items()},
    }
    return _store(name, law.sample(articles, length, seed), {**arguments, "seed": seed, "truth": truth}, splits)


@lru_cache(maxsize=16)  # laws are kept too: many samples of one law take its truth from here
def _truth(law: Law) -> tuple[dict, dict]:
    """Lag cosines, and the cosine of the optimum in each direction by horizon, with a context of 5."""

    def optimum(law):
        return {h: round(law.sweep(h, offsets=[0])[0], 6) for h in (1, 2)}

    return _by_lag(law.lag_cosine, 9), {"forward": optimum(law), "backward": optimum(law.reversed())}


def _store(name: str, vectors: np.ndarray, datasheet: dict, splits: Sequence[str]) -> Store:
    """(A, L, D) as a store; article i is in split splits[i % len(splits)].

    In a world all articles have one distribution: its `ood` split is a second validation set.
    """
    count, length, dim = vectors.shape
    split = np.array(splits)[np.arange(count) % len(splits)]
    table = pd.DataFrame(
        {"title": [f"{name} {i}" for i in range(count)], "split": split}, index=pd.RangeIndex(count, name="article")
    )
    return make_store(
        f"world:{name}",
        vectors.reshape(-1, dim).astype(np.float32),
        np.repeat(np.arange(count), length),
        np.tile(np.arange(length), count),
        table,
        {"world": name, **datasheet},
    )
