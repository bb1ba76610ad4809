"""The checklist check by check, the verdict's conditions on each side of their thresholds, and every decision."""

import dataclasses
import functools
import json
import math
import re

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
from lvmlib.judge.health import leading_components
from lvmlib.judge.rating import CHECKS, LABELS, OPTIONS

EPOCHS, ROWS = 12, 4  # logged steps an epoch
V22_TARGETS = np.repeat([0.15, 0.25, 0.35], [2 * ROWS, 2 * ROWS, 8 * ROWS])  # handbook §3

RHO, SKIP, SIGNS, GAP, LAMBDA, MARGIN, RECALL, COSINE, SPIKES, FLIP = (check for _, check, *_ in CHECKS)


def healthy(epochs=EPOCHS):
    """(history, steps) of a run that passes every check."""
    e, n = np.arange(1, epochs + 1), np.arange(ROWS * epochs)
    history = pd.DataFrame({"epoch": e, "val_loss": 1.0 / (1 + e), "val_cos": 0.48 + 0.001 * e})
    history = history.assign(margin=-0.04 + 0.008 * (e - 1), recall_at_5=0.70 + 0.001 * e, skips=0, lambda_eff=0.005)
    steps = pd.DataFrame({"epoch": np.repeat(e, ROWS), "step": 1 + 100 * n, "lambda_eff": 0.001 + 0.0002 * n})
    steps = steps.assign(pos=0.4, neg=0.3, gap=-0.1 + 0.002 * n, skip=0)
    return history, steps.assign(**dict.fromkeys(("rho", "rho_gradient", "rho_target"), V22_TARGETS[: epochs * ROWS]))


def lines(history, steps, name="v22", **top):
    checks = checklist(version(name, **top), history, steps)
    assert len({c.check for c in checks}) == len(checks) == 10
    return {c.check: c for c in checks}


def good(history, steps, name="v22"):
    return {name: c.held for name, c in lines(history, steps, name).items()}


# The checklist: handbook §3, "What is watched"


def test_a_healthy_run_passes_every_check():
    checks = lines(*healthy())
    assert {c.check for c in checks.values() if c.every == "step"} == {RHO, SKIP, SIGNS, GAP, LAMBDA}
    assert {c.check for c in checks.values() if c.every == "epoch"} == {MARGIN, RECALL, COSINE, SPIKES, FLIP}
    assert all(c.held is True and c.broke == "" for c in checks.values()), checks


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


CASES = [  # what is done to a healthy run, the check that breaks, the first break
    pytest.param(step("rho", [21, 30], 0.051, add=True), RHO, "step 2101, epoch 6", id="rho above"),
    pytest.param(step("rho", [3, 40], -0.051, add=True), RHO, "step 301, epoch 1", id="rho below"),
    pytest.param(step("rho", [9], math.nan), RHO, "step 901, epoch 3", id="rho unknown"),
    pytest.param(epoch("skips", [4, 7], 3), SKIP, "epoch 4", id="skips"),
    pytest.param(step("pos", [13], -0.01), SIGNS, "step 1301, epoch 4", id="pos negative"),
    pytest.param(step("neg", [14, 15], 0.0), SIGNS, "step 1401, epoch 4", id="neg zero"),
    pytest.param(lambda history, steps: steps.update({"gap": -steps["gap"]}), GAP, "", id="gap falls"),
    pytest.param(step("gap", slice(None), 0.1), GAP, "", id="gap constant"),
    pytest.param(step("lambda_eff", slice(None), 0.02), LAMBDA, "", id="lambda constant"),
    pytest.param(slope(0.003), MARGIN, "epoch 4", id="margin climbs too slowly"),
    pytest.param(epoch("margin", range(8, 13), -0.06, add=True), MARGIN, "epoch 8", id="margin falls back"),
    pytest.param(epoch("recall_at_5", [5, 11], 0.699), RECALL, "epoch 5", id="recall"),
    pytest.param(epoch("val_cos", [12], 0.479), COSINE, "epoch 12", id="cosine"),
    pytest.param(epoch("val_cos", [3], math.nan), COSINE, "epoch 3", id="cosine unknown"),
    pytest.param(spike(1.51), SPIKES, "epoch 9", id="spike"),
    pytest.param(slope(0.02, -0.021, 6), FLIP, "epoch 6", id="behind at epoch 6"),
    pytest.param(step("rho", slice(None), 0.0499, add=True), None, "", id="rho just above"),
    pytest.param(step("rho", slice(None), -0.0499, add=True), None, "", id="rho just below"),
    pytest.param(step("neg", slice(None), 1e-6), None, "", id="neg just positive"),
    pytest.param(step("gap", slice(17, 30), -0.9), None, "", id="gap dips between the thirds"),
    pytest.param(slope(0.004), None, "", id="margin climbs 0.012 in three epochs"),
    pytest.param(epoch("recall_at_5", [5], 0.70), None, "", id="recall on its threshold"),
    pytest.param(epoch("val_cos", [5], 0.48), None, "", id="cosine on its threshold"),
    pytest.param(spike(1.49), None, "", id="a small spike"),
    pytest.param(slope(0.02, -0.02, 6), None, "", id="epoch 6 on its threshold"),
]


@pytest.mark.parametrize("change, line, broke", CASES)
def test_each_check_breaks_alone_and_names_the_first_break(change, line, broke):
    history, steps = healthy()
    change(history, steps)
    checks = lines(history, steps)
    assert [(c.check, c.held, c.broke) for c in checks.values() if c.held is not True] == (
        [(line, False, broke)] if line else []
    )


def test_a_spike_is_measured_against_the_best_so_far():
    history, steps = healthy()
    history["val_loss"] = [1.0, 0.5, 0.6, 0.7, 0.74, 0.76, *[0.4] * 6]  # each a little above the one before
    check = lines(history, steps)[SPIKES]
    assert check.broke == "epoch 6" and "1.52" in check.measured


def test_each_check_names_what_was_measured():
    history, steps = healthy()
    for change in (
        step("rho", [21], 0.08, add=True),
        step("pos", [3], -0.125),
        epoch("skips", [4, 7], 3),
        epoch("recall_at_5", [2], 0.613),
        epoch("val_cos", [2], 0.321),
    ):
        change(history, steps)
    checks = lines(history, steps)
    wanted = {RHO: "0.080", SIGNS: "-0.125", SKIP: "6", RECALL: "61.3%", COSINE: "0.321", MARGIN: "+0.088"}
    assert all(figure in checks[name].measured for name, figure in wanted.items())
    assert "83%" in checks[RECALL].wanted  # chance, §4.1 point 3


def test_a_skipped_step_breaks_the_skip_check_alone():
    history, steps = healthy()
    steps.loc[9, ["skip", "rho", "lambda_eff"]] = [1, 0.0, 0.0]
    epoch("skips", [3], 17)(history, steps)
    assert [name for name, ok in good(history, steps).items() if not ok] == [SKIP]


def test_checks_of_a_directional_loss_do_not_apply_to_p6():
    history, steps = healthy()
    steps[["rho", "lambda_eff"]], steps["rho_target"] = 0.0, math.nan
    checks = good(history, steps, "p6")
    assert {name for name, ok in checks.items() if ok is None} == {RHO, SKIP, LAMBDA}
    assert all(ok for ok in checks.values() if ok is not None)


@pytest.mark.parametrize("name", ["v1", "v2", "v21"])
def test_the_older_rules_aim_at_their_fraction(name):
    """Their ρ_target column holds the fraction that λ aims at."""
    history, steps = healthy()
    assert good(history, steps, name)[RHO] is True
    step("rho", [0], 0.06, add=True)(history, steps)
    assert good(history, steps, name)[RHO] is False


def test_a_share_of_the_gradient_has_its_own_column():
    history, steps = healthy()
    steps["rho"] += 0.3
    assert [good(history, steps, name)[RHO] for name in ("share", "pi", "v22")] == [True, True, False]
    steps.loc[5, "rho_gradient"] += 0.06
    assert good(history, steps, "share")[RHO] is False


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_short_run_is_not_judged_by_epochs_to_come(count):
    checks = good(*healthy(count))
    assert {name for name, ok in checks.items() if ok is None} == {MARGIN, FLIP} and sum(
        map(bool, checks.values())
    ) == 8


@pytest.mark.parametrize("name", known_versions())
def test_every_version_has_a_checklist(name):
    history, steps = healthy()
    assert len(lines(history, steps, name)) == 10
    if name == "v23_unguarded":  # a fixed λ
        checks = good(history, steps.assign(lambda_eff=0.03, rho_target=math.nan), name)
        assert checks[RHO] is None and checks[LAMBDA] is None


def test_a_run_that_always_skipped_had_a_target():
    history, steps = healthy()
    check = lines(history, steps.assign(skip=1, rho=0.0, lambda_eff=0.0))[RHO]
    assert check.held is None and check.measured != lines(history, steps, "p6")[RHO].measured


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
            ]
            rows += [(split, name, *figure) for figure in figures]
        rows.append(("both", name, "E", "difference", 0.01, "E" in own, 0.1))
    table = pd.DataFrame(rows, columns=["split", "predictor", "gate", "measure", "value", "passed", "chance"])
    table["threshold"] = [math.nan if passed is None else 0.0 for passed in table["passed"]]
    return Report("original", table.astype({"passed": "boolean"}), {})


def judge(report=None, run=None, name="v22"):
    return verdict(version(name), (run or healthy())[0], report or made_report())


def met(v):
    return {c["condition"]: c["met"] for c in v.conditions}


CONDITIONS = ["margin, gate A", "gates passed of 5", "R@5 of six", "validation cosine"]


def test_success_needs_all_four_conditions():
    v = judge()
    assert v.success and v.decision == "success"
    assert met(v) == dict.fromkeys(CONDITIONS, True)
    assert [c["threshold"] for c in v.conditions] == [0.0, 3, 0.70, 0.48]
    assert [c["value"] for c in v.conditions] == pytest.approx([0.03, 3, 0.712, 0.50])
    assert [c["chance"] for c in v.conditions] == pytest.approx([-0.3, math.nan, 5 / 6, 0.2], nan_ok=True)
    history, _ = healthy()
    history["margin"] = -0.1  # whatever the history
    assert judge(run=(history, None)).decision == judge(run=(history, None), name="p6").decision == "success"


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
    v = judge(made_report(**good))
    assert v.success and all(met(v).values())
    v = judge(made_report(**bad))
    assert not v.success and v.decision != "success" and f"not met: {condition}" in v.text
    assert [c for c, ok in met(v).items() if not ok] == [condition]


def test_conditions_carry_the_baselines():
    v = judge(made_report(mean=(-0.2, -0.3, 0.51, 0.16, 0.3), copy=(-0.5, -0.6, 0.44, 0.22, 0.84)))
    values = ((-0.2, -0.5), (0, 0), (0.3, 0.84), (0.51, 0.44))
    assert [c["baselines"] for c in v.conditions] == [{"mean": mean, "copy": copy} for mean, copy in values]


def test_a_verdict_can_be_written_as_json(tmp_path):
    report = made_report()
    v = judge(report)
    report.to_json(tmp_path / "fivecat.json", verdict=v.to_dict())
    written = json.loads((tmp_path / "fivecat.json").read_text(encoding="utf-8"))["verdict"]
    assert set(written) == {f.name for f in dataclasses.fields(v)}
    assert written["success"] is True and written["conditions"][1]["chance"] is None
    assert all(type(c["met"]) is bool for c in written["conditions"])


# The decision


def failed(rise=0.05, share=0.1, name="v22", **others):
    """A failed run: the margin's rise from first to last epoch, and mean λ as a share of its ceiling."""
    history, _ = healthy()
    history["margin"] = np.linspace(-0.08, -0.08 + rise, EPOCHS)
    history["lambda_eff"] = share * version(name).control.lambda_max
    return judge(made_report("A", margin=-0.03, **others), (history, None), name)


@pytest.mark.parametrize(
    "rise, share, decision",
    [(0.05, 0.1, "A"), (0.011, 0.9, "A"), (0.009, 0.1, "B"), (-0.04, 0.49, "B"), (0.009, 0.51, "C"), (-0.04, 1.0, "C")],
)
def test_the_option_that_follows_on_failure(rise, share, decision):
    v = failed(rise, share)
    assert not v.success and v.decision == decision and v.why in v.text
    assert f"Option {decision} ({OPTIONS[decision]})" in v.why and OPTIONS[decision] in known_versions()
    own = failed(rise, share, OPTIONS[decision])  # which is not offered to itself
    if own.decision == decision:
        others = [name for name in OPTIONS.values() if name != OPTIONS[decision]]
        assert f"({OPTIONS[decision]})" not in own.why and all(f"({name})" in own.why for name in others)


@pytest.mark.parametrize("rise", [0.0, 0.05])
def test_no_option_follows_without_a_directional_loss(rise):
    decisions = {
        n: failed(rise, name=n) for n in ("p6", "rank", "energy", "two_heads", "committee", "margin", "bounded")
    }
    assert {v.decision for v in decisions.values()} == {"none"}
    assert [n for n, v in decisions.items() if "compared with" in v.why] == ["p6"]  # the reference


@pytest.mark.parametrize("name", ["p6", "v22"])
def test_no_option_follows_where_nothing_was_learned(name):
    constant = {"constant": (-0.1, -0.1, 0.50, 0.1, 0.8)}
    v = failed(name=name, val_cos=0.50, **constant)
    assert v.decision == "none" and "constant" in v.why and "0.500" in v.why
    assert "constant" not in failed(name=name, val_cos=0.51, **constant).why


# The comparison


def test_comparison_has_this_run_the_published_ones_and_the_baselines():
    """Handbook §3: margin (read late), R@5 of six, validation cosine; figures that were not published are empty."""
    simple = {"copy last": (-0.5, -0.6, 0.44, 0.22, 0.84), "mean": (-0.2, -0.3, 0.51, 0.16, 0.3)}
    table = comparison(version("v22"), made_report(of_six=0.73, **simple)).set_index("run")
    nan, measures = math.nan, ["margin, late", "R@5 of six", "val cos", "margin", "novel MRR"]
    assert len(table) == 6
    for run, values in {
        "v22, this run": [0.03 - 0.2, 0.73, 0.50, 0.03, 0.25],
        "p6, original": [-0.082, 0.70, nan, nan, nan],
        "v1, original": [nan, nan, nan, nan, nan],
        "v21, original": [-0.047, 0.769, 0.488, nan, nan],
        "copy last, untrained": [-0.6, 0.84, 0.44, -0.5, 0.22],
        "mean, untrained": [-0.3, 0.30, 0.51, -0.2, 0.16],
    }.items():
        assert table.loc[run, measures].astype(float).tolist() == pytest.approx(values, nan_ok=True), run
    note = table.loc["v1, original", "note"]
    assert "epoch 3" in note and "0.476" in note and "0.049" in note


# The calibrated reading, on predictors whose label is known


@functools.cache
def read(name):
    """The reading of a predictor: of the embedded validation and OOD windows, or of a world with its optimum."""
    if name in ("optimum", "optimum's ranker"):
        optimum = worlds.law("rotation", dim=48).optimal(2)
        data = dataset(worlds.world("rotation", dim=48, articles=60, length=30))
        if name == "optimum":
            return reading(fivecat(optimum, data))
        flees = tricks.tricks(48, 5, 0.4, torch.eye(48)[:8])["mean − a·context[-2]"]
        flees.heads = lambda x: (*flees(x), optimum.heads(x)[2])
        return reading(fivecat(flees, data))
    data = dataset("wikipedia")
    data = {s: getattr(data, s).at_most(200) for s in ("val", "ood")}
    store = data["val"].store
    components = leading_components(store, torch.from_numpy(store.vectors), 8)
    simple = {
        "trick": tricks.tricks(store.dim, 5, 0.4, components)["mean − a·context[-2]"],
        "mean": untrained(store.dim, 5)["mean"],
        "constant": Constant(store.dim, 5, torch.ones(store.dim)),
    }
    return reading(fivecat(simple[name], data))


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
    result = read(name)
    assert result.label == label and LABELS[label] in result.headline
    if name == "trick":
        assert re.search(r"On val \(\d+ articles, 200 windows\) the novel MRR is 0\.\d+ \[", result.text)
        assert "On ood (" in result.text and "Subtracted context vectors" in result.text and "copy last" in result.text


def test_the_reading_includes_the_arrow():
    law = worlds.law("announcing", dim=48, delay=1)
    store = worlds.world("announcing", dim=48, articles=100, length=30, delay=1)
    ways = [dataset(store, direction=d).val for d in ("forward", "backward")]
    result = arrow([law.optimal(2)], [law.reversed().optimal(2)], ways)
    report = fivecat(law.optimal(2), {"val": ways[0]})
    plain, with_arrow = reading(report), reading(report, result)
    assert result.declared == "forward" and with_arrow.sentences[:-1] == plain.sentences
    assert "a forward direction" in with_arrow.sentences[-1] and result.caution in with_arrow.sentences[-1]
