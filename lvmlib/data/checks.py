"""Checks of the arrays and tables of a store."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd

from ..errors import LVMError
from ..windows import SPLITS, GivenWindows, article_spans, blocks, neighbours

NORM_TOLERANCE = 0.01  # float16 rounds a unit vector's norm by less than 1e-3


def check_given(given: GivenWindows, chunks: np.ndarray, articles: pd.DataFrame, where: str) -> None:
    """Raise LVMError unless each given window lies in one article of its split, without a gap in positions."""
    span = given.context_length - 1 + given.horizon
    inside = (given.start >= 0) & (given.start < len(chunks) - span) & (given.split >= 0) & (given.split < len(SPLITS))
    first = np.where(inside, given.start, 0)
    last = np.minimum(first + span, len(chunks) - 1)
    split_of = articles["split"].map({s: i for i, s in enumerate(SPLITS)}).reindex(chunks[:, 0]).to_numpy()
    good = (
        inside
        & (chunks[first, 0] == chunks[last, 0])
        & (chunks[last, 1].astype(np.int64) - chunks[first, 1] == span)
        & (split_of[first] == given.split)
    )
    if not good.all():
        bad = int(np.argmin(good))
        raise LVMError(f"{where}: window {bad} is not in one gapless article of its split; import the files again")


def check_vectors(vectors: np.ndarray, where: str) -> None:
    """Raise LVMError unless `vectors` is a non-empty (M, D) float array of finite unit vectors."""
    if vectors.ndim != 2 or 0 in vectors.shape or vectors.dtype not in (np.float16, np.float32):
        raise LVMError(
            f"{where}: has shape {vectors.shape} and type {vectors.dtype}; "
            "needed is (chunks, dimension), float16 or float32, not empty"
        )
    for first, block in blocks(vectors):
        norms = np.linalg.norm(block.astype(np.float32), axis=1)
        bad = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))  # negated, so that NaN counts as bad
        if len(bad):
            norm = norms[bad[0]]
            raise LVMError(
                f"{where}: row {first + bad[0]} has norm {norm:.4g}, not 1; normalise the vector, or drop it"
            )


def check_chunks(chunks: np.ndarray, count: int, where: str) -> np.ndarray:
    """`chunks` (M, 2) as int32. Raises LVMError unless it keeps each article in one run of rising positions."""
    integers = chunks.shape == (count, 2) and np.issubdtype(chunks.dtype, np.integer)
    if not integers or chunks.min() < 0 or chunks.max() > np.iinfo(np.int32).max:
        raise LVMError(
            f"{where}: has shape {chunks.shape} and type {chunks.dtype}; needed is ({count}, 2) integers from 0 to "
            f"{np.iinfo(np.int32).max}, a row for each vector"
        )
    chunks = np.asarray(chunks).astype(np.int32, copy=False)  # unsigned differences would never be negative
    article, position = chunks[:, 0], chunks[:, 1]
    numbers, runs = np.unique(article[article_spans(article)[0]], return_counts=True)
    if (runs > 1).any():
        raise LVMError(f"{where}: article {numbers[runs > 1][0]} is not in one run of rows; sort by article")
    for first, rows in neighbours(len(chunks)):
        falling = (np.diff(position[rows]) <= 0) & (np.diff(article[rows]) == 0)
        if falling.any():
            row = int(np.flatnonzero(falling)[0]) + first
            raise LVMError(f"{where}: row {row} (article {article[row]}) does not rise in position; sort the rows")
    return chunks


def check_articles(articles: pd.DataFrame, used: np.ndarray, where: str) -> None:
    """Raise LVMError unless every article used is listed once and no article or title is in two splits."""
    missing = np.setdiff1d(used, articles.index)
    if len(missing):
        raise LVMError(f"{where}: article {missing[0]} has chunks but is not listed ({len(missing)} such)")
    unknown = set(articles["split"]) - {*SPLITS, ""}
    if unknown:
        raise LVMError(f"{where}: unknown split {min(unknown)!r}; known: {', '.join(SPLITS)}, or empty")
    check_disjoint({s: articles.index[articles["split"] == s] for s in SPLITS}, where)
    if articles.index.has_duplicates:
        raise LVMError(f"{where}: article {articles.index[articles.index.duplicated()][0]} is listed twice")
    named = articles[(articles["title"] != "") & (articles["split"] != "")]
    check_disjoint({s: named["title"][named["split"] == s] for s in SPLITS}, where)


def check_disjoint(splits: Mapping[str, object], where: str) -> None:
    """Raise LVMError if an article (number or title) is in two of the splits: training would leak."""
    for a, b in itertools.combinations(splits, 2):
        both = sorted(set(splits[a]) & set(splits[b]))
        if both:
            raise LVMError(f"{where}: article {both[0]!r} is in both {a} and {b} ({len(both)} such); give it one split")
