"""Leaks: equal or nearly equal chunks in two splits, or in a target and its context; titles in two splits.

Axes: M chunks, N windows, D vector dimension, K leading directions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from ..windows import SPLITS, Store, Windows

SAME = 0.9999  # cosine of one text encoded twice: the rounding to float16 leaves 1 − 1e-6
NEAR = 0.99  # ‖x − y‖ ≤ 0.14: the same but for a word or a number; two chunks on one subject are far below
FILTER = 32  # leading components in which candidates are searched before the exact cosine is taken
COMPARED = 10**10  # pairs of chunks that are compared at most: about ten seconds on 2 cores
ROWS = 8192  # rows of a store that are float32 at one time


@dataclass(frozen=True, eq=False)
class Leak:
    """Chunks of `split` that are also in split `other`."""

    split: str
    other: str
    chunks: int  # of the split, in all
    rows: np.ndarray  # (n,) the chunks compared
    cosine: np.ndarray  # (n,) of the nearest chunk of the other split, where that is NEAR or more, else NaN
    match: np.ndarray  # (n,) row of that chunk, else −1
    nearest: np.ndarray  # (k,) cosine of the nearest chunk, for some rows

    @property
    def same(self) -> int:
        return int((self.cosine >= SAME).sum())

    @property
    def near(self) -> int:
        """The number of equal or nearly equal chunks."""
        return int((self.cosine >= NEAR).sum())

    @property
    def share(self) -> float:
        return self.near / len(self.rows)

    def articles(self, store: Store) -> int:
        """The number of articles with more than half of their compared chunks in the other split."""
        return int((pd.Series(self.cosine >= NEAR).groupby(store.article[self.rows]).mean() > 0.5).sum())

    def worst(self, store: Store, count: int = 5) -> list[tuple[int, int, float]]:
        """The nearest pairs, one for each pair of articles: row, row in the other split, cosine."""
        order = np.argsort(-np.nan_to_num(self.cosine, nan=-1), kind="stable")[: self.near]
        pairs = np.stack([store.article[self.rows[order]], store.article[self.match[order]]], 1)
        first = np.sort(np.unique(pairs, axis=0, return_index=True)[1])[:count]
        return [(int(self.rows[i]), int(self.match[i]), float(self.cosine[i])) for i in order[first]]


def leaks(store: Store, compared: int = COMPARED, sampled: int = 500, seed: int = 0) -> list[Leak]:
    """Find equal and nearly equal chunks of validation and OOD in train, and of OOD in validation.

    All pairs of chunks are compared, if they are at most `compared`; else a random part of the first split is. Since
    ‖P(x − y)‖ ≤ ‖x − y‖ for orthonormal P, most pairs are ruled out in the FILTER leading components of the store, and
    the others have their exact cosine taken. Memory holds a block of each split.
    """
    rows = {split: store.rows(split) for split in SPLITS}
    x = torch.from_numpy(store.vectors[:: -(-len(store.vectors) // 16_384)].astype(np.float32))  # an even sample
    x = x - x.mean(0)
    components = torch.linalg.eigh((x.T @ x).double())[1].flip(1)[:, :FILTER].float()  # (D, K)
    found, random = [], np.random.default_rng(seed)
    for split, other in (("val", "train"), ("ood", "train"), ("ood", "val")):
        own = rows[split]
        if not len(own) or not len(rows[other]):
            continue
        count = min(len(own), max(compared // 3 // len(rows[other]), 1))
        if count < len(own):
            own = np.sort(random.choice(own, count, replace=False))
        sample = random.choice(len(own), min(sampled, len(own)), replace=False)
        cosine, match = _near(store, own, rows[other], components)
        nearest = _nearest(store, own[sample], rows[other])
        found.append(Leak(split, other, len(rows[split]), own, cosine, match, nearest))
    return found


def _read(store: Store, rows: np.ndarray) -> torch.Tensor:
    """(n, D) float32, of length 1 to the last digit."""
    x = torch.from_numpy(np.asarray(store.vectors[rows], np.float32))
    return torch.nn.functional.normalize(x, dim=1)


def _near(store: Store, own: np.ndarray, others: np.ndarray, components: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and row (n,) of the nearest of the `others`, where that is NEAR or more; else NaN and −1."""
    best, match = np.full(len(own), -np.inf, np.float32), np.full(len(own), -1)
    bound = 2 - 2 * NEAR + 1e-3  # of ‖x − y‖², with room for rounding
    small = torch.cat([_read(store, own[i : i + ROWS]) @ components for i in range(0, len(own), ROWS)])  # (n, K)
    square = small.square().sum(1)
    for first in range(0, len(others), ROWS):
        block = _read(store, others[first : first + ROWS])
        projected = block @ components
        # ‖Px − Py‖² ≤ bound as one product: 2 Px·Py − ‖Py‖² ≥ ‖Px‖² − bound
        right = torch.cat([2 * projected, -projected.square().sum(1, keepdim=True)], 1).T.contiguous()
        for at in range(0, len(own), 2048):
            left = torch.nn.functional.pad(small[at : at + 2048], (0, 1), value=1.0)
            reached = (left @ right).amax(1) >= square[at : at + 2048] - bound
            hit = at + np.flatnonzero(reached.numpy())
            if len(hit):
                cosine, place = (x.numpy() for x in (_read(store, own[hit]) @ block.T).max(1))
                better = (cosine >= NEAR) & (cosine > best[hit])
                best[hit[better]], match[hit[better]] = cosine[better], others[first + place[better]]
    return np.where(match >= 0, np.minimum(best, 1.0), np.nan), match


def _nearest(store: Store, own: np.ndarray, others: np.ndarray) -> np.ndarray:
    x, best = _read(store, own), torch.full((len(own),), -1.0)
    for first in range(0, len(others), ROWS):
        best = torch.maximum(best, (x @ _read(store, others[first : first + ROWS]).T).amax(1))
    return best.numpy()


def copied(windows: Windows, most: int = 100_000) -> np.ndarray:
    """(n,) whether the target nearly equals a chunk of its own context; of `most` windows, evenly spaced."""
    batches = windows.at_most(most).batches(2048)
    return np.concatenate([((x @ target[..., None])[..., 0].amax(1) >= NEAR).numpy() for x, target in batches])


def shared_titles(store: Store) -> list[list[str]]:
    """Titles in two splits that differ only in case, spaces and punctuation, each as ["title (split)", …].

    A store with one title in two splits does not open.
    """
    named = store.articles[store.articles["split"].isin(SPLITS)]
    plain = named["title"].map(lambda t: re.sub(r"[\W_]+", " ", t.casefold()).strip())
    groups = [group for title, group in named.groupby(plain) if title and group["split"].nunique() > 1]
    return [[f"{t} ({s})" for t, s in zip(group["title"], group["split"], strict=True)] for group in groups]
