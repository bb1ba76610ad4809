"""The checklist line by line, the verdict's conditions on each side of their thresholds, and every decision."""

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
from lvmlib.judge.rating import LABELS

EPOCHS, ROWS = 12, 4  # logged steps an epoch
V22_TARGETS = [0.15, 0.15, 0.25, 0.25, *[0.35] * 8]  # handbook §3, epoch by epoch

RHO, SKIP, SIGNS, GAP, LAMBDA = (
    "ρ on its target",
    "no batch skipped by the guard",
    "both cosines positive",
    "gap climbing",
    "λ_eff moving",
)
MARGIN, RECALL, COSINE, SPIKES, FLIP = (
    "margin climbing",
    "R@5 of six kept",
    "validation cosine kept",
    "no spikes",
    "on its way at epoch 6",
)


def healthy(epochs=EPOCHS):
    """(history, steps) of a run where all is as the handbook wishes."""
    e = np.arange(1, epochs + 1)
    history = pd.DataFrame(
        {
            "epoch": e,
            "val_loss": 1.0 / (1 + e),
            "val_cos": 0.48 + 0.001 * e,
            "margin": -0.04 + 0.008 * (e - 1),
            "recall_at_5": 0.70 + 0.001 * e,
            "skips": 0,
            "lambda_eff": 0.005,
        }
    )
    n = ROWS * epochs
    steps = pd.DataFrame(
        {
            "epoch": np.repeat(e, ROWS),
            "step": 1 + 100 * np.arange(n),
            "lambda_eff": 0.001 + 0.0002 * np.arange(n),
            "rho": np.repeat(V22_TARGETS[:epochs], ROWS),
            "rho_gradient": np.repeat(V22_TARGETS[:epochs], ROWS),
            "rho_target": np.repeat(V22_TARGETS[:epochs], ROWS),
            "pos": 0.4,
            "neg": 0.3,
            "gap": -0.1 + 0.002 * np.arange(n),
            "skip": 0,
        }
    )
    return history, steps


def lines(history, steps, name="v22", **top):
    checks = checklist(version(name, **top), history, steps)
    assert len({c.check for c in checks}) == len(checks)
    return {c.check: c for c in checks}


def held(history, steps, name="v22"):
    return {name: c.held for name, c in lines(history, steps, name).items()}


# The checklist: handbook §3, "What is watched"


def test_a_healthy_run_holds_every_line():
    found = lines(*healthy())
    assert set(found) == {RHO, SKIP, SIGNS, GAP, LAMBDA, MARGIN, RECALL, COSINE, SPIKES, FLIP}
    assert {c.check for c in found.values() if c.every == "step"} == {RHO, SKIP, SIGNS, GAP, LAMBDA}
    assert {c.check for c in found.values() if c.every == "epoch"} == {MARGIN, RECALL, COSINE, SPIKES, FLIP}
    assert all(c.held is True and c.broke == "" for c in found.values()), found


def set_step(column, rows, value):
    def change(history, steps):
        steps.loc[rows, column] = value

    return change


def add_step(column, rows, value):
    def change(history, steps):
        steps.loc[rows, column] += value

    return change


def set_epoch(column, epochs, value):
    def change(history, steps):
        history.loc[history["epoch"].isin(epochs), column] = value

    return change


def slope(per_epoch, start=-0.02):
    def change(history, steps):
        history["margin"] = start + per_epoch * (history["epoch"] - 1)

    return change


def falling_back(history, steps):
    history.loc[history["epoch"] >= 8, "margin"] -= 0.06


def spike(factor):
    def change(history, steps):
        best = history["val_loss"][:8].min()
        history.loc[history["epoch"] == 9, "val_loss"] = factor * best

    return change


def gap_shut(history, steps):
    steps["gap"] = -steps["gap"]


def gap_dips_between(history, steps):
    steps.loc[len(steps) // 3 + 1 : 2 * len(steps) // 3 - 2, "gap"] = -0.9


def at_flip(margin):
    def change(history, steps):
        history["margin"] = margin + 0.02 * (history["epoch"] - 6)

    return change


BROKEN = [  # what is done to a healthy run, the line that breaks, the first break
    pytest.param(add_step("rho", [21, 30], 0.051), RHO, "step 2101, epoch 6", id="rho above"),
    pytest.param(add_step("rho", [3, 40], -0.051), RHO, "step 301, epoch 1", id="rho below"),
    pytest.param(set_step("rho", [9], math.nan), RHO, "step 901, epoch 3", id="rho unknown"),
    pytest.param(set_epoch("skips", [4, 7], 3), SKIP, "epoch 4", id="skips"),
    pytest.param(set_step("pos", [13], -0.01), SIGNS, "step 1301, epoch 4", id="pos negative"),
    pytest.param(set_step("neg", [14, 15], 0.0), SIGNS, "step 1401, epoch 4", id="neg zero"),
    pytest.param(gap_shut, GAP, None, id="gap falls"),
    pytest.param(set_step("gap", slice(None), 0.1), GAP, None, id="gap stands"),
    pytest.param(set_step("lambda_eff", slice(None), 0.02), LAMBDA, None, id="lambda stands"),
    pytest.param(slope(0.003), MARGIN, "epoch 4", id="margin climbs too slowly"),
    pytest.param(falling_back, MARGIN, "epoch 8", id="margin falls back"),
    pytest.param(set_epoch("recall_at_5", [5, 11], 0.699), RECALL, "epoch 5", id="recall"),
    pytest.param(set_epoch("val_cos", [12], 0.479), COSINE, "epoch 12", id="cosine"),
    pytest.param(set_epoch("val_cos", [3], math.nan), COSINE, "epoch 3", id="cosine unknown"),
    pytest.param(spike(1.51), SPIKES, "epoch 9", id="spike"),
    pytest.param(at_flip(-0.021), FLIP, None, id="behind at epoch 6"),
]
UNBROKEN = [
    pytest.param(add_step("rho", slice(None), 0.0499), id="rho just above"),
    pytest.param(add_step("rho", slice(None), -0.0499), id="rho just below"),
    pytest.param(set_step("neg", slice(None), 1e-6), id="neg just positive"),
    pytest.param(gap_dips_between, id="gap dips on the way"),
    pytest.param(slope(0.004), id="margin climbs 0.012 in three epochs"),
    pytest.param(set_epoch("recall_at_5", [5], 0.70), id="recall on its threshold"),
    pytest.param(set_epoch("val_cos", [5], 0.48), id="cosine on its threshold"),
    pytest.param(spike(1.49), id="a small spike"),
    pytest.param(at_flip(-0.02), id="epoch 6 on its threshold"),
]


@pytest.mark.parametrize("change, line, broke", BROKEN)
def test_each_line_breaks_alone_and_names_the_first_break(change, line, broke):
    history, steps = healthy()
    change(history, steps)
    found = lines(history, steps)
    assert [c.check for c in found.values() if c.held is not True] == [line]
    assert found[line].held is False
    if broke is not None:
        assert found[line].broke == broke


@pytest.mark.parametrize("change", UNBROKEN)
def test_just_inside_every_line_holds(change):
    history, steps = healthy()
    change(history, steps)
    assert all(held(history, steps).values()), held(history, steps)


def test_a_spike_is_against_the_best_so_far_not_the_epoch_before():
    history, steps = healthy()
    history["val_loss"] = [1.0, 0.5, 0.6, 0.7, 0.74, 0.76, *[0.4] * 6]  # each a little above the one before
    assert lines(history, steps)[SPIKES].broke == "epoch 6"
    assert "1.52" in lines(history, steps)[SPIKES].measured


def test_what_was_measured_is_said():
    history, steps = healthy()
    add_step("rho", [21], 0.08)(history, steps)
    set_step("pos", [3], -0.125)(history, steps)
    set_epoch("skips", [4, 7], 3)(history, steps)
    set_epoch("recall_at_5", [2], 0.613)(history, steps)
    set_epoch("val_cos", [2], 0.321)(history, steps)
    found = {name: c.measured for name, c in lines(history, steps).items()}
    for line, said in (
        (RHO, "0.080"),
        (SIGNS, "-0.125"),
        (SKIP, "6"),
        (RECALL, "61.3%"),
        (COSINE, "0.321"),
        (MARGIN, "+0.088"),
        (FLIP, "+0.000"),
    ):
        assert said in found[line], (line, found[line])
    assert "chance 83%" in lines(history, steps)[RECALL].wanted  # §4.1 point 3


def test_a_skipped_step_breaks_the_skip_line_and_not_rho():
    history, steps = healthy()
    steps.loc[9, ["skip", "rho", "lambda_eff"]] = [1, 0.0, 0.0]
    set_epoch("skips", [3], 17)(history, steps)
    assert [name for name, ok in held(history, steps).items() if not ok] == [SKIP]


def test_nothing_about_a_directional_loss_is_asked_of_p6():
    history, steps = healthy()
    steps[["rho", "lambda_eff"]], steps["rho_target"] = 0.0, math.nan
    found = held(history, steps, "p6")
    assert {name for name, ok in found.items() if ok is None} == {RHO, SKIP, LAMBDA}
    assert all(ok for ok in found.values() if ok is not None)
    assert all(c.broke == "" for c in lines(history, steps, "p6").values())


@pytest.mark.parametrize("name", ["v1", "v2", "v21"])
def test_the_older_rules_are_held_to_their_fraction(name):
    """Their ρ_target column holds the fraction that λ aims at."""
    history, steps = healthy()
    assert held(history, steps, name)[RHO] is True
    add_step("rho", [0], 0.06)(history, steps)
    assert held(history, steps, name)[RHO] is False


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_short_run_is_not_judged_by_what_it_has_not_reached(epochs):
    found = held(*healthy(epochs))
    assert found[MARGIN] is None and found[FLIP] is None
    assert all(found[name] for name in (RHO, SKIP, SIGNS, GAP, LAMBDA, RECALL, COSINE, SPIKES))
    assert lines(*healthy(epochs))[FLIP].measured == "not reached"


@pytest.mark.parametrize("name", [n for n in known_versions() if n != "v23_unguarded"])
def test_every_version_has_a_checklist(name):
    assert len(lines(*healthy(), name)) == 10


def test_a_fixed_lambda_is_not_asked_to_move():
    history, steps = healthy()
    steps["lambda_eff"], steps["rho_target"] = 0.03, math.nan
    found = held(history, steps, "v23_unguarded")
    assert found[RHO] is None and found[LAMBDA] is None


def test_a_run_that_never_pulled_does_not_say_that_it_had_no_target():
    history, steps = healthy()
    steps["skip"], steps["rho"], steps["lambda_eff"] = 1, 0.0, 0.0
    assert "no target" not in lines(history, steps)[RHO].measured


def test_behind_at_epoch_6_is_a_break_at_epoch_6():
    history, steps = healthy()
    at_flip(-0.03)(history, steps)
    assert lines(history, steps)[FLIP].broke == "epoch 6"


# The verdict


def made_report(gates="ABC", margin=0.03, val_cos=0.50, ood_gates="ABCDE", of_six=0.712, **others):
    """A report where the model passes `gates`; `others`: {predictor: (margin, late, cosine, novel MRR, of six)}."""
    rows = []

    def row(split, predictor, gate, measure, value, passed=None, chance=0.1):
        threshold = math.nan if passed is None else 0.0
        rows.append((split, predictor, gate, measure, value, chance, threshold, passed))

    predictors = {"model": (margin, margin - 0.2, val_cos, 0.25, of_six), **others}
    for name, (its_margin, late, cosine, mrr, six) in predictors.items():
        for split, passes in (("val", gates if name == "model" else ""), ("ood", ood_gates)):
            off = 0.0 if split == "val" else 7.0  # what stands on OOD must not be taken for validation
            row(split, name, "A", "margin", its_margin + off, "A" in passes, chance=-0.3)
            row(split, name, "A", "cosine at the target", cosine + off, "A" in passes)
            row(split, name, "A", "margin read late", late + off)
            row(split, name, "A", "cosine, all windows", cosine + off, chance=0.2)
            row(split, name, "B", "R@1", 0.5, "B" in passes)
            row(split, name, "B", "R@5", 0.5, True)  # one threshold of two is not the gate
            row(split, name, "B", "novel MRR", mrr + off)
            row(split, name, "B", "R@5 of six", six + off, chance=5 / 6)
            row(split, name, "A", "margin against the last", its_margin / 2 + off)
            row(split, name, "C", "shuffled", -0.2, "C" in passes)
            row(split, name, "D", "mean cosine", 0.4, "D" in passes)
        row("both", name, "E", "difference", 0.01, "E" in (gates if name == "model" else ""))
    columns = ["split", "predictor", "gate", "measure", "value", "chance", "threshold", "passed"]
    table = pd.DataFrame(rows, columns=columns).astype({"passed": "boolean"})
    return Report("original", table, {})


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
    assert v.text.startswith("v22: success") and "A, B, C" in v.text
    for follows in ("export", "OOD", "benchmark"):
        assert follows in v.why


@pytest.mark.parametrize(
    "condition, good, bad",
    [
        ("margin, gate A", {"report": made_report(margin=1e-9)}, {"report": made_report(margin=0.0)}),
        ("margin, gate A", {"report": made_report(margin=0.5)}, {"report": made_report(margin=math.nan)}),
        ("gates passed of 5", {"report": made_report("ACE")}, {"report": made_report("AC")}),
        ("gates passed of 5", {"report": made_report("ABCDE")}, {"report": made_report("")}),
        ("R@5 of six", {"report": made_report(of_six=0.70)}, {"report": made_report(of_six=0.699)}),
        ("validation cosine", {"report": made_report(val_cos=0.48)}, {"report": made_report(val_cos=0.4799)}),
        ("validation cosine", {"report": made_report(val_cos=0.6)}, {"report": made_report(val_cos=math.nan)}),
    ],
)
def test_each_condition_on_each_side(condition, good, bad):
    v = judge(**good)
    assert v.success and all(met(v).values())
    v = judge(**bad)
    assert not v.success and v.decision != "success"
    assert [c for c, ok in met(v).items() if not ok] == [condition]
    assert "no success" in v.text and f"not met: {condition}" in v.text


def test_a_gate_counts_where_it_passes_on_validation_and_on_ood():
    assert judge(made_report("ABC", ood_gates="ABCD")).success
    assert not judge(made_report("ABC", ood_gates="AB")).success
    assert not judge(made_report("A", ood_gates="ABCD")).success


def test_conditions_carry_the_baselines():
    v = judge(made_report(mean=(-0.2, -0.3, 0.51, 0.16, 0.3), copy=(-0.5, -0.6, 0.44, 0.22, 0.84)))
    beside = {c["condition"]: c["baselines"] for c in v.conditions}
    assert beside["margin, gate A"] == {"mean": -0.2, "copy": -0.5}
    assert beside["validation cosine"] == {"mean": 0.51, "copy": 0.44}
    assert beside["R@5 of six"] == {"mean": 0.3, "copy": 0.84}
    assert beside["gates passed of 5"] == {"mean": 0, "copy": 0}


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
    "run, decision",
    [
        ({"rise": 0.05}, "A"),
        ({"rise": 0.011, "share": 0.9}, "A"),
        ({"rise": 0.009, "share": 0.1}, "B"),
        ({"rise": -0.04, "share": 0.49}, "B"),
        ({"rise": 0.009, "share": 0.51}, "C"),
        ({"rise": -0.04, "share": 1.0}, "C"),
    ],
)
def test_the_option_that_follows_on_failure(run, decision):
    v = failed(**run)
    assert not v.success and v.decision == decision
    option = {"A": "v23", "B": "v23_unguarded", "C": "v23_forward"}[decision]
    assert f"Option {decision} ({option})" in v.why and option in known_versions()
    assert v.why in v.text


@pytest.mark.parametrize("run", [{"rise": 0.0}, {"rise": 0.05}])
def test_no_option_follows_without_a_directional_loss(run):
    v = failed(**run, name="p6")
    assert v.decision == "none" and "no directional loss" in v.why
    assert "what the others are compared with" in v.why
    assert all(
        "compared with" not in failed(**run, name=name).why
        for name in ("rank", "energy", "two_heads", "committee", "margin")
    )


@pytest.mark.parametrize("name", ["p6", "v22"])
def test_no_option_follows_where_nothing_was_learned(name):
    constant = {"constant": (-0.1, -0.1, 0.50, 0.1, 0.8)}
    v = failed(name=name, val_cos=0.50, **constant)
    assert v.decision == "none" and "Nothing was learned" in v.why and "0.500" in v.why
    assert "Nothing was learned" not in failed(name=name, val_cos=0.51, **constant).why


def test_success_needs_no_option_whatever_the_history_says():
    history, _ = healthy()
    history["margin"] = -0.1
    assert judge(run=(history, None)).decision == "success"
    assert judge(run=(history, None), name="p6").decision == "success"


@pytest.mark.parametrize(
    "name, run",
    [
        ("v23", {"rise": 0.05}),
        ("v23_forward", {"rise": 0.0, "share": 0.9}),
        ("v23_unguarded", {"rise": 0.0, "share": 0.2}),
    ],
)
def test_no_option_is_offered_to_itself(name, run):
    why = failed(**run, name=name).why
    assert f"({name})" not in why and "which this version is" in why


# The comparison


@pytest.fixture
def compared():
    report = made_report(
        of_six=0.73, **{"copy last": (-0.5, -0.6, 0.44, 0.22, 0.84), "mean": (-0.2, -0.3, 0.51, 0.16, 0.3)}
    )
    return comparison(version("v22"), report).set_index("run")


def test_comparison_has_the_published_figures(compared):
    """Handbook §3: margin (read late), R@5 of six, validation cosine; what the original did not give is empty."""
    published = compared.loc[[f"{n}, original" for n in ("p6", "v1", "v21")]]
    numbers = published[["margin, late", "R@5 of six", "val cos"]].to_numpy()
    nan = math.nan
    np.testing.assert_array_equal(numbers, [[-0.082, 0.70, nan], [nan, nan, nan], [-0.047, 0.769, 0.488]])
    assert published[["margin", "novel MRR"]].isna().all(axis=None)
    note = compared.loc["v1, original", "note"]
    assert "collapsed in epoch 3" in note and "0.476" in note and "0.049" in note


def test_comparison_has_this_run_and_the_trivial_predictors_by_the_same_measures(compared):
    measures = ["margin, late", "R@5 of six", "val cos", "margin", "novel MRR"]
    for run, values in (
        ("v22, this run", [0.03 - 0.2, 0.73, 0.50, 0.03, 0.25]),
        ("copy last, untrained", [-0.6, 0.84, 0.44, -0.5, 0.22]),
        ("mean, untrained", [-0.3, 0.30, 0.51, -0.2, 0.16]),
    ):
        assert compared.loc[run, measures].astype(float).tolist() == pytest.approx(values), run
    assert len(compared) == 6
    assert all(compared[m].dtype == float for m in measures)


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
def test_the_reading_names_what_is_known(name, label):
    found = read(name)
    assert found.label == label and LABELS[label] in found.headline


def test_the_reading_says_its_numbers_and_articles():
    text = read("trick").text
    assert re.search(r"On val \(\d+ articles, 200 windows\) the novel MRR is 0\.\d+ \[", text) and "On ood (" in text
    assert "Subtracted context vectors" in text and "copy last" in text


def test_the_reading_tells_of_the_arrow():
    law = worlds.law("announcing", dim=48, delay=1)
    store = worlds.world("announcing", dim=48, articles=100, length=30, delay=1)
    ways = [dataset(store, direction=d).val for d in ("forward", "backward")]
    found = arrow([law.optimal(2)], [law.reversed().optimal(2)], ways)
    report = fivecat(law.optimal(2), {"val": ways[0]})
    assert found.declared == "forward"
    assert "a forward direction" in reading(report, found).text and "one seed" in reading(report, found).text
    assert "Arrow" not in reading(report).text


def test_a_share_of_the_gradient_is_held_to_its_target_and_that_of_the_value_is_not():
    history, steps = healthy()
    steps["rho"] += 0.3
    assert held(history, steps, "share")["ρ on its target"] is True is held(history, steps, "pi")["ρ on its target"]
    assert held(history, steps, "v22")["ρ on its target"] is False
    steps.loc[5, "rho_gradient"] += 0.06
    assert held(history, steps, "share")["ρ on its target"] is False


@pytest.mark.parametrize("name", ["bounded", "margin"])
def test_no_option_of_the_original_follows_for_a_constrained_version(name):
    assert failed(name=name).decision == "none"
