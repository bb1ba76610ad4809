"""One function a figure: tidy data in, the figure out; one style for all.

Colours are the colour-blind-safe palette of seaborn; every line also differs in dash or marker, so that a grey print
can be read. Chance levels are grey lines, uncertainty is a band or a bar.
"""

from __future__ import annotations

import hashlib

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from .fivecat import ABLATIONS, GATES, OFFSETS, STEPS, THRESHOLDS, Report
from .params import Version
from .statistics import chance_recall, over_articles
from .verdict import Check, Verdict

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
        },
    )


def table(frame: pd.DataFrame, caption: str = "", digits: int = 3, formats: dict | None = None) -> Styler:
    """A frame as a reader sees it: rounded, no index, whole numbers whole, gaps as –. `formats`: column → format."""

    def shown(values: pd.Series) -> str | None:
        if not pd.api.types.is_numeric_dtype(values):
            return None
        return "{:,.0f}" if (values.dropna() % 1 == 0).all() else f"{{:,.{digits}f}}"

    numbers = list(frame.select_dtypes("number"))
    return (
        frame.style.format({c: shown(frame[c]) for c in frame} | (formats or {}), na_rep="–")
        .hide(axis="index")
        .set_caption(caption)
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
                {"selector": "td", "props": "white-space: nowrap; font-size: 92%"},
            ]
        )
    )


def history_table(history: pd.DataFrame) -> Styler:
    """A run's epochs as a table."""
    formats = dict.fromkeys(("train_loss", "val_loss"), "{:.5f}") | {"lambda_eff": "{:.4f}", "learning_rate": "{:.1e}"}
    terms = ["mse", "directional", "floor", "norm", "orthogonality"]
    return table(history.drop(columns=terms).dropna(axis=1, how="all"), formats=formats | {"seconds": "{:.1f}"})


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


def gate_table(report: Report, split: str) -> Styler:
    """All measures of a split: the model with its interval, chance, threshold, and the trivial predictors."""
    rows = report.table[report.table["split"].isin([split, "both"])]
    wide = rows.pivot_table(index=["gate", "measure"], columns="predictor", values="value", sort=False, dropna=False)
    own = rows[rows["predictor"] == "model"]
    words = {True: "passed", False: "FAILED"}

    def threshold(r) -> str:
        if pd.isna(r["threshold"]):
            return ""
        return f"{'≥' if THRESHOLDS[r['gate'], r['measure']][0] == '>=' else '≤'} {r['threshold']:.2f}"

    frame = pd.DataFrame(
        {
            "gate": [f"{g} {GATES[g]}" for g in own["gate"]],
            "measure": list(own["measure"]),
            "model": list(own["value"]),
            "95 % over articles": [
                "–" if pd.isna(r["low"]) else f"{r['low']:.3f} … {r['high']:.3f}" for _, r in own.iterrows()
            ],
            "wanted": [threshold(r) for _, r in own.iterrows()],
            "": [words.get(p, "") if pd.notna(p) else "" for p in own["passed"]],
            "chance": list(own["chance"]),
            "articles": list(own["articles"]),
            "windows": list(own["windows"]),
            **{
                p: [wide.loc[(g, m), p] for g, m in zip(own["gate"], own["measure"], strict=True)]
                for p in wide.columns
                if p != "model"
            },
        }
    )
    frame["gate"] = frame["gate"].where(~frame["gate"].duplicated(), "")
    passed = [g for g, ok in report.gates(split).items() if ok]
    return table(
        frame, caption=f"5CAT, {split}: {len(passed)} of 5 gates passed" + (f" ({', '.join(passed)})" if passed else "")
    )


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

    share.plot(epoch, history["rho"], "o-", color=INK, label="ρ")
    share.step(epoch, history["rho_target"], where="mid", color=PULL, ls="--", label="target")
    share.step(epoch, history["rho_cap"], where="mid", color=WARN, ls=":", label="cap")
    share.set(title="Directional share of the loss, ρ", ylabel="λ · L_dir / L_mse")

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
        f"{version.name} on {version.data}: {version.model}, seed {version.seed}", x=0.01, ha="left", weight="bold"
    )
    return figure


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
    share.plot(x, steps["rho"], "o-", color=INK, label="ρ")
    share.set(title="Directional share of the loss, ρ", ylabel="λ · L_dir / L_mse")
    pull.plot(x, steps["lambda_eff"], "o-", color=INK, label="λ_eff")
    skipped = steps[steps["skip"] > 0]
    pull.plot(skipped["step"], skipped["lambda_eff"], "x", color=WARN, ms=9, label="skipped by the guard")
    if version.control.rule != "none":
        pull.axhline(version.control.lambda_max, color=GREY, ls=":", label="λ_max")
    pull.set(title="Weight of the directional loss", ylabel="λ_eff")
    gradient.plot(x, steps["gradient_norm"], "o-", color=INK, label="before clipping")
    gradient.axhline(version.optimizer.clip_norm, color=GREY, ls=":", label="clipped to")
    gradient.set(title="Gradient norm", ylabel="norm", yscale="log")
    weights = {
        "mse": 1.0,
        "directional": steps["lambda_eff"],
        "floor": version.losses.floor.weight,
        "norm": version.losses.norm,
        "orthogonality": version.losses.orthogonality,
    }
    for (name, weight), style in zip(weights.items(), ("o-", "s--", "^:", "v-.", "x-"), strict=True):
        part = steps[name] * weight
        if (part > 0).any():
            terms.plot(x, part.where(part > 0), style, ms=4, label=name)
    terms.set(title="Weighted terms of the loss", ylabel="weighted term", yscale="log")
    for axis in axes.flat:
        axis.set(xlabel="step")
        axis.legend(fontsize="x-small")
    figure.suptitle(
        f"{version.name}: every {version.log_every} steps, the first and the last", x=0.01, ha="left", weight="bold"
    )
    return figure


def offset_sweep(report: Report, split: str, horizon: int) -> Figure:
    """Gate A: mean cosine of the predictions with the chunks around the target; the model with its interval."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    names = _predictors(report)
    for i, name in enumerate(names):
        frame = report.frames[split, name]
        sweep = frame[[f"offset {k:+d}" for k in OFFSETS]].dropna()
        points = [over_articles(sweep[c], frame["article"][sweep.index]) for c in sweep]
        mean, low, high = np.array(points).T
        main = name == "model"
        axis.plot(
            OFFSETS,
            mean,
            marker="os^vDP"[i % 6],
            **_look(i),
            label=name,
        )
        if main:
            axis.fill_between(OFFSETS, low, high, color=INK, alpha=0.2, lw=0, label="95 % over articles")
            axis.axhline(
                frame["cosine_article"][sweep.index].mean(), color=GREY, label="model, any chunk of the article"
            )
    axis.axvspan(min(OFFSETS) - 0.5, -horizon + 0.5, color="0.93", lw=0, zorder=0, label="the context")
    axis.axvline(0, color=GREY, lw=0.8, ls=":")
    axis.set(
        xlim=(min(OFFSETS) - 0.3, max(OFFSETS) + 0.3),
        title=f"Gate A, {split}: which chunk is the prediction nearest to?",
        xlabel="offset from the target (0), in chunks",
        ylabel="mean cosine",
    )
    axis.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def recall_curve(report: Report, split: str) -> Figure:
    """Gate B: share of targets in the first k of their article, context left in and left out, against chance."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    k = np.arange(1, 21)
    for axis, prefix, title in zip(
        axes, ("", "novel "), ("the whole article (as the original)", "the context left out"), strict=True
    ):
        for i, name in enumerate(_predictors(report)):
            frame = report.frames[split, name]
            axis.plot(
                k,
                [100 * (frame[prefix + "rank"] <= j).mean() for j in k],
                **_look(i),
                label=name,
            )
        n = frame[prefix + "candidates"].to_numpy()
        axis.plot(k, [100 * chance_recall(n, j).mean() for j in k], color=GREY, label="chance")
        axis.set(title=f"Candidates: {title}", xlabel="k", xticks=(1, 5, 10, 15, 20))
    axes[0].set(ylabel="targets ranked ≤ k, %")
    axes[1].legend(fontsize="x-small")
    figure.suptitle(
        f"Gate B, {split}: retrieval of the target among its article's chunks", x=0.01, ha="left", weight="bold"
    )
    return figure


def ablations_and_rollout(report: Report, split: str) -> Figure:
    """Gates C and D: what each damage to the context changes, and the cosine of each rollout step."""
    figure, (damage, rollout) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained", width_ratios=(3, 2))
    names = _predictors(report)
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        rows = report.rows(split, name).set_index("measure").loc[list(ABLATIONS)]
        y = np.arange(len(rows)) + (i - (len(names) - 1) / 2) * height
        error = np.clip([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0, None)
        damage.barh(
            y,
            rows["value"],
            height=height,
            xerr=np.nan_to_num(error),
            color=_look(i)["color"],
            label=name,
            error_kw={"lw": 0.8},
            hatch=["", "//", "..", "xx", "--", "++"][i % 6],
            edgecolor="white",
        )
        frame = report.frames[split, name]
        steps = range(1, STEPS + 1)
        whole = frame[[f"rollout {h}" for h in steps]].dropna()
        rollout.plot(
            steps,
            whole.mean(),
            marker="os^vDP"[i % 6],
            **_look(i),
            label=name,
        )
        if name == "model":
            rollout.plot(
                steps,
                frame.loc[whole.index, [f"rollout chance {h}" for h in steps]].mean(),
                color=GREY,
                label="model, any chunk of the article",
            )
    for j, name in enumerate(ABLATIONS):
        threshold = THRESHOLDS["C", name][1]
        damage.plot(
            [threshold, threshold],
            [j - 0.45, j + 0.45],
            color=WARN,
            ls="--",
            label="gate: must be left of" if j == 0 else None,
        )
    damage.axvline(0, color=GREY)
    damage.set(title=f"Gate C, {split}: damage to the context", xlabel="change of cos(p, y)")
    damage.set_yticks(range(len(ABLATIONS)), ABLATIONS)
    damage.invert_yaxis()
    damage.legend(fontsize="x-small")
    rollout.axhline(
        THRESHOLDS["D", "mean cosine"][1 if split == "val" else 2],
        color=WARN,
        ls="--",
        lw=1,
        label="gate: mean above",
    )
    rollout.set(
        title=f"Gate D, {split}: its own predictions as context",
        xlabel="rollout step",
        ylabel="mean cosine with the chunk",
        xticks=list(range(1, STEPS + 1)),
    )
    rollout.legend(fontsize="x-small")
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


def _look(i: int) -> dict:
    """Line style of the i-th predictor, the same in every figure; the first is the model."""
    dashes = ["-", "--", ":", "-.", (0, (1, 1)), (0, (6, 2, 1, 2, 1, 2))]
    return {"color": sns.color_palette("colorblind")[i % 10], "ls": dashes[i % 6], "lw": 2.6 if i == 0 else 1.4}


def _predictors(report: Report) -> list[str]:
    return list(report.table["predictor"].unique())
