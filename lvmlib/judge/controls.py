"""Tests of 5CAT with known answers, for `controls.ipynb`: samples of worlds, brief trainings, rates.

Axes: N windows, A articles, S seeds, T context length, D vector dimension.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats

from .. import controller, loop
from ..baselines import Linear, fit_ridge
from ..config import Version
from ..data.store import make_store
from ..data.worlds import world
from ..errors import LVMError
from ..models import Predictor
from ..statistics import over_articles, over_seeds
from ..windows import DIRECTIONS, Store, Windows, windows
from .measure import OFFSETS, measure
from .table import best_other, bins_delta, figure, summarise, with_interval


def sample(name: str, lengths: Mapping[str, Sequence[int]], copies: int = 1, seed: int = 0, **arguments) -> Store:
    """Return a world whose split s has articles of `lengths[s]` chunks, `copies` times over.

    Articles are cut at their end. `arguments`: those of the world but its size and splits.
    """
    splits, sizes = zip(*((s, n) for s, own in lengths.items() for n in [*own] * copies), strict=True)
    whole = world(name, articles=len(sizes), length=max(sizes), splits=list(splits), seed=seed, **arguments)
    rows = (np.arange(max(sizes)) < np.array(sizes)[:, None]).ravel()
    tables = whole.article[rows], whole.position[rows], whole.articles
    return make_store(whole.name, whole.vectors[rows], *tables, whole.datasheet)


def both_ways(store: Store, splits: Sequence[str] = ("train", "val"), horizon: int = 2) -> dict[str, dict]:
    """Cut each split forwards and backwards: direction → split → windows."""
    return {d: {s: windows(store, s, horizon, direction=d) for s in splits} for d in DIRECTIONS}


def brief(version: Version, train: Windows, steps: int, seed: int, learning_rate: float) -> Predictor:
    """Train `version` for a few steps of a run (`loop.step`), in memory and in float32; return it in eval mode.

    The schedule's epochs are spread over the steps. Raises LVMError for a version with the listwise loss, which needs
    an article's chunks.
    """
    if version.losses.listwise.weight:
        raise LVMError(f"version {version.name}: losses.listwise needs whole articles; train it with lvm.train")
    optimizer = dataclasses.replace(version.optimizer, lr=learning_rate, decay="all")
    own = dataclasses.replace(version, seed=seed, optimizer=optimizer)
    state = loop.start(own, train.store.dim, torch.device("cpu"))
    task, size = loop.Task(own, train, torch.from_numpy(train.store.vectors)), own.batch_size
    with loop.seeded(seed, 1):
        order = torch.cat([torch.randperm(len(train)) for _ in range(0, steps * size, len(train))]).numpy()
        for i in range(steps):
            now = controller.phase(own.schedule, 1 + i * own.epochs // steps)
            loop.step(state, task, order[i * size : (i + 1) * size], own.control, now)
    return state.model.eval()


def quick_ridge(train: Windows, strength: float = 10.0, most: int = 600) -> Linear:
    """Return the ridge predictor of at most so many windows, with a given strength."""
    return Linear(train.store.dim, fit_ridge(train.at_most(most), (strength,))[0])


def noisy(predictor: Linear, amount: float, seed: int) -> Predictor:
    """Return a linear predictor as one of many seeds might have trained it, with noise added to its weights.

    The noise has |N(0, 1)| · amount times the standard deviation of the weights.
    """
    random, other = torch.Generator().manual_seed(seed), copy.deepcopy(predictor)
    spread = amount * abs(float(torch.randn((), generator=random))) * float(predictor.weights.std())
    other.weights = predictor.weights + spread * torch.randn(predictor.weights.shape, generator=random)
    return other


def share(hits: int, of: int) -> tuple[float, float, float]:
    """Return hits / of, and its exact 95 % interval (Clopper and Pearson, Biometrika 26, 1934)."""
    if not of:
        return float("nan"), float("nan"), float("nan")
    return hits / of, *map(float, stats.binomtest(int(hits), int(of)).proportion_ci(0.95, "exact"))


# The original's measures first, then the calibrated ones.
FIGURES = ("margin against the last", "margin against context[-2]", "margin against the best context vector")
FIGURES += ("R@5 of six", "cosine at the target", "novel margin", "novel margin, ahead", "novel MRR", "1 of 100")


def figures(model: Predictor, split: Windows) -> pd.DataFrame:
    """FIGURES of every window, with the article: what `fivecat` summarises, in a frame of N rows.

    The best context vector and the best novel offset are chosen on the other articles (`table.best_other`).
    """
    measured, last = measure(model, split), -split.horizon
    context = [k for k in OFFSETS if last - split.context_length < k <= last]
    ahead = [k for k in OFFSETS if k > 0]
    novel = [k for k in OFFSETS if k <= last - split.context_length] + ahead
    columns = {
        "margin against the last": measured.margin_last,
        "margin against context[-2]": measured.margin_prev,
        "margin against the best context vector": measured.cosine - best_other(measured, context),
        "R@5 of six": (measured.six_rank <= 5).astype(float),
        "cosine at the target": measured.cosine,
        "novel margin": measured.cosine - best_other(measured, novel),
        "novel margin, ahead": measured.cosine - best_other(measured, ahead),
        "novel MRR": 1 / measured.ranks["novel"],
        "1 of 100": measured.hundred,
    }
    return pd.DataFrame(columns).assign(article=measured.article)


def gain(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """Of two `figures` frames of the same windows: each measure's difference, low, high (95 % over articles)."""
    rows = {name: over_articles(ours[name] - theirs[name], ours["article"]) for name in FIGURES}
    return pd.DataFrame(rows, index=["value", "low", "high"]).T


def share_of_gain(ours, best, trivial, article) -> tuple[float, float, float]:
    """Σ(ours − trivial) / Σ(best − trivial), the mean share of the known gain that S runs reach: value, low, high.

    `ours` (S, N), `best` and `trivial` (N,): one figure of the same windows. The interval over seeds and articles is of
    the linearised ratio, (ours − trivial − share · (best − trivial)) / mean(best − trivial). NaN where the interval of
    best − trivial is not above 0.
    """
    ours, best = np.asarray(ours, float) - trivial, np.asarray(best, float) - trivial
    known, low, _ = over_articles(best, article)
    if not low > 0:
        return float("nan"), float("nan"), float("nan")
    value = float(ours.mean() / known)
    _, low, high = over_seeds((ours - value * best) / known, article)
    return value, value + low, value + high


def delta(split: Windows) -> tuple[float, float, float]:
    """The original's Δ, cos(last, target) − cos(last, context[-2]), with its interval over articles."""
    context, target = (x.numpy() for x in split.batch(np.arange(len(split))))
    last, before = context[:, -1], context[:, -2]
    return over_articles((last * target).sum(1) - (last * before).sum(1), split.article)


def main_figures(store: Store, model: Predictor, other: Predictor, horizon: int = 2) -> pd.DataFrame:
    """The calibrated report's figures with an interval: of `model` on validation, of `model` − `other` on the same
    windows, and of validation − OOD. Index gate, measure; columns value, low, high, articles."""
    cut = {split: windows(store, split, horizon) for split in ("val", "ood")}
    val, ood = (measure(model, cut[split]) for split in cut)
    theirs = measure(other, cut["val"])
    rows = summarise(val, "calibrated", horizon, cut["val"].context_length) + bins_delta(val, ood)
    for name in ("cosine", "novel MRR", "1 of 100", "mean rollout"):
        less = with_interval(figure(val, name) - figure(theirs, name), val.article)
        rows.append({"gate": "paired", "measure": name, **less})
    table = pd.DataFrame(rows).set_index(["gate", "measure"])[["value", "low", "high", "articles"]]
    return table[table["low"].notna()]


def answer(low: float, high: float, null: float = 0.0, words=("forward", "backward", "none")) -> str:
    """The word for the side of `null` on which an interval lies: above, below, or neither."""
    return words[0] if low > null else words[1] if high < null else words[2]
