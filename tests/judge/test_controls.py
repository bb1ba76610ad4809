"""Tests of the controls notebook's functions: samples, brief trainings, figures by window, rates.

Axes: N windows, T context length, D vector dimension.
"""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from lvmlib.baselines import untrained
from lvmlib.config import version
from lvmlib.data import worlds
from lvmlib.errors import LVMError
from lvmlib.judge import controls
from lvmlib.judge.arrow import arrow
from lvmlib.judge.fivecat import fivecat
from lvmlib.judge.measure import score
from lvmlib.runs.run import train
from lvmlib.windows import Dataset, windows

LENGTHS = {"train": [20, 9, 14, 30, 22], "val": [7, 25, 12, 19], "ood": [18, 16]}


@pytest.fixture(scope="module")
def store():
    return controls.sample("rotation", LENGTHS, dim=16, seed=3)


def test_a_sample_has_the_lengths_and_splits_asked_for_and_the_law_of_its_world(store):
    sizes = pd.Series(store.article).value_counts(sort=False)
    assert {s: sizes[store.articles.index[store.articles["split"] == s]].tolist() for s in LENGTHS} == LENGTHS
    whole = worlds.rotation(11, 30, 16, seed=3, splits=[s for s, n in LENGTHS.items() for _ in n])
    first = whole.vectors.reshape(11, 30, 16)[1, :9]
    np.testing.assert_array_equal(store.vectors[store.article == 1], first)  # cut at its end, not elsewhere
    twice = controls.sample("rotation", {"val": [7, 9]}, copies=2, dim=16)
    assert np.bincount(twice.article).tolist() == [7, 9, 7, 9]


@pytest.mark.parametrize("name", ["p6", "v1", "v2", "v21", "v22", "share", "pi", "margin"])
def test_a_brief_training_is_the_run_s(name, tmp_path, store):
    """Whole batches of one epoch: the same weights as a run's."""
    settings = {"optimizer": {"lr": 1e-3, "decay": "all"}, "losses": {"listwise": {"weight": 0.0}}}
    own = version(name, settings, model="amn", epochs=1, batch_size=32, device="cpu", precision="float32")
    cut = {s: windows(store, s) for s in LENGTHS}
    cut["train"] = cut["train"].at_most(2 * own.batch_size)
    run = train(own, Dataset(store, *cut.values()), out=tmp_path)
    list(run)
    context, _ = cut["val"].batch(np.arange(5))
    ours = controls.brief(own, cut["train"], 2, own.seed, 1e-3)
    assert not ours.training
    torch.testing.assert_close(ours(context)[0], run.best(context)[0], rtol=0, atol=1e-5)
    other = controls.brief(own, cut["train"], 2, own.seed + 1, 1e-3)
    assert not torch.allclose(other(context)[0], ours(context)[0], atol=1e-3)


@pytest.mark.parametrize("name", ["rank", "two_heads", "bounded"])
def test_a_brief_training_refuses_the_listwise_loss(name, store):
    with pytest.raises(LVMError, match=rf"{name}.*listwise"):
        controls.brief(version(name), windows(store, "train"), 2, 0, 1e-3)


def test_a_brief_training_goes_through_the_whole_schedule_and_over_the_data_again(store):
    """More steps than an epoch has; a schedule that ends elsewhere makes another model."""
    own = version("v22", model="amn", device="cpu", precision="float32", epochs=12)
    part = windows(store, "train").at_most(40)
    context, _ = part.batch(np.arange(5))
    whole, again = (controls.brief(own, part, 12, 0, 1e-3)(context)[0] for _ in range(2))
    torch.testing.assert_close(whole, again, rtol=0, atol=0)
    first = version("v22", model="amn", device="cpu", precision="float32", epochs=1)
    assert not torch.allclose(controls.brief(first, part, 12, 0, 1e-3)(context)[0], whole, atol=1e-6)


def test_quick_ridge_is_ridge_regression(store):
    part = windows(store, "train")
    context, target = (x.double().numpy() for x in part.batch(np.arange(len(part))))
    x = context.reshape(len(context), -1)
    plain = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ target)
    np.testing.assert_allclose(controls.quick_ridge(part, 10.0).weights.numpy(), plain, atol=1e-5)
    few = controls.quick_ridge(part, 10.0, most=10).weights.numpy()
    assert few.shape == plain.shape and not np.allclose(few, plain, atol=1e-3)


def test_noisy_seeds_differ_and_leave_their_model_alone():
    best = worlds.law("announcing", dim=16).optimal(2)
    before = best.weights.clone()
    one, two, again = (controls.noisy(best, 0.5, s) for s in (1, 2, 1))
    torch.testing.assert_close(best.weights, before)
    torch.testing.assert_close(one.weights, again.weights)
    torch.testing.assert_close(one.bias, best.bias)
    assert not torch.allclose(one.weights, two.weights)
    torch.testing.assert_close(controls.noisy(best, 0.0, 1).weights, before)


def test_a_share_has_the_interval_of_clopper_and_pearson():
    for hits, of, low, high in ((0, 20, 0, 0.16843), (5, 100, 0.01643, 0.11284), (20, 20, 0.83157, 1)):
        np.testing.assert_allclose(controls.share(hits, of), (hits / of, low, high), atol=1e-5)
    assert all(math.isnan(x) for x in controls.share(0, 0))


def test_figures_are_those_of_the_report(store):
    split = windows(store, "train")
    model = untrained(16, 5)["mean"]
    own = controls.figures(model, split)
    assert tuple(own.columns) == (*controls.FIGURES, "article")
    report = fivecat(model, {"train": split})
    for name in controls.FIGURES:
        if name == "margin against the best context vector":
            continue
        source = report.original if name == "R@5 of six" else report
        assert own[name].mean() == pytest.approx(source.value(name, "train"), abs=1e-6), name
    worst = own[["margin against the last", "margin against context[-2]"]].mean().min()
    assert own["margin against the best context vector"].mean() <= worst + 0.05


def test_a_gain_is_the_mean_difference(store):
    split = windows(store, "train")
    mean, copying = (controls.figures(untrained(16, 5)[n], split) for n in ("mean", "copy last"))
    row = controls.gain(copying, mean).loc["cosine at the target"]
    assert row["value"] == pytest.approx((copying - mean)["cosine at the target"].mean())
    assert row["low"] < row["value"] < row["high"]


def test_a_share_of_the_gain_and_its_coverage_in_simulation():
    """The interval contains the true share of 0.7 in at least 90 % of 200 simulated datasets."""
    shares = []
    for seed in range(200):
        random, article = np.random.default_rng(seed), np.repeat(np.arange(30), 10)
        trivial = random.random(300)
        best = trivial + 0.4 + 0.3 * random.standard_normal(30)[article] + 0.3 * random.standard_normal(300)
        own = 0.7 + 0.1 * random.standard_normal((3, 1))
        ours = trivial + own * (best - trivial) + 0.2 * random.standard_normal(30)[article]
        shares.append(controls.share_of_gain(ours, best, trivial, article))
        assert shares[-1][0] == pytest.approx((ours.mean() - trivial.mean()) / (best.mean() - trivial.mean()))
    value, low, high = np.array(shares).T
    assert value.mean() == pytest.approx(0.7, abs=0.03)
    assert np.mean((low <= 0.7) & (high >= 0.7)) >= 0.9  # binomial, 200 at 95 %: fewer in one of 500
    no_gain = trivial + random.standard_normal(300) - 0.2
    assert all(math.isnan(x) for x in controls.share_of_gain(ours, no_gain, trivial, article))


def test_main_figures_are_those_of_the_report(store):
    model, other = untrained(16, 5)["mean"], untrained(16, 5)["copy last"]
    found = controls.main_figures(store, model, other)
    report = fivecat(model, {"val": windows(store, "val"), "ood": windows(store, "ood")})
    for gate, name in (("A", "novel margin"), ("B", "novel MRR"), ("D", "rolling on"), ("G", "weight of context[-1]")):
        row = report.row(name, "val", gate=gate)
        for end in ("value", "low", "high"):
            np.testing.assert_allclose(found.loc[(gate, name), end], row[end], atol=1e-6, err_msg=name)
    both = report.row("difference, all windows", "both")
    assert found.loc[("E", "difference, all windows"), "low"] == pytest.approx(both["low"], abs=1e-6)
    for name in ("cosine", "novel MRR", "1 of 100", "mean rollout"):
        pair = report.paired(name, "val", "model", "copy last")
        assert found.loc[("paired", name), "high"] == pytest.approx(pair["high"], abs=1e-6), name
    assert found["low"].notna().all()


def test_delta_by_hand(store):
    split = windows(store, "val")
    context, target = split.batch(np.arange(len(split)))
    plain = (context[:, -1] * target).sum(1) - (context[:, -1] * context[:, -2]).sum(1)
    assert controls.delta(split)[0] == pytest.approx(float(plain.mean()), abs=1e-6)


def test_answers():
    nan = math.nan
    for low, high, word in ((0.1, 0.2, "forward"), (-0.2, -0.1, "backward"), (-1, 1, "none"), (nan, nan, "none")):
        assert controls.answer(low, high) == word
    assert controls.answer(0.4, 0.6, 0.5) == "none" and controls.answer(0.6, 0.7, 0.5) == "forward"


def test_the_arrow_by_novel_mrr_raises_no_alarm_by_a_better_seed():
    """Without order, a predictor that is far better in one direction wins in cosine, and not in novel MRR."""
    good, bad = worlds.exchangeable_law(16).optimal(2), untrained(16, 5)["copy last"]
    declared, cosine = [], []
    for seed in range(20):
        made = controls.sample("exchangeable", {"val": [30, 12, 18, 25, 40, 9, 14, 33, 21, 16]}, dim=16, seed=seed)
        cut = controls.both_ways(made, ("val",))
        pair = (cut["forward"]["val"], cut["backward"]["val"])
        found = arrow([good], [bad], pair)
        declared.append(found.declared)
        cosine.append(found.table.set_index("measure").loc["cosine", "low"] > 0)
    assert np.mean(cosine) == 1
    assert declared.count("none") >= 16  # binomial, 20 at 95 %: fewer in one of 390
    assert score(good, pair[0])["cosine"].mean() > score(bad, pair[0])["cosine"].mean()
