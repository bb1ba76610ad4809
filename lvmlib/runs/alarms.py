"""What goes wrong in a run, found in the rows of its epochs and the version alone.

    run.alarms              of a run; `alarms(version, history, steps, batches)` of any rows
    version.trouble         go_on, or stop: end the run at the epoch with an alarm

| kind | rule |
|---|---|
| broken | a loss, a gradient's norm, a weight or a validation figure is NaN or infinite |
| divergence | the epoch's loss is more than DIVERGED times the lowest before it |
| collapse | the validation predictions are all but one vector (COLLAPSED, ONE_LINE), or their cosine is 0 or less |
| escape | context vectors are subtracted, which raises the margin, but neither cosine nor novel MRR |
| control | the control of the directional loss decides nothing: λ at one end of its range, or 0, all through an epoch |

Nothing here has a memory: a resumed run has the same rows, and so the same alarms. Only a step that broke leaves no
row: `explain` puts it into words, and run.yaml keeps it. Each other kind has one alarm, for the first epoch that it is
true of; its text names the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..config import Version
from ..errors import LVMError
from ..evaluate import COLLAPSED
from ..loop import StepBroke, StepResult
from ..losses import names
from .validation import SPREAD as FACTS

# Raw = 0 has the mean-square loss 1/D, a good prediction about ¾ of it, and the listwise loss of a guess is about 1½
# times that of the best version: more than twice the lowest is no fluctuation but worse than knowing nothing.
DIVERGED = 2.0
# (effective rank − 1) / (that of the targets − 1). On the embedded data a line has 0, the transformers of v22, which
# know less than a constant, 0.005 to 0.016, LSTM 0.09, AMN 0.34.
ONE_LINE = 0.02
BEGUN = 3  # a model that never told contexts apart has collapsed from this epoch on; one that did, at once
ESCAPE = 0.25  # the bound of the escape share for a version without `rewind`: that of `share`; `rank` has up to 0.17
PAYS = 0.02  # a novel MRR that is higher by less than this share is not higher: validation has few articles

DO_BROKEN = "lower the learning rate (optimizer.lr), or train in float32"
LOOKED_FOR = {
    "broken": "a loss, gradient or weight that is not finite",
    "divergence": "a loss that diverges",
    "collapse": "predictions that collapse",
    "escape": "a margin from leaving the context",
    "control": "a control that decides nothing",
}


class Alarm(NamedTuple):
    """What went wrong: `step` is the step it happened at; of an epoch's means, the last step of that epoch."""

    epoch: int
    step: int
    kind: str  # of LOOKED_FOR
    what: str  # with the values
    do: str

    @property
    def line(self) -> str:
        """For a log."""
        return f"ALARM  epoch {self.epoch}, step {self.step}: {self.kind}: {self.what}. What to do: {self.do}"


def alarms(
    version: Version, history: Sequence[Mapping], steps: Sequence[Mapping], batches: int, broken: Sequence[Alarm] = ()
) -> list[Alarm]:
    """All alarms of a run in the order of their steps, one a kind, and those in `broken`.

    `history`, `steps`: rows of epochs.csv and steps.csv; `batches`: of an epoch.
    """
    out = list(broken)
    for kind, epochs in _findings(version, history, steps).items():
        first = next(iter(epochs), None)
        if first is not None:
            what, do = epochs[first]
            others = f"; so in {_spans(list(epochs))}" if len(epochs) > 1 else ""
            out.append(Alarm(first, first * batches, kind, what + others, do))
    return sorted(out, key=lambda a: (a.step, a.kind))


def read_broken(record: Mapping, where: str) -> list[Alarm]:
    """The alarms of kind `broken` in run.yaml's record. Raises LVMError where they are no alarms."""
    try:
        listed = [Alarm(**a) for a in record.get("alarms") or []]
        if not all(list(map(type, a)) == [int, int, str, str, str] for a in listed):
            raise TypeError("epoch and step are whole numbers, kind, what and do texts")
    except (TypeError, AttributeError) as e:
        raise LVMError(f"{where}: `alarms` cannot be read ({e}); restore the file, or remove the key") from e
    return [a for a in listed if a.kind == "broken"]


def due(version: Version, history: Sequence[Mapping], steps: Sequence[Mapping]) -> str:
    """The first alarm of the last epoch of `history`, as kind and what; empty where there is none."""
    epoch = int(history[-1]["epoch"])
    found = _findings(version, history, steps).items()
    return next((f"{kind}: {epochs[epoch][0]}" for kind, epochs in found if epoch in epochs), "")


def nothing(version: Version) -> str:
    """The sentence for a run without alarms: which kinds were looked for."""
    kinds = [k for k in LOOKED_FOR if k != "control" or _controlled(version)]
    return f"Nothing went wrong: looked for, and not found, were {', '.join(LOOKED_FOR[k] for k in kinds)}."


def short(found: Iterable[Alarm]) -> str:
    """All alarms in a few words: kinds and where each began; empty where there is none."""
    words = {True: "broken at epoch {0}, step {1}", False: "{2} from epoch {0}, step {1} on"}
    return "; ".join(words[a.kind == "broken"].format(*a) for a in found)


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
                f"the loss ({' + '.join(parts)}) is {now:.4g}, {now / lowest:.3g} times its lowest so far, {lowest:.4g}"
            )
            found[int(row["epoch"])] = what, f"lower optimizer.lr (now {row['learning_rate']:.2g})"
        lowest = min(lowest, now)
    return found


def _collapse(version: Version, history: Sequence[Mapping]) -> dict:
    """`judge.rating` calls the finished model collapsed by the same bound of the variance."""
    found, begun = {}, False
    for row in history:
        cosine, rank, variance = row["val_cos"], row["rank_share"], row["variance_share"]
        away, alike = cosine <= 0, variance < COLLAPSED or rank < ONE_LINE
        if not (away or alike):
            begun = True
        elif begun or row["epoch"] >= BEGUN:
            facts = [
                f"the predictions' variance is {variance:.1%} of the targets', their effective rank "
                f"{row['effective_rank']:.1f}, beyond the first direction {rank:.1%} of the targets'",
                f"the validation cosine is {cosine:+.3f}" + (": away from the targets" if away else ""),
            ]
            found[int(row["epoch"])] = "; ".join(facts if alike else facts[::-1]), _against_collapse(version, begun)
    return found


def _against_collapse(version: Version, begun: bool) -> str:
    if begun and _controlled(version):
        return "lower the directional pull: the schedule's shares, or control.lambda_max"
    if begun:
        return "lower optimizer.lr"
    return "the model predicts one vector so far: train on more windows, for more epochs, or a smaller model (amn)"


def _escape(version: Version, history: Sequence[Mapping]) -> dict:
    """`judge.health` has the rule for a finished model, with intervals. By an epoch's means: the escape share has risen
    above its bound, and against the epoch where it was least the margin (to the last, or to prev) is higher, while
    neither the cosine nor the novel MRR is. A model that knows nothing yet has a share of one half: only one that was
    below the bound can rise above it."""
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
                do = "lower the directional pull (control.lambda_max, the schedule's shares), or set `rewind`"
                found[int(row["epoch"])] = what, do
        if least is None or share < least["escape"]:
            least = row
    return found


def _controlled(version: Version) -> bool:
    """Whether there is something that sets λ: not where it is fixed, or its range has one point."""
    c = version.control
    return c.rule not in ("none", "fixed") and c.lambda_min < c.lambda_max


def _control(version: Version, history: Sequence[Mapping]) -> dict:
    if version.control.rule == "none":
        return {}
    found = {int(row["epoch"]): _undecided(version, row) for row in history}
    return {epoch: words for epoch, words in found.items() if words}


def _undecided(version: Version, row: Mapping) -> tuple[str, str] | None:
    """What to say of an epoch in which the control decided nothing; None where it did."""
    c = version.control
    free = c.rule != "constrained"  # a multiplier of 0 means that the bound is kept
    if free and row["lambda_eff"] == 0:
        by = [f"the sign guard skipped {row['skips']:.0f}"] if row["skips"] else []
        by += [f"the confidence gate, which opens above {c.gate.low:g}, was shut in the others"] if c.gate else []
        cosines = f"mean cos(p, y) {row['pos']:+.3f}, to prev {row['neg']:+.3f}"
        do = "train longer without the directional loss" + (", or lower control.gate.low" if c.gate else "")
        return f"λ was 0 in every batch: {', '.join(by)} ({cosines})", do
    if not _controlled(version):
        return None
    if free and row["at_lambda_min"] == 1:
        what = f"λ was at lambda_min, {c.lambda_min:g}, in every batch it acted in (ρ {row['rho']:.3g})"
        return what, "lower control.lambda_min"
    if row["at_lambda_max"] == 1:
        what = f"λ was at its ceiling, {row['lambda_eff']:.4g}, in every batch it acted in (ρ {row['rho']:.3g})"
        goal = "the schedule's shares" if free else "control.constraint.at_least"
        return what, f"raise control.lambda_max, or lower {goal}"
    return None


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


# Figures that are not finite


def explain(version: Version, broke: StepBroke) -> Alarm:
    """A step that broke, as an alarm."""
    epoch, step, result = broke.epoch, broke.step, broke.result
    if broke.before is not None and not math.isfinite(broke.before.gradient_norm):
        step, result = step - 1, broke.before
    loss, names = result.values["loss"], broke.weights
    where, values = f"epoch {epoch}, step {step}", _values(version, result)
    tensors = f"{len(names)} tensors of the weights, the first {names[0]}, are not finite" if names else ""
    if math.isfinite(loss) and not math.isfinite(result.gradient_norm):
        norm = float(result.gradient_norm)
        what = f"the gradient's norm is {norm} at {where}, where the loss was still {loss:.4g} ({values})"
    elif math.isfinite(loss):
        what = f"{tensors} after {where}, where the loss was still {loss:.4g} ({values})"
    else:
        figures = result.values | result.shares
        wrong = [n for n in _told(version)[:-3] if not math.isfinite(figures[n])]
        first = f"the first term that is not finite is {wrong[0]}" if wrong else "each term is finite, their sum is not"
        what = f"the loss is {loss} at {where} ({values}); {first}" + (f"; {tensors}" if tensors else "")
    return Alarm(epoch, step, "broken", what, DO_BROKEN)


def check_validation(epoch: int, step: int, means: Mapping[str, float], found: Mapping[str, float]) -> Alarm | None:
    """The alarm for a validation figure that is not finite (`val_energy` of a version that has none is NaN)."""
    checked = {k: x for k, x in found.items() if k not in FACTS}
    wrong = [k for k, x in checked.items() if not math.isfinite(x) and k != "val_energy"]
    if not wrong:
        return None
    values = ", ".join(f"{k} {x:.4g}" for k, x in checked.items())
    rate, loss = means["learning_rate"], means["train_loss"]
    what = f"{wrong[0]} is {found[wrong[0]]} after epoch {epoch}, step {step}, where the mean loss was still {loss:.4g}"
    return Alarm(epoch, step, "broken", f"{what} (learning rate {rate:g}, {values})", DO_BROKEN)


def _told(version: Version) -> tuple[str, ...]:
    return (*names(version.losses), "lambda_eff", "pos", "neg", "escape")


def _values(version: Version, result: StepResult) -> str:
    figures = result.values | result.shares
    return ", ".join([f"learning rate {result.learning_rate:g}", *(f"{k} {figures[k]:.4g}" for k in _told(version))])
