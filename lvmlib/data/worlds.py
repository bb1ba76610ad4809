"""Synthetic worlds whose truth is known in closed form (handbook §4.2).

Axes: A articles, L chunks an article, D vector dimension, P = D/2 planes, T context length, K offsets.

- exchangeable: no order. Every figure of direction must read "none".
- rotation: some planes turn. An order probe, or one fixed predictor, finds an arrow; a model trained
  for each direction does *not*: the reversed rotation is as easy to learn.
- announcing: a faint part of each chunk announces what is loud in the next. A model trained forwards is better.
- reversed, reversed_announcing: the same with time flipped. The sign of the answer flips.
- converging, diverging: coherence rises, falls. No order, but Δ and some margins are not 0.
- copy: almost no change within an article. Shows which measures copying wins.

A world is a `Store`: a sample of its `law`. The closed forms of `law` and `cosines` hold in high dimension, where a
chunk has length 1 before it is normalised; at D = 48 they are off by up to 0.02.
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
import pandas as pd

from ..errors import LVMError
from ..windows import Store, article_spans
from .laws import Law, Part
from .store import make_store

SPLIT_PATTERN = ("train", "train", "train", "val", "ood")  # article i is in SPLIT_PATTERN[i % 5]

# Shares of a chunk's squared length. Together they give lag cosines 0.501, 0.456, 0.431, 0.417, … 0.400, and 0.025
# across articles; the embedded Wikipedia vectors have 0.501, 0.455, 0.431, 0.415 and 0.025.
COMMON, TOPIC, DRIFT = 0.025, 0.375, 0.184
FADING = 0.55  # of the drift from one chunk to the next
TURNING, TURNING_MEMORY = 0.2, 0.8  # the rotation's share, taken from the noise; a in y_{t+1} = a·R·y_t + noise
HINT = 0.05  # the share of the hint, taken from the noise as well


# The laws of the stationary worlds


@lru_cache(maxsize=16)
def exchangeable_law(dim: int = 384, topic: float = 0.425) -> Law:
    """x_t = normalise(mean + topic + noise_t): every order of an article's chunks is equally probable.

    The cosine of any two chunks is COMMON + `topic`.
    """
    return _law(dim, [_even(dim, 1.0, topic), _even(dim, 0.0, 1 - COMMON - topic)])


def copy_law(dim: int = 384, noise: float = 0.01) -> Law:
    """Near-constant articles: exchangeable, a chunk differs from its article by a share `noise` (cosines 1 − noise)."""
    return exchangeable_law(dim, 1 - COMMON - noise)


@lru_cache(maxsize=16)
def rotation_law(dim: int = 384, strength: float = 1.0) -> Law:
    """Topic, fading drift, noise, and in r = D/8 planes a rotation: y_{t+1} = 0.8·R·y_t + noise.

    `strength` 0…1: the share of turning forward minus that of turning backward; at 0 both directions have one law.

    Planes turn by θ_p evenly between 0 and π. In each the covariance at lag k is
    0.8^k (cos kθ · I + strength · sin kθ · J): the arrow is in the antisymmetric part, and Σ_p cos kθ_p = 0 for lags
    k < 2r, so the lag cosines do not depend on the strength. Mirroring every plane (J → −J) turns the reversed
    world into this one: a model trained for each direction finds *no* difference (in `announcing_law` it does).
    """
    planes = _planes(strength, dim // 8)
    angle = (np.arange(planes) + 0.5) * np.pi / planes
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).transpose(2, 0, 1)  # (r, 2, 2)
    variance = np.broadcast_to(np.eye(2) * TURNING / (2 * planes), turn.shape)
    turning = [
        Part(TURNING_MEMORY * matrix, weight * variance)
        for matrix, weight in ((turn, (1 + strength) / 2), (turn.mT, (1 - strength) / 2))
        if weight
    ]
    noise = 1 - COMMON - TOPIC - DRIFT - TURNING
    return _law(dim, [_even(dim, 1.0, TOPIC), _even(dim, FADING, DRIFT), _even(dim, 0.0, noise), *turning])


@lru_cache(maxsize=16)
def announcing_law(dim: int = 384, strength: float = 1.0, delay: int = 0) -> Law:
    """Topic, noise, and in D/16 planes a faint hint u_t and a loud, fading theme v_t.

    (u, v) ← [[0, 0], [c, 0.55]] (u, v) + noise, u white; c makes strength² of v's news come from u. The forward
    predictor explains more: it predicts what is loud. At strength 0 both directions have one law. The lag cosines are
    those of `rotation_law`. `delay`: the theme comes so many chunks later; horizon − 1 gives as clear an arrow at that
    horizon, but none to a probe of adjacent pairs.
    """
    planes = _planes(strength, dim // 16)
    coupling = strength * np.sqrt((1 - FADING**2) * DRIFT / HINT)
    transition = np.broadcast_to(np.array([[0.0, 0.0], [coupling, FADING]]), (planes, 2, 2))
    variance = np.broadcast_to(np.diag([HINT, DRIFT]) / planes, (planes, 2, 2))
    noise = 1 - COMMON - TOPIC - DRIFT - HINT
    return _law(dim, [_even(dim, 1.0, TOPIC), _even(dim, 0.0, noise), Part(transition, variance, delay)])


# The worlds: a new one is one entry in one of these tables

LAWS = {
    "exchangeable": exchangeable_law,
    "rotation": rotation_law,
    "announcing": announcing_law,
    "copy": copy_law,
    "reversed": lambda **parameters: rotation_law(**parameters).reversed(),
    "reversed_announcing": lambda **parameters: announcing_law(**parameters).reversed(),
}
REVERSED = {"reversed": "rotation", "reversed_announcing": "announcing"}
SLOPES = {"converging": {"first": 2.0, "last": 0.6}, "diverging": {"first": 0.6, "last": 2.0}}
WORLDS = (*LAWS, *SLOPES)


def world(
    name: str, articles: int = 160, length: int = 40, dim: int = 384, seed: int = 0, splits=SPLIT_PATTERN, **parameters
) -> Store:
    """Sample a world: `articles` articles of `length` chunks; `parameters` are those of its law or slope.

    Article i is in split splits[i % len(splits)]. All articles have one distribution: the `ood` split is a second
    validation set. Raises LVMError for an unknown name.
    """
    if name in REVERSED:
        return reverse(world(REVERSED[name], articles, length, dim, seed, splits, **parameters))
    if name not in WORLDS:
        raise LVMError(f"unknown world {name!r}; known: {', '.join(WORLDS)}")
    if name in SLOPES:
        parameters = SLOPES[name] | parameters
        vectors = _sloping(articles, length, dim, seed, **parameters)
    else:
        vectors = law(name, dim=dim, **parameters).sample(articles, length, seed)
    split = np.array(splits)[np.arange(articles) % len(splits)]
    titles = [f"{name} {i}" for i in range(articles)]
    table = pd.DataFrame({"title": titles, "split": split}, index=pd.RangeIndex(articles, name="article"))
    article, position = np.repeat(np.arange(articles), length), np.tile(np.arange(length), articles)
    datasheet = {"world": name, **parameters, "seed": seed}
    x = vectors.reshape(-1, dim).astype(np.float32)
    return make_store(f"world:{name}", x, article, position, table, datasheet)


exchangeable, rotation, announcing = (partial(world, name) for name in ("exchangeable", "rotation", "announcing"))


def _sloping(articles: int, length: int, dim: int, seed: int, first: float, last: float) -> np.ndarray:
    """(A, L, D) articles that come nearer to their topic, or leave it: x_t = normalise(topic + s_t · noise_t), s_t from
    `first` to `last` evenly; topic and noise_t are independent random unit vectors.

    Where s_t falls, a chunk is nearer to the next one than to the one before, Δ > 0, and the order holds nothing else
    to predict. The data of option C.
    """
    random = np.random.default_rng(seed)
    noise_scale = np.linspace(first, last, length)[None, :, None]
    vectors = _unit(random, articles, 1, dim) + noise_scale * _unit(random, articles, length, dim)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def law(name: str, **parameters) -> Law:
    """The law of a stationary world; `parameters`: those of the world without its size, seed and splits.

    Raises LVMError for a world that is not stationary (converging and diverging).
    """
    if name not in LAWS:
        raise LVMError(f"world {name!r} has no stationary law; those that have: {', '.join(LAWS)}")
    return LAWS[name](**parameters)


def cosines(name: str, length: int = 40, **parameters) -> np.ndarray:
    """(L, L) expected cosines between the positions of an article in high dimension, 1 on the diagonal; any world.

    Of the sloping worlds: cos(x_t, x_u) = 1 / √((1 + s_t²)(1 + s_u²)).
    """
    if name not in SLOPES:
        return law(name, **parameters).cosines(length)
    first, last = (parameters.get(key, value) for key, value in SLOPES[name].items())
    long = np.sqrt(1 + np.linspace(first, last, length) ** 2)
    expected = 1 / np.outer(long, long)
    np.fill_diagonal(expected, 1)
    return expected


def lag_cosine(expected: np.ndarray, lag: int) -> float:
    """Mean over the positions of `cosines` (L, L): E cos(x_t, x_{t+lag})."""
    return float(np.diagonal(expected, lag).mean())


def reverse(store: Store) -> Store:
    """A store with every article read from its end, gaps kept, in memory."""
    first, last = _article_ends(store)
    flipped = first + last - np.arange(len(first))  # the row as far from the article's other end
    position = store.position[first] + store.position[last] - store.position[flipped]
    suffix = " reversed"
    name = store.name.removesuffix(suffix) if store.name.endswith(suffix) else store.name + suffix
    datasheet = {**store.datasheet, "reversed": not store.datasheet.get("reversed", False)}
    return make_store(name, np.asarray(store.vectors)[flipped], store.article, position, store.articles, datasheet)


def shuffled(store: Store, seed: int = 0) -> Store:
    """The same vectors, the chunks of each article in random order, in memory: real vectors without an order.

    All orders are equally probable, so any figure of direction is a draw from its null. Positions (and gaps) stay.
    """
    first, _ = _article_ends(store)
    order = np.lexsort((np.random.default_rng(seed).random(len(first)), first))
    datasheet = {**store.datasheet, "shuffled": seed}
    vectors = np.asarray(store.vectors)[order]
    return make_store(f"{store.name} shuffled", vectors, store.article, store.position, store.articles, datasheet)


def _article_ends(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """(M,) and (M,): the first and the last row of each row's article."""
    begins, ends = article_spans(store.article)
    return np.repeat(begins, ends - begins), np.repeat(ends - 1, ends - begins)


def _unit(random: np.random.Generator, *shape: int) -> np.ndarray:
    x = random.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _law(dim: int, parts: list[Part]) -> Law:
    return Law(dim, COMMON, tuple(parts), _basis(dim))


def _even(dim: int, memory: float, share: float) -> Part:
    """A share spread evenly over all directions: memory 1 is a topic, 0 noise, between them an AR(1)."""
    if share < 0:
        raise LVMError(f"a share of {share:.4g} is left for a part of the world; the shares must sum to 1")
    eye = np.broadcast_to(np.eye(2), (dim // 2, 2, 2))
    return Part(memory * eye, share / dim * eye)


@lru_cache(maxsize=8)
def _basis(dim: int) -> np.ndarray:
    """(D, D) a random orthogonal matrix, the same for all worlds."""
    if dim < 2 or dim % 2:
        raise LVMError(f"dim {dim}: these worlds are made of planes; choose an even number")
    basis = np.linalg.qr(np.random.default_rng([dim, 0]).standard_normal((dim, dim)))[0]
    basis.flags.writeable = False
    return basis


def _planes(strength: float, planes: int) -> int:
    """The number of planes, at least one. Raises LVMError for an impossible strength."""
    if not 0 <= strength <= 1:
        raise LVMError(f"strength {strength}: must lie between 0 and 1; for the other sign take the reversed world")
    return max(planes, 1)
