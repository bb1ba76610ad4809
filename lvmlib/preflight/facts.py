"""Facts about a dataset before any training: its vectors, and what trivial predictors reach.

Axes: M chunks, A articles, N windows, D vector dimension, T context length.

Cheap facts are of every chunk. The others may be of whole articles drawn at random (`drawn`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from ..data.store import make_store
from ..errors import LVMError
from ..judge.arrow import Arrow
from ..judge.fivecat import Report, judge, score
from ..models import Predictor
from ..ranking import Articles
from ..statistics import chance_reciprocal_rank, over_articles
from ..windows import SPLITS, Dataset, GivenWindows, Store, Windows, article_spans, blocks, ranges
from .power import articles_needed, smallest_difference

WEIGHTING = ("copy last", "mean", "weighted mean")  # baselines with one weight for each context position
TRIVIAL = ("constant", *WEIGHTING, "ridge")
TRAINED = "small AMN"  # the name of a small model, trained for a few steps, among the baselines


# Articles


def runs(store: Store) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A,) each, in the store's order: the article's number, its first row, and how many rows it has."""
    begins, ends = article_spans(store.article)
    return store.article[begins], begins, ends - begins


def drawn(data: Dataset, most: Mapping[str, int], seed: int = 0, fewest: int = 20) -> Dataset:
    """Return a smaller dataset, in memory: at most about `most[split]` chunks of each split, as whole articles.

    Articles with windows are drawn at random. If fewer than `fewest` would fit, long ones are cut to a random stretch
    of most / fewest chunks. A dataset that is small enough is returned as it is. Given windows are kept.
    """
    (numbers, begins, sizes), own = runs(data.store), {split: getattr(data, split) for split in SPLITS}
    used = {split: np.flatnonzero(np.isin(numbers, w.article)) for split, w in own.items()}
    if all(sizes[used[s]].sum() <= most[s] for s in SPLITS):
        return data
    chosen = []
    for i, split in enumerate(SPLITS):
        random, order, longest = np.random.default_rng([seed, i]), used[split], sizes.max()
        if sizes[order].sum() > most[split]:
            order = random.permutation(order)
            longest = max(most[split] // min(len(order), fewest), 2 * (own[split].context_length + own[split].horizon))
            inside = np.cumsum(np.minimum(sizes[order], longest)) <= most[split]
            order = order[: max(int(inside.sum()), 2)]
        size = np.minimum(sizes[order], longest)
        chosen.append(ranges(begins[order] + random.integers(0, sizes[order] - size + 1), size))
    return _part(data, np.sort(np.concatenate(chosen)))


def _part(data: Dataset, rows: np.ndarray) -> Dataset:
    """Return the dataset of some rows of a store, ascending, with those of its windows that lie in them."""
    store, cut = data.store, {}
    articles = store.articles.loc[np.unique(store.article[rows])]
    part = make_store(f"{store.name}, a draw", store.vectors[rows], store.article[rows], store.position[rows], articles)
    for split in SPLITS:
        windows = getattr(data, split)
        inside = np.isin(windows.start, rows) & np.isin(windows.target, rows)
        cut[split] = replace(windows, store=part, start=np.searchsorted(rows, windows.start[inside]))
    if store.given is not None:  # backward windows are cut from the store, not given
        split = np.repeat(np.arange(len(SPLITS)), [len(w) for w in cut.values()])
        start = np.concatenate([w.start for w in cut.values()])
        part = replace(part, given=GivenWindows(split, start, store.given.horizon, store.given.context_length))
        cut = {s: replace(w, store=part) for s, w in cut.items()}
    return Dataset(part, **cut)


def joined(data: Dataset) -> Windows:
    """Return the windows of all splits as those of one split."""
    start = np.sort(np.concatenate([getattr(data, split).start for split in SPLITS]))
    return replace(data.train, split=", ".join(SPLITS), start=start)


def sums(store: Store) -> np.ndarray:
    """(A, D) float64, the sum of each article's vectors, in the order of `runs`."""
    spans = zip(*article_spans(store.article), strict=True)
    return np.stack([store.vectors[begin:end].sum(0, dtype=np.float64) for begin, end in spans])


def unused(data: Dataset) -> float:
    """The share of the chunks of all splits that are in no window, because of short articles or gaps."""
    used = np.zeros(len(data.store.article), bool)
    for windows in (data.train, data.val, data.ood):
        length = np.full(len(windows), windows.context_length + windows.horizon)
        used[ranges(np.minimum(windows.start, windows.target), length)] = True
    return float(1 - used[np.concatenate([data.store.rows(split) for split in SPLITS])].mean())


# Vectors


def vector_facts(store: Store) -> dict[str, float]:
    """Count the chunks, the vectors that equal an earlier one bit by bit, and the constant dimensions (still); and the
    least and the greatest norm."""
    norms, hashes = [], []
    low, high = np.full(store.dim, np.inf), np.full(store.dim, -np.inf)
    for _, block in blocks(store.vectors):
        hashes.append(np.fromiter((hash(row.tobytes()) for row in block), np.int64, len(block)))
        block = block.astype(np.float32)
        norms.append(np.linalg.norm(block, axis=1))
        low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
    norm = np.concatenate(norms)
    return {
        "chunks": len(norm),
        "least norm": float(norm.min()),
        "greatest norm": float(norm.max()),
        "equal": len(norm) - len(np.unique(np.concatenate(hashes))),
        "still": int((high - low <= 1e-6).sum()),
    }


def products(store: Store, reach: int) -> np.ndarray:
    """(reach, M) float32: row k − 1 holds x_t · x_{t+k} for rows t; NaN where row t + k is of another article."""
    out = np.full((reach, len(store.vectors)), np.nan, np.float32)
    for first, block in blocks(store.vectors):
        x = np.asarray(store.vectors[first : first + len(block) + reach], np.float32)
        for k in range(1, reach + 1):
            pairs = max(min(len(block), len(x) - k), 0)
            out[k - 1, first : first + pairs] = np.einsum("nd,nd->n", x[:pairs], x[k : k + pairs])
    for k in range(1, reach + 1):
        out[k - 1, :-k][store.article[:-k] != store.article[k:]] = np.nan
    return out


def lag_cosines(store: Store, product: np.ndarray) -> pd.DataFrame:
    """Mean cosine of an article's chunks by their distance in positions: a row an article, columns 1 … reach and `far`
    (all pairs farther apart). NaN where there is no such pair.

    `product`: from `products`. The far pairs come from the sum of an article's vectors, without its cosine matrix.
    """
    numbers, _, sizes = runs(store)
    shape, run = (len(numbers), len(product) + 1), np.repeat(np.arange(len(numbers)), sizes)
    total, count = np.zeros(shape), np.zeros(shape)  # column 0: the far pairs
    for k, cosine in enumerate(product, 1):
        t = np.flatnonzero(~np.isnan(cosine))
        distance = store.position[t + k] - store.position[t]
        t, distance = t[distance < shape[1]], distance[distance < shape[1]]
        np.add.at(total, (run[t], distance), cosine[t])
        np.add.at(count, (run[t], distance), 1)
    total[:, 0] = ((sums(store) ** 2).sum(1) - sizes) / 2 - total.sum(1)  # of unit vectors
    count[:, 0] = sizes * (sizes - 1) / 2 - count.sum(1)
    mean = np.divide(total, count, out=np.full(shape, np.nan), where=count > 0)
    return pd.DataFrame(np.roll(mean, -1, axis=1), index=numbers, columns=[*range(1, shape[1]), "far"])


def strangers(store: Store) -> float:
    """Mean cosine of two chunks of different articles, over all such pairs; NaN for one article."""
    (_, _, sizes), total = runs(store), sums(store)
    pairs = float(sizes.sum()) ** 2 - float((sizes.astype(float) ** 2).sum())
    return float(((total.sum(0) ** 2).sum() - (total**2).sum()) / pairs) if pairs else float("nan")


def delta(store: Store, product: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The original's Δ = cos(x_t, x_{t+horizon}) − cos(x_t, x_{t−1}) at every chunk with `horizon` neighbours on each
    side: of the text forwards, of the text backwards, and the article, (N,) each."""
    first = np.arange(len(store.article) - 2 * horizon)
    last = first + 2 * horizon
    gapless = store.position[last] - store.position[first] == 2 * horizon
    t = first[gapless & (store.article[first] == store.article[last])] + horizon
    ahead, behind = product[horizon - 1, t], product[horizon - 1, t - horizon]
    return ahead - product[0, t - 1], behind - product[0, t], store.article[t]


def nearest_training(store: Store, most: int = 20_000, seed: int = 0) -> pd.DataFrame:
    """Cosine of each article's mean vector with that of the nearest other training article, NaN if there is none.

    A row an article (at most so many, at random), columns split and cosine.
    """
    numbers, _, _ = runs(store)
    centre = sums(store).astype(np.float32)
    centre /= np.maximum(np.linalg.norm(centre, axis=1, keepdims=True), 1e-12)
    if len(numbers) > most:
        keep = np.sort(np.random.default_rng(seed).choice(len(numbers), most, replace=False))
        numbers, centre = numbers[keep], centre[keep]
    split = store.articles["split"].loc[numbers].to_numpy()
    train = np.flatnonzero(split == "train")
    best = np.full(len(numbers), -np.inf)
    for first in range(0, len(numbers), 1024):
        cosine = centre[first : first + 1024] @ centre[train].T
        cosine[np.arange(first, first + len(cosine))[:, None] == train] = -np.inf  # not with itself
        best[first : first + 1024] = cosine.max(1, initial=-np.inf)
    return pd.DataFrame({"split": split, "cosine": np.where(np.isinf(best), np.nan, best)}, index=numbers)


# Trivial predictors


def trivial_report(data: Dataset, predictors: Mapping[str, Predictor]) -> Report:
    """Return the `fivecat` of predictors alone, on validation and OOD, without one called the model."""
    cut = {"val": data.val, "ood": data.ood}
    judged = {(split, name): judge(p, w) for name, p in predictors.items() for split, w in cut.items()}
    frames, facts = ({key: both[i] for key, both in judged.items()} for i in range(2))
    return Report("calibrated", frames, facts, data.val.horizon, data.val.context_length)


class _WithNeighbours(Windows):
    """Windows whose context rows include the target's two neighbours: they are then no candidates."""

    def context_rows(self, index) -> np.ndarray:
        target = self.target_rows(index)[:, None]
        return np.column_stack([super().context_rows(index), target - 1, target + 1])


@torch.no_grad()
def peeked(windows: Windows, predictors: Mapping[str, Predictor]) -> pd.DataFrame:
    """Novel MRR of the mean of the target's two neighbours, and of `predictors` among the same candidates (without the
    neighbours). No predictor sees the later neighbour. It is a reference point, not an upper bound.

    A row for each window whose target has both neighbours: article, chance, `both sides`, and a column a predictor.
    Raises LVMError where there is none.
    """
    store, target = windows.store, windows.target
    near = np.clip([target - 1, target + 1], 0, len(store.article) - 1)
    inside = (store.article[near] == store.article[target]).all(0)
    inside &= store.position[near[1]] - store.position[near[0]] == 2
    if not inside.any():
        raise LVMError(
            f"{store.name}, split {windows.split}: no target has a chunk on either side; take longer articles"
        )
    windows = replace(windows, start=windows.start[inside])
    bracketed, vectors, parts = _WithNeighbours(**vars(windows)), torch.from_numpy(store.vectors), []
    articles = Articles(bracketed, vectors)
    for index in windows.indices(512):
        context, _ = windows.batch(index, vectors)
        beside = torch.from_numpy(bracketed.context_rows(index)[:, -2:])
        sides = torch.nn.functional.normalize(vectors[beside].float().mean(1), dim=-1)
        units = torch.stack([sides, *(p(context)[1] for p in predictors.values())])
        parts.append(1 / articles.ranks(units, index)[1].T)
    beyond = int(windows.horizon > 1)  # at horizon 1 the chunk before the target is in the context already
    chance = chance_reciprocal_rank(articles.novel_candidates - 1 - beyond)
    found = pd.DataFrame(torch.cat(parts).numpy(), columns=["both sides", *predictors])
    return found.assign(article=windows.article, chance=chance)


# Power


def scores(data: Dataset, predictors: Mapping[str, Predictor]) -> dict[tuple[str, str], pd.DataFrame]:
    """`fivecat.score` of each predictor on validation and OOD, by (split, predictor), with novel MRR's chance level."""
    chance = {split: chance_mrr(getattr(data, split)) for split in ("val", "ood")}
    return {
        (s, n): score(p, getattr(data, s)).assign(chance=c) for s, c in chance.items() for n, p in predictors.items()
    }


def chance_mrr(windows: Windows) -> np.ndarray:
    """(N,) the chance level of each window's novel MRR."""
    return chance_reciprocal_rank(Articles(windows, torch.from_numpy(windows.store.vectors)).novel_candidates)


def best_trivial(scored: Mapping[tuple[str, str], pd.DataFrame], split: str = "val") -> str:
    """The name of the baseline with the highest novel MRR."""
    names = [n for s, n in scored if s == split and n in TRIVIAL]
    return max(names, key=lambda n: scored[split, n]["novel MRR"].mean())


def power_table(
    scored: Mapping[tuple[str, str], pd.DataFrame], arrows: Mapping[str, Arrow], articles: Mapping[str, int]
) -> pd.DataFrame:
    """The smallest differences in novel MRR that these articles can show.

    A row for each predictor that reads its context against the best baseline, on each split, and for each arrow.
    `scored`: from `scores`; `articles`: the articles of the whole splits, where `scored` is of a draw. Columns
    comparison, split, articles, difference, low, high, smallest 80 %, smallest 95 %, needed 0.02, needed 0.01: how many
    articles show that difference with 80 % probability.
    """
    pairs = []
    for (split, name), frame in scored.items():
        best = best_trivial(scored, split)
        if name not in (best, "constant"):
            less = frame["novel MRR"] - scored[split, best]["novel MRR"]
            pairs.append((f"{name} − {best}", split, less, frame["article"], articles[split]))
    for name, a in arrows.items():
        less, number = a.differences["novel MRR"].mean(0), len(np.unique(a.article))
        pairs.append((f"forward − backward, {name}", "both ways", less, a.article, number))
    rows = []
    for name, split, less, article, number in pairs:
        value, low, high = over_articles(less, article)
        row = {"comparison": name, "split": split, "articles": number, "difference": value, "low": low, "high": high}
        row |= {f"smallest {p:.0%}": smallest_difference(less, article, p, articles=number) for p in (0.8, 0.95)}
        rows.append(row | {f"needed {w:g}": articles_needed(less, article, w) for w in (0.02, 0.01)})
    return pd.DataFrame(rows)
