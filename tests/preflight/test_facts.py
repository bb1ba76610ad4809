"""Facts of a dataset, and the power to see differences, against plain derivations and simulation.

Axes: M chunks, A articles, N windows, D vector dimension.
"""

import functools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lvmlib import windows as cutting
from lvmlib.baselines import baselines, untrained
from lvmlib.data import worlds
from lvmlib.data.open import dataset
from lvmlib.data.store import make_store
from lvmlib.errors import LVMError
from lvmlib.judge.fivecat import fivecat
from lvmlib.preflight import facts as preflight
from lvmlib.preflight.power import articles_needed, smallest_difference
from lvmlib.statistics import over_articles
from lvmlib.windows import SPLITS, Dataset, GivenWindows, windows

D, LENGTHS = 12, (9, 25, 7, 30, 14, 3, 22, 17, 19, 28)
SPLIT = ("train", "val", "train", "train", "ood", "train", "val", "ood", "train", "")


def table(splits, index=None):
    index = pd.Index(range(len(splits)) if index is None else index, name="article")
    return pd.DataFrame({"title": [f"T{i}" for i in range(len(splits))], "split": splits}, index=index)


@functools.cache
def uneven():
    """Ten unequal articles with topics, in three splits and one in none; the fourth has a gap, numbers do not rise."""
    random = np.random.default_rng(0)
    number = random.permutation(50)[: len(LENGTHS)]
    x = np.concatenate([random.standard_normal(D) + 0.8 * random.standard_normal((n, D)) for n in LENGTHS])
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    position = np.concatenate([np.arange(n) for n in LENGTHS])
    position += 2 * ((np.repeat(number, LENGTHS) == number[3]) & (position >= 12))
    return make_store("uneven", x, np.repeat(number, LENGTHS), position, table(SPLIT, number))


@pytest.fixture(params=[5 * D, 1 << 23])
def blocks(request, monkeypatch):
    """A store is read in blocks; nothing may depend on where they end."""
    monkeypatch.setattr(cutting, "BLOCK_VALUES", request.param)


def by_article(store):
    for number in dict.fromkeys(store.article.tolist()):
        at = np.flatnonzero(store.article == number)
        yield number, store.vectors[at].astype(float), store.position[at]


# Articles


def test_sums_and_strangers():
    store = uneven()
    np.testing.assert_allclose(preflight.sums(store), [x.sum(0) for _, x, _ in by_article(store)], atol=1e-5)
    cosine = store.vectors.astype(float) @ store.vectors.astype(float).T
    other = store.article[:, None] != store.article
    assert preflight.strangers(store) == pytest.approx(cosine[other].mean(), abs=1e-6)
    one = make_store("one", np.eye(4, dtype=np.float32), [0] * 4, range(4), table(["train"]))
    assert np.isnan(preflight.strangers(one))


def test_a_draw_keeps_whole_articles_and_their_windows():
    data, most = dataset(worlds.rotation(articles=60, length=20, dim=8)), {"train": 200, "val": 10_000, "ood": 45}
    part, again, other = (preflight.drawn(data, most, seed=seed, fewest=2) for seed in (0, 0, 1))
    assert set(pd.Series(part.store.article).value_counts()) == {20}
    assert part.store.articles["split"].value_counts().to_dict() == {"train": 10, "val": 12, "ood": 2}
    for split in SPLITS:
        start = getattr(part, split).start
        np.testing.assert_array_equal(start, windows(part.store, split).start)
        for row in start[[0, -1]]:  # the same vectors as in the whole
            same = data.store.article == part.store.article[row]
            same &= data.store.position == part.store.position[row]
            np.testing.assert_array_equal(part.store.vectors[row], data.store.vectors[same][0])
    assert preflight.drawn(data, dict.fromkeys(SPLITS, 10_000)) is data
    assert again.store.fingerprint == part.store.fingerprint != other.store.fingerprint


def test_a_draw_cuts_long_articles_rather_than_take_few():
    data = dataset(worlds.exchangeable(articles=30, length=200, dim=4))
    part = preflight.drawn(data, dict.fromkeys(SPLITS, 300), fewest=5)
    assert set(pd.Series(part.store.article).value_counts()) == {60}
    assert part.store.articles["split"].value_counts().to_dict() == dict.fromkeys(SPLITS, 5)
    position = part.store.position.reshape(-1, 60)
    assert (np.diff(position) == 1).all() and len(set(position[:, 0])) > 5  # stretches, not beginnings


def test_a_draw_keeps_the_windows_that_a_store_came_with():
    store = worlds.rotation(articles=40, length=20, dim=8)
    cut = dataset(store)
    given = [w.start[: len(w) // 3 * 3 : 3] for w in (cut.train, cut.val, cut.ood)]
    split = np.repeat(range(3), [len(start) for start in given])
    data = dataset(replace(store, given=GivenWindows(split, np.concatenate(given), 2, 5)))
    part = preflight.drawn(data, {"train": 100, "val": 60, "ood": 60}, fewest=1)
    inside = np.isin(data.val.article, part.val.article)
    for field in ("article", "position"):
        ours, theirs = getattr(part.store, field)[part.val.start], getattr(store, field)[data.val.start[inside]]
        np.testing.assert_array_equal(ours, theirs)
    assert len(part.val) == inside.sum() < len(data.val)
    assert len(dataset(part.store, direction="backward").val) > len(part.val)  # those are cut from the store


def test_unused_counts_the_chunks_that_no_window_touches():
    store = uneven()
    data = Dataset(store, *(windows(store, s) for s in SPLITS))
    touched = {row for s in SPLITS for start in getattr(data, s).start for row in range(start, start + 7)}
    inside = np.isin(store.article, store.articles.index[store.articles["split"] != ""])
    plain = np.mean([row not in touched for row in np.flatnonzero(inside)])
    assert preflight.unused(data) == pytest.approx(plain) and plain > 0


# Vectors


def test_vector_facts(blocks):
    x = np.random.default_rng(0).standard_normal((20, D)).astype(np.float32)
    x[:, 2] = 0
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[[4, 9, 17]] = x[1]
    store = make_store("some", x, [0] * 20, range(20), table(["train"]))
    facts = preflight.vector_facts(store)
    assert facts["equal"] == 3 and facts["still"] == 1 and facts["chunks"] == 20
    assert 0.999 < facts["least norm"] <= facts["greatest norm"] < 1.001
    x[19] *= 2
    facts = preflight.vector_facts(replace(store, vectors=x))
    assert facts["greatest norm"] == pytest.approx(2, abs=1e-3)


def test_lag_cosines_and_delta_from_their_definitions(blocks):
    store = uneven()
    product = preflight.products(store, 4)
    found = preflight.lag_cosines(store, product)
    for number, x, position in by_article(store):
        cosine, distance = x @ x.T, np.abs(position[:, None] - position)
        for lag, pairs in {**{k: distance == k for k in range(1, 5)}, "far": distance > 4}.items():
            wanted = cosine[pairs].mean() if pairs.any() else np.nan
            assert found.loc[number, lag] == pytest.approx(wanted, abs=1e-5, nan_ok=True)
        for h in (1, 2, 4):
            forwards, backwards, articles = preflight.delta(store, product, h)
            plain = [
                (cosine[i, i + h] - cosine[i, i - 1], cosine[i, i - h] - cosine[i, i + 1])
                for i in range(h, len(x) - h)
                if position[i + h] - position[i - h] == 2 * h
            ]
            ours = np.stack([forwards, backwards], 1)[articles == number]
            np.testing.assert_allclose(ours, np.array(plain).reshape(-1, 2), atol=1e-6)


def test_nearest_training_article():
    store = uneven()
    centre = {n: x.mean(0) / np.linalg.norm(x.mean(0)) for n, x, _ in by_article(store)}
    train = [n for n in centre if store.articles["split"][n] == "train"]
    found = preflight.nearest_training(store)
    for number, own in centre.items():
        wanted = max(own @ centre[n] for n in train if n != number)
        assert found.loc[number, "cosine"] == pytest.approx(wanted, abs=1e-5)
    lone = make_store("lone", np.eye(3, dtype=np.float32), [0, 1, 2], [0] * 3, table(["train", "val", "ood"]))
    assert np.isnan(preflight.nearest_training(lone).loc[0, "cosine"])
    assert len(preflight.nearest_training(store, most=4)) == 4


# Trivial predictors


def test_the_trivial_report_is_fivecat_s():
    data = dataset(worlds.rotation(articles=20, length=24, dim=8))
    data = replace(data, val=data.val.at_most(30), ood=data.ood.at_most(30))
    trivial = baselines(data.train)
    report, scored = preflight.trivial_report(data, trivial), preflight.scores(data, trivial)
    assert report.predictors == list(trivial) and report.splits == ["val", "ood"]
    plain = fivecat(trivial["ridge"], data, {"constant": trivial["constant"]})
    for measure in ("novel MRR", "1 of 100", "mean rollout", "effective rank"):
        assert report.value(measure, "val", "ridge") == plain.value(measure, "val")
        assert report.value(measure, "ood", "constant") == plain.value(measure, "ood", "constant")
    for name in trivial:
        mean = scored["val", name][["novel MRR", "chance"]].mean()
        row = report.row("novel MRR", "val", name)
        assert mean.tolist() == pytest.approx([row["value"], row["chance"]])
    best = preflight.best_trivial(scored, "val")
    assert scored["val", best]["novel MRR"].mean() == max(scored["val", n]["novel MRR"].mean() for n in trivial)


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_peeking_from_its_definition(horizon):
    store = uneven()
    own, x = windows(store, "val", horizon), store.vectors.astype(float)
    plain = []
    for t, start in zip(own.target, own.start, strict=True):
        at = np.flatnonzero(store.article == store.article[t])
        if t + 1 not in at or t - 1 not in at:
            continue
        candidates = [r for r in at if r not in {*range(start, start + 5), t - 1, t + 1}]
        row = [store.article[t], np.mean(1 / np.arange(1, len(candidates) + 1))]
        for p in (x[t - 1] + x[t + 1], x[start + 4], x[start : start + 5].sum(0)):
            cosine = x[candidates] @ p / np.linalg.norm(p)
            row.append(1 / (1 + (cosine > cosine[candidates.index(t)] + 1e-6).sum()))
        plain.append(row)
    found = preflight.peeked(own, untrained(D, 5))
    np.testing.assert_allclose(found[["article", "chance", "both sides", "copy last", "mean"]], plain, atol=1e-9)


def test_peeking_needs_targets_with_two_neighbours():
    store = make_store("ends", np.eye(7, dtype=np.float32), [0] * 7, range(7), table(["val"]))
    with pytest.raises(LVMError, match="ends, split val"):
        preflight.peeked(windows(store, "val"), untrained(7, 5))


# Power

SIZES = np.array([48, 112, 32, 45, 126, 1, 45, 37, 4, 36, 10, 21, 7])  # windows of the embedded validation articles
ARTICLE = np.repeat(np.arange(len(SIZES)), SIZES)


def differences(random, size=0.0):
    return size + 0.05 * random.standard_normal(len(SIZES))[ARTICLE] + 0.3 * random.standard_normal(len(ARTICLE))


@pytest.mark.parametrize("power", [0.8, 0.95])
def test_the_smallest_difference_is_found_with_the_stated_probability(power):
    """The size is stated from one sample of unequal articles, and tested on the next one."""
    random, found, half = np.random.default_rng(0), [], []
    for _ in range(600):
        size = smallest_difference(differences(random), ARTICLE, power)
        found.append(over_articles(differences(random, size), ARTICLE)[1] > 0)
        half.append(over_articles(differences(random, size / 2), ARTICLE)[1] > 0)
    assert abs(np.mean(found) - power) < 0.06  # the error of 600 is 0.016; 13 unequal articles are not quite a t
    assert np.mean(half) < power - 0.25


@pytest.mark.parametrize(("power", "quantile"), [(0.8, 0.842), (0.95, 1.645)])
def test_the_smallest_difference_is_that_of_a_known_spread_where_there_are_many_articles(power, quantile):
    """With thousands of articles: (1.96 + z) standard errors."""
    values = np.random.default_rng(1).standard_normal(8000)
    error = values.reshape(-1, 2).mean(1).std() / np.sqrt(4000)
    found = smallest_difference(values, np.repeat(np.arange(4000), 2), power)
    assert found == pytest.approx((1.960 + quantile) * error, rel=0.01)


def test_more_articles_show_less_and_the_number_needed_does_it():
    values = differences(np.random.default_rng(2))
    sizes = [smallest_difference(values, ARTICLE, articles=n) for n in (5, 13, 50, 200, 5000)]
    assert sizes == sorted(sizes, reverse=True) and sizes[1] == smallest_difference(values, ARTICLE)
    assert sizes[3] / sizes[4] == pytest.approx(5, rel=0.05)  # the square root of 25
    for wanted in (0.05, 0.01):
        needed = articles_needed(values, ARTICLE, wanted)
        at, below = (smallest_difference(values, ARTICLE, articles=needed - i) for i in (0, 1))
        assert at <= wanted < below
    assert smallest_difference(values + 3, ARTICLE) == pytest.approx(sizes[1])  # whatever the mean


def test_power_where_there_is_nothing_to_go_by():
    one, equal, values = np.zeros(9, int), np.ones(len(ARTICLE)), differences(np.random.default_rng(0))
    assert np.isnan(smallest_difference(np.arange(9.0), one)) and np.isnan(articles_needed(np.arange(9.0), one, 0.01))
    assert smallest_difference(equal, ARTICLE) == 0 and articles_needed(equal, ARTICLE, 0.01) == 2
    assert np.isnan(smallest_difference(values, ARTICLE, articles=1))
    assert articles_needed(1e6 * values, ARTICLE, 1e-6) == np.inf
