"""The order probe: antisymmetric by construction, at chance without order, article-disjoint."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from stores import simulated

from lvmlib.data import worlds
from lvmlib.data.store import make_store
from lvmlib.errors import LVMError
from lvmlib.preflight import probe
from lvmlib.preflight.probe import crossed_order_probe, order_probe

SMALL = {"articles": 40, "length": 12, "dim": 16}


def by_article(found):
    """(articles,) mean of correct."""
    return pd.Series(found.correct).groupby(found.article).mean().to_numpy()


def test_the_score_is_antisymmetric_and_has_the_stated_form():
    (classifier,) = order_probe(worlds.rotation(**SMALL), components=4).classifiers
    x, y = np.random.default_rng(0).standard_normal((2, 30, 16))
    np.testing.assert_allclose(classifier.score(x, y), -classifier.score(y, x), rtol=0, atol=1e-9)
    np.testing.assert_array_equal(classifier.score(x, x), 0)
    u, b = classifier.weights[:16] / classifier.scale, np.zeros((4, 4))
    b[np.triu_indices(4, 1)] = classifier.weights[16:]
    a, c = ((v - classifier.mean) @ classifier.whiten for v in (x, y))
    plain = [u @ (q - p) + s @ b @ t - t @ b @ s for p, q, s, t in zip(x, y, a, c, strict=True)]
    np.testing.assert_allclose(classifier.score(x, y), plain, atol=1e-9)


def test_components_are_the_leading_ones_and_whitened():
    x = np.random.default_rng(0).standard_normal((500, 6)) * [5, 4, 3, 0.1, 0.1, 0.1] + 2
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    articles = pd.DataFrame({"title": [f"a{i}" for i in range(52)], "split": ["train"] * 50 + ["val"] * 2})
    x = np.concatenate([x, x[:20]]).astype(np.float32)
    store = make_store("stretched", x, np.repeat(range(52), 10), np.tile(range(10), 52), articles)
    (classifier,) = order_probe(store, components=3).classifiers
    z = (x[:500] - classifier.mean) @ classifier.whiten
    np.testing.assert_allclose(np.cov(z.T), np.eye(3), atol=1e-5)
    assert np.abs(classifier.whiten[3:]).max() < 0.2 * np.abs(classifier.whiten[:3]).max()


def test_logistic_reaches_the_minimum():
    """Against a general optimiser, from the definition; and on separable pairs."""
    table = np.random.default_rng(1).standard_normal((80, 5)) + np.array([0.5, 0, 0, -1, 0])
    for penalty, w in probe._logistic(table, (100.0, 1.0)).items():

        def loss(v, penalty=penalty):
            return np.log1p(np.exp(-table @ v)).sum() + penalty / 2 * v @ v

        np.testing.assert_allclose(w, minimize(loss, np.zeros(5), tol=1e-12).x, atol=1e-4)
    (w,) = probe._logistic(100 * np.abs(table), (1e-3,)).values()
    assert np.isfinite(w).all() and (np.abs(table) @ w > 0).all()


def test_chance_level_without_order():
    """Accuracy less ½ over its standard error over articles: centred, and rarely beyond 2."""
    z = []
    for seed in range(60):
        means = by_article(order_probe(worlds.exchangeable(**SMALL, seed=seed), components=4))
        z.append((means.mean() - 0.5) / (means.std(ddof=1) / math.sqrt(len(means))))
    assert abs(np.mean(z)) < 3.5 / math.sqrt(60)  # 8 articles: t with 7 degrees of freedom, variance 7/5
    assert np.mean(np.abs(z) > 2.36) < 0.15  # 5 % nominal; 0.15 is 3.5 standard errors above


def accuracy(store):
    return order_probe(store, components=4).accuracy


def of_shuffled(store):
    return accuracy(worlds.shuffled(store, seed=int(store.datasheet["seed"])))


@pytest.mark.parametrize(
    ("measure", "name", "strength"),
    [
        (accuracy, "converging", {}),  # only coherence changes
        (accuracy, "diverging", {}),
        (accuracy, "copy", {}),
        (accuracy, "rotation", {"strength": 0.0}),
        (of_shuffled, "rotation", {"strength": 1.0}),
    ],
)
def test_worlds_without_order_are_at_chance(measure, name, strength):
    mean, error = simulated(measure, name, draws=30, **strength, **SMALL)
    assert abs(mean - 0.5) < 3.5 * error and error < 0.02


@pytest.mark.parametrize("name", ["rotation", "announcing", "reversed"])
def test_power(name):
    found = [order_probe(worlds.world(name, articles=60, length=20, dim=32, seed=s)) for s in range(4)]
    assert min(f.accuracy for f in found) > 0.55 and np.mean([f.accuracy for f in found]) > 0.62


def test_reversed_articles_are_told_wrongly_by_the_same_probe_and_rightly_by_a_new_one():
    store = worlds.rotation(**SMALL)
    back = worlds.reverse(store)
    found, again = order_probe(store), order_probe(back)
    assert again.accuracy == found.accuracy
    rows = probe.pairs(back, "val", 1)
    scores = found.classifiers[0].score(back.vectors[rows], back.vectors[rows + 1])
    assert (scores < 0).mean() == pytest.approx(found.accuracy)


def drifting(split_of, length=12, dim=8):
    """Articles whose every chunk lies farther along the first axis; those of `ood` run the other way."""
    random, count = np.random.default_rng(0), len(split_of)
    rest = random.standard_normal((count, length, dim - 1))
    rest /= np.linalg.norm(rest, axis=-1, keepdims=True)
    slope = np.array([-1.0 if s == "ood" else 1.0 for s in split_of])
    along = slope[:, None, None] * np.linspace(-0.9, 0.9, length)[:, None]
    x = np.concatenate([along, np.sqrt(1 - along**2) * rest], -1).reshape(-1, dim).astype(np.float32)
    articles = pd.DataFrame({"title": [f"d{i}" for i in range(count)], "split": split_of})
    return make_store("drifting", x, np.repeat(np.arange(count), length), np.tile(np.arange(length), count), articles)


def test_a_drift_is_seen_and_only_the_named_splits_are_read():
    store = drifting(["train"] * 20 + ["val"] * 5 + ["ood"] * 5)
    for components in (0, 4):
        assert order_probe(store, components=components).accuracy > 0.85
        assert order_probe(store, components=components, test="ood").accuracy < 0.15  # had it learned there: high


def test_test_articles_have_no_part_in_the_fit():
    store = worlds.rotation(**SMALL)
    found, rows, other = order_probe(store), store.rows("val"), np.array(store.vectors)
    other[rows] = other[rows][::-1]
    changed = make_store("changed", other, store.article, store.position, store.articles)
    np.testing.assert_array_equal(found.classifiers[0].weights, order_probe(changed).classifiers[0].weights)
    assert set(found.article) == set(store.article[rows]) and len(found.correct) == 8 * 11
    assert set(found.correct) <= {0.0, 0.5, 1.0}


def test_crossed_tests_every_article_by_a_classifier_that_never_saw_it():
    store = drifting(["train"] * 20 + ["val"] * 5 + ["ood"] * 1)
    found = crossed_order_probe(store, components=4)
    accuracies = by_article(found)
    assert len(accuracies) == 26 and len(found.correct) == 26 * 11 and len(found.classifiers) == 5
    assert accuracies[:25].min() > 0.6 and accuracies[25] < 0.4  # the odd one did not teach its own way
    assert len(by_article(crossed_order_probe(store, components=4, splits=("train",)))) == 20


def test_pairs_cross_neither_articles_nor_gaps():
    articles = pd.DataFrame({"title": ["a", "b", "c"], "split": ["train", "train", "val"]})
    article, position = [0, 0, 0, 0, 1, 1, 2, 2], [0, 1, 3, 4, 0, 1, 0, 1]
    store = make_store("small", np.eye(8, dtype=np.float32), article, position, articles)
    for split, lag, rows in (("train", 1, [0, 2, 4]), ("train", 2, []), ("val", 1, [6])):
        np.testing.assert_array_equal(probe.pairs(store, split, lag), rows)


@pytest.mark.parametrize(
    ("call", "arguments", "words"),
    [
        (order_probe, {"train": "val", "test": "val"}, "both 'val'"),
        (order_probe, {"lag": 12}, "0 pairs of 0 articles"),
        (order_probe, {"train": "ood"}, "22 pairs of 2 articles"),
        (crossed_order_probe, {"lag": 11, "folds": 11}, "10 pairs of 10 articles"),
    ],
)
def test_too_little_is_refused(call, arguments, words):
    with pytest.raises(LVMError, match=words):
        call(worlds.exchangeable(articles=10, length=12, dim=16), **arguments)


def test_vectors_without_any_difference_score_a_half():
    vectors = np.tile(np.eye(4, dtype=np.float32)[0], (80, 1))
    articles = pd.DataFrame({"title": list("abcdefgh"), "split": ["train"] * 6 + ["val"] * 2})
    store = make_store("same", vectors, np.repeat(np.arange(8), 10), np.tile(np.arange(10), 8), articles)
    assert set(order_probe(store, components=2).correct) == {0.5}
