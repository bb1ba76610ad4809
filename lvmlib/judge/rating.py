"""Conclusions from a run's figures: the monitoring checklist, the verdict, the decision, the reading (handbook §3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..config import Version
from ..config import version as load_version
from ..controller import by_gradient
from ..evaluate import COLLAPSED
from ..statistics import few
from .arrow import Arrow
from .fivecat import Report

# What the original called healthy and successful.
RHO_TOLERANCE = 0.05
MARGIN_RISE, RISE_EPOCHS = 0.01, 3
RECALL, VAL_COS, GATES_PASSED = 0.70, 0.48, 3
FLIP_EPOCH, FLIP_MARGIN = 6, -0.02
OPTIONS = {"A": "v23", "B": "v23_unguarded", "C": "v23_forward"}  # what follows if v22 fails
SPIKE = 1.5  # ours: a validation loss this many times the best before it is a spike


# The checklist


@dataclass(frozen=True)
class Check:
    """A line of the checklist. `held` is None where the version has no such quantity; `broke` names the first break."""

    every: str  # "step" or "epoch"
    check: str
    wanted: str
    measured: str
    held: bool | None
    broke: str = ""


# What was measured, and whether it is good: a boolean for each row of a table, one for the whole run, or None.
Test = tuple[str, pd.Series | bool | None]


def _rho(version: Version, epochs: pd.DataFrame, steps: pd.DataFrame) -> Test:
    acting = steps[steps["skip"] == 0]
    if version.control.rule in ("none", "fixed") or steps["rho_target"].isna().all():
        return "no target", None
    if acting.empty:
        return "every logged batch skipped", None
    miss = (acting["rho_gradient" if by_gradient(version.control) else "rho"] - acting["rho_target"]).abs()
    return f"largest miss {miss.max():.3f}", miss <= RHO_TOLERANCE


def _skips(version: Version, epochs: pd.DataFrame, steps: pd.DataFrame) -> Test:
    if version.control.rule == "none":
        return "no directional loss", None
    return f"{int(epochs['skips'].sum())} batches skipped", epochs["skips"] == 0


def _signs(version: Version, epochs: pd.DataFrame, steps: pd.DataFrame) -> Test:
    pos, neg = steps["pos"], steps["neg"]
    return f"lowest pos {pos.min():+.3f}, neg {neg.min():+.3f}", (pos > 0) & (neg > 0)


def _gap(version: Version, epochs: pd.DataFrame, steps: pd.DataFrame) -> Test:
    gap, third = steps["gap"], max(len(steps) // 3, 1)
    rise = gap.tail(third).mean() - gap.head(third).mean()
    return f"{rise:+.4f}", bool(rise > 0)


def _lambda(version: Version, epochs: pd.DataFrame, steps: pd.DataFrame) -> Test:
    if version.control.rule in ("none", "fixed"):
        return ("fixed by design" if version.control.rule == "fixed" else "no directional loss"), None
    used = steps.loc[steps["skip"] == 0, "lambda_eff"]
    varies = used.std() / max(used.mean(), 1e-12) if len(used) > 1 else math.nan
    return f"coefficient of variation {varies:.2f}", bool(varies >= 0.01) if math.isfinite(varies) else None


def _margin(version: Version, epochs: pd.DataFrame, steps: pd.DataFrame) -> Test:
    margin = epochs["margin"]
    rises = margin.diff(RISE_EPOCHS).iloc[RISE_EPOCHS:] >= MARGIN_RISE
    return f"{margin.iloc[-1] - margin.iloc[0]:+.3f} over {len(margin)} epochs", rises if len(rises) else None


def _lowest(column: str, form: str, threshold: float) -> Callable[..., Test]:
    return lambda version, epochs, steps: (f"lowest {epochs[column].min():{form}}", epochs[column] >= threshold)


def _spikes(version: Version, epochs: pd.DataFrame, steps: pd.DataFrame) -> Test:
    loss = epochs["val_loss"]
    best_before = np.minimum.accumulate(np.r_[loss[:1], loss[:-1]])
    return f"largest {np.max(loss.to_numpy() / best_before):.2f} ×", loss <= SPIKE * best_before


def _flip(version: Version, epochs: pd.DataFrame, steps: pd.DataFrame) -> Test:
    margin = epochs.loc[epochs["epoch"] == FLIP_EPOCH, "margin"]
    if margin.empty:
        return "not reached", None
    return f"{margin.iloc[0]:+.3f}{': consider v2.3' * bool(margin.iloc[0] < FLIP_MARGIN)}", margin >= FLIP_MARGIN


CHECKS = (  # every, check, wanted, test, and the table that its booleans are for
    ("step", "ρ on its target", f"|ρ − target| ≤ {RHO_TOLERANCE}", _rho, "steps"),
    ("step", "no batch skipped by the guard", "0 skips", _skips, "epochs"),
    ("step", "both cosines positive", "pos > 0 and neg > 0", _signs, "steps"),
    ("step", "gap climbing", "last third above first third", _gap, "steps"),
    ("step", "λ_eff moving", "varies by 1 % or more", _lambda, "steps"),
    ("epoch", "margin climbing", f"up ≥ {MARGIN_RISE} every {RISE_EPOCHS} epochs", _margin, "epochs"),
    ("epoch", "R@5 of six kept", f"≥ {RECALL:.0%} (chance {{:.0%}})", _lowest("recall_at_5", ".1%", RECALL), "epochs"),
    ("epoch", "validation cosine kept", f"≥ {VAL_COS}", _lowest("val_cos", ".3f", VAL_COS), "epochs"),
    ("epoch", "no spikes", f"validation loss ≤ {SPIKE} × the best before it", _spikes, "epochs"),
    ("epoch", f"on its way at epoch {FLIP_EPOCH}", f"margin ≥ {FLIP_MARGIN}", _flip, "epochs"),
)


def checklist(version: Version, history: pd.DataFrame, steps: pd.DataFrame) -> list[Check]:
    """Return the monitoring checklist of the logged steps and epochs so far. Needs at least one row of each."""
    chance, checks = min(5 / (version.context_length + 1), 1), []
    for every, check, wanted, test, table in CHECKS:
        measured, good = test(version, history, steps)
        bad = (history if table == "epochs" else steps).iloc[:0]
        if isinstance(good, pd.Series):
            bad = (history if table == "epochs" else steps).loc[good.index[~good]]
            good = bad.empty
        step = f"step {int(bad['step'].iloc[0])}, " if table == "steps" and len(bad) else ""
        broke = f"{step}epoch {int(bad['epoch'].iloc[0])}" if len(bad) else ""
        checks.append(Check(every, check, wanted.format(chance), measured, good, broke))
    return checks


# The verdict


@dataclass(frozen=True)
class Verdict:
    """Success conditions with their values; the decision (`success`, `A`, `B`, `C` or `none`) and why it follows."""

    success: bool
    conditions: list[dict[str, Any]]
    decision: str
    why: str
    text: str

    def to_dict(self) -> dict:
        return asdict(self)


CONDITIONS = (  # name, gate and measure, threshold; the value must be above the margin's threshold, or reach the others
    ("margin, gate A", ("A", "margin"), 0.0),
    ("gates passed of 5", None, GATES_PASSED),
    ("R@5 of six", ("B", "R@5 of six"), RECALL),
    ("validation cosine", ("A", "cosine, all windows"), VAL_COS),
)


def verdict(version: Version, history: pd.DataFrame, report: Report) -> Verdict:
    """Return the original's success conditions, and the decision that follows.

    Margin and cosine are of validation; a gate counts where it passes on validation and on OOD. The margin is gate A's
    with the target at offset 0, not the one read late.

    The rule for A, B and C is ours, since the original left it to judgement. On failure: none of them where the cosine
    is not above a constant's; else **A** (a slower ramp) where the per-epoch margin rose by 0.01 or more; else **B** (a
    fixed λ) where the control kept λ below half of its ceiling on average; else **C** (data with a known forward bias).
    """
    report = report.original
    gates = report.gates()
    baselines = [p for p in report.table["predictor"].unique() if p != "model"]
    conditions = []
    for name, figure, threshold in CONDITIONS:
        if figure is None:
            value, chance = sum(gates.values()), math.nan
            beside = {p: sum(report.gates(predictor=p).values()) for p in baselines}
        else:
            gate, measure = figure
            row = report.row(measure, gate=gate)
            value, chance = float(row["value"]), float(row["chance"])
            beside = {p: report.value(measure, "val", p, gate) for p in baselines}
        met = value > threshold if name == "margin, gate A" else value >= threshold
        condition = {"condition": name, "value": value, "threshold": threshold, "met": met}
        conditions.append(condition | {"chance": chance, "baselines": beside})
    success = all(c["met"] for c in conditions)
    decision, why = _decide(version, history, report, success)
    margin, count, of_six, val_cos = (c["value"] for c in conditions)
    failed = [c["condition"] for c in conditions if not c["met"]]
    text = (
        f"{version.name}: {'success' if success else 'no success'} by the original's conditions: margin {margin:+.3f}, "
        f"{count} of 5 gates ({', '.join(g for g, ok in gates.items() if ok) or 'none'}), "
        f"R@5 of six {of_six:.1%}, validation cosine {val_cos:.3f}"
        f"{'; not met: ' * bool(failed)}{', '.join(failed)}. {why}"
    )
    return Verdict(success, conditions, decision, why, text)


def _decide(version: Version, history: pd.DataFrame, report: Report, success: bool) -> tuple[str, str]:
    if success:
        return "success", "Next: export the model, extend 5CAT on OOD, benchmark inference."
    if "constant" in set(report.table["predictor"]):
        cosine, constant = (report.value("cosine, all windows", predictor=p) for p in ("model", "constant"))
        if cosine <= constant:
            return "none", (
                f"Nothing was learned that a constant vector does not know (its cosine is {constant:.3f}): neither "
                "margin nor R@5 says anything yet, and no option follows. Train longer, on more data, or a smaller "
                "model (amn) first."
            )
    if version.control.rule in ("none", "constrained"):
        w = version.losses
        reference = version.control.rule == "none" and w.mean_square and not (w.listwise.weight or w.energy.weight)
        compared = ": it is what the others are compared with, and" if reference else ", and"
        return "none", f"This version has no directional loss{compared} no option follows."
    below_ceiling = 1 - float(history["lambda_eff"].mean()) / version.control.lambda_max
    rise = float(history["margin"].iloc[-1] - history["margin"].iloc[0])
    option = "A" if rise >= MARGIN_RISE else "B" if below_ceiling >= 0.5 else "C"
    why = {
        "A": f"the margin moved by {rise:+.3f} without reaching the goal; a slower ramp of the directional share is to "
        "keep the cosine while it does",
        "B": f"the margin moved only {rise:+.3f} from the first epoch to the last while the control held λ "
        f"{below_ceiling:.0%} below its ceiling",
        "C": f"the pull was near its ceiling, but the margin moved only {rise:+.3f} from the first epoch to the last; "
        "data with a known forward bias tell whether loss or data are to blame",
    }[option]
    if OPTIONS[option] == version.name:
        left = " and ".join(f"{o} ({name})" for o, name in OPTIONS.items() if o != option)
        return option, f"The numbers point to option {option}, which this version is: {why}. Left are {left}."
    return option, f"Option {option} ({OPTIONS[option]}) follows: {why}."


# The reading


@dataclass(frozen=True)
class Reading:
    """The calibrated 5CAT in words: `label` (one of LABELS), `headline`, and the `sentences` behind it."""

    label: str
    headline: str
    sentences: list[str]

    @property
    def text(self) -> str:
        return " ".join([self.headline, *self.sentences])


LABELS = {
    "collapsed": "the predictions hardly depend on the context",
    "escape": "the margin is bought by fleeing from the context: escape, not knowledge",
    "knowledge": "it tells the next chunk from the article's others better than any arithmetic on the context",
    "knowledge, and escape": "it tells the next chunk from the article's others better than any arithmetic on the "
    "context; the margin of its point is bought all the same by fleeing from the context",
    "below arithmetic": "arithmetic on the context, with no training, does it better",
    "not told apart": "it cannot be told from arithmetic on the context",
}


def reading(report: Report, arrow: Arrow | None = None) -> Reading:
    """Return the conclusion of the calibrated report, from all its splits but train (if it has others).

    By novel MRR minus that of the best baseline, on the same windows. *knowledge*: its interval is above 0 on every
    split, also among possible targets alone (a model may only know openings, which are no targets). *knowledge, and
    escape*: so, but on a split `health` finds that the margin of its point comes from leaving the context. Else
    *collapsed*: the variance of predictions is below a tenth of that of targets on every split. Else *escape*: named so
    on a split (`Report.escapes`), and above the baselines on none. Else *below arithmetic* where the interval is below
    0 on a split, otherwise *not told apart*.
    """
    splits = [s for s in report.splits if s != "train"] or report.splits
    facts = {split: report.facts[split, "model"] for split in splits}
    outcomes, sentences = set(), []
    for split in splits:
        outcome, sentence = _ranks(report, split)
        outcomes.add(outcome)
        sentences += [sentence, _order(report, split), *_escape(facts[split])]
    if outcomes == {"above"}:
        label = "knowledge, and escape" if any(f["escape"] for f in facts.values()) else "knowledge"
    elif all(f["variance"] < COLLAPSED * f["variance of targets"] for f in facts.values()):
        label = "collapsed"
    elif "above" not in outcomes and any(report.escapes(split) for split in splits):
        label = "escape"
    else:
        label = "below arithmetic" if "below" in outcomes else "not told apart"
    if arrow is not None:
        sentences.append(_arrow(arrow))
    return Reading(label, f"{label[0].upper() + label[1:]}: {LABELS[label]}.", sentences)


def _side(row: Mapping, above: str, below: str, neither: str) -> str:
    """The word for the side of 0 on which the interval of `row` lies."""
    return above if row["low"] > 0 else below if row["high"] < 0 else neither


def _figure(row: Mapping, key: str = "value", form: str = "+.3f") -> str:
    return f"{row[key]:{form}} [{row['low']:{form}}, {row['high']:{form}}]"


def _ranks(report: Report, split: str) -> tuple[str, str]:
    """The outcome on a split, "above", "openings", "below" or "open", and the sentence about it."""
    best, rival = (report.best_trivial(column, split) for column in ("novel MRR", "possible MRR"))
    against = report.paired("novel MRR", split, "model", best)
    possible = report.paired("possible MRR", split, "model", rival)
    outcome = _side(against, "above", "below", "open")
    if outcome == "above" and not possible["low"] > 0:
        outcome = "openings"
    openings = "; it may be no more than telling openings, never a target" if outcome == "openings" else ""
    mrr, margin = report.row("novel MRR", split), report.row("novel margin", split)
    caution = few(report.frames[split, "model"]["article"])
    return outcome, (
        f"On {split} ({mrr['articles']} articles, {mrr['windows']} windows{'; ' + caution if caution else ''}) the "
        f"novel MRR is {_figure(mrr, form='.3f')}, chance {mrr['chance']:.3f}, {_figure(against)} against {best} "
        f"(among possible targets alone {_figure(possible)} against {rival}{openings}); "
        f"the novel margin is {_figure(margin)}."
    )


def _order(report: Report, split: str) -> str:
    order = report.row("shuffled, novel MRR", split)
    used = _side(order, "gains", "costs", "neither costs nor gains beyond doubt any")
    simple = report.best_trivial("mean rollout", split, ["copy last", "mean"])
    rolled = report.paired("mean rollout", split, "model", simple)
    return (
        f"Shuffling the context {used} novel MRR ({order['value']:+.3f}); its rollout is "
        f"{_side(rolled, 'above', 'below', 'not told from')} the better of "
        f"copying and averaging ({rolled['value']:+.3f} in mean cosine), its steps "
        f"{report.value('similarity of steps', split):.2f} alike."
    )


def _escape(facts: Mapping) -> list[str]:
    if not facts["escape"]:
        return []
    without = f" with {facts['escape band']} leading components left out" if facts["escape band"] else ""
    return [
        f"Subtracted context vectors{without} bought {facts['margin bought']:+.3f} of margin there, at "
        f"{facts['cosine paid']:+.3f} of cosine and {facts['novel MRR paid']:+.3f} of novel MRR."
    ]


def _arrow(arrow: Arrow) -> str:
    row = arrow.table.set_index("measure").loc["novel MRR"]
    words = {"none": "no direction", "forward": "a forward direction", "backward": "a backward direction"}
    return (
        f"Arrow of time, over {row['seeds']} seeds and {row['articles']} articles: {words[arrow.declared]}; forward "
        f"− backward in novel MRR, copying's own taken off, is {_figure(row, 'difference')}"
        + (f" ({arrow.caution})." if arrow.caution else ".")
    )


# The comparison with the original

MEASURES = {
    "margin, late": "margin read late",
    "R@5 of six": "R@5 of six",
    "val cos": "cosine, all windows",
    "margin": "margin",
    "margin, last": "margin against the last",
    "novel MRR": "novel MRR",
}


def comparison(version: Version, report: Report) -> pd.DataFrame:
    """Return this run, the original's published runs and the baselines, by the measures that all of them have."""
    report, rows = report.original, []
    for name in report.table["predictor"].unique():
        run = f"{version.name}, this run" if name == "model" else f"{name}, untrained"
        rows.append({"run": run, **{k: report.value(m, predictor=name) for k, m in MEASURES.items()}, "note": ""})
    for i, name in enumerate(("p6", "v1", "v21"), start=1):
        p = load_version(name).published
        published = {"margin, late": p.margin, "R@5 of six": p.recall_at_5, "val cos": p.val_cos, "note": p.note}
        rows.insert(i, {"run": f"{name}, original", **published})
    return pd.DataFrame(rows).astype(dict.fromkeys(MEASURES, float))
