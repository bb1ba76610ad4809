"""What only a whole split tells of a predictor: spread, hubs, norms, copying, and whether its margin is bought.

Axes: N windows, B batch, T context length, D vector dimension, K bands.

**Escape.** A margin against context vectors can be had by subtracting them (handbook §4.1 point 6). The rule: write the
predictions as weighted sums of their context vectors (least squares), in the whole space and with the leading
principal components of the store left out (a flip outside them is escape, too). Where a context vector's mean weight is
negative beyond doubt, take that part out of every prediction and look again. If the margin against those vectors was
higher with the negative weights, and neither the cosine to the target nor the novel reciprocal rank was, the margin
was bought: escape. A negative weight that pays in one of the two (as an extrapolation does) is knowledge. What the rule
cannot see: a predictor that subtracts another position in every window, so that no mean weight is negative.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluate import Moments
from ..models import Predictor, device_of
from ..ranking import Articles
from ..statistics import over_articles
from ..windows import Store, Windows, on_device
from .cache import kept, windows_key

NEIGHBOURS = 10  # k of the k-occurrence
BANDS = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # leading principal components left out when looking for escape
MATERIAL = 0.015  # a margin raised by less than this is not called bought: ridge regression reaches 0.01 by chance
SAMPLE = 16_384  # rows for the principal components
IN_MEMORY = 1 << 26  # bytes of unit predictions; more of them lie in a temporary file


@torch.no_grad()
def health(model: Predictor, windows: Windows, batch_size: int = 512) -> dict:
    """Facts of a predictor on a split, plain numbers:

    effective rank (exp of the entropy of the covariance's eigenvalues) and variance (1 − ‖mean‖²) of the unit
    predictions, and of the targets (`… of targets`); norm and norm spread of the raw predictions; hubness: skewness of
    the k-occurrence N_10 of the split's chunks among the predictions' neighbours (Radovanović et al. 2010), and of
    the targets'; copying ratio: mean best cosine to the context of the predictions over that of the targets; weights:
    mean weight of each context vector in the prediction, oldest first; escape (bool) and what it rests on: bands (how
    many components were left out), margin bought, cosine paid, novel MRR paid with their intervals.

    One pass of the model; memory does not grow with N but for a few numbers a window. `fivecat.judge` gives the same
    facts from the pass that measures.
    """
    training = model.training
    model.eval()
    vectors = on_device(windows.store, device_of(model))
    with Gathering(windows, vectors, batch_size) as gathering:
        for first in range(0, len(windows), batch_size):
            context, target = windows.batch(np.arange(first, min(first + batch_size, len(windows))), vectors)
            raw, unit = model(context)
            gathering.add(raw, unit, Products.of(context, unit, target))
        facts = gathering.facts()
    model.train(training)
    return facts


@dataclass(frozen=True, eq=False)
class Products:
    """`vectors` (B, T + 2, D), the context, the prediction and the target, and their `products` (B, T + 2, T + 2), in
    float64: what is asked of a prediction and its context follows from those few numbers."""

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

    def weights(self) -> Tensor:
        """(B, T) weights of the context vectors in the prediction: `losses.context_weights`."""
        return _weights(self.products)


def _weights(products: Tensor) -> Tensor:
    """(…, T) of `products` (…, T + 2, T + 2): see `losses.context_weights`."""
    gram, along = products[..., :-2, :-2], products[..., :-2, -2:-1]
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-12)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + 1e-4 * size * eye, along)[..., 0]


class Gathering:
    """The facts of `health`, gathered batch by batch: `add` for every window in order, then `facts`.

    The unit predictions are kept for the look at an escape, those of many windows in a file that has no name and goes
    with this object (a context manager). What is of the targets alone is kept in the process.
    """

    def __init__(self, windows: Windows, vectors: Tensor, batch_size: int):
        self.windows, self.vectors, self.batch_size = windows, vectors, batch_size
        self.pool = torch.from_numpy(windows.store.rows(windows.split)).to(vectors.device)
        self.leading = _leading(windows.store, vectors, min(max(BANDS), windows.store.dim // 2))  # (K, D)
        self.bands = [k for k in BANDS if k <= len(self.leading)]
        self.seen = _Seen(windows.store.dim, len(self.pool), vectors.device)
        self.norms, self.copied, self.weights = [], [], []
        self.units = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Gathering:
        return self

    def __exit__(self, *error) -> None:
        self.units.close()

    def add(self, raw: Tensor, unit: Tensor, products: Products) -> None:
        """The next windows' raw and unit predictions (B, D)."""
        length = self.windows.context_length
        self.seen.add(unit, self.vectors, self.pool)
        self.norms.append(raw.norm(dim=-1))
        self.copied.append(products.cosines[:, length, :length].amax(1))
        leading = self.leading.to(products.vectors)
        coordinates, rest, weights = products.vectors @ leading.T, products.products, []  # (B, T + 2, K)
        for before, band in zip([0, *self.bands], self.bands, strict=False):
            part = coordinates[:, :, before:band]
            rest = rest - part @ part.mT
            weights.append(rest)
        self.weights.append(_weights(torch.stack(weights, 1)))  # (B, K, T)
        self.units.write(unit.float().cpu().numpy().tobytes())

    @torch.no_grad()
    def facts(self) -> dict:
        norm, own, weight = (torch.cat(x).double().cpu() for x in (self.norms, self.copied, self.weights))
        cut = windows_key(self.windows)
        truth = kept(
            ("truth", *cut, str(self.vectors.device)),
            lambda: _of_targets(self.windows, self.vectors, self.pool, self.batch_size),
        )
        facts = self.seen.facts() | {f"{key} of targets": value for key, value in truth.items()}
        copied = facts.pop("copied of targets")
        facts |= {"norm": float(norm.mean()), "norm spread": float(norm.std(correction=0))}
        facts["copying ratio"] = float(own.mean()) / copied
        facts["weights"] = weight[:, 0].mean(0).tolist()
        return facts | self._escape(weight.numpy())

    def _predictions(self) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Index (B,) and unit predictions (B, D), as they were added."""
        dim = self.windows.store.dim
        self.units.seek(0)
        for first in range(0, len(self.windows), self.batch_size):
            index = np.arange(first, min(first + self.batch_size, len(self.windows)))
            read = bytearray(self.units.read(4 * dim * len(index)))
            yield index, torch.frombuffer(read, dtype=torch.float32).view(-1, dim).to(self.vectors.device)

    def _escape(self, weight: np.ndarray) -> dict:
        """The rule of the module's head; `weight` (N, K, T)."""
        windows, bands = self.windows, self.bands
        article, length = windows.article, windows.context_length
        level = 1 - 0.05 / (len(bands) * length)  # Bonferroni: so many weights are looked at
        mean = np.zeros((len(bands), length))  # the negative ones, else 0
        for i, _ in enumerate(bands):
            for t in range(length):
                value, _, high = over_articles(weight[:, i, t], article, level=level)
                mean[i, t] = value if high < 0 else 0.0
        looked = [i for i in range(len(bands)) if mean[i].any()]
        none = {"escape": False, "escape band": None, "margin bought": 0.0, "cosine paid": 0.0, "novel MRR paid": 0.0}
        none |= {
            f"{k} {end}": 0.0 for k in ("margin bought", "cosine paid", "novel MRR paid") for end in ("low", "high")
        }
        if len(np.unique(article)) < 2:  # no interval: nothing is beyond doubt
            return none | {k: float("nan") for k in none if k not in ("escape", "escape band")}
        if not looked:
            return none
        articles, components = Articles(windows, self.vectors), self.leading.float().to(self.vectors.device)
        moved = np.zeros(
            (len(windows), len(looked), 3)
        )  # with the negative weights, less without: margin, cosine, 1/rank
        for index, unit in self._predictions():
            context, target = windows.batch(index, self.vectors)
            negative = torch.from_numpy(mean[looked]).float().to(unit.device)  # (L, T)
            mended = [unit]
            for i, w in zip(looked, negative, strict=True):
                rest = _without(components[: bands[i]], unit, context)[1]
                mended.append(F.normalize(unit - torch.einsum("t,btd->bd", w, rest), dim=-1))
            units = torch.stack(mended)  # (1 + L, B, D)
            cosine = F.cosine_similarity(units, target, dim=-1)
            to_context = F.cosine_similarity(units[:, :, None], context, dim=-1)  # (1 + L, B, T)
            inverse = 1 / articles.ranks(units, index)[1]
            for j, w in enumerate(negative):
                margin = cosine - to_context @ (w / w.sum())
                moved[index, j] = torch.stack(
                    [(x[0] - x[j + 1]).cpu().double() for x in (margin, cosine, inverse)], 1
                ).numpy()
        found = []
        for j, i in enumerate(looked):
            margin, cosine, rank = (over_articles(moved[:, j, k], article) for k in range(3))
            bought = margin[1] > 0 and margin[0] >= MATERIAL and not cosine[1] > 0 and not rank[1] > 0
            facts = {"escape": bool(bought), "escape band": bands[i]}
            for name, (value, low, high), sign in (
                ("margin bought", margin, 1),
                ("cosine paid", cosine, -1),
                ("novel MRR paid", rank, -1),
            ):
                low, high = (low, high) if sign == 1 else (-high, -low)
                facts |= {name: sign * value, f"{name} low": low, f"{name} high": high}
            found.append(facts)
        return max(found, key=lambda f: (f["escape"], f["margin bought"]))


class _Seen:
    """What `health` says of predictions and targets alike: moments and neighbours of unit vectors."""

    def __init__(self, dim: int, chunks: int, device: torch.device):
        self.moments = Moments(dim, torch.device("cpu") if device.type == "mps" else device)
        self.counts = torch.zeros(chunks, dtype=torch.long, device=device)

    def add(self, unit: Tensor, vectors: Tensor, pool: Tensor) -> None:
        self.moments.add(unit)
        self.counts += torch.bincount(_nearest(unit, vectors, pool, NEIGHBOURS).flatten(), minlength=len(pool))

    def facts(self) -> dict[str, float]:
        return self.moments.facts() | {"hubness": _skewness(self.counts.cpu().double())}


def _of_targets(windows: Windows, vectors: Tensor, pool: Tensor, batch_size: int) -> dict[str, float]:
    """Facts of the targets, as predictions: effective rank, variance, hubness, and the mean best cosine to the
    context."""
    seen, copied = _Seen(windows.store.dim, len(pool), vectors.device), []
    for context, target in windows.batches(batch_size, vectors):
        truth = F.normalize(target, dim=-1)
        seen.add(truth, vectors, pool)
        copied.append((F.normalize(context, dim=-1) @ truth[..., None])[..., 0].amax(1))
    return seen.facts() | {"copied": float(torch.cat(copied).cpu().double().mean())}


def leading_components(store: Store, vectors: Tensor, count: int) -> Tensor:
    """(count, D) orthonormal leading directions of the store's second moment (not centred: the mean is among them).

    Of all splits, since no target is told by them; from an even sample of at most 16,384 rows.
    """
    return _leading(store, vectors, count).float().to(vectors.device)


def _leading(store: Store, vectors: Tensor, count: int) -> Tensor:
    """`leading_components` in float64, on the CPU."""

    def made() -> Tensor:
        rows = np.linspace(0, len(store.vectors) - 1, min(SAMPLE, len(store.vectors))).round().astype(np.int64)
        rows = np.unique(rows)
        moment = torch.zeros(store.dim, store.dim, dtype=torch.float64)
        for part in np.array_split(rows, max(len(rows) // 2048, 1)):
            x = vectors[torch.from_numpy(part).to(vectors.device)].float()
            moment += (x.T @ x).cpu().double()
        return torch.linalg.eigh(moment)[1].flip(1)[:, :count].T.contiguous()

    return kept(("leading", store.fingerprint, count, str(vectors.device)), made)


def _without(components: Tensor, unit: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction (B, D) and context (B, T, D) with the `components` (k, D) projected out."""
    return tuple(x - (x @ components.T) @ components for x in (unit, context))


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
