"""What a run's numbers say: the monitoring checklist, the verdict, and the decision that follows (handbook §3).

History, steps and 5CAT in; findings out. Nothing here is decided before the numbers are known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


@dataclass(frozen=True)
class Check:
    """A line of the checklist. `held` is None where the version has no such quantity; `broke` names the first break."""

    every: str  # "step" or "epoch"
    check: str
    wanted: str
    measured: str
    held: bool | None
    broke: str = ""


def checklist(version: Version, history: pd.DataFrame, steps: pd.DataFrame) -> list[Check]:
    """The monitoring checklist over the logged steps and the epochs so far. Needs at least one row of each."""
    directional = version.control.rule != "none"
    acting = steps[steps["skip"] == 0]

    def per_step(check: str, wanted: str, measured: str, good: pd.Series | None) -> Check:
        if good is None:
            return Check("step", check, wanted, measured, None)
        bad = steps.loc[good.index[~good]]
        broke = "" if bad.empty else f"step {int(bad['step'].iloc[0])}, epoch {int(bad['epoch'].iloc[0])}"
        return Check("step", check, wanted, measured, bad.empty, broke)

    def per_epoch(check: str, wanted: str, measured: str, good: Sequence[bool] | None) -> Check:
        if good is None or not len(good):
            return Check("epoch", check, wanted, measured, None)
        bad = np.flatnonzero(~np.asarray(good))
        broke = f"epoch {int(history['epoch'].iloc[bad[0]])}" if len(bad) else ""
        return Check("epoch", check, wanted, measured, not len(bad), broke)

    has_target = directional and version.control.rule != "fixed" and steps["rho_target"].notna().any()
    miss = (acting["rho_gradient" if by_gradient(version.control) else "rho"] - acting["rho_target"]).abs()
    last_of_steps = (
        steps["gap"].tail(max(len(steps) // 3, 1)).mean() - steps["gap"].head(max(len(steps) // 3, 1)).mean()
    )
    moving = acting["lambda_eff"].std() / max(acting["lambda_eff"].mean(), 1e-12) if len(acting) > 1 else math.nan
    skips = int(history["skips"].sum())
    checks = [
        per_step(
            "ρ on its target",
            f"|ρ − target| ≤ {RHO_TOLERANCE}",
            "no target"
            if not has_target
            else "every logged batch skipped"
            if acting.empty
            else f"largest miss {miss.max():.3f}",
            miss <= RHO_TOLERANCE if has_target and len(acting) else None,
        ),
        Check(
            "step",
            "no batch skipped by the guard",
            "0 skips",
            f"{skips} batches skipped" if directional else "no directional loss",
            skips == 0 if directional else None,
            f"epoch {int(history.loc[history['skips'] > 0, 'epoch'].iloc[0])}" if skips else "",
        ),
        per_step(
            "both cosines positive",
            "pos > 0 and neg > 0",
            f"lowest pos {steps['pos'].min():+.3f}, neg {steps['neg'].min():+.3f}",
            (steps["pos"] > 0) & (steps["neg"] > 0),
        ),
        Check("step", "gap climbing", "last third above first third", f"{last_of_steps:+.4f}", bool(last_of_steps > 0)),
        Check(
            "step",
            "λ_eff moving",
            "varies by 1 % or more",
            "no directional loss"
            if not directional
            else "fixed by design"
            if version.control.rule == "fixed"
            else f"coefficient of variation {moving:.2f}",
            bool(moving >= 0.01) if directional and version.control.rule != "fixed" and math.isfinite(moving) else None,
        ),
    ]
    margin, loss = history["margin"].to_numpy(), history["val_loss"].to_numpy()
    rises = [True] * min(RISE_EPOCHS, len(margin)) + [
        margin[i] - margin[i - RISE_EPOCHS] >= MARGIN_RISE for i in range(RISE_EPOCHS, len(margin))
    ]
    best_before = np.minimum.accumulate(np.r_[loss[:1], loss[:-1]])
    at_flip = history.loc[history["epoch"] == FLIP_EPOCH, "margin"]
    checks += [
        per_epoch(
            "margin climbing",
            f"up ≥ {MARGIN_RISE} every {RISE_EPOCHS} epochs",
            f"{margin[-1] - margin[0]:+.3f} over {len(margin)} epochs",
            rises if len(margin) > RISE_EPOCHS else None,
        ),
        per_epoch(
            "R@5 of six kept",
            f"≥ {RECALL:.0%} (chance {min(5 / (version.context_length + 1), 1):.0%})",
            f"lowest {history['recall_at_5'].min():.1%}",
            (history["recall_at_5"] >= RECALL).tolist(),
        ),
        per_epoch(
            "validation cosine kept",
            f"≥ {VAL_COS}",
            f"lowest {history['val_cos'].min():.3f}",
            (history["val_cos"] >= VAL_COS).tolist(),
        ),
        per_epoch(
            "no spikes",
            f"validation loss ≤ {SPIKE} × the best before it",
            f"largest {np.max(loss / best_before):.2f} ×",
            (loss <= SPIKE * best_before).tolist(),
        ),
        Check(
            "epoch",
            f"on its way at epoch {FLIP_EPOCH}",
            f"margin ≥ {FLIP_MARGIN}",
            (f"{at_flip.iloc[0]:+.3f}" + (": consider v2.3" if at_flip.iloc[0] < FLIP_MARGIN else ""))
            if len(at_flip)
            else "not reached",
            bool(at_flip.iloc[0] >= FLIP_MARGIN) if len(at_flip) else None,
            f"epoch {FLIP_EPOCH}" if len(at_flip) and at_flip.iloc[0] < FLIP_MARGIN else "",
        ),
    ]
    return checks


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


def verdict(version: Version, history: pd.DataFrame, report: Report) -> Verdict:
    """The original's success conditions, and the decision point that follows.

    Margin and cosine are of validation; a gate counts where it passes on validation and on OOD. The margin is gate A's
    with the target at offset 0, not the one read late.

    The rule for A, B and C is ours, since the original left it to judgement. On failure: none of them where the cosine
    is not above a constant's; else **A** (a slower ramp) where the per-epoch margin rose by 0.01 or more; else **B** (a
    fixed λ) where the control held λ at less than half of its ceiling in the mean; else **C** (data with a known
    forward bias).
    """
    report = report.original
    of_six = report.value("R@5 of six", gate="B")
    gates = report.gates()
    baselines = [p for p in report.table["predictor"].unique() if p != "model"]

    def beside(measure: str, gate: str) -> dict[str, float]:
        return {p: report.value(measure, "val", p, gate) for p in baselines}

    margin, val_cos = report.value("margin", gate="A"), report.value("cosine, all windows", gate="A")
    chance = report.rows("val").set_index(["gate", "measure"])["chance"]
    conditions = [
        {
            "condition": "margin, gate A",
            "value": margin,
            "threshold": 0.0,
            "met": margin > 0,
            "chance": float(chance["A", "margin"]),
            "baselines": beside("margin", "A"),
        },
        {
            "condition": "gates passed of 5",
            "value": sum(gates.values()),
            "threshold": GATES_PASSED,
            "met": sum(gates.values()) >= GATES_PASSED,
            "chance": math.nan,
            "baselines": {p: sum(report.gates(predictor=p).values()) for p in baselines},
        },
        {
            "condition": "R@5 of six",
            "value": of_six,
            "threshold": RECALL,
            "met": of_six >= RECALL,
            "chance": float(chance["B", "R@5 of six"]),
            "baselines": beside("R@5 of six", "B"),
        },
        {
            "condition": "validation cosine",
            "value": val_cos,
            "threshold": VAL_COS,
            "met": val_cos >= VAL_COS,
            "chance": float(chance["A", "cosine, all windows"]),
            "baselines": beside("cosine, all windows", "A"),
        },
    ]
    success = all(c["met"] for c in conditions)
    decision, why = _decide(version, history, report, success)
    failed = [c["condition"] for c in conditions if not c["met"]]
    text = (
        f"{version.name}: {'success' if success else 'no success'} by the original's conditions: margin {margin:+.3f}, "
        f"{sum(gates.values())} of 5 gates ({', '.join(g for g, ok in gates.items() if ok) or 'none'}), "
        f"R@5 of six {of_six:.1%}, validation cosine {val_cos:.3f}"
        + (f"; not met: {', '.join(failed)}" if failed else "")
        + f". {why}"
    )
    return Verdict(success, conditions, decision, why, text)


@dataclass(frozen=True)
class Reading:
    """What the calibrated 5CAT says in words: `label` (one of LABELS), `headline`, and the `sentences` behind it."""

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
    """The calibrated report's verdict, from its numbers alone, over its splits but the training's (if it has others).

    By the novel MRR against the best of what it is compared with, on the same windows: knowledge where the interval of
    the difference lies above 0 on every split, and that among possible targets alone, too (else it may only know what
    an article's opening looks like: no target); knowledge, and escape where on a split its point's margin was bought
    all the same (`health`: a ranker may know what the point of the same model does not). Else collapsed: the
    predictions' variance is below a tenth of the targets' on every split; else escape: named so on a split
    (`Report.escapes`) and above arithmetic on none; else below arithmetic where the difference lies below 0 on a
    split, otherwise not told apart.
    """
    splits = [s for s in report.splits if s != "train"] or report.splits
    facts = {split: report.facts[split, "model"] for split in splits}
    outcome = {}
    sentences = []
    for split in splits:
        best = report.best_trivial("novel MRR", split)
        against = report.paired("novel MRR", split, "model", best)
        outcome[split] = "above" if against["low"] > 0 else "below" if against["high"] < 0 else "open"
        rival = report.best_trivial("possible MRR", split)
        possible = report.paired("possible MRR", split, "model", rival)
        if outcome[split] == "above" and not possible["low"] > 0:
            outcome[split] = "openings"
        openings = "; it may be no more than telling openings, never a target" if outcome[split] == "openings" else ""
        mrr, margin = report.row("novel MRR", split), report.row("novel margin", split)
        caution = few(report.frames[split, "model"]["article"])
        sentences.append(
            f"On {split} ({mrr['articles']} articles, {mrr['windows']} windows{'; ' + caution if caution else ''}) the "
            f"novel MRR is {mrr['value']:.3f} [{mrr['low']:.3f}, {mrr['high']:.3f}], chance {mrr['chance']:.3f}, "
            f"{against['value']:+.3f} [{against['low']:+.3f}, {against['high']:+.3f}] against {best} (among possible "
            f"targets alone {possible['value']:+.3f} [{possible['low']:+.3f}, {possible['high']:+.3f}] against {rival}"
            f"{openings}); the novel margin is {margin['value']:+.3f} [{margin['low']:+.3f}, {margin['high']:+.3f}]."
        )
        order = report.row("shuffled, novel MRR", split)
        used = (
            "costs"
            if order["high"] < 0
            else "gains"
            if order["low"] > 0
            else "neither costs nor gains beyond doubt any"
        )
        rolled = report.paired(
            "mean rollout", split, "model", report.best_trivial("mean rollout", split, ["copy last", "mean"])
        )
        beats = "above" if rolled["low"] > 0 else "below" if rolled["high"] < 0 else "not told from"
        sentences.append(
            f"Shuffling the context {used} novel MRR ({order['value']:+.3f}); its rollout is {beats} the better of "
            f"copying and averaging ({rolled['value']:+.3f} in mean cosine), its steps "
            f"{report.value('similarity of steps', split):.2f} alike."
        )
        if facts[split]["escape"]:
            f = facts[split]
            without = f" with {f['escape band']} leading components left out" if f["escape band"] else ""
            sentences.append(
                f"Subtracted context vectors{without} bought {f['margin bought']:+.3f} of margin there, at "
                f"{f['cosine paid']:+.3f} of cosine and {f['novel MRR paid']:+.3f} of novel MRR."
            )
    if set(outcome.values()) == {"above"}:
        label = "knowledge, and escape" if any(f["escape"] for f in facts.values()) else "knowledge"
    elif all(f["variance"] < COLLAPSED * f["variance of targets"] for f in facts.values()):
        label = "collapsed"
    elif "above" not in outcome.values() and any(report.escapes(split) for split in splits):
        label = "escape"
    else:
        label = "below arithmetic" if "below" in outcome.values() else "not told apart"
    if arrow is not None:
        row = arrow.table.set_index("measure").loc["novel MRR"]
        said = {"none": "no direction", "forward": "a forward direction", "backward": "a backward direction"}
        sentences.append(
            f"Arrow of time, over {row['seeds']} seeds and {row['articles']} articles: {said[arrow.declared]}; forward "
            f"− backward in novel MRR, copying's own taken off, is {row['difference']:+.3f} [{row['low']:+.3f}, "
            f"{row['high']:+.3f}]" + (f" ({arrow.caution})." if arrow.caution else ".")
        )
    return Reading(label, f"{label[0].upper() + label[1:]}: {LABELS[label]}.", sentences)


def _decide(version: Version, history: pd.DataFrame, report: Report, success: bool) -> tuple[str, str]:
    if success:
        return "success", "Next: export the model, extend 5CAT on OOD, benchmark inference."
    predictors = set(report.table["predictor"])
    if "constant" in predictors:
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
        return (
            "none",
            "This version has no directional loss"
            + (": it is what the others are compared with, and" if reference else ", and")
            + " no option follows.",
        )
    held_back = 1 - float(history["lambda_eff"].mean()) / version.control.lambda_max
    rise = float(history["margin"].iloc[-1] - history["margin"].iloc[0])
    if rise >= MARGIN_RISE:
        option = "A"
        why = (
            f"the margin moved by {rise:+.3f} without reaching the goal; a slower ramp of the directional share is to "
            "keep the cosine while it does"
        )
    elif held_back >= 0.5:
        option = "B"
        why = (
            f"the margin moved only {rise:+.3f} from the first epoch to the last while the control held λ "
            f"{held_back:.0%} below its ceiling"
        )
    else:
        option = "C"
        why = (
            f"the pull was near its ceiling, but the margin moved only {rise:+.3f} from the first epoch to the last; "
            "data with a known forward bias tell whether loss or data are to blame"
        )
    if OPTIONS[option] == version.name:
        left = " and ".join(f"{o} ({name})" for o, name in OPTIONS.items() if o != option)
        return option, f"The numbers point to option {option}, which this version is: {why}. Left are {left}."
    return option, f"Option {option} ({OPTIONS[option]}) follows: {why}."


def comparison(version: Version, report: Report) -> pd.DataFrame:
    """This run, the original's published runs and the trivial predictors, by the measures that all of them have."""
    report = report.original
    measures = {
        "margin, late": "margin read late",
        "R@5 of six": "R@5 of six",
        "val cos": "cosine, all windows",
        "margin": "margin",
        "margin, last": "margin against the last",
        "novel MRR": "novel MRR",
    }
    rows = []
    for name in report.table["predictor"].unique():
        run = f"{version.name}, this run" if name == "model" else f"{name}, untrained"
        rows.append({"run": run, **{k: report.value(m, predictor=name) for k, m in measures.items()}, "note": ""})
    for i, name in enumerate(("p6", "v1", "v21"), start=1):
        p = load_version(name).published
        published = {"margin, late": p.margin, "R@5 of six": p.recall_at_5, "val cos": p.val_cos, "note": p.note}
        rows.insert(i, {"run": f"{name}, original", **published})
    return pd.DataFrame(rows).astype(dict.fromkeys(measures, float))
