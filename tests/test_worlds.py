"""Worlds against their closed forms.

Axes: A articles, L chunks an article, D vector dimension.
"""

import math

import numpy as np
import pytest

from lvmlib import worlds
from lvmlib.errors import LVMError
from lvmlib.vectors import SPLITS, dataset


def articles_of(store):
    """(A, L, D) float64, in the order of article and position."""
    order = np.lexsort((store.position, store.article))
    return store.vectors[order].astype(float).reshape(len(store.articles), -1, store.dim)


def closed_form(length, first, last):
    """(L, L): topic·topic = 1 is all that two chunks share; each has length √(1 + s²)."""
    s = [first + (last - first) * t / (length - 1) for t in range(length)]
    return np.array([[1 / math.sqrt((1 + a * a) * (1 + b * b)) for b in s] for a in s])


def tolerance(store):
    """Of a cosine averaged over articles: it scatters by less than 1/√D in each, and its bias is of order 1/D."""
    return 5 / math.sqrt(store.dim * len(store.articles)) + 2 / store.dim


SLOPES = [(2.0, 0.6), (0.6, 2.0), (1.0, 1.0), (3.0, 0.0)]


@pytest.mark.parametrize("first, last", SLOPES)
def test_converging_cosine_is_the_closed_form(first, last):
    np.testing.assert_allclose(worlds.converging_cosine(9, first, last), closed_form(9, first, last))
    np.testing.assert_allclose(worlds.converging_scale(9, first, last)[[0, 4, 8]], [first, (first + last) / 2, last])


@pytest.mark.parametrize("first, last", SLOPES)
def test_cosines_match_the_closed_form(first, last):
    store = worlds.converging(articles=150, length=9, dim=256, first=first, last=last, seed=3)
    x = articles_of(store)
    cosines = np.einsum("atd,aud->tu", x, x) / len(x)
    apart = ~np.eye(9, dtype=bool)
    np.testing.assert_allclose(cosines[apart], closed_form(9, first, last)[apart], rtol=0, atol=tolerance(store))
    # One article alone stays within what its dimension allows.
    one = np.einsum("td,ud->tu", x[0], x[0])
    assert np.abs(one - closed_form(9, first, last))[apart].max() < 5 / math.sqrt(store.dim)


def test_articles_share_nothing():
    x = articles_of(worlds.converging(articles=30, length=6, dim=256))
    across = np.einsum("atd,bud->abtu", x, x)[~np.eye(30, dtype=bool)]
    assert abs(across.mean()) < 0.01 and np.abs(across).max() < 6 / math.sqrt(256)


def delta(store, t):
    """(A,) Δ = cos(last, next) − cos(last, previous), the context's last chunk at position t."""
    x = articles_of(store)
    return (x[:, t] * x[:, t + 1]).sum(-1) - (x[:, t] * x[:, t - 1]).sum(-1)


@pytest.mark.parametrize("first, last, sign", [(2.0, 0.6, 1), (0.6, 2.0, -1), (1.0, 1.0, 0)])
def test_delta_has_the_sign_of_the_convergence_and_its_size(first, last, sign):
    """Nothing of the order can be predicted, and yet Δ is not 0 (§4.1 point 2): that is what this world is for."""
    length = 9
    store = worlds.converging(articles=300, length=length, dim=256, first=first, last=last, seed=1)
    expected = closed_form(length, first, last)
    found = np.mean([delta(store, t) for t in range(1, length - 1)], axis=0)
    wanted = np.mean([expected[t, t + 1] - expected[t, t - 1] for t in range(1, length - 1)])
    assert found.mean() == pytest.approx(wanted, abs=4 * found.std() / math.sqrt(len(found)) + 1 / store.dim)
    if sign:
        assert np.sign(wanted) == sign and np.sign(found.mean()) == sign
        assert abs(found.mean()) > 10 * found.std() / math.sqrt(len(found))


def test_the_default_world_is_forward_biased():
    store = worlds.world("converging")
    assert store.dim == 384 and len(store.articles) == 160 and len(store.vectors) == 160 * 40
    deltas = np.array([delta(store, t).mean() for t in range(1, 39)])
    expected = closed_form(40, 2.0, 0.6)
    wanted = np.array([expected[t, t + 1] - expected[t, t - 1] for t in range(1, 39)])
    np.testing.assert_allclose(deltas, wanted, rtol=0, atol=5 * math.sqrt(2) / math.sqrt(384 * 160))
    assert (wanted > 0).all()
    assert deltas.mean() == pytest.approx(wanted.mean(), rel=0.1) and deltas.mean() > 0.01


def test_unit_vectors_and_a_clean_store():
    store = worlds.converging(articles=10, length=12, dim=32)
    assert store.vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(store.vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(store.article, np.repeat(np.arange(10), 12))
    np.testing.assert_array_equal(store.position, np.tile(np.arange(12), 10))
    assert store.name == "world:converging"
    assert store.datasheet["world"] == "converging" and store.datasheet["first"] == 2.0 and store.datasheet["seed"] == 0


def test_deterministic_by_seed():
    size = {"articles": 10, "length": 8, "dim": 16}
    a, b, c = (worlds.converging(**size, seed=s) for s in (4, 4, 5))
    np.testing.assert_array_equal(a.vectors, b.vectors)
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert np.abs(a.vectors - c.vectors).min() > 0


def test_splits_are_disjoint_and_three_one_one():
    store = worlds.converging(articles=20, length=9, dim=16)
    articles = {s: set(store.article[store.rows(s)].tolist()) for s in SPLITS}
    assert {s: len(a) for s, a in articles.items()} == {"train": 12, "val": 4, "ood": 4}
    assert set.union(*articles.values()) == set(range(20))  # with the sizes: no article in two
    data = dataset(store, horizon=2)
    assert {s: len(getattr(data, s)) for s in SPLITS} == {"train": 12 * 3, "val": 4 * 3, "ood": 4 * 3}


def test_by_name():
    assert worlds.world("converging").fingerprint == dataset("world:converging").store.fingerprint
    with pytest.raises(LVMError, match=r"unknown world 'convergent'.*known: .*converging"):
        worlds.world("convergent")
    with pytest.raises(LVMError, match=r"known: .*converging"):
        dataset("world:")
