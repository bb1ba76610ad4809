"""Chunks of the target's article, ranks among them, rivals and strangers, each against plain loops.

Axes: N windows, B batch, V variants of a prediction, T context length, D vector dimension, K offsets.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from judge.plain import store_of
from scipy import stats

from lvmlib import ranking as retrieval
from lvmlib.ranking import TIE, Articles
from lvmlib.windows import windows

T = 5
DIM = 12


@functools.cache
def small_store(dtype=np.float32):
    """Articles of several lengths with gaps, splits mixed; chunks 9 and 13 of article 3 are chunks 4 and 5 again."""
    random = np.random.default_rng(6)
    layout = {
        9: ("val", [*range(12)]),
        3: ("val", [*range(14)]),
        4: ("train", [*range(20)]),
        5: ("val", [*range(2, 11), *range(12, 22), 30]),
        6: ("ood", [*range(9)]),
        7: ("val", [0, 1]),
    }
    size = sum(len(p) for _, p in layout.values())
    noise, topics = random.standard_normal((size, DIM)), random.standard_normal((10, DIM))
    articles, first = {}, 0
    for a, (split, position) in layout.items():
        articles[a] = (split, np.array(position), noise[first : first + len(position)] + topics[a])
        first += len(position)
    same = articles[3][2]
    same[9], same[13] = same[4], same[5]
    return store_of(articles, dtype)


CUTS = [("forward", 1), ("forward", 2), ("backward", 1), ("backward", 2)]


@functools.cache
def cut(direction="forward", horizon=1, dtype=np.float32):
    return windows(small_store(dtype), "val", horizon, T, direction)


def prepared(w):
    return Articles(w, torch.from_numpy(w.store.vectors))


def random_units(seed, *shape):
    x = torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def cos(a, b):
    a, b = np.asarray(a, float), np.asarray(b, float)
    return a @ b / math.sqrt((a @ a) * (b @ b))


def own_rows(w, i):
    return np.flatnonzero(w.store.article == w.store.article[w.target[i]])


# Cosines


def in_blocks(articles, unit, index, offsets):
    """Cosines (B, K) at the offsets, and the mean over the article without the context (B,)."""
    at, exists = (torch.from_numpy(a) for a in articles.columns(index, offsets))
    cosines, mean = torch.empty(at.shape), torch.empty(len(index))
    for block in articles.blocks(unit[:, None], index):
        cosines[block.mine] = block.at(at[block.mine] + block.first)[:, 0]
        mean[block.mine] = block.mean()[:, 0]
    return cosines.masked_fill(~exists, math.nan), mean


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("direction, horizon", CUTS)
def test_cosines_are_in_reading_direction_and_stop_at_ends_and_gaps(direction, horizon, dtype):
    w, offsets = cut(direction, horizon, dtype), range(-9, 7)
    store, index, unit = w.store, np.arange(len(w)), random_units(0, len(w))
    row_of = {(a, p): r for r, (a, p) in enumerate(zip(store.article, store.position, strict=True))}
    found, mean = in_blocks(prepared(w), unit, index, offsets)
    missing = 0
    for i, (j, k) in itertools.product(index, enumerate(offsets)):
        article, position = store.article[w.target[i]], store.position[w.target[i]]
        between = [(article, position + s) for s in range(min(w.step * k, 0), max(w.step * k, 0) + 1)]
        if all(place in row_of for place in between):
            wanted = cos(unit[i], store.vectors[row_of[article, position + w.step * k]])
            assert float(found[i, j]) == pytest.approx(wanted, abs=1e-6)
        else:
            missing += 1
            assert found[i, j].isnan()
    assert missing > 20
    for i in index:
        outside = set(own_rows(w, i)) - set(w.context_rows([i])[0])
        assert w.target[i] in outside
        wanted = np.mean([cos(unit[i], store.vectors[r]) for r in outside])
        assert float(mean[i]) == pytest.approx(wanted, abs=1e-6)
    context, _ = w.batch(index)  # offset −horizon is the last context vector, and so on to the first
    at = in_blocks(prepared(w), unit, index, [-horizon - t for t in range(T)])[0].flip(1)
    torch.testing.assert_close(at, torch.einsum("bd,btd->bt", unit, context / context.norm(dim=-1, keepdim=True)))


# Ranks


def plain_rank(unit, w, i, rows):
    """The mean of the places that the target and its equals hold."""
    cosines = [cos(unit, w.store.vectors[r]) for r in rows]
    own = cos(unit, w.store.vectors[w.target[i]])
    assert all(abs(abs(c - own) - TIE) > 3e-7 for c in cosines)  # float32 can tell
    places = 1 + np.argsort(np.argsort([-c for c in cosines], kind="stable"), kind="stable")
    return np.mean([p for p, c in zip(places, cosines, strict=True) if abs(c - own) <= TIE])


@pytest.mark.parametrize("direction, horizon", CUTS)
def test_ranks_with_the_context_in_and_out(direction, horizon):
    w = cut(direction, horizon)
    units = random_units(2, 3, len(w))
    whole, novel, possible = prepared(w).ranks(units, np.arange(len(w)))
    assert whole.shape == novel.shape == (3, len(w)) and whole.dtype == novel.dtype == torch.float64
    for i, v in itertools.product(range(len(w)), range(3)):
        rows = own_rows(w, i)
        outside = [r for r in rows if r not in w.context_rows([i])[0]]
        assert float(whole[v, i]) == plain_rank(units[v, i], w, i, rows)
        assert float(novel[v, i]) == plain_rank(units[v, i], w, i, outside)
        targets = [r for r in outside if r in w.target]  # w holds all windows of its split
        assert float(possible[v, i]) == plain_rank(units[v, i], w, i, targets)
        assert prepared(w).possible_candidates[i] == len(targets) <= len(outside)
        assert prepared(w).candidates[i] == len(rows) and prepared(w).novel_candidates[i] == len(rows) - T


def test_equal_chunks_share_their_mean_rank():
    """Predicted exactly, a target and the chunk that equals it are both the nearest, unless the other is in the context
    and left out."""
    w = cut("forward", 1)
    for position, novel_rank in ((9, 1.0), (13, 1.5)):  # contexts 4 … 8, with the other in it, and 8 … 12
        (i,) = np.flatnonzero((w.store.article[w.target] == 3) & (w.store.position[w.target] == position))
        exact = torch.from_numpy(w.store.vectors[w.target[i]])[None, None]
        whole, novel, _ = prepared(w).ranks(exact, np.array([i]))
        assert (float(whole), float(novel)) == (1.5, novel_rank)


def test_nearly_equal_is_equal_and_a_little_more_is_not():
    for gap, wanted in ((2e-7, 1.5), (1e-4, 2.0), (-1e-4, 1.0)):
        cosines = [0.1, 0.1, 0.1, 0.1, 0.1, 0.5, 0.5 + gap]  # five of the context, the target, and one more
        x = np.zeros((7, 9))
        x[:, 0] = cosines
        x[np.arange(7), np.arange(1, 8)] = np.sqrt(1 - np.square(cosines))
        w = windows(store_of({0: ("val", np.arange(7), x)}), "val", 1, T)
        whole, novel, _ = prepared(w).ranks(torch.eye(9)[:1][None], np.array([0]))
        assert float(whole) == float(novel) == wanted


@pytest.mark.parametrize("size", [1, 3, 50])
def test_any_batch_in_any_order_gives_the_same(size):
    w = cut("backward", 2)
    units, articles = random_units(3, 2, len(w)), prepared(w)
    wanted = articles.ranks(units, np.arange(len(w)))
    order = np.random.default_rng(0).permutation(len(w))
    for index in (order[first : first + size] for first in range(0, len(w), size)):
        for a, b in zip(articles.ranks(units[:, index], index), wanted, strict=True):
            assert torch.equal(a, b[:, index])


@pytest.mark.parametrize("rows, numbers", [(1, 1), (15, 200), (10_000, 10**9)])
def test_however_articles_share_a_product_the_figures_are_the_same(monkeypatch, rows, numbers):
    w = cut("forward", 2)
    units, index = random_units(5, 3, len(w)), np.random.default_rng(1).permutation(len(w))

    def found():
        a = prepared(w)
        return [*a.ranks(units, index), *in_blocks(a, units[0], index, range(-9, 7))]

    wanted = found()
    monkeypatch.setattr(retrieval, "ROWS", rows)
    monkeypatch.setattr(retrieval, "NUMBERS", numbers)
    blocks = list(prepared(w).blocks(units.transpose(0, 1).contiguous(), index))
    assert sorted(torch.cat([b.mine for b in blocks]).tolist()) == list(range(len(w)))
    assert numbers > 1 or all(len(b.mine) == 1 for b in blocks)
    assert rows < 10_000 or len(blocks) == 1
    for one, two in zip(found(), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=3e-7, equal_nan=True)


@pytest.mark.parametrize("part", [1, 7])
@pytest.mark.parametrize("direction, horizon", CUTS)
def test_what_is_made_of_all_windows_part_by_part_is_the_same(monkeypatch, direction, horizon, part):
    w = cut(direction, horizon)
    whole = prepared(w)
    monkeypatch.setattr(retrieval, "PART", part)
    small = prepared(w)
    for name in ("candidates", "novel_candidates", "possible", "possible_candidates"):
        np.testing.assert_array_equal(getattr(small, name), getattr(whole, name))
    assert small.longest == whole.longest == whole.candidates.max()
    np.testing.assert_array_equal(small.possible, np.isin(np.arange(len(w.store.article)), all_targets(w)))


def all_targets(w):
    """The rows that are a target in any split: `possible` is told by an article alone."""
    cuts = [windows(w.store, s, w.horizon, T, {1: "forward", -1: "backward"}[w.step]) for s in ("train", "val", "ood")]
    return np.concatenate([c.target for c in cuts])


# Rivals and strangers


@pytest.mark.parametrize("direction, horizon", CUTS)
def test_rivals_are_the_article_without_the_context(direction, horizon):
    w = cut(direction, horizon)
    index = np.arange(len(w))[::-1]
    rows, there = prepared(w).rivals(index, 100, torch.rand(len(w), 40))
    for i, window in enumerate(index):
        context, target = set(w.context_rows([window])[0].tolist()), int(w.target[window])
        article = np.flatnonzero(w.store.article == w.store.article[target])
        assert rows[i, 0] == target and there[i, 0]
        assert sorted(rows[i][there[i]]) == sorted(set(article.tolist()) - context)


def test_rivals_beyond_the_most_are_drawn_evenly():
    w, draws = cut(), 4000
    index = np.zeros(draws, int)
    whole, _ = prepared(w).rivals(index[:1], 100, torch.rand(1, 40))
    rows, there = prepared(w).rivals(index, 3, torch.rand(draws, 40, generator=torch.Generator().manual_seed(0)))
    assert rows.shape == (draws, 3) and there.all() and (rows[:, 0] == w.target[0]).all()
    others, counts = np.unique(rows[:, 1:], return_counts=True)
    assert set(others) == set(whole[0, 1:]) and (rows[:, 1] != rows[:, 2]).all()
    expected = 2 * draws / len(others)
    assert stats.chisquare(counts, [expected] * len(others)).pvalue > 1e-4


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_strangers_are_chunks_of_the_split_and_those_of_the_own_article_do_not_count(direction):
    w = cut(direction)
    torch.manual_seed(0)
    rows, apart = prepared(w).strangers(np.arange(len(w))[::-1], 4000)
    pool = np.flatnonzero(w.store.articles.loc[w.store.article, "split"] == "val")
    values, counts = np.unique(rows, return_counts=True)
    assert list(values) == list(pool)
    assert stats.chisquare(counts, [4000 / len(pool)] * len(pool)).pvalue > 1e-4
    for i, window in enumerate(np.arange(len(w))[::-1]):
        np.testing.assert_array_equal(apart[i], w.store.article[rows] != w.article[window])
