"""The pre-flight: is there any signal of direction in a dataset, and how much could a model gain? Before any training.

Axes: M chunks, A articles, N windows, D vector dimension, T context length, K row offsets.

What is cheap is done on every chunk of a store, a block of rows at a time: whether its vectors are in order, cosines of
neighbours, near-same chunks in two splits. What costs more is done on whole articles drawn at random (`drawn`): the
trivial predictors' 5CAT, order probe, arrows of closed-form predictors. `verdict` turns what was found into words by
fixed rules. `notebooks/data.ipynb` shows it all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from scipy import optimize, special, stats

from . import models
from .arrow import MEASURES, Arrow, compared, figures
from .errors import LVMError
from .fivecat import Report, fivecat, score
from .models import Linear, Predictor, Weighted
from .probe import OrderProbe
from .retrieval import Articles
from .statistics import (
    chance_reciprocal_rank,
    checked,
    effective_articles,
    few,
    jackknife,
    over_articles,
)
from .vectors import SPLITS, Dataset, GivenWindows, Store, Windows, make_store, shared

SAME = 0.9999  # cosine of one text encoded twice: the rounding to float16 leaves 1 − 1e-6
# Near-same: ‖x − y‖ ≤ 0.14. All but a word or a number is the same; two chunks on one thing lie far below.
NEAR = 0.99
FILTER = 32  # leading components that near-same chunks are looked for in, before the exact cosine is taken
COMPARED = 10**10  # pairs of chunks that are compared at most: about ten seconds on 2 cores
ROWS = 8192  # rows of a store that are float32 at one time

LEAK = 0.01  # share of a split's chunks that stand in train, too: MRR may be raised by as much
COPIES = 0.05  # share of the windows whose target is near-same as a chunk of its context
ALIKE = 0.5  # mean cosine of chunks of different articles
VISIBLE = 0.02  # novel MRR: a smallest difference above this leaves open what matters
HEAVY = 0.3  # share of a split's windows from one article
UNUSED = 0.3  # share of the chunks that stand in no window
EQUAL = 0.05  # share of the vectors that equal another one
STILL = 0.1  # share of the dimensions that never change
SMALL = 30_000  # training windows: on 3,144 the transformer hardly begins to learn; the original had 431,895
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # of the ridge, as models.fit_ridge
ARITHMETIC = ("copy last", "mean", "weighted mean")  # a weight for each place in the context at most
TRIVIAL = ("constant", *ARITHMETIC, "ridge")


# Articles


def runs(store: Store) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A,) each, in the store's order: the article's number, its first row, and how many rows it has."""
    begins = np.flatnonzero(np.diff(store.article, prepend=store.article[0] - 1))
    return store.article[begins], begins, np.diff(begins, append=len(store.article))


def drawn(data: Dataset, most: Mapping[str, int], seed: int = 0, fewest: int = 20) -> Dataset:
    """A smaller dataset, in memory: of each split at most about `most[split]` chunks, as whole articles at random.

    Only articles with windows are drawn. Where a split's articles are so long that fewer than `fewest` would come in,
    long ones are cut to a stretch, at random, of most / fewest chunks. A dataset that is small enough comes back as it
    is. Windows are cut as those of `data` are, or taken from them if the store came with its own.
    """
    store, (numbers, begins, sizes) = data.store, runs(data.store)
    own = {split: getattr(data, split) for split in SPLITS}
    used = {split: np.flatnonzero(np.isin(numbers, w.article)) for split, w in own.items()}  # runs with windows
    if all(sizes[used[s]].sum() <= most[s] for s in SPLITS):
        return data
    kept = []
    for i, split in enumerate(SPLITS):
        random = np.random.default_rng([seed, i])
        order = used[split]
        longest = sizes.max()
        if sizes[order].sum() > most[split]:
            order = random.permutation(order)
            longest = max(most[split] // min(len(order), fewest), 2 * (own[split].context_length + own[split].horizon))
            inside = np.cumsum(np.minimum(sizes[order], longest)) <= most[split]
            order = order[: max(int(inside.sum()), 2)]
        for run in order:
            size = min(sizes[run], longest)
            first = begins[run] + random.integers(0, sizes[run] - size + 1)
            kept.append(np.arange(first, first + size))
    rows = np.sort(np.concatenate(kept))
    part = make_store(
        f"{store.name}, a draw",
        store.vectors[rows],
        store.article[rows],
        store.position[rows],
        store.articles.loc[np.unique(store.article[rows])],
    )

    def moved(windows: Windows) -> Windows:
        ends = np.sort(np.stack([windows.start, windows.target]), axis=0)
        at = np.searchsorted(rows, ends)
        there = (at < len(rows)).all(0) & (rows[np.minimum(at, len(rows) - 1)] == ends).all(0)
        start = np.searchsorted(rows, windows.start[there])
        return replace(windows, store=part, start=start)

    cut = {split: moved(w) for split, w in own.items()}
    if store.given is not None:  # what is cut backwards is cut from the store, and needs nothing given
        split = np.concatenate([np.full(len(w), i) for i, w in enumerate(cut.values())])
        start = np.concatenate([w.start for w in cut.values()])
        given = GivenWindows(split, start, store.given.horizon, store.given.context_length)
        part = replace(part, given=given)
        cut = {s: replace(w, store=part) for s, w in cut.items()}
    return Dataset(part, **cut)


def joined(data: Dataset) -> Windows:
    """The windows of all splits as one, for what may be asked of every article."""
    start = np.sort(np.concatenate([getattr(data, split).start for split in SPLITS]))
    return replace(data.train, split=", ".join(SPLITS), start=start)


def sums(store: Store) -> np.ndarray:
    """(A, D) float64, the sum of each article's vectors, in the order of `runs`; a block of rows at a time."""
    _, begins, _ = runs(store)
    total = np.zeros((len(begins), store.dim))
    for first in range(0, len(store.vectors), ROWS):
        block = np.asarray(store.vectors[first : first + ROWS], np.float32)
        inside = np.searchsorted(begins, [first, first + len(block)])
        starts = np.concatenate([[0], begins[inside[0] : inside[1]] - first])
        run = np.concatenate([[inside[0] - 1], np.arange(*inside)])
        keep = np.diff(starts, append=len(block)) > 0  # the block may begin with an article
        total[run[keep]] += np.add.reduceat(block, starts[keep], axis=0)
    return total


def unused(data: Dataset) -> float:
    """The share of the chunks of all splits that stand in no window: too short articles, gaps."""
    store = data.store
    used = np.zeros(len(store.article) + 1, int)
    for w in (getattr(data, split) for split in SPLITS):
        ends = np.sort(np.stack([w.start, w.target]), axis=0)
        np.add.at(used, ends[0], 1)
        np.add.at(used, ends[1] + 1, -1)
    inside = np.concatenate([store.rows(split) for split in SPLITS])
    return float((np.cumsum(used)[inside] == 0).mean())


# Vectors


def vector_facts(store: Store) -> dict[str, float]:
    """Whether the vectors are in order, read a block at a time: chunks; not finite, zero, not unit (off by more than
    0.01) vectors; least and greatest norm; equal (vectors that another one equals bit by bit, the first left out);
    still (dimensions in which all are alike)."""
    facts = {"chunks": len(store.vectors), "not finite": 0, "zero": 0, "not unit": 0}
    least, greatest, hashes = np.inf, 0.0, []
    low, high = np.full(store.dim, np.inf), np.full(store.dim, -np.inf)
    for first in range(0, len(store.vectors), ROWS):
        raw = np.ascontiguousarray(store.vectors[first : first + ROWS])
        block = raw.astype(np.float32)
        norm = np.linalg.norm(block, axis=1)
        finite = np.isfinite(norm)
        facts["not finite"] += int((~finite).sum())
        facts["zero"] += int((norm == 0).sum())
        facts["not unit"] += int((finite & (np.abs(norm - 1) > 0.01)).sum())
        least, greatest = min(least, norm[finite].min(initial=np.inf)), max(greatest, norm[finite].max(initial=0.0))
        low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
        hashes.append(np.fromiter((hash(row.tobytes()) for row in raw), np.int64, len(raw)))
    seen = np.concatenate(hashes)
    return facts | {
        "least norm": float(least),
        "greatest norm": float(greatest),
        "equal": len(seen) - len(np.unique(seen)),
        "still": int((high - low <= 1e-6).sum()),
    }


def products(store: Store, reach: int) -> np.ndarray:
    """(reach, M) float32: row k − 1 holds x_t · x_{t+k} for rows t; NaN where row t + k is of another article."""
    count = len(store.vectors)
    out = np.full((reach, count), np.nan, np.float32)
    for first in range(0, count, ROWS):
        block = np.asarray(store.vectors[first : first + ROWS + reach], np.float32)
        for k in range(1, reach + 1):
            n = min(ROWS, len(block) - k)
            if n > 0:
                out[k - 1, first : first + n] = np.einsum("nd,nd->n", block[:n], block[k : k + n])
    for k in range(1, reach + 1):
        out[k - 1, :-k][store.article[:-k] != store.article[k:]] = np.nan
    return out


def lag_cosines(store: Store, product: np.ndarray) -> pd.DataFrame:
    """Mean cosine of an article's chunks at each distance in positions: a row an article, columns 1 … reach and `far`
    (all pairs that stand farther apart). NaN where there is no such pair.

    `product`: what `products` gave. The far pairs come from the sum of an article's vectors, so that no article's
    square of cosines is ever held.
    """
    numbers, _, sizes = runs(store)
    reach, run = len(product), np.repeat(np.arange(len(numbers)), sizes)
    total, count = np.zeros(len(numbers) * (reach + 1)), np.zeros(len(numbers) * (reach + 1))
    for k in range(1, reach + 1):
        t = np.flatnonzero(~np.isnan(product[k - 1]))
        distance = store.position[t + k] - store.position[t]
        t, distance = t[distance <= reach], distance[distance <= reach]
        place = run[t] * (reach + 1) + distance
        total += np.bincount(place, product[k - 1, t], len(total))
        count += np.bincount(place, minlength=len(count))
    total, count = total.reshape(-1, reach + 1), count.reshape(-1, reach + 1)
    whole = ((sums(store) ** 2).sum(1) - sizes) / 2  # unit vectors: each has 1 with itself
    total[:, 0], count[:, 0] = whole - total[:, 1:].sum(1), sizes * (sizes - 1) / 2 - count[:, 1:].sum(1)
    mean = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return pd.DataFrame(np.roll(mean, -1, axis=1), index=numbers, columns=[*range(1, reach + 1), "far"])


def strangers(store: Store) -> float:
    """Mean cosine of two chunks of different articles, over all such pairs; NaN for one article."""
    (_, _, sizes), total = runs(store), sums(store)
    pairs = float(sizes.sum()) ** 2 - float((sizes.astype(float) ** 2).sum())
    return float(((total.sum(0) ** 2).sum() - (total**2).sum()) / pairs) if pairs else float("nan")


def delta(store: Store, product: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The original's Δ = cos(x_t, x_{t+horizon}) − cos(x_t, x_{t−1}) at every chunk that has `horizon` neighbours on
    each side without a gap: forwards, backwards (the text read from its end) and the article, (N,) each."""
    t = np.arange(horizon, len(store.article) - horizon)
    ends = t - horizon, t + horizon
    whole = (store.article[ends[0]] == store.article[ends[1]]) & (
        store.position[ends[1]] - store.position[ends[0]] == 2 * horizon
    )
    t = t[whole]
    ahead, behind = product[horizon - 1, t], product[horizon - 1, t - horizon]
    return ahead - product[0, t - 1], behind - product[0, t], store.article[t]


def nearest_training(store: Store, most: int = 20_000, seed: int = 0) -> pd.DataFrame:
    """For each article the cosine of its mean vector with that of the nearest training article; for a training article,
    of the others. A row an article (at most so many, at random): split, cosine (NaN if there is no other)."""
    numbers, _, _ = runs(store)
    centre = sums(store).astype(np.float32)
    centre /= np.maximum(np.linalg.norm(centre, axis=1, keepdims=True), 1e-12)
    if len(numbers) > most:
        keep = np.sort(np.random.default_rng(seed).choice(len(numbers), most, replace=False))
        numbers, centre = numbers[keep], centre[keep]
    split = store.articles["split"].loc[numbers].to_numpy()
    train = np.flatnonzero(split == "train")
    best = np.full(len(numbers), np.nan)
    for first in range(0, len(numbers), 1024):
        cosine = centre[first : first + 1024] @ centre[train].T
        cosine[np.arange(first, first + len(cosine))[:, None] == train] = -np.inf  # not with itself
        if len(train):
            best[first : first + 1024] = cosine.max(1)
    return pd.DataFrame({"split": split, "cosine": np.where(np.isinf(best), np.nan, best)}, index=numbers)


# Leaks


@dataclass(frozen=True, eq=False)
class Leak:
    """Chunks of `split` that stand in split `other`, too.

    `rows` (n,): the chunks looked at, of `chunks` in all; `cosine`, `match` (n,): of the nearest chunk of the other
    split, if that is NEAR or nearer (else NaN, −1); `nearest` (k,): cosine of the nearest chunk, for a few of the rows,
    however far it lies.
    """

    split: str
    other: str
    chunks: int
    rows: np.ndarray
    cosine: np.ndarray
    match: np.ndarray
    nearest: np.ndarray

    @property
    def same(self) -> int:
        return int((self.cosine >= SAME).sum())

    @property
    def near(self) -> int:
        """How many are the same or nearly."""
        return int((self.cosine >= NEAR).sum())

    @property
    def share(self) -> float:
        return self.near / len(self.rows)

    def articles(self, store: Store) -> int:
        """How many articles have more than half of their chunks (of those looked at) in the other split."""
        return int((pd.Series(self.cosine >= NEAR).groupby(store.article[self.rows]).mean() > 0.5).sum())

    def worst(self, store: Store, count: int = 5) -> list[tuple[int, int, float]]:
        """The nearest pairs, one for each pair of articles: row, row in the other split, cosine."""
        order = np.argsort(-np.nan_to_num(self.cosine, nan=-1), kind="stable")[: self.near]
        pairs = np.stack([store.article[self.rows[order]], store.article[self.match[order]]], 1)
        first = np.sort(np.unique(pairs, axis=0, return_index=True)[1])[:count]
        return [(int(self.rows[i]), int(self.match[i]), float(self.cosine[i])) for i in order[first]]


def leaks(store: Store, compared: int = COMPARED, sampled: int = 500, seed: int = 0) -> list[Leak]:
    """Same and near-same chunks of validation and OOD in train, and of OOD in validation.

    Every chunk of a split is compared with every chunk of the other, as long as the pairs are at most `compared`; else
    as many chunks of the first, drawn at random, as keep to it. Near-same chunks are near in any directions:
    ‖P(x − y)‖ ≤ ‖x − y‖ for orthonormal P, so most pairs are ruled out in the FILTER leading components of the store,
    and the exact cosine is taken of the rest. Memory holds a block of either split.
    """
    rows = {split: store.rows(split) for split in SPLITS}
    components = _leading(store, FILTER)
    found, random = [], np.random.default_rng(seed)
    for split, other in (("val", "train"), ("ood", "train"), ("ood", "val")):
        own = rows[split]
        if not len(own) or not len(rows[other]):
            continue
        count = min(len(own), max(compared // 3 // len(rows[other]), 1))
        if count < len(own):
            own = np.sort(random.choice(own, count, replace=False))
        looked = random.choice(len(own), min(sampled, len(own)), replace=False)
        cosine, match = _near_same(store, own, rows[other], components)
        nearest = _nearest(store, own[looked], rows[other])
        found.append(Leak(split, other, len(rows[split]), own, cosine, match, nearest))
    return found


def _leading(store: Store, count: int, most: int = 16_384) -> torch.Tensor:
    """(D, K) the leading directions of the store's spread, from an even sample of rows."""
    rows = np.unique(np.linspace(0, len(store.vectors) - 1, min(most, len(store.vectors))).round().astype(np.int64))
    x = torch.from_numpy(np.asarray(store.vectors[rows], np.float32))
    x = x - x.mean(0)
    return torch.linalg.eigh((x.T @ x).double())[1].flip(1)[:, :count].float()


def _read(store: Store, rows: np.ndarray) -> torch.Tensor:
    """(n, D) float32, of length 1 to the last digit."""
    x = torch.from_numpy(np.asarray(store.vectors[rows], np.float32))
    return torch.nn.functional.normalize(x, dim=1)


def _near_same(store, own, others, components) -> tuple[np.ndarray, np.ndarray]:
    best, match = np.full(len(own), -np.inf, np.float32), np.full(len(own), -1)
    bound = 2 - 2 * NEAR + 1e-3  # of ‖x − y‖², with room for rounding
    small = torch.cat([_read(store, own[i : i + ROWS]) @ components for i in range(0, len(own), ROWS)])  # (n, K)
    square = small.square().sum(1)
    for first in range(0, len(others), ROWS):
        there = _read(store, others[first : first + ROWS])
        there_small = there @ components
        # ‖Px − Py‖² ≤ bound as one product: 2 Px·Py − ‖Py‖² ≥ ‖Px‖² − bound
        right = torch.cat([2 * there_small, -there_small.square().sum(1, keepdim=True)], 1).T.contiguous()
        for at in range(0, len(own), 2048):
            left = torch.nn.functional.pad(small[at : at + 2048], (0, 1), value=1.0)
            reached = (left @ right).amax(1) >= square[at : at + 2048] - bound
            hit = at + np.flatnonzero(reached.numpy())
            if len(hit):
                cosine, place = (_read(store, own[hit]) @ there.T).max(1)
                cosine, place = cosine.numpy(), place.numpy()
                better = (cosine >= NEAR) & (cosine > best[hit])
                best[hit[better]], match[hit[better]] = cosine[better], others[first + place[better]]
    return np.where(match >= 0, np.minimum(best, 1.0), np.nan), match


def _nearest(store: Store, own: np.ndarray, others: np.ndarray) -> np.ndarray:
    x, best = _read(store, own), torch.full((len(own),), -1.0)
    for first in range(0, len(others), ROWS):
        best = torch.maximum(best, (x @ _read(store, others[first : first + ROWS]).T).amax(1))
    return best.numpy()


def copied(windows: Windows, most: int = 100_000) -> np.ndarray:
    """(n,) whether the target is the same or nearly the same as a chunk of its own context; of `most` windows, evenly
    spaced."""
    return np.concatenate(
        [
            ((context @ target[..., None])[..., 0].amax(1) >= NEAR).numpy()
            for context, target in windows.at_most(most).batches(2048)
        ]
    )


def shared_titles(store: Store) -> list[list[str]]:
    """Titles that differ in case, spaces and punctuation alone and stand in two splits. (A store with the very same
    title in two splits does not open.) Each as ["title (split)", …]."""
    named = store.articles[(store.articles["title"] != "") & store.articles["split"].isin(SPLITS)]
    plain = named["title"].map(lambda t: re.sub(r"[\W_]+", " ", t.casefold()).strip())
    plain = plain[plain != ""]
    return [
        [f"{t} ({s})" for t, s in zip(group["title"], group["split"], strict=True)]
        for _, group in named.loc[plain.index].groupby(plain)
        if group["split"].nunique() > 1
    ]


# Trivial predictors


def trivial_report(data: Dataset, predictors: Mapping[str, Predictor]) -> Report:
    """`fivecat` of predictors alone, on validation and OOD, without one that is called the model."""
    first, *others = predictors
    report = fivecat(predictors[first], data, {n: predictors[n] for n in others})

    def named(by_name: Mapping) -> dict:
        renamed = {(s, first if p == "model" else p): v for (s, p), v in by_name.items()}
        return {(s, p): renamed[s, p] for p in predictors for s in report.splits}

    table = report.table.assign(predictor=report.table["predictor"].replace("model", first))
    return replace(report, table=table, frames=named(report.frames), facts=named(report.facts))


class _Bracketed(Windows):
    """Windows that take the chunks on both sides of the target for context, too: they are no candidates then."""

    def context_rows(self, index) -> np.ndarray:
        target = self.target[np.asarray(index)][:, None]
        return np.column_stack([super().context_rows(index), target - 1, target + 1])


@torch.no_grad()
def peeked(windows: Windows, predictors: Mapping[str, Predictor]) -> pd.DataFrame:
    """A mark from above: novel MRR of the mean of the two chunks on either side of the target, one of which comes after
    it and is seen by no predictor; and of `predictors`, with those two left out of the candidates for all.

    It is no ceiling: an announcement may tell more. But where even the neighbours on both sides tell little of a chunk,
    1.0 is far out of reach. A row a window whose target has both neighbours: article, chance, `both sides`, and a
    column a predictor. Raises LVMError where there is none.
    """
    store, target = windows.store, windows.target
    inside = (target > 0) & (target + 1 < len(store.article))
    near = np.clip(np.stack([target - 1, target + 1]), 0, len(store.article) - 1)
    inside &= (store.article[near] == store.article[target]).all(0)
    inside &= store.position[near[1]] - store.position[near[0]] == 2
    if not inside.any():
        raise LVMError(f"{store.name}, split {windows.split}: no target has a chunk on either side")
    windows = replace(windows, start=windows.start[inside])
    bracketed = _Bracketed(**vars(windows))
    vectors = torch.from_numpy(store.vectors)
    articles, parts = Articles(bracketed, vectors), []
    for first in range(0, len(windows), 512):
        index = np.arange(first, min(first + 512, len(windows)))
        context, _ = windows.batch(index, vectors)
        beside = torch.from_numpy(bracketed.context_rows(index)[:, -2:])
        sides = torch.nn.functional.normalize(vectors[beside].float().mean(1), dim=-1)
        units = torch.stack([sides, *(p(context)[1] for p in predictors.values())])
        inverse = 1 / articles.ranks(units, index)[1].numpy()
        beyond = int(windows.horizon > 1)  # at horizon 1 the chunk before the target is in the context already
        candidates = articles.novel_candidates[index] - 1 - beyond
        parts.append(
            pd.DataFrame(
                {
                    "article": store.article[windows.target[index]],
                    "chance": chance_reciprocal_rank(candidates),
                    **dict(zip(["both sides", *predictors], inverse, strict=True)),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


# Forwards and backwards


def crossed_arrows(forward: Dataset, backward: Dataset, folds: int = 5) -> dict[str, Arrow]:
    """`arrow` for the weighted mean and ridge, with every article of all splits judged once, by predictors that were
    fitted, forwards and backwards, to the articles of the other folds.

    `forward`, `backward`: one store, cut in both directions. Article number i of those with a shared target is in fold
    i modulo `folds`. Raises LVMError where there are too few articles.
    """
    whole = joined(forward), joined(backward)
    ways = shared(*whole)
    used = np.unique(ways[0].article)
    if len(used) < 2 * folds:
        raise LVMError(
            f"{forward.store.name}: {len(used)} articles have a target that can be read both ways, {2 * folds} are "
            "needed to fit on some and judge on others: take more or longer articles"
        )
    fits = [_fold_fits(w, used, folds) for w in whole]
    copy_last = models.untrained(forward.store.dim, forward.train.context_length)["copy last"]
    folded, articles = [], []  # a fold: predictor → (forward, backward)
    for fold in range(folds):
        inside = np.isin(ways[0].article, used[fold::folds])
        test = [replace(w, start=w.start[inside]) for w in ways]
        both = [{"copy last": copy_last, **fit[fold]} for fit in fits]
        folded.append({n: [figures(b[n], w) for b, w in zip(both, test, strict=True)] for n in both[0]})
        articles.append(test[0].article)

    def of(name: str) -> list[dict]:
        return [{m: np.concatenate([f[name][way][m] for f in folded]) for m in MEASURES} for way in (0, 1)]

    article = np.concatenate(articles)
    return {name: compared([of(name)], of("copy last"), article) for name in fits[0][0]}


def _fold_fits(windows: Windows, used: np.ndarray, folds: int) -> list[dict[str, Predictor]]:
    """For each fold the weighted mean and the ridge of all windows whose article is not in it.

    As `models.fit_weights` and `fit_ridge`, from one pass: the sums of all folds less those of one. The ridge's
    strength is chosen once, by the error on the first fold of what is fitted to the others.
    """
    length, dim = windows.context_length, windows.store.dim
    size = length * dim
    place = np.searchsorted(used, windows.article)
    fold_of = np.where(np.isin(windows.article, used), place % folds, folds)  # `folds`: never judged, always fitted to
    grams, moments = torch.zeros(folds + 1, size, size), torch.zeros(folds + 1, size, dim)
    for fold in range(folds + 1):
        part = replace(windows, start=windows.start[fold_of == fold])
        for context, target in part.batches(2048):
            x = context.flatten(1)
            grams[fold] += x.T @ x
            moments[fold] += x.T @ target
    gram, moment = grams.sum(0), moments.sum(0)

    def solve(fold: int, strength: float) -> torch.Tensor:
        left = (gram - grams[fold]).double()
        left.diagonal().add_(strength)
        return torch.cholesky_solve((moment - moments[fold]).double(), torch.linalg.cholesky(left)).float()

    def error(strength: float) -> float:  # on the first fold, ‖XW − Y‖² without the constant ‖Y‖²
        weights = solve(0, strength)
        return float((weights * (grams[0] @ weights)).sum() - 2 * (weights * moments[0]).sum())

    strength = min(STRENGTHS, key=error)
    fits = []
    for fold in range(folds):
        left = (gram - grams[fold]).view(length, dim, length, dim).diagonal(dim1=1, dim2=3).sum(-1).double()  # (T, T)
        right = (moment - moments[fold]).view(length, dim, dim).diagonal(dim1=1, dim2=2).sum(-1).double()  # (T,)
        weights = torch.linalg.lstsq(left, right[:, None], driver="gelsd").solution[:, 0].float()
        fits.append({"weighted mean": Weighted(dim, weights), "ridge": Linear(dim, solve(fold, strength))})
    return fits


# Power


def smallest_difference(
    values, article, power: float = 0.8, level: float = 0.95, articles: float | None = None
) -> float:
    """The least mean difference that an interval over articles separates from 0 with probability `power`.

    `values` (N,): paired differences window by window, such as 1/rank of one predictor less that of another, and
    `article` (N,) where each stands: how unlike they are from article to article is what counts, not their mean.
    `articles`: as if there were so many, as unequal as these. NaN for fewer than two; 0 where `values` have no spread.

    The interval of `statistics.over_articles` is θ̂ ± t_c √V̂ with V̂ the jackknife variance over articles, df the
    effective articles less one and t_c the (1 + level)/2 quantile of t_df. It lies above 0 just if θ̂/√V̂ > t_c. With a
    true difference δ, θ̂ normal about δ with variance V, and V̂ independent of it, as V·χ²_df/df, that ratio has a
    noncentral t distribution of noncentrality δ/√V. But V is known from `values` alone, as V̂ = V·s² with s² as χ²_df/df
    again: a difference of λ√V̂ has the noncentrality λs. So λ is chosen for the mean of P(T_df(λs) > t_c) over s to be
    `power`: what is stated from one sample of articles holds, in the mean, for the next. With A′ instead of A articles
    V becomes V·A/A′ and df + 1 becomes (df + 1)·A′/A, while s is as before.
    """
    values, article = checked(values, article, 1)
    _, (variance,), df = jackknife(values, article)
    own = len(np.unique(article))
    scale = 1.0 if articles is None else articles / max(own, 1)
    if np.isnan(variance) or own * scale < 2:
        return float("nan")
    spread = np.sqrt(stats.chi2.ppf((np.arange(64) + 0.5) / 64, df) / df)  # s, at even steps of its distribution
    return float(_noncentrality(max((df + 1) * scale - 1, 1.0), power, level, spread) * np.sqrt(variance / scale))


def _noncentrality(df: float, power: float, level: float, spread: np.ndarray) -> float:
    """λ at which the mean of P(T_df(λs) > t_c) over `spread` s is `power`."""
    beyond = stats.t.ppf((1 + level) / 2, df)

    def short(x: float) -> float:
        seen = stats.norm.sf(beyond - x * spread) if df > 1e4 else 1 - special.nctdtr(df, x * spread, beyond)
        return seen.mean() - power

    most = beyond + 3.0
    while short(most) < 0:
        most *= 2
    return float(optimize.brentq(short, 0, most))


def articles_needed(values, article, difference: float, power: float = 0.8, level: float = 0.95) -> float:
    """How many articles, as unequal and as long as these, let a difference of so much be seen with `power`.

    The least number whose `smallest_difference` is at most `difference`; NaN for fewer than two articles, infinite
    beyond 10⁹.
    """
    if np.isnan(smallest_difference(values, article, power, level)):
        return float("nan")

    def enough(n: int) -> bool:
        return smallest_difference(values, article, power, level, n) <= difference

    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
        if high > 10**9:
            return float("inf")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return float(high)


def scores(data: Dataset, predictors: Mapping[str, Predictor]) -> dict[tuple[str, str], pd.DataFrame]:
    """`fivecat.score` of every predictor on validation and OOD, by (split, predictor), with columns novel MRR and
    chance."""
    found = {}
    for split in ("val", "ood"):
        for name, predictor in predictors.items():
            windows = getattr(data, split)
            frame, candidates = score(predictor, windows), _candidates(windows)
            chance = chance_reciprocal_rank(candidates)
            found[split, name] = frame.assign(**{"novel MRR": 1 / frame["novel rank"], "chance": chance})
    return found


def _candidates(windows: Windows) -> np.ndarray:
    """(N,) chunks of each window's article outside its context."""
    numbers, _, sizes = runs(windows.store)
    order = np.argsort(numbers)
    return sizes[order][np.searchsorted(numbers[order], windows.article)] - windows.context_length


def best_trivial(scored: Mapping[tuple[str, str], pd.DataFrame], split: str = "val") -> str:
    """The trivial predictor with the highest novel MRR."""
    names = [n for s, n in scored if s == split and n in TRIVIAL]
    return max(names, key=lambda n: scored[split, n]["novel MRR"].mean())


def power_table(
    scored: Mapping[tuple[str, str], pd.DataFrame],
    arrows: Mapping[str, Arrow],
    articles: Mapping[str, int] | None = None,
    wanted=(0.02, 0.01),
) -> pd.DataFrame:
    """How small a difference in novel MRR these articles show: a row for the best trivial predictor against each other
    predictor that reads its context, on each split; and for each arrow.

    `scored`: from `scores`; `articles`: how many with windows the whole splits have, if that was of a draw: the
    statement is for those. Columns comparison, split, articles, difference, low, high, smallest 80 %, smallest 95 %,
    needed {wanted}: articles that show so much, with 80 %.
    """
    rows = []
    for split in dict.fromkeys(s for s, _ in scored):
        best = best_trivial(scored, split)
        for (own, name), frame in scored.items():
            if own == split and name not in (best, "constant"):
                values = frame["novel MRR"].to_numpy() - scored[split, best]["novel MRR"].to_numpy()
                rows.append((f"{name} − {best}", split, values, frame["article"].to_numpy(), articles))
    for name, a in arrows.items():
        rows.append((f"forward − backward, {name}", "both ways", a.differences["novel MRR"].mean(0), a.article, None))
    table = []
    for name, split, values, article, whole in rows:
        number = len(np.unique(article)) if whole is None else whole[split]
        value, low, high = over_articles(values, article)
        found = {"comparison": name, "split": split, "articles": number, "difference": value, "low": low, "high": high}
        found |= {f"smallest {p:.0%}": smallest_difference(values, article, p, articles=number) for p in (0.8, 0.95)}
        found |= {f"needed {w:g}": articles_needed(values, article, w) for w in wanted}
        table.append(found)
    return pd.DataFrame(table)


# The verdict


@dataclass(frozen=True)
class Finding:
    """What was found, on which numbers, and what to try."""

    what: str
    why: str
    advice: str


@dataclass(frozen=True, eq=False)
class Found:
    """All that the verdict rests on; what was not measured is empty or None.

    `data`: the whole dataset. `scored`: `scores` of the trivial predictors, on all of it or on a draw. `order`: lag →
    `crossed_order_probe`. `arrows`: `crossed_arrows`. `leaks`, `nearest`, `facts`: what `leaks`, `nearest_training`,
    `vector_facts` gave. `strangers`: mean cosine of chunks of different articles. `copied`: split → share of the
    windows whose target is a near copy. `peeked`: of validation. `trained`: a small model after a few steps, its
    `score` on the validation windows of `scored`; `trained_arrow`: its `arrow`.
    """

    data: Dataset
    scored: Mapping[tuple[str, str], pd.DataFrame]
    order: Mapping[int, OrderProbe]
    arrows: Mapping[str, Arrow]
    leaks: Sequence[Leak]
    nearest: pd.DataFrame
    facts: Mapping[str, float]
    strangers: float
    copied: Mapping[str, float]
    peeked: pd.DataFrame | None = None
    trained: pd.DataFrame | None = None
    trained_arrow: Arrow | None = None

    @property
    def articles(self) -> dict[str, int]:
        """Articles with windows, in the whole dataset."""
        return {s: len(np.unique(getattr(self.data, s).article)) for s in SPLITS}

    def less(self, name: str, other: str, split: str = "val") -> tuple[float, float, float]:
        """Novel MRR of one trivial predictor less that of another, and its interval."""
        one, two = self.scored[split, name], self.scored[split, other]
        return over_articles(one["novel MRR"] - two["novel MRR"], one["article"])


def probed(order: Mapping[int, OrderProbe]) -> pd.DataFrame:
    """Accuracy of the order probe, a row a lag: lag, accuracy, low, high (95 %), pairs, articles, and order: whether it
    is above ½ beyond doubt, where so many lags are looked at (Bonferroni)."""
    rows = []
    for lag, o in order.items():
        value, low, high = over_articles(o.correct, o.article, share=True)
        strict = over_articles(o.correct, o.article, level=1 - 0.05 / len(order), share=True)[1]
        rows.append((lag, value, low, high, len(o.correct), o.articles, bool(strict > 0.5)))
    columns = ["lag", "accuracy", "low", "high", "pairs", "articles", "order"]
    return pd.DataFrame(rows, columns=columns).astype({"order": bool})


def direction(found: Found) -> str:
    """What is known of the text's direction: "forward" or "backward" (an arrow: it is easier to continue that way),
    "order" (the vectors tell the order, no arrow is seen), "none" (neither is seen), "not measured".

    An arrow is what ridge shows, or the trained model where the weighted mean does not show the same: five weights know
    no direction, but feel, as averaging does, where chunks grow noisier along every article.
    """
    declared = {name: a.declared for name, a in found.arrows.items()}
    if declared.get("ridge", "none") != "none":
        return declared["ridge"]
    other = found.trained_arrow.declared if found.trained_arrow is not None else "none"
    if other not in ("none", declared.get("weighted mean")):
        return other
    if probed(found.order)["order"].any():
        return "order"
    return "none" if found.order or found.arrows else "not measured"


def blind(found: Found) -> tuple[float, float]:
    """The smallest arrow that ridge would show with 80 %, in novel MRR, and how many articles would show one half as
    large; NaN where it was not measured."""
    if "ridge" not in found.arrows:
        return float("nan"), float("nan")
    values, article = found.arrows["ridge"].differences["novel MRR"].mean(0), found.arrows["ridge"].article
    least = smallest_difference(values, article)
    return least, articles_needed(values, article, least / 2)


def gain(found: Found) -> dict:
    """How much a model could gain on validation, in novel MRR: best (name of the best trivial predictor), its value,
    low, high; chance; plain (the best that only weighs its context); other (ridge, or plain where ridge is the best);
    smallest (the difference seen with 80 %, from how other − best varies), needed 0.02, needed 0.01 (articles); both
    sides, beside (`peeked`: the chunks on both sides, and best on the same candidates), room (their difference, with
    its interval, as a tuple); NaN if not measured."""
    best = best_trivial(found.scored)
    frame = found.scored["val", best]
    value, low, high = over_articles(frame["novel MRR"], frame["article"], share=True)
    plain = max(ARITHMETIC, key=lambda n: found.scored["val", n]["novel MRR"].mean())
    other = plain if best == "ridge" else "ridge"
    values = found.scored["val", other]["novel MRR"] - frame["novel MRR"]
    facts = {"best": best, "value": value, "low": low, "high": high, "plain": plain, "other": other}
    facts |= {"chance": float(frame["chance"].mean()), "both sides": float("nan"), "beside": float("nan")}
    facts["room"] = (float("nan"),) * 3
    facts["smallest"] = smallest_difference(values, frame["article"], articles=found.articles["val"])
    facts |= {f"needed {w:g}": articles_needed(values, frame["article"], w) for w in (0.02, 0.01)}
    if found.peeked is not None:
        p = found.peeked
        facts |= {"both sides": float(p["both sides"].mean()), "beside": float(p[best].mean())}
        facts["room"] = over_articles(p["both sides"] - p[best], p["article"])
    return facts


def answers(found: Found) -> tuple[str, str]:
    """The two questions, answered in a few sentences of Markdown: is there a signal of direction in the dataset, and
    how much could a model gain over trivial predictors?"""
    way, table, g, total = direction(found), probed(found.order), gain(found), sum(found.articles.values())
    signal = {
        "forward": "**Yes, forwards.** The text is easier to continue forwards than backwards.",
        "backward": "**Yes, but backwards.** The text is easier to continue backwards than forwards.",
        "order": "**Order, but no arrow that was seen.** The order of the chunks can be told from their vectors; "
        "nothing here continues the text better one way than the other.",
        "none": f"**None that {total} articles show.**",
        "not measured": f"**Not measured.** {total} articles with windows are too few.",
    }[way]
    if way == "order" and not found.arrows:
        signal = "**Order; an arrow was not measured.** The order of the chunks can be told from their vectors."
    if len(table):
        row = table[table["order"]].iloc[0] if table["order"].any() else table.iloc[0]
        signal += (
            f" A small classifier tells which of two chunks {row['lag']} apart comes first in "
            f"{_range(row, 'accuracy', '.1%')} of pairs, over {row['articles']} articles; chance is 50 %."
        )
    if "ridge" in found.arrows:
        signal += f" {_ridge_both_ways(found)}"
    room = (
        f"The best trivial predictor is **{g['best']}**: its novel MRR is {_range(g, 'value')}, where chance gives "
        f"{g['chance']:.3f}."
    )
    beside = [] if g["best"] == "ridge" else [f"ridge, fitted to train, {signed(found.less('ridge', g['best']))}"]
    if found.trained is not None:
        beside.append(f"a small model after a few steps {signed(_trained_less(found, g['best']))}")
    if g["best"] == "ridge":
        room += f" It is {signed(found.less('ridge', g['plain']))} from {g['plain']}, which only weighs its context."
    if beside:
        room += f" Less {g['best']}: {', '.join(beside)}."
    if g["both sides"] == g["both sides"]:
        room += (
            " What the best possible predictor would have is not known, but 1.0 is not it. A mark from above: the mean "
            "of the chunks on both sides of the target, one of which no predictor may see, has "
            f"{g['both sides']:.3f}, where {g['best']} has {g['beside']:.3f} on the same candidates; "
        )
        room += (
            f"that leaves {signed(g['room'])} to gain."
            if not g["room"][1] <= 0
            else "no gain is seen there."
            if g["room"][2] > 0
            else "so it marks nothing here."
        )
    room += (
        f" On {found.articles['val']} validation articles a difference of {g['smallest']:.3f} is seen four times in "
        f"five, a smaller one less often; 0.02 takes {_count(g['needed 0.02'])} such articles, 0.01 "
        f"{_count(g['needed 0.01'])}."
        if g["smallest"] == g["smallest"]
        else " With a single validation article no difference can be told from chance."
    )
    return signal, room


def conclusion(found: Found) -> str:
    """The verdict in one paragraph of Markdown: direction, what there is to beat, what could be seen, what to try."""
    g, way = gain(found), direction(found)
    said = {
        "forward": "The text is easier to continue forwards than backwards: there is a direction to learn.",
        "backward": "The text is easier to continue backwards than forwards: there is a direction, but not the usual "
        "one.",
        "order": "The vectors tell the order of the chunks, but that it helps to continue the text one way is not "
        "seen.",
        "none": "No order is seen in these vectors, and so nothing that a directional loss could learn.",
        "not measured": "Whether there is a direction to learn could not be measured.",
    }[way]
    said += f" To beat is {g['best']}, with a novel MRR of {g['value']:.3f} (chance {g['chance']:.3f})"
    said += f", with room for about {g['room'][0]:.2f} more" if g["room"][1] > 0 else ""
    said += (
        f"; on {found.articles['val']} validation articles a gain of {g['smallest']:.3f} would be seen four times in "
        "five."
        if g["smallest"] == g["smallest"]
        else "; no gain could be told from chance."
    )
    spoils = [*_of_leaks(found, g), *_of_copies(found, g)]
    if spoils:
        return f"{said} Before anything else: {spoils[0].what[0].lower()}{spoils[0].what[1:]}. {spoils[0].advice}"
    return f"{said} To try first: {verdict(found)[0].advice}"


def _ridge_both_ways(found: Found) -> str:
    a = found.arrows["ridge"]
    row = a.table.set_index("measure").loc["novel MRR"]
    left_in = {"value": row["forward"] - row["backward"], "low": row["raw low"], "high": row["raw high"]}
    said = (
        f"Forward less backward, ridge has {_range(row, 'difference', '+.3f')} in novel MRR over "
        f"{int(row['articles'])} articles with what copying gains by the direction taken off, and "
        f"{_range(left_in, 'value', '+.3f')} with it left in"
    )
    if a.declared != "none" or np.isnan(row["low"]):
        return said + "."
    return (
        f"{said}; an arrow needs both on one side of 0. One of {blind(found)[0]:.3f} would be seen four times in five."
    )


def _trained_less(found: Found, name: str) -> tuple[float, float, float]:
    """Novel MRR of the small trained model less that of a trivial predictor on validation, and its interval."""
    frame = found.scored["val", name]
    return over_articles(1 / found.trained["novel rank"] - frame["novel MRR"], frame["article"])


def verdict(found: Found) -> list[Finding]:
    """What speaks for an experiment on this dataset and what stands in its way, by fixed rules on figures and their
    intervals; the bounds are the constants at the file's head. What would spoil every figure comes first."""
    g = gain(found)
    rules = (_of_leaks, _of_copies, _of_direction, _of_gain, _of_nearness, _of_power, _of_size, _of_vectors, _of_ood)
    return [finding for rule in rules for finding in rule(found, g)]


def _of_leaks(found: Found, g: dict) -> Iterator[Finding]:
    store = found.data.store
    for leak in (leak for leak in found.leaks if leak.other == "train"):
        articles = leak.articles(store)
        if leak.share >= LEAK or articles:
            many = f" ({articles} article{'s' if articles > 1 else ''} for more than half)" if articles else ""
            yield Finding(
                f"{leak.share:.1%} of the {leak.split} chunks stand in train, too{many}",
                f"{leak.near:,} of {len(leak.rows):,} have a training chunk at cosine {NEAR} or more. A model that "
                f"remembers what followed there is right without any knowledge of order; {leak.split} figures may be "
                f"too high by about that share.",
                "Drop near-duplicates when encoding, or put the articles that share chunks into one split.",
            )
    for titles in shared_titles(store)[:1]:
        yield Finding(
            "Titles that are all but equal stand in two splits",
            f"Such as {' and '.join(titles[:3])}.",
            "If they are one article, put them into one split.",
        )


def _of_copies(found: Found, g: dict) -> Iterator[Finding]:
    split = max(found.copied, key=found.copied.get)
    if found.copied[split] >= COPIES:
        yield Finding(
            "Copying wins: targets repeat their context",
            f"In {found.copied[split]:.0%} of the {split} windows the target is at cosine {NEAR} or more to a chunk of "
            "its own context. Whoever copies has a high cosine, and ranks are decided among chunks that hardly differ.",
            "Drop near-duplicate chunks within an article, or cut larger chunks.",
        )


def _of_direction(found: Found, g: dict) -> Iterator[Finding]:
    way, (least, needed), total = direction(found), blind(found), sum(found.articles.values())
    missed = (
        f"An arrow below {least:.3f} in novel MRR would mostly be missed" if least == least else "No arrow was measured"
    )
    more = (
        f"more articles ({_count(needed)} would show an arrow half as large)" if needed == needed else "more articles"
    )
    if way in ("forward", "backward"):
        yield Finding(
            f"An arrow of time: the text is easier to continue {way}s",
            "Predictors fitted both ways differ beyond doubt, with what copying gains by the direction taken off and "
            "with it left in.",
            "Train a version both ways (`-p direction backward`) with several seeds; gate F in `compare.ipynb` says "
            "whether a trained model sees it, too.",
        )
    elif way == "order":
        yield Finding(
            "The vectors tell their order" + (", but no arrow is seen in prediction" if found.arrows else ""),
            "The order probe is above chance beyond doubt"
            + (f"; {_not_an_arrow(found)}" if found.arrows else "")
            + f". {missed}.",
            "See whether a trained model reads in order (gate C, shuffled), look at the probe by lag (a slow drift is "
            f"easier to see at larger ones, and says nothing of the next chunk), and take {more}.",
        )
    elif way == "none":
        seen = ["A small classifier cannot tell which of two chunks comes first."] if found.order else []
        seen += [f"{_not_an_arrow(found).capitalize()}."] if found.arrows else []
        yield Finding(
            f"No order that {total} articles could show",
            f"{' '.join(seen)} {missed}.",
            f"Take {more}; cut other chunks (sentences for paragraphs, or the reverse); try another encoder. As it "
            "stands a directional loss has nothing to work on.",
        )
    else:
        yield Finding(
            "Order and arrow could not be measured",
            f"{total} articles with windows are too few to fit on some and to judge on others.",
            "Take more articles: some tens at the least.",
        )


def _not_an_arrow(found: Found) -> str:
    row = found.arrows["ridge"].table.set_index("measure").loc["novel MRR"]
    sides = [int(low > 0) - int(high < 0) for low, high in (row[["low", "high"]], row[["raw low", "raw high"]])]
    if not any(sides):
        return "ridge fitted forwards and backwards is not told apart"
    return (
        "ridge fitted forwards and backwards differs, but not to one side with what copying gains by the direction "
        "taken off and with it left in, as uneven ends of the articles make it"
    )


def _of_gain(found: Found, g: dict) -> Iterator[Finding]:
    value, low, high = found.less("ridge", g["plain"])
    said = f"Ridge less {g['plain']}: {signed((value, low, high))} in novel MRR on validation"
    trained = (float("nan"),) * 3 if found.trained is None else _trained_less(found, g["best"])
    said += "." if found.trained is None else f"; a small model less {g['best']}: {signed(trained)}."
    sides = (
        f" The chunks on both sides of the target would give {signed(g['room'])}." if found.peeked is not None else ""
    )
    if low > 0:
        yield Finding(
            "A linear map foretells more than nearness and topic do",
            said,
            "Train `p6` first, and ask of every model whether it beats ridge, not whether it beats copying.",
        )
    elif trained[1] > 0:
        yield Finding(
            f"A small model gains over {g['best']} within a few steps",
            said,
            "Train `p6` in full; what a directional loss adds has to show against that.",
        )
    elif g["low"] <= g["chance"]:
        yield Finding(
            "The context hardly says which chunk comes",
            f"The best trivial predictor, {g['best']}, has a novel MRR of {_range(g, 'value')}; chance is "
            f"{g['chance']:.3f}.",
            "Set `horizon` to 1 if it is not; see that positions are in reading order; cut other chunks.",
        )
    elif low == low:
        yield Finding(
            f"No fitted predictor beats {g['plain']}",
            said + sides,
            f"Judge every model by its novel MRR less that of {g['plain']}, paired; margins and R@5 of six say nothing "
            "here. What there is to gain lies beyond a linear map, or takes more windows.",
        )


def _of_nearness(found: Found, g: dict) -> Iterator[Finding]:
    value, low, high = found.less("copy last", "mean")
    if low > 0:
        yield Finding(
            "Nearness tells: copying the last chunk beats the mean of the context",
            f"By {signed((value, low, high))} in novel MRR.",
            "Set `horizon` to 1 to see what nearness gives at most; a model's own part is what it adds to copying."
            if found.data.val.horizon > 1
            else "Set `horizon` to 2 to see what is left where the nearest chunk is not read.",
        )
    elif high < 0:
        yield Finding(
            "Topic tells, nearness does not: the mean of the context beats its last chunk",
            f"By {signed((-value, -high, -low))} in novel MRR.",
            "Take the mean for the predictor to beat.",
        )


def _of_power(found: Found, g: dict) -> Iterator[Finding]:
    caution = few(found.data.val.article)
    if caution or not g["smallest"] <= VISIBLE:
        known = g["smallest"] == g["smallest"]
        spread = f"By how much {g['other']} less {g['best']} varies over {found.articles['val']} validation articles"
        yield Finding(
            f"Few articles: below {g['smallest']:.3f} in novel MRR little is seen"
            if known
            else "Too few articles to judge",
            f"{spread}{'; ' * bool(caution)}{caution}." if known else f"Validation has {caution}.",
            f"Have {_count(g['needed 0.02'])} validation articles to see 0.02, {_count(g['needed 0.01'])} to see 0.01; "
            "do not choose between versions by less, however many seeds."
            if known
            else "Have some tens of articles in each split.",
        )
    for split in ("val", "ood"):
        article = getattr(found.data, split).article
        share = np.unique(article, return_counts=True)[1].max() / len(article)
        if share > max(HEAVY, 1.5 / found.articles[split]):
            yield Finding(
                f"One article gives {share:.0%} of the {split} windows",
                f"The {found.articles[split]} articles weigh as much as {effective_articles(article):.1f} equal ones.",
                "Cut that article short, or move it to train.",
            )


def _of_size(found: Found, g: dict) -> Iterator[Finding]:
    idle = unused(found.data)
    if len(found.data.train) < SMALL:
        yield Finding(
            f"{len(found.data.train):,} training windows are few for a transformer",
            "On the 3,144 of the embedded data it hardly begins to learn; the original trained on 431,895.",
            "Begin with `-p model amn` or `-p model lstm`, which get further on little.",
        )
    if idle > UNUSED:
        yield Finding(
            f"{idle:.0%} of the chunks stand in no window",
            f"A window takes {found.data.train.context_length + found.data.train.horizon} chunks on end; articles are "
            "shorter, or positions have gaps.",
            "Cut smaller chunks, or keep those that were dropped in between.",
        )


def _of_vectors(found: Found, g: dict) -> Iterator[Finding]:
    facts, dim = found.facts, found.data.store.dim
    if facts["equal"] > EQUAL * facts["chunks"]:
        yield Finding(
            f"{facts['equal'] / facts['chunks']:.0%} of the vectors equal another one",
            "Boilerplate, or empty texts.",
            "Drop chunks that come up again and again when encoding.",
        )
    if found.strangers > ALIKE:
        yield Finding(
            f"All vectors are alike: chunks of different articles have cosine {found.strangers:.2f}",
            "A direction common to all makes every cosine high, that of a constant vector, too.",
            "Read ranks and differences, not cosines; another encoder may spread the texts more.",
        )
    if facts["still"] > STILL * dim:
        yield Finding(
            f"{facts['still']} of {dim} dimensions never change",
            "They say nothing of any text.",
            "See whether the encoder's output was padded.",
        )


def _of_ood(found: Found, g: dict) -> Iterator[Finding]:
    typical = found.nearest.groupby("split")["cosine"].median()
    if typical.get("ood", -1.0) >= typical.get("val", 1.0):
        yield Finding(
            "OOD is no farther from train than validation is",
            f"In the median the nearest training article is at cosine {typical['ood']:.2f} for OOD, "
            f"{typical['val']:.2f} for validation.",
            "Take OOD for a second validation split, or split anew by topic or source.",
        )


def _range(row: Mapping, value: str, form: str = ".3f") -> str:
    interval = f" [{row['low']:{form}}, {row['high']:{form}}]" if row["low"] == row["low"] else " (no interval)"
    return f"{row[value]:{form}}{interval}"


def signed(found: tuple[float, float, float], form: str = "+.3f") -> str:
    """A figure and its interval (value, low, high) in words: "+0.012 [-0.003, +0.027]"."""
    if found[0] != found[0]:
        return "–"
    return _range(dict(zip(("value", "low", "high"), found, strict=True)), "value", form)


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 10**9 else "a billion or more"
