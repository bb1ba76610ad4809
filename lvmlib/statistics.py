"""Chance levels, and intervals over articles.

Axes: N windows, A articles.
"""

from __future__ import annotations

import numpy as np


def chance_recall(candidates, k: int) -> np.ndarray:
    """Probability that a target ranked at random among n candidates is in the first k: min(k, n) / n, elementwise."""
    candidates = np.asarray(candidates)
    return np.minimum(k, candidates) / candidates


def chance_reciprocal_rank(candidates) -> np.ndarray:
    """Expected 1/rank of a target ranked at random among n candidates: (1 + 1/2 + … + 1/n) / n, elementwise."""
    candidates = np.asarray(candidates, int)
    harmonic = np.cumsum(1 / np.arange(1, max(candidates.max(initial=1), 1) + 1))
    return harmonic[candidates - 1] / candidates


def over_articles(
    values, articles, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `values` (N,) over windows and its interval by resampling whole articles (N,) with replacement.

    Windows of one article depend on each other: resampling windows would give a falsely narrow interval.
    NaN values are left out. Returns (mean, low, high); the interval is NaN with fewer than two articles.
    The percentile bootstrap is itself too narrow where articles are few; say how many there are.
    """
    values, articles = np.asarray(values, float), np.asarray(articles)
    articles, values = articles[~np.isnan(values)], values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    _, inverse = np.unique(articles, return_inverse=True)
    sums, counts = np.bincount(inverse, values), np.bincount(inverse).astype(float)
    if len(sums) < 2:
        return float(values.mean()), float("nan"), float("nan")
    times = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), resamples)  # (R, A)
    low, high = np.quantile((times @ sums) / (times @ counts), [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)
