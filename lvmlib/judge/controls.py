"""What `controls.ipynb` needs to put the instrument to the test: samples of worlds, brief trainings, counting.

Axes: N windows, A articles, K predictors, S seeds, T context length, D vector dimension.

The worlds are those of `worlds.py`; the instrument is `fivecat`, `arrow` and `probe`, used as they are.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats

from .. import controller, loop
from ..baselines import Linear
from ..config import Version
from ..data.store import make_store
from ..data.worlds import world
from ..errors import LVMError
from ..models import Predictor
from ..statistics import over_articles, over_seeds, paired
from ..windows import DIRECTIONS, Store, Windows, windows
from .fivecat import OFFSETS, best_other, bins_delta, figure, measure, summarise


def sample(name: str, lengths: Mapping[str, Sequence[int]], copies: int = 1, seed: int = 0, **arguments) -> Store:
    """A world whose split s has articles of `lengths[s]` chunks, `copies` times over: as unequal as real articles are.

    `arguments`: those of the world but its size and splits.
    """
    wanted = [(split, n) for split, own in lengths.items() for _ in range(copies) for n in own]
    splits, sizes = [s for s, _ in wanted], np.array([n for _, n in wanted])
    whole = world(name, articles=len(wanted), length=int(sizes.max()), splits=splits, seed=seed, **arguments)
    return shortened(whole, sizes)


def shortened(store: Store, lengths: Sequence[int]) -> Store:
    """A store with only the first `lengths[i]` chunks of its i-th article."""
    begins = np.flatnonzero(np.diff(store.article, prepend=store.article[0] - 1))
    place = np.arange(len(store.article)) - np.repeat(begins, np.diff(begins, append=len(store.article)))
    kept = place < np.repeat(np.asarray(lengths), np.diff(begins, append=len(store.article)))
    return make_store(
        store.name, store.vectors[kept], store.article[kept], store.position[kept], store.articles, store.datasheet
    )


def both_ways(store: Store, splits: Sequence[str] = ("train", "val"), horizon: int = 2) -> dict[str, dict]:
    """direction → split → windows: each split cut forwards and backwards."""
    return {d: {s: windows(store, s, horizon, direction=d) for s in splits} for d in DIRECTIONS}


def brief(version: Version, train: Windows, steps: int, seed: int, learning_rate: float) -> Predictor:
    """`version` trained for a few steps by its own losses, schedule and controller, in eval mode.

    By the steps of a run (`loop.step`), in memory and in float32, without checkpoints, logs and validation. The
    schedule's epochs are spread over the steps. Raises LVMError for a version with the listwise loss, which needs an
    article's chunks.
    """
    if version.losses.listwise.weight:
        raise LVMError(
            f"version {version.name}: its listwise loss (losses.listwise.weight) compares with the chunks of whole "
            "articles, which a brief training does not have; train it with lvm.train"
        )
    optimizer = dataclasses.replace(version.optimizer, lr=learning_rate, decay="all")
    own = dataclasses.replace(version, seed=seed, optimizer=optimizer)
    state = loop.start(own, train.store.dim, torch.device("cpu"))
    task, size = loop.Task(own, train, torch.from_numpy(train.store.vectors)), own.batch_size
    with loop.seeded(seed, 1):
        rounds = math.ceil(steps * size / len(train))
        order = torch.cat([torch.randperm(len(train)) for _ in range(rounds)]).numpy()
        for i in range(steps):
            now = controller.phase(own.schedule, 1 + i * own.epochs // steps)
            loop.step(state, task, order[i * size : (i + 1) * size], own.control, now)
    return state.model.eval()


def quick_ridge(train: Windows, strength: float = 10.0, most: int = 600) -> Linear:
    """The ridge predictor fitted to at most so many windows, by the dual form: quick where D is large.

    W = Xᵀ (X Xᵀ + strength·I)⁻¹ Y, with X (N, T·D) the contexts and Y (N, D) the targets.
    """
    few = train.at_most(most)
    context, target = few.batch(np.arange(len(few)))
    x, y = context.flatten(1).double(), target.double()
    weights = x.T @ torch.linalg.solve(x @ x.T + strength * torch.eye(len(x), dtype=torch.float64), y)
    return Linear(train.store.dim, weights.float())


def noisy(predictor: Linear, amount: float, seed: int) -> Predictor:
    """A linear predictor as one of many seeds might have trained it: some far from their best, some near it.

    Noise is added to the weights, of |N(0, 1)| · amount times their standard deviation.
    """
    random = torch.Generator().manual_seed(seed)
    spread = amount * abs(float(torch.randn((), generator=random))) * float(predictor.weights.std())
    other = copy.deepcopy(predictor)
    other.weights = predictor.weights + spread * torch.randn(predictor.weights.shape, generator=random)
    return other


def share(hits: int, of: int) -> tuple[float, float, float]:
    """hits / of, and the 95 % interval of the probability (Clopper and Pearson, Biometrika 26, 1934)."""
    if not of:
        return float("nan"), float("nan"), float("nan")
    interval = stats.binomtest(int(hits), int(of)).proportion_ci(0.95, "exact")
    return hits / of, float(interval.low), float(interval.high)


def sides(length: int, horizon: int) -> dict[str, list[int]]:
    """Offsets from the target: in the `context`; `novel`, neither there nor right before the target; `ahead` of it."""
    context = list(range(-horizon - length + 1, -horizon + 1))
    return {
        "context": [k for k in OFFSETS if k in context],
        "novel": [k for k in OFFSETS if k and k not in context and not -horizon < k < 0],
        "ahead": [k for k in OFFSETS if k > 0],
    }


# What the tricks are judged by: the original's measures first, then the calibrated ones.
FIGURES = (
    "margin against the last",
    "margin against context[-2]",
    "margin against the best context vector",
    "R@5 of six",
    "cosine at the target",
    "novel margin",
    "novel margin, ahead",
    "novel MRR",
    "1 of 100",
)


def figures(model: Predictor, split: Windows) -> pd.DataFrame:
    """FIGURES of every window, with the article: what `fivecat` summarises, in a frame of N rows.

    The best context vector and the best novel offset are chosen on the other articles (`fivecat.best_other`).
    """
    measured = measure(model, split)
    offsets = sides(split.context_length, split.horizon)
    rivals = {name: best_other(measured, offsets[name]) for name in offsets}
    columns = {
        "margin against the last": measured.margin_last,
        "margin against context[-2]": measured.margin_prev,
        "margin against the best context vector": measured.cosine - rivals["context"],
        "R@5 of six": (measured.six_rank <= 5).astype(float),
        "cosine at the target": measured.cosine,
        "novel margin": measured.cosine - rivals["novel"],
        "novel margin, ahead": measured.cosine - rivals["ahead"],
        "novel MRR": 1 / measured.ranks["novel"],
        "1 of 100": measured.hundred,
    }
    return pd.DataFrame({name: columns[name] for name in FIGURES}).assign(article=measured.article)


def gain(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """Of two `figures` frames of the same windows: each measure's difference, low, high (95 % over articles)."""
    rows = {name: over_articles(ours[name] - theirs[name], ours["article"]) for name in FIGURES}
    return pd.DataFrame(rows, index=["value", "low", "high"]).T


def share_of_gain(ours, best, trivial, article) -> tuple[float, float, float]:
    """Σ(ours − trivial) / Σ(best − trivial): the share of the known gain that S runs have, in the mean, and its
    interval over seeds and articles (`over_seeds`).

    `ours` (S, N), `best` and `trivial` (N,): one figure of the same windows. The interval is that of the ratio's
    linearisation, (ours − trivial − share · (best − trivial)) / mean(best − trivial). NaN where the interval of
    best − trivial is not above 0: of no gain there is no share.
    """
    ours, best, trivial = (np.asarray(x, float) for x in (ours, best, trivial))
    known, low, _ = over_articles(best - trivial, article)
    if not low > 0:
        return float("nan"), float("nan"), float("nan")
    found = float((ours - trivial).mean() / known)
    low, high = over_seeds((ours - trivial - found * (best - trivial)) / known, article)[1:]
    return found, found + low, found + high


def delta(split: Windows) -> tuple[float, float, float]:
    """The original's Δ, cos(last, target) − cos(last, context[-2]), with its interval over articles."""
    rows, unit = split.context_rows(np.arange(len(split))), split.store.vectors
    last, before, target = (unit[r].astype(np.float32) for r in (rows[:, -1], rows[:, -2], split.target))
    return over_articles((last * target).sum(1) - (last * before).sum(1), split.article)


PAIRED = ("cosine", "novel MRR", "1 of 100", "mean rollout")  # what two predictors are compared in


def main_figures(store: Store, model: Predictor, other: Predictor, horizon: int = 2) -> pd.DataFrame:
    """Every figure of the calibrated report that has an interval: of `model` on validation, of `model` less `other`
    on the same windows, and of validation less OOD. Index gate, measure; columns value, low, high, articles."""
    cut = {split: windows(store, split, horizon) for split in ("val", "ood")}
    val, ood = (measure(model, cut[split]) for split in cut)
    theirs = measure(other, cut["val"])
    rows = summarise(val, "calibrated", horizon, cut["val"].context_length) + bins_delta(val, ood)
    for name in PAIRED:
        pair = paired(figure(val, name), figure(theirs, name), val["article"])
        rows.append({"gate": "paired", "measure": name, **dict(zip(("value", "low", "high"), pair, strict=True))})
    found = pd.DataFrame(rows).set_index(["gate", "measure"])[["value", "low", "high", "articles"]]
    return found[found["low"].notna()]


def answer(low: float, high: float, null: float = 0.0, words=("forward", "backward", "none")) -> str:
    """Which side of `null` an interval lies on: above, below, or neither."""
    return words[0] if low > null else words[1] if high < null else words[2]


def lag_cosines(store: Store, lags: Sequence[int]) -> pd.DataFrame:
    """Mean cosine of chunks so far apart in one article: a row an article that has them all, a column a lag."""
    found = {}
    for article in np.unique(store.article):
        rows = np.flatnonzero(store.article == article)
        unit = store.vectors[rows].astype(np.float32)
        cosine, apart = unit @ unit.T, store.position[rows][:, None] - store.position[rows]
        if all((apart == k).any() for k in lags):
            found[article] = [float(cosine[apart == k].mean()) for k in lags]
    return pd.DataFrame.from_dict(found, "index", columns=list(lags))
