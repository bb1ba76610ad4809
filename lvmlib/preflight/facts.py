"""The pre-flight: is there any signal of direction in a dataset, and how much could a model gain? Before any training.

Axes: M chunks, A articles, N windows, D vector dimension, T context length, K row offsets.

What is cheap is done on every chunk of a store, a block of rows at a time: whether its vectors are in order, cosines of
neighbours. What costs more is done on whole articles drawn at random (`drawn`): the trivial predictors' 5CAT, order
probe, arrows of closed-form predictors. `leaks` looks across splits, `advice` turns what was found into words by fixed
rules, and `notebooks/data.ipynb` shows it all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from .. import baselines
from ..baselines import Linear, Weighted
from ..data.store import make_store
from ..errors import LVMError
from ..judge.arrow import MEASURES, Arrow, compared, figures
from ..judge.fivecat import Report, fivecat, score
from ..models import Predictor
from ..ranking import Articles
from ..statistics import articles_needed, chance_reciprocal_rank, over_articles, smallest_difference
from ..windows import SPLITS, Dataset, GivenWindows, Store, Windows, article_spans, shared

ROWS = 8192  # rows of a store that are float32 at one time

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # of the ridge, as models.fit_ridge
ARITHMETIC = ("copy last", "mean", "weighted mean")  # a weight for each place in the context at most
TRIVIAL = ("constant", *ARITHMETIC, "ridge")
TRAINED = "small AMN"  # what a small model after a few steps is called among them


# Articles


def runs(store: Store) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A,) each, in the store's order: the article's number, its first row, and how many rows it has."""
    begins, ends = article_spans(store.article)
    return store.article[begins], begins, ends - begins


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
    fitted, forwards and backwards, to the articles of the other folds. To the tables are added `forward above chance`
    and `backward above chance`: the lower end (95 %) of novel MRR less its chance level.

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
    copy_last = baselines.untrained(forward.store.dim, forward.train.context_length)["copy last"]
    folded, articles, candidates = [], [], []  # a fold: predictor → (forward, backward)
    for fold in range(folds):
        inside = np.isin(ways[0].article, used[fold::folds])
        test = [replace(w, start=w.start[inside]) for w in ways]
        both = [{"copy last": copy_last, **fit[fold]} for fit in fits]
        folded.append({n: [figures(b[n], w) for b, w in zip(both, test, strict=True)] for n in both[0]})
        articles.append(test[0].article)
        candidates.append(_candidates(test[0]))

    def of(name: str) -> list[dict]:
        return [{m: np.concatenate([f[name][way][m] for f in folded]) for m in MEASURES} for way in (0, 1)]

    article, chance = np.concatenate(articles), chance_reciprocal_rank(np.concatenate(candidates))

    def judged(name: str) -> Arrow:
        ways = of(name)
        found = compared([ways], of("copy last"), article)
        above = [over_articles(way["novel MRR"] - chance, article)[1] for way in ways]
        columns = dict(zip(("forward above chance", "backward above chance"), above, strict=True))
        return replace(found, table=found.table.assign(**columns))

    return {name: judged(name) for name in fits[0][0]}


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
    statement is for those. A TRAINED model may be among the scored. Columns comparison, split, articles, difference,
    low, high, smallest 80 %, smallest 95 %, needed {wanted}: articles that show so much, with 80 %.
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
