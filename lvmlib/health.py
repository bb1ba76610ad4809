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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import context_weights
from .models import Predictor, device_of
from .retrieval import Articles
from .statistics import over_articles
from .vectors import Store, Windows

NEIGHBOURS = 10  # k of the k-occurrence
BANDS = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # leading principal components left out when looking for escape
MATERIAL = 0.015  # a margin raised by less than this is not called bought: ridge regression reaches 0.01 by chance
SAMPLE = 16_384  # rows for the principal components


@torch.no_grad()
def health(model: Predictor, windows: Windows, batch_size: int = 512) -> dict:
    """Facts of a predictor on a split, plain numbers:

    effective rank (exp of the entropy of the covariance's eigenvalues) and variance (1 − ‖mean‖²) of the unit
    predictions, and of the targets (`… of targets`); norm and norm spread of the raw predictions; hubness: skewness of
    the k-occurrence N_10 of the split's chunks among the predictions' neighbours (Radovanović et al. 2010), and of
    the targets'; copying ratio: mean best cosine to the context of the predictions over that of the targets; weights:
    mean weight of each context vector in the prediction, oldest first; escape (bool) and what it rests on: bands (how
    many components were left out), margin bought, cosine paid, novel MRR paid with their intervals.

    Two passes of the model; memory does not grow with N but for a few numbers a window.
    """
    device = device_of(model)
    training = model.training
    model.eval()
    vectors = torch.from_numpy(windows.store.vectors).to(device)
    pool = torch.from_numpy(windows.store.rows(windows.split)).to(device)
    components = leading_components(windows.store, vectors, min(max(BANDS), windows.store.dim // 2))  # (K, D)
    bands = [k for k in BANDS if k <= len(components)]
    moments = {name: _Moments(windows.store.dim) for name in ("", " of targets")}
    counts = {name: torch.zeros(len(pool), dtype=torch.long) for name in moments}
    norms, copied, weights = [], [], []
    for first in range(0, len(windows), batch_size):
        index = np.arange(first, min(first + batch_size, len(windows)))
        context, target = windows.batch(index, vectors)
        raw, unit = model(context)
        truth = F.normalize(target, dim=-1)
        for name, x in (("", unit), (" of targets", truth)):
            moments[name].add(x)
            counts[name] += torch.bincount(_nearest(x, vectors, pool, NEIGHBOURS).flatten().cpu(), minlength=len(pool))
        norms.append(raw.norm(dim=-1).cpu())
        best = [F.cosine_similarity(x[:, None], context, dim=-1).amax(1) for x in (unit, truth)]
        copied.append(torch.stack(best, 1).cpu())
        weights.append(torch.stack([context_weights(*_without(components[:k], unit, context)) for k in bands], 1).cpu())
    norm, (own, truth), weight = torch.cat(norms), torch.cat(copied).mean(0).tolist(), torch.cat(weights)  # (N, K, T)
    facts = {f"{key}{name}": value for name, m in moments.items() for key, value in m.facts().items()}
    facts |= {f"hubness{name}": _skewness(c.double()) for name, c in counts.items()}
    facts |= {"norm": float(norm.mean()), "norm spread": float(norm.std(correction=0)), "copying ratio": own / truth}
    facts["weights"] = weight[:, 0].mean(0).tolist()
    facts |= _escape(model, windows, vectors, components, bands, weight.double().numpy(), batch_size)
    model.train(training)
    return facts


def leading_components(store: Store, vectors: Tensor, count: int) -> Tensor:
    """(count, D) orthonormal leading directions of the store's second moment (not centred: the mean is among them).

    Of all splits, since no target is told by them; from an even sample of at most 16,384 rows.
    """
    rows = np.unique(np.linspace(0, len(store.vectors) - 1, min(SAMPLE, len(store.vectors))).round().astype(np.int64))
    moment = torch.zeros(store.dim, store.dim, dtype=torch.float64)
    for part in np.array_split(rows, max(len(rows) // 2048, 1)):
        x = vectors[torch.from_numpy(part).to(vectors.device)].float()
        moment += (x.T @ x).cpu().double()
    return torch.linalg.eigh(moment)[1].flip(1)[:, :count].T.float().contiguous().to(vectors.device)


def _without(components: Tensor, unit: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction (B, D) and context (B, T, D) with the `components` (k, D) projected out."""
    return tuple(x - (x @ components.T) @ components for x in (unit, context))


def _escape(model, windows, vectors, components, bands, weight: np.ndarray, batch_size: int) -> dict:
    """The rule of the module's head; `weight` (N, K, T)."""
    article, length = windows.article, windows.context_length
    level = 1 - 0.05 / (len(bands) * length)  # Bonferroni: so many weights are looked at
    mean = np.zeros((len(bands), length))  # the negative ones, else 0
    for i, _ in enumerate(bands):
        for t in range(length):
            value, _, high = over_articles(weight[:, i, t], article, level=level)
            mean[i, t] = value if high < 0 else 0.0
    looked = [i for i in range(len(bands)) if mean[i].any()]
    none = {"escape": False, "escape band": None, "margin bought": 0.0, "cosine paid": 0.0, "novel MRR paid": 0.0}
    none |= {f"{k} {end}": 0.0 for k in ("margin bought", "cosine paid", "novel MRR paid") for end in ("low", "high")}
    if len(np.unique(article)) < 2:  # no interval: nothing is beyond doubt
        return none | {k: float("nan") for k in none if k not in ("escape", "escape band")}
    if not looked:
        return none
    articles = Articles(windows, vectors)
    moved = np.zeros((len(windows), len(looked), 3))  # with the negative weights, less without: margin, cosine, 1/rank
    for first in range(0, len(windows), batch_size):
        index = np.arange(first, min(first + batch_size, len(windows)))
        context, target = windows.batch(index, vectors)
        unit = model(context)[1]
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
                [(x[0] - x[j + 1]).double().cpu() for x in (margin, cosine, inverse)], 1
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


class _Moments:
    """Running first and second moment of unit vectors (N, D)."""

    def __init__(self, dim: int):
        self.count, self.first, self.second = 0, torch.zeros(dim).double(), torch.zeros(dim, dim).double()

    def add(self, x: Tensor) -> None:
        x = x.cpu().double()  # or the rounding of equal predictions would have a rank of its own
        self.count += len(x)
        self.first += x.sum(0)
        self.second += x.T @ x

    def facts(self) -> dict[str, float]:
        mean = self.first / self.count
        spread = torch.linalg.eigvalsh(self.second / self.count - torch.outer(mean, mean)).clamp(min=0)
        share = spread / spread.sum().clamp(min=1e-12)
        rank = float(torch.exp(-(share * share.clamp(min=1e-30).log()).sum())) if spread.sum() > 1e-9 else 1.0
        return {"effective rank": rank, "variance": max(0.0, float(1 - mean.square().sum()))}


def _nearest(unit: Tensor, vectors: Tensor, pool: Tensor, k: int, chunk: int = 8192) -> Tensor:
    """(B, k) places in `pool` of the k chunks nearest to each of `unit` (B, D), a part of the pool at a time."""
    best = None
    for first in range(0, len(pool), chunk):
        part = F.normalize(vectors[pool[first : first + chunk]].float(), dim=-1)
        value, place = (unit @ part.T).topk(min(k, len(part)), dim=1)
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
