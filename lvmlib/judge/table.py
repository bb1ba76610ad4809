"""The rows of a 5CAT report, with intervals over articles and chance levels, from the figures per window.

Axes: N windows, T context length, K offsets, H rollout steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypedDict

import numpy as np
import pandas as pd
from scipy import special, stats

from ..ranking import TIE
from ..statistics import (
    adjusted,
    between,
    chance_median_rank,
    chance_recall,
    chance_reciprocal_rank,
    check_values,
    jackknife,
    over_articles,
)
from .measure import OFFSETS, PARTS, Measurements, ablations

ORIGINAL_OFFSETS = tuple(range(-3, 4))
ORIGINAL_ABLATIONS = ("shuffled", "reversed", "leave one out", "last repeated", "last replaced")
FOLDS = 3  # of the articles, where the best of several offsets is chosen
COHERENCE = {"low": (-1.0, 0.45), "normal": (0.45, 0.55), "high": (0.55, 1.0)}
NAN = float("nan")


class Row(TypedDict):
    """A row of the report: a mean over windows with its 95 % interval over articles, and how many of both count.

    `adjusted`: (value − chance) / (1 − chance), of retrieval alone.
    """

    gate: str
    measure: str
    value: float
    low: float
    high: float
    windows: int
    articles: int
    chance: float
    adjusted: float


def summarise(measured: Measurements, profile: str, horizon: int, length: int) -> list[Row]:
    """Gates A to D, and of the calibrated profile G: a row a measure."""
    if profile == "original":
        return _original(measured, length)
    return [*_sweep(measured, horizon, length), *_retrieval(measured), *_changes(measured, length)]


def with_interval(values, articles, share: bool = False) -> dict:
    """value, low, high, windows, articles of a Row."""
    values, articles = np.asarray(values, float), np.asarray(articles)
    mean, low, high = over_articles(values, articles, share=share)
    counted = ~np.isnan(values)
    counts = {"windows": int(counted.sum()), "articles": len(np.unique(articles[counted]))}
    return {"value": mean, "low": low, "high": high, **counts}


def side(row: Mapping, above: str, below: str, neither: str, null: float = 0.0) -> str:
    """The word for the side of `null` on which the interval of `row` lies."""
    return above if row["low"] > null else below if row["high"] < null else neither


def signed(figure: tuple[float, float, float], form: str = "+.3f") -> str:
    """Format a figure and its interval (value, low, high): "+0.012 [-0.003, +0.027]"."""
    value, low, high = figure
    if value != value:
        return "–"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]" if low == low else f"{value:{form}} (no interval)"


def row_text(row: Mapping, key: str = "value", form: str = "+.3f") -> str:
    """`signed` of row[key] and the interval of `row`."""
    return signed((row[key], row["low"], row["high"]), form)


def _row(m: Measurements, gate: str, name: str, values, chance: float = NAN, share: bool = False) -> Row:
    """A row of the report; `share`: the values lie in [0, 1], and are adjusted for chance."""
    interval = with_interval(values, m.article, share)
    above = float(adjusted(interval["value"], chance)) if share else NAN
    return {"gate": gate, "measure": name, **interval, "chance": chance, "adjusted": above}


def _mean(values, where=slice(None)) -> float:
    """The mean of the values that are not NaN, summed in their own precision; NaN of none."""
    return float(pd.Series(values[where]).mean())


def figure(measured: Measurements | pd.DataFrame, name: str) -> np.ndarray:
    """(N,) of what two predictors are compared in: 1 of 100 (or hundred); novel margin, ahead; mean rollout; and the
    columns of `score`, which `measured` may be for these."""
    if name == "novel margin, ahead":
        return np.asarray(measured.cosine, float) - best_other(measured, [k for k in OFFSETS if k > 0])
    if name == "mean rollout":
        return _mean_rollout(measured.rollout)
    return np.asarray(measured.hundred if name in ("1 of 100", "hundred") else measured[name], float)


def best_other(measured: Measurements, offsets) -> np.ndarray:
    """(N,) each window's cosine at the offset that is best, by mean, on other articles; NaN outside the article.

    The best of several noisy means is too high on the windows that it was chosen on. So the articles are dealt into
    three folds, and each fold's offset is chosen on the other two: the one with the least mean of cos at the target
    less cos at the offset, over the windows that have it. (Where offsets are all but equal, intervals cover the truth
    in 94 % of exchangeable datasets; with one article a fold in 89 %.)
    """
    values = np.asfortranarray(measured.at(offsets), float)  # (N, K); the order in memory decides how sums round
    gaps = np.asarray(measured.cosine, float)[:, None] - values
    fold = np.unique(measured.article, return_inverse=True)[1] % FOLDS
    rival = np.full(len(values), np.nan)
    for own in range(FOLDS):
        exists = ~np.isnan(gaps[fold != own])
        count = exists.sum(0)
        if count.any():  # a single article has none to choose on
            means = np.where(exists, gaps[fold != own], 0.0).sum(0) / np.maximum(count, 1)
            rival[fold == own] = values[fold == own, np.where(count > 0, means, np.inf).argmin()]
    return rival


def _mean_rollout(rollout: np.ndarray) -> np.ndarray:
    """(N,) mean over the steps (N, H) of windows that have them all; else NaN."""
    return np.where(np.isnan(rollout).any(1), np.nan, np.add.accumulate(rollout, 1)[:, -1] / rollout.shape[1])


def _sweep(m: Measurements, horizon: int, length: int) -> Iterator[Row]:
    """Gate A, calibrated."""
    known, context = m.cosine_article, range(-horizon - length + 1, -horizon + 1)
    yield _row(m, "A", "cosine at the target", m.cosine, _mean(known))
    for name, margin in (("margin against the last", m.margin_last), ("margin against context[-2]", m.margin_prev)):
        yield _row(m, "A", name, margin, _mean(known - (m.cosine - margin)))
    outside = [k for k in OFFSETS if k and k not in context]
    sides = {
        "margin against the best other": [k for k in OFFSETS if k],
        "novel margin": [k for k in outside if not -horizon < k < 0],
        "novel margin, skipped chunks too": outside,
        "novel margin, ahead": [k for k in OFFSETS if k > 0],
    }
    if horizon == 1:
        del sides["novel margin, skipped chunks too"]
    for name, offsets in sides.items():
        rival = best_other(m, offsets)
        yield _row(m, "A", name, m.cosine - rival, _mean(known - rival))


def _recalls(m: Measurements, kind: str, prefix: str, cuts) -> Iterator[Row]:
    rank, n = m.ranks[kind], m.candidates[kind].astype(int)
    for k in cuts:
        yield _row(m, "B", f"{prefix}R@{k}", rank <= k, float(chance_recall(n, k).mean()), True)
    yield _row(m, "B", f"{prefix}MRR", 1 / rank, float(chance_reciprocal_rank(n).mean()), True)


def _retrieval(m: Measurements) -> Iterator[Row]:
    """Gate B, calibrated: the target's rank among its article's chunks."""
    for kind, prefix in (("novel", "novel "), ("possible", "possible "), ("all", "")):
        yield from _recalls(m, kind, prefix, (1, 5, 10))
        chance = float(chance_median_rank(m.candidates[kind].astype(int)))
        value, low, high = median_over_articles(m.ranks[kind], m.article)
        row = _row(m, "B", f"{prefix}median rank", m.ranks[kind], chance)
        yield row | {"value": value, "low": low, "high": high}
    yield _row(m, "B", "1 of 100", m.hundred, _mean(1 / m.hundred_candidates, ~np.isnan(m.hundred)), True)


def _changes(m: Measurements, length: int) -> Iterator[Row]:
    """Gates C and D and, of gate G, the weights of the context and the parts of the prediction's square, calibrated."""
    for name in ablations(length):
        yield _row(m, "C", name, m.cosine_change[name], 0.0)
        yield _row(m, "C", f"{name}, novel MRR", m.mrr_change[name], 0.0)
    for h, (step, chance) in enumerate(zip(m.rollout.T, m.rollout_chance.T, strict=True), start=1):
        yield _row(m, "D", f"cosine at step {h}", step, _mean(chance, ~np.isnan(step)))
    yield _whole_rollout(m, "mean rollout", m.rollout)
    moved = m.rollout[:, 1:] - m.rollout_still[:, 1:]
    moved = np.where(np.abs(moved) <= TIE, 0.0, moved)  # a frozen rollout has not moved on by its rounding
    yield _row(m, "D", "rolling on", np.where(np.isnan(m.rollout).any(1), np.nan, moved.mean(1)), 0.0)
    yield _row(m, "D", "similarity of steps", _mean_rollout(m.similarity))
    for t in range(length):
        yield _row(m, "G", f"weight of context[{t - length}]", m.weights[:, t])
    for name in PARTS:
        yield _row(m, "G", f"part {name}", m.parts[name])


def _whole_rollout(m: Measurements, name: str, rollout: np.ndarray) -> Row:
    """The mean cosine of the steps, of windows that have them all."""
    whole = _mean_rollout(rollout)
    return _row(m, "D", name, whole, _mean(_mean_rollout(m.rollout_chance), ~np.isnan(whole)))


def _original(m: Measurements, length: int) -> list[Row]:
    """Gates A to D by the original's definitions."""
    sweep = m.at(ORIGINAL_OFFSETS)
    sweep = np.where(np.isnan(sweep).any(1, keepdims=True), np.nan, sweep)  # the same windows at every offset
    at = dict(zip(ORIGINAL_OFFSETS, sweep.T, strict=True))
    means = {k: pd.Series(values).mean() for k, values in at.items()}
    random_chunk = np.where(np.isnan(at[0]), np.nan, m.cosine_article)

    def margin(k: int) -> tuple[np.ndarray, float]:
        best = at[max((o for o in ORIGINAL_OFFSETS if o != k), key=means.get)]
        return at[k] - best, _mean(random_chunk - best)

    known, last = m.cosine_article, m.cosine - m.margin_last
    return [
        _row(m, "A", "margin", *margin(0)),
        _row(m, "A", "margin read late", *margin(1)),
        _row(m, "A", "cosine at the target", at[0], _mean(random_chunk)),
        _row(m, "A", "cosine, all windows", m.cosine, _mean(known)),
        _row(m, "A", "margin against the last", m.margin_last, _mean(known - last)),
        *_recalls(m, "all", "", (1, 5)),
        *_recalls(m, "novel", "novel ", (1, 5)),
        _row(m, "B", "R@5 of six", m.six_rank <= 5, min(5 / (length + 1), 1.0), True),
        *(_row(m, "C", name, m.cosine_change[name], 0.0) for name in ORIGINAL_ABLATIONS),
        _whole_rollout(m, "mean cosine", m.rollout),
        _whole_rollout(m, "mean cosine read late", m.rollout_late),
    ]


def bins_delta(val: Measurements, ood: Measurements, profile: str = "calibrated") -> list[Row]:
    """Gate E: mean cosine of validation against OOD, over windows of like coherence of their context.

    `calibrated`: validation − OOD in each bin (low, normal, high), and over all windows, with its interval over the
    articles of both. `original`: the absolute difference in the normal bin, which is above 0 by chance alone, without
    interval and chance level. NaN where a split has no window in the bin.
    """
    if profile == "calibrated":
        bins = {f"difference, {name} coherence": edges for name, edges in COHERENCE.items()}
        bins["difference, all windows"] = (-1.0, 1.0)
        return [_difference(val, ood, name, *edges) for name, edges in bins.items()]
    row = _difference(val, ood, "difference", *COHERENCE["normal"])
    return [row | {"value": abs(row["value"]), "low": NAN, "high": NAN}]


def _difference(val: Measurements, ood: Measurements, name: str, above: float, below: float) -> Row:
    inside = [(m.coherence >= above) & (m.coherence <= below) for m in (val, ood)]
    cosines, articles = ([m[key][i] for m, i in zip((val, ood), inside, strict=True)] for key in ("cosine", "article"))
    # Articles of two stores may bear the same number; that val and ood share none is checked before.
    value, low, high = between(cosines[0], articles[0], cosines[1], articles[1] + articles[0].max(initial=0) + 1)
    counts = {"windows": sum(map(len, cosines)), "articles": sum(len(np.unique(a)) for a in articles)}
    figures = {"value": value, "low": low, "high": high, **counts, "chance": NAN, "adjusted": NAN}
    return {"gate": "E", "measure": name, **figures}


def health_rows(facts: Mapping) -> list[Row]:
    """Gate G's figures of a whole split: without an interval; `chance` is the same figure of the targets."""
    empty = {"low": NAN, "high": NAN, "windows": pd.NA, "articles": pd.NA, "adjusted": NAN}
    rows = [
        {"gate": "G", "measure": name, "value": facts[name], **empty, "chance": facts.get(f"{name} of targets", NAN)}
        for name in ("effective rank", "variance", "hubness", "norm", "copying ratio")
    ]
    bought = {"value": facts["margin bought"], "low": facts["margin bought low"], "high": facts["margin bought high"]}
    return [*rows, {"gate": "G", "measure": "margin bought", **empty, **bought, "chance": 0.0}]


def median_over_articles(values, articles, level: float = 0.95) -> tuple[float, float, float]:
    """Return the median of `values` (N,) and its interval over `articles` (N,).

    Woodruff (JASA 47, 1952): the share of windows at or below the median is 1/2, with an interval over articles (on the
    scale of log-odds); the ends are the values at the two ends of that interval. NaN as in `over_articles`.
    """
    values, articles = check_values(values, articles, 1)
    if not values.shape[1]:
        return NAN, NAN, NAN
    median = float(np.median(values))
    _, (variance,), df = jackknife((values <= median).astype(float), articles)
    if np.isnan(variance):
        return median, NAN, NAN
    reach = stats.t.ppf((1 + level) / 2, df) * np.sqrt(variance) * 4  # d logit / dp = 4 at p = 1/2
    ordered, n = np.sort(values[0]), values.shape[1]
    low = ordered[max(int(np.ceil(special.expit(-reach) * n - 1e-9)) - 1, 0)]  # the first with a share >= p
    high = ordered[min(int(np.floor(special.expit(reach) * n + 1e-9)), n - 1)]  # the first with a share > p
    return median, float(min(low, median)), float(max(high, median))
