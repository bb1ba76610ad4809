"""The figures of 5CAT per window, from one pass of the model over each distinct input: cosines, ranks, changes.

Axes: N windows, B batch, T context length, D vector dimension, K offsets, H rollout steps, V predictions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LVMError
from ..evaluate import evaluating
from ..models import Predictor, device_of
from ..ranking import NUMBERS, TIE, Articles, among_context
from ..windows import Windows, on_device
from .cache import cached, predictor_key, windows_key
from .health import Gathering, Products, context_weights

PRECISIONS = ("float32", "bfloat16")
OFFSETS = tuple(range(-8, 6))  # of the sweep, in chunks around the target, in reading direction
STEPS = 5  # of the rollout
NEGATIVES, SEED = 99, 0  # chunks of other articles, beside the target in 1 of 100; and of all random draws
KINDS = ("all", "novel", "possible")  # candidates: the article, without the context, and of these possible targets
PARTS = ("along the mean", "along differences", "outside the context")  # of the prediction's square
Progress = Callable[[int], object]


@dataclass(frozen=True, eq=False)
class Measurements:
    """The figures per window, N of them.

    A rollout step takes the last prediction for the newest chunk, so step h predicts the chunk (h − 1)·horizon after
    the target. Equal cosines share their mean rank. Everything is in reading direction. Ranks are those of the head
    that ranks (`Predictor.heads`), all else is of the point.
    """

    article: np.ndarray  # (N,)
    target: np.ndarray  # (N,) row
    loss: np.ndarray  # (N,) mean over D of (raw − y)²
    cosine: np.ndarray  # (N,) at the target
    cosine_article: np.ndarray  # (N,) mean over the article's chunks outside the context: what the article alone gives
    margin_last: np.ndarray  # (N,) cosine less that with context[-1]
    margin_prev: np.ndarray  # (N,) the same for context[-2]
    six_rank: np.ndarray  # (N,) among target and context, the mini-5CAT's
    offsets: np.ndarray  # (N, K) cosine at each of OFFSETS; NaN outside the article
    ranks: dict[str, np.ndarray]  # (N,) by KINDS
    candidates: dict[str, np.ndarray]  # (N,) by KINDS
    hundred: np.ndarray  # (N,) 1 if the target is nearer than NEGATIVES chunks of other articles; shared where equal
    hundred_candidates: np.ndarray  # (N,)
    cosine_change: dict[str, np.ndarray]  # (N,) by ablation; also `last replaced` and `leave one out`
    mrr_change: dict[str, np.ndarray]  # (N,) change of 1 / novel rank, by ablation
    rollout: np.ndarray  # (N, H) cosine of step h with its chunk; NaN outside the article
    rollout_late: np.ndarray  # (N, H) with the chunk h after the target, as the original read it
    rollout_still: np.ndarray  # (N, H) of the first prediction with step h's chunk
    rollout_chance: np.ndarray  # (N, H) mean over the article's chunks outside the context
    similarity: np.ndarray  # (N, H − 1) of steps 2 … H to the step before
    coherence: np.ndarray  # (N,) mean adjacent cosine in the context
    weights: np.ndarray  # (N, T) least-squares weights of the context vectors in the prediction
    parts: dict[str, np.ndarray]  # (N,) by PARTS; the first has the sign of its cosine; the sizes add up to 1

    def __len__(self) -> int:
        return len(self.article)

    def __getitem__(self, name: str) -> np.ndarray:
        """(N,) by the names of the columns that `score` gives."""
        columns = {key: getattr(self, key) for key in ("article", "target", "loss", "cosine")}
        for kind in ("novel", "possible"):
            columns |= {f"{kind} rank": self.ranks[kind], f"{kind} MRR": 1 / self.ranks[kind]}
        return columns[name]

    def at(self, offsets) -> np.ndarray:
        """(N, K) cosines at some of OFFSETS."""
        return self.offsets[:, [OFFSETS.index(k) for k in offsets]]


def ablations(length: int) -> tuple[str, ...]:
    """Names of the calibrated ablations of a context of `length`; position -1 is the last vector."""
    without = (f"without [{i}]" for i in range(-length, 0))
    return ("shuffled", "reversed", *without, "last repeated", "last from elsewhere")


def judge(
    model: Predictor, windows: Windows, precision: str = "float32", progress: Progress | None = None
) -> tuple[Measurements, dict]:
    """`measure` and `health` from the same passes of the model. `progress` gets the number of windows of each batch.

    Results of a baseline (`cache.predictor_key`) are cached for the next model on these windows.
    """
    known = predictor_key(model)

    def compute() -> tuple[Measurements, dict]:
        gathering = Gathering(windows, on_device(windows.store, device_of(model)), _batch_size(model))
        return measure(model, windows, None, precision, gathering, progress), gathering.facts()

    if known is None:
        return compute()
    return copy.deepcopy(cached(("judge", known, *windows_key(windows), precision), compute))


@torch.no_grad()
def score(model: Predictor, windows: Windows, batch_size: int = 512) -> pd.DataFrame:
    """The figures that need one pass of the model: article, target, loss, cosine; rank and MRR, novel and possible."""
    articles, parts = Articles(windows, on_device(windows.store, device_of(model))), []
    with evaluating(model):
        for index in windows.indices(batch_size):
            context, target = windows.batch(index, articles.vectors)
            raw, unit, ranker = _finite_heads(model, context, windows, index)
            _, (novel,), (possible,) = articles.ranks(ranker[None], index)
            figures = {"loss": (raw - target).square().mean(1), "cosine": F.cosine_similarity(unit, target, dim=-1)}
            parts.append(figures | {"novel rank": novel, "possible rank": possible})
    frame = pd.DataFrame(_joined(parts)).astype(float)
    inverse = {f"{kind} MRR": 1 / frame[f"{kind} rank"] for kind in ("novel", "possible")}
    return frame.assign(article=windows.article, target=windows.target, **inverse)


class _Predictions(NamedTuple):
    raw: Tensor  # (B, D)
    unit: Tensor  # (B, D)
    ranker: Tensor  # (B, D); `unit` itself where the model has one head
    stacked: Tensor  # (B, V, D) the point, its ablations, the further rollout steps; the rankers if they are others
    points: slice  # which of V are the point and its ablations,
    steps: list[int]  # the rollout,
    rankers: slice  # and the rankers


@torch.no_grad()
def measure(
    model: Predictor,
    windows: Windows,
    batch_size: int | None = None,
    precision: str = "float32",
    gathering: Gathering | None = None,
    progress: Progress | None = None,
) -> Measurements:
    """Measure every figure of every window, and feed `gathering` with every batch.

    `precision`: bfloat16 runs the model's passes under autocast; all else is float32. `batch_size`
    depends on the device by default. Raises LVMError for another precision, and where the model predicts NaN.
    """
    if precision not in PRECISIONS:
        raise LVMError(f"precision {precision!r}: unknown; known: {', '.join(PRECISIONS)}")
    device, cut, rough = device_of(model), windows_key(windows), precision == "bfloat16"
    vectors = on_device(windows.store, device) if gathering is None else gathering.vectors
    articles, parts, variants = Articles(windows, vectors), [], {}
    with evaluating(model):
        for index in windows.indices(batch_size or _batch_size(model)):
            context, target = windows.batch(index, vectors)
            key = "negatives", *cut, int(index[0]), len(index)
            order, others = cached(key, lambda i=index: negatives(windows, i, SEED, NEGATIVES))
            variants = ablated(context, torch.from_numpy(order).to(device), vectors, others)
            with torch.autocast(device.type, torch.bfloat16, enabled=rough):
                predictions = _predict(model, context, variants, windows, index)
            products = Products.of(context, predictions.unit, target)
            if gathering is not None:
                gathering.add(predictions.raw, predictions.unit, products)
            rows = windows.target_rows(index)
            figures = {"article": windows.store.article[rows], "target": rows}
            figures |= {"loss": (predictions.raw - target).square().mean(1)}
            figures |= {"six_rank": among_context(predictions.ranker, context, target)}
            figures |= _of_articles(articles, predictions, index, others)
            figures |= _of_context(products, figures["cosine"])
            parts.append({k: f.cpu() if isinstance(f, Tensor) else f for k, f in figures.items()})
            if progress is not None:
                progress(len(index))
    arrays = _joined(parts)
    names = {"ranks": KINDS, "candidates": KINDS, "parts": PARTS, "mrr_change": list(variants)}
    names["cosine_change"] = [*variants, "leave one out"]
    by_name = {key: dict(zip(n, np.ascontiguousarray(arrays[key].T), strict=True)) for key, n in names.items()}
    return Measurements(**arrays | by_name)


def _predict(model: Predictor, context: Tensor, variants: Mapping[str, Tensor], windows, index) -> _Predictions:
    """The model's predictions from the context, from its variants, and rolled out."""
    raw, unit, ranker = _finite_heads(model, context, windows, index)
    units, rankers = zip(*(model.heads(v)[1:] for v in variants.values()), strict=True)
    rolled = [unit]
    for _ in range(STEPS - 1):
        context = torch.cat([context[:, 1:], rolled[-1][:, None]], 1)
        rolled.append(model(context)[1])
    one_head, count = ranker is unit, 1 + len(units)
    stacked = torch.stack([unit, *units, *rolled[1:], *(() if one_head else (ranker, *rankers))], 1)
    points, steps = slice(0, count), [0, *range(count, count + STEPS - 1)]
    return _Predictions(raw, unit, ranker, stacked, points, steps, points if one_head else slice(steps[-1] + 1, None))


def _of_articles(articles: Articles, predictions: _Predictions, index: np.ndarray, others: np.ndarray) -> dict:
    """The figures that compare predictions with chunks: of the own article, from one product, and of `others`."""
    units, size, device, wide = predictions.stacked, len(index), articles.device, articles.wide
    horizon = articles.windows.horizon
    offsets = [*OFFSETS, *(h * horizon for h in range(STEPS)), *range(1, STEPS + 1)]  # sweep, rollout, and late
    at, inside = (torch.from_numpy(a).to(device) for a in articles.columns(index, offsets))
    cosine = torch.empty(size, units.shape[1], device=device)
    ranks = torch.empty(size, len(range(units.shape[1])[predictions.rankers]), len(KINDS), dtype=wide, device=device)
    mean = torch.empty(size, STEPS, device=device)
    moved = torch.empty(size, STEPS, len(offsets), device=device)
    for block in articles.blocks(units, index):
        cosine[block.mine] = block.at(block.target)[..., 0]
        ranks[block.mine] = block.ranks(predictions.rankers).to(wide)
        mean[block.mine] = block.mean(predictions.steps)
        moved[block.mine] = block.at(at[block.mine] + block.first)[:, predictions.steps]
    sweep, right, late = moved.masked_fill(~inside[:, None], float("nan")).split([len(OFFSETS), STEPS, STEPS], 2)
    inverse, ranked = 1 / ranks[:, :, KINDS.index("novel")], cosine[:, predictions.rankers][:, 0]
    cosine = cosine[:, predictions.points]
    change, mrr_change = cosine[:, 1:] - cosine[:, :1], inverse[:, 1:] - inverse[:, :1]
    missing = torch.from_numpy(others[:, 0] < 0).to(device)
    for changes in (change, mrr_change):  # of `last from elsewhere`, the last ablation
        changes[:, -1] = changes[:, -1].masked_fill(missing, float("nan"))
    length, rolled = articles.windows.context_length, units[:, predictions.steps]
    # The original leaves one out by repeating the last vector at the end: leaving out the last changes nothing.
    left_out = sum(change[:, 2 + i] for i in range(length - 1)) / length
    candidates = articles.candidates, articles.novel_candidates, articles.possible_candidates
    return {
        "cosine": cosine[:, 0],
        "cosine_article": mean[:, 0],
        "offsets": sweep[:, 0],
        "ranks": ranks[:, 0],
        "candidates": np.stack([c[index] for c in candidates], 1).astype(float),
        **_hundred(predictions.ranker, ranked, others, articles),
        "cosine_change": torch.cat([change, left_out[:, None]], 1),
        "mrr_change": mrr_change,
        "rollout": right.diagonal(dim1=1, dim2=2),
        "rollout_late": late.diagonal(dim1=1, dim2=2),
        "rollout_still": right[:, 0],
        "rollout_chance": mean,
        "similarity": (rolled[:, :-1] * rolled[:, 1:]).sum(2),
    }


def _of_context(products: Products, cosine: Tensor) -> dict[str, Tensor]:
    """The figures that compare the prediction, at `cosine` (B,) to the target, with its context."""
    cosines = products.cosines.float().to(cosine.device)
    length = cosines.shape[1] - 2
    return {
        "margin_last": cosine - cosines[:, length, length - 1],
        "margin_prev": cosine - cosines[:, length, length - 2],
        "coherence": cosines.diagonal(1, 1, 2)[:, : length - 1].mean(1),
        "weights": context_weights(products.products).float(),
        "parts": _parts_of_square(products.products),
    }


def _parts_of_square(products: Tensor) -> Tensor:
    """(B, 3) the prediction's square in orthogonal PARTS; `products`: those of `health.Products`."""
    gram, along = products[:, :-2, :-2], products[:, :-2, -2]  # (B, T, T), (B, T)
    # Of the sum's direction m: p·m, and c_t·m; what of the context is not along it has products c_s·c_t − c_s·m c_t·m.
    size = gram.sum((1, 2)).clamp(min=1e-24).sqrt()
    mean, shares = along.sum(1) / size, gram.sum(2) / size[:, None]
    apart = gram - shares[:, :, None] * shares[:, None]
    size, axes = torch.linalg.eigh(apart)  # of its T directions, of which at most T − 1 are there
    inside = (axes.mT @ (along - shares * mean[:, None])[..., None])[..., 0].square() / size
    differences = inside.masked_fill(size <= 1e-10, 0.0).sum(1)
    rest = (1 - mean.square() - differences).clamp(min=0)
    return torch.stack([mean * mean.abs(), differences, rest], 1)


def _hundred(ranker: Tensor, own: Tensor, others: np.ndarray, articles: Articles) -> dict[str, Tensor]:
    """1 of 100: whether the target, at cosine `own` (B,), is nearer to `ranker` (B, D) than all chunks of `others`
    (B, R; −1: none)."""
    vectors, rows = articles.vectors, torch.from_numpy(others).to(ranker.device)
    exists, rows = rows >= 0, rows.clamp(min=0)
    rivals = torch.empty(rows.shape, device=ranker.device)
    most = max(1, NUMBERS // max(1, rows.shape[1] * vectors.shape[1]))
    for first in range(0, len(rows), most):  # few enough to stay in a processor's cache between the two passes
        part = slice(first, first + most)
        chunks = vectors[rows[part]].float()  # (b, R, D)
        rivals[part] = torch.bmm(chunks, ranker[part, :, None])[..., 0] / chunks.norm(dim=-1)
    rivals, own = rivals.masked_fill(~exists, -2.0), own[:, None]
    equal, count = (x.sum(1).to(articles.wide) for x in ((rivals - own).abs() <= TIE, exists))
    won = (rivals <= own + TIE).all(1) / (1 + equal)
    return {"hundred": won.masked_fill(count == 0, float("nan")), "hundred_candidates": count + 1}


def ablated(context: Tensor, order: Tensor, vectors: Tensor, others: np.ndarray) -> dict[str, Tensor]:
    """The contexts (B, T, D) of each ablation. `order` (B, T) is the shuffle; `others` (B, …) rows of other articles.

    `without [t]` repeats the last remaining vector at the end. `last replaced` puts the first vector in the last place,
    as the original did (its cross_article); `last from elsewhere` a chunk of another article.
    """
    length = context.shape[1]
    variants = {"shuffled": context.gather(1, order[..., None].expand_as(context)), "reversed": context.flip(1)}
    for out in range(length):
        rest = [i for i in range(length) if i != out]
        variants[f"without [{out - length}]"] = context[:, [*rest, rest[-1]]]
    variants["last repeated"] = context[:, -1:].expand_as(context)
    variants["last replaced"] = torch.cat([context[:, :-1], context[:, :1]], 1)
    stranger = vectors[torch.from_numpy(np.maximum(others[:, 0], 0)).to(vectors.device)].float()
    variants["last from elsewhere"] = torch.cat([context[:, :-1], stranger[:, None]], 1)
    return variants


def negatives(windows: Windows, index: np.ndarray, rng_seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each window of `index`: a random order of its context (B, T), and rows (B, count) of random chunks of the
    split's other articles, without repeats; −1 where there are too few.

    Both depend on the seed and the window's target alone.
    """
    store = windows.store

    def by_article() -> tuple[np.ndarray, ...]:
        pool = store.rows(windows.split)
        return pool, *np.unique(store.article[pool], return_index=True, return_counts=True)

    pool, numbers, begins, lengths = cached(("pool", store.fingerprint, windows.split), by_article)
    orders = np.empty((len(index), windows.context_length), np.int64)
    rows = np.full((len(index), count), -1, np.int64)
    own = np.searchsorted(numbers, store.article[windows.start[index]])
    places = windows.target_rows(index).tolist(), begins[own].tolist(), lengths[own].tolist()
    for i, (target, begin, length) in enumerate(zip(*places, strict=True)):
        random = np.random.default_rng([rng_seed, target])
        orders[i] = random.permutation(windows.context_length)
        others = len(pool) - length
        drawn = random.choice(others, min(count, others), replace=False)
        rows[i, : len(drawn)] = pool[np.where(drawn < begin, drawn, drawn + length)]
    return orders, rows


def _joined(parts: list[dict[str, np.ndarray | Tensor]]) -> dict[str, np.ndarray]:
    """The arrays of all batches, by name."""
    return {name: np.concatenate([torch.as_tensor(p[name]).cpu().numpy() for p in parts]) for name in parts[0]}


def _batch_size(model: Predictor) -> int:
    """Windows in a batch: on a CPU so few that a layer stays near its caches, elsewhere many."""
    return 256 if device_of(model).type == "cpu" else 2048


def _finite_heads(model: Predictor, context: Tensor, windows: Windows, index) -> tuple[Tensor, Tensor, Tensor]:
    """The raw, unit and ranking predictions. Raises LVMError where they are not finite, or without direction."""
    raw, unit, ranker = model.heads(context)
    if not bool(unit.isfinite().all() and ranker.isfinite().all()):
        raise LVMError(
            f"the model predicts NaN or infinite values on split {windows.split} (from window {index[0]} on); "
            "look at its weights and at the context vectors"
        )
    if not bool(unit.any(-1).all() and ranker.any(-1).all()):
        raise LVMError(
            f"the model predicts the zero vector on split {windows.split} (from window {index[0]} on), which has no "
            "direction to compare; look at its weights"
        )
    return raw, unit, ranker
