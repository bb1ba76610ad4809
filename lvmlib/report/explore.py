"""Behind the sliders of explore.ipynb: a trick's strength, a controller's rule, a window's texts.

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
from ..config import Version
from ..controller import Control
from ..errors import LVMError
from ..judge.fivecat import PROFILES, judge, summarise
from ..judge.tricks import tricks
from ..models import Predictor
from ..windows import Windows
from . import readout
from .summary import MEASURES

# Tricks: untrained predictors that gain margin

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


def all_tricks(dim: int, length: int, strength: float, components: Tensor) -> dict[str, Predictor]:
    """Return the tricks of `judge.tricks` and three more by name.

    The three subtract the last two vectors from the mean, continue the last move, and go from the mean to the last
    vector (at 1: copying). `components` (K, D) are those of the flip. At `strength` 0 most are the mean.
    """
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


def score(predictor: Predictor, split: Windows) -> dict:
    """Return FIGURES of a predictor on `split`, as `fivecat` summarises them, and two of its context weights.

    `escape`: the share of negative weights among the mean weights of the context vectors; `named`: whether gate G
    calls it escape.
    """
    frame, facts = judge(predictor, split)
    tables = {p: summarise(frame, p, split.horizon, split.context_length) for p in PROFILES}
    values = {(p, row["gate"], row["measure"]): row["value"] for p, rows in tables.items() for row in rows}
    weights = np.array(facts["weights"])
    share = float(np.clip(-weights, 0, None).sum() / max(np.abs(weights).sum(), 1e-12))
    figures = {name: values[MEASURES[name][0], *MEASURES[name][2:]] for name in FIGURES}
    return figures | {"escape": share, "named": facts["escape"]}


def curves(split: Windows, strengths: Sequence[float], components: Tensor) -> pd.DataFrame:
    """Return `score` of every trick at every strength: a row each, with the columns trick and strength."""
    rows = []
    for strength in strengths:
        predictors = all_tricks(split.store.dim, split.context_length, float(strength), components)
        rows += [{"trick": name, "strength": float(strength), **score(p, split)} for name, p in predictors.items()]
    return pd.DataFrame(rows)


# A controller's rule on a recorded run

BRANCH = (controller.rho_controller, controller.rho_cap)  # they differ by the branch that raises λ
MEMORY = ("gradient_share", "pi", "constrained")  # rules whose λ depends on the batches before


def is_exact(control: Control, steps: pd.DataFrame) -> bool:
    """Return whether `replay` knows all that a rule reads: it has no memory, or every step was logged."""
    every = np.array_equal(steps["step"], np.arange(1, len(steps) + 1))
    return control.rule not in MEMORY or every


def replay(
    version: Version,
    steps: pd.DataFrame,
    epochs: pd.DataFrame,
    control: Control | None = None,
    aim: float = 1.0,
    cap: float = 1.0,
) -> pd.DataFrame:
    """Return λ and ρ that a rule makes of a run's logged losses, in open loop.

    `steps`, `epochs`: the tables of a run of `version`; `control`: the rule to try, by default the version's own; `aim`
    and `cap` multiply the schedule's target (rho_target, or the fraction) and cap for ρ. A row a logged step: epoch,
    step, lambda_eff (NaN where no gradient was logged), rho, skip, aim, cap, and for rule rho_controller asked (ρ lay
    below 0.8·aim, so its raising branch was entered) and raised (λ with that branch less λ without it).

    The version's own rule gives the recorded λ, exactly or, if it reads gradients, to rounding. Raises LVMError for a
    constrained rule on a run of another rule, and the other way about.
    """
    control = control or version.control
    if control.rule != version.control.rule and "constrained" in (control.rule, version.control.rule):
        raise LVMError(f"rule {control.rule} reads other losses than {version.name} logs; try {version.control.rule}")
    state = good = controller.START
    rewinds, peak, rows = 0, -math.inf, []
    for validated in epochs.to_dict("records"):
        epoch = int(validated["epoch"])
        now = controller.phase(version.schedule, epoch)
        target = now.fraction if math.isnan(now.rho_target) else now.rho_target
        now = now._replace(fraction=aim * target, rho_target=aim * target, rho_cap=cap * now.rho_cap)
        own = controller.cooled(control, version.rewind.cool, rewinds) if rewinds else control
        for row in steps[steps["epoch"] == epoch].to_dict("records"):
            result, state = _decide(own, now, row, state)
            rows.append({"epoch": epoch, "step": int(row["step"]), **result, "aim": now.rho_target, "cap": now.rho_cap})
        if validated["rewound"] > 0:
            rewinds, state = rewinds + 1, good
        elif validated["novel_mrr"] > peak:
            peak, good = validated["novel_mrr"], state
    return pd.DataFrame(rows)


def _decide(c: Control, now: controller.Phase, row: Mapping, state: controller.State) -> tuple[dict, controller.State]:
    """Return what a rule makes of a logged step, and its state thereafter."""
    mse, directional, pos, neg = (row[k] for k in ("mse", "directional", "pos", "neg"))
    known = row["lambda_eff"] > 0  # the gradient was logged times λ
    pulls = row["pull_mse"], row["pull_directional"] / row["lambda_eff"] if known else math.nan
    if controller.by_gradient(c) and math.isnan(sum(pulls)) and not controller.guarded(pos, neg, c.guard):
        return {"lambda_eff": math.nan, "rho": math.nan, "skip": 0, "asked": False, "raised": 0.0}, state
    decision = controller.decide(c, now, mse, directional, pos, neg, state, pulls)
    asked, raised = False, 0.0
    if c.rule == "rho_controller" and not decision.skip:
        solved = controller.fraction(mse, directional, now.rho_target, c)
        if controller.share(solved, mse, directional) < 0.8 * now.rho_target:
            with_it, without = (rule(mse, directional, now.rho_target, now.rho_cap, c) for rule in BRANCH)
            asked, raised = True, with_it - without
    result = {"lambda_eff": decision.lambda_eff, "rho": decision.rho, "skip": int(decision.skip)}
    return result | {"asked": asked, "raised": raised}, decision.state


# A window in texts


def window_table(neighbours: Mapping[str, pd.DataFrame], windows: Windows, width: int = 160) -> str:
    """Return one window as HTML: its context, the target, and the texts nearest to each predictor's prediction.

    `neighbours`: predictor → what `readout.nearest` gave for the window. Texts are escaped and cut to `width`
    characters.
    """
    first = next(iter(neighbours.values()))
    first = first[first["role"].isin(["context", "truth"])]
    store, target = windows.store, first.iloc[-1]
    cosine = {name: frame.set_index(["role", "row"])["cosine"] for name, frame in neighbours.items()}

    def line(row: Mapping, mark: str, names: Sequence[str]) -> str:
        numbers = [f"{cosine[n][row['role'], row['row']]:.2f}" if n in names else "" for n in neighbours]
        return readout.html_row(
            f"{row['position']}{mark}", numbers, readout.escape(readout.shorten(row["text"], width))
        )

    marks = {"context": ", read", "truth": ", <b>true</b>"}
    parts = [("context and target", [line(row, marks[row["role"]], [*neighbours]) for row in first.to_dict("records")])]
    for name, frame in neighbours.items():
        true = frame[frame["role"] == "truth"].iloc[0]
        heading = f"{readout.escape(name)}: the true one has rank {true['rank']:g} of {true['candidates']} chunks not "
        heading += f"read (by chance {(true['candidates'] + 1) / 2:g}); nearest are"
        rows = frame[frame["role"] == "nearest in article"].to_dict("records")
        parts.append((heading, [line(row, marks["truth"] * row["true"], [name]) for row in rows]))
    caption = f"<b>{readout.title(store, target['article'])}</b>: prediction of chunk {target['position']}"
    columns = ["chunk", *map(readout.escape, neighbours), "cosine with each prediction; text"]
    return readout.html_table(caption, columns, parts) + (readout.credit(store) if any(first["text"] != "") else "")


# Sliders


def png(figure: Figure) -> bytes:
    """Return a figure as PNG for `ipywidgets.Image`, which is replaced whole without flicker, and close it."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()


def connect(controls: Mapping, update: Callable[..., None], message) -> None:
    """Call `update` with the values of the widgets `controls` now and whenever one of them changes.

    An LVMError is shown in the HTML widget `message`: nobody sees one that is raised in a callback.
    """

    def changed(_=None) -> None:
        try:
            update(**{name: widget.value for name, widget in controls.items()})
        except LVMError as e:
            message.value = readout.escape(str(e))

    for widget in controls.values():
        widget.observe(changed, "value")
    changed()
