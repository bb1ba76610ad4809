"""The order probe: antisymmetric by construction, at chance without order, article-disjoint.

Axes: N pairs, D vector dimension.
"""

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
    _, inverse = np.unique(found.article, return_inverse=True)
    return np.bincount(inverse, found.correct) / np.bincount(inverse)


def test_the_score_is_antisymmetric_and_has_the_stated_form():
    found = order_probe(worlds.rotation(**SMALL), components=4)
    (classifier,) = found.classifiers
    random = np.random.default_rng(0)
    x, y = random.standard_normal((2, 30, 16))
    np.testing.assert_allclose(classifier.score(x, y), -classifier.score(y, x), rtol=0, atol=1e-9)
    np.testing.assert_array_equal(classifier.score(x, x), 0)
    u, b = classifier.weights[:16] / classifier.features.scale, np.zeros((4, 4))
    b[np.triu_indices(4, 1)] = classifier.weights[16:]
    a, c = ((v - classifier.features.mean) @ classifier.features.whiten for v in (x, y))
    plain = [u @ (q - p) + s @ b @ t - t @ b @ s for p, q, s, t in zip(x, y, a, c, strict=True)]
    np.testing.assert_allclose(classifier.score(x, y), plain, atol=1e-9)


def test_components_are_the_leading_ones_and_whitened():
    x = np.random.default_rng(0).standard_normal((500, 6)) * [5, 4, 3, 0.1, 0.1, 0.1] + 2
    features = probe.Features.fit(x, 3)
    z = (x - features.mean) @ features.whiten
    np.testing.assert_allclose(np.cov(z.T), np.eye(3), atol=1e-9)
    assert np.abs(features.whiten[3:]).max() < 0.05 * np.abs(features.whiten[:3]).max()


def test_logistic_reaches_the_minimum():
    """Against a general optimiser, from the definition."""
    table = np.random.default_rng(1).standard_normal((80, 5)) + np.array([0.5, 0, 0, -1, 0])
    for penalty, w in probe._logistic(table, (100.0, 1.0)).items():

        def loss(v, penalty=penalty):
            return np.log1p(np.exp(-table @ v)).sum() + penalty / 2 * v @ v

        np.testing.assert_allclose(w, minimize(loss, np.zeros(5), tol=1e-12).x, atol=1e-4)


def test_logistic_converges_on_separable_pairs():
    table = np.abs(np.random.default_rng(2).standard_normal((60, 3))) * 100
    (w,) = probe._logistic(table, (1e-3,)).values()
    assert np.isfinite(w).all() and (table @ w > 0).all()


def test_chance_level_without_order():
    """Accuracy less ½ over its standard error over articles: centred, and rarely beyond 2."""
    z = []
    for seed in range(60):
        found = order_probe(worlds.exchangeable(**SMALL, seed=seed), components=4)
        means = by_article(found)
        z.append((means.mean() - 0.5) / (means.std(ddof=1) / math.sqrt(len(means))))
    assert abs(np.mean(z)) < 3.5 / math.sqrt(60)  # 8 articles: t with 7 degrees of freedom, variance 7/5
    assert np.mean(np.abs(z) > 2.36) < 0.15  # 5 % nominal; 0.15 is 3.5 standard errors above


@pytest.mark.parametrize("name", ["converging", "diverging", "copy"])
def test_no_arrow_where_only_coherence_changes(name):
    mean, error = simulated(lambda s: order_probe(s, components=4).accuracy, name, draws=30, **SMALL)
    assert abs(mean - 0.5) < 3.5 * error and error < 0.02


@pytest.mark.parametrize("name", ["rotation", "announcing", "reversed"])
def test_power(name):
    found = [order_probe(worlds.world(name, articles=60, length=20, dim=32, seed=s)) for s in range(6)]
    assert min(f.accuracy for f in found) > 0.55 and np.mean([f.accuracy for f in found]) > 0.62


def test_strength_0_and_shuffled_articles_are_at_chance():
    def zero(store):
        return order_probe(store, components=4).accuracy

    def shuffled(store):
        return zero(worlds.shuffled(store, seed=int(store.datasheet["seed"])))

    for measure, strength in ((zero, 0.0), (shuffled, 1.0)):
        mean, error = simulated(measure, "rotation", draws=30, strength=strength, **SMALL)
        assert abs(mean - 0.5) < 3.5 * error


def test_reversed_articles_are_told_wrongly_by_the_same_probe_and_rightly_by_a_new_one():
    store = worlds.rotation(**SMALL)
    back = worlds.reverse(store)
    found, again = order_probe(store), order_probe(back)
    assert again.accuracy == found.accuracy
    rows = probe.pairs(back, "val")
    scores = found.classifiers[0].score(back.vectors[rows], back.vectors[rows + 1])
    assert (scores < 0).mean() == pytest.approx(found.accuracy)


def drifting(split_of, length=12, dim=8):
    """Articles whose every chunk lies farther along the first axis; those split off to `ood` run the other way."""
    random = np.random.default_rng(0)
    count = len(split_of)
    rest = random.standard_normal((count, length, dim - 1))
    rest /= np.linalg.norm(rest, axis=-1, keepdims=True)
    slope = np.array([-1.0 if s == "ood" else 1.0 for s in split_of])
    along = slope[:, None, None] * np.linspace(-0.9, 0.9, length)[:, None]
    x = np.concatenate([along, np.sqrt(1 - along**2) * rest], -1)
    articles = pd.DataFrame({"title": [f"d{i}" for i in range(count)], "split": split_of})
    return make_store(
        "drifting",
        x.reshape(-1, dim).astype(np.float32),
        np.repeat(np.arange(count), length),
        np.tile(np.arange(length), count),
        articles,
    )


def test_a_drift_is_seen_and_only_the_named_splits_are_read():
    store = drifting(["train"] * 20 + ["val"] * 5 + ["ood"] * 5)
    for components in (0, 4):
        assert order_probe(store, components=components).accuracy > 0.85
        assert order_probe(store, components=components, test="ood").accuracy < 0.15  # had it learned there: high


def test_test_articles_have_no_part_in_the_fit():
    store = worlds.rotation(**SMALL)
    found = order_probe(store)
    rows = store.rows("val")
    other = np.array(store.vectors)
    other[rows] = other[rows][::-1]
    changed = make_store("changed", other, store.article, store.position, store.articles)
    np.testing.assert_array_equal(found.classifiers[0].weights, order_probe(changed).classifiers[0].weights)
    assert set(found.article) == set(store.article[rows])
    (classifier,) = found.classifiers
    assert (found.articles, classifier.articles, classifier.pairs, len(found.correct)) == (8, 24, 24 * 11, 8 * 11)
    assert set(found.correct) <= {0.0, 0.5, 1.0}


def test_crossed_tests_every_article_by_a_classifier_that_never_saw_it():
    store = drifting(["train"] * 20 + ["val"] * 5 + ["ood"] * 1)
    found = crossed_order_probe(store, components=4)
    assert found.articles == 26 and len(found.correct) == 26 * 11 and len(found.classifiers) == 5
    assert sum(26 - c.articles for c in found.classifiers) == 26
    assert by_article(found)[:25].min() > 0.6 and by_article(found)[25] < 0.4  # the odd one did not teach its own way
    assert crossed_order_probe(store, components=4, splits=("train",)).articles == 20


def test_pairs_cross_neither_articles_nor_gaps():
    vectors = np.eye(8, dtype=np.float32)
    articles = pd.DataFrame({"title": ["a", "b", "c"], "split": ["train", "train", "val"]})
    store = make_store("small", vectors, [0, 0, 0, 0, 1, 1, 2, 2], [0, 1, 3, 4, 0, 1, 0, 1], articles)
    np.testing.assert_array_equal(probe.pairs(store, "train", 1), [0, 2, 4])
    np.testing.assert_array_equal(probe.pairs(store, "train", 2), [])
    np.testing.assert_array_equal(probe.pairs(store, "val", 1), [6])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"train": "val", "test": "val"}, "both 'val'"),
        ({"test": "test"}, "unknown split 'test'"),
        ({"lag": 0}, "lag 0"),
        ({"components": 17}, "17 components"),
        ({"lag": 12}, "0 pairs of 0 articles"),
        ({"train": "ood"}, "22 pairs of 2 articles"),
    ],
)
def test_too_little_is_refused(arguments, words):
    with pytest.raises(LVMError, match=words):
        order_probe(worlds.exchangeable(articles=10, length=12, dim=16), **arguments)


def test_too_few_pairs_for_the_folds_are_refused():
    with pytest.raises(LVMError, match="10 pairs of 10 articles"):
        crossed_order_probe(worlds.exchangeable(articles=10, length=12, dim=16), lag=11, folds=11)


def test_vectors_without_any_difference_score_a_half():
    vectors = np.tile(np.eye(4, dtype=np.float32)[0], (80, 1))
    articles = pd.DataFrame({"title": list("abcdefgh"), "split": ["train"] * 6 + ["val"] * 2})
    store = make_store("same", vectors, np.repeat(np.arange(8), 10), np.tile(np.arange(10), 8), articles)
    found = order_probe(store, components=2)
    assert found.accuracy == 0.5 and set(found.correct) == {0.5}
