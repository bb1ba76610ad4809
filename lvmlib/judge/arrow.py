"""Gate F, the arrow of time: is the text easier to continue forwards than backwards?

Axes: S seeds, N targets that both directions share.

The same version is trained on the articles as they are and on the articles reversed (`direction: backward`), and both
are asked for the very same chunks. Forward − backward is a property of the text only if the articles' two ends are:
what copying the last vector gains by the direction is taken off, since it knows no direction but sees how articles
begin and end. Not all of it goes: where chunks grow noisier along every article, averaging gains more from the cleaner
context than copying does, and with many articles that small rest is declared, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..baselines import untrained
from ..errors import LVMError
from ..models import Predictor
from ..statistics import few, over_seeds, sign_flip
from ..windows import Windows, shared
from .fivecat import score

MEASURES = {"novel MRR": 1, "cosine": 1, "loss": -1}  # the sign that is good


@dataclass(frozen=True, eq=False)
class Arrow:
    """What `arrow` found.

    `table`: a row for each measure (novel MRR, cosine, loss): forward, backward (means over seeds and targets), copying
    (copy last's own forward − backward), difference (forward − backward − copying) with low and high (95 % over
    articles and seeds), raw low and raw high (the interval with copying left in), p (sign flips of whole articles, of
    the seeds' mean), seeds, articles, windows. `differences`: measure → (S, N). `article` (N,).
    """

    table: pd.DataFrame
    differences: dict[str, np.ndarray]
    article: np.ndarray

    @property
    def declared(self) -> str:
        """forward, backward or none: the side of 0 on which the interval of the novel MRR's difference lies whole, with
        copying taken off and with it left in. (Taking it off alone would give a constant, which reads nothing, the
        opposite of copying's arrow.)"""
        row = self.table.set_index("measure").loc["novel MRR"]
        if min(row["low"], row["raw low"]) > 0:
            return "forward"
        return "backward" if max(row["high"], row["raw high"]) < 0 else "none"

    @property
    def caution(self) -> str:
        """What makes the interval less than it seems: few articles or seeds; empty if nothing does."""
        return few(self.article, seeds=len(self.differences["novel MRR"]))


def arrow(
    forward: Sequence[Predictor],
    backward: Sequence[Predictor],
    windows: tuple[Windows, Windows],
    compare: Predictor | None = None,
) -> Arrow:
    """Forward − backward over S seeds: `forward[s]` and `backward[s]` are one version's two models of seed s.

    `windows`: a split cut forwards and backwards; the targets of both are compared. `compare`: what is taken off, by
    default copy last. Raises LVMError where the models do not pair, or the windows share no target.
    """
    if len(forward) != len(backward) or not len(forward):
        raise LVMError(f"{len(forward)} forward and {len(backward)} backward models; give one of each for every seed")
    if windows[0].step != 1 or windows[1].step != -1:
        raise LVMError("windows: needed are those of a split cut forward, and then backward")
    ahead, back = shared(*windows)
    simple = compare or untrained(ahead.store.dim, ahead.context_length)["copy last"]
    runs = [(figures(f, ahead), figures(b, back)) for f, b in zip(forward, backward, strict=True)]
    return compared(runs, (figures(simple, ahead), figures(simple, back)), ahead.article)


def compared(runs: Sequence[Sequence[Mapping]], copied: Sequence[Mapping], article: np.ndarray) -> Arrow:
    """`arrow` from `figures` by window: `runs` has (forwards, backwards) for each seed, `copied` the same of what is
    taken off; all on the same targets, whose articles are `article` (N,)."""
    rows, differences = [], {}
    for name in MEASURES:
        taken = copied[0][name] - copied[1][name]  # (N,)
        differences[name] = difference = np.stack([f[name] - b[name] - taken for f, b in runs])  # (S, N)
        value, low, high = over_seeds(difference, article)
        _, raw_low, raw_high = over_seeds(difference + taken, article)
        rows.append(
            {
                "measure": name,
                "forward": float(np.mean([f[name].mean() for f, _ in runs])),
                "backward": float(np.mean([b[name].mean() for _, b in runs])),
                "copying": float(taken.mean()),
                "difference": value,
                "low": low,
                "high": high,
                "raw low": raw_low,
                "raw high": raw_high,
                "p": sign_flip(difference.mean(0), article),
                "seeds": len(runs),
                "articles": len(np.unique(article)),
                "windows": len(article),
            }
        )
    return Arrow(pd.DataFrame(rows), differences, article)


def figures(model: Predictor, windows: Windows) -> Mapping[str, np.ndarray]:
    """What `compared` takes of one predictor on `windows`: each of MEASURES by window, (N,)."""
    frame = score(model, windows)
    return {
        "novel MRR": 1 / frame["novel rank"].to_numpy(),
        "cosine": frame["cosine"].to_numpy(),
        "loss": frame["loss"].to_numpy(),
    }
