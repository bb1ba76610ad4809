"""What explore.ipynb moves by hand: a trick's strength, the rule of a controller, the window that is told in texts.

Axes: T context length, D vector dimension, K components.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from .. import controller
from ..baselines import Weighted
from ..config import Control, Version
from ..errors import LVMError
from ..judge.fivecat import PROFILES, judge, summarise
from ..judge.tricks import tricks
from ..models import Predictor
from ..runs import alarms
from ..text import slice as wikipedia
from ..windows import Windows
from . import readout
from .summary import MEASURES

# --- what a trick buys -----------------------------------------------------------------------------------------------

# Of 5CAT, on the windows that are given; `escape` and `named` are of the predictions' context weights.
FIGURES = {
    "margin_last": "margin against the last",
    "margin_prev": "margin against context[-2]",
    "margin": "margin, gate A",
    "of_six": "R@5 of six",
    "val_cos": "cosine",
    "novel_ahead": "novel margin, ahead",
    "novel_mrr": "novel MRR",
    "of_hundred": "1 of 100",
}


def arithmetic(dim: int, length: int, strength: float, components: Tensor) -> dict[str, Predictor]:
    """The tricks of `models.tricks`, and three more, by name: both of the last two vectors subtracted, the last move
    continued, and the way from the mean to the last vector, which at 1 is copying. At `strength` 0 all but the flip and
    the move are the mean; the move starts from the last vector. `components` (K, D) are those of the flip."""
    mean, last = torch.full((length,), 1 / length), torch.zeros(length)
    last[-1] = 1.0
    both, move = mean.clone(), last.clone()
    both[-2:] -= strength
    move[-2:] += torch.tensor([-strength, strength])
    more = {
        "mean − a·both": both,
        "last + a·(last − context[-2])": move,
        "mean + a·(last − mean)": mean.lerp(last, strength),
    }
    return tricks(dim, length, strength, components) | {name: Weighted(dim, w) for name, w in more.items()}


def bought(predictor: Predictor, split: Windows) -> dict:
    """FIGURES of a predictor on `split`, as `fivecat` summarises them; `escape`, the share of negative weights among
    the mean weights of the context vectors (`losses.health`); `named`, whether gate G's rule names it escape."""
    frame, facts = judge(predictor, split)
    found = {p: summarise(frame, p, split.horizon, split.context_length) for p in PROFILES}
    values = {(p, row["gate"], row["measure"]): row["value"] for p, rows in found.items() for row in rows}
    weights = np.array(facts["weights"])
    share = float(np.clip(-weights, 0, None).sum() / max(np.abs(weights).sum(), 1e-12))
    taken = {name: values[MEASURES[name][0], *MEASURES[name][2:]] for name in FIGURES}
    return taken | {"escape": share, "named": facts["escape"]}


def curves(split: Windows, strengths: Sequence[float], components: Tensor) -> pd.DataFrame:
    """`bought` of every trick at every strength: a row each, with the columns trick and strength."""
    rows = []
    for strength in strengths:
        found = arithmetic(split.store.dim, split.context_length, float(strength), components)
        rows += [{"trick": name, "strength": float(strength), **bought(p, split)} for name, p in found.items()]
    return pd.DataFrame(rows)


# --- a controller's rule on a recorded run ---------------------------------------------------------------------------

BRANCH = (controller.rho_controller, controller.rho_cap)  # which differ by the branch of raising alone
MEMORY = ("gradient_share", "pi", "constrained")  # rules whose λ depends on the batches before


def exact(control: Control, steps: pd.DataFrame) -> bool:
    """Whether `replay` knows all that a rule reads: it has no memory, or every step was logged."""
    every = np.array_equal(steps["step"], np.arange(1, len(steps) + 1))
    return control.rule not in MEMORY or every


def replay(
    version: Version,
    steps: pd.DataFrame,
    epochs: pd.DataFrame,
    control: Control | None = None,
    aim: float = 1.0,
    cap: float = 1.0,
    told: Sequence[alarms.Alarm] | None = None,
) -> pd.DataFrame:
    """λ and ρ that a rule makes of the losses which a run logged, in open loop: those losses answered to the λ of then.

    `steps`, `epochs`: the tables of a run of `version`; `control`: the rule to try, by default the version's own; `aim`
    and `cap` multiply what the schedule sets for ρ (a version without ρ_target has its fraction for one, and the other
    way about). A frame, a row a logged step: epoch, step, lambda_eff, rho, skip, aim, cap, and of rule rho_controller
    asked (whether ρ lay below 0.8·aim, so that its branch of raising was entered) and raised (λ with that branch less λ
    without it: 0, but under a cap below 0.8·aim, which the branch keeps from acting).

    With the version's own rule it gives the recorded λ: to the last bit where the rule reads loss values, to rounding
    where it reads gradients, which are logged as multiples of λ. A rule with memory sees the logged steps as if no
    others had been (`exact`). λ is NaN where the rule reads a gradient that was not logged, in a step that the guard
    skipped. After a rewind the rule has the lower ceiling and the state of the epoch gone back to, as in training.
    `told`: the run's alarms, `run.alarms`. Of a run that may go back in the midst of an epoch (`trouble`: rewind) those
    of kind broken tell from where it went back, which the table of epochs does not.
    Raises LVMError where the losses of a constrained version are to serve another rule, or another's a constraint; and
    where alarms are needed and not given, or are not those of this run.
    """
    control = control or version.control
    if "constrained" in {control.rule, version.control.rule} and control.rule != version.control.rule:
        raise LVMError(
            f"rule {control.rule} on a run of {version.name}: a constrained run logs its shortfall in place of a "
            f"directional loss; replay it by rule {version.control.rule}"
        )
    state = good = controller.START
    rewinds, peak, rows = 0, -math.inf, []
    for validated in epochs.to_dict("records"):
        epoch = int(validated["epoch"])
        now = controller.phase(version.schedule, epoch)
        wanted = now.fraction if math.isnan(now.rho_target) else now.rho_target
        now = now._replace(fraction=aim * wanted, rho_target=aim * wanted, rho_cap=cap * now.rho_cap)
        midst, at_end = _rewound(version, validated, told)
        if midst:
            rewinds, state = rewinds + midst, good
        own = controller.cooled(control, alarms.guard(version).cool, rewinds)
        for row in steps[steps["epoch"] == epoch].to_dict("records"):
            made, state = _decided(own, now, row, state)
            rows.append({"epoch": epoch, "step": int(row["step"]), **made, "aim": now.rho_target, "cap": now.rho_cap})
        if at_end:
            rewinds, state = rewinds + 1, good
        elif validated["novel_mrr"] > peak:
            peak, good = validated["novel_mrr"], state
    return pd.DataFrame(rows)


def _rewound(version: Version, validated: Mapping, told: Sequence[alarms.Alarm] | None) -> tuple[int, bool]:
    """How often an epoch was gone back from in its midst, and whether it was at its end; the table has the sum."""
    epoch, count = int(validated["epoch"]), 0 if math.isnan(validated["rewound"]) else int(validated["rewound"])
    may = alarms.action(version, "broken") == "rewind"
    if told is None and may and count:
        raise LVMError(
            f"run of {version.name}: epoch {epoch} was gone back from, in its midst or at its end: the tables do not "
            "say which; give the run's alarms (told=run.alarms)"
        )
    midst = sum(a.kind == "broken" and a.epoch == epoch for a in told or ()) if may else 0
    if count - midst not in (0, 1):
        raise LVMError(
            f"run of {version.name}: by its table epoch {epoch} was gone back from {count} times, {midst} of them in "
            "its midst by the alarms; give tables and alarms of one run"
        )
    return midst, count > midst


def _decided(c: Control, now: controller.Phase, row: Mapping, state: controller.State) -> tuple[dict, controller.State]:
    """What a rule makes of a logged step, and its state thereafter."""
    mse, directional, pos, neg = (row[k] for k in ("mse", "directional", "pos", "neg"))
    known = row["lambda_eff"] > 0  # the gradient was logged times λ
    pulls = row["pull_mse"], row["pull_directional"] / row["lambda_eff"] if known else math.nan
    if controller.by_gradient(c) and math.isnan(sum(pulls)) and not controller.guarded(pos, neg, c.guard):
        return {"lambda_eff": math.nan, "rho": math.nan, "skip": 0, "asked": False, "raised": 0.0}, state
    decision = controller.decide(c, now, mse, directional, pos, neg, state, pulls)
    made = {"lambda_eff": decision.lambda_eff, "rho": decision.rho, "skip": int(decision.skip)}
    made |= {"asked": False, "raised": 0.0}
    if c.rule == "rho_controller" and not decision.skip:
        solved = controller.fraction(mse, directional, now.rho_target, c)
        if controller.share(solved, mse, directional) < 0.8 * now.rho_target:
            rules = (rule(mse, directional, now.rho_target, now.rho_cap, c) for rule in BRANCH)
            made |= {"asked": True, "raised": next(rules) - next(rules)}
    return made, decision.state


# --- a window in texts -----------------------------------------------------------------------------------------------

CHUNK = 'style="text-align: left; vertical-align: top; white-space: nowrap"'


def told(found: Mapping[str, pd.DataFrame], windows: Windows, width: int = 160) -> str:
    """One window as HTML: what was read, what came, and what lies nearest to each predictor's prediction.

    `found`: predictor → what `readout.nearest` gave for the window. Texts are escaped, and cut to `width` characters.
    """
    first = next(iter(found.values()))
    first = first[first["role"].isin(["context", "truth"])]
    store, target = windows.store, first.iloc[-1]
    cell = {name: frame.set_index(["role", "row"]) for name, frame in found.items()}
    title = readout.escape(readout.shorten(str(store.articles.at[target["article"], "title"]), 80))
    head = "".join(f"<th {readout.RIGHT}>{readout.escape(name)}</th>" for name in found)
    body = [f"<tr><th {readout.LEFT}>chunk</th>{head}<th {readout.LEFT}>cosine with each prediction; text</th></tr>"]
    for row in first.to_dict("records"):
        cosines = "".join(
            f"<td {readout.RIGHT}>{cell[n].at[(row['role'], row['row']), 'cosine']:.2f}</td>" for n in found
        )
        mark = "read" if row["role"] == "context" else "<b>true</b>"
        body.append(f"<tr><td {CHUNK}>{row['position']}, {mark}</td>{cosines}{_text(row['text'], width)}</tr>")
    for name, frame in found.items():
        true = frame[frame["role"] == "truth"].iloc[0]
        body.append(
            f'<tr><th colspan="{len(found) + 2}" {readout.LEFT}>{readout.escape(name)}: the true one has rank '
            f"{true['rank']:g} of {true['candidates']} chunks not read (by chance {(true['candidates'] + 1) / 2:g}); "
            "nearest are</th></tr>"
        )
        for row in frame[frame["role"] == "nearest in article"].to_dict("records"):
            own = f"{row['cosine']:.2f}"
            cosines = "".join(f"<td {readout.RIGHT}>{own if n == name else ''}</td>" for n in found)
            mark = ", <b>true</b>" * bool(row["true"])
            body.append(f"<tr><td {CHUNK}>{row['position']}{mark}</td>{cosines}{_text(row['text'], width)}</tr>")
    credit = store.datasheet.get("source_sha256") == wikipedia.SLICE_SHA256 and any(first["text"] != "")
    return (
        f"<table><caption {readout.LEFT}><b>{title}</b>: chunk {target['position']} "
        f"is foretold</caption><tbody>{''.join(body)}</tbody></table>"
        + f"<p><small>{readout.CREDIT}</small></p>"
        * credit
    )


def _text(text: str, width: int) -> str:
    return f"<td {readout.TEXT}>{readout.escape(readout.shorten(text, width))}</td>"


# --- sliders ---------------------------------------------------------------------------------------------------------


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a picture, for `ipywidgets.Image`, which is replaced whole, so that nothing flickers.
    The figure is closed: a kernel in which a slider is moved for an hour holds none."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()


def connect(controls: Mapping, update: Callable[..., None], said) -> None:
    """Call `update` with the values of the widgets `controls` now and whenever one of them changes; an LVMError is told
    in the HTML widget `said`, for in a callback nobody would see it."""

    def changed(_=None) -> None:
        try:
            update(**{name: widget.value for name, widget in controls.items()})
        except LVMError as e:
            said.value = readout.escape(str(e))

    for widget in controls.values():
        widget.observe(changed, "value")
    changed()
