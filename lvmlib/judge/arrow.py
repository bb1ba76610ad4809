"""Gate F, the arrow of time: is the text easier to continue forwards than backwards?

Axes: S seeds, N targets that both directions share.

One version is trained on the articles as they are and reversed (`direction: backward`); both predict the same chunks.
Forward − backward also contains how an article's beginning differs from its end. Copying the last vector knows no
direction, so its own difference is subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ..baselines import untrained
from ..errors import LVMError
from ..models import Predictor
from ..statistics import article_sums, check_values, few, over_seeds
from ..windows import Windows
from .measure import score

EXACT = 15  # articles; of more, sign patterns are drawn, not enumerated
MEASURES = {"novel MRR": 1, "cosine": 1, "loss": -1}  # the sign that is good


@dataclass(frozen=True, eq=False)
class Arrow:
    """The result of `arrow`.

    `table`: a row for each of MEASURES: forward, backward (means over seeds and targets), copying (copy last's own
    forward − backward), difference (forward − backward − copying) with low and high (95 % over articles and seeds), raw
    low and raw high (with copying included), p (sign flips of whole articles, of the seeds' mean), seeds, articles,
    windows. `differences`: measure → (S, N). `article` (N,).
    """

    table: pd.DataFrame
    differences: dict[str, np.ndarray]
    article: np.ndarray

    @property
    def declared(self) -> str:
        """forward, backward or none: the side of 0 of the interval in novel MRR, with copying subtracted and included.

        Subtracting alone would give a constant, which reads nothing, the opposite of copying's arrow.
        """
        row = self.table.set_index("measure").loc["novel MRR"]
        if min(row["low"], row["raw low"]) > 0:
            return "forward"
        return "backward" if max(row["high"], row["raw high"]) < 0 else "none"

    @property
    def caution(self) -> str:
        """A warning if there are few articles or seeds, else an empty string."""
        return few(self.article, seeds=len(self.differences["novel MRR"]))


def arrow(forward: Sequence[Predictor], backward: Sequence[Predictor], windows: tuple[Windows, Windows]) -> Arrow:
    """Compare forward and backward models over S seeds: `forward[s]` and `backward[s]` are one version's of seed s.

    `windows`: a split cut forwards and backwards; the targets of both are compared. Raises LVMError if the models do
    not pair, or share no target.
    """
    if len(forward) != len(backward) or not len(forward):
        raise LVMError(f"{len(forward)} forward and {len(backward)} backward models; give one of each a seed")
    if windows[0].step != 1 or windows[1].step != -1:
        raise LVMError("windows: give those of a split cut forward, then backward")
    ahead, back = shared(*windows)
    copying = untrained(ahead.store.dim, ahead.context_length)["copy last"]
    runs = [(score(f, ahead), score(b, back)) for f, b in zip(forward, backward, strict=True)]
    return compared(runs, (score(copying, ahead), score(copying, back)), ahead.article)


def compared(runs: Sequence[Sequence[pd.DataFrame]], copied: Sequence[pd.DataFrame], article: np.ndarray) -> Arrow:
    """Return the `Arrow` of `score` frames: `runs` has (forwards, backwards) for each seed, `copied` the same of the
    predictor that is subtracted. All are of the same targets, with articles `article` (N,)."""
    rows, differences = [], {}
    for name in MEASURES:
        own = (copied[0][name] - copied[1][name]).to_numpy()  # (N,)
        differences[name] = difference = np.stack([f[name] - b[name] - own for f, b in runs])  # (S, N)
        value, low, high = over_seeds(difference, article)
        _, raw_low, raw_high = over_seeds(difference + own, article)
        row = {"measure": name, "forward": float(np.mean([f[name].mean() for f, _ in runs]))}
        row |= {"backward": float(np.mean([b[name].mean() for _, b in runs])), "copying": float(own.mean())}
        row |= {"difference": value, "low": low, "high": high, "raw low": raw_low, "raw high": raw_high}
        row |= {"p": sign_flip(difference.mean(0), article), "seeds": len(runs)}
        rows.append(row | {"articles": len(np.unique(article)), "windows": len(article)})
    return Arrow(pd.DataFrame(rows), differences, article)


def sign_flip(values, articles, permutations: int = 2000, seed: int = 0) -> float:
    """Return the two-sided p of "each article's sum of `values` (N,) is as likely with the other sign".

    The share of sign patterns whose |Σ ±sₐ| is at least the observed one: of all 2^A patterns up to A = 15, else of
    `permutations` random ones and the observed one. NaN values are left out; NaN for no window.
    """
    values, articles = check_values(values, articles, 1)
    sums = article_sums(values, articles)[0][0]  # (A,)
    if not len(sums):
        return float("nan")
    extra = int(len(sums) > EXACT)
    if extra:
        patterns = np.random.default_rng(seed).integers(0, 2, (permutations, len(sums)))
    else:
        patterns = np.arange(2 ** (len(sums) - 1))[:, None] >> np.arange(len(sums)) & 1  # the last sign fixed: halves
    flipped = np.abs((1 - 2 * patterns) @ sums)
    reached = flipped >= abs(sums.sum()) - 1e-9 * np.abs(sums).sum()
    return float((reached.sum() + extra) / (len(reached) + extra))


def shared(forward: Windows, backward: Windows) -> tuple[Windows, Windows]:
    """The windows of both directions that have the same target chunk, in the same order.

    Raises LVMError if there are none, or if the stores differ.
    """
    if forward.store.fingerprint != backward.store.fingerprint:
        raise LVMError(f"windows of {forward.store.name} and {backward.store.name} share no target; use one store")
    common, ours, theirs = np.intersect1d(forward.target, backward.target, return_indices=True)
    if not len(common):
        raise LVMError(
            f"{forward.store.name}, split {forward.split}: no chunk is a target in both directions; that needs an "
            f"article of {2 * (forward.context_length + forward.horizon) - 1} consecutive chunks"
        )
    return replace(forward, start=forward.start[ours]), replace(backward, start=backward.start[theirs])
