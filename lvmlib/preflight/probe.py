"""Order probe on raw vectors: can a small classifier tell a pair of chunks from the same pair swapped?

Axes: N pairs, D vector dimension, k components, F features. Unlike Δ and the margins, it is not misled by nearness
(handbook §4.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from ..errors import LVMError
from ..statistics import over_articles
from ..windows import SPLITS, Store

PENALTIES = (10000.0, 3000.0, 1000.0, 300.0, 100.0)  # strong first: each fit starts from the one before


@dataclass(frozen=True, eq=False)
class OrderProbe:
    """The result of an order probe on N test pairs; chance is ½."""

    correct: np.ndarray  # (N,) 1, 0, or ½ where the score is 0
    article: np.ndarray  # (N,)
    classifiers: tuple[Classifier, ...]  # one, or one a fold

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())


@dataclass(frozen=True, eq=False)
class Classifier:
    """A fitted probe. Its features are all of one size, because one penalty is for all."""

    mean: np.ndarray  # (D,)
    whiten: np.ndarray  # (D, k)
    scale: float  # of the coordinates of y − x
    weights: np.ndarray  # (F,), F = D + k(k−1)/2

    def score(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """(N,) log-odds that x (N, D) comes before y (N, D); score(y, x) = −score(x, y)."""
        return self.features(x, y) @ self.weights

    def features(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """(N, F): y − x, and x̃_i ỹ_j − x̃_j ỹ_i for i < j."""
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        i, j = np.triu_indices(self.whiten.shape[1], 1)
        a, b = (x - self.mean) @ self.whiten, (y - self.mean) @ self.whiten
        return np.hstack([(y - x) / self.scale, a[:, i] * b[:, j] - a[:, j] * b[:, i]])


def order_probe(
    store: Store, lag: int = 1, train: str = "train", test: str = "val", components: int = 16
) -> OrderProbe:
    """Test whether (x_t, x_{t+lag}) can be told from its swap, on the articles of another split.

    score(x, y) = u·(y − x) + x̃ᵀB ỹ − ỹᵀB x̃, with B antisymmetric and x̃ the whitened projection to the k leading
    principal components of the training chunks. It is antisymmetric without intercept, so chance is exactly ½. u and B
    come from logistic regression with a ridge penalty, chosen by log-loss on every fifth training article, left out.

    It detects a drift along the article (u), and a turning that is the same in all articles (B; k = 0: u alone), but
    not order relative to an article's own topic, nor at other lags. Raises LVMError for the same split twice, fewer
    than 5 training articles with pairs, 50 training pairs, or 2 test articles.
    """
    if train == test:
        raise LVMError(f"order_probe: train and test are both {train!r}; articles must be disjoint")
    fit_rows, test_rows = pairs(store, train, lag), pairs(store, test, lag)
    _check(store, f"to test on, {test}", test_rows, 2, 2)
    classifier = _fit(store, store.rows(train), fit_rows, lag, components)
    return OrderProbe(_correct(store, classifier, test_rows, lag), store.article[test_rows], (classifier,))


def crossed_order_probe(store: Store, lag: int = 1, folds: int = 5, components: int = 16, splits=SPLITS) -> OrderProbe:
    """`order_probe` with every article of `splits` tested once, by a classifier fitted to the other folds' articles.

    Article number i of those with pairs is in fold i modulo `folds`.
    """
    rows = np.sort(np.concatenate([pairs(store, split, lag) for split in splits]))
    chunks = np.sort(np.concatenate([store.rows(split) for split in splits]))
    _check(store, f"in {', '.join(splits)}", rows, 2 * folds, folds)
    used = np.unique(store.article[rows])
    classifiers, correct = [], np.empty(len(rows))
    for fold in range(folds):
        tested = np.isin(store.article[rows], used[fold::folds])
        fit_chunks = chunks[~np.isin(store.article[chunks], used[fold::folds])]
        classifiers.append(_fit(store, fit_chunks, rows[~tested], lag, components))
        correct[tested] = _correct(store, classifiers[-1], rows[tested], lag)
    return OrderProbe(correct, store.article[rows], tuple(classifiers))


def probed(order: Mapping[int, OrderProbe]) -> pd.DataFrame:
    """Accuracy of the order probe, a row a lag: lag, accuracy, low, high (95 %), pairs, articles, and order: whether it
    is significantly above ½, corrected for the number of lags (Bonferroni)."""
    rows = []
    for lag, o in order.items():
        value, low, high = over_articles(o.correct, o.article, share=True)
        strict = over_articles(o.correct, o.article, level=1 - 0.05 / len(order), share=True)[1]
        rows.append((lag, value, low, high, len(o.correct), len(np.unique(o.article)), bool(strict > 0.5)))
    columns = ["lag", "accuracy", "low", "high", "pairs", "articles", "order"]
    return pd.DataFrame(rows, columns=columns).astype({"order": bool})


def pairs(store: Store, split: str, lag: int) -> np.ndarray:
    """(N,) rows t of a split such that rows t and t + lag are `lag` apart in one article without a gap."""
    row = store.rows(split)
    row = row[row + lag < len(store.article)]
    gapless = store.position[row + lag] - store.position[row] == lag
    return row[gapless & (store.article[row] == store.article[row + lag])]


def _check(store: Store, where: str, rows: np.ndarray, least_pairs: int, least_articles: int) -> None:
    articles = len(np.unique(store.article[rows]))
    if len(rows) < least_pairs or articles < least_articles:
        raise LVMError(
            f"{store.name}: {len(rows)} pairs of {articles} articles {where}; at least {least_pairs} of "
            f"{least_articles} are needed: add articles, or take a smaller lag"
        )


def _fit(store: Store, chunks: np.ndarray, rows: np.ndarray, lag: int, components: int) -> Classifier:
    """A probe fitted to the pairs (rows, rows + lag); its components to all `chunks` (row numbers)."""
    _check(store, "to fit", rows, 50, 5)
    x = np.asarray(store.vectors[chunks], np.float64)
    variance, axes = np.linalg.eigh(np.atleast_2d(np.cov(x.T)))
    # Not below a millionth of the greatest: with few chunks the trailing components hold nothing.
    leading = np.maximum(variance[::-1][:components], variance[-1] * 1e-6 + 1e-12)
    whiten, scale = axes[:, ::-1][:, :components] / np.sqrt(leading), float(np.sqrt(max(variance.mean(), 1e-12)))
    table = Classifier(x.mean(0), whiten, scale, np.zeros(0)).features(store.vectors[rows], store.vectors[rows + lag])
    left_out = np.unique(store.article[rows], return_inverse=True)[1] % 5 == 4
    fits = _logistic(table[~left_out], PENALTIES)
    penalty = min(PENALTIES, key=lambda p: -log_expit(table[left_out] @ fits[p]).sum())  # the strongest of equals
    weights = _logistic(table, [p for p in PENALTIES if p >= penalty])[penalty]
    return Classifier(x.mean(0), whiten, scale, weights)


def _correct(store: Store, classifier: Classifier, rows: np.ndarray, lag: int) -> np.ndarray:
    return 0.5 + 0.5 * np.sign(classifier.score(store.vectors[rows], store.vectors[rows + lag]))


def _logistic(table: np.ndarray, penalties: Sequence[float]) -> dict[float, np.ndarray]:
    """For each penalty the w (F,) that minimises −Σ_n log σ(f_n·w) + penalty/2 · ‖w‖². The minimum is unique.

    Every pair is in its true order; the swapped pair, with features −f and the other label, adds the same term.
    """

    def loss(w: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
        """Return the loss and its gradient."""
        score = table @ w
        return -log_expit(score).sum() + penalty / 2 * w @ w, penalty * w - table.T @ expit(-score)

    fits, w = {}, np.zeros(table.shape[1])
    options = {"gtol": 1e-6 * len(table), "ftol": 1e-15, "maxiter": 10_000, "maxfun": 20_000}
    for penalty in penalties:
        w = fits[penalty] = minimize(loss, w, (penalty,), jac=True, method="L-BFGS-B", options=options).x
    return fits
