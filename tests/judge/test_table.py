"""The rows of the report against plain derivations, chance levels by simulation, and the best other offset.

Axes: N windows, A articles, T context length, D vector dimension, n candidates.
"""

import functools
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from judge.plain import (
    ABLATIONS,
    OFFSETS,
    ORIGINAL_ABLATIONS,
    ORIGINAL_OFFSETS,
    STEPS,
    TOLERANCE,
    WEIGHTS,
    Scan,
    T,
    copy_last,
    flat,
    mean_predictor,
    measured,
    reference,
    store_of,
    unflat,
)

from lvmlib import models
from lvmlib.judge.measure import measure
from lvmlib.judge.table import best_other, bins_delta, figure, median_over_articles, summarise
from lvmlib.statistics import between, over_articles
from lvmlib.windows import windows


def summary(found, profile="calibrated", horizon=1):
    found = unflat(found) if isinstance(found, pd.DataFrame) else found
    return pd.DataFrame(summarise(found, profile, horizon, T)).set_index(["gate", "measure"])


def harmonic(n):
    return sum(1 / i for i in range(1, n + 1))


@pytest.fixture(params=[1, 2])
def horizon(request):
    return request.param


# Every row


def plain_retrieval(rows, prefix, cuts):
    n = [r[f"{prefix}candidates"] for r in rows]
    out = {}
    for k in cuts:
        found = [float(r[f"{prefix}rank"] <= k) for r in rows]
        out["B", f"{prefix}R@{k}"] = found, np.mean([min(k, i) / i for i in n])
    out["B", f"{prefix}MRR"] = [1 / r[f"{prefix}rank"] for r in rows], np.mean([harmonic(i) / i for i in n])
    return out


def plain_rivals(rows, offsets):
    """Each row's cosine at the offset that is the best rival on the articles of the other two folds; NaN without it."""
    fold = {a: i % 3 for i, a in enumerate(sorted({r["article"] for r in rows}))}
    out = []
    for row in rows:
        others = [r for r in rows if fold[r["article"]] != fold[row["article"]]]
        margin = {}
        for k in offsets:
            values = [r["cosine"] - r[f"offset {k:+d}"] for r in others if not math.isnan(r[f"offset {k:+d}"])]
            if values:
                margin[k] = np.mean(values)
        out.append(row[f"offset {min(margin, key=margin.get):+d}"] if margin else math.nan)
    return out


def plain_calibrated(rows, horizon):
    """{(gate, measure): (values of the windows that count, chance)} from reference rows, in plain Python."""
    mean = lambda f, of=rows: float(np.mean([f(r) for r in of]))  # noqa: E731
    out = {("A", "cosine at the target"): ([r["cosine"] for r in rows], mean(lambda r: r["cosine_article"]))}
    for name, key, place in (
        ("margin against the last", "margin last", -horizon),
        ("margin against context[-2]", "margin prev", -horizon - 1),
    ):
        chance = mean(lambda r, place=place: r["cosine_article"] - r[f"offset {place:+d}"])
        out["A", name] = [r[key] for r in rows], chance
    seen = {1: [-5, -4, -3, -2, -1], 2: [-6, -5, -4, -3, -2]}[horizon]
    others = [k for k in OFFSETS if k != 0]
    novel = [k for k in others if k not in seen]
    sides = {
        "margin against the best other": others,
        "novel margin": [k for k in novel if k != -1],
        "novel margin, ahead": [1, 2, 3, 4, 5],
    }
    if horizon == 2:
        sides["novel margin, skipped chunks too"] = novel
    for name, offsets in sides.items():
        rivals = [(r, rival) for r, rival in zip(rows, plain_rivals(rows, offsets), strict=True) if rival == rival]
        chance = np.mean([r["cosine_article"] - rival for r, rival in rivals])
        out["A", name] = [r["cosine"] - rival for r, rival in rivals], chance
    for prefix in ("novel ", "possible ", ""):
        out |= plain_retrieval(rows, prefix, (1, 5, 10))
    drawn = [r for r in rows if r["hundred candidates"] > 1]
    out["B", "1 of 100"] = [r["hundred"] for r in drawn], mean(lambda r: 1 / r["hundred candidates"], drawn)
    for name in ABLATIONS:
        out |= {("C", n): ([r[n] for r in rows], 0.0) for n in (name, f"{name}, novel MRR")}
    for h in STEPS:
        reached = [r for r in rows if not math.isnan(r[f"rollout {h}"])]
        chance = mean(lambda r, h=h: r[f"rollout chance {h}"], reached)
        out["D", f"cosine at step {h}"] = [r[f"rollout {h}"] for r in reached], chance
    whole = [r for r in rows if not any(math.isnan(r[f"rollout {h}"]) for h in STEPS)]
    out["D", "mean rollout"] = (
        [np.mean([r[f"rollout {h}"] for h in STEPS]) for r in whole],
        np.mean([r[f"rollout chance {h}"] for r in whole for h in STEPS]),
    )
    on = [np.mean([r[f"rollout {h}"] - r[f"rollout still {h}"] for h in (2, 3, 4, 5)]) for r in whole]
    out["D", "rolling on"] = on, 0.0
    alike = [np.mean([r[f"similarity {h}"] for h in (2, 3, 4, 5)]) for r in rows]
    out["D", "similarity of steps"] = alike, math.nan
    for t in range(-T, 0):
        out["G", f"weight of context[{t}]"] = [r[f"weight {t}"] for r in rows], math.nan
    for part in ("along the mean", "along differences", "outside the context"):
        out["G", f"part {part}"] = [r[part] for r in rows], math.nan
    return out


def plain_original(rows):
    """The same of the original's definitions."""
    swept = [r for r in rows if not any(math.isnan(r[f"offset {k:+d}"]) for k in ORIGINAL_OFFSETS)]
    means = {k: np.mean([r[f"offset {k:+d}"] for r in swept]) for k in ORIGINAL_OFFSETS}
    article = np.mean([r["cosine_article"] for r in swept])
    out = {}
    for name, k in (("margin", 0), ("margin read late", 1)):
        others = {o: m for o, m in means.items() if o != k}
        best = max(others, key=others.get)
        values = [r[f"offset {k:+d}"] - r[f"offset {best:+d}"] for r in swept]
        out["A", name] = values, article - means[best]
    out["A", "cosine at the target"] = [r["offset +0"] for r in swept], article
    out["A", "cosine, all windows"] = [r["cosine"] for r in rows], np.mean([r["cosine_article"] for r in rows])
    last = [r["cosine_article"] - (r["cosine"] - r["margin last"]) for r in rows]
    out["A", "margin against the last"] = [r["margin last"] for r in rows], np.mean(last)
    for prefix in ("", "novel "):
        out |= plain_retrieval(rows, prefix, (1, 5))
    out["B", "R@5 of six"] = [float(r["six rank"] <= 5) for r in rows], 5 / 6
    out |= {("C", name): ([r[name] for r in rows], 0.0) for name in ORIGINAL_ABLATIONS}
    for name, kind in (("mean cosine", ""), ("mean cosine read late", "late ")):
        rolled = [r for r in rows if not any(math.isnan(r[f"rollout {kind}{h}"]) for h in STEPS)]
        out["D", name] = (
            [np.mean([r[f"rollout {kind}{h}"] for h in STEPS]) for r in rolled],
            np.mean([r[f"rollout chance {h}"] for r in rolled for h in STEPS]),
        )
    return out


@pytest.mark.parametrize("name", ["linear", "weighted", "scan"])
@pytest.mark.parametrize("profile", ["calibrated", "original"])
def test_every_row_is_that_of_the_plain_derivation(profile, name, horizon):
    rows = reference(name, "val", horizon).rows
    table = summary(measured(name, "val", horizon), profile, horizon)
    wanted = plain_calibrated(rows, horizon) if profile == "calibrated" else plain_original(rows)
    medians = {("B", f"{prefix}median rank") for prefix in ("", "novel ", "possible ") if profile == "calibrated"}
    assert set(wanted) | medians == set(table.index) and table.index.is_unique
    for key, (values, chance) in wanted.items():
        row, close = table.loc[key], WEIGHTS if "weight" in key[1] else 2 * TOLERANCE  # margins: differences again
        assert row["value"] == pytest.approx(np.mean(values), abs=close), key
        assert row["chance"] == pytest.approx(chance, abs=close, nan_ok=True), key
        assert row["windows"] == len(values), key
        assert row["low"] <= row["value"] <= row["high"], key
        if key[0] == "B":  # chance-adjusted: 0 at chance, 1 at the best
            assert row["adjusted"] == pytest.approx((np.mean(values) - chance) / (1 - chance), abs=close), key
        else:
            assert math.isnan(row["adjusted"]), key


@pytest.mark.parametrize("name", ["linear", "scan"])
def test_median_ranks_are_those_of_the_plain_derivation(name):
    rows, frame = reference(name, "val", 2).rows, measured(name, "val", 2)
    table = summary(frame, horizon=2)
    for prefix in ("", "novel ", "possible "):
        row, ranks = table.loc[("B", f"{prefix}median rank")], sorted(r[f"{prefix}rank"] for r in rows)
        assert row["value"] == (ranks[(len(ranks) - 1) // 2] + ranks[len(ranks) // 2]) / 2
        # At random, rank r or better has probability mean(min(r, n) / n): the first r that has a half.
        n = [int(r[f"{prefix}candidates"]) for r in rows]
        share = lambda r, n=n: sum(Fraction(min(r, i), i) for i in n) / len(n)  # noqa: E731
        middle = next(r for r in range(1, max(n) + 1) if share(r) >= Fraction(1, 2))
        assert row["chance"] == middle + (0.5 if share(middle) == Fraction(1, 2) else 0)
        interval = median_over_articles(frame[f"{prefix}rank"], frame["article"])
        assert tuple(row[["value", "low", "high"]]) == interval
        assert row["windows"] == len(rows) and row["articles"] == len({r["article"] for r in rows})


def test_margin_is_read_against_the_best_offset_of_the_mean_sweep_on_complete_windows_only():
    """By hand: three windows, one without offset +3; the best other offset is that of the means, not of each window."""
    sweep = {-3: [0.1, 0.1], -2: [0.2, 0.5], -1: [0.4, 0.2], 0: [0.3, 0.3], 1: [0.0, 0.1], 2: [0.1, 0.0], 3: [0.0, 0.0]}
    frame = measured("scan", "val", 2).iloc[:3].copy()
    for k, values in sweep.items():
        frame[f"offset {k:+d}"] = [*values, 0.99]
    frame.loc[frame.index[2], "offset +3"] = math.nan
    frame["cosine"] = frame["offset +0"]
    table = summary(frame, "original", 2)
    assert table.loc[("A", "margin"), "value"] == pytest.approx(0.3 - 0.35)  # offset -2: (0.2 + 0.5) / 2
    assert table.loc[("A", "margin read late"), "value"] == pytest.approx(0.05 - 0.35)
    assert table.loc[("A", "cosine at the target"), "value"] == pytest.approx(0.3)
    assert table.loc[("A", "cosine, all windows"), "value"] == pytest.approx((0.3 + 0.3 + 0.99) / 3)
    assert list(table.loc["A", "windows"]) == [2, 2, 2, 3, 3]


def test_intervals_are_over_articles():
    frame = measured("scan", "val", 1)
    original, calibrated = summary(frame, "original"), summary(frame)
    whole = frame[[f"rollout {h}" for h in STEPS]].mean(axis=1, skipna=False)
    for table, key, values, share in (
        (original, ("B", "MRR"), 1 / frame["rank"], True),
        (original, ("C", "reversed"), frame["reversed"], False),
        (original, ("A", "cosine, all windows"), frame["cosine"], False),
        (calibrated, ("B", "novel R@5"), frame["novel rank"] <= 5, True),
        (calibrated, ("B", "1 of 100"), frame["hundred"], True),
        (calibrated, ("C", "reversed, novel MRR"), frame["reversed, novel MRR"], False),
        (calibrated, ("D", "mean rollout"), whole, False),
    ):
        wanted = over_articles(values, frame["article"], share=share)
        np.testing.assert_allclose(table.loc[key, ["value", "low", "high"]].astype(float), wanted, err_msg=str(key))
    assert original.loc[("B", "MRR"), "articles"] == frame["article"].nunique() == 5
    # The sweep's interval rests on the articles that have complete windows.
    complete = frame["offset +3"].notna() & frame["offset -3"].notna()
    assert original.loc[("A", "margin"), "articles"] == frame["article"][complete].nunique() < 5
    assert calibrated.loc[("D", "mean rollout"), "articles"] == frame["article"][whole.notna()].nunique() < 5


@pytest.mark.filterwarnings("error")
def test_no_complete_window_gives_nan_not_a_crash():
    """Articles just long enough for one window have no offset +1 and no second rollout step."""
    random = np.random.default_rng(0)
    store = store_of({a: ("val", np.arange(6), random.standard_normal((6, 8))) for a in range(4)})
    found = measure(Scan(8), windows(store, "val", 1, T))
    original, calibrated = summary(found, "original"), summary(found)
    late = [("A", "margin"), ("A", "margin read late"), ("A", "cosine at the target"), ("D", "mean cosine")]
    none = [("A", "novel margin"), ("D", "cosine at step 2"), ("D", "mean rollout"), ("D", "rolling on")]
    for table, keys in ((original, late), (calibrated, none)):
        assert table.loc[keys, ["value", "low", "high"]].isna().all(axis=None)
        assert (table.loc[keys, "windows"] == 0).all()
    assert original.loc[("B", "novel R@1"), ["value", "chance"]].eq(1).all()  # the target alone
    assert math.isnan(calibrated.loc[("B", "novel MRR"), "adjusted"])  # nothing can be shown where chance is 1
    assert calibrated.loc[("A", "margin against the best other"), "windows"] == 4


def test_an_only_article_has_no_hundred():
    store = store_of({0: ("val", np.arange(15), np.random.default_rng(0).standard_normal((15, 8)))})
    row = summary(measure(Scan(8), windows(store, "val", 1, T))).loc[("B", "1 of 100")]
    assert row[["value", "low", "high", "chance"]].isna().all() and row["windows"] == 0


def test_figures_made_of_several():
    frame = measured("scan", "val", 2)
    found = unflat(frame)
    rolled = frame[[f"rollout {h}" for h in STEPS]].mean(axis=1, skipna=False)
    ahead = frame["cosine"].to_numpy(float) - plain_rivals(frame.to_dict("records"), [1, 2, 3, 4, 5])
    wanted = {"cosine": frame["cosine"], "mean rollout": rolled, "novel margin, ahead": ahead}
    wanted |= {"novel MRR": 1 / frame["novel rank"], "possible MRR": 1 / frame["possible rank"]}
    for name, values in (wanted | {"1 of 100": frame["hundred"], "hundred": frame["hundred"]}).items():
        np.testing.assert_allclose(figure(found, name), values, err_msg=name)


# The best other offset


def sweeps(random, articles, each, offsets, missing=0.0):
    """Columns in which no offset is nearer to the prediction than another, nor than the target: all noise about an
    article's own level."""
    article = np.repeat(np.arange(articles), each)
    level = random.standard_normal((articles, 1 + len(offsets)))[article]
    x = level + random.standard_normal(level.shape)
    x[:, 1:][random.random((len(x), len(offsets))) < missing] = math.nan
    columns = {f"offset {k:+d}": x[:, i + 1] for i, k in enumerate(offsets)}
    return pd.DataFrame({"article": article, "cosine": x[:, 0], **columns})


def best(frame, offsets):
    return best_other(unflat(frame), offsets)


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_the_best_other_is_chosen_on_the_other_articles(missing):
    offsets = (-3, -1, 2, 5)
    random = np.random.default_rng(2)
    for articles in (2, 3, 9):
        frame = sweeps(random, articles, 4, offsets, missing)
        np.testing.assert_array_equal(best(frame, offsets), plain_rivals(frame.to_dict("records"), offsets))
    clear = sweeps(random, 6, 10, (-1, 1, 2))
    clear["offset +1"] += 10  # everybody's best
    np.testing.assert_array_equal(best(clear, (-1, 1, 2)), clear["offset +1"])


def test_without_other_articles_there_is_no_best_other():
    """An only article has no others to choose on: NaN, and not whatever offset comes first."""
    frame = sweeps(np.random.default_rng(0), 1, 6, (-1, 1))
    assert np.isnan(best(frame, (-1, 1))).all()
    frame = sweeps(np.random.default_rng(0), 3, 4, (-1, 1))
    frame.loc[frame["article"] != 1, ["offset -1", "offset +1"]] = math.nan  # nor where the others lack every offset
    assert np.isnan(best(frame, (-1, 1))).all()


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_a_margin_against_the_best_other_is_unbiased_where_all_are_equal(missing):
    """Chosen on the windows that it is read on, the best of 13 equal offsets beats the target by choice alone."""
    offsets, random = [k for k in OFFSETS if k], np.random.default_rng(5)
    ours, naive = [], []
    for _ in range(250):
        frame = sweeps(random, 8, 5, offsets, missing)
        ours.append(np.nanmean(frame["cosine"] - best(frame, offsets)))
        naive.append(min((frame["cosine"] - frame[f"offset {k:+d}"]).mean() for k in offsets))
    error = np.std(ours) / math.sqrt(len(ours))
    assert abs(np.mean(ours)) < 3.5 * error < 0.2
    assert np.mean(naive) < -0.5


# Bins of coherence


def bins(coherence, cosine, first=0):
    articles = range(first, first + len(cosine))
    return unflat({"article": articles, "coherence": coherence, "cosine": cosine})


def test_bins_delta_compares_windows_of_normal_coherence_ends_included():
    val = bins([0.44, 0.45, 0.50, 0.55, 0.56], [9.0, 0.1, 0.2, 0.6, 9.0])
    ood = bins([0.4499, 0.5501, 0.47], [9.0, 9.0, 0.5], 10)
    for a, b, sign in ((val, ood, 1), (ood, val, -1)):
        (row,) = bins_delta(a, b, "original")
        assert row["value"] == pytest.approx(0.2)
        assert (row["gate"], row["measure"], row["windows"], row["articles"]) == ("E", "difference", 4, 4)
        assert math.isnan(row["low"]) and math.isnan(row["high"]) and math.isnan(row["chance"])
        rows = {r["measure"]: r for r in bins_delta(a, b)}  # calibrated: with its sign and interval
        row = rows["difference, normal coherence"]
        assert row["value"] == pytest.approx(sign * -0.2) and (row["windows"], row["articles"]) == (4, 4)
        assert rows["difference, all windows"]["value"] == pytest.approx(sign * (18.9 / 5 - 18.5 / 3))
        assert rows["difference, all windows"]["windows"] == 8
        assert math.isnan(rows["difference, high coherence"]["low"])  # an article each: a difference, but no interval


def test_bins_of_measured_windows():
    frames = [unflat(measured("linear", s, 1)) for s in ("val", "ood")]
    rows = [reference("linear", s, 1).rows for s in ("val", "ood")]
    found = {r["measure"]: r for r in bins_delta(*frames)}
    edges = {"low": (-1, 0.45), "normal": (0.45, 0.55), "high": (0.55, 1)}
    assert set(found) == {f"difference, {name} coherence" for name in edges} | {"difference, all windows"}
    for name, (low, high) in edges.items():
        inside = [[r for r in part if low <= r["coherence"] <= high] for part in rows]
        row = found[f"difference, {name} coherence"]
        assert row["windows"] == len(inside[0]) + len(inside[1])
        if all(inside):
            wanted = between(*[[r[c] for r in part] for part in inside for c in ("cosine", "article")])
            assert row["value"] == pytest.approx(wanted[0], abs=TOLERANCE), name
            assert (row["low"], row["high"]) == pytest.approx(wanted[1:], abs=1e-5, nan_ok=True), name
    (row,) = bins_delta(*frames, "original")
    assert row["value"] == pytest.approx(abs(found["difference, normal coherence"]["value"]))


@pytest.mark.parametrize("profile", ["calibrated", "original"])
def test_bins_delta_without_normal_windows_is_nan(profile):
    some, none = bins([0.5], [0.3]), bins([0.2], [0.3], 10)
    for a, b in ((some, none), (none, some)):
        row = next(r for r in bins_delta(a, b, profile) if r["measure"].endswith(("difference", "normal coherence")))
        assert math.isnan(row["value"]) and math.isnan(row["low"])


# Chance levels, by simulation


class Hash(models.Predictor):
    """A direction that depends on every bit of the context and says nothing about anything: random, but repeatable."""

    def __init__(self, dim, context_length=T):
        super().__init__(dim, context_length)
        g = torch.Generator().manual_seed(5)
        self.register_buffer("weights", 300 * torch.randn(dim * context_length, dim, generator=g))

    def raw(self, context):
        return torch.sin(context.flatten(1) @ self.weights)


@functools.cache
def exchangeable(topic):
    """90 validation articles of 8 to 20 chunks, each topic·u + noise: in no order whatever."""
    random = np.random.default_rng(9)
    articles = {}
    for a in range(90):
        n = int(random.integers(8, 21))
        x = random.standard_normal((n, 32)) / 32**0.5
        u = random.standard_normal(32) / 32**0.5
        articles[a] = ("val", np.arange(n), topic * u + x)
    return store_of(articles)


def off_chance(values, chance, articles):
    """How many standard errors, over articles, the mean of `values` is off that of `chance`."""
    difference = pd.Series(np.asarray(values, float) - np.asarray(chance, float))
    counted = difference.notna()
    sums = difference[counted].groupby(np.asarray(articles)[counted]).sum()
    return sums.sum() / math.sqrt((sums**2).sum())


def test_a_random_predictor_on_independent_vectors_is_at_every_chance_level(horizon):
    frame = flat(measure(Hash(32), windows(exchangeable(0.0), "val", horizon, T)))
    table, articles = summary(frame, horizon=horizon), frame["article"]
    assert len(frame) > 500
    for prefix in ("", "novel ", "possible "):
        rank, n = frame[f"{prefix}rank"], frame[f"{prefix}candidates"]
        for name, values, chance in (
            ("R@1", rank <= 1, 1 / n),
            ("R@5", rank <= 5, np.minimum(5, n) / n),
            ("R@10", rank <= 10, np.minimum(10, n) / n),
            ("MRR", 1 / rank, [harmonic(int(i)) / i for i in n]),
        ):
            row = table.loc[("B", prefix + name)]
            assert row["chance"] == pytest.approx(np.mean(chance)) and row["value"] == pytest.approx(np.mean(values))
            assert abs(off_chance(values, chance, articles)) < 4, prefix + name
            assert abs(row["value"] - row["chance"]) < 0.06, prefix + name
        row = table.loc[("B", f"{prefix}median rank")]
        assert abs(row["value"] - row["chance"]) <= 1 and row["low"] <= row["chance"] <= row["high"]
    assert abs(off_chance(frame["hundred"], 1 / frame["hundred candidates"], articles)) < 4
    assert (frame["hundred candidates"] == 100).all() and table.loc[("B", "1 of 100"), "chance"] == pytest.approx(0.01)
    for name in ABLATIONS[:-1]:  # another context is another random direction: no change on average
        for column in (name, f"{name}, novel MRR"):
            assert abs(off_chance(frame[column], 0, articles)) < 4, column


@pytest.mark.parametrize("predictor", [mean_predictor, copy_last, Scan, Hash])
def test_on_exchangeable_articles_every_predictor_is_at_chance_outside_the_context(predictor):
    """topic + noise: the target is no other than any chunk outside the context, whatever the predictor does with it."""
    frame = flat(measure(predictor(32), windows(exchangeable(1.0), "val", 1, T)))
    articles, n = frame["article"], frame["novel candidates"]
    rival = best(frame, [-8, -7, -6, 1, 2, 3, 4, 5])
    for values, chance in (
        (frame["cosine"], frame["cosine_article"]),
        *((frame[f"rollout {h}"], frame[f"rollout chance {h}"]) for h in STEPS),
        (frame["novel rank"] <= 1, 1 / n),
        (frame["novel rank"] <= 5, np.minimum(5, n) / n),
        (1 / frame["novel rank"], [harmonic(int(i)) / i for i in n]),
        (frame["cosine"], rival),
    ):
        assert abs(off_chance(values, chance, articles)) < 4
    table = summary(frame)
    assert table.loc[("A", "novel margin"), "value"] == pytest.approx((frame["cosine"] - rival).mean())
    if predictor in (mean_predictor, copy_last):  # the chance level is that of knowing the topic, not zero
        assert table.loc[("A", "cosine at the target"), "chance"] > 0.3
        assert table.loc[("D", "mean rollout"), "chance"] > 0.3
        assert table.loc[("A", "margin against the last"), ["value", "chance"]].max() < -0.1  # copying sinks the margin
