"""Order probe on raw vectors: can a small classifier tell a pair of chunks from the same pair swapped?

Axes: N pairs, D vector dimension, k components, F features.

A look at a dataset before any training, free of what makes Δ and the margins mislead (handbook §4.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, log_expit

from ..errors import LVMError
from ..windows import SPLITS, Store

PENALTIES = (10000.0, 3000.0, 1000.0, 300.0, 100.0)  # strong first: each fit starts from the one before


@dataclass(frozen=True, eq=False)
class OrderProbe:
    """What an order probe found.

    `accuracy`: mean of `correct` (N,), per test pair 1, 0, or ½ where the score is 0; chance is ½. `article` (N,): for
    intervals over articles (`statistics.over_articles`), of which there are `articles`. `classifiers`: one, or one a
    fold.
    """

    accuracy: float
    correct: np.ndarray
    article: np.ndarray
    classifiers: tuple[Classifier, ...]

    @property
    def articles(self) -> int:
        return len(np.unique(self.article))


@dataclass(frozen=True, eq=False)
class Classifier:
    """A fitted probe; `penalty`: the strength chosen; `pairs`, `articles`: how many it was fitted to."""

    features: Features
    weights: np.ndarray
    penalty: float
    pairs: int
    articles: int

    def score(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """(N,) log-odds that x (N, D) comes before y (N, D); score(y, x) = −score(x, y)."""
        return self.features(x, y) @ self.weights


def order_probe(
    store: Store, lag: int = 1, train: str = "train", test: str = "val", components: int = 16
) -> OrderProbe:
    """Accuracy of telling (x_t, x_{t+lag}) from its swap, on the articles of another split.

    score(x, y) = u·(y − x) + x̃ᵀB ỹ − ỹᵀB x̃, with B antisymmetric and x̃ the whitened projection to the k leading
    principal components of the training chunks: antisymmetric in (x, y) and without intercept, so that a pair and its
    swap make the same demand and the chance level is exactly ½. u and B are fitted by logistic regression with a
    ridge penalty, which is chosen by log-loss on every fifth training article, left out first.

    It sees what lies in fixed directions of the space: a drift along the article (u: leads differ from endings), and a
    turning or announcing that is the same in all articles (B), among the leading k components (k = 0: u alone). It
    sees no order that is relative to an article's own topic: `converging` articles are at chance, though each chunk is
    nearer to the topic than the one before it. It sees no order at other lags. Above ½ the vectors carry an arrow of
    time; at ½ this probe found none, which a larger model may. A drift is an arrow, but no knowledge of the next
    chunk. The accuracy has no sign: fitted to reversed articles the probe is as good; fitted forward and tested on
    reversed ones it is wrong exactly where it was right.

    Pairs never cross articles or gaps in position. Raises LVMError for an unknown split, the same split twice, more
    components than dimensions, fewer than 5 training articles with pairs, 50 training pairs, or 2 test articles.
    """
    if train == test:
        raise LVMError(f"order_probe: train and test are both {train!r}; articles must be disjoint")
    rows, held = pairs(store, train, lag), pairs(store, test, lag)
    _check(store, f"to test on, {test}", held, 2, 2)
    classifier = _fit(store, store.rows(train), rows, lag, components)
    correct = _correct(store, classifier, held, lag)
    return OrderProbe(float(correct.mean()), correct, store.article[held], (classifier,))


def crossed_order_probe(store: Store, lag: int = 1, folds: int = 5, components: int = 16, splits=SPLITS) -> OrderProbe:
    """`order_probe` with every article of `splits` tested once, by a classifier fitted to the other folds' articles.

    For datasets with few articles in their splits. Article number i of those with pairs is in fold i modulo `folds`.
    """
    rows = np.sort(np.concatenate([pairs(store, split, lag) for split in splits]))
    chunks = np.sort(np.concatenate([store.rows(split) for split in splits]))
    _check(store, f"in {', '.join(splits)}", rows, 2 * max(folds, 2), max(folds, 2))
    used = np.unique(store.article[rows])
    classifiers, correct = [], np.empty(len(rows))
    for fold in range(folds):
        out = used[fold::folds]
        held = np.isin(store.article[rows], out)
        kept = chunks[~np.isin(store.article[chunks], out)]
        classifiers.append(_fit(store, kept, rows[~held], lag, components))
        correct[held] = _correct(store, classifiers[-1], rows[held], lag)
    return OrderProbe(float(correct.mean()), correct, store.article[rows], tuple(classifiers))


def _check(store: Store, where: str, rows: np.ndarray, least_pairs: int, least_articles: int) -> None:
    articles = len(np.unique(store.article[rows]))
    if len(rows) < least_pairs or articles < least_articles:
        raise LVMError(
            f"{store.name}: {len(rows)} pairs of {articles} articles {where}; an order probe needs at least "
            f"{least_pairs} of {least_articles}: give it more articles, or a smaller lag"
        )


def _fit(store: Store, chunks: np.ndarray, rows: np.ndarray, lag: int, components: int) -> Classifier:
    """A probe fitted to the pairs (rows, rows + lag); its components to all `chunks` (row numbers)."""
    if not 0 <= components <= store.dim:
        raise LVMError(f"{store.name}: {components} components; choose 0 (drift alone) to {store.dim}")
    _check(store, "to fit", rows, 50, 5)
    features = Features.fit(np.asarray(store.vectors[chunks], np.float64), components)
    table = features(store.vectors[rows], store.vectors[rows + lag])
    names, number = np.unique(store.article[rows], return_inverse=True)
    penalty = _choose(table, number % 5 == 4)
    weights = _logistic(table, [p for p in PENALTIES if p >= penalty])[penalty]
    return Classifier(features, weights, penalty, len(rows), len(names))


def _correct(store: Store, classifier: Classifier, rows: np.ndarray, lag: int) -> np.ndarray:
    return 0.5 + 0.5 * np.sign(classifier.score(store.vectors[rows], store.vectors[rows + lag]))


def pairs(store: Store, split: str, lag: int = 1) -> np.ndarray:
    """(N,) rows t of a split such that rows t and t + lag are `lag` apart in one article without a gap."""
    if lag < 1:
        raise LVMError(f"lag {lag}: must be at least 1")
    if split not in SPLITS:
        raise LVMError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    row = store.rows(split)
    row = row[row + lag < len(store.article)]
    whole = (store.article[row] == store.article[row + lag]) & (store.position[row + lag] - store.position[row] == lag)
    return row[whole]


@dataclass(frozen=True, eq=False)
class Features:
    """Antisymmetric features of a pair, of the same size as each other so that one penalty suits both kinds."""

    mean: np.ndarray  # (D,)
    whiten: np.ndarray  # (D, k)
    scale: float  # of the coordinates of y − x

    @classmethod
    def fit(cls, x: np.ndarray, components: int) -> Features:
        mean = x.mean(0)
        variance, axes = np.linalg.eigh(np.cov(x.T).reshape(x.shape[1], -1))
        # Not below a millionth of the greatest: with few chunks the trailing components hold nothing.
        leading = np.maximum(variance[::-1][:components], variance[-1] * 1e-6 + 1e-12)
        return cls(mean, axes[:, ::-1][:, :components] / np.sqrt(leading), float(np.sqrt(max(variance.mean(), 1e-12))))

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """(N, D + k(k−1)/2): y − x, and x̃_i ỹ_j − x̃_j ỹ_i for i < j."""
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        i, j = np.triu_indices(self.whiten.shape[1], 1)
        a, b = (x - self.mean) @ self.whiten, (y - self.mean) @ self.whiten
        return np.hstack([(y - x) / self.scale, a[:, i] * b[:, j] - a[:, j] * b[:, i]])


def _choose(table: np.ndarray, held: np.ndarray) -> float:
    """The penalty with the least log-loss on the pairs `held` (N,) out; the strongest of equals."""
    fits = _logistic(table[~held], PENALTIES)
    return min(PENALTIES, key=lambda p: -log_expit(table[held] @ fits[p]).sum())


def _logistic(table: np.ndarray, penalties) -> dict[float, np.ndarray]:
    """For each penalty the w (F,) that minimises −Σ_n log σ(f_n·w) + penalty/2 · ‖w‖², by Newton steps.

    Every pair stands in its true order: the swapped pair has features −f and the other label, and adds the same term.
    The minimum is unique; full steps reach it from near, and start far only if the loss falls (else they are halved).
    """

    def loss(w, penalty):
        return -log_expit(table @ w).sum() + penalty / 2 * w @ w

    found, w = {}, np.zeros(table.shape[1])
    for penalty in penalties:
        for _ in range(50):
            probability = expit(table @ w)
            gradient = penalty * w - table.T @ (1 - probability)
            if np.abs(gradient).max() < 1e-6 * len(table):
                break
            curvature = np.sqrt(probability * (1 - probability))[:, None] * table
            hessian = curvature.T @ curvature
            hessian[np.diag_indices_from(hessian)] += penalty
            step, size, before = np.linalg.solve(hessian, gradient), 1.0, loss(w, penalty)
            while loss(w - size * step, penalty) > before and size > 1e-6:
                size /= 2
            w = w - size * step
        found[penalty] = w
    return found
