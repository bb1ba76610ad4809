"""One function a figure: tidy data in, the figure out; one style for all.

Colours are the colour-blind-safe palette of seaborn; every line also differs in dash or marker, so that a grey print
can be read. Chance levels are grey lines, uncertainty is a band or a bar.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from ..config import Version, data_name
from ..controller import by_gradient
from ..judge.arrow import MEASURES, Arrow
from ..judge.fivecat import Report
from ..judge.gates import GATES, GENERALISES, THRESHOLDS
from ..judge.measure import OFFSETS, STEPS, ablations
from ..judge.rating import MARGIN_RISE, RECALL, RHO_TOLERANCE, SPIKE, VAL_COS, Check, Verdict
from ..judge.spread import Spread, histogram
from ..judge.table import COHERENCE, ORIGINAL_OFFSETS
from ..runs import alarms
from ..statistics import chance_recall, over_articles

GREY = "0.45"
INK, PULL, WARN, BAND = (sns.color_palette("colorblind")[i] for i in (0, 1, 3, 2))


def use_style() -> None:
    """The house's figure style; call once, after the imports of a notebook."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette="colorblind",
        font_scale=0.8,
        rc={
            "figure.dpi": 110,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlesize": "medium",
            "grid.color": "0.9",
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "svg.hashsalt": "lvmlib",  # the same figure is the same file
        },
    )
    if get_ipython() is not None:
        # In a notebook figures are vectors: sharp on every screen, and no larger than pixels at 110 dpi. Those as well:
        # of a notebook that another process has executed JupyterLab shows no SVG.
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", "png", metadata={"Date": None})


def table(
    frame: pd.DataFrame, caption: str = "", digits: int = 3, formats: dict | None = None, escaped: bool = False
) -> Styler:
    """A frame as a reader sees it: rounded, no index, whole numbers whole, gaps as –. `formats`: column → format.

    Texts, headings and caption are shown letter by letter, whatever they hold; `escaped`: the texts are HTML already.
    """
    if not escaped:
        frame = frame.rename(columns=letters)
        formats = {letters(column): form for column, form in (formats or {}).items()}
        words = [c for c in frame if not pd.api.types.is_numeric_dtype(frame[c])]
        frame = frame.assign(**{c: frame[c].map(letters) for c in words})

    def shown(values: pd.Series) -> str | None:
        if not pd.api.types.is_numeric_dtype(values):
            return None
        return "{:,.0f}" if (values.dropna() % 1 == 0).all() else f"{{:,.{digits}f}}"

    numbers = list(frame.select_dtypes("number"))
    return (
        frame.style.format({c: shown(frame[c]) for c in frame} | (formats or {}), na_rep="–")
        .hide(axis="index")
        .set_caption(letters(caption))
        # Tables of one page must not share an id; this one depends on the content alone, so that reruns are alike.
        .set_uuid(hashlib.sha1(frame.to_csv().encode() + caption.encode()).hexdigest()[:10])
        .set_properties(subset=numbers, **{"text-align": "right"})
        .set_properties(subset=[c for c in frame if c not in numbers], **{"text-align": "left"})
        .set_table_styles(
            [
                {
                    "selector": "caption",
                    "props": "caption-side: top; text-align: left; font-weight: bold; white-space: nowrap",
                },
                {"selector": "th", "props": "text-align: left"},
                *(
                    {"selector": f"th.col{i}", "props": "text-align: right"}
                    for i, c in enumerate(frame)
                    if c in numbers
                ),
                {"selector": "td", "props": "white-space: nowrap; font-size: 92%"},
            ]
        )
    )


def letters(text):
    """Text as HTML that shows it letter by letter, beside MathJax too; anything else as it is."""
    opening = {ord(c): f"<span>&#{ord(c)};</span>" for c in "$\\"}
    return html.escape(text, quote=False).translate(opening) if isinstance(text, str) else text


def history_table(history: pd.DataFrame) -> Styler:
    """A run's epochs as a table."""
    formats = dict.fromkeys(("train_loss", "val_loss"), "{:.5f}") | {"lambda_eff": "{:.4f}", "learning_rate": "{:.1e}"}
    terms = ["mse", "directional", "floor", "norm", "orthogonality", "listwise", "energy"]
    behind = [*alarms.FACTS, "at_lambda_min", "at_lambda_max"]  # the alarms; diagnostics.ipynb shows them
    shown = history.drop(columns=[*terms, *behind]).dropna(axis=1, how="all")
    return table(shown, formats=formats | {"seconds": "{:.1f}"})


def alarms_table(found: Sequence[alarms.Alarm]) -> Styler:
    """A run's alarms as a table, with lines that break."""
    frame = pd.DataFrame(found, columns=["epoch", "step", "kind", "what", "what to do"])
    wide = table(frame).set_properties(subset=["what", "what to do"], **{"min-width": "14em"})
    return wide.set_table_styles([{"selector": "td", "props": "white-space: normal"}], overwrite=False)


def checklist_frame(checks: list[Check]) -> pd.DataFrame:
    """The checklist for `table`."""
    words = {True: "held", False: "BROKEN", None: "not applicable"}
    return pd.DataFrame(
        [
            {
                "every": c.every,
                "check": c.check,
                "wanted": c.wanted,
                "measured": c.measured,
                "": words[c.held],
                "first broken": c.broke,
            }
            for c in checks
        ]
    )


def conditions_frame(verdict: Verdict) -> pd.DataFrame:
    """The success conditions for `table`, a column for each baseline."""

    def shown(condition: dict, value: float) -> str:
        return "–" if value != value else f"{value:.0f}" if "gates" in condition["condition"] else f"{value:.3f}"

    return pd.DataFrame(
        [
            {
                "condition": c["condition"],
                "this run": shown(c, c["value"]),
                "wanted": f"{'>' if c['threshold'] == 0 else '≥'} {c['threshold']:g}",
                "": "met" if c["met"] else "NOT MET",
                "chance": shown(c, c["chance"]),
                **{name: shown(c, value) for name, value in c["baselines"].items()},
            }
            for c in verdict.conditions
        ]
    ).fillna("–")


def gate_table(report: Report, split: str, gates: str = "ABCDEG") -> Styler:
    """The measures of a split: the model with its interval, chance, and the predictors compared with.

    Profile `original` adds the thresholds. Differences of validation and OOD (gate E) stand with either split.
    """
    rows = report.table[report.table["split"].isin([split, "both"]) & report.table["gate"].isin(list(gates))]
    own = rows[rows["predictor"] == "model"].set_index(["gate", "measure"])
    frame = pd.DataFrame(
        {
            "gate": [f"{g} {GATES[g]}" for g, _ in own.index],
            "measure": [m for _, m in own.index],
            "model": own["value"].to_numpy(),
            "95 % over articles": [_interval(low, high) for low, high in zip(own["low"], own["high"], strict=True)],
            "chance": own["chance"].to_numpy(),
        }
    )
    if report.profile == "original":
        words = {True: "passed", False: "FAILED"}
        frame["wanted"] = [_threshold(g, m, t) for (g, m), t in zip(own.index, own["threshold"], strict=True)]
        frame[""] = [words[p] if pd.notna(p) else "" for p in own["passed"]]
    elif own["adjusted"].notna().any():
        frame["adjusted"] = own["adjusted"].to_numpy()
    for name in report.predictors[1:]:
        other = rows[rows["predictor"] == name].set_index(["gate", "measure"])["value"]
        frame[name] = other.reindex(own.index).to_numpy()
    frame["articles"], frame["windows"] = (
        pd.to_numeric(own[c]).astype(float).to_numpy() for c in ("articles", "windows")
    )
    frame["gate"] = frame["gate"].where(~frame["gate"].duplicated(), "")
    caption = f"5CAT, {report.profile}, {split}"
    if report.profile == "original":
        passed = [g for g, ok in report.gates(split).items() if ok]
        caption += f": {len(passed)} of 5 gates passed" + (f" ({', '.join(passed)})" if passed else "")
    return table(frame, caption=caption)


def judgement_table(report: Report, split: str) -> Styler:
    """Profile `calibrated`: what each gate asks, and what the interval answers."""
    frame = report.judgements(split)
    frame = pd.DataFrame(
        {
            "gate": [f"{g} {GATES[g]}" for g in frame["gate"]],
            "": frame["outcome"].replace("failed", "FAILED"),
            "question": frame["question"],
            "value": frame["value"],
            "95 % over articles": [_interval(*r) for r in zip(frame["low"], frame["high"], strict=True)],
            "articles": frame["articles"].astype(float),
            "wanted": frame["wanted"],
        }
    )
    frame["gate"] = frame["gate"].where(~frame["gate"].duplicated(), "")
    return table(frame, caption=f"5CAT, calibrated, {split}: what the gates ask")


def _interval(low: float, high: float, digits: int = 3) -> str:
    return "–" if pd.isna(low) else f"{low:.{digits}f} … {high:.{digits}f}"


def _threshold(gate: str, measure: str, threshold: float) -> str:
    if pd.isna(threshold):
        return ""
    return f"{'≥' if THRESHOLDS[gate, measure][0] == '>=' else '≤'} {threshold:.2f}"


def training(history: pd.DataFrame, version: Version, baselines: pd.DataFrame | None = None) -> Figure:
    """A run by epoch: losses, cosines, λ and ρ, mini-5CAT, against the version's expected timeline.

    `history`: rows of epochs.csv. `baselines`: index predictor, columns val_loss, val_cos, margin, recall_at_5, of
    the trivial predictors on the same validation windows; drawn as thin labelled lines.
    """
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.6), layout="constrained")
    loss, cosine, share, margin, recall, pull = axes.flat
    epoch = history["epoch"]
    loss.plot(epoch, history["mse"], "o-", color=INK, label="training, mean square")
    loss.plot(epoch, history["train_loss"], "s:", color=PULL, label="training, all terms")
    loss.plot(epoch, history["val_loss"], "^--", color=BAND, label="validation, mean square")
    loss.set(title="Losses", ylabel="loss", yscale="log")

    cosine.plot(epoch, history["val_cos"], "o-", color=INK, label="validation, cos(p, y)")
    cosine.plot(epoch, history["pos"], "s:", color=PULL, label="training, cos(p, y): pos")
    cosine.plot(epoch, history["neg"], "^--", color=BAND, label="training, cos(p, prev): neg")
    cosine.set(title="Cosines: is the target nearer than prev?", ylabel="cosine")

    share.plot(epoch, history[_held(version)[0]], "o-", color=INK, label="ρ")
    share.step(epoch, history["rho_target"], where="mid", color=PULL, ls="--", label="target")
    share.step(epoch, history["rho_cap"], where="mid", color=WARN, ls=":", label="cap")
    share.set(title=_held(version)[1], ylabel=_held(version)[2])

    margin.plot(epoch, history["margin"], "o-", color=INK, label="this run")
    margin.plot(epoch, history["gap"], "s:", color=PULL, label="training gap, against prev")
    margin.axhline(0, color=GREY)
    margin.set(title="Mini-5CAT margin against the last context vector", ylabel="cos(p, y) − cos(p, last)")
    recall.plot(epoch, 100 * history["recall_at_5"], "o-", color=INK, label="this run")
    recall.axhline(100 * min(5 / (version.context_length + 1), 1), color=GREY, label="chance")
    recall.set(title="Mini-5CAT R@5 among six candidates", ylabel="windows, %")
    pull.plot(epoch, history["lambda_eff"], "o-", color=INK, label="λ_eff")
    pull.set(title="Weight of the directional loss, and skipped batches", ylabel="λ_eff")
    skips = pull.twinx()
    skips.bar(epoch, history["skips"], color=WARN, alpha=0.35, width=0.5)
    skips.set(ylabel="batches skipped (bars)", ylim=(0, max(4, 1.1 * history["skips"].max())))
    skips.grid(False)

    for axis, column, scale in (
        (margin, "margin", 1),
        (recall, "recall_at_5", 100),
        (cosine, "val_cos", 1),
        (share, "rho", 1),
    ):
        _expected(axis, version, column, scale)
    if baselines is not None:
        for axis, column, scale in (
            (loss, "val_loss", 1),
            (cosine, "val_cos", 1),
            (margin, "margin", 1),
            (recall, "recall_at_5", 100),
        ):
            _baselines(axis, baselines[column] * scale)
    for axis in axes.flat:
        axis.set(xlabel="epoch", xlim=(0.5, version.epochs + 0.5))
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        labels = axis.get_legend_handles_labels()[1]
        if len(labels) > 1:
            axis.legend(fontsize="x-small")
    figure.suptitle(
        f"{version.name} on {data_name(version.data)}: {version.model}, seed {version.seed}",
        x=0.01,
        ha="left",
        weight="bold",
    )
    return figure


def _held(version: Version) -> tuple[str, str, str]:
    """Of the share that the version holds at rho_target: its column, and what a figure of it is called."""
    if by_gradient(version.control):
        return "rho_gradient", "Directional share of the gradient, ρ", "‖λ · ∂L_dir‖ / ‖∂L_mse‖"
    return "rho", "Directional share of the loss, ρ", "λ · L_dir / L_mse"


def _expected(axis, version: Version, column: str, scale: float) -> None:
    """The expected timeline: the margin's as a band, ρ within its tolerance, the others as a line."""
    rows = version.expected
    for i, row in enumerate(rows):
        first = row.from_epoch
        last = rows[i + 1].from_epoch if i + 1 < len(rows) else version.epochs + 1
        value = getattr(row, column)
        low, high = value if column == "margin" else (value - 0.05, value + 0.05) if column == "rho" else (value, value)
        label = {"label": "expected"} if i == 0 else {}
        axis.fill_between(
            [first - 0.5, last - 0.5],
            scale * low - 1e-3 * scale,
            scale * high + 1e-3 * scale,
            color=BAND,
            alpha=0.3,
            lw=0,
            **label,
        )


def _baselines(axis, values: pd.Series) -> None:
    """Dashed lines with their names right of the axes, moved apart where they would cover each other."""
    below = -1.0
    for value in values:
        axis.axhline(value, color=GREY, lw=0.8, ls=(0, (4, 3)))
    axis.autoscale_view()  # the limits as they will be drawn
    for name, value in values.sort_values().items():
        height = axis.transAxes.inverted().transform(axis.transData.transform((1, value)))[1]
        below = max(height, below + 0.06)
        axis.text(1.01, below, name, transform=axis.transAxes, fontsize="x-small", color="0.3", va="center")


def step_health(steps: pd.DataFrame, version: Version) -> Figure:
    """A run by logged step: cosines, gap and ratio, ρ against target and cap, λ_eff, skips, gradient norm, terms."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.2), layout="constrained")
    cosines, gaps, share, pull, gradient, terms = axes.flat
    x = steps["step"]
    cosines.plot(x, steps["pos"], "o-", color=INK, label="cos(p, y): pos")
    cosines.plot(x, steps["neg"], "^--", color=BAND, label="cos(p, prev): neg")
    cosines.axhline(0, color=GREY)
    cosines.set(title="Batch means of the two cosines", ylabel="cosine")
    gaps.plot(x, steps["gap"], "o-", color=INK, label="gap")
    gaps.plot(x, steps["ratio"], "^--", color=BAND, label="ratio")
    gaps.plot(x, steps["margin_target"], ":", color=PULL, label="m_gap")
    gaps.axhline(0, color=GREY)
    gaps.set(title="Gap and ratio, and the gap asked for", ylabel="difference of cosines; ratio")
    share.fill_between(
        x, steps["rho_target"] - 0.05, steps["rho_target"] + 0.05, color=BAND, alpha=0.3, lw=0, label="target ± 0.05"
    )
    share.plot(x, steps["rho_cap"], ":", color=WARN, label="cap")
    share.plot(x, steps[_held(version)[0]], "o-", color=INK, label="ρ")
    share.set(title=_held(version)[1], ylabel=_held(version)[2])
    pull.plot(x, steps["lambda_eff"], "o-", color=INK, label="λ_eff")
    skipped = steps[steps["skip"] > 0]
    pull.plot(skipped["step"], skipped["lambda_eff"], "x", color=WARN, ms=9, label="skipped by the guard")
    if version.control.rule != "none":
        pull.axhline(version.control.lambda_max, color=GREY, ls=":", label="λ_max")
    pull.set(title="Weight of the directional loss", ylabel="λ_eff")
    gradient.plot(x, steps["gradient_norm"], "o-", color=INK, label="before clipping")
    gradient.axhline(version.optimizer.clip_norm, color=GREY, ls=":", label="clipped to")
    gradient.set(title="Gradient norm of the weights", ylabel="norm", yscale="log")
    weights = {
        "mse": version.losses.mean_square,
        "directional": steps["lambda_eff"],
        "floor": version.losses.floor.weight,
        "norm": version.losses.norm,
        "orthogonality": version.losses.orthogonality,
        "listwise": version.losses.listwise.weight,
        "energy": version.losses.energy.weight,
    }
    _terms(terms, x, {name: steps[name] * weight for name, weight in weights.items()})
    terms.set(title="Weighted terms of the loss", ylabel="weighted term")
    for axis in axes.flat:
        axis.set(xlabel="step")
        axis.legend(fontsize="x-small")
    figure.suptitle(
        f"{version.name}: every {version.log_every} steps, the first and the last", x=0.01, ha="left", weight="bold"
    )
    return figure


def pulls(rows: pd.DataFrame, version: Version, x: str) -> Figure:
    """How hard each term pulls at the prediction, and whether they pull together.

    `rows`: of steps.csv with `x` "step", or of epochs.csv with "epoch".
    """
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.3), layout="constrained")
    norms, share, angle, escape = axes
    names = ("mse", "directional", "floor", "norm", "orthogonality", "listwise", "energy")
    _terms(norms, rows[x], {name: rows[f"pull_{name}"] for name in names})
    norms.set(title="Gradient of each weighted term", ylabel="norm at the prediction")
    share.plot(rows[x], rows["rho"], "o-", color=INK, label="ρ in value")
    share.plot(rows[x], rows["rho_gradient"], "^--", color=PULL, label="ρ in gradient")
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
    figure.suptitle(f"{version.name}, {every}", x=0.005, ha="left", weight="bold")
    return figure


def _terms(axis, x: pd.Series, parts: dict[str, pd.Series]) -> None:
    """A line a term, on a logarithmic scale; what is never above 0 is left out."""
    for (name, part), style in zip(parts.items(), ("o-", "s--", "^:", "v-.", "x-", "D:", "P--"), strict=True):
        if (part > 0).any():
            axis.plot(x, part.where(part > 0), style, ms=4, label=name)
    axis.set(yscale="log")


def checks(history: pd.DataFrame, steps: pd.DataFrame, version: Version) -> Figure:
    """The quantities of the checklist, each with its bound and the zone that it should stay out of shaded."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 5.6), layout="constrained")
    acting = steps[steps["skip"] == 0]
    miss = (acting[_held(version)[0]] - acting["rho_target"]).abs()
    panels = [
        ("|ρ − target|", "step", acting["step"], miss, RHO_TOLERANCE, "above"),
        ("batches skipped", "epoch", history["epoch"], history["skips"], 0.5, "above"),
        ("lower of pos and neg", "step", steps["step"], steps[["pos", "neg"]].min(axis=1), 0.0, "below"),
        ("λ_eff", "step", steps["step"], steps["lambda_eff"], None, ""),
        ("margin, rise over 3 epochs", "epoch", history["epoch"], history["margin"].diff(3), MARGIN_RISE, "below"),
        ("R@5 of six", "epoch", history["epoch"], history["recall_at_5"], RECALL, "below"),
        ("validation cosine", "epoch", history["epoch"], history["val_cos"], VAL_COS, "below"),
        ("validation loss / best before", "epoch", history["epoch"],
         history["val_loss"] / history["val_loss"].cummin().shift().fillna(history["val_loss"]), SPIKE, "above"),
    ]  # fmt: skip
    for axis, (title, unit, x, y, bound, bad) in zip(axes.flat, panels, strict=True):
        axis.plot(x, y, "o-", color=INK, ms=4)
        axis.set(title=title, xlabel=unit)
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
            axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    figure.suptitle(f"{version.name}: the checklist's quantities; shaded: broken", x=0.005, ha="left", weight="bold")
    return figure


def offset_sweep(report: Report, split: str) -> Figure:
    """Gate A: mean cosine of the predictions with the chunks around the target; the model with its interval.

    Each offset over the windows that have it (profile `original`: over those that have all).
    """
    figure, axis = plt.subplots(figsize=(9, 4.4), layout="constrained")
    offsets = OFFSETS if report.profile == "calibrated" else ORIGINAL_OFFSETS
    for i, name in enumerate(report.predictors):
        measured = report.frames[split, name]
        sweep = measured.at(offsets)  # (N, K)
        shown = ~np.isnan(sweep).any(1) if report.profile == "original" else slice(None)
        points = [over_articles(cosine, measured.article[shown]) for cosine in sweep[shown].T]
        mean, low, high = np.array(points).T
        axis.plot(offsets, mean, marker="os^vDP"[i % 6], ms=4, **_look(i), label=name)
        if name == "model":
            axis.fill_between(offsets, low, high, color=INK, alpha=0.2, lw=0, label="95 % over articles")
            axis.axhline(measured.cosine_article.mean(), color=GREY, label="model, any chunk of the article")
    last = -report.horizon  # the last chunk that was read
    axis.axvspan(last - report.context_length + 0.5, last + 0.5, color="0.90", lw=0, zorder=0, label="the context")
    if report.horizon > 1:
        axis.axvspan(
            last + 0.5, -0.5, facecolor="white", edgecolor="0.75", hatch="///", lw=0, zorder=0, label="skipped"
        )
    axis.axvline(0, color=GREY, lw=0.8, ls=":")
    axis.set(
        xlim=(min(offsets) - 0.3, max(offsets) + 0.3),
        xticks=list(offsets),
        title=f"Gate A, {split}: which chunk is the prediction nearest to?",
        xlabel="offset from the target (0), in chunks, in reading direction",
        ylabel="mean cosine",
    )
    axis.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def recall_curve(report: Report, split: str) -> Figure:
    """Gate B: share of targets in the first k of their article, up to its length, context left in and left out, against
    chance; the model with its interval."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axis, kind, title in zip(
        axes, ("novel", "all"), ("the context left out", "the whole article (as the original)"), strict=True
    ):
        n = report.frames[split, "model"].candidates[kind]
        k = np.unique(np.geomspace(1, n.max(), 40).round().astype(int))
        for i, name in enumerate(report.predictors):
            measured = report.frames[split, name]
            hits = measured.ranks[kind][:, None] <= k
            axis.plot(k, 100 * hits.mean(0), **_look(i), label=name)
            if name == "model":
                band = np.array([over_articles(h, measured.article, share=True)[1:] for h in hits.T])
                axis.fill_between(k, *(100 * band.T), color=INK, alpha=0.2, lw=0, label="95 % over articles")
        axis.plot(k, [100 * chance_recall(n, j).mean() for j in k], color=GREY, label="chance")
        axis.set(title=f"Candidates: {title}", xlabel="k", xscale="log", xticks=[1, 5, 10, 50, 100])
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlim(1, n.max())
    axes[0].set(ylabel="targets ranked ≤ k, %")
    axes[0].legend(fontsize="x-small")
    figure.suptitle(
        f"Gate B, {split}: retrieval of the target among its article's chunks", x=0.01, ha="left", weight="bold"
    )
    return figure


def context_ablations(report: Report, split: str) -> Figure:
    """Gate C: what each damage to the context changes, in cosine and in novel MRR, with intervals over articles."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained", sharey=True)
    names = list(ablations(report.context_length))
    height = 0.8 / len(report.predictors)
    for axis, after, label in zip(axes, ("", ", novel MRR"), ("cosine at the target", "novel MRR"), strict=True):
        for i, predictor in enumerate(report.predictors):
            rows = report.rows(split, predictor).set_index("measure").loc[[n + after for n in names]]
            y = np.arange(len(rows)) + (i - (len(report.predictors) - 1) / 2) * height
            error = np.clip([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0, None)
            axis.barh(
                y,
                rows["value"],
                height=height,
                xerr=np.nan_to_num(error),
                color=_look(i)["color"],
                label=predictor,
                error_kw={"lw": 0.8},
                hatch=["", "//", "..", "xx", "--", "++"][i % 6],
                edgecolor="white",
            )
        axis.axvline(0, color=GREY)
        axis.set(title=f"Gate C, {split}: change of the {label}", xlabel=f"change of the {label}")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[1].legend(fontsize="x-small")
    return figure


def rollouts(report: Report, split: str) -> Figure:
    """Gate D: cosine of each rollout step with the chunk that it foretells; and how alike the steps are."""
    figure, (cosine, alike) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    steps = range(1, STEPS + 1)
    for i, name in enumerate(report.predictors):
        measured = report.frames[split, name]
        complete = ~np.isnan(measured.rollout).any(1)
        whole = measured.rollout[complete]  # (N, H)
        cosine.plot(steps, whole.mean(0), marker="os^vDP"[i % 6], ms=5, **_look(i), label=name)
        similar = measured.similarity[complete].mean(0)
        alike.plot(steps[1:], similar, marker="os^vDP"[i % 6], ms=5, **_look(i), label=name)
        if name == "model":
            for h, step in zip(steps, whole.T, strict=True):
                _, low, high = over_articles(step, measured.article[complete])
                cosine.plot([h, h], [low, high], color=INK, lw=1)
            cosine.plot(
                steps, measured.rollout_chance[complete].mean(0), color=GREY, label="model, any chunk of the article"
            )
    title = f"Gate D, {split}: its own predictions as context"
    cosine.set(title=title, xlabel="rollout step", ylabel="mean cosine with the chunk", xticks=list(steps))
    alike.axhline(1, color=GREY, label="frozen")
    alike.set(
        title="How alike are the steps?",
        xlabel="rollout step",
        ylabel="cosine with the step before",
        xticks=list(steps[1:]),
    )
    cosine.legend(fontsize="x-small")
    alike.legend(fontsize="x-small")
    return figure


def generalisation(report: Report) -> Figure:
    """Gate E: cosine at the target by coherence of the context, validation beside OOD; and their difference."""
    figure, (level, gap) = plt.subplots(1, 2, figsize=(12, 3.8), layout="constrained")
    for i, (split, marker) in enumerate((("val", "o-"), ("ood", "^--"))):
        measured = report.frames[split, "model"]
        edges = np.quantile(measured.coherence, np.linspace(0, 1, 7))
        place = np.clip(np.searchsorted(edges, measured.coherence, side="right") - 1, 0, 5)
        sixths = [place == b for b in range(6)]
        found = [
            (measured.coherence[b].mean(), *over_articles(measured.cosine[b], measured.article[b])) for b in sixths
        ]
        x, mean, low, high = np.array(found).T
        level.errorbar(
            x,
            mean,
            np.clip([mean - low, high - mean], 0, None),
            fmt=marker,
            capsize=3,
            color=_look(i)["color"],
            label=split,
        )
    level.axvspan(*COHERENCE["normal"], color="0.92", lw=0, zorder=0, label="normal coherence")
    level.set(
        title="Gate E: cosine by coherence of the context",
        xlabel="mean adjacent cosine in the context",
        ylabel="cos(p, y), sixths of the windows",
    )
    level.legend(fontsize="x-small")
    rows = report.table[(report.table["split"] == "both") & report.table["measure"].str.startswith("difference, ")]
    bins = list(dict.fromkeys(rows["measure"]))
    for i, name in enumerate(report.predictors):
        own = rows[rows["predictor"] == name].set_index("measure").loc[bins]
        y = np.arange(len(bins)) + (i - (len(report.predictors) - 1) / 2) * 0.12
        error = np.clip([own["value"] - own["low"], own["high"] - own["value"]], 0, None)
        gap.errorbar(own["value"], y, xerr=error, fmt="os^vDP"[i % 6], ms=4, lw=1, color=_look(i)["color"], label=name)
    gap.axvline(0, color=GREY)
    gap.axvspan(-GENERALISES, GENERALISES, color="0.92", lw=0, zorder=0)
    gap.set_yticks(range(len(bins)), [b.removeprefix("difference, ") for b in bins])
    gap.invert_yaxis()
    gap.set(
        title=f"Validation − OOD (shaded: ± {GENERALISES})", xlabel="difference of cosines, 95 % over articles of both"
    )
    gap.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def make_up(report: Report, split: str) -> Figure:
    """Gate G: the weights of the context vectors in the predictions, and the parts that a prediction's square has."""
    figure, (weight, part) = plt.subplots(1, 2, figsize=(12, 3.8), layout="constrained")
    places = list(range(-report.context_length, 0))
    for i, name in enumerate(report.predictors):
        rows = report.rows(split, name).set_index("measure")
        own = rows.loc[[f"weight of context[{t}]" for t in places]]
        weight.plot(places, own["value"], marker="os^vDP"[i % 6], ms=5, **_look(i), label=name)
        if name == "model":
            weight.fill_between(places, own["low"].astype(float), own["high"].astype(float), color=INK, alpha=0.2, lw=0)
    weight.axhline(0, color=GREY)
    weight.set(
        title=f"Gate G, {split}: weight of each context vector",
        xlabel="position in the context",
        ylabel="least-squares weight",
        xticks=places,
    )
    weight.legend(fontsize="x-small")
    parts = ("along the mean", "along differences", "outside the context")
    left = np.zeros(len(report.predictors))
    for k, name in enumerate(parts):
        size = np.array([np.abs(report.frames[split, p].parts[name]).mean() for p in report.predictors])
        part.barh(
            report.predictors,
            size,
            left=left,
            color=["0.35", "0.62", "0.85"][k],
            hatch=["", "//", ".."][k],
            edgecolor="white",
            label=name,
        )
        left += size
    part.invert_yaxis()
    part.set(
        title="Where the prediction lies", xlabel="share of its square (along the mean: with either sign)", xlim=(0, 1)
    )
    part.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    return figure


def ranks(found: Spread, split: str) -> Figure:
    """Where the truth stands among the samples, by distance and by direction, and how wide they are beside it."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained", width_ratios=(1, 1, 0.8))
    frame = found.frames[split, "model"]
    xlabels = {"distance": "place of the truth: 0 the most central, 1 the farthest", "direction": "place of the truth"}
    for axis, (name, xlabel) in zip(axes, xlabels.items(), strict=False):
        bins = histogram(frame, name)
        reach = np.abs(bins[["low", "high"]].to_numpy().T - bins["share"].to_numpy())
        axis.bar(bins["middle"], 100 * bins["share"], 0.92 / len(bins), color=INK, alpha=0.75)
        axis.errorbar(bins["middle"], 100 * bins["share"], 100 * reach, fmt="none", ecolor="0.15", capsize=2, lw=1)
        axis.axhline(100 / len(bins), color=GREY, ls="--", label="the truth is one more sample")
        title = "Rank by distance" if name == "distance" else "Rank along a random direction"
        axis.set(title=title, xlabel=xlabel, ylabel="windows, %", xlim=(0, 1))
        axis.legend(fontsize="x-small")
    shown = [found.row("spread ratio", split, name) for name in found.forecasts]
    for y, row in enumerate(reversed(shown)):
        colour = INK if row["forecast"] == "model" else GREY
        reach = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
        axes[2].errorbar(row["value"], y, xerr=reach, fmt="o", color=colour, capsize=3)
    axes[2].axvline(1, color=GREY, ls="--")
    axes[2].set(title="Spread ratio", xlabel="E‖x − x′‖ / E‖x − y‖: 1 as wide as the truth", xlim=(-0.05, None))
    axes[2].set_yticks(range(len(shown)), [row["forecast"] for row in reversed(shown)])
    figure.suptitle(f"{split}: the truth among the samples (95 % over articles)", x=0.005, ha="left", weight="bold")
    return figure


def spread_table(found: Spread) -> Styler:
    """A row a split and forecast: each figure with its interval over articles, and the model's energy score less it."""

    def text(measure: str, split: str, name: str, signed: bool = False) -> str:
        row = found.row(measure, split, name)
        form = "+.4f" if signed else ".3f"
        return f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"

    measures = ["spread ratio", *(m for m in dict.fromkeys(found.table["measure"]) if m.startswith("covered"))]
    measures.append("KS of ranks by distance")
    rows = []
    for split in found.splits:
        for name in found.forecasts:
            less = "" if name == "model" else text(f"energy score less {name}", split, "model", True)
            rows.append({"split": split, "forecast": name, "energy score": text("energy score", split, name)})
            rows[-1] |= {"model less it": less, **{m: text(m, split, name) for m in measures}}
        chance = {m: f"{found.row(m, split)['chance']:.3g}" for m in measures}
        rows.append({"split": split, "forecast": "if calibrated", "energy score": "", "model less it": "", **chance})
    return table(pd.DataFrame(rows), caption="Samples against the truth, 95 % over articles")


def arrows(found: dict[str, Arrow]) -> Figure:
    """Gate F: forward − backward, copy last's own taken off, for each named comparison, with 95 % over articles and
    seeds; a small point a seed."""
    figure, axes = plt.subplots(
        1, len(MEASURES), figsize=(13, 0.8 + 0.42 * max(len(found), 3)), layout="constrained", sharey=True
    )
    for axis, (measure, sign) in zip(axes, MEASURES.items(), strict=True):
        for i, arrow in enumerate(found.values()):
            row = arrow.table.set_index("measure").loc[measure]
            axis.plot([row["low"], row["high"]], [i, i], color=INK, lw=2)
            axis.plot(row["difference"], i, "o", color=INK, ms=7)
            axis.plot(
                arrow.differences[measure].mean(1),
                np.full(len(arrow.differences[measure]), i),
                "|",
                color=PULL,
                ms=11,
                mew=1.5,
            )
        axis.axvline(0, color=GREY)
        better = "right" if sign == 1 else "left"
        axis.set(title=f"{measure}: forward is better to the {better}", xlabel="forward − backward − that of copy last")
        axis.locator_params(axis="x", nbins=6)  # labels of four digits touch where there are more
    said = [f"{n}\nseeds: {a.table['seeds'][0]}, articles: {a.table['articles'][0]}" for n, a in found.items()]
    axes[0].set_yticks(range(len(found)), said, fontsize="x-small")
    axes[0].invert_yaxis()
    return figure


def trade_off(
    runs: pd.DataFrame, curves: pd.DataFrame, x: str, measures: dict[str, str], chance: dict[str, float]
) -> Figure:
    """What each margin and the novel MRR cost in cosine: a point a run, a curve an untrained trick over its strength.

    `runs`: columns version, the cosine `x`, and the `measures` (column → label); version empty: a trivial predictor,
    named in `predictor`. `curves`: columns trick, strength, `x` and the measures. `chance`: column → its chance level.
    """
    columns = 3
    rows = -(-len(measures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(14, 4.1 * rows), layout="constrained", squeeze=False)
    for axis, (column, label) in zip(axes.flat, measures.items(), strict=False):
        for i, (name, curve) in enumerate(curves.groupby("trick", sort=False)):
            axis.plot(
                curve[x],
                curve[column],
                color="0.35",
                lw=1.2,
                ls=("-", "--", ":", "-.")[i % 4],
                label=f"{name}, untrained",
            )
        for i, (name, group) in enumerate(runs[runs["version"] != ""].groupby("version", sort=False)):
            axis.plot(group[x], group[column], "os^vDPX*h"[i % 9], ms=7, alpha=0.9, color=_look(i)["color"], label=name)
        for row in runs[runs["version"] == ""].to_dict("records"):
            axis.plot(row[x], row[column], "x", color="black", ms=7, mew=1.8)
            axis.annotate(
                row["predictor"], (row[x], row[column]), xytext=(4, 4), textcoords="offset points", fontsize="xx-small"
            )
        if column in chance:
            axis.axhline(chance[column], color=GREY, lw=1)
        axis.set(xlabel="validation cosine", ylabel=label, title=label)
    for axis in axes.flat[len(measures) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    spare = axes.flat[len(measures)] if len(measures) < rows * columns else axes.flat[0]
    spare.legend(handles, labels, fontsize="small", loc="center" if len(measures) < rows * columns else "best")
    return figure


def versions(runs: pd.DataFrame) -> Figure:
    """Validation cosine against the margin: a point a run (transformer), a grey cross a trivial predictor."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    trained = runs[(runs["version"] != "") & (runs["predictor"] == "transformer")]
    trained = trained.drop_duplicates(["version", "seed"])  # not a seed's second run in another precision
    for axis, (column, label) in zip(
        axes, (("margin", "margin, gate A"), ("novel_mrr", "MRR, context left out of the candidates")), strict=True
    ):
        for i, (name, group) in enumerate(trained.groupby("version", sort=False)):
            axis.plot(group["val_cos"], group[column], "os^vDPX*h"[i % 9], ms=7, label=name, alpha=0.9)
        for row in runs[runs["version"] == ""].to_dict("records"):
            axis.plot(row["val_cos"], row[column], "x", color=GREY, ms=8, mew=2)
            axis.annotate(row["predictor"], (row["val_cos"], row[column]), xytext=(-5, 6), textcoords="offset points",
                          fontsize="x-small", color="0.3", ha="right")  # fmt: skip
        axis.set(xlabel="validation cosine", ylabel=label)
    axes[0].axhline(0, color=GREY, lw=1)
    axes[0].set_title("What the margin costs in cosine")
    axes[1].set_title("Telling the target from the article's other chunks")
    axes[0].legend(title="version, a point a seed", fontsize="x-small")
    return figure


def latencies(times: pd.DataFrame) -> Figure:
    """Latency (line p50, band up to p95) and throughput by batch size; `times`: way, batch, p50, p95 in seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (way, rows) in enumerate(times.groupby("way", sort=False)):
        look = _look(i) | {"lw": 1.8, "marker": "os^vDP"[i % 6], "ms": 5, "label": way}
        axes[0].plot(rows["batch"], 1000 * rows["p50"], **look)
        axes[0].fill_between(
            rows["batch"], 1000 * rows["p50"], 1000 * rows["p95"], color=look["color"], alpha=0.18, lw=0
        )
        axes[1].plot(rows["batch"], rows["batch"] / rows["p50"], **look)
    ticks = sorted(times["batch"].unique())
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="batch size, windows")
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.set_xticks([], minor=True)
    axes[0].set(ylabel="latency of a batch, ms", title="How long an answer takes: p50, band up to p95")
    axes[1].set(ylabel="windows a second", title="How many windows are answered")
    axes[0].legend(fontsize="small")
    return figure


def _look(i: int) -> dict:
    """Line style of the i-th predictor, the same in every figure; the first is the model."""
    dashes = ["-", "--", ":", "-.", (0, (1, 1)), (0, (6, 2, 1, 2, 1, 2))]
    return {"color": sns.color_palette("colorblind")[i % 10], "ls": dashes[i % 6], "lw": 2.6 if i == 0 else 1.4}
