"""Samples against the truth: are the chunks that might come next spread as the one that came is?

Axes: N windows, B batch, S samples, T context length, D vector dimension.

A model with `samples` foretells a distribution. Three questions to it, and to ensembles that need no training, on the
same windows:

**Energy score** (`losses.energy`), strictly proper: the one figure for spread and place together. It is fair only to
independent draws. The context's T vectors, each taken once, differ by choice, and would score as if the article's whole
distribution were known; as a forecast they are drawn with replacement.

**Spread ratio**, E‖x − x'‖ / E‖x − y‖: 1 where the truth is one more draw, below it where samples are too narrow (or
beside the point), above it where they are too wide.

**Ranks** of the truth among the samples, flat where it is one more of them (Gneiting et al., TEST 17, 2008, on ranks of
vectors). By *distance*: how many members have a smaller mean distance from all others; high ranks prevail where samples
are too narrow, or in the wrong place, low ranks where they are too wide, both where they are all equally far and truths
are not. By *direction*: the place among them along a random direction of the window's own; a U where they are too
narrow, a hill where they are too wide. A rank r of 1 … S+1 is shown as u = (r − V) / (S + 1) with V uniform in [0, 1):
equal members share their places, and u is uniform for any S where truth and samples are exchangeable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ..baselines import Weighted, fit_weights
from ..errors import LVMError
from ..losses import distances
from ..models import Predictor, device_of
from ..statistics import effective_articles, over_articles, paired
from ..windows import Windows, on_device

SAMPLES = 39  # with the truth 40 places in the order
TIE = 1e-6  # distances nearer than this are equal
BINS = 10  # of a rank histogram
COVERED = (0.5, 0.9)


class Ensemble(Predictor):
    """Samples without training: a point forecast, and to it a random row of `pool` (M, D) for each sample.

    With residuals for a pool: a dressed forecast (Roulston & Smith, Tellus 55A, 2003); with one row of zeros, the
    point itself. `unit`: the samples are made unit vectors.
    """

    def __init__(self, point: Predictor, pool: Tensor, unit: bool = False):
        super().__init__(point.dim, point.context_length)
        self.point, self.unit = point, unit
        self.register_buffer("pool", pool)

    def samples(self, context: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(S, B, D)."""
        shape = count, len(context)
        rows = torch.randint(len(self.pool), shape, generator=generator, device=context.device)
        drawn = self.point.raw(context) + self.pool[rows]
        return F.normalize(drawn, dim=-1) if self.unit else drawn

    def raw(self, context: Tensor) -> Tensor:
        return self.point.raw(context) + self.pool.mean(0)


class FromContext(Predictor):
    """Samples are context vectors, drawn with replacement."""

    def samples(self, context: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(S, B, D)."""
        size, length = context.shape[:2]
        place = torch.randint(length, (count, size), generator=generator, device=context.device)
        return context[torch.arange(size, device=context.device), place]

    def raw(self, context: Tensor) -> Tensor:
        return context.mean(1)


def references(train: Windows) -> dict[str, Predictor]:
    """What samples are compared with, fitted or formed without training: the weighted mean as a point; random training
    targets (climatology); random vectors of the context; the weighted mean with its own training residuals."""
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
    """A row a window: article, target (row), energy, off (mean ‖x − y‖), apart (mean ‖x − x'‖), distance and direction
    (the truth's rank among the samples as u in (0, 1), see the module's head).

    Raises LVMError for a model without samples. The same `seed` and `batch_size` give the same noise.
    """
    if not hasattr(model, "samples"):
        raise LVMError(f"{type(model).__name__} has no samples; train a version whose model draws some (energy)")
    training, device = model.training, device_of(model)
    model.eval()
    vectors, random = on_device(windows.store, device), np.random.default_rng(seed)
    noise = torch.Generator(device).manual_seed(seed)
    parts = []
    for first in range(0, len(windows), batch_size):
        index = np.arange(first, min(first + batch_size, len(windows)))
        context, target = windows.batch(index, vectors)
        drawn = model.samples(context, count, noise)  # (S, B, D)
        off, apart = distances(drawn, target)
        members = torch.cat([target[None], drawn])
        towards = torch.from_numpy(random.standard_normal((len(index), drawn.shape[-1]))).float().to(device)
        columns = {"energy": off - apart / 2, "off": off, "apart": apart}
        for name, order in (("distance", remoteness(members)), ("direction", (members * towards).sum(-1))):
            columns[name] = place(order.cpu().double().numpy(), random)
        parts.append(pd.DataFrame({k: np.asarray(torch.as_tensor(c).cpu(), float) for k, c in columns.items()}))
    model.train(training)
    return pd.concat(parts, ignore_index=True).assign(article=windows.article, target=windows.target)


def remoteness(members: Tensor) -> Tensor:
    """(M, B) mean distance of each of `members` (M, B, D) from the others."""
    x = members.transpose(0, 1).contiguous()
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum(2).T / (len(members) - 1)


def place(order: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(B,) rank u of the first of `order` (M, B) among all: (number below + V · (number equal, itself too)) / M."""
    below, equal = order < order[0] - TIE, np.abs(order - order[0]) <= TIE
    return (below.sum(0) + random.random(order.shape[1]) * equal.sum(0)) / len(order)


@dataclass(frozen=True, eq=False)
class Spread:
    """What `spread` found. `table`: split, forecast, measure, value, low, high (95 % over articles), chance (what truth
    among its like would have), windows, articles. `frames`: what `measure` gave, by (split, forecast)."""

    table: pd.DataFrame
    frames: dict[tuple[str, str], pd.DataFrame]

    def row(self, measure: str, split: str = "val", forecast: str = "model") -> pd.Series:
        """One row of the table. Raises LVMError for what it does not hold."""
        t = self.table
        rows = t[(t["measure"] == measure) & (t["split"] == split) & (t["forecast"] == forecast)]
        if not len(rows):
            raise LVMError(f"spread holds no {measure!r} of {forecast!r} on split {split!r}")
        return rows.iloc[0]

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(split for split, _ in self.frames))

    @property
    def forecasts(self) -> list[str]:
        return list(dict.fromkeys(name for _, name in self.frames))


def spread(
    model: Predictor,
    splits: Mapping[str, Windows],
    compare: Mapping[str, Predictor],
    count: int = SAMPLES,
    seed: int = 0,
) -> Spread:
    """The spread of `model` and of every ensemble in `compare` (such as `references`) on the windows of each split."""
    device = device_of(model)
    forecasts = {"model": model, **{name: other.to(device) for name, other in compare.items()}}
    frames = {(s, n): measure(f, w, count, seed) for n, f in forecasts.items() for s, w in splits.items()}
    rows = [{"split": s, "forecast": n, **row} for (s, n), frame in frames.items() for row in summarise(frame)]
    for (split, name), frame in frames.items():
        if name != "model":
            less = paired(frames[split, "model"]["energy"], frame["energy"], frame["article"])
            rows.append({"split": split, "forecast": "model", **_row(f"energy score less {name}", less, frame, 0.0)})
    return Spread(pd.DataFrame(rows), frames)


def summarise(frame: pd.DataFrame) -> list[dict]:
    """Rows of one `measure` frame: measure, value, low, high over articles, chance, windows, articles.

    The spread ratio is one of means, θ = a / b; its interval is that of the mean of θ + (aᵢ − θ bᵢ) / b (delta method).
    Coverage: the share of truths within the inner part of the samples, by distance. KS: the largest gap between u and
    the share of ranks up to u; its interval is that of the gap at that u, so it is for gaps that are clearly there. Its
    `chance`: √(π/2) · ln 2 / √n, the mean of Kolmogorov's distribution, with the effective articles for n; what windows
    of one article have in common counts once, so it is about the most that calibrated
    ranks have.
    """
    article = frame["article"].to_numpy()
    off, apart = frame["off"].to_numpy(), frame["apart"].to_numpy()
    ratio = apart.mean() / off.mean()
    rows = [
        _row("energy score", over_articles(frame["energy"], article), frame),
        _row("spread ratio", over_articles(ratio + (apart - ratio * off) / off.mean(), article), frame, 1.0),
    ]
    for part in COVERED:
        inside = over_articles(frame["distance"] <= part, article, share=True)
        rows.append(_row(f"covered by the inner {part:.0%}", inside, frame, part))
    chance = np.sqrt(np.pi / 2) * np.log(2) / np.sqrt(max(effective_articles(article), 1.0))
    for name in ("distance", "direction"):
        rows.append(_row(f"KS of ranks by {name}", kolmogorov(frame[name], article), frame, min(chance, 1.0)))
    return rows


def kolmogorov(u, article) -> tuple[float, float, float]:
    """Largest gap |share at or below u − u| of ranks `u` (N,) in (0, 1), and the interval of the gap at that place."""
    u = np.asarray(u, float)
    at = np.sort(u)
    high, low = np.arange(1, len(at) + 1) / len(at) - at, at - np.arange(len(at)) / len(at)
    sign, where = (1, at[high.argmax()]) if high.max() >= low.max() else (-1, np.nextafter(at[low.argmax()], 0))
    return over_articles(sign * ((u <= where) - where), article)


def _row(name: str, found: tuple, frame: pd.DataFrame, chance: float = float("nan")) -> dict:
    keep = dict(zip(("value", "low", "high"), found, strict=True))
    return {"measure": name, **keep, "chance": chance, "windows": len(frame), "articles": frame["article"].nunique()}


def histogram(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """The ranks of `column` in BINS equal bins: middle, share, low, high (95 % over articles)."""
    edges = np.linspace(0, 1, BINS + 1)
    bins = np.clip(np.digitize(frame[column], edges) - 1, 0, BINS - 1)
    shares = [over_articles(bins == i, frame["article"], share=True) for i in range(BINS)]
    middle = (edges[1:] + edges[:-1]) / 2
    return pd.DataFrame(
        [(m, *s) for m, s in zip(middle, shares, strict=True)], columns=["middle", "share", "low", "high"]
    )


def reading(found: Spread, split: str) -> str:
    """What the numbers say of `model` on a split, in words."""

    def of(measure: str, bound: float, low: str, high: str, open: str) -> tuple[str, pd.Series]:
        row = found.row(measure, split)
        return low if row["high"] < bound else high if row["low"] > bound else open, row

    width, ratio = of("spread ratio", 1.0, "narrower than", "wider than", "not told from")
    kept, inner = of(
        "covered by the inner 90%", 0.9, "fewer than", "more than", "no fewer nor more, beyond doubt, than"
    )
    others = [name for name in found.forecasts if name != "model"]
    best = min(others, key=lambda name: found.row("energy score", split, name)["value"])
    less = f"energy score less {best}"
    answer, less = of(less, 0.0, "lower (better) than", "higher (worse) than", "not told from")
    score = found.row("energy score", split)["value"]
    return (
        f"The samples' spread is {width} the truth's (ratio {ratio['value']:.3f} [{ratio['low']:.3f}, "
        f"{ratio['high']:.3f}]); their inner 90 % hold {inner['value']:.1%} [{inner['low']:.1%}, {inner['high']:.1%}] "
        f"of the truths, {kept} they should. The energy score, {score:.4f}, is {answer} that of the best reference, "
        f"{best} ({less['value']:+.4f} [{less['low']:+.4f}, {less['high']:+.4f}])."
    )
