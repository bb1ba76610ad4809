"""Figures of a run: by epoch, by logged step, and its checklist. `history`, `steps`: rows of epochs.csv, steps.csv."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .. import losses
from ..config import Version, data_name
from ..controller import by_gradient
from ..judge.rating import MARGIN_RISE, RECALL, RHO_TOLERANCE, SPIKE, VAL_COS
from .style import BAND, GREY, INK, PULL, WARN, lines, title, whole_epochs


def training(history: pd.DataFrame, version: Version, baselines: pd.DataFrame | None = None) -> Figure:
    """Return a run by epoch: losses, cosines, λ and ρ, mini-5CAT, against the version's expected timeline.

    `baselines`: index predictor, columns val_loss, val_cos, margin, recall_at_5, of the baselines on the same
    validation windows; drawn as thin labelled lines.
    """
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.6), layout="constrained")
    loss, cosine, share, margin, recall, pull = axes.flat
    h, epoch = history, history["epoch"]
    names = ("training, mean square", "training, all terms", "validation, mean square")
    lines(loss, epoch, dict(zip(names, (h["mse"], h["train_loss"], h["val_loss"]), strict=True)))
    loss.set(title="Losses", ylabel="loss", yscale="log")
    names = ("validation, cos(p, y)", "training, cos(p, y): pos", "training, cos(p, prev): neg")
    lines(cosine, epoch, dict(zip(names, (h["val_cos"], h["pos"], h["neg"]), strict=True)))
    cosine.set(title="Cosines: is the target nearer than prev?", ylabel="cosine")
    column, name, unit = _share(version)
    lines(share, epoch, {"ρ": h[column]})
    share.step(epoch, h["rho_target"], where="mid", color=PULL, ls="--", label="target")
    share.step(epoch, h["rho_cap"], where="mid", color=WARN, ls=":", label="cap")
    share.set(title=name, ylabel=unit)
    lines(margin, epoch, {"this run": h["margin"], "training gap, against prev": h["gap"]})
    margin.axhline(0, color=GREY)
    margin.set(title="Mini-5CAT margin against the last context vector", ylabel="cos(p, y) − cos(p, last)")
    lines(recall, epoch, {"this run": 100 * h["recall_at_5"]})
    recall.axhline(100 * min(5 / (version.context_length + 1), 1), color=GREY, label="chance")
    recall.set(title="Mini-5CAT R@5 among six candidates", ylabel="windows, %")
    lines(pull, epoch, {"λ_eff": h["lambda_eff"]})
    pull.set(title="Weight of the directional loss, and skipped batches", ylabel="λ_eff")
    skips = pull.twinx()
    skips.bar(epoch, h["skips"], color=WARN, alpha=0.35, width=0.5)
    skips.set(ylabel="batches skipped (bars)", ylim=(0, max(4, 1.1 * h["skips"].max())))
    skips.grid(False)
    scales = {"val_cos": (cosine, 1), "margin": (margin, 1), "recall_at_5": (recall, 100)}
    for column, (axis, scale) in (scales | {"rho": (share, 1)}).items():
        _expected(axis, version, column, scale)
    if baselines is not None:
        for column, (axis, scale) in (scales | {"val_loss": (loss, 1)}).items():
            _baselines(axis, baselines[column] * scale)
    for axis in axes.flat:
        axis.set(xlabel="epoch", xlim=(0.5, version.epochs + 0.5))
        whole_epochs(axis)
        if len(axis.get_legend_handles_labels()[1]) > 1:
            axis.legend(fontsize="x-small")
    return title(figure, f"{version.name} on {data_name(version.data)}: {version.model}, seed {version.seed}")


def step_health(steps: pd.DataFrame, version: Version) -> Figure:
    """Return a run by logged step: cosines, gap and ratio, ρ against target and cap, λ, gradient norm, terms."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.2), layout="constrained")
    cosines, gaps, share, pull, gradient, terms = axes.flat
    x = steps["step"]
    lines(cosines, x, {"cos(p, y): pos": steps["pos"], "cos(p, prev): neg": steps["neg"]})
    cosines.axhline(0, color=GREY)
    cosines.set(title="Batch means of the two cosines", ylabel="cosine")
    lines(gaps, x, {"gap": steps["gap"], "m_gap": steps["margin_target"], "ratio": steps["ratio"]})
    gaps.axhline(0, color=GREY)
    gaps.set(title="Gap and ratio, and the target gap m_gap", ylabel="difference of cosines; ratio")
    target, (column, name, unit) = steps["rho_target"], _share(version)
    share.fill_between(x, target - 0.05, target + 0.05, color=BAND, alpha=0.3, lw=0, label="target ± 0.05")
    share.plot(x, steps["rho_cap"], ":", color=WARN, label="cap")
    lines(share, x, {"ρ": steps[column]})
    share.set(title=name, ylabel=unit)
    lines(pull, x, {"λ_eff": steps["lambda_eff"]})
    skipped = steps[steps["skip"] > 0]
    pull.plot(skipped["step"], skipped["lambda_eff"], "x", color=WARN, ms=9, label="skipped by the guard")
    if version.control.rule != "none":
        pull.axhline(version.control.lambda_max, color=GREY, ls=":", label="λ_max")
    pull.set(title="Weight of the directional loss", ylabel="λ_eff")
    lines(gradient, x, {"before clipping": steps["gradient_norm"]})
    gradient.axhline(version.optimizer.clip_norm, color=GREY, ls=":", label="clipped to")
    gradient.set(title="Gradient norm of the weights", ylabel="norm", yscale="log")
    weights = losses.weights(version.losses, 1.0) | {"directional": steps["lambda_eff"]}
    _terms(terms, x, {name: steps[name] * weights.get(name, 0.0) for name in losses.names(version.losses)})
    terms.set(title="Weighted terms of the loss", ylabel="weighted term")
    for axis in axes.flat:
        axis.set(xlabel="step")
        axis.legend(fontsize="x-small")
    return title(figure, f"{version.name}: every {version.log_every} steps, the first and the last")


def pulls(rows: pd.DataFrame, version: Version, x: str) -> Figure:
    """Return how hard each term pulls at the prediction, and whether they pull together.

    `rows`: of steps.csv with `x` "step", or of epochs.csv with "epoch".
    """
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.3), layout="constrained")
    norms, share, angle, escape = axes
    _terms(norms, rows[x], {t: rows[f"pull_{t}"] for t in losses.names(version.losses) if f"pull_{t}" in rows})
    norms.set(title="Gradient of each weighted term", ylabel="norm at the prediction")
    lines(share, rows[x], {"ρ in value": rows["rho"], "ρ in gradient": rows["rho_gradient"]})
    aim = "gradient" if by_gradient(version.control) else "value"
    share.plot(rows[x], rows["rho_target"], ":", color=GREY, label=f"target (of the {aim})")
    share.set(title="The directional share, twice", ylabel="directional / mean square", ylim=(0, None))
    angle.plot(rows[x], rows["angle"], "o-", color=INK)
    angle.axhline(90, color=GREY, label="at right angles")
    angle.set(title="Angle between the two gradients", ylabel="degrees", ylim=(0, 180), yticks=(0, 45, 90, 135, 180))
    escape.plot(rows[x], 100 * rows["escape"], "o-", color=INK)
    escape.axhline(0, color=GREY, label="no context vector subtracted")
    escape.set(title="Escape: negative context weights", ylabel="share of all weights, %", ylim=(-4, 104))
    for axis in axes:
        axis.set(xlabel=x)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="x-small")
    every = "by epoch, means over its batches" if x == "epoch" else f"every {version.log_every} steps"
    return title(figure, f"{version.name}, {every}")


def checks(history: pd.DataFrame, steps: pd.DataFrame, version: Version) -> Figure:
    """Return the quantities of the checklist, each with its bound and the values beyond it shaded."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 5.6), layout="constrained")
    acting = steps[steps["skip"] == 0]
    loss, best = history["val_loss"], history["val_loss"].cummin().shift().fillna(history["val_loss"])
    panels = [  # title, unit, values, bound, on which side of it values are bad
        ("|ρ − target|", "step", (acting[_share(version)[0]] - acting["rho_target"]).abs(), RHO_TOLERANCE, "above"),
        ("batches skipped", "epoch", history["skips"], 0.5, "above"),
        ("lower of pos and neg", "step", steps[["pos", "neg"]].min(axis=1), 0.0, "below"),
        ("λ_eff", "step", steps["lambda_eff"], None, ""),
        ("margin, rise over 3 epochs", "epoch", history["margin"].diff(3), MARGIN_RISE, "below"),
        ("R@5 of six", "epoch", history["recall_at_5"], RECALL, "below"),
        ("validation cosine", "epoch", history["val_cos"], VAL_COS, "below"),
        ("validation loss / best before", "epoch", loss / best, SPIKE, "above"),
    ]
    for axis, (name, unit, y, bound, bad) in zip(axes.flat, panels, strict=True):
        axis.plot((history if unit == "epoch" else steps).loc[y.index, unit], y, "o-", color=INK, ms=4)
        axis.set(title=name, xlabel=unit)
        if y.notna().sum() == 0:
            axis.text(0.5, 0.5, "not applicable", transform=axis.transAxes, ha="center", color="0.3")
            continue
        if bound is not None:
            low, high = axis.get_ylim()
            low, high = min(low, bound - 0.1 * abs(high - low)), max(high, bound + 0.1 * abs(high - low))
            axis.axhspan(*((bound, high) if bad == "above" else (low, bound)), color=WARN, alpha=0.12, lw=0)
            axis.axhline(bound, color=WARN, ls="--", lw=1)
            axis.set_ylim(low, high)
        if unit == "epoch":
            whole_epochs(axis)
    return title(figure, f"{version.name}: the checklist's quantities; shaded: broken")


def _share(version: Version) -> tuple[str, str, str]:
    """Return the column, the title and the unit of the share that the version holds at rho_target."""
    if by_gradient(version.control):
        return "rho_gradient", "Directional share of the gradient, ρ", "‖λ · ∂L_dir‖ / ‖∂L_mse‖"
    return "rho", "Directional share of the loss, ρ", "λ · L_dir / L_mse"


def _expected(axis, version: Version, column: str, scale: float) -> None:
    """Draw the expected timeline: the margin's as a band, ρ within its tolerance, the others as a line."""
    firsts = [row.from_epoch for row in version.expected] + [version.epochs + 1]
    for i, row in enumerate(version.expected):
        value, slack = getattr(row, column), 0.051 if column == "rho" else 0.001
        low, high = value if column == "margin" else (value, value)
        epochs, label = [firsts[i] - 0.5, firsts[i + 1] - 0.5], "" if i else "expected"
        ends = scale * (low - slack), scale * (high + slack)
        axis.fill_between(epochs, *ends, color=BAND, alpha=0.3, lw=0, label=label)


def _baselines(axis, values: pd.Series) -> None:
    """Draw dashed lines with their names right of the axes, moved apart where they would cover each other."""
    for value in values:
        axis.axhline(value, color=GREY, lw=0.8, ls=(0, (4, 3)))
    axis.autoscale_view()  # the limits as they will be drawn
    below = -1.0
    for name, value in values.sort_values().items():
        height = axis.transAxes.inverted().transform(axis.transData.transform((1, value)))[1]
        below = max(height, below + 0.06)
        axis.text(1.01, below, name, transform=axis.transAxes, fontsize="x-small", color="0.3", va="center")


def _terms(axis, x: pd.Series, parts: Mapping[str, pd.Series]) -> None:
    """Draw a line a term on a logarithmic scale; a term that is never above 0 is left out."""
    styles = ("o-", "s--", "^:", "v-.", "x-", "D:", "P--")
    for i, (name, part) in enumerate(parts.items()):
        if (part > 0).any():
            axis.plot(x, part.where(part > 0), styles[i % len(styles)], ms=4, label=name)
    axis.set(yscale="log")
