"""Ranks among the chunks of the target's article, rivals and strangers, each against plain loops.

Cosines at offsets and their mean over an article are tested with all figures of 5CAT, in judge/test_measure.py.
"""

import functools
import itertools

import numpy as np
import pytest
import torch
from judge.plain import cos, store_of
from scipy import stats

from lvmlib import ranking
from lvmlib.ranking import TIE, Articles
from lvmlib.windows import windows

T = 5
DIM = 12


@functools.cache
def small_store():
    """Articles of several lengths with gaps, splits mixed; chunks 9 and 13 of article 3 are chunks 4 and 5 again."""
    random, articles = np.random.default_rng(6), {}
    layout = {
        9: ("val", range(12)),
        3: ("val", range(14)),
        4: ("train", range(20)),
        5: ("val", [*range(2, 11), *range(12, 22), 30]),
        6: ("ood", range(9)),
        7: ("val", [0, 1]),
    }
    for a, (split, position) in layout.items():
        x = random.standard_normal(DIM) + random.standard_normal((len(position), DIM))
        articles[a] = split, np.array(position), x
    x = articles[3][2]
    x[[9, 13]] = x[[4, 5]]
    return store_of(articles)


CUTS = [("forward", 1), ("forward", 2), ("backward", 1), ("backward", 2)]


@functools.cache
def cut(direction="forward", horizon=1):
    return windows(small_store(), "val", horizon, T, direction)


def prepared(w):
    return Articles(w, torch.from_numpy(w.store.vectors))


def random_units(seed, *shape):
    x = torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def own_rows(w, i):
    return np.flatnonzero(w.store.article == w.store.article[w.target[i]])


# Ranks


def plain_rank(unit, w, i, rows):
    """The mean of the places that the target and its equals hold."""
    unit, vectors = unit.double().numpy(), w.store.vectors.astype(float)
    cosines, own = [cos(unit, vectors[r]) for r in rows], cos(unit, vectors[w.target[i]])
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


def test_nearly_equal_is_equal_and_a_little_more_is_not():
    for gap, wanted in ((2e-7, 1.5), (1e-4, 2.0), (-1e-4, 1.0)):
        cosines = [0.1, 0.1, 0.1, 0.1, 0.1, 0.5, 0.5 + gap]  # five of the context, the target, and one more
        x = np.zeros((7, 9))
        x[:, 0] = cosines
        x[np.arange(7), np.arange(1, 8)] = np.sqrt(1 - np.square(cosines))
        w = windows(store_of({0: ("val", np.arange(7), x)}), "val", 1, T)
        whole, novel, _ = prepared(w).ranks(torch.eye(9)[:1][None], np.array([0]))
        assert float(whole) == float(novel) == wanted


@pytest.mark.parametrize("rows, numbers, size", [(1, 1, 50), (15, 200, 50), (10_000, 10**9, 50), (256, 10**6, 3)])
def test_however_windows_and_articles_share_a_product_the_ranks_are_the_same(monkeypatch, rows, numbers, size):
    w = cut("backward", 2)
    units, order = random_units(5, 3, len(w)), np.random.default_rng(1).permutation(len(w))
    wanted = prepared(w).ranks(units, np.arange(len(w)))
    monkeypatch.setattr(ranking, "ROWS", rows)
    monkeypatch.setattr(ranking, "NUMBERS", numbers)
    blocks = list(prepared(w).blocks(units.transpose(0, 1)[order].contiguous(), order))
    assert sorted(torch.cat([b.mine for b in blocks]).tolist()) == list(range(len(w)))
    assert numbers > 1 or all(len(b.mine) == 1 for b in blocks)
    assert rows < 10_000 or len(blocks) == 1
    for index in (order[first : first + size] for first in range(0, len(w), size)):
        for found, all_ranks in zip(prepared(w).ranks(units[:, index], index), wanted, strict=True):
            assert torch.equal(found, all_ranks[:, index])


@pytest.mark.parametrize("part", [1, 7])
@pytest.mark.parametrize("direction, horizon", CUTS)
def test_what_is_made_of_all_windows_part_by_part_is_the_same(monkeypatch, direction, horizon, part):
    w = cut(direction, horizon)
    names = ("candidates", "novel_candidates", "possible", "possible_candidates", "longest")
    at_once = [getattr(prepared(w), name) for name in names]
    monkeypatch.setattr(ranking, "PART", part)
    for name, expected in zip(names, at_once, strict=True):
        np.testing.assert_array_equal(getattr(prepared(w), name), expected)
    # A row is a target of some window of any split; `possible` depends on the article alone.
    targets = [windows(w.store, split, horizon, T, direction).target for split in ("train", "val", "ood")]
    assert np.flatnonzero(at_once[2]).tolist() == sorted(np.concatenate(targets))
    assert at_once[-1] == max(at_once[0])


# Rivals and strangers


@pytest.mark.parametrize("direction, horizon", CUTS)
def test_rivals_are_the_article_without_the_context(direction, horizon):
    w = cut(direction, horizon)
    index = np.arange(len(w))[::-1]
    rows, exist = prepared(w).rivals(index, 100, torch.rand(len(w), 40))
    for i, window in enumerate(index):
        context, target = set(w.context_rows([window])[0].tolist()), int(w.target[window])
        article = np.flatnonzero(w.store.article == w.store.article[target])
        assert rows[i, 0] == target and exist[i, 0]
        assert sorted(rows[i][exist[i]]) == sorted(set(article.tolist()) - context)


def test_rivals_beyond_the_most_are_drawn_evenly():
    w, draws = cut(), 4000
    index = np.zeros(draws, int)
    every, _ = prepared(w).rivals(index[:1], 100, torch.rand(1, 40))
    rows, exist = prepared(w).rivals(index, 3, torch.rand(draws, 40, generator=torch.Generator().manual_seed(0)))
    assert rows.shape == (draws, 3) and exist.all() and (rows[:, 0] == w.target[0]).all()
    others, counts = np.unique(rows[:, 1:], return_counts=True)
    assert set(others) == set(every[0, 1:]) and (rows[:, 1] != rows[:, 2]).all()
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_strangers_are_chunks_of_the_split_and_those_of_the_own_article_do_not_count(direction):
    w = cut(direction)
    torch.manual_seed(0)
    rows, apart = prepared(w).strangers(np.arange(len(w))[::-1], 4000)
    pool = np.flatnonzero(w.store.articles.loc[w.store.article, "split"] == "val")
    values, counts = np.unique(rows, return_counts=True)
    assert list(values) == list(pool)
    assert stats.chisquare(counts).pvalue > 1e-4
    np.testing.assert_array_equal(apart, w.store.article[rows] != w.article[::-1, None])
