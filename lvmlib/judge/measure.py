"""What 5CAT measures for each window."""

from __future__ import annotations

import numpy as np

from ..windows import Windows
from .cache import kept


def negatives(windows: Windows, index: np.ndarray, rng_seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each window of `index`: a random order of its context (B, T), and rows (B, count) of random chunks of the
    split's other articles, without repeats; −1 where there are too few.

    Both depend on the seed and the window's target alone, so that a window is the same in any batch or selection.
    """
    store = windows.store
    pool, numbers, begins, lengths = kept(("pool", store.fingerprint, windows.split), lambda: _pool(windows))
    orders = np.empty((len(index), windows.context_length), np.int64)
    rows = np.full((len(index), count), -1, np.int64)
    own = np.searchsorted(numbers, store.article[windows.start[index]])
    for i, (target, begin, length) in enumerate(
        zip(windows.target_rows(index).tolist(), begins[own].tolist(), lengths[own].tolist(), strict=True)
    ):
        random = np.random.default_rng([rng_seed, target])
        orders[i] = random.permutation(windows.context_length)
        others = len(pool) - length
        drawn = random.choice(others, min(count, others), replace=False)
        rows[i, : len(drawn)] = pool[np.where(drawn < begin, drawn, drawn + length)]
    return orders, rows


def _pool(windows: Windows) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The split's rows; its articles' numbers, rising, each one's first place among those rows, and its rows."""
    pool = windows.store.rows(windows.split)
    return pool, *np.unique(windows.store.article[pool], return_index=True, return_counts=True)
