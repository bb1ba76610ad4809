"""Alarms: what goes wrong in a run, found in the rows of its tables and in the version alone.

Each kind has one alarm, for the first epoch that it is true of; its text counts the others. A broken step leaves no
row: run.yaml keeps its alarm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..config import Version
from ..evaluate import COLLAPSED
from ..loop import StepBroke
from ..losses import names
from .validation import SPREAD

# Raw = 0 has the mean-square loss 1/D, a good prediction about ¾ of it, and the listwise loss of a guess is about 1½
# times that of the best version: more than twice the lowest is no fluctuation but worse than knowing nothing.
DIVERGED = 2.0
# (effective rank − 1) / (that of the targets − 1). On the embedded data a line has 0, the transformers of v22, which
# know less than a constant, 0.005 to 0.016, LSTM 0.09, AMN 0.34.
ONE_LINE = 0.02
BEGUN = 3  # a model whose predictions never differed has collapsed from this epoch on; another one at once
ESCAPE = 0.25  # the bound of the escape share for a version without `rewind`: that of `share`; `rank` has up to 0.17
PAYS = 0.02  # a novel MRR that is higher by less than this share is not higher: validation has few articles

LOOKED_FOR = {
    "broken": "a loss, gradient or weight that is not finite",
    "divergence": "a loss that diverges",
    "collapse": "predictions that collapse",
    "escape": "a margin from leaving the context",
    "control": "a control that decides nothing",
}  # kind → its rule in words

Rows = Sequence[Mapping]  # of epochs.csv or steps.csv
Finding = tuple[float, str, str]  # epoch, what is wrong, what to do


class Alarm(NamedTuple):
    """What went wrong."""

    epoch: int
    step: int  # for an epoch's means, its last
    kind: str  # of LOOKED_FOR
    what: str  # with the values
    do: str

    @property
    def line(self) -> str:
        """For a log."""
        return f"ALARM  epoch {self.epoch}, step {self.step}: {self.kind}: {self.what}. What to do: {self.do}"


def alarms(version: Version, history: Rows, steps: Rows, batches: int, broken: Sequence[Alarm] = ()) -> list[Alarm]:
    """All alarms of a run in the order of their steps: one a kind, and those in `broken`. `batches`: of an epoch."""
    out = list(broken)
    for kind, found in _findings(version, history, steps).items():
        if found:
            epoch, what, do = found[0]
            if len(found) > 1:
                what += f"; so in {len(found)} epochs, the last is {found[-1][0]:.0f}"
            out.append(Alarm(int(epoch), int(epoch) * batches, kind, what, do))
    return sorted(out, key=lambda a: (a.step, a.kind))


def due(version: Version, history: Rows, steps: Rows) -> str:
    """The first alarm of the last epoch of `history`, as "kind: what"; empty if there is none."""
    last, found = history[-1]["epoch"], _findings(version, history, steps)
    return next((f"{kind}: {what}" for kind in found for epoch, what, _ in found[kind] if epoch == last), "")


def nothing(version: Version) -> str:
    """The sentence for a run without alarms: which kinds were looked for."""
    kinds = [k for k in LOOKED_FOR if k != "control" or _controlled(version)]
    return f"Nothing went wrong: looked for, and not found, were {', '.join(LOOKED_FOR[k] for k in kinds)}."


def short(found: Iterable[Alarm]) -> str:
    """All alarms in a few words: kinds and where each began; empty if there is none."""
    words = {True: "broken at epoch {0}, step {1}", False: "{2} from epoch {0}, step {1} on"}
    return "; ".join(words[a.kind == "broken"].format(*a) for a in found)


def _findings(version: Version, history: Rows, steps: Rows) -> dict[str, list[Finding]]:
    return {
        "divergence": list(_divergence(version, history, steps)),
        "collapse": list(_collapse(version, history)),
        "escape": list(_escape(version, history)),
        "control": [found for row in history if (found := _control(version, row))],
    }


def _divergence(version: Version, history: Rows, steps: Rows) -> Iterator[Finding]:
    """The loss is more than DIVERGED times its lowest so far: by the terms of constant weight, since what a schedule
    or a multiplier adds may rise as it is meant to."""
    w = version.losses
    weights = {"mse": w.mean_square, "listwise": w.listwise.weight, "energy": w.energy.weight}
    parts = [name for name, weight in weights.items() if weight]

    def loss(row: Mapping) -> float:
        return sum(weights[name] * row[name] for name in parts)

    lowest = min((loss(row) for row in steps if row["step"] == 1), default=math.inf)
    for row in history:
        now = loss(row)
        if now > DIVERGED * lowest:
            times = f"{now / lowest:.3g} times its lowest so far, {lowest:.4g}"
            what = f"the loss ({' + '.join(parts)}) is {now:.4g}, {times}"
            yield row["epoch"], what, f"lower optimizer.lr (now {row['learning_rate']:.2g})"
        lowest = min(lowest, now)


def _collapse(version: Version, history: Rows) -> Iterator[Finding]:
    """The validation predictions are all but one vector (COLLAPSED is `judge.rating`'s bound, too), or their cosine
    is 0 or less."""
    begun = False
    for row in history:
        cosine, rank, variance = row["val_cos"], row["rank_share"], row["variance_share"]
        if cosine > 0 and variance >= COLLAPSED and rank >= ONE_LINE:
            begun = True
        elif begun or row["epoch"] >= BEGUN:
            what = (
                f"the validation cosine is {cosine:+.3f}; the predictions' variance is {variance:.1%} of the targets', "
                f"their effective rank {row['effective_rank']:.1f} (beyond 1, {rank:.1%} of the targets')"
            )
            if not begun:
                do = "the model predicts one vector so far: train a smaller model (amn), on more windows or longer"
            elif _controlled(version):
                do = "lower the directional pull: the schedule's shares, or control.lambda_max"
            else:
                do = "lower optimizer.lr"
            yield row["epoch"], what, do


def _escape(version: Version, history: Rows) -> Iterator[Finding]:
    """The escape share has risen above its bound (a model that knows nothing yet has one half). Against the epoch
    where it was lowest a margin, to the last or to prev, is higher; neither the cosine nor the novel MRR is."""
    bound = version.rewind.escape if version.rewind else ESCAPE
    least = None  # the epoch of the lowest share so far
    for row in history:
        if least is None or row["escape"] < least["escape"]:
            least = row
        elif row["escape"] > bound >= least["escape"]:
            margin = row["margin"] > least["margin"] or row["gap"] > least["gap"]
            better = row["val_cos"] > least["val_cos"] or row["novel_mrr"] > (1 + PAYS) * least["novel_mrr"]
            if margin and not better:
                moved = {"margin": "+.3f", "gap": "+.3f", "val_cos": ".3f", "novel_mrr": ".3f"}
                figures = ", ".join(f"{k} {least[k]:{form}} → {row[k]:{form}}" for k, form in moved.items())
                what = (
                    f"context vectors are subtracted: {row['escape']:.1%} of the weights are negative, "
                    f"{least['escape']:.1%} were in epoch {least['epoch']:.0f}; since then {figures}"
                )
                do = "lower the directional pull (control.lambda_max, the schedule's shares), or set `rewind`"
                yield row["epoch"], what, do


def _controlled(version: Version) -> bool:
    """Whether something sets λ: not if it is fixed, or if its range has one point."""
    c = version.control
    return c.rule not in ("none", "fixed") and c.lambda_min < c.lambda_max


def _control(version: Version, row: Mapping) -> Finding | None:
    """λ was at one end of its range, or 0, all through the epoch."""
    c = version.control
    free = c.rule != "constrained"  # a multiplier of 0 means that the bound is met
    if c.rule != "none" and free and row["lambda_eff"] == 0:
        by = [f"the sign guard skipped {row['skips']:.0f}"] if row["skips"] else []
        by += [f"the confidence gate, which opens above {c.gate.low:g}, was shut in the others"] if c.gate else []
        what = f"λ was 0 in every batch: {', '.join(by)}"
        what += f" (mean cos(p, y) {row['pos']:+.3f}, to prev {row['neg']:+.3f})"
        do = "train longer without the directional loss" + (", or lower control.gate.low" if c.gate else "")
    elif _controlled(version) and free and row["at_lambda_min"] == 1:
        what = f"λ was at lambda_min, {c.lambda_min:g}, in every batch it acted in (ρ {row['rho']:.3g})"
        do = "lower control.lambda_min"
    elif _controlled(version) and row["at_lambda_max"] == 1:
        what = f"λ was at its ceiling, {row['lambda_eff']:.4g}, in every batch it acted in (ρ {row['rho']:.3g})"
        pull = "the schedule's shares" if free else "control.constraint.at_least"
        do = f"raise control.lambda_max, or lower {pull}"
    else:
        return None
    return row["epoch"], what, do


def explain(version: Version, broke: StepBroke) -> Alarm:
    """The alarm for a step that broke."""
    step, result = broke.step, broke.result
    if broke.before is not None and not math.isfinite(broke.before.gradient_norm):
        step, result = step - 1, broke.before
    figures = {"learning rate": result.learning_rate, **result.values, **result.shares}
    figures["gradient norm"] = float(result.gradient_norm)
    checked = (*names(version.losses), "lambda_eff", "loss", "gradient norm")
    wrong = next((f"{k} is {figures[k]}" for k in checked if not math.isfinite(figures[k])), "a weight is not finite")
    shown = {k: figures[k] for k in ("learning rate", *checked, "pos", "neg", "escape")}
    count = len(broke.weights)
    more = f"; tensors that are not finite: {count}, first {broke.weights[0]}" if count else ""
    return _broken(broke.epoch, step, wrong, shown, more)


def check_validation(epoch: int, step: int, means: Mapping[str, float], validated: Mapping[str, float]) -> Alarm | None:
    """The alarm for a validation figure that is not finite (`val_energy` of a version that has none is NaN)."""
    figures = {k: x for k, x in validated.items() if k not in SPREAD}
    wrong = [f"{k} is {x}" for k, x in figures.items() if not math.isfinite(x) and k != "val_energy"]
    shown = {"learning rate": means["learning_rate"], "train_loss": means["train_loss"], **figures}
    return _broken(epoch, step, wrong[0], shown) if wrong else None


def _broken(epoch: int, step: int, wrong: str, shown: Mapping[str, float], more: str = "") -> Alarm:
    what = f"{wrong} at epoch {epoch}, step {step} ({', '.join(f'{k} {x:.4g}' for k, x in shown.items())}){more}"
    return Alarm(epoch, step, "broken", what, "lower the learning rate (optimizer.lr), or train in float32")
