"""Conclusions from a run's figures: checklist, verdict and its decision, reading, comparison (handbook §3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from .gates import UNTRAINED, without_rivals
from .table import row_text, side

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
    """A line of the checklist. `passed` is None where the version has no such quantity; `broke`: the first break."""

    every: str  # "step" or "epoch"
    check: str
    wanted: str
    measured: str
    passed: bool | None
    broke: str = ""


def checklist(version: Version, epochs: pd.DataFrame, steps: pd.DataFrame) -> list[Check]:
    """Return the monitoring checklist of the logged steps and epochs so far. Needs at least one row of each."""
    pos, neg, gap, third = steps["pos"], steps["neg"], steps["gap"], max(len(steps) // 3, 1)
    climb = gap.tail(third).mean() - gap.head(third).mean()
    margin, loss, recall, cos = (epochs[c] for c in ("margin", "val_loss", "recall_at_5", "val_cos"))
    rises = margin.diff(RISE_EPOCHS).iloc[RISE_EPOCHS:] >= MARGIN_RISE
    best_before = np.minimum.accumulate(np.r_[loss[:1], loss[:-1]])
    early = margin[epochs["epoch"] == FLIP_EPOCH]

    lowest = f"lowest pos {pos.min():+.3f}, neg {neg.min():+.3f}"
    up = f"up ≥ {MARGIN_RISE} every {RISE_EPOCHS} epochs"
    over = f"{margin.iloc[-1] - margin.iloc[0]:+.3f} over {len(margin)} epochs"
    with_chance = f"≥ {RECALL:.0%} (chance {min(5 / (version.context_length + 1), 1):.0%})"
    no_spike, spike = f"validation loss ≤ {SPIKE} × the best before it", np.max(loss.to_numpy() / best_before)
    flip, reached = f"on its way at epoch {FLIP_EPOCH}", "not reached"
    if len(early):
        reached = f"{early.iloc[0]:+.3f}" + (": consider v2.3" if early.iloc[0] < FLIP_MARGIN else "")
    return [
        _check("step", "ρ on its target", f"|ρ − target| ≤ {RHO_TOLERANCE}", *_rho(version, steps), steps),
        _check("step", "no batch skipped by the guard", "0 skips", *_skips(version, epochs), epochs),
        _check("step", "both cosines positive", "pos > 0 and neg > 0", lowest, (pos > 0) & (neg > 0), steps),
        _check("step", "gap climbing", "last third above first third", f"{climb:+.4f}", bool(climb > 0)),
        _check("step", "λ_eff moving", "varies by 1 % or more", *_lambda(version, steps)),
        _check("epoch", "margin climbing", up, over, rises, epochs),
        _check("epoch", "R@5 of six kept", with_chance, f"lowest {recall.min():.1%}", recall >= RECALL, epochs),
        _check("epoch", "validation cosine kept", f"≥ {VAL_COS}", f"lowest {cos.min():.3f}", cos >= VAL_COS, epochs),
        _check("epoch", "no spikes", no_spike, f"largest {spike:.2f} ×", loss <= SPIKE * best_before, epochs),
        _check("epoch", flip, f"margin ≥ {FLIP_MARGIN}", reached, early >= FLIP_MARGIN, epochs),
    ]


def _check(every: str, check: str, wanted: str, measured: str, good, table: pd.DataFrame | None = None) -> Check:
    """A `Check`. `good`: booleans for rows of `table` (None if there are none), one for the whole run, or None."""
    broke = ""
    if isinstance(good, pd.Series):
        bad = table.loc[good.index[~good]]
        if len(bad):
            broke = ", ".join(f"{c} {int(bad[c].iloc[0])}" for c in ("step", "epoch") if c in bad)
        good = bad.empty if len(good) else None
    return Check(every, check, wanted, measured, good, broke)


# What was measured, and whether it is good, for `_check`


def _rho(version: Version, steps: pd.DataFrame) -> tuple[str, pd.Series | None]:
    used = steps[steps["skip"] == 0]
    if version.control.rule in ("none", "fixed") or steps["rho_target"].isna().all():
        return "no target", None
    if used.empty:
        return "every logged batch skipped", None
    miss = (used["rho_gradient" if by_gradient(version.control) else "rho"] - used["rho_target"]).abs()
    return f"largest miss {miss.max():.3f}", miss <= RHO_TOLERANCE


def _skips(version: Version, epochs: pd.DataFrame) -> tuple[str, pd.Series | None]:
    if version.control.rule == "none":
        return "no directional loss", None
    return f"{int(epochs['skips'].sum())} batches skipped", epochs["skips"] == 0


def _lambda(version: Version, steps: pd.DataFrame) -> tuple[str, bool | None]:
    if version.control.rule in ("none", "fixed"):
        return {"none": "no directional loss", "fixed": "fixed by design"}[version.control.rule], None
    used = steps.loc[steps["skip"] == 0, "lambda_eff"]
    varies = used.std() / max(used.mean(), 1e-12)
    return f"coefficient of variation {varies:.2f}", None if math.isnan(varies) else bool(varies >= 0.01)


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
    ("margin, gate A", "A", "margin", 0.0),
    ("gates passed of 5", "", "", GATES_PASSED),
    ("R@5 of six", "B", "R@5 of six", RECALL),
    ("validation cosine", "A", "cosine, all windows", VAL_COS),
)


def verdict(version: Version, history: pd.DataFrame, report: Report) -> Verdict:
    """Return the original's success conditions, and the decision that follows.

    Margin (gate A's, not the late one) and cosine are of validation; a gate counts where it passes on validation and
    OOD. The rule for the options is ours. On failure: none where the cosine is not above a constant's; else **A** (a
    slower ramp) where the margin rose by 0.01 or more over the epochs; else **B** (a fixed λ) where λ was below half of
    its ceiling on average; else **C** (data with a known forward bias).
    """
    report, conditions = report.original, []
    predictors = report.table["predictor"].unique()
    for name, gate, measure, threshold in CONDITIONS:
        if measure:
            values = {p: report.value(measure, "val", p, gate) for p in predictors}
            chance = float(report.row(measure, gate=gate)["chance"])
        else:
            values, chance = {p: sum(report.gates(predictor=p).values()) for p in predictors}, math.nan
        value = values.pop("model")
        met = value >= threshold if threshold else value > threshold
        condition = {"condition": name, "value": value, "threshold": threshold, "met": met}
        conditions.append(condition | {"chance": chance, "baselines": values})
    success = all(c["met"] for c in conditions)
    decision, why = _decide(version, history, report, success)
    margin, count, of_six, val_cos = (c["value"] for c in conditions)
    failed = ", ".join(c["condition"] for c in conditions if not c["met"])
    text = (
        f"{version.name}: {'success' if success else 'no success'} by the original's conditions: margin {margin:+.3f}, "
        f"{count} of 5 gates ({', '.join(g for g, ok in report.gates().items() if ok) or 'none'}), "
        f"R@5 of six {of_six:.1%}, validation cosine {val_cos:.3f}{'; not met: ' if failed else ''}{failed}. {why}"
    )
    return Verdict(success, conditions, decision, why, text)


def _decide(version: Version, history: pd.DataFrame, report: Report, success: bool) -> tuple[str, str]:
    if success:
        return "success", "Next: export the model, extend 5CAT on OOD, benchmark inference."
    if "constant" in set(report.table["predictor"]):
        cosine, constant = (report.value("cosine, all windows", predictor=p) for p in ("model", "constant"))
        if cosine <= constant:
            return "none", (
                f"The cosine is not above that of a constant vector ({constant:.3f}), so margin and R@5 mean nothing "
                "yet, and no option follows. Train longer, on more data, or a smaller model (amn) first."
            )
    if version.control.rule in ("none", "constrained"):
        return "none", "This version has no directional loss, so no option follows."
    below_ceiling = 1 - float(history["lambda_eff"].mean()) / version.control.lambda_max
    rise = float(history["margin"].iloc[-1] - history["margin"].iloc[0])
    option = "A" if rise >= MARGIN_RISE else "B" if below_ceiling >= 0.5 else "C"
    why = {
        "A": "the margin rises, and a slower ramp of the directional share is to keep the cosine while it does",
        "B": f"the control kept λ {below_ceiling:.0%} below its ceiling",
        "C": "λ was near its ceiling; data with a known forward bias tell whether loss or data are to blame",
    }[option]
    why = f"from the first epoch to the last the margin moved by {rise:+.3f}; {why}"
    if OPTIONS[option] == version.name:
        left = " and ".join(f"{o} ({name})" for o, name in OPTIONS.items() if o != option)
        return option, f"The figures suggest option {option}, which this version is: {why}. Left are {left}."
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
    "escape": "the margin comes from leaving the context, not from knowledge",
    "knowledge": "it ranks the next chunk among the article's others better than every baseline",
    "knowledge, and escape": "it ranks the next chunk among the article's others better than every baseline, but the "
    "margin of its point comes from leaving the context",
    "below arithmetic": "a baseline without training ranks better",
    "not told apart": "there is no significant difference to the baselines",
    "not measured": "no target has another chunk of its article to be ranked among",
}


def reading(report: Report, arrow: Arrow | None = None) -> Reading:
    """Return the conclusion of the calibrated report, from all its splits but train (if it has others).

    By novel MRR minus that of the best baseline, on the same windows. *knowledge*: its interval is above 0 on every
    split, also among possible targets alone (a model may only know openings). *knowledge, and escape*: so, but `health`
    finds escape on a split. Else *collapsed*: the predictions' variance is below a tenth of the targets' on every
    split. Else *escape*: `Report.escapes` on a split, and above the baselines on none. Else *below arithmetic* where
    the interval is below 0 on a split, otherwise *not told apart*. *not measured*: there is nothing to rank.
    """
    splits = [s for s in report.splits if s != "train"] or report.splits
    if all(without_rivals(report, split) for split in splits):
        return Reading("not measured", f"Not measured: {LABELS['not measured']}.", [_cosine(report, s) for s in splits])
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
    return Reading(label, f"{label.capitalize()}: {LABELS[label]}.", sentences)


def _cosine(report: Report, split: str) -> str:
    best = report.best_trivial("cosine", split)
    row, against = report.row("cosine at the target", split), report.paired("cosine", split, "model", best)
    return f"On {split} the cosine with the target is {row_text(row, form='.3f')}, {row_text(against)} against {best}."


def _ranks(report: Report, split: str) -> tuple[str, str]:
    """The outcome on a split, "above", "openings", "below" or "open", and the sentence about it."""
    best, rival = (report.best_trivial(column, split) for column in ("novel MRR", "possible MRR"))
    against = report.paired("novel MRR", split, "model", best)
    possible = report.paired("possible MRR", split, "model", rival)
    outcome = side(against, "above", "below", "open")
    if outcome == "above" and not possible["low"] > 0:
        outcome = "openings"
    openings = "; it may only recognise openings, which are never a target" if outcome == "openings" else ""
    mrr, margin = report.row("novel MRR", split), report.row("novel margin", split)
    caution = few(report.frames[split, "model"]["article"])
    return outcome, (
        f"On {split} ({mrr['articles']} articles, {mrr['windows']} windows{'; ' + caution if caution else ''}) the "
        f"novel MRR is {row_text(mrr, form='.3f')}, chance {mrr['chance']:.3f}, {row_text(against)} against {best} "
        f"(among possible targets alone {row_text(possible)} against {rival}{openings}); "
        f"the novel margin is {row_text(margin)}."
    )


def _order(report: Report, split: str) -> str:
    order = report.row("shuffled, novel MRR", split)
    used = side(order, "raises", "lowers", "does not significantly change")
    simple = report.best_trivial("mean rollout", split, UNTRAINED)
    rolled = report.paired("mean rollout", split, "model", simple)
    return (
        f"Shuffling the context {used} novel MRR ({order['value']:+.3f}). The rollout is "
        f"{side(rolled, 'above', 'below', 'not significantly different from')} the better of copying and averaging "
        f"({rolled['value']:+.3f} in mean cosine); the mean cosine of two steps is "
        f"{report.value('similarity of steps', split):.2f}."
    )


def _escape(facts: Mapping) -> list[str]:
    if not facts["escape"]:
        return []
    without = f" with {facts['escape band']} leading components left out" if facts["escape band"] else ""
    return [
        f"Subtracted context vectors{without} raise the margin there by {facts['margin bought']:.3f}, and lower the "
        f"cosine by {facts['cosine paid']:.3f} and the novel MRR by {facts['novel MRR paid']:.3f}."
    ]


def _arrow(arrow: Arrow) -> str:
    row = arrow.table.set_index("measure").loc["novel MRR"]
    words = {"none": "no direction", "forward": "a forward direction", "backward": "a backward direction"}
    return (
        f"Arrow of time, over {row['seeds']} seeds and {row['articles']} articles: {words[arrow.declared]}; forward "
        f"− backward in novel MRR, less copying's own, is {row_text(row, 'difference')}"
        + (f" ({arrow.caution})." if arrow.caution else ".")
    )


# The comparison with the original

MEASURES = {
    "margin, late": "margin read late",
    "R@5 of six": "R@5 of six",
    "val cos": "cosine, all windows",
    "margin": "margin",
    "margin, last": "margin against the last",
    "R@5 in article": "R@5",
    "rollout, late": "mean cosine read late",
    "novel MRR": "novel MRR",
}
# Of these the original's own full 5CAT, too; `margin, last`, `R@5 of six` and `val cos` are of its mini-5CAT.
FULL = {"margin, late": "margin_late", "R@5 in article": "recall_at_5", "rollout, late": "rollout_late"}


def comparison(version: Version, report: Report) -> pd.DataFrame:
    """Return this run, the original's published runs and the baselines, by the measures that all of them have."""
    report, rows = report.original, []
    for name in report.table["predictor"].unique():
        run = f"{version.name}, this run" if name == "model" else f"{name}, untrained"
        rows.append({"run": run, **{k: report.value(m, predictor=name) for k, m in MEASURES.items()}, "note": ""})
    for i, name in enumerate(("p6", "v1", "v21", "v22", "v23_confident"), start=1):
        p = load_version(name).published
        published = {"margin, last": p.margin, "R@5 of six": p.recall_at_5, "val cos": p.val_cos, "note": p.note}
        full = {measure: p.full[key][0] for measure, key in FULL.items()} if p.full else {}  # on validation
        rows.insert(i, {"run": f"{name}, original", **published, **full})
    return pd.DataFrame(rows).astype(dict.fromkeys(MEASURES, float))
