"""The rows of the report against plain derivations, chance levels by simulation, and the best other offset.

Axes: N windows, A articles, T context length, D vector dimension, n candidates.
"""

import functools
import math

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
    only_article,
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


def plain_retrieval(frame, prefix, cuts=(1, 5, 10)):
    rank, n = frame[f"{prefix}rank"], frame[f"{prefix}candidates"]
    out = {("B", f"{prefix}R@{k}"): ((rank <= k).astype(float), np.minimum(k, n) / n) for k in cuts}
    return out | {("B", f"{prefix}MRR"): (1 / rank, n.map(lambda i: harmonic(int(i)) / i))}


def plain_rivals(frame, offsets):
    """Each row's cosine at the offset that is the best rival on the articles of the other two folds; NaN without it."""
    rows = frame.to_dict("records")
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
    return np.array(out)


def over_steps(frame, column, steps=STEPS):
    """The mean of the windows that have all steps of the rollout."""
    return frame[[f"{column}{h}" for h in steps]].mean(axis=1, skipna=False)


def plain_calibrated(f, horizon):
    """{(gate, measure): each window's value, NaN where it does not count, and chance} of a reference frame."""
    known, context = f["cosine_article"], {1: [-5, -4, -3, -2, -1], 2: [-6, -5, -4, -3, -2]}[horizon]
    out = {("A", "cosine at the target"): (f["cosine"], known)}
    out["A", "margin against the last"] = f["margin last"], known - f[f"offset {-horizon:+d}"]
    out["A", "margin against context[-2]"] = f["margin prev"], known - f[f"offset {-horizon - 1:+d}"]
    others = [k for k in OFFSETS if k != 0]
    novel = [k for k in others if k not in context]
    sides = {"margin against the best other": others, "novel margin": [k for k in novel if k != -1]}
    sides |= {"novel margin, ahead": [1, 2, 3, 4, 5]}
    sides |= {"novel margin, skipped chunks too": novel} if horizon == 2 else {}
    for name, offsets in sides.items():
        rival = plain_rivals(f, offsets)
        out["A", name] = f["cosine"] - rival, known - rival
    for prefix in ("novel ", "possible ", ""):
        out |= plain_retrieval(f, prefix)
    out["B", "1 of 100"] = f["hundred"], 1 / f["hundred candidates"]
    for name in ABLATIONS:
        out |= {("C", column): (f[column], 0 * known) for column in (name, f"{name}, novel MRR")}
    for h in STEPS:
        out["D", f"cosine at step {h}"] = f[f"rollout {h}"], f[f"rollout chance {h}"]
    out["D", "mean rollout"] = over_steps(f, "rollout "), over_steps(f, "rollout chance ")
    moved = over_steps(f, "rollout ", STEPS[1:]) - over_steps(f, "rollout still ", STEPS[1:])
    out["D", "rolling on"] = moved, 0 * known
    out["D", "similarity of steps"] = over_steps(f, "similarity ", STEPS[1:]), math.nan * known
    for t in range(-T, 0):
        out["G", f"weight of context[{t}]"] = f[f"weight {t}"], math.nan * known
    for part in ("along the mean", "along differences", "outside the context"):
        out["G", f"part {part}"] = f[part], math.nan * known
    return out


def plain_original(f):
    """The same of the original's definitions."""
    known, sweep = f["cosine_article"], f[[f"offset {k:+d}" for k in ORIGINAL_OFFSETS]]
    sweep = sweep.where(sweep.notna().all(axis=1))
    out = {}
    for name, k in (("margin", 0), ("margin read late", 1)):
        best = sweep.mean().drop(f"offset {k:+d}").idxmax()  # of the mean sweep, not of each window
        out["A", name] = sweep[f"offset {k:+d}"] - sweep[best], known - sweep[best]
    out["A", "cosine at the target"] = sweep["offset +0"], known
    out["A", "cosine, all windows"] = f["cosine"], known
    out["A", "margin against the last"] = f["margin last"], known - (f["cosine"] - f["margin last"])
    out |= plain_retrieval(f, "", (1, 5)) | plain_retrieval(f, "novel ", (1, 5))
    out["B", "R@5 of six"] = (f["six rank"] <= 5).astype(float), 5 / 6 + 0 * known
    out |= {("C", name): (f[name], 0 * known) for name in ORIGINAL_ABLATIONS}
    for name, kind in (("mean cosine", ""), ("mean cosine read late", "late ")):
        out["D", name] = over_steps(f, f"rollout {kind}"), over_steps(f, "rollout chance ")
    return out


@pytest.mark.parametrize("name", ["linear", "weighted", "scan"])
@pytest.mark.parametrize("profile", ["calibrated", "original"])
def test_every_row_is_that_of_the_plain_derivation(profile, name, horizon):
    frame = reference(name, "val", horizon).frame
    table = summary(measured(name, "val", horizon), profile, horizon)
    wanted = plain_calibrated(frame, horizon) if profile == "calibrated" else plain_original(frame)
    medians = {("B", f"{prefix}median rank") for prefix in ("", "novel ", "possible ") if profile == "calibrated"}
    assert set(wanted) | medians == set(table.index) and table.index.is_unique
    for key, (values, chance) in wanted.items():
        row, close = table.loc[key], WEIGHTS if "weight" in key[1] else 2 * TOLERANCE  # margins: differences again
        value, chance = values.mean(), chance[values.notna()].mean()
        adjusted = (value - chance) / (1 - chance) if key[0] == "B" else math.nan
        found = row[["value", "chance", "adjusted"]].tolist()
        assert found == pytest.approx([value, chance, adjusted], abs=close, nan_ok=True), key
        assert row["windows"] == values.notna().sum() and row["low"] <= row["value"] <= row["high"], key
    for _, name in medians:
        row, prefix = table.loc[("B", name)], name.removesuffix("median rank")
        assert row["value"] == frame[f"{prefix}rank"].median()
        # At random, rank r or better has probability mean(min(r, n) / n): the first r that has a half.
        n = frame[f"{prefix}candidates"]
        middle = next(r for r in range(1, n.max() + 1) if np.mean(np.minimum(r, n) / n) >= 0.5 - 1e-9)
        assert row["chance"] - middle == (0.5 if math.isclose(np.mean(np.minimum(middle, n) / n), 0.5) else 0)


def test_intervals_are_over_articles():
    frame = measured("scan", "val", 1)
    original, calibrated = summary(frame, "original"), summary(frame)
    for table, key, values, share in (
        (original, ("B", "MRR"), 1 / frame["rank"], True),
        (original, ("C", "reversed"), frame["reversed"], False),
        (original, ("A", "cosine, all windows"), frame["cosine"], False),
        (calibrated, ("B", "novel R@5"), frame["novel rank"] <= 5, True),
        (calibrated, ("B", "1 of 100"), frame["hundred"], True),
        (calibrated, ("C", "reversed, novel MRR"), frame["reversed, novel MRR"], False),
        (calibrated, ("D", "mean rollout"), over_steps(frame, "rollout "), False),
    ):
        wanted = *over_articles(values, frame["article"], share=share), frame["article"][values.notna()].nunique()
        found = table.loc[key, ["value", "low", "high", "articles"]].astype(float)
        np.testing.assert_allclose(found, wanted, err_msg=str(key))
    middle = calibrated.loc[("B", "median rank"), ["value", "low", "high"]]
    assert tuple(middle) == median_over_articles(frame["rank"], frame["article"])
    # The sweep's interval rests on the articles that have complete windows.
    complete = frame["offset +3"].notna() & frame["offset -3"].notna()
    assert original.loc[("A", "margin"), "articles"] == frame["article"][complete].nunique() < 5


@pytest.mark.filterwarnings("error")
def test_no_complete_window_gives_nan_not_a_crash():
    """Articles just long enough for one window have no offset +1 and no second rollout step."""
    random = np.random.default_rng(0)
    store = store_of({a: ("val", np.arange(6), random.standard_normal((6, 8))) for a in range(4)})
    found = measure(Scan(8), windows(store, "val", 1, T))
    original, calibrated, alone = summary(found, "original"), summary(found), summary(measure(Scan(8), only_article()))
    late = [("A", "margin"), ("A", "margin read late"), ("A", "cosine at the target"), ("D", "mean cosine")]
    none = [("A", "novel margin"), ("D", "cosine at step 2"), ("D", "mean rollout"), ("D", "rolling on")]
    for table, keys in ((original, late), (calibrated, none), (alone, [("B", "1 of 100")])):
        assert table.loc[keys, ["value", "low", "high"]].isna().all(axis=None)
        assert (table.loc[keys, "windows"] == 0).all()
    assert original.loc[("B", "novel R@1"), ["value", "chance"]].eq(1).all()  # the target alone
    assert math.isnan(calibrated.loc[("B", "novel MRR"), "adjusted"])  # nothing can be shown where chance is 1
    assert calibrated.loc[("A", "margin against the best other"), "windows"] == 4


def test_figures_that_predictors_are_compared_by():
    frame = measured("scan", "val", 2)
    ahead = frame["cosine"] - plain_rivals(frame, [1, 2, 3, 4, 5])
    wanted = {"cosine": frame["cosine"], "mean rollout": over_steps(frame, "rollout "), "novel margin, ahead": ahead}
    wanted |= {"novel MRR": 1 / frame["novel rank"], "possible MRR": 1 / frame["possible rank"]}
    for name, values in (wanted | {"1 of 100": frame["hundred"], "hundred": frame["hundred"]}).items():
        np.testing.assert_allclose(figure(unflat(frame), name), values, err_msg=name)


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
        np.testing.assert_array_equal(best(frame, offsets), plain_rivals(frame, offsets))
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


def test_a_margin_against_the_best_other_is_unbiased_where_all_are_equal():
    """Chosen on the windows that it is read on, the best of 13 equal offsets beats the target by choice alone."""
    offsets, random = [k for k in OFFSETS if k], np.random.default_rng(5)
    ours, naive = [], []
    for _ in range(250):
        frame = sweeps(random, 8, 5, offsets, missing=0.3)
        ours.append(np.nanmean(frame["cosine"] - best(frame, offsets)))
        naive.append(min((frame["cosine"] - frame[f"offset {k:+d}"]).mean() for k in offsets))
    error = np.std(ours) / math.sqrt(len(ours))
    assert abs(np.mean(ours)) < 3.5 * error < 0.2
    assert np.mean(naive) < -0.5


# Bins of coherence


def bins(coherence, cosine, first=0):
    """Windows of two articles, in turns."""
    articles = [first + i % 2 for i in range(len(cosine))]
    return unflat({"article": articles, "coherence": coherence, "cosine": cosine})


def test_bins_delta_compares_windows_of_like_coherence_ends_included():
    val = [0.44, 0.45, 0.50, 0.55, 0.56], [9.0, 0.1, 0.2, 0.6, 9.0]
    ood = [0.4499, 0.5501, 0.47, 0.48], [9.0, 9.0, 0.5, 0.4]
    inside = [0.1, 0.2, 0.6], [1, 0, 1], [0.5, 0.4], [10, 11]  # the normal bin's cosines and articles, of either split
    for a, b, wanted in ((bins(*val), bins(*ood, 10), inside), (bins(*ood, 10), bins(*val), inside[2:] + inside[:2])):
        (row,) = bins_delta(a, b, "original")
        assert row["value"] == pytest.approx(0.15) and (row["gate"], row["measure"]) == ("E", "difference")
        assert math.isnan(row["low"]) and math.isnan(row["high"]) and math.isnan(row["chance"])
        rows = {r["measure"]: r for r in bins_delta(a, b)}  # calibrated: with its sign and interval
        row = rows["difference, normal coherence"]
        assert (row["value"], row["low"], row["high"]) == pytest.approx(between(*wanted))
        assert (row["windows"], row["articles"]) == (5, 4)
        every = rows["difference, all windows"]
        assert every["windows"] == 9 and every["value"] == pytest.approx(np.mean(a.cosine) - np.mean(b.cosine))
        assert math.isnan(rows["difference, high coherence"]["low"])  # an article each: a difference, but no interval


@pytest.mark.filterwarnings("error")
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
    assert len(frame) > 500 and (frame["hundred candidates"] == 100).all()
    retrieval = {("B", "1 of 100"): (frame["hundred"], 1 / frame["hundred candidates"])}
    for prefix in ("", "novel ", "possible "):
        retrieval |= plain_retrieval(frame, prefix)
    for key, (values, chance) in retrieval.items():
        assert tuple(table.loc[key, ["value", "chance"]]) == pytest.approx((values.mean(), chance.mean())), key
        assert abs(off_chance(values, chance, articles)) < 4, key
    for prefix in ("", "novel ", "possible "):
        row = table.loc[("B", f"{prefix}median rank")]
        assert abs(row["value"] - row["chance"]) <= 1 and row["low"] <= row["chance"] <= row["high"]
    for name in ABLATIONS[:-1]:  # another context is another random direction: no change on average
        for column in (name, f"{name}, novel MRR"):
            assert abs(off_chance(frame[column], 0, articles)) < 4, column


@pytest.mark.parametrize("predictor", [mean_predictor, copy_last, Scan, Hash])
def test_on_exchangeable_articles_every_predictor_is_at_chance_outside_the_context(predictor):
    """topic + noise: the target is no other than any chunk outside the context, whatever the predictor does with it."""
    frame = flat(measure(predictor(32), windows(exchangeable(1.0), "val", 1, T)))
    rival = best(frame, [-8, -7, -6, 1, 2, 3, 4, 5])
    rolled = [(frame[f"rollout {h}"], frame[f"rollout chance {h}"]) for h in STEPS]
    cosine = [(frame["cosine"], frame["cosine_article"]), (frame["cosine"], rival)]
    for values, chance in [*cosine, *rolled, *plain_retrieval(frame, "novel ").values()]:
        assert abs(off_chance(values, chance, frame["article"])) < 4
    table = summary(frame)
    assert table.loc[("A", "novel margin"), "value"] == pytest.approx((frame["cosine"] - rival).mean())
    if predictor in (mean_predictor, copy_last):  # the chance level is that of knowing the topic, not zero
        assert table.loc[[("A", "cosine at the target"), ("D", "mean rollout")], "chance"].min() > 0.3
        assert table.loc[("A", "margin against the last"), ["value", "chance"]].max() < -0.1  # copying sinks the margin
