"""Gate F without training: closed-form predictors, fitted forwards and backwards, on articles that they did not see.

Axes: A articles, N windows, D vector dimension, T context length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from ..baselines import STRENGTHS, Linear, Sums, Weighted, least_squares, untrained
from ..errors import LVMError
from ..judge.arrow import Arrow, compared, shared
from ..judge.measure import score
from ..models import Predictor
from ..statistics import over_articles, paired
from ..windows import DIRECTIONS, Dataset, Windows
from .facts import chance_mrr, joined


def crossed_arrows(forward: Dataset, backward: Dataset, folds: int = 5) -> dict[str, Arrow]:
    """Return the `arrow` of the weighted mean and of ridge, by cross-validation over the articles of all splits.

    `forward`, `backward`: one store, cut in both directions. Article number i of those with a shared target is in fold
    i modulo `folds`, and is judged by predictors fitted to the other folds. The tables have two more columns, `forward
    above chance` and `backward above chance`: the lower end (95 %) of novel MRR less its chance level. Raises LVMError
    for too few articles.
    """
    every = joined(forward), joined(backward)
    tests = shared(*every)
    article, used = tests[0].article, np.unique(tests[0].article)
    if len(used) < 2 * folds:
        raise LVMError(
            f"{forward.store.name}: {len(used)} articles have a target in both directions, {2 * folds} are needed; "
            "add articles, or take longer ones"
        )
    fold = np.searchsorted(used, article) % folds  # (N,)
    fits = [_fit_folds(windows, used, folds) for windows in every]
    copy_last = untrained(forward.store.dim, forward.train.context_length)["copy last"]
    copied, chance, arrows = [score(copy_last, test) for test in tests], chance_mrr(tests[0]), {}
    for name in fits[0][0]:
        judged = [_judge([f[name] for f in fit], test, fold) for fit, test in zip(fits, tests, strict=True)]
        above = [over_articles(way["novel MRR"] - chance, article)[1] for way in judged]
        columns = {f"{way} above chance": low for way, low in zip(DIRECTIONS, above, strict=True)}
        arrow = compared([judged], copied, article)
        arrows[name] = replace(arrow, table=arrow.table.assign(**columns))
    return arrows


def _judge(predictors: Sequence[Predictor], windows: Windows, fold: np.ndarray) -> pd.DataFrame:
    """The `score` of each window by the predictor of its fold (N,)."""
    places = [np.flatnonzero(fold == number) for number in range(len(predictors))]
    parts = [score(p, replace(windows, start=windows.start[at])) for p, at in zip(predictors, places, strict=True)]
    return pd.concat(parts).set_axis(np.concatenate(places)).sort_index()


def _fit_folds(windows: Windows, used: np.ndarray, folds: int) -> list[dict[str, Predictor]]:
    """For each fold the weighted mean and the ridge of all windows whose article is not in it, from one pass.

    The ridge's strength is chosen once: the one that, fitted to all but the first fold, has the least error on it.
    """
    length, dim = windows.context_length, windows.store.dim
    fold_of = np.searchsorted(used, windows.article) % folds
    fold_of[~np.isin(windows.article, used)] = folds  # in every fit, and never judged
    parts = [Sums.of(replace(windows, start=windows.start[fold_of == f]), batch_size=2048) for f in range(folds + 1)]
    gram, moment = (sum(s) for s in zip(*parts, strict=True))
    others = [Sums(gram - part.gram, moment - part.moment) for part in parts[:folds]]
    strength = min(STRENGTHS, key=lambda s: parts[0].error(others[0].ridge(s)))
    fits = []
    for rest in others:
        left = rest.gram.view(length, dim, length, dim).diagonal(dim1=1, dim2=3).sum(-1).double()  # (T, T)
        right = rest.moment.view(length, dim, dim).diagonal(dim1=1, dim2=2).sum(-1).double()  # (T,)
        weighted = Weighted(dim, least_squares(left, right))
        fits.append({"weighted mean": weighted, "ridge": Linear(dim, rest.ridge(strength))})
    return fits


def ridge_and_mean(arrows: Mapping[str, Arrow]) -> list[np.ndarray]:
    """(N,) forward − backward in novel MRR, of ridge and of the weighted mean."""
    return [arrows[n].differences["novel MRR"].mean(0) for n in ("ridge", "weighted mean")]


def beyond(arrows: Mapping[str, Arrow]) -> tuple[float, float, float]:
    """Ridge's forward − backward minus the weighted mean's, window by window, in novel MRR: value, low, high.

    The weighted mean knows no direction, but gains one way where chunks grow noisier along every article.
    """
    return paired(*ridge_and_mean(arrows), arrows["ridge"].article)


def declared(arrows: Mapping[str, Arrow]) -> str:
    """The arrow that `crossed_arrows` show, "forward", "backward" or "none": ridge's, if ridge is also beyond the
    weighted mean on the same side, and above chance that way."""
    way = arrows["ridge"].declared if arrows else "none"
    if way == "none" or not above_chance(arrows, way):
        return "none"
    _, low, high = beyond(arrows)
    return way if (low > 0 if way == "forward" else high < 0) else "none"


def above_chance(arrows: Mapping[str, Arrow], way: str) -> bool:
    """Whether ridge, read that way, has a novel MRR significantly above chance."""
    return bool(arrows["ridge"].table[f"{way} above chance"].iloc[0] > 0)
