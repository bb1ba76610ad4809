"""Spread of a model's samples, against the true next chunk and against ensembles without training.

Axes: N windows, B batch, S samples, T context length, D vector dimension.

**Energy score** (`losses.energy`): strictly proper, fair to independent draws only.
**Spread ratio**, E‖x − x'‖ / E‖x − y‖: 1 where the truth y is one more draw, less where samples are too narrow or in
the wrong place, more where they are too wide.
**Ranks** of the truth among the samples (Gneiting et al., TEST 17, 2008), by *distance* (the mean distance from all
others) or *direction* (the place along a random direction of each window). A rank r of 1 … S+1 becomes
u = (r − V) / (S + 1) with V uniform in [0, 1): u is uniform where truth and samples are exchangeable.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ..baselines import Weighted, fit_weights
from ..errors import LVMError
from ..evaluate import evaluating
from ..losses import distances
from ..models import Predictor, device_of
from ..statistics import effective_articles, over_articles
from ..windows import Windows, on_device
from .table import row_text, side, with_interval

SAMPLES = 39  # with the truth 40 places in the order
TIE = 1e-6  # distances nearer than this are equal
BINS = 10  # of a rank histogram
COVERED = (0.5, 0.9)


class Ensemble(Predictor):
    """Samples without training: a point forecast plus a random row of `pool` (M, D), normalised if `unit`.

    A pool of residuals gives a dressed forecast (Roulston & Smith, Tellus 55A, 2003), a row of zeros the point itself.
    """

    def __init__(self, point: Predictor, pool: Tensor, unit: bool = False):
        super().__init__(point.dim, point.context_length)
        self.point, self.unit = point, unit
        self.register_buffer("pool", pool)

    def samples(self, context: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(S, B, D)."""
        rows = torch.randint(len(self.pool), (count, len(context)), generator=generator, device=context.device)
        drawn = self.point.raw(context) + self.pool[rows]
        return F.normalize(drawn, dim=-1) if self.unit else drawn

    def raw(self, context: Tensor) -> Tensor:
        return self.point.raw(context) + self.pool.mean(0)


class FromContext(Predictor):
    """Samples are context vectors, drawn with replacement: the energy score is fair to independent draws only."""

    def samples(self, context: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(S, B, D)."""
        size, length = context.shape[:2]
        place = torch.randint(length, (count, size), generator=generator, device=context.device)
        return context[torch.arange(size, device=context.device), place]

    def raw(self, context: Tensor) -> Tensor:
        return context.mean(1)


def references(train: Windows) -> dict[str, Predictor]:
    """Return the forecasts to compare with: the weighted mean as a point; random training targets (climatology); random
    context vectors; the weighted mean plus its training residuals."""
    dim, length = train.store.dim, train.context_length
    mean, nothing = Weighted(dim, fit_weights(train)), Weighted(dim, torch.zeros(length))
    context, target = train.batch(np.arange(len(train)))
    return {
        "weighted mean, a point": Ensemble(mean, torch.zeros(1, dim)),
        "climatology": Ensemble(nothing, target),
        "context vectors": FromContext(dim, length),
        "weighted mean, dressed": Ensemble(mean, target - mean.raw(context), unit=True),
    }


@torch.no_grad()
def measure(
    model: Predictor, windows: Windows, count: int = SAMPLES, seed: int = 0, batch_size: int = 512
) -> pd.DataFrame:
    """Measure samples against the truth, a row a window: article, target (row), energy, off (mean ‖x − y‖), apart (mean
    ‖x − x'‖), distance and direction (the truth's rank u in (0, 1)).

    Raises LVMError for a model without samples. The same `seed` and `batch_size` give the same noise.
    """
    if not hasattr(model, "samples"):
        raise LVMError(f"{type(model).__name__} has no samples; train a version with them (energy)")
    device, random, parts = device_of(model), np.random.default_rng(seed), []
    vectors, noise = on_device(windows.store, device), torch.Generator(device).manual_seed(seed)
    with evaluating(model):
        for context, target in windows.batches(batch_size, vectors):
            drawn = model.samples(context, count, noise)  # (S, B, D)
            off, apart = distances(drawn, target)
            members = torch.cat([target[None], drawn])
            towards = torch.from_numpy(random.standard_normal(target.shape)).float().to(device)
            columns = {"energy": off - apart / 2, "off": off, "apart": apart}
            for name, order in (("distance", remoteness(members)), ("direction", (members * towards).sum(-1))):
                columns[name] = place(order.cpu().double().numpy(), random)
            parts.append(pd.DataFrame({k: np.asarray(torch.as_tensor(c).cpu(), float) for k, c in columns.items()}))
    return pd.concat(parts, ignore_index=True).assign(article=windows.article, target=windows.target)


def remoteness(members: Tensor) -> Tensor:
    """(M, B) mean distance of each of `members` (M, B, D) from the others."""
    x = members.transpose(0, 1).contiguous()
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum(2).T / (len(members) - 1)


def place(order: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(B,) rank u of the first row of `order` (M, B) among all: (number below + V · number equal, itself too) / M."""
    below, equal = order < order[0] - TIE, np.abs(order - order[0]) <= TIE
    return (below.sum(0) + random.random(order.shape[1]) * equal.sum(0)) / len(order)


@dataclass(frozen=True, eq=False)
class Spread:
    """The result of `spread`. `table`: split, forecast, measure, chance (of a calibrated forecast), value, low, high
    (95 % over articles), windows, articles. `frames`: from `measure`, by (split, forecast)."""

    table: pd.DataFrame
    frames: dict[tuple[str, str], pd.DataFrame]

    def row(self, measure: str, split: str = "val", forecast: str = "model") -> pd.Series:
        """Return a row of the table. Raises LVMError if there is none."""
        rows = self.table.query("measure == @measure and split == @split and forecast == @forecast")
        if rows.empty:
            raise LVMError(f"spread: no {measure!r} of {forecast!r} on split {split!r}")
        return rows.iloc[0]

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(split for split, _ in self.frames))

    @property
    def forecasts(self) -> list[str]:
        return list(dict.fromkeys(name for _, name in self.frames))


def spread(model: Predictor, splits: Mapping[str, Windows], compare: Mapping[str, Predictor]) -> Spread:
    """Return the spread of `model` and of every forecast in `compare` (such as `references`) on each split."""
    forecasts = {"model": model, **{name: other.to(device_of(model)) for name, other in compare.items()}}
    frames = {(s, n): measure(f, w) for n, f in forecasts.items() for s, w in splits.items()}
    rows = [{"split": s, "forecast": n, **row} for (s, n), frame in frames.items() for row in summarise(frame)]
    for (split, name), frame in frames.items():
        if name != "model":
            less = frames[split, "model"]["energy"] - frame["energy"]
            rows.append({"split": split, "forecast": "model", **_row(f"energy score less {name}", less, frame, 0.0)})
    return Spread(pd.DataFrame(rows), frames)


def summarise(frame: pd.DataFrame) -> list[dict]:
    """Rows of one `measure` frame: measure, value, low, high over articles, chance, windows, articles.

    The interval of the spread ratio θ = a / b of means is that of θ + (aᵢ − θ bᵢ) / b (delta method). Coverage: the
    share of truths in the inner part of the samples, by distance. The `chance` of KS (`kolmogorov`) is the mean of
    Kolmogorov's distribution for n effective articles, √(π/2) · ln 2 / √n.
    """
    article = frame["article"].to_numpy()
    off, apart = frame["off"].to_numpy(), frame["apart"].to_numpy()
    ratio = apart.mean() / off.mean()
    rows = [
        _row("energy score", frame["energy"], frame),
        _row("spread ratio", ratio + (apart - ratio * off) / off.mean(), frame, 1.0),
        *(_row(f"covered by the inner {p:.0%}", frame["distance"] <= p, frame, p, share=True) for p in COVERED),
    ]
    chance = np.sqrt(np.pi / 2) * np.log(2) / np.sqrt(max(effective_articles(article), 1.0))
    for name in ("distance", "direction"):
        rows.append(_row(f"KS of ranks by {name}", kolmogorov(frame[name]), frame, min(chance, 1.0)))
    return rows


def kolmogorov(u) -> np.ndarray:
    """(N,) whose mean is the largest gap |share at or below u − u| of ranks `u` (N,) in (0, 1)."""
    u = np.asarray(u, float)
    at = np.sort(u)
    high, low = np.arange(1, len(at) + 1) / len(at) - at, at - np.arange(len(at)) / len(at)
    sign, where = (1, at[high.argmax()]) if high.max() >= low.max() else (-1, np.nextafter(at[low.argmax()], 0))
    return sign * ((u <= where) - where)


def _row(name: str, values, frame: pd.DataFrame, chance: float = float("nan"), share: bool = False) -> dict:
    return {"measure": name, "chance": chance, **with_interval(values, frame["article"], share)}


def histogram(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """The ranks of `column` in BINS equal bins: middle, share, low, high (95 % over articles)."""
    edges = np.linspace(0, 1, BINS + 1)
    bins = np.clip(np.digitize(frame[column], edges) - 1, 0, BINS - 1)
    shares = [over_articles(bins == i, frame["article"], share=True) for i in range(BINS)]
    return pd.DataFrame(shares, columns=["share", "low", "high"]).assign(middle=(edges[1:] + edges[:-1]) / 2)


def reading(result: Spread, split: str) -> str:
    """Describe the figures of `model` on a split in words."""
    ratio, inner = result.row("spread ratio", split), result.row("covered by the inner 90%", split)
    others = [name for name in result.forecasts if name != "model"]
    best = min(others, key=lambda name: result.row("energy score", split, name)["value"])
    less = result.row(f"energy score less {best}", split)
    width = side(ratio, "wider than", "narrower than", "not significantly different from", 1.0)
    covered = side(inner, "more than the", "fewer than the", "not significantly different from the", 0.9)
    better = side(less, "higher (worse) than", "lower (better) than", "not significantly different from")
    score = result.row("energy score", split)["value"]
    return (
        f"The samples' spread is {width} the truth's (ratio {row_text(ratio, form='.3f')}). Their inner 90 % contain "
        f"{row_text(inner, form='.1%')} of the truths, {covered} expected 90 %. The energy score, {score:.4f}, is "
        f"{better} that of the best reference, {best} ({row_text(less, form='+.4f')})."
    )


class OneSample(Predictor):
    """One sample of a model that has `samples`, as a predictor, for 5CAT.

    The noise follows from `seed` and the set of the context's vectors, not from their order nor the batch.
    """

    def __init__(self, model: Predictor, seed: int = 0):
        super().__init__(model.dim, model.context_length)
        self.model, self.seed = model, seed

    def raw(self, context: Tensor) -> Tensor:
        drawn = []
        for window, vectors in zip(context, context.detach().float().cpu().numpy(), strict=True):
            key = np.random.SeedSequence([self.seed, *sorted(zlib.crc32(v.tobytes()) for v in vectors)])
            noise = torch.Generator(context.device).manual_seed(int(key.generate_state(1)[0]))
            drawn.append(self.model.samples(window[None], 1, noise)[0, 0])
        return torch.stack(drawn)
