"""The gates: each side of each threshold, and every outcome of every question, on made figures."""

import math

import numpy as np
import pandas as pd
import pytest
from judge.plain import PLACES, STEPS, T, unflat

from lvmlib.errors import LVMError
from lvmlib.judge.fivecat import Report
from lvmlib.judge.gates import threshold_of

# Profile `original`

PASSES = {  # handbook §4: gate, measure, sense, validation, OOD
    ("A", "margin"): (">=", 0.10, 0.08),
    ("A", "cosine at the target"): (">=", 0.50, 0.48),
    ("B", "R@1"): (">=", 0.55, 0.55),
    ("B", "R@5"): (">=", 0.92, 0.92),
    ("C", "shuffled"): ("<=", -0.15, -0.15),
    ("C", "reversed"): ("<=", -0.10, -0.10),
    ("C", "leave one out"): ("<=", -0.08, -0.08),
    ("C", "last repeated"): ("<=", 0.05, 0.05),
    ("C", "last replaced"): ("<=", 0.05, 0.05),
    ("D", "mean cosine"): (">=", 0.45, 0.42),
    ("E", "difference"): ("<=", 0.05, 0.05),
}
UNJUDGED = [("A", "margin read late"), ("A", "cosine, all windows"), ("B", "MRR"), ("B", "novel R@1")]


def made_original(splits=("val", "ood"), **changed):
    """A report of given values: each on its threshold, but for `changed`, {split: {(gate, measure): value}}."""
    rows = []
    for split in (*splits, "both") if len(splits) > 1 else splits:
        values = {k: v[2 if split == "ood" else 1] for k, v in PASSES.items()} | dict.fromkeys(UNJUDGED, 0.0)
        for (gate, name), value in (values | changed.get(split, {})).items():
            if (gate == "E") == (split == "both"):
                rows.append({"split": split, "predictor": "model", "gate": gate, "measure": name, "value": value})
    judged = [threshold_of(row) for row in rows]
    passed = pd.array([j[1] for j in judged], "boolean")
    report = Report("original", {}, {})
    vars(report)["table"] = pd.DataFrame(rows).assign(threshold=[j[0] for j in judged], passed=passed)
    return report


def test_on_its_threshold_every_gate_passes():
    report = made_original()
    assert report.gates("val") == report.gates("ood") == report.gates() == dict.fromkeys("ABCDE", True)
    table = report.table.set_index(["gate", "measure"])
    assert set(table.index[table["threshold"].isna()]) == set(table.index[table["passed"].isna()]) == set(UNJUDGED)


@pytest.mark.parametrize("gate, name", PASSES)
def test_each_side_of_each_threshold(gate, name):
    sense, *thresholds = PASSES[gate, name]
    worse = -1e-6 if sense == ">=" else 1e-6
    for split in ("both",) if gate == "E" else ("val", "ood"):
        threshold = thresholds[split == "ood"]
        for value, good in ((threshold - worse, True), (threshold + worse, False), (math.nan, False)):
            report = made_original(**{split: {(gate, name): value}})
            row = report.rows(split).set_index(["gate", "measure"]).loc[(gate, name)]
            assert row["threshold"] == threshold and bool(row["passed"]) is good, value
            for s in ("val", "ood"):  # the gate falls on its own split, gate E on both; no other gate with it
                fallen = set() if good or split not in (s, "both") else {gate}
                assert {g for g, ok in report.gates(s).items() if not ok} == fallen
            assert {g for g, ok in report.gates().items() if not ok} == (set() if good else {gate})


def test_an_original_gate_that_was_not_measured_does_not_pass():
    """With one split there is no difference of splits, so gate E is not passed; and no pass on both splits alike."""
    report = made_original(splits=("val",))
    assert report.gates("val") == dict.fromkeys("ABCD", True) | {"E": False}
    with pytest.raises(LVMError, match="ood"):
        report.gates()


# Profile `calibrated`

HARMLESS = {
    "margin bought": 0.0, "margin bought low": 0.0, "margin bought high": 0.0, "escape": False, "effective rank": 3.0,
    "variance": 0.5, "hubness": 1.0, "norm": 1.0, "copying ratio": 1.0,
    "cosine paid high": 0.0, "novel MRR paid high": 0.0,
}  # fmt: skip


def noise(random, articles, level, wide=False):
    """(12·articles,) `level` and a little noise; `wide`: articles so different that nothing is beyond doubt."""
    own = random.standard_normal(articles).repeat(12) if wide else 0.0
    return level + 0.01 * random.standard_normal(12 * articles) + own


def made(model=None, ood=None, splits=("val", "ood"), facts=None, wide=(), **others):
    """A report of made figures. The model is better than both baselines in everything that a gate asks, but for the
    columns given in `model` (on every split) and `ood` (there too); `wide`: columns without a clear answer; `others`:
    novel ranks of baselines."""
    random = np.random.default_rng(0)
    columns = [c for c in PLACES if c not in ("article", "target")]
    frames = {}
    for place, split in enumerate(splits):
        for name in ("model", "copy last", "mean"):
            level = dict.fromkeys(columns, 0.3) | {"hundred": 0.5, "coherence": 0.5}
            level["cosine"] = 0.6 if name == "model" else 0.5
            level |= {c: 30.0 for c in columns if "candidates" in c} | {c: 9.0 for c in columns if "rank" in c}
            if name == "model":
                level |= {f"rollout {h}": 0.5 for h in STEPS} | {"novel rank": 2.0}
                level |= {"shuffled, novel MRR": -0.2, "reversed, novel MRR": -0.2}
                level |= (model or {}) | ((ood or {}) if split == "ood" else {})
            level["novel rank"] = others.get(name.replace(" ", "_"), level["novel rank"])
            frame = {c: noise(random, 8, level[c], name == "model" and c in wide) for c in columns}
            frame |= {c: v.clip(1) for c, v in frame.items() if "rank" in c}
            frame |= {c: np.round(v) for c, v in frame.items() if "candidates" in c or c == "hundred"}
            article = np.arange(8).repeat(12) + 100 * place
            frames[split, name] = unflat({"article": article, "target": np.arange(96), **frame})
    every = {key: HARMLESS | ((facts or {}) if key[1] == "model" else {}) for key in frames}
    return Report("calibrated", frames, every, 2, T)


def test_a_model_that_is_better_in_all_passes_every_calibrated_gate():
    report = made()
    assert report.gates("val") == report.gates("ood") == report.gates() == dict.fromkeys("ABCDEG", "passed")
    assert list(report.judgements("val")["gate"]) == list("AABCCDDEG")


OUTCOMES = [  # gate, columns of the model, those without a clear answer, facts, outcome
    ("A", {"cosine": 0.1}, (), {}, "failed"),
    ("A", {}, ("cosine",), {}, "open"),
    ("B", {"novel rank": 20.0}, (), {}, "failed"),
    ("B", {"novel rank": 9.0}, (), {}, "open"),
    ("C", {"shuffled, novel MRR": 0.1}, (), {}, "failed"),
    ("C", {"reversed, novel MRR": 0.1}, (), {}, "failed"),
    ("C", {}, ("reversed, novel MRR",), {}, "open"),
    ("C", {"shuffled, novel MRR": 0.1}, ("reversed, novel MRR",), {}, "failed"),
    ("D", {f"rollout {h}": 0.1 for h in STEPS} | {f"rollout still {h}": 0.0 for h in STEPS}, (), {}, "failed"),
    ("D", {f"rollout still {h}": 0.9 for h in STEPS}, (), {}, "failed"),
    ("D", {f"rollout still {h}": 0.5 for h in STEPS}, ("rollout still 3",), {}, "open"),
    ("D", {"rollout 5": math.nan}, (), {}, "not measured"),
    ("G", {}, (), {"escape": True, "margin bought": 0.1}, "failed"),
    ("G", {}, (), {"margin bought": 0.01, "margin bought low": -0.01, "margin bought high": 0.03}, "open"),
    ("G", {}, (), {"margin bought": 0.1, "margin bought high": 0.2, "cosine paid high": -0.1}, "passed"),
    ("G", {}, (), {"margin bought": math.nan, "margin bought low": math.nan}, "not measured"),
]


@pytest.mark.parametrize("gate, model, wide, facts, outcome", OUTCOMES)
def test_every_outcome_of_a_calibrated_gate(gate, model, wide, facts, outcome):
    report = made(model, wide=wide, facts=facts)
    wanted = dict.fromkeys("ABCDEG", "passed") | {gate: outcome}
    if "cosine" in wide:
        wanted["E"] = "open"  # the same cosine
    assert report.gates("val") == wanted
    assert report.gates() == wanted  # on both splits alike


@pytest.mark.parametrize("shift, outcome", [(0.0, "passed"), (0.2, "failed"), (-0.2, "failed"), (0.05, "open")])
def test_every_outcome_of_calibrated_generalisation(shift, outcome):
    report = made(ood={"cosine": 0.6 + shift})
    assert report.gates("val")["E"] == report.gates("ood")["E"] == report.gates()["E"] == outcome


@pytest.mark.parametrize("splits", [("val",), ("ood",), ("mine", "yours")])
def test_without_both_splits_generalisation_is_not_measured(splits):
    report = made(splits=splits)
    wanted = dict.fromkeys("ABCDG", "passed") | {"E": "not measured"}
    assert report.gates(splits[0]) == report.gates() == wanted and "both" not in set(report.table["split"])


@pytest.mark.parametrize("rank, outcome", [(20.0, "failed"), (9.0, "open")])
def test_the_worst_split_decides(rank, outcome):
    report = made(ood={"novel rank": rank})
    assert [report.gates(s)["B"] for s in ("val", "ood", None)] == ["passed", outcome, outcome]


def test_the_best_baseline_is_never_the_one_that_is_asked_about():
    report = made(mean=3.0, copy_last=2.5)
    assert report.best_trivial("novel MRR") == "copy last"
    assert report.best_trivial("novel MRR", but="copy last") == "mean"
    assert report.best_trivial("novel MRR", among=["mean"]) == "mean"
    questions = {p: report.judgements("val", p)["question"].str.cat() for p in ("model", "copy last", "mean")}
    assert "(copy last)" in questions["model"] and "(copy last)" in questions["mean"]
    assert "(mean)" in questions["copy last"]
    assert report.gates("val", "mean")["B"] == "failed" and report.gates("val", "copy last")["B"] == "passed"
