"""Figures of 5CAT: one a gate, with all predictors of a report; the model with its intervals over articles."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..judge.fivecat import Report
from ..judge.gates import GENERALISES
from ..judge.measure import OFFSETS, STEPS, ablations
from ..judge.spread import Spread, histogram
from ..judge.table import COHERENCE, ORIGINAL_OFFSETS
from ..statistics import chance_recall, over_articles
from .style import GREY, HATCHES, INK, MARKERS, look, marked, reach, title

BAR = {"ecolor": "0.15", "capsize": 2, "lw": 1}
BESIDE = {"fontsize": "x-small", "loc": "center left", "bbox_to_anchor": (1.0, 0.5)}  # a legend right of the axes


def offset_sweep(report: Report, split: str) -> Figure:
    """Return gate A: mean cosine of the predictions with the chunks around the target.

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
        axis.plot(offsets, mean, **marked(i) | {"ms": 4}, label=name)
        if name == "model":
            axis.fill_between(offsets, low, high, color=INK, alpha=0.2, lw=0, label="95 % over articles")
            axis.axhline(measured.cosine_article.mean(), color=GREY, label="model, any chunk of the article")
    last = -report.horizon  # the last context vector
    axis.axvspan(last - report.context_length + 0.5, last + 0.5, color="0.90", lw=0, zorder=0, label="the context")
    if report.horizon > 1:
        skipped = {"facecolor": "white", "edgecolor": "0.75", "hatch": "///", "lw": 0, "zorder": 0}
        axis.axvspan(last + 0.5, -0.5, **skipped, label="skipped")
    axis.axvline(0, color=GREY, lw=0.8, ls=":")
    axis.set(title=f"Gate A, {split}: which chunk is the prediction nearest to?", ylabel="mean cosine")
    axis.set(xlabel="offset from the target (0), in chunks, in reading direction", xticks=list(offsets))
    axis.set_xlim(min(offsets) - 0.3, max(offsets) + 0.3)
    axis.legend(**BESIDE)
    return figure


def recall_curve(report: Report, split: str) -> Figure:
    """Return gate B: share of targets in the first k of their article, with and without the context, and chance."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    kinds = {"novel": "the context left out", "all": "the whole article (as the original)"}
    for axis, (kind, name) in zip(axes, kinds.items(), strict=True):
        n = report.frames[split, "model"].candidates[kind]
        k = np.unique(np.geomspace(1, n.max(), 40).round().astype(int))
        axis.set(title=f"Candidates: {name}", xlabel="k", xscale="log", xticks=[1, 5, 10, 50, 100])
        for i, predictor in enumerate(report.predictors):
            measured = report.frames[split, predictor]
            hits = measured.ranks[kind][:, None] <= k
            axis.plot(k, 100 * hits.mean(0), **look(i), label=predictor)
            if predictor == "model":
                band = np.array([over_articles(h, measured.article, share=True)[1:] for h in hits.T])
                axis.fill_between(k, *(100 * band.T), color=INK, alpha=0.2, lw=0, label="95 % over articles")
        axis.plot(k, [100 * chance_recall(n, j).mean() for j in k], color=GREY, label="chance")
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlim(1, n.max())
    axes[0].set(ylabel="targets ranked ≤ k, %")
    axes[0].legend(fontsize="x-small")
    return title(figure, f"Gate B, {split}: retrieval of the target among its article's chunks")


def context_ablations(report: Report, split: str) -> Figure:
    """Return gate C: what each damage to the context changes, in cosine and in novel MRR."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained", sharey=True)
    names = list(ablations(report.context_length))
    height = 0.8 / len(report.predictors)
    for axis, after, label in zip(axes, ("", ", novel MRR"), ("cosine at the target", "novel MRR"), strict=True):
        for i, predictor in enumerate(report.predictors):
            rows = report.rows(split, predictor).set_index("measure").loc[[n + after for n in names]]
            y = np.arange(len(rows)) + (i - (len(report.predictors) - 1) / 2) * height
            bars = {"color": look(i)["color"], "hatch": HATCHES[i % 6], "edgecolor": "white", "height": height}
            error = {"xerr": np.nan_to_num(reach(rows)), "error_kw": {"lw": 0.8}}
            axis.barh(y, rows["value"], **bars, **error, label=predictor)
        axis.axvline(0, color=GREY)
        axis.set(title=f"Gate C, {split}: change of the {label}", xlabel=f"change of the {label}")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[1].legend(fontsize="x-small")
    return figure


def rollouts(report: Report, split: str) -> Figure:
    """Return gate D: cosine of each rollout step with the chunk that it predicts; and how alike the steps are."""
    figure, (cosine, alike) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    steps = range(1, STEPS + 1)
    for i, name in enumerate(report.predictors):
        measured = report.frames[split, name]
        complete = ~np.isnan(measured.rollout).any(1)
        rolled = measured.rollout[complete]  # (N, H)
        cosine.plot(steps, rolled.mean(0), **marked(i), label=name)
        alike.plot(steps[1:], measured.similarity[complete].mean(0), **marked(i), label=name)
        if name == "model":
            ends = [over_articles(step, measured.article[complete])[1:] for step in rolled.T]
            cosine.vlines(steps, *zip(*ends, strict=True), color=INK, lw=1)
            chance = measured.rollout_chance[complete].mean(0)
            cosine.plot(steps, chance, color=GREY, label="model, any chunk of the article")
    cosine.set(title=f"Gate D, {split}: its own predictions as context", ylabel="mean cosine with the chunk")
    alike.axhline(1, color=GREY, label="frozen")
    alike.set(title="How alike are the steps?", ylabel="cosine with the step before")
    for axis, ticks in ((cosine, steps), (alike, steps[1:])):
        axis.set(xlabel="rollout step", xticks=list(ticks))
        axis.legend(fontsize="x-small")
    return figure


def generalisation(report: Report) -> Figure:
    """Return gate E: cosine at the target by coherence of the context, validation and OOD; and their difference."""
    figure, (level, gap) = plt.subplots(1, 2, figsize=(12, 3.8), layout="constrained")
    for i, (split, marker) in enumerate((("val", "o-"), ("ood", "^--"))):
        measured = report.frames[split, "model"]
        frame = pd.DataFrame({c: getattr(measured, c) for c in ("coherence", "cosine", "article")})
        edges = np.quantile(frame["coherence"], np.linspace(0, 1, 7))
        sixth = np.clip(np.searchsorted(edges, frame["coherence"], side="right") - 1, 0, 5)
        points = [(b["coherence"].mean(), *over_articles(b["cosine"], b["article"])) for _, b in frame.groupby(sixth)]
        x, mean, low, high = np.array(points).T
        error = reach({"value": mean, "low": low, "high": high})
        level.errorbar(x, mean, error, fmt=marker, capsize=3, color=look(i)["color"], label=split)
    level.axvspan(*COHERENCE["normal"], color="0.92", lw=0, zorder=0, label="normal coherence")
    level.set(title="Gate E: cosine by coherence of the context", ylabel="cos(p, y), sixths of the windows")
    level.set_xlabel("mean adjacent cosine in the context")
    level.legend(fontsize="x-small")
    bins = [*(f"{name} coherence" for name in COHERENCE), "all windows"]
    for i, name in enumerate(report.predictors):
        own = report.rows("both", name).set_index("measure").loc[[f"difference, {b}" for b in bins]]
        y = np.arange(len(bins)) + (i - (len(report.predictors) - 1) / 2) * 0.12
        points = {"fmt": MARKERS[i % 6], "ms": 4, "lw": 1, "color": look(i)["color"]}
        gap.errorbar(own["value"], y, xerr=reach(own), **points, label=name)
    gap.axvline(0, color=GREY)
    gap.axvspan(-GENERALISES, GENERALISES, color="0.92", lw=0, zorder=0)
    gap.set_yticks(range(len(bins)), bins)
    gap.invert_yaxis()
    name = f"Validation − OOD (shaded: ± {GENERALISES})"
    gap.set(title=name, xlabel="difference of cosines, 95 % over articles of both")
    gap.legend(**BESIDE)
    return figure


def make_up(report: Report, split: str) -> Figure:
    """Return gate G: the weights of the context vectors in the predictions, and the parts of a prediction's square."""
    figure, (weight, part) = plt.subplots(1, 2, figsize=(12, 3.8), layout="constrained")
    places = list(range(-report.context_length, 0))
    for i, name in enumerate(report.predictors):
        rows = report.rows(split, name).set_index("measure")
        own = rows.loc[[f"weight of context[{t}]" for t in places]]
        weight.plot(places, own["value"], **marked(i), label=name)
        if name == "model":
            weight.fill_between(places, own["low"].astype(float), own["high"].astype(float), color=INK, alpha=0.2, lw=0)
    weight.axhline(0, color=GREY)
    weight.set(title=f"Gate G, {split}: weight of each context vector", ylabel="least-squares weight")
    weight.set(xlabel="position in the context", xticks=places)
    weight.legend(fontsize="x-small")
    left = np.zeros(len(report.predictors))
    parts = {"along the mean": "0.35", "along differences": "0.62", "outside the context": "0.85"}
    for (name, color), hatch in zip(parts.items(), HATCHES, strict=False):
        size = np.array([np.abs(report.frames[split, p].parts[name]).mean() for p in report.predictors])
        part.barh(report.predictors, size, left=left, color=color, hatch=hatch, edgecolor="white", label=name)
        left += size
    part.invert_yaxis()
    xlabel = "share of its square (along the mean: with either sign)"
    part.set(title="Where the prediction lies", xlabel=xlabel, xlim=(0, 1))
    part.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    return figure


def ranks(spread: Spread, split: str) -> Figure:
    """Return the truth's rank among the samples, by distance and by direction, and how wide the samples are."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained", width_ratios=(1, 1, 0.8))
    for axis, kind in zip(axes, ("distance", "direction"), strict=False):
        bins = histogram(spread.frames[split, "model"], kind)
        error = {"yerr": 100 * reach(bins.rename(columns={"share": "value"})), "error_kw": BAR}
        axis.bar(bins["middle"], 100 * bins["share"], 0.92 / len(bins), color=INK, alpha=0.75, **error)
        axis.axhline(100 / len(bins), color=GREY, ls="--", label="the truth is one more sample")
        axis.set(ylabel="windows, %", xlim=(0, 1))
        axis.legend(fontsize="x-small")
    axes[0].set(title="Rank by distance", xlabel="place of the truth: 0 the most central, 1 the farthest")
    axes[1].set(title="Rank along a random direction", xlabel="place of the truth")
    rows = [spread.row("spread ratio", split, name) for name in reversed(spread.forecasts)]
    for y, row in enumerate(rows):
        colour = INK if row["forecast"] == "model" else GREY
        axes[2].errorbar(row["value"], y, xerr=reach(row)[:, None], fmt="o", color=colour, capsize=3)
    axes[2].axvline(1, color=GREY, ls="--")
    axes[2].set(title="Spread ratio", xlabel="E‖x − x′‖ / E‖x − y‖: 1 as wide as the truth", xlim=(-0.05, None))
    axes[2].set_yticks(range(len(rows)), [row["forecast"] for row in rows])
    return title(figure, f"{split}: the truth among the samples (95 % over articles)")
