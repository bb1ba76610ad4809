"""Figures of a predictor on a whole split: spread, hubs, norms, copying, and whether it leaves its context.

Axes: N windows, B batch, T context length, D vector dimension, K bands, L bands that are examined.

**Escape.** A predictor gains margin against context vectors by subtracting them (handbook §4.1 point 6). The rule:
write the predictions as weighted sums of their context vectors (least squares), in the whole space and without the
leading principal components of the store. Where a context vector's mean weight is significantly negative, remove that
part from every prediction and measure again. It is escape if the negative weights raised the margin against those
vectors, and neither the cosine to the target nor the novel reciprocal rank. The rule misses a predictor that subtracts
another position in every window.
"""

from __future__ import annotations

import tempfile
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluate import Moments, evaluating
from ..models import Predictor, device_of
from ..ranking import Articles
from ..statistics import over_articles
from ..windows import Store, Windows, on_device
from .cache import cached, windows_key

NEIGHBOURS = 10  # k of the k-occurrence
BANDS = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # leading principal components left out when looking for escape
MATERIAL = 0.015  # a margin raised by less is no escape: ridge regression reaches 0.01 by chance
SAMPLE = 16_384  # rows for the principal components
IN_MEMORY = 1 << 26  # bytes of unit predictions; more of them lie in a temporary file


@torch.no_grad()
def health(model: Predictor, windows: Windows, batch_size: int = 512) -> dict:
    """Return facts of a predictor on a split, plain numbers (`measure.judge` gives the same, with measurements):

    effective rank (exp of the entropy of the covariance's eigenvalues) and variance (1 − ‖mean‖²) of the unit
    predictions, and of the targets (`… of targets`); norm and norm spread of the raw predictions; hubness: skewness of
    the k-occurrence N_10 of the split's chunks among the predictions' neighbours (Radovanović et al. 2010), and of
    the targets'; copying ratio: mean best cosine to the context of the predictions over that of the targets; weights:
    mean weight of each context vector, oldest first; escape (bool) and its reasons: escape band (how many components
    were left out), margin bought, cosine paid, novel MRR paid with their intervals.
    """
    vectors = on_device(windows.store, device_of(model))
    gathering = Gathering(windows, vectors, batch_size)
    with evaluating(model):
        for context, target in windows.batches(batch_size, vectors):
            raw, unit = model(context)
            gathering.add(raw, unit, Products.of(context, unit, target))
    return gathering.facts()


class Products(NamedTuple):
    """`vectors` (B, T + 2, D), the context, the prediction and the target, and their `products` (B, T + 2, T + 2), in
    float64: figures of a prediction and its context follow from those few numbers."""

    vectors: Tensor
    products: Tensor

    @classmethod
    def of(cls, context: Tensor, unit: Tensor, target: Tensor) -> Products:
        x = torch.cat([context, unit[:, None], target[:, None]], 1)
        x = (x.cpu() if x.device.type == "mps" else x).double()  # Apple's devices have no float64
        return cls(x, x @ x.mT)

    @property
    def cosines(self) -> Tensor:
        """(B, T + 2, T + 2)."""
        size = self.products.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-12)
        return self.products / (size[:, :, None] * size[:, None])


def context_weights(products: Tensor) -> Tensor:
    """(…, T) weights of the context vectors in the prediction, as `losses.context_weights`, from `products`."""
    gram, along = products[..., :-2, :-2], products[..., :-2, -2:-1]
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-12)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + 1e-4 * size * eye, along)[..., 0]


class Gathering:
    """The facts of `health`: `add` all windows in order, then ask for `facts`, once.

    The escape rule reads the unit predictions again, from a temporary file if there are many. Facts of the targets
    alone are cached.
    """

    def __init__(self, windows: Windows, vectors: Tensor, batch_size: int):
        self.windows, self.vectors, self.batch_size = windows, vectors, batch_size
        self.pool = torch.from_numpy(windows.store.rows(windows.split)).to(vectors.device)
        self.leading = leading_components(windows.store, vectors, min(max(BANDS), windows.store.dim // 2))
        self.bands = [k for k in BANDS if k <= len(self.leading)]
        self.moments = _Moments(vectors, self.pool)
        self.norms, self.copied, self.weights = [], [], []
        self.units = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 (closed by `facts`)

    def add(self, raw: Tensor, unit: Tensor, products: Products) -> None:
        """The next windows' raw and unit predictions (B, D)."""
        length = self.windows.context_length
        self.moments.add(unit)
        self.norms.append(raw.norm(dim=-1))
        self.copied.append(products.cosines[:, length, :length].amax(1))
        leading = self.leading.to(products.vectors)
        coordinates, rest, weights = products.vectors @ leading.T, products.products, []  # (B, T + 2, K)
        for before, band in zip([0, *self.bands], self.bands, strict=False):
            part = coordinates[:, :, before:band]
            rest = rest - part @ part.mT
            weights.append(rest)
        self.weights.append(context_weights(torch.stack(weights, 1)))  # (B, K, T)
        self.units.write(unit.float().cpu().numpy().tobytes())

    @torch.no_grad()
    def facts(self) -> dict:
        norm, own, weight = (torch.cat(x).double().cpu() for x in (self.norms, self.copied, self.weights))
        key = "targets", *windows_key(self.windows), str(self.vectors.device)
        truth, copied = cached(key, self._of_targets)
        facts = self.moments.facts() | {f"{key} of targets": value for key, value in truth.items()}
        facts |= {"norm": float(norm.mean()), "norm spread": float(norm.std(correction=0))}
        facts["copying ratio"] = float(own.mean()) / copied
        facts["weights"] = weight[:, 0].mean(0).tolist()
        with self.units:
            return facts | self._escape(weight.numpy())

    def _of_targets(self) -> tuple[dict[str, float], float]:
        """The facts of `_Moments` of the targets, and their mean best cosine to the context."""
        moments, copied = _Moments(self.vectors, self.pool), []
        for context, target in self.windows.batches(self.batch_size, self.vectors):
            truth = F.normalize(target, dim=-1)
            moments.add(truth)
            copied.append((F.normalize(context, dim=-1) @ truth[..., None])[..., 0].amax(1))
        return moments.facts(), float(torch.cat(copied).cpu().double().mean())

    def _escape(self, weight: np.ndarray) -> dict:
        """The rule of the module's docstring; `weight` (N, K, T)."""
        article = self.windows.article
        if len(np.unique(article)) < 2:  # no interval: nothing is beyond doubt
            return _escape_facts(None, *[(float("nan"),) * 3] * 3)
        negative = self._negative(weight)
        examined = np.flatnonzero(negative.any(1))
        if not len(examined):
            return _escape_facts(None, *[(0.0,) * 3] * 3)
        bands = [self.bands[i] for i in examined]
        by_band = []
        for band, effect in zip(bands, self._effect(negative[examined], bands), strict=True):
            by_band.append(_escape_facts(band, *(over_articles(figure, article) for figure in effect)))
        return max(by_band, key=lambda f: (f["escape"], f["margin bought"]))

    def _negative(self, weight: np.ndarray) -> np.ndarray:
        """(K, T) the mean weights that are negative beyond doubt, else 0."""
        level = 1 - 0.05 / (len(self.bands) * self.windows.context_length)  # Bonferroni, for all the weights
        negative = np.zeros(weight.shape[1:])
        for i, t in np.ndindex(negative.shape):
            value, _, high = over_articles(weight[:, i, t], self.windows.article, level=level)
            negative[i, t] = value if high < 0 else 0.0
        return negative

    def _effect(self, negative: np.ndarray, bands: list[int]) -> np.ndarray:
        """(L, 3, N) margin, cosine and reciprocal rank, with the `negative` weights (L, T) less without them."""
        windows, articles, device = self.windows, Articles(self.windows, self.vectors), self.vectors.device
        components, weights = (x.float().to(device) for x in (self.leading, torch.from_numpy(negative)))
        effect = np.zeros((len(bands), 3, len(windows)))
        self.units.seek(0)
        for index in windows.indices(self.batch_size):
            context, target = windows.batch(index, self.vectors)
            read = bytearray(self.units.read(4 * target.numel()))
            unit = torch.frombuffer(read, dtype=torch.float32).view_as(target).to(device)
            mended = [unit]
            for band, w in zip(bands, weights, strict=True):
                rest = context - (context @ components[:band].T) @ components[:band]
                mended.append(F.normalize(unit - torch.einsum("t,btd->bd", w, rest), dim=-1))
            units = torch.stack(mended)  # (1 + L, B, D)
            cosine = F.cosine_similarity(units, target, dim=-1)
            to_context = F.cosine_similarity(units[:, :, None], context, dim=-1)  # (1 + L, B, T)
            inverse = 1 / articles.ranks(units, index)[1]
            for j, w in enumerate(weights):
                margin = cosine - to_context @ (w / w.sum())
                change = [(x[0] - x[j + 1]).cpu().double() for x in (margin, cosine, inverse)]
                effect[j][:, index] = torch.stack(change).numpy()
        return effect


def _escape_facts(band: int | None, margin: tuple, cosine: tuple, rank: tuple) -> dict:
    """Facts of one band, from (value, low, high) of the effects of the negative weights on margin, cosine and rank."""
    escape = margin[1] > 0 and margin[0] >= MATERIAL and not cosine[1] > 0 and not rank[1] > 0
    facts = {"escape": bool(escape), "escape band": band}
    paid = [(0.0 - value, 0.0 - high, 0.0 - low) for value, low, high in (cosine, rank)]  # never -0.0
    for name, interval in zip(("margin bought", "cosine paid", "novel MRR paid"), (margin, *paid), strict=True):
        facts |= dict(zip((name, f"{name} low", f"{name} high"), interval, strict=True))
    return facts


class _Moments(Moments):
    """Moments of unit vectors, predictions or targets, and how often each chunk is a neighbour of one."""

    def __init__(self, vectors: Tensor, pool: Tensor):
        super().__init__(vectors.shape[1], vectors.device)
        self.vectors, self.pool = vectors, pool
        self.counts = torch.zeros(len(pool), dtype=torch.long, device=vectors.device)

    def add(self, unit: Tensor) -> None:
        super().add(unit)
        nearest = _nearest(unit, self.vectors, self.pool, NEIGHBOURS)
        self.counts += torch.bincount(nearest.flatten(), minlength=len(self.pool))

    def facts(self) -> dict[str, float]:
        return super().facts() | {"hubness": _skewness(self.counts.cpu().double())}


def leading_components(store: Store, vectors: Tensor, count: int) -> Tensor:
    """(count, D) orthonormal leading directions of the store's second moment (not centred: the mean is among them).

    In float64 on the CPU. Of all splits, since they reveal no target; from an even sample of at most SAMPLE rows.
    """

    def compute() -> Tensor:
        total = len(store.vectors)
        rows = np.unique(np.linspace(0, total - 1, min(SAMPLE, total)).round().astype(np.int64))
        moment = torch.zeros(store.dim, store.dim, dtype=torch.float64)
        for part in np.array_split(rows, max(len(rows) // 2048, 1)):
            x = vectors[torch.from_numpy(part).to(vectors.device)].float()
            moment += (x.T @ x).cpu().double()
        return torch.linalg.eigh(moment)[1].flip(1)[:, :count].T.contiguous()

    return cached(("leading", store.fingerprint, count, str(vectors.device)), compute)


def _nearest(unit: Tensor, vectors: Tensor, pool: Tensor, k: int, chunk: int = 8192) -> Tensor:
    """(B, k) places in `pool` of the k chunks nearest to each of `unit` (B, D), a part of the pool at a time."""
    best = None
    for first in range(0, len(pool), chunk):
        part = vectors[pool[first : first + chunk]].float()
        cosines = (unit @ part.T).div_(part.norm(dim=-1))  # fewer numbers than the chunks have
        value, place = cosines.topk(min(k, len(part)), dim=1)
        place = place + first
        if best is not None:
            value, place = torch.cat([best[0], value], 1), torch.cat([best[1], place], 1)
            value, chosen = value.topk(min(k, value.shape[1]), dim=1)
            place = place.gather(1, chosen)
        best = value, place
    return best[1]


def _skewness(counts: Tensor) -> float:
    """E[(n − μ)³] / σ³; 0 where all are equal."""
    centred = counts - counts.mean()
    spread = centred.square().mean().sqrt()
    return float((centred**3).mean() / spread**3) if spread > 0 else 0.0
