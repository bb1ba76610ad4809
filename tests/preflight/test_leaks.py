"""Leaks against all pairs of chunks."""

import numpy as np
import pandas as pd
import pytest

from lvmlib.data import worlds
from lvmlib.data.store import make_store
from lvmlib.preflight import leaks
from lvmlib.preflight.leaks import Leak
from lvmlib.windows import windows


def table(splits, titles=None):
    index = pd.RangeIndex(len(splits), name="article")
    return pd.DataFrame({"title": titles or [""] * len(splits), "split": splits}, index=index)


def planted(copies=(1.0, 0.9905, 0.9895), dim=48, seed=1):
    """An exchangeable world in which some validation chunks are training chunks, at these cosines."""
    store = worlds.exchangeable(articles=20, length=15, dim=dim, seed=seed)
    x, random = np.array(store.vectors), np.random.default_rng(seed)
    val, train = store.rows("val"), store.rows("train")
    for i, c in enumerate(copies):
        y = x[train[16 * i % len(train)]].astype(float)
        noise = random.standard_normal(dim)
        noise -= (noise @ y) / (y @ y) * y
        x[val[16 * i % len(val)]] = c * y / np.linalg.norm(y) + np.sqrt(1 - c**2) * noise / np.linalg.norm(noise)
    return make_store("planted", x, store.article, store.position, store.articles)


@pytest.mark.parametrize("rows", [5, 8192])  # a store is read in blocks
def test_leaks_are_those_of_all_pairs(rows, monkeypatch):
    monkeypatch.setattr(leaks, "ROWS", rows)
    store = planted()
    found = {(leak.split, leak.other): leak for leak in leaks.leaks(store, sampled=7)}
    assert set(found) == {("val", "train"), ("ood", "train"), ("ood", "val")}
    for (split, other), leak in found.items():
        own, others = store.rows(split), store.rows(other)
        cosine = store.vectors[own].astype(float) @ store.vectors[others].astype(float).T
        best = cosine.max(1)
        near = best >= leaks.NEAR
        np.testing.assert_array_equal(leak.rows, own)
        np.testing.assert_array_equal(leak.match, np.where(near, others[cosine.argmax(1)], -1))
        np.testing.assert_allclose(leak.cosine, np.where(near, best, np.nan), atol=1e-5)
        assert len(leak.nearest) == 7 and np.abs(leak.nearest[:, None] - best).min(1).max() < 1e-5
    leak, val, train = found["val", "train"], store.rows("val"), store.rows("train")
    assert (leak.same, leak.near) == (1, 2) and leak.share == 2 / len(val)
    assert [pair[:2] for pair in leak.worst(store)] == [(val[0], train[0]), (val[16], train[16])]


def test_leaks_of_float16_vectors_and_of_whole_articles():
    store = planted(copies=(1.0,) * 15)
    x = np.array(store.vectors)
    x[store.article == 3] = x[store.article == 1]  # article 3 is val, 1 is train
    leak = leaks.leaks(make_store("copied", x.astype(np.float16), store.article, store.position, store.articles))[0]
    assert (leak.split, leak.other) == ("val", "train") and leak.same >= 15 and leak.articles(store) == 1


def test_leaks_look_at_a_sample_where_pairs_are_too_many():
    store = planted()
    val = store.rows("val")
    leak = leaks.leaks(store, compared=3 * 10 * len(store.rows("train")))[0]
    assert len(leak.rows) == 10 and leak.chunks == len(val) and np.isin(leak.rows, val).all()


def test_leaks_where_all_vectors_are_one_and_where_a_split_is_empty():
    """The filter lets all pass; memory holds a block, and the answer is right."""
    x = np.tile(np.eye(1, 6, dtype=np.float32), (40, 1))
    articles = table(["train", "train", "val", ""])
    (leak,) = leaks.leaks(make_store("one vector", x, np.repeat(np.arange(4), 10), np.tile(np.arange(10), 4), articles))
    assert leak.share == 1 and leak.same == 10


def test_copied_targets():
    store = worlds.exchangeable(articles=10, length=12, dim=32)
    x, own = np.array(store.vectors), windows(store, "val")
    x[own.target[2]] = x[own.start[2] + 1]  # within the context
    x[own.target[0]] = x[own.start[0] + 5]  # the skipped chunk is not
    changed = make_store("changed", x, store.article, store.position, store.articles)
    assert np.flatnonzero(leaks.copied(windows(changed, "val"))).tolist() == [2]


def test_titles_that_are_all_but_equal():
    articles = table(
        ["train", "val", "train", "train", "val", "ood"], ["The Who", "the  who!", "Other", "other", "", ""]
    )
    store = make_store("t", np.eye(6, dtype=np.float32), range(6), [0] * 6, articles)
    assert leaks.shared_titles(store) == [["The Who (train)", "the  who! (val)"]]


def test_the_worst_pairs_are_of_different_articles():
    store = worlds.exchangeable(articles=8, length=10, dim=8)
    first, match = store.rows("val")[:4], store.rows("train")[[0, 1, 15, 0]]
    assert store.article[match[0]] == store.article[match[1]] != store.article[match[2]]
    match[3] = -1
    leak = Leak("val", "train", 8, first, np.array([0.991, 1.0, 0.995, np.nan]), match, np.array([0.5]))
    pairs = [(first[1], match[1], 1.0), (first[2], match[2], 0.995)]
    assert leak.worst(store) == pairs and leak.worst(store, 1) == pairs[:1]
