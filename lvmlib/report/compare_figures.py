"""Figures of several runs, and of inference."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..judge.arrow import MEASURES, Arrow
from .style import GREY, INK, MARKERS, PULL, look, marked


def arrows(results: Mapping[str, Arrow]) -> Figure:
    """Return gate F: forward − backward less that of copy last, for each named comparison; a small point a seed.

    Intervals are 95 % over articles and seeds.
    """
    size = (13, 0.8 + 0.42 * max(len(results), 3))
    figure, axes = plt.subplots(1, len(MEASURES), figsize=size, layout="constrained", sharey=True)
    for axis, (measure, sign) in zip(axes, MEASURES.items(), strict=True):
        for i, arrow in enumerate(results.values()):
            row = arrow.table.set_index("measure").loc[measure]
            axis.plot([row["low"], row["high"]], [i, i], color=INK, lw=2)
            axis.plot(row["difference"], i, "o", color=INK, ms=7)
            seeds = arrow.differences[measure].mean(1)
            axis.plot(seeds, np.full(len(seeds), i), "|", color=PULL, ms=11, mew=1.5)
        axis.axvline(0, color=GREY)
        better = "right" if sign == 1 else "left"
        axis.set(title=f"{measure}: forward is better to the {better}", xlabel="forward − backward − that of copy last")
        axis.locator_params(axis="x", nbins=6)  # labels of four digits touch where there are more
    names = [f"{n}\nseeds: {a.table['seeds'][0]}, articles: {a.table['articles'][0]}" for n, a in results.items()]
    axes[0].set_yticks(range(len(names)), names, fontsize="x-small")
    axes[0].invert_yaxis()
    return figure


def trade_off(
    runs: pd.DataFrame, curves: pd.DataFrame, x: str, measures: Mapping[str, str], chance: Mapping[str, float]
) -> Figure:
    """Return what each margin and the novel MRR cost in cosine: a point a run, a curve a trick over its strength.

    `runs`: columns version, the cosine `x`, and the `measures` (column → label); version empty: a baseline, named in
    `predictor`. `curves`: columns trick, strength, `x` and the measures. `chance`: column → its chance level.
    """
    rows = -(-len(measures) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(14, 4.1 * rows), layout="constrained", squeeze=False)
    for axis, (column, label) in zip(axes.flat, measures.items(), strict=False):
        for i, (name, curve) in enumerate(curves.groupby("trick", sort=False)):
            line = {"color": "0.35", "lw": 1.2, "ls": ("-", "--", ":", "-.")[i % 4]}
            axis.plot(curve[x], curve[column], **line, label=f"{name}, untrained")
        _scatter(axis, runs, x, column)
        if column in chance:
            axis.axhline(chance[column], color=GREY, lw=1)
        axis.set(ylabel=label, title=label)
    for axis in axes.flat[len(measures) :]:
        axis.axis("off")
    spare = len(measures) < 3 * rows
    place = {"loc": "center"} if spare else {}
    shown = axes.flat[len(measures) if spare else 0]
    shown.legend(*axes.flat[0].get_legend_handles_labels(), fontsize="small", **place)
    return figure


def versions(runs: pd.DataFrame) -> Figure:
    """Return validation cosine against the margin and the novel MRR of the transformers, and the baselines."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    runs = runs[(runs["version"] == "") | (runs["predictor"] == "transformer")]
    runs = runs.drop_duplicates(["version", "predictor", "seed"])  # not a seed's second run in another precision
    labels = {"margin": "margin, gate A", "novel_mrr": "MRR, context left out of the candidates"}
    for axis, (column, label) in zip(axes, labels.items(), strict=True):
        _scatter(axis, runs, "val_cos", column)
        axis.set_ylabel(label)
    axes[0].axhline(0, color=GREY, lw=1)
    axes[0].set_title("What the margin costs in cosine")
    axes[1].set_title("Ranking the target among the article's other chunks")
    axes[0].legend(title="version, a point a seed", fontsize="x-small")
    return figure


def _scatter(axis, runs: pd.DataFrame, x: str, y: str) -> None:
    """Draw a point a run, by version, and a named cross a baseline, whose version is empty."""
    trained = runs["version"] != ""
    for i, (name, group) in enumerate(runs[trained].groupby("version", sort=False)):
        axis.plot(group[x], group[y], MARKERS[i % 9], ms=7, alpha=0.9, color=look(i)["color"], label=name)
    for row in runs[~trained].to_dict("records"):
        axis.plot(row[x], row[y], "x", color="black", ms=7, mew=1.8)
        text = {"xytext": (-5, 5), "textcoords": "offset points", "fontsize": "x-small", "ha": "right"}
        axis.annotate(row["predictor"], (row[x], row[y]), **text)
    axis.set_xlabel("validation cosine")


def latencies(times: pd.DataFrame) -> Figure:
    """Return latency (line p50, band up to p95) and throughput by batch size.

    `times`: way, batch, p50, p95 in seconds.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (way, rows) in enumerate(times.groupby("way", sort=False)):
        style, p50, p95 = marked(i) | {"lw": 1.8, "label": way}, 1000 * rows["p50"], 1000 * rows["p95"]
        axes[0].plot(rows["batch"], p50, **style)
        axes[0].fill_between(rows["batch"], p50, p95, color=style["color"], alpha=0.18, lw=0)
        axes[1].plot(rows["batch"], rows["batch"] / rows["p50"], **style)
    ticks = sorted(times["batch"].unique())
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="batch size, windows")
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.set_xticks([], minor=True)
    axes[0].set(ylabel="latency of a batch, ms", title="How long an answer takes: p50, band up to p95")
    axes[1].set(ylabel="windows a second", title="How many windows are answered")
    axes[0].legend(fontsize="small")
    return figure
