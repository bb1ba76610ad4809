"""The pre-flight against plain derivations, simulation, and worlds whose answer is known.

Axes: M chunks, A articles, N windows, D vector dimension.
"""

import contextlib
import functools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lvmlib.baselines import baselines, fit_ridge, fit_weights, untrained
from lvmlib.data import worlds
from lvmlib.data.open import dataset
from lvmlib.data.store import make_store
from lvmlib.errors import LVMError
from lvmlib.judge.arrow import arrow
from lvmlib.judge.fivecat import fivecat, score
from lvmlib.preflight import advice, leaks
from lvmlib.preflight import facts as preflight
from lvmlib.preflight.advice import Found
from lvmlib.preflight.leaks import Leak
from lvmlib.preflight.probe import crossed_order_probe
from lvmlib.statistics import articles_needed, over_articles, smallest_difference
from lvmlib.windows import Dataset, GivenWindows, windows

D, LENGTHS = 12, (9, 25, 7, 30, 14, 3, 22, 17, 19, 28)
SPLIT = ("train", "val", "train", "train", "ood", "train", "val", "ood", "train", "")


@functools.cache
def uneven(seed=0):
    """Ten unequal articles with topics, in three splits and one in none; the fourth has a gap, numbers do not rise."""
    random = np.random.default_rng(seed)
    number = random.permutation(50)[: len(LENGTHS)]
    x, position = [], []
    for a, n in enumerate(LENGTHS):
        x.append(random.standard_normal(D) + 0.8 * random.standard_normal((n, D)))
        position.append(np.arange(n) + (np.arange(n) >= 12) * (2 if a == 3 else 0))
    x = np.concatenate(x)
    articles = pd.DataFrame(
        {"title": [f"T{a}" for a in range(len(LENGTHS))], "split": SPLIT}, index=pd.Index(number, name="article")
    )
    return make_store(
        "uneven", (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32),
        np.repeat(number, LENGTHS), np.concatenate(position), articles,
    )  # fmt: skip


@pytest.fixture(params=[5, 8192])
def rows_at_a_time(request, monkeypatch):
    """A store is read in blocks; nothing may depend on where they end."""
    monkeypatch.setattr(preflight, "ROWS", request.param)


def by_article(store):
    for number in dict.fromkeys(store.article.tolist()):
        at = np.flatnonzero(store.article == number)
        yield number, store.vectors[at].astype(float), store.position[at], at


# Articles


def test_sums_and_strangers(rows_at_a_time):
    store = uneven()
    plain = [x.sum(0) for _, x, _, _ in by_article(store)]
    np.testing.assert_allclose(preflight.sums(store), plain, atol=1e-5)
    cosine = store.vectors.astype(float) @ store.vectors.astype(float).T
    other = store.article[:, None] != store.article
    assert preflight.strangers(store) == pytest.approx(cosine[other].mean(), abs=1e-6)


def test_one_article_has_no_strangers():
    store = make_store("one", np.eye(4, dtype=np.float32), [0] * 4, range(4), table(["train"]))
    assert np.isnan(preflight.strangers(store))


def table(splits, titles=None):
    return pd.DataFrame(
        {"title": titles or [""] * len(splits), "split": splits}, index=pd.RangeIndex(len(splits), name="article")
    )


def test_a_draw_keeps_whole_articles_and_their_windows():
    data = dataset(worlds.rotation(articles=60, length=20, dim=8))
    part = preflight.drawn(data, {"train": 200, "val": 10_000, "ood": 45}, fewest=2)
    size = pd.Series(part.store.article).value_counts()
    assert set(size) == {20}
    counts = part.store.articles["split"].value_counts()
    assert counts.to_dict() == {"train": 10, "val": 12, "ood": 2}
    for split in ("train", "val", "ood"):
        own = getattr(part, split)
        np.testing.assert_array_equal(own.start, windows(part.store, split).start)
        for t in (0, len(own) - 1):  # the same vectors as in the whole
            row = np.flatnonzero(
                (data.store.article == part.store.article[own.start[t]])
                & (data.store.position == part.store.position[own.start[t]])
            )[0]
            np.testing.assert_array_equal(part.store.vectors[own.start[t]], data.store.vectors[row])
    assert preflight.drawn(data, dict.fromkeys(("train", "val", "ood"), 10_000)) is data
    again = preflight.drawn(data, {"train": 200, "val": 10_000, "ood": 45}, fewest=2)
    other = preflight.drawn(data, {"train": 200, "val": 10_000, "ood": 45}, seed=1, fewest=2)
    assert again.store.fingerprint == part.store.fingerprint != other.store.fingerprint


def test_a_draw_cuts_long_articles_rather_than_take_few():
    data = dataset(worlds.exchangeable(articles=30, length=200, dim=4))
    part = preflight.drawn(data, {"train": 300, "val": 300, "ood": 300}, fewest=5)
    size = pd.Series(part.store.article).value_counts()
    assert set(size) == {60} and part.store.articles["split"].value_counts().to_dict() == dict.fromkeys(
        ("train", "val", "ood"), 5
    )
    position = part.store.position.reshape(-1, 60)
    assert (np.diff(position) == 1).all() and len(set(position[:, 0])) > 5  # stretches, not beginnings


def test_a_draw_keeps_the_windows_that_a_store_came_with():
    store = worlds.rotation(articles=40, length=20, dim=8)
    cut = dataset(store)
    split = np.concatenate([np.full(len(w) // 3, i) for i, w in enumerate((cut.train, cut.val, cut.ood))])
    start = np.concatenate([w.start[: len(w) // 3 * 3 : 3] for w in (cut.train, cut.val, cut.ood)])
    data = dataset(replace(store, given=GivenWindows(split, start, 2, 5)))
    part = preflight.drawn(data, {"train": 100, "val": 60, "ood": 60}, fewest=1)
    kept = np.isin(data.val.article, part.val.article)
    for field in ("article", "position"):
        ours, theirs = getattr(part.store, field)[part.val.start], getattr(store, field)[data.val.start[kept]]
        np.testing.assert_array_equal(ours, theirs)
    assert len(part.val) == kept.sum() < len(data.val)
    backward = dataset(part.store, direction="backward")  # those are cut from the store
    assert len(backward.val) > len(part.val)


def test_unused_counts_the_chunks_that_no_window_touches():
    store = uneven()
    data = Dataset(store, *(windows(store, s) for s in ("train", "val", "ood")))
    touched = set()
    for w in (data.train, data.val, data.ood):
        for s in w.start:
            touched |= set(range(s, s + 7))
    inside = np.isin(store.article, store.articles.index[store.articles["split"] != ""])
    plain = np.mean([row not in touched for row in np.flatnonzero(inside)])
    assert preflight.unused(data) == pytest.approx(plain) and plain > 0


# Vectors


def test_vector_facts(rows_at_a_time):
    x = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
    x[:, 2] = 0
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[[4, 9, 17]] = x[1]
    facts = preflight.vector_facts(make_store("some", x, [0] * 20, range(20), table(["train"])))
    assert facts["equal"] == 3 and facts["still"] == 1 and facts["chunks"] == 20
    assert facts["not finite"] == facts["zero"] == facts["not unit"] == 0
    assert 0.999 < facts["least norm"] <= facts["greatest norm"] < 1.001


def test_vector_facts_of_what_no_store_lets_in(rows_at_a_time):
    store = uneven()
    x = np.array(store.vectors)
    x[3], x[11, 0], x[20] = 0, np.nan, 2 * x[20]
    facts = preflight.vector_facts(replace(store, vectors=x))
    assert (facts["zero"], facts["not finite"], facts["not unit"]) == (1, 1, 2)  # zero is not of unit length either
    assert facts["greatest norm"] == pytest.approx(2, abs=1e-3)


def test_lag_cosines_and_delta_from_their_definitions(rows_at_a_time):
    store = uneven()
    product = preflight.products(store, 4)
    found = preflight.lag_cosines(store, product)
    for number, x, position, at in by_article(store):
        cosine, distance = x @ x.T, np.abs(position[:, None] - position)
        for lag in range(1, 5):
            assert found.loc[number, lag] == pytest.approx(
                cosine[distance == lag].mean() if (distance == lag).any() else np.nan, abs=1e-6, nan_ok=True
            )
        far = cosine[distance > 4]
        assert found.loc[number, "far"] == pytest.approx(far.mean() if len(far) else np.nan, abs=1e-5, nan_ok=True)
        for h in (1, 2, 4):
            forwards, backwards, articles = preflight.delta(store, product, h)
            plain = [
                (cosine[i, i + h] - cosine[i, i - 1], cosine[i, i - h] - cosine[i, i + 1])
                for i in range(h, len(at) - h)
                if position[i + h] - position[i - h] == 2 * h
            ]
            ours = np.stack([forwards, backwards], 1)[articles == number]
            np.testing.assert_allclose(ours, np.array(plain).reshape(-1, 2), atol=1e-6)


def test_nearest_training_article():
    store = uneven()
    centre = {n: x.mean(0) / np.linalg.norm(x.mean(0)) for n, x, _, _ in by_article(store)}
    split = store.articles["split"]
    found = preflight.nearest_training(store)
    for number, own in centre.items():
        others = [centre[n] for n in centre if split[n] == "train" and n != number]
        assert found.loc[number, "cosine"] == pytest.approx(max(own @ o for o in others), abs=1e-5)
    lone = make_store("lone", np.eye(3, dtype=np.float32), [0, 1, 2], [0] * 3, table(["train", "val", "ood"]))
    assert np.isnan(preflight.nearest_training(lone).loc[0, "cosine"])
    assert len(preflight.nearest_training(store, most=4)) == 4


# Leaks


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


def test_leaks_are_those_of_all_pairs(rows_at_a_time):
    store = planted()
    found = {(leak.split, leak.other): leak for leak in leaks.leaks(store, sampled=7)}
    assert set(found) == {("val", "train"), ("ood", "train"), ("ood", "val")}
    for (split, other), leak in found.items():
        own, others = store.rows(split), store.rows(other)
        cosine = store.vectors[own].astype(float) @ store.vectors[others].astype(float).T
        best = cosine.max(1)
        np.testing.assert_array_equal(leak.rows, own)
        np.testing.assert_array_equal(leak.match >= 0, best >= leaks.NEAR)
        near = best >= leaks.NEAR
        np.testing.assert_array_equal(leak.match[near], others[cosine.argmax(1)[near]])
        np.testing.assert_allclose(leak.cosine[near], best[near], atol=1e-5)
        assert len(leak.nearest) == 7 and np.abs(leak.nearest[:, None] - best).min(1).max() < 1e-5
    leak, val, train = found["val", "train"], store.rows("val"), store.rows("train")
    assert (leak.same, leak.near) == (1, 2) and leak.share == 2 / len(val)
    assert [pair[:2] for pair in leak.worst(store)] == [(val[0], train[0]), (val[16], train[16])]


def test_leaks_of_float16_vectors_and_of_whole_articles():
    store = planted(copies=(1.0,) * 15)
    x = np.array(store.vectors)
    x[store.article == 3] = x[store.article == 1]  # article 3 is val, 1 is train
    leak = leaks.leaks(make_store("copied", x.astype(np.float16), store.article, store.position, store.articles))[0]
    assert (leak.split, leak.other) == ("val", "train") and leak.same >= 15
    assert leak.articles(store) == 1


def test_leaks_look_at_a_sample_where_pairs_are_too_many():
    store = planted()
    leak = leaks.leaks(store, compared=3 * 10 * len(store.rows("train")))[0]
    assert (
        len(leak.rows) == 10 and leak.chunks == len(store.rows("val")) and np.isin(leak.rows, store.rows("val")).all()
    )


def test_leaks_where_all_vectors_are_one_and_where_a_split_is_empty():
    """The filter lets all pass; memory holds a block, and the answer is right."""
    x = np.tile(np.eye(1, 6, dtype=np.float32), (40, 1))
    article = np.repeat(np.arange(4), 10)
    store = make_store("one vector", x, article, np.tile(np.arange(10), 4), table(["train", "train", "val", ""]))
    (leak,) = leaks.leaks(store)
    assert leak.share == 1 and leak.same == 10


def test_copied_targets():
    store = worlds.exchangeable(articles=10, length=12, dim=32)
    x = np.array(store.vectors)
    own = windows(store, "val")
    x[own.target[2]] = x[own.start[2] + 1]  # within the context
    x[own.target[0]] = x[own.start[0] + 5]  # the skipped chunk is not
    changed = make_store("changed", x, store.article, store.position, store.articles)
    assert np.flatnonzero(leaks.copied(windows(changed, "val"))).tolist() == [2]


def test_titles_that_are_all_but_equal():
    titles = ["The Who", "the  who!", "Other", "other", "", ""]
    store = make_store("t", np.eye(6, dtype=np.float32), range(6), [0] * 6,
                       table(["train", "val", "train", "train", "val", "ood"], titles))  # fmt: skip
    assert leaks.shared_titles(store) == [["The Who (train)", "the  who! (val)"]]


# Trivial predictors


def test_the_trivial_report_is_fivecat_s():
    data = dataset(worlds.rotation(articles=20, length=24, dim=8))
    data = replace(data, val=data.val.at_most(30), ood=data.ood.at_most(30))
    trivial = baselines(data.train)
    report = preflight.trivial_report(data, trivial)
    assert report.predictors == list(trivial) and report.splits == ["val", "ood"]
    plain = fivecat(trivial["ridge"], data, {"constant": trivial["constant"]})
    for measure in ("novel MRR", "1 of 100", "mean rollout", "effective rank"):
        assert report.value(measure, "val", "ridge") == plain.value(measure, "val")
        assert report.value(measure, "ood", "constant") == plain.value(measure, "ood", "constant")
    scored = preflight.scores(data, trivial)
    for name in trivial:
        frame = scored["val", name]
        assert frame["novel MRR"].mean() == pytest.approx(report.value("novel MRR", "val", name))
        assert frame["chance"].mean() == pytest.approx(report.row("novel MRR", "val", name)["chance"])
    best = preflight.best_trivial(scored, "val")
    assert scored["val", best]["novel MRR"].mean() == max(scored["val", n]["novel MRR"].mean() for n in trivial)


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_peeking_from_its_definition(horizon):
    store = uneven()
    own = windows(store, "val", horizon)
    found = preflight.peeked(own, untrained(D, 5))
    plain = []
    for w in range(len(own)):
        t, start = own.target[w], own.start[w]
        at = np.flatnonzero(store.article == store.article[t])
        if t + 1 not in at or t - 1 not in at:
            continue
        x = store.vectors.astype(float)
        candidates = [r for r in at if r not in {*range(start, start + 5), t - 1, t + 1}]
        row = []
        for p in (x[t - 1] + x[t + 1], x[start + 4], x[start : start + 5].sum(0)):
            cosine = x[candidates] @ p / np.linalg.norm(p)
            row.append(1 / (1 + (cosine > cosine[candidates.index(t)] + 1e-6).sum()))
        plain.append([store.article[t], np.mean(1 / np.arange(1, len(candidates) + 1)), *row])
    np.testing.assert_allclose(found[["article", "chance", "both sides", "copy last", "mean"]], plain, atol=1e-9)


def test_peeking_knows_no_gap_and_says_where_nothing_is_left():
    store = make_store("ends", np.eye(7, dtype=np.float32), [0] * 7, range(7), table(["val"]))
    with pytest.raises(LVMError, match="no target has a chunk on either side"):
        preflight.peeked(windows(store, "val"), untrained(7, 5))


# Forwards and backwards


def both_ways(store, horizon=2):
    return dataset(store, horizon), dataset(store, horizon, direction="backward")


def test_folds_are_fitted_as_the_models_are_without_the_articles_that_are_judged():
    whole = preflight.joined(both_ways(worlds.rotation(articles=20, length=14, dim=8))[1])
    used = np.unique(whole.article)
    fits = preflight._fold_fits(whole, used, 4)
    for fold in (0, 3):
        kept = replace(whole, start=whole.start[~np.isin(whole.article, used[fold::4])])
        torch.testing.assert_close(fits[fold]["weighted mean"].weights, fit_weights(kept), atol=1e-4, rtol=0)
        ridges = [fit_ridge(kept, (s,))[0] for s in preflight.STRENGTHS]
        assert min(float((fits[fold]["ridge"].weights - r).abs().max()) for r in ridges) < 1e-4


def test_crossed_arrows_are_the_arrow_of_each_fold():
    forward, backward = both_ways(worlds.announcing(articles=20, length=16, dim=8))
    found = preflight.crossed_arrows(forward, backward, folds=2)["ridge"]
    whole = [preflight.joined(d) for d in (forward, backward)]
    used = np.unique(found.article)
    fits = [preflight._fold_fits(w, used, 2) for w in whole]
    rows = []
    for fold in (0, 1):
        tests = [replace(w, start=w.start[np.isin(w.article, used[fold::2])]) for w in whole]
        one = arrow([fits[0][fold]["ridge"]], [fits[1][fold]["ridge"]], tuple(tests))
        rows.append((one.differences["novel MRR"][0], one.article))
    values, article = (np.concatenate(r) for r in zip(*rows, strict=True))
    np.testing.assert_array_equal(found.article, article)
    np.testing.assert_allclose(found.differences["novel MRR"][0], values, atol=1e-12)
    row = found.table.set_index("measure").loc["novel MRR"]
    np.testing.assert_allclose(row[["difference", "low", "high"]].astype(float), over_articles(values, article))
    assert sorted(np.unique(article)) == sorted(np.unique(whole[0].article))  # every article once


def test_crossed_arrows_need_articles():
    with pytest.raises(LVMError, match="take more or longer articles"):
        preflight.crossed_arrows(*both_ways(worlds.rotation(articles=5, length=20, dim=4)), folds=5)


# Power

SIZES = np.array([48, 112, 32, 45, 126, 1, 45, 37, 4, 36, 10, 21, 7])  # windows of the embedded validation articles
ARTICLE = np.repeat(np.arange(len(SIZES)), SIZES)


def differences(random, size=0.0):
    return size + 0.05 * random.standard_normal(len(SIZES))[ARTICLE] + 0.3 * random.standard_normal(len(ARTICLE))


@pytest.mark.parametrize("power", [0.8, 0.95])
def test_a_difference_of_the_size_stated_is_seen_as_often_as_said(power):
    """The size is stated from one sample of unequal articles, and looked for in the next one."""
    random = np.random.default_rng(0)
    seen, missed_half = [], []
    for _ in range(1200):
        size = smallest_difference(differences(random), ARTICLE, power)
        seen.append(over_articles(differences(random, size), ARTICLE)[1] > 0)
        missed_half.append(over_articles(differences(random, size / 2), ARTICLE)[1] > 0)
    assert abs(np.mean(seen) - power) < 0.05  # the error of 1,200 is 0.012; 13 unequal articles are not quite a t
    assert np.mean(missed_half) < power - 0.25


def test_the_smallest_difference_is_that_of_a_known_spread_where_there_are_many_articles():
    """With thousands of articles: (1.96 + z) standard errors."""
    article = np.repeat(np.arange(4000), 2)
    values = np.random.default_rng(1).standard_normal(len(article))
    error = values.reshape(-1, 2).mean(1).std() / np.sqrt(4000)
    assert smallest_difference(values, article, 0.8) == pytest.approx((1.960 + 0.842) * error, rel=0.01)
    assert smallest_difference(values, article, 0.95) == pytest.approx((1.960 + 1.645) * error, rel=0.01)
    assert smallest_difference(values, article, 0.8, level=0.99) == pytest.approx((2.576 + 0.842) * error, rel=0.01)


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
    one = np.zeros(9, int)
    assert np.isnan(smallest_difference(np.arange(9.0), one)) and np.isnan(articles_needed(np.arange(9.0), one, 0.01))
    assert smallest_difference(np.ones(len(ARTICLE)), ARTICLE) == 0
    assert articles_needed(np.ones(len(ARTICLE)), ARTICLE, 0.01) == 2
    assert np.isnan(smallest_difference(differences(np.random.default_rng(0)), ARTICLE, articles=1))
    assert articles_needed(1e6 * differences(np.random.default_rng(0)), ARTICLE, 1e-6) == np.inf


# The verdict


def examine(store, horizon=2, trained=False):
    data = dataset(store, horizon)
    trivial = baselines(data.train)
    small = {preflight.TRAINED: untrained(store.dim, 5)["mean"]} if trained else {}
    order, arrows, peeked = {}, {}, None
    with contextlib.suppress(LVMError):
        order = {lag: crossed_order_probe(store, lag=lag) for lag in (1, 2)}
    with contextlib.suppress(LVMError):
        arrows = preflight.crossed_arrows(data, dataset(store, horizon, direction="backward"))
    with contextlib.suppress(LVMError):
        peeked = preflight.peeked(data.val, trivial)
    return Found(
        data,
        preflight.scores(data, trivial | small),
        order,
        arrows,
        leaks.leaks(store),
        preflight.nearest_training(store),
        preflight.vector_facts(store),
        preflight.strangers(store),
        {s: float(leaks.copied(getattr(data, s)).mean()) for s in ("train", "val", "ood")},
        peeked,
    )


@functools.cache
def world(name):
    """Horizon 1: in 48 dimensions the announcing world is as clear there as in 384 at its own."""
    return examine(worlds.world(name, articles=100, length=30, dim=48), horizon=1)


def whats(found):
    return [f.what for f in advice.verdict(found)]


def said(found, words):
    return any(words in what for what in whats(found))


def test_no_order_in_an_exchangeable_world():
    found = world("exchangeable")
    assert advice.direction(found) == "none" and said(found, "No order that 100 articles")
    assert said(found, "hardly says which chunk") and not said(found, "arrow of time")
    signal, gained = advice.answers(found)
    assert signal.startswith("**None that 100 articles show.**") and "A mark, no ceiling: both neighbours" in gained


def test_false_alarms_are_rare():
    ways = [advice.direction(examine(worlds.exchangeable(30, 14, 16, seed=s))) for s in range(12)]
    assert ways.count("none") >= 10


@functools.cache
def arrows_of(name, articles, dim, horizon=2):
    return preflight.crossed_arrows(*both_ways(worlds.world(name, articles=articles, length=30, dim=dim), horizon))


@pytest.mark.parametrize("name", ["exchangeable", "diverging", "converging"])
@pytest.mark.parametrize(("articles", "dim"), [(100, 48), (100, 128), (400, 48), (400, 128), (1000, 48)])
def test_no_arrow_is_declared_where_there_is_none(name, articles, dim):
    """Many articles make ridge an averaging predictor, which feels diverging noise as the weighted mean does."""
    arrows = arrows_of(name, articles, dim)
    assert advice.declared(arrows) == "none"
    if articles >= 400 and name != "exchangeable":
        assert arrows["ridge"].declared == {"diverging": "forward", "converging": "backward"}[name]
        seen = arrows["ridge"].table.assign(**{"forward above chance": 1.0, "backward above chance": 1.0})
        assert advice.declared({**arrows, "ridge": replace(arrows["ridge"], table=seen)}) == "none"


@pytest.mark.parametrize(("name", "way"), [("announcing", "forward"), ("reversed_announcing", "backward")])
def test_an_arrow_is_declared_where_there_is_one_and_its_way_is_above_chance(name, way):
    arrows = arrows_of(name, 400, 48, horizon=1)
    assert advice.declared(arrows) == way
    ridge, averaging = (arrows[n].differences["novel MRR"][0] for n in ("ridge", "weighted mean"))
    assert advice.beyond(arrows) == over_articles(ridge - averaging, arrows["ridge"].article)
    at_chance = arrows["ridge"].table.assign(**{f"{way} above chance": -0.001})
    at_chance = {**arrows, "ridge": replace(arrows["ridge"], table=at_chance)}
    assert advice.declared(at_chance) == "none"
    said = advice.verdict(replace(world("exchangeable"), arrows=at_chance))
    assert any(f"does better {way}s, but there, too, it is not above chance" in f.why.lower() for f in said)


def test_above_chance_is_the_lower_end_of_what_ridge_has_beyond_chance():
    forward, backward = both_ways(worlds.announcing(articles=20, length=16, dim=8))
    found = preflight.crossed_arrows(forward, backward, folds=2)["weighted mean"]
    table = found.table.set_index("measure").loc["novel MRR"]
    chance = np.mean(1 / np.arange(1, 12))  # 16 chunks less 5 of context, whichever way they are read
    for way in ("forward", "backward"):
        assert table[f"{way} above chance"] < table[way] - chance < table[f"{way} above chance"] + 0.2
    whole = [preflight.joined(d) for d in (forward, backward)]
    used = np.unique(found.article)
    values, article = [], []
    for fold in (0, 1):
        own = whole[0].start[np.isin(whole[0].article, used[fold::2])]
        test = replace(whole[0], start=own)
        common = np.isin(test.target, whole[1].target)
        test = replace(test, start=test.start[common])
        frame = score(preflight._fold_fits(whole[0], used, 2)[fold]["weighted mean"], test)
        values.append(1 / frame["novel rank"] - chance)
        article.append(frame["article"])
    low = over_articles(np.concatenate(values), np.concatenate(article))[1]
    assert table["forward above chance"] == pytest.approx(low, abs=1e-9)


def test_a_rotation_tells_its_order_but_is_as_easy_backwards():
    found = world("rotation")
    assert advice.direction(found) == "order"
    assert said(found, "tell their order, but no arrow") and said(found, "linear map foretells more")


def test_order_without_a_measured_arrow_does_not_speak_of_one():
    found = replace(world("rotation"), arrows={})
    assert advice.direction(found) == "order" and "The vectors tell their order" in whats(found)
    assert advice.answers(found)[0].startswith("**Order; an arrow was not measured.**")


@pytest.mark.parametrize(("name", "way"), [("announcing", "forward"), ("reversed_announcing", "backward")])
def test_what_announces_the_next_chunk_is_an_arrow(name, way):
    found = world(name)
    assert advice.direction(found) == way and said(found, f"easier to continue {way}s")
    assert f"easier to continue {way}s" in advice.answers(found)[0]
    assert f"easier to continue {way}s" in advice.conclusion(found)


@pytest.mark.parametrize("name", ["converging", "diverging"])
def test_coherence_that_changes_is_no_arrow(name):
    """Averaging feels it; ridge may differ with copying taken off, but not with it left in."""
    found = world(name)
    assert advice.direction(found) not in ("forward", "backward")
    assert "as uneven ends of the articles make it" in next(f.why for f in advice.verdict(found) if "rder" in f.what)
    assert "is not told apart" in next(f.why for f in advice.verdict(world("exchangeable")) if "No order" in f.what)


def test_a_small_model_of_one_seed_declares_nothing_and_is_said_with_its_caution():
    exchangeable, seen = world("exchangeable"), world("announcing").arrows["ridge"]
    found = replace(exchangeable, trained_arrow=seen)
    assert seen.declared == "forward" and advice.direction(found) == "none"
    assert f"{seen.caution}; it declares nothing." in advice.answers(found)[0] and "one seed" in seen.caution
    assert "small AMN" not in advice.answers(exchangeable)[0]


def with_sheet(**datasheet):
    store = worlds.rotation(articles=30, length=20, dim=8)
    return replace(store, datasheet=datasheet)


@pytest.mark.parametrize(("tokens", "overlap"), [(64, 16), (64, 32), (64, 48), (64, 60), (10, 9), (64, 0)])
def test_overlapping_chunks_give_the_target_away(tokens, overlap):
    store = with_sheet(build={"unit": "tokens", "tokens": tokens, "overlap": overlap})
    for horizon in (1, 2, 3):
        own = examine(store, horizon)
        last, target = (
            set(range(at * (tokens - overlap), at * (tokens - overlap) + tokens)) for at in (4, 4 + horizon)
        )
        spoils = [f for f in advice.verdict(own) if f.what.startswith("Chunks overlap")]
        assert len(spoils) == bool(last & target)
        if spoils:
            assert (
                spoils[0] == advice.verdict(own)[0] and f" {len(last & target)} of its {tokens} tokens" in spoils[0].why
            )
            assert "chunks overlap" in advice.conclusion(own)
            free = next(h for h in range(1, 99) if h * (tokens - overlap) >= tokens)
            assert f"horizon {free} " in spoils[0].advice
        assert ("mark is too high" in advice.answers(own)[1]) is (overlap > 0)


def test_what_the_datasheet_warns_of_is_a_finding():
    warning = "docs: 80% of the chunks hold their article's title in the first line; encode anew."
    found = examine(with_sheet(warnings=[warning], build={"unit": "sentence"}))
    assert [f.why for f in advice.verdict(found) if f.what == "The datasheet warns"] == [warning]
    assert not said(world("exchangeable"), "The datasheet warns")


def test_figures_of_a_draw_are_said_to_be_so():
    data = dataset(worlds.rotation(articles=60, length=40, dim=8))
    found = examine(data.store)
    assert found.draw == "" and "of a draw" not in advice.conclusion(found) + advice.answers(found)[1]
    for fewest, cut in ((2, False), (12, True)):
        part = preflight.drawn(data, {"train": 400, "val": 240, "ood": 240}, fewest=fewest)
        drawn = replace(found, scored=preflight.scores(part, baselines(part.train)))
        assert f"a draw of {12 if cut else 6} validation articles of 12" in advice.conclusion(drawn)
        assert ("a lower MRR" in advice.answers(drawn)[1]) is cut
        signal = advice.answers(replace(found, drawn=part))[0]
        count = len(np.unique(preflight.joined(part).article))
        assert (
            f"Order and ridge's arrow are of a draw of {count} articles of 60" in signal
            and ("a lower MRR" in signal) is cut
        )
    assert "draw" not in advice.answers(replace(found, drawn=data))[0]


def test_copying_wins_where_chunks_hardly_differ():
    found = world("copy")
    assert whats(found)[0].startswith("Copying wins") and found.copied["val"] > 0.05
    assert "copying wins" in advice.conclusion(found)
    assert not said(world("exchangeable"), "Copying wins")


def test_leaks_come_first():
    store = planted(copies=(1.0,) * 10)
    found = examine(store)
    first = advice.verdict(found)[0]
    assert "val chunks stand in train, too" in first.what and "10 of 60" in first.why
    assert "val chunks stand in train" in advice.conclusion(found)
    assert not said(world("exchangeable"), "stand in train")


def test_few_articles_are_said_to_be_few():
    found = examine(worlds.rotation(articles=15, length=12, dim=16))
    few = next(f for f in advice.verdict(found) if f.what.startswith("Few articles"))
    assert "only 3 articles" in few.why and "validation articles to see 0.02" in few.advice
    many = replace(world("exchangeable"), scored=dict(world("exchangeable").scored))
    steady = {k: f.assign(**{"novel MRR": f["chance"]}) for k, f in many.scored.items()}  # no spread at all
    assert not said(replace(many, scored=steady), "Few articles")


@pytest.mark.parametrize("length", [7, 12])
def test_one_article_a_split_is_told_without_a_crash(length):
    found = examine(worlds.rotation(articles=5, length=length, dim=8, splits=("train", "val", "ood", "", "")))
    assert advice.direction(found) == "not measured" and said(found, "Too few articles to judge")
    signal, gained = advice.answers(found)
    assert "Not measured" in signal and "single validation article" in gained and "nan" not in signal + gained
    assert "nan" not in advice.conclusion(found)
    assert not any("nan" in f.what + f.why + f.advice for f in advice.verdict(found))
    assert len(preflight.power_table(found.scored, found.arrows, found.articles))


def test_the_power_table_speaks_for_all_articles_of_a_draw():
    found = world("rotation")
    here = preflight.power_table(found.scored, found.arrows)
    more = preflight.power_table(found.scored, found.arrows, {"val": 80, "ood": 80})
    own = here["split"] == "val"
    assert (here.loc[own, "articles"] == 20).all() and (more.loc[own, "articles"] == 80).all()
    assert (more.loc[own, "smallest 80%"] < 0.6 * here.loc[own, "smallest 80%"]).all()
    pd.testing.assert_frame_equal(here[here["split"] == "both ways"], more[more["split"] == "both ways"])
    best = preflight.best_trivial(found.scored)
    first = here[here["comparison"] == f"copy last − {best}"].iloc[0]
    values = found.scored["val", "copy last"]["novel MRR"] - found.scored["val", best]["novel MRR"]
    assert first["smallest 80%"] == smallest_difference(values, found.scored["val", best]["article"])


def test_ood_that_is_no_farther_is_said_and_one_that_is_is_not():
    found = world("exchangeable")
    far = found.nearest.assign(cosine=found.nearest["split"].map({"train": 0.5, "val": 0.5, "ood": 0.2}))
    assert not said(replace(found, nearest=far), "OOD is no farther")
    near = found.nearest.assign(cosine=found.nearest["split"].map({"train": 0.5, "val": 0.5, "ood": 0.6}))
    assert said(replace(found, nearest=near), "OOD is no farther")


def test_the_rules_on_size_and_vectors():
    found = world("exchangeable")
    assert said(found, "few for a transformer")
    odd = replace(found, facts={**found.facts, "equal": 2000}, strangers=0.7)
    assert said(odd, "of the vectors equal another") and said(odd, "All vectors are alike")
    short = examine(uneven())
    assert said(short, "stand in no window") is (preflight.unused(short.data) > advice.UNUSED)
    heavy = worlds.rotation(
        articles=8, length=40, dim=8, splits=("train", "train", "train", "val", "val", "ood", "ood", "")
    )
    cut = np.isin(heavy.article, [4]) & (heavy.position >= 9)
    heavy = make_store("heavy", heavy.vectors[~cut], heavy.article[~cut], heavy.position[~cut], heavy.articles)
    assert said(examine(heavy), "One article gives")


def test_a_small_model_that_gains_is_said_to():
    """Here the "trained" model is one that knows more than any trivial predictor: it reads the truth."""
    found = examine(worlds.announcing(articles=60, length=20, dim=48), trained=True)
    assert "the small AMN, after a few steps" in advice.answers(found)[1]
    frame = found.scored["val", preflight.TRAINED]
    knows = replace(found, scored={**found.scored, ("val", preflight.TRAINED): frame.assign(**{"novel MRR": 1.0})})
    assert said(knows, "A small AMN gains") and advice.gain(knows)["best"] == advice.gain(found)["best"]
    assert not said(found, "A small AMN gains")


def test_the_power_statement_is_of_the_small_model_where_there_is_one():
    found = examine(worlds.announcing(articles=60, length=20, dim=48), trained=True)
    g = advice.gain(found)
    best = found.scored["val", g["best"]]
    less = {
        n: f["novel MRR"] - best["novel MRR"] for (s, n), f in found.scored.items() if s == "val" and n != g["best"]
    }
    assert g["other"] == preflight.TRAINED
    assert g["smallest"] == smallest_difference(less[preflight.TRAINED], best["article"])
    ends = [smallest_difference(v, best["article"]) for n, v in less.items() if n != "constant"]
    assert g["range"] == f"{min(ends):.3f} to {max(ends):.3f}" and g["range"] in advice.answers(found)[1]
    assert f"small AMN less {g['best']}" in advice.conclusion(found)
    table = preflight.power_table(found.scored, found.arrows)
    row = table[(table["comparison"] == f"{preflight.TRAINED} − {g['best']}") & (table["split"] == "val")]
    assert row["smallest 80%"].item() == g["smallest"]
    assert advice.gain(world("exchangeable"))["other"] != preflight.TRAINED


def test_texts_in_the_findings_are_finished_sentences():
    for name in ("exchangeable", "rotation", "announcing", "copy"):
        for finding in advice.verdict(world(name)):
            assert finding.why.endswith(".") and finding.advice.endswith(".") and not finding.what.endswith(".")
            assert "  " not in finding.what + finding.why + finding.advice


def test_the_worst_pairs_are_of_different_articles():
    store = uneven()
    first = store.rows("val")[:4]
    leak = Leak(
        "val", "train", 8, first, np.array([0.991, 1.0, 0.995, np.nan]), np.array([0, 1, 70, -1]), np.array([0.5])
    )
    assert (leak.same, leak.near, leak.share) == (1, 3, 0.75)
    assert leak.worst(store) == [(first[1], 1, 1.0), (first[2], 70, 0.995)] and len(leak.worst(store, 1)) == 1
    assert store.article[0] == store.article[1] != store.article[70]
