"""The gates of 5CAT: their questions, thresholds and outcomes. The figures that they read come from table.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import pandas as pd

from .health import MATERIAL

GATES = {
    "A": "offset sweep",
    "B": "retrieval",
    "C": "context ablations",
    "D": "rollout",
    "E": "generalisation",
    "F": "arrow of time",
    "G": "health and honesty",
}
UNTRAINED = ("copy last", "mean")

# Profile `original`. (gate, measure): (sense, threshold on validation, threshold on OOD); handbook §4
THRESHOLDS = {
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
GENERALISES = 0.05  # profile `calibrated`: validation and OOD may differ by this in cosine
ABOVE, BELOW, WITHIN = "above 0", "below 0", f"within ± {GENERALISES:g}"


class Question(NamedTuple):
    """A question of profile `calibrated`: where the interval of `measure` has to lie.

    `against`: `all` or `untrained` predictors, of which the best is subtracted on the same windows; `text` names it as
    {other}.
    """

    gate: str
    text: str
    measure: str
    against: str = ""
    wanted: str = ABOVE

    def outcome(self, low: float, high: float) -> str:
        """passed: the interval lies where it is wanted; failed: outside; open: partly; or not measured."""
        good, bad = {
            ABOVE: (low > 0, high <= 0),  # a frozen rollout moves by [0, 0]: failed
            BELOW: (high < 0, low >= 0),
            WITHIN: (low >= -GENERALISES and high <= GENERALISES, low > GENERALISES or high < -GENERALISES),
        }[self.wanted]
        return outcome(good, bad, low)


ORDER = "novel MRR when the context is {}: is order used?"
QUESTIONS = (
    Question("A", "novel margin: against the best chunk beside context and skipped chunk", "novel margin"),
    Question("A", "novel margin, ahead, against the best of the others ({other})", "novel margin, ahead", "all"),
    Question("B", "novel MRR against the best of the others ({other})", "novel MRR", "all"),
    Question("C", ORDER.format("shuffled"), "shuffled, novel MRR", wanted=BELOW),
    Question("C", ORDER.format("reversed"), "reversed, novel MRR", wanted=BELOW),
    Question("D", "mean rollout cosine against {other}, rolled out alike", "mean rollout", "untrained"),
    Question("D", "rolling on against standing still at the first step", "rolling on"),
    Question("E", "cosine, validation − OOD, normal coherence", "difference, normal coherence", wanted=WITHIN),
)


def answers(report, split: str, predictor: str) -> pd.DataFrame:
    """`Report.judgements`: a row for each of QUESTIONS, and one for the margin from leaving the context."""
    rows, missing = [], dict.fromkeys(("value", "low", "high", "articles"), float("nan"))
    alone = without_rivals(report, split, predictor)
    for q in QUESTIONS:
        other = ""
        if q.against:  # gates A, B and D: the difference to the best other predictor, as for gate B's novel MRR
            among = [n for n in UNTRAINED if n != predictor] if q.against == "untrained" else None
            other = report.best_trivial(q.measure, split, among, but=predictor)
            interval = report.paired(q.measure, split, predictor, other)
        elif q.gate == "E":
            both = report.rows("both", predictor)
            both = both[both["measure"] == q.measure]
            interval = both.iloc[0] if len(both) else missing
        else:
            interval = report.row(q.measure, split, predictor)
        interval = missing if alone and "novel MRR" in q.measure else interval
        row = {"gate": q.gate, "question": q.text.format(other=other), **{k: interval[k] for k in missing}}
        rows.append(row | {"wanted": q.wanted, "outcome": q.outcome(interval["low"], interval["high"])})
    articles = report.row("cosine at the target", split, predictor)["articles"]
    honesty = _honesty(report.facts[split, predictor], report.escapes(split, predictor))
    return pd.DataFrame([*rows, honesty | {"articles": articles}])


def without_rivals(report, split: str, predictor: str = "model") -> bool:
    """Whether every target is the only chunk of its article outside the context, so that there is nothing to rank."""
    return report.row("novel MRR", split, predictor)["chance"] == 1.0


def _honesty(facts: Mapping, escapes: bool) -> dict:
    """The row on the margin from leaving the context: little of it is allowed, more only if cosine or rank gain."""
    value, low, high = (facts[f"margin bought{end}"] for end in ("", " low", " high"))
    pays = facts["cosine paid high"] < 0 or facts["novel MRR paid high"] < 0
    harmless = not facts["escape"] and (high < MATERIAL or pays)
    row = {"gate": "G", "question": "margin from leaving the context", "value": value, "low": low, "high": high}
    return row | {"wanted": f"below {MATERIAL:g}, or paid for", "outcome": outcome(harmless, escapes, low)}


def outcome(good: bool, bad: bool, low: float) -> str:
    """One article has no interval (`low` is NaN): then nothing was measured."""
    return "not measured" if math.isnan(low) else "passed" if good else "failed" if bad else "open"


def worst(outcomes: Iterable[str]) -> str:
    """One outcome for several: passed where all are, else the gravest."""
    outcomes = list(outcomes)
    return next((word for word in ("failed", "not measured", "open") if word in outcomes), "passed")


def threshold_of(row: Mapping) -> tuple[float, bool | None]:
    """The threshold of a row's measure on its split, and whether it is reached (by NaN never); (NaN, None) without."""
    if (row["gate"], row["measure"]) not in THRESHOLDS:
        return float("nan"), None
    sense, val, ood = THRESHOLDS[row["gate"], row["measure"]]
    threshold = ood if row["split"] == "ood" else val
    return threshold, bool(row["value"] >= threshold if sense == ">=" else row["value"] <= threshold)
