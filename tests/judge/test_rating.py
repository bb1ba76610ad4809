"""The checklist check by check, the verdict's conditions on each side of their thresholds, and every decision."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from lvmlib import arrow, checklist, comparison, fivecat, known_versions, reading, verdict, version
from lvmlib.baselines import Constant, untrained
from lvmlib.data import worlds
from lvmlib.data.open import dataset
from lvmlib.judge import tricks
from lvmlib.judge.fivecat import Report
from lvmlib.judge.rating import LABELS, OPTIONS

EPOCHS, ROWS = 12, 4  # logged steps an epoch
V22_TARGETS = np.repeat([0.15, 0.25, 0.35], [2 * ROWS, 2 * ROWS, 8 * ROWS])  # handbook §3


def healthy(epochs=EPOCHS):
    """(history, steps) of a run that passes every check."""
    e, n = np.arange(1, epochs + 1), np.arange(ROWS * epochs)
    history = pd.DataFrame({"epoch": e, "val_loss": 1.0 / (1 + e), "val_cos": 0.48 + 0.001 * e})
    history = history.assign(margin=-0.04 + 0.008 * (e - 1), recall_at_5=0.70 + 0.001 * e, skips=0, lambda_eff=0.005)
    steps = pd.DataFrame({"epoch": np.repeat(e, ROWS), "step": 1 + 100 * n, "lambda_eff": 0.001 + 0.0002 * n})
    steps = steps.assign(pos=0.4, neg=0.3, gap=-0.1 + 0.002 * n, skip=0)
    return history, steps.assign(**dict.fromkeys(("rho", "rho_gradient", "rho_target"), V22_TARGETS[: epochs * ROWS]))


RHO, SKIP, SIGNS, GAP, LAMBDA, MARGIN, RECALL, COSINE, SPIKES, FLIP = (
    c.check for c in checklist(version("v22"), *healthy())
)


def lines(history, steps, name="v22", **top):
    checks = checklist(version(name, **top), history, steps)
    assert len({c.check for c in checks}) == len(checks) == 10
    return {c.check: c for c in checks}


def good(history, steps, name="v22"):
    return {name: c.passed for name, c in lines(history, steps, name).items()}


# The checklist: handbook §3, "What is watched"


def test_a_healthy_run_passes_every_check():
    checks = lines(*healthy())
    assert [c.every for c in checks.values()] == ["step"] * 5 + ["epoch"] * 5
    assert all(c.passed is True and c.broke == "" for c in checks.values()), checks


def step(column, rows, value, add=False):
    def change(history, steps):
        steps.loc[rows, column] = steps.loc[rows, column] + value if add else value

    return change


def epoch(column, numbers, value, add=False):
    return lambda history, steps: step(column, history["epoch"].isin(numbers), value, add)(steps, history)


def slope(per_epoch, margin=-0.02, at=1):
    return lambda history, steps: history.update({"margin": margin + per_epoch * (history["epoch"] - at)})


def spike(factor):
    return lambda history, steps: epoch("val_loss", [9], factor * history["val_loss"][:8].min())(history, steps)


CASES = {  # what is done to a healthy run, the check that breaks, the first break
    "rho above": (step("rho", [21, 30], 0.051, add=True), RHO, "step 2101, epoch 6"),
    "rho below": (step("rho", [3, 40], -0.051, add=True), RHO, "step 301, epoch 1"),
    "rho unknown": (step("rho", [9], math.nan), RHO, "step 901, epoch 3"),
    "skips": (epoch("skips", [4, 7], 3), SKIP, "epoch 4"),
    "pos negative": (step("pos", [13], -0.01), SIGNS, "step 1301, epoch 4"),
    "neg zero": (step("neg", [14, 15], 0.0), SIGNS, "step 1401, epoch 4"),
    "gap falls": (lambda history, steps: steps.update({"gap": -steps["gap"]}), GAP, ""),
    "gap constant": (step("gap", slice(None), 0.1), GAP, ""),
    "lambda constant": (step("lambda_eff", slice(None), 0.02), LAMBDA, ""),
    "margin climbs too slowly": (slope(0.003), MARGIN, "epoch 4"),
    "margin falls back": (epoch("margin", range(8, 13), -0.06, add=True), MARGIN, "epoch 8"),
    "recall": (epoch("recall_at_5", [5, 11], 0.699), RECALL, "epoch 5"),
    "cosine": (epoch("val_cos", [12], 0.479), COSINE, "epoch 12"),
    "cosine unknown": (epoch("val_cos", [3], math.nan), COSINE, "epoch 3"),
    "spike": (spike(1.51), SPIKES, "epoch 9"),
    "behind at epoch 6": (slope(0.02, -0.021, 6), FLIP, "epoch 6"),
    "rho just within": (step("rho", [1, 30], [0.0499, -0.0499], add=True), None, ""),
    "neg just positive": (step("neg", slice(None), 1e-6), None, ""),
    "gap dips between the thirds": (step("gap", slice(17, 30), -0.9), None, ""),
    "margin climbs 0.012 in three epochs": (slope(0.004), None, ""),
    "recall on its threshold": (epoch("recall_at_5", [5], 0.70), None, ""),
    "cosine on its threshold": (epoch("val_cos", [5], 0.48), None, ""),
    "a small spike": (spike(1.49), None, ""),
    "epoch 6 on its threshold": (slope(0.02, -0.02, 6), None, ""),
}


@pytest.mark.parametrize("change, line, broke", CASES.values(), ids=CASES)
def test_each_check_breaks_alone_and_names_the_first_break(change, line, broke):
    history, steps = healthy()
    change(history, steps)
    found = [(c.check, c.passed, c.broke) for c in lines(history, steps).values() if c.passed is not True]
    assert found == ([(line, False, broke)] if line else [])


def test_a_spike_is_measured_against_the_best_so_far():
    history, steps = healthy()
    history["val_loss"] = [1.0, 0.5, 0.6, 0.7, 0.74, 0.76, *[0.4] * 6]  # each a little above the one before
    check = lines(history, steps)[SPIKES]
    assert check.broke == "epoch 6" and "1.52" in check.measured


def test_a_skipped_step_breaks_the_skip_check_alone():
    history, steps = healthy()
    steps.loc[9, ["skip", "rho", "lambda_eff"]] = [1, 0.0, 0.0]
    epoch("skips", [3], 17)(history, steps)
    assert [name for name, ok in good(history, steps).items() if not ok] == [SKIP]


@pytest.mark.parametrize("name", known_versions())
def test_every_version_has_a_checklist_of_what_applies_to_it(name):
    history, steps = healthy()
    rule, none = version(name).control.rule, {"none": {RHO, SKIP, LAMBDA}, "fixed": {RHO, LAMBDA}}
    if rule in none:
        steps = steps.assign(rho=0.0, lambda_eff=0.03, rho_target=math.nan)
    checks = good(history, steps, name)
    assert {check for check, ok in checks.items() if ok is None} == none.get(rule, set())
    assert False not in checks.values()


@pytest.mark.parametrize("name", ["v1", "v2", "v21", "v22", "share", "pi"])
def test_rho_is_compared_with_the_target_of_its_rule(name):
    """The older rules' target is the fraction that λ aims at; a share of the gradient has its own column."""
    history, steps = healthy()
    own, other = ("rho_gradient", "rho") if name in ("share", "pi") else ("rho", "rho_gradient")
    step(other, [0], 0.3, add=True)(history, steps)
    assert good(history, steps, name)[RHO] is True
    step(own, [0], 0.06, add=True)(history, steps)
    assert good(history, steps, name)[RHO] is False


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_short_run_is_not_judged_by_epochs_to_come(count):
    checks = good(*healthy(count))
    assert {name for name, ok in checks.items() if ok is None} == {MARGIN, FLIP} and False not in checks.values()


def test_a_run_that_always_skipped_is_not_judged_by_rho():
    history, steps = healthy()
    assert good(history, steps.assign(skip=1, rho=0.0, lambda_eff=0.0))[RHO] is None


# The verdict


def made_report(gates="ABC", margin=0.03, val_cos=0.50, ood_gates="ABCDE", of_six=0.712, **others):
    """A report where the model passes `gates`; `others`: {predictor: (margin, late, cosine, novel MRR, of six)}."""
    rows = []
    predictors = {"model": (margin, margin - 0.2, val_cos, 0.25, of_six), **others}
    for name, (its_margin, late, cosine, mrr, six) in predictors.items():
        own = gates if name == "model" else ""
        for split, passes, off in (("val", own, 0.0), ("ood", ood_gates, 7.0)):  # OOD must not be read as validation
            figures = [
                ("A", "margin", its_margin + off, "A" in passes, -0.3),
                ("A", "cosine at the target", cosine + off, "A" in passes, 0.1),
                ("A", "margin read late", late + off, None, 0.1),
                ("A", "cosine, all windows", cosine + off, None, 0.2),
                ("B", "R@1", 0.5, "B" in passes, 0.1),
                ("B", "R@5", 0.5, True, 0.1),  # one threshold of two is not the gate
                ("B", "novel MRR", mrr + off, None, 0.1),
                ("B", "R@5 of six", six + off, None, 5 / 6),
                ("A", "margin against the last", its_margin / 2 + off, None, 0.1),
                ("C", "shuffled", -0.2, "C" in passes, 0.1),
                ("D", "mean cosine", 0.4, "D" in passes, 0.1),
                ("D", "mean cosine read late", 0.4 + off, None, 0.1),
            ]
            rows += [(split, name, *figure) for figure in figures]
        rows.append(("both", name, "E", "difference", 0.01, "E" in own, 0.1))
    table = pd.DataFrame(rows, columns=["split", "predictor", "gate", "measure", "value", "passed", "chance"])
    table["threshold"] = [math.nan if passed is None else 0.0 for passed in table["passed"]]
    report = Report("original", {}, {})
    vars(report)["table"] = table.astype({"passed": "boolean"})
    return report


def judge(report=None, history=None, name="v22"):
    return verdict(version(name), healthy()[0] if history is None else history, report or made_report())


def met(v):
    return {c["condition"]: c["met"] for c in v.conditions}


CONDITIONS = ["margin, gate A", "gates passed of 5", "R@5 of six", "validation cosine"]


def test_success_needs_all_four_conditions():
    v = judge()
    assert v.success and v.decision == "success"
    assert met(v) == dict.fromkeys(CONDITIONS, True)
    assert [c["threshold"] for c in v.conditions] == [0.0, 3, 0.70, 0.48]
    assert [c["value"] for c in v.conditions] == pytest.approx([0.03, 3, 0.712, 0.50])
    assert json.loads(json.dumps(v.to_dict()))["success"] is True
    assert [c["chance"] for c in v.conditions] == pytest.approx([-0.3, math.nan, 5 / 6, 0.2], nan_ok=True)
    history = healthy()[0].assign(margin=-0.1)  # whatever the history
    assert judge(history=history).decision == judge(history=history, name="p6").decision == "success"


@pytest.mark.parametrize(
    "condition, good, bad",
    [
        ("margin, gate A", {"margin": 1e-9}, {"margin": 0.0}),
        ("margin, gate A", {"margin": 0.5}, {"margin": math.nan}),
        ("gates passed of 5", {"gates": "ACE"}, {"gates": "AC"}),
        ("gates passed of 5", {"ood_gates": "ABCD"}, {"ood_gates": "AB"}),  # on validation and on OOD
        ("R@5 of six", {"of_six": 0.70}, {"of_six": 0.699}),
        ("validation cosine", {"val_cos": 0.48}, {"val_cos": 0.4799}),
        ("validation cosine", {"val_cos": 0.6}, {"val_cos": math.nan}),
    ],
)
def test_each_condition_on_each_side(condition, good, bad):
    assert judge(made_report(**good)).success
    v = judge(made_report(**bad))
    assert not v.success and v.decision != "success"
    assert [c for c, ok in met(v).items() if not ok] == [condition]


def test_conditions_carry_the_baselines():
    v = judge(made_report(mean=(-0.2, -0.3, 0.51, 0.16, 0.3), copy=(-0.5, -0.6, 0.44, 0.22, 0.84)))
    values = ((-0.2, -0.5), (0, 0), (0.3, 0.84), (0.51, 0.44))
    assert [c["baselines"] for c in v.conditions] == [{"mean": mean, "copy": copy} for mean, copy in values]


# The decision


def failed(rise=0.05, share=0.1, name="v22", **others):
    """A failed run: the margin's rise from first to last epoch, and mean λ as a share of its ceiling."""
    mean = share * version(name).control.lambda_max
    history = healthy()[0].assign(margin=np.linspace(-0.08, -0.08 + rise, EPOCHS), lambda_eff=mean)
    return judge(made_report("A", margin=-0.03, **others), history, name)


@pytest.mark.parametrize(
    "rise, share, decision",
    [(0.05, 0.1, "A"), (0.011, 0.9, "A"), (0.009, 0.1, "B"), (-0.04, 0.49, "B"), (0.009, 0.51, "C"), (-0.04, 1.0, "C")],
)
def test_the_option_that_follows_on_failure(rise, share, decision):
    v = failed(rise, share)
    assert not v.success and v.decision == decision and OPTIONS[decision] in v.why and v.why in v.text
    own = failed(rise, share, OPTIONS[decision])  # which is not offered to itself
    if own.decision == decision:
        others = [name for name in OPTIONS.values() if name != OPTIONS[decision]]
        assert f"({OPTIONS[decision]})" not in own.why and all(f"({name})" in own.why for name in others)


def test_no_option_follows_without_a_directional_loss():
    versions = ("p6", "rank", "energy", "two_heads", "committee", "margin", "bounded")
    assert {failed(rise, name=n).decision for n in versions for rise in (0.0, 0.05)} == {"none"}


@pytest.mark.parametrize("name", ["p6", "v22"])
def test_no_option_follows_where_nothing_was_learned(name):
    constant = {"constant": (-0.1, -0.1, 0.50, 0.1, 0.8)}
    v = failed(name=name, val_cos=0.50, **constant)
    assert v.decision == "none" and "constant" in v.why and "0.500" in v.why
    assert "constant" not in failed(name=name, val_cos=0.51, **constant).why


# The comparison


def test_comparison_has_this_run_the_published_ones_and_the_baselines():
    """Handbook §5.2 and §5.3: the mini-5CAT's figures, and the full one's; what was not published is empty."""
    simple = {"copy last": (-0.5, -0.6, 0.44, 0.22, 0.84), "mean": (-0.2, -0.3, 0.51, 0.16, 0.3)}
    table = comparison(version("v22"), made_report(of_six=0.73, **simple)).set_index("run")
    nan, measures = math.nan, ["margin, late", "R@5 of six", "val cos", "margin", "novel MRR"]
    assert len(table) == 8
    full = table.loc[["p6, original", "v22, original"], ["margin, last", "R@5 in article", "rollout, late"]]
    assert full.to_numpy().ravel() == pytest.approx([-0.082, nan, nan, -0.004, 0.120, 0.432], nan_ok=True)
    for run, values in {
        "v22, this run": [0.03 - 0.2, 0.73, 0.50, 0.03, 0.25],
        "p6, original": [nan, 0.70, nan, nan, nan],
        "v1, original": [-0.043, nan, nan, nan, nan],
        "v21, original": [-0.067, 0.769, 0.488, nan, nan],
        "copy last, untrained": [-0.6, 0.84, 0.44, -0.5, 0.22],
        "mean, untrained": [-0.3, 0.30, 0.51, -0.2, 0.16],
    }.items():
        assert table.loc[run, measures].astype(float).tolist() == pytest.approx(values, nan_ok=True), run


# The calibrated reading, on predictors whose label is known


def report_of(name):
    """Of a predictor on the embedded validation and OOD windows, or of a world's optimum on the world."""
    if name in ("optimum", "optimum's ranker"):
        optimum = model = worlds.law("rotation", dim=48).optimal(2)
        if name == "optimum's ranker":
            model = tricks.tricks(48, 5, 0.4, torch.eye(48)[:8])["mean − a·context[-2]"]
            model.heads = lambda x: (*model(x), optimum.heads(x)[2])
        return fivecat(model, dataset(worlds.world("rotation", dim=48, articles=60, length=30)))
    data = dataset("wikipedia")
    dim = data.store.dim
    simple = {
        "trick": tricks.tricks(dim, 5, 0.4, torch.eye(dim)[:8])["mean − a·context[-2]"],
        "mean": untrained(dim, 5)["mean"],
        "constant": Constant(dim, 5, torch.ones(dim)),
    }
    return fivecat(simple[name], {s: getattr(data, s).at_most(200) for s in ("val", "ood")})


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("optimum", "knowledge"),
        ("optimum's ranker", "knowledge, and escape"),
        ("trick", "escape"),
        ("mean", "below arithmetic"),
        ("constant", "collapsed"),
    ],
)
def test_the_reading_has_the_known_label_and_its_figures(name, label):
    report = report_of(name)
    result = reading(report)
    assert result.label == label and LABELS[label] in result.headline
    for split in report.splits:
        assert f"On {split} (" in result.text and f"{report.value('novel MRR', split):.3f} [" in result.text
    assert ("leading components" in result.text or "Subtracted" in result.text) == ("escape" in label)


def test_the_reading_includes_the_arrow():
    law = worlds.law("announcing", dim=48, delay=1)
    store = worlds.world("announcing", dim=48, articles=100, length=30, delay=1)
    ways = [dataset(store, direction=d).val for d in ("forward", "backward")]
    result = arrow([law.optimal(2)], [law.reversed().optimal(2)], ways)
    report = fivecat(law.optimal(2), {"val": ways[0]})
    plain, with_arrow = reading(report), reading(report, result)
    assert result.declared == "forward" and with_arrow.sentences[:-1] == plain.sentences
    assert "forward" in with_arrow.sentences[-1] and result.caution in with_arrow.sentences[-1]
