"""Synthetic worlds whose truth is known in closed form (handbook §4.2).

Axes: A articles, L chunks an article, D vector dimension.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from .errors import LVMError
from .vectors import Store, make_store


def converging(
    articles: int = 160, length: int = 40, dim: int = 384, first: float = 2.0, last: float = 0.6, seed: int = 0
) -> Store:
    """Articles that come nearer to their topic: x_t = normalise(topic + s_t · noise_t), s_t falling evenly.

    topic and noise_t are independent random unit vectors, so in high dimension
    cos(x_t, x_u) ≈ 1 / √((1 + s_t²)(1 + s_u²)) (`converging_cosine`): a chunk is nearer to the next one than to
    the one before it, Δ > 0, though the order holds nothing else to predict. The data of option C.
    """
    random = np.random.default_rng(seed)
    noise_scale = converging_scale(length, first, last)[None, :, None]
    vectors = _unit(random, articles, 1, dim) + noise_scale * _unit(random, articles, length, dim)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return _store("converging", vectors, {"first": first, "last": last, "seed": seed})


def converging_scale(length: int, first: float, last: float) -> np.ndarray:
    """(L,) s_t."""
    return np.linspace(first, last, length)


def converging_cosine(length: int, first: float, last: float) -> np.ndarray:
    """(L, L) expected cosines between positions t ≠ u in the limit of high dimension (the diagonal is not 1)."""
    s = np.sqrt(1 + converging_scale(length, first, last) ** 2)
    return 1 / np.outer(s, s)


WORLDS = {"converging": converging}


def world(name: str) -> Store:
    """A world with its default size. Raises LVMError for an unknown name."""
    if name not in WORLDS:
        raise LVMError(f"unknown world {name!r}; known: {', '.join(WORLDS)}")
    return WORLDS[name]()


def _unit(random: np.random.Generator, *shape: int) -> np.ndarray:
    x = random.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _store(name: str, vectors: np.ndarray, truth: dict) -> Store:
    """(A, L, D) as a store; of every five articles three train, one validates, one is out of distribution.

    In a world all articles have one distribution: its `ood` split is a second validation set.
    """
    count, length, dim = vectors.shape
    split = np.array(["train", "train", "train", "val", "ood"])[np.arange(count) % 5]
    table = pd.DataFrame(
        {"title": [f"{name} {i}" for i in range(count)], "split": split}, index=pd.RangeIndex(count, name="article")
    )
    return make_store(
        f"world:{name}",
        vectors.reshape(-1, dim).astype(np.float32),
        np.repeat(np.arange(count), length),
        np.tile(np.arange(length), count),
        table,
        {"world": name, **truth},
    )
