"""What goes wrong in a run, told from its numbers: the rows of its epochs and the version, nothing else.

    run.alarms              of a run; `alarms(version, history, steps, batches)` of any rows
    version.trouble         what is done at one: go_on, stop or rewind

| kind | rule |
|---|---|
| broken | a loss, a gradient's norm, a weight or a validation figure is NaN or infinite |
| divergence | the epoch's loss is more than DIVERGED times the lowest before it |
| collapse | the validation predictions are all but one vector (COLLAPSED, ONE_LINE), or their cosine is 0 or less |
| escape | context vectors are subtracted, which raises the margin and pays in neither cosine nor novel MRR |
| control | the control of the directional loss decides nothing: λ at one end of its range, or 0, all through an epoch |

Nothing here has a memory: an interrupted run that goes on has the same rows, and so the same alarms. The one thing that
rows cannot tell is a step that broke, since its epoch leaves none: `Broken` carries it, and run.yaml keeps it.
An alarm is given once, for the first epoch that it is true of; its text says of which others it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ..config import Rewind, Version
from ..errors import LVMError
from ..evaluate import COLLAPSED
from ..losses import Terms

# Raw = 0 has the mean-square loss 1/D, a good prediction about ¾ of it, and the listwise loss of a guess is about 1½
# times that of the best version: more than twice the lowest is no fluctuation but worse than knowing nothing.
DIVERGED = 2.0
# (effective rank − 1) / (that of the targets − 1). On the embedded data a line has 0, the transformers of v22, which
# know less than a constant, 0.005 to 0.016, LSTM 0.09, AMN 0.34.
ONE_LINE = 0.02
BEGUN = 3  # from this epoch on a model that never told contexts apart is said to have collapsed; one that did, at once
ESCAPE = 0.25  # the bound of the escape share for a version without `rewind`: that of `share`; `rank` has up to 0.17
PAYS = 0.02  # a novel MRR that is higher by less than this share is not higher: validation has few articles
REWIND = Rewind(fall=0.5, escape=ESCAPE, cool=0.5, most=2)  # `cool` and `most` of a version without `rewind`

DO_BROKEN = "lower the learning rate (optimizer.lr), train in float32, or let the run go back (trouble: rewind)"
LOOKED_FOR = {
    "broken": "a loss, gradient or weight that is not finite",
    "divergence": "a loss that diverges",
    "collapse": "predictions that collapse",
    "escape": "a margin bought by escape",
    "control": "a control that decides nothing",
}
FACTS = ("effective_rank", "rank_share", "variance_share")  # of the validation predictions, by epoch


class Alarm(NamedTuple):
    """What went wrong: `step` is the step it happened at, for what an epoch's means tell the last of that epoch."""

    epoch: int
    step: int
    kind: str  # of LOOKED_FOR
    what: str  # with the values
    do: str

    @property
    def line(self) -> str:
        """For a log."""
        return f"ALARM  epoch {self.epoch}, step {self.step}: {self.kind}: {self.what}. What to do: {self.do}"


class Broken(LVMError):
    """A step, or the validation after it, gave what no training goes on from."""

    def __init__(self, alarm: Alarm):
        super().__init__(f"{alarm.what}; {alarm.do}")
        self.alarm = alarm


def alarms(
    version: Version, history: Sequence[Mapping], steps: Sequence[Mapping], batches: int, broken: Sequence[Alarm] = ()
) -> list[Alarm]:
    """All alarms of a run in the order of their steps, one a kind (of `broken`, which are taken over, every one).

    `history`, `steps`: rows of epochs.csv and steps.csv; `batches`: of an epoch. Rows from before a column was logged
    cannot raise what needs it.
    """
    out = list(broken)
    for kind, epochs in _findings(version, history, steps).items():
        first = next(iter(epochs), None)
        if first is not None:
            what, do = epochs[first]
            so = f"; so in {_spans(list(epochs))}" if len(epochs) > 1 else ""
            out.append(Alarm(first, first * batches, kind, what + so, do))
    return sorted(out, key=lambda a: (a.step, a.kind))


def kept(record: Mapping, where: str) -> list[Alarm]:
    """The alarms of kind `broken` that run.yaml's record keeps. Raises LVMError where they are no alarms."""
    try:
        listed = [Alarm(**a) for a in record.get("alarms") or []]
        if not all(list(map(type, a)) == [int, int, str, str, str] for a in listed):
            raise TypeError("epoch and step are whole numbers, kind, what and do texts")
    except (TypeError, AttributeError) as e:
        raise LVMError(f"{where}: `alarms` cannot be read ({e}); restore the file, or take the key out") from e
    return [a for a in listed if a.kind == "broken"]


def action(version: Version, kind: str) -> str:
    """What the version does at an alarm of this kind: go_on, stop or rewind."""
    return version.trouble if isinstance(version.trouble, str) else getattr(version.trouble, kind)


def guard(version: Version) -> Rewind:
    """By how much a rewind cools, and how many there are: the version's own, or REWIND."""
    return version.rewind or REWIND


def actions(version: Version) -> set[str]:
    return {action(version, kind) for kind in LOOKED_FOR}


def due(version: Version, history: Sequence[Mapping], steps: Sequence[Mapping]) -> tuple[str, str]:
    """What is to be done at the end of the last epoch of `history`, and why."""
    epoch = int(history[-1]["epoch"])
    wrong = [(action(version, kind), f"{kind}: {found[epoch][0]}") for kind, found in
             _findings(version, history, steps).items() if epoch in found]  # fmt: skip
    # To stop is the stronger wish.
    return next(((act, why) for wanted in ("stop", "rewind") for act, why in wrong if act == wanted), ("go_on", ""))


def nothing(version: Version) -> str:
    """The good news, and what it rests on."""
    kinds = [k for k in LOOKED_FOR if k != "control" or _controlled(version)]
    return f"Nothing went wrong: looked for, and not found, were {', '.join(LOOKED_FOR[k] for k in kinds)}."


def short(found: Sequence[Alarm]) -> str:
    """All alarms in a few words: kinds and where each began; empty where there is none."""
    return "; ".join(f"{a.kind} from epoch {a.epoch}, step {a.step} on" if a.kind != "broken" else
                     f"broken at epoch {a.epoch}, step {a.step}" for a in found)  # fmt: skip


# The rules


def _findings(version: Version, history: Sequence[Mapping], steps: Sequence[Mapping]) -> dict[str, dict]:
    """kind → {epoch: (what, what to do)}, epochs in order."""
    return {
        "divergence": _divergence(version, history, steps),
        "collapse": _collapse(version, history),
        "escape": _escape(version, history),
        "control": _control(version, history),
    }


def _divergence(version: Version, history: Sequence[Mapping], steps: Sequence[Mapping]) -> dict:
    """Of the terms of constant weight: what a schedule or a multiplier adds to the loss may rise as it is meant to."""
    w = version.losses
    weights = {"mse": w.mean_square, "listwise": w.listwise.weight, "energy": w.energy.weight}
    parts = [name for name, weight in weights.items() if weight]

    def loss(row: Mapping) -> float:
        return sum(weights[name] * row[name] for name in parts)

    lowest = min((loss(row) for row in steps if row["step"] == 1), default=math.inf)
    found = {}
    for row in history:
        now = loss(row)
        if now > DIVERGED * lowest:
            what = (
                f"the loss ({' + '.join(parts)}) is {now:.4g}, {now / lowest:.3g} times its lowest before, {lowest:.4g}"
            )
            do = f"lower optimizer.lr (then {row['learning_rate']:.2g}), or let the run go back (trouble: rewind)"
            found[int(row["epoch"])] = what, do
        lowest = min(lowest, now)
    return found


def _collapse(version: Version, history: Sequence[Mapping]) -> dict:
    """`verdict.reading` calls the finished model collapsed by the same bound of the variance."""
    found, begun = {}, False
    for row in history:
        cosine, rank, variance = row["val_cos"], row["rank_share"], row["variance_share"]
        away, alike = cosine <= 0, variance < COLLAPSED or rank < ONE_LINE
        if not (away or alike):
            begun = True
        elif begun or row["epoch"] >= BEGUN:
            spread = (
                f"the predictions' variance is {variance:.1%} of the targets', their effective rank "
                f"{row['effective_rank']:.1f}, beyond the first direction {rank:.1%} of the targets'"
                if not math.isnan(variance)
                else ""
            )
            facts = [f"the validation cosine is {cosine:+.3f}" + (": away from the targets" if away else "")]
            facts = [spread, *facts] if alike else [*facts, spread]
            found[int(row["epoch"])] = ("; ".join(filter(None, facts)), _against_collapse(version, begun))
    return found


def _against_collapse(version: Version, begun: bool) -> str:
    if begun and _controlled(version):
        return "pull less: lower the schedule's shares, or control.lambda_max; or let the run go back (trouble: rewind)"
    if begun:
        return "lower optimizer.lr, or let the run go back (trouble: rewind)"
    return "it has not begun to tell contexts apart: train on more windows, for more epochs, or a smaller model (amn)"


def _escape(version: Version, history: Sequence[Mapping]) -> dict:
    """`health` has the rule for a finished model, with intervals. By an epoch's means: the escape share has risen above
    its bound, and against the epoch where it was least the margin (to the last, or to prev) is higher, while neither
    the cosine nor the novel MRR is. A model that knows nothing yet has a share of one half: only one that was below
    the bound can rise above it."""
    bound = version.rewind.escape if version.rewind else ESCAPE
    found, least = {}, None
    for row in history:
        share = row["escape"]
        if least is not None and share > bound >= least["escape"]:
            bought = row["margin"] > least["margin"] or row["gap"] > least["gap"]
            paid = row["val_cos"] > least["val_cos"] or row["novel_mrr"] > (1 + PAYS) * least["novel_mrr"]
            if bought and not paid:
                moved = {"margin": "+.3f", "gap": "+.3f", "val_cos": ".3f", "novel_mrr": ".3f"}
                figures = ", ".join(f"{k} {least[k]:{form}} → {row[k]:{form}}" for k, form in moved.items())
                what = (
                    f"context vectors are subtracted: {share:.1%} of the weights are negative, "
                    f"{least['escape']:.1%} were in epoch {least['epoch']:.0f}; since then {figures}"
                )
                do = (
                    "the margin is bought, not known: lower the pull (control.lambda_max, the schedule's shares), "
                    "or use the escape guard (rewind)"
                )
                found[int(row["epoch"])] = what, do
        if least is None or not least["escape"] <= share:  # also where the share was not logged, NaN
            least = row
    return found


def _controlled(version: Version) -> bool:
    """Whether there is something that sets λ: not where it is fixed, or its range has one point."""
    c = version.control
    return c.rule not in ("none", "fixed") and c.lambda_min < c.lambda_max


def _control(version: Version, history: Sequence[Mapping]) -> dict:
    c = version.control
    if c.rule == "none":
        return {}
    found = {}
    for row in history:
        what = do = ""
        if c.rule != "constrained" and row["lambda_eff"] == 0:  # a multiplier of 0 says that the bound is kept
            by = [f"the sign guard skipped {row['skips']:.0f}"] if row["skips"] else []
            by += [f"the confidence gate, which opens above {c.gate.low:g}, was shut in the others"] if c.gate else []
            what = (
                f"λ was 0 in every batch: {', '.join(by)} (mean cos(p, y) {row['pos']:+.3f}, to prev {row['neg']:+.3f})"
            )
            do = "nothing pulls before the cosine is higher: train longer without the directional loss" + (
                ", or lower control.gate.low" if c.gate else ""
            )
        elif _controlled(version) and c.rule != "constrained" and row["at_lambda_min"] == 1:
            what = f"λ stood at lambda_min, {c.lambda_min:g}, in every batch it acted in (ρ {row['rho']:.3g})"
            do = "the control wants less than it may: lower control.lambda_min"
        elif _controlled(version) and row["at_lambda_max"] == 1:
            what = f"λ stood at its ceiling, {row['lambda_eff']:.4g}, in every batch it acted in (ρ {row['rho']:.3g})"
            do = (
                "the bound is out of reach: lower control.constraint.at_least, or raise control.lambda_max"
                if c.rule == "constrained"
                else "the target is out of reach: raise control.lambda_max, or lower the schedule's shares"
            )
        if what:
            found[int(row["epoch"])] = what, do
    return found


def _spans(epochs: Sequence[int]) -> str:
    """[3, 4, 5, 9] → 'epochs 3 to 5 and 9'."""
    spans: list[list[int]] = []
    for epoch in epochs:
        if spans and spans[-1][-1] == epoch - 1:
            spans[-1] = [spans[-1][0], epoch]
        else:
            spans.append([epoch])
    words = [" to ".join(map(str, s)) for s in spans]
    return "epochs " + (", ".join(words[:-1]) + " and " if len(words) > 1 else "") + words[-1]


# Steps that break


class Last(NamedTuple):
    """Of the step before, looked at only where something broke: then it costs nothing."""

    loss: float
    values: Mapping[str, float]
    norm: torch.Tensor


def broken(
    epoch: int, step: int, rate: float, loss: float, values: Mapping[str, float], last: Last | None, model
) -> Broken:
    """Why the loss of this step is not finite. `values`: of all terms, before the step; `last`: of the step before."""
    if last is not None and not math.isfinite(last.norm):
        return _broken_gradient(epoch, step - 1, rate, last)
    terms = [name for name in (*Terms._fields, "lambda_eff") if not math.isfinite(values.get(name, 0.0))]
    first = f"the first term that is not finite is {terms[0]}" if terms else "each term is finite, their sum is not"
    if names := _not_finite(model):
        first += f"; of the weights {len(names)} tensors are not finite since step {step - 1}, the first {names[0]}"
    return _said(epoch, step, f"the loss is {loss} at epoch {epoch}, step {step} ({_values(rate, values)}); {first}")


def finite(epoch: int, step: int, rate: float, last: Last, model) -> None:
    """Raise Broken if the last step of an epoch left a gradient's norm or weights that are not finite."""
    if not math.isfinite(last.norm):
        raise _broken_gradient(epoch, step, rate, last)
    if names := _not_finite(model):
        where = f"after epoch {epoch}, step {step}, where the loss was still {last.loss:.4g}"
        what = f"{len(names)} tensors of the weights, the first {names[0]}, are not finite {where}"
        raise _said(epoch, step, f"{what} ({_values(rate, last.values)})")


def validated(epoch: int, step: int, rate: float, means: Mapping[str, float], val: Mapping[str, float]) -> None:
    """Raise Broken if a validation figure is not finite (`val_energy` of a version that has none is NaN)."""
    wrong = [k for k, x in val.items() if not math.isfinite(x) and k not in (*FACTS, "val_energy")]
    if wrong:
        values = ", ".join(f"{k} {x:.4g}" for k, x in val.items() if k not in FACTS)
        what = f"{wrong[0]} is {val[wrong[0]]} after epoch {epoch}, step {step}, where the mean loss was still"
        raise _said(epoch, step, f"{what} {means['train_loss']:.4g} (learning rate {rate:g}, {values})")


def _broken_gradient(epoch: int, step: int, rate: float, last: Last) -> Broken:
    what = f"the gradient's norm is {float(last.norm)} at epoch {epoch}, step {step}, where the loss was still"
    return _said(epoch, step, f"{what} {last.loss:.4g} ({_values(rate, last.values)})")


def _values(rate: float, values: Mapping[str, float]) -> str:
    named = (*Terms._fields, "lambda_eff", "pos", "neg", "escape")
    return ", ".join([f"learning rate {rate:g}", *(f"{k} {values[k]:.4g}" for k in named if k in values)])


def _not_finite(model) -> list[str]:
    return [name for name, w in model.named_parameters() if not bool(torch.isfinite(w).all())]


def _said(epoch: int, step: int, what: str) -> Broken:
    return Broken(Alarm(epoch, step, "broken", what, DO_BROKEN))
