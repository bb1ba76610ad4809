"""The escape guard, a version's `rewind`: an epoch that goes wrong is undone, and training goes on slower.

If the escape share or the validation novel MRR passes its bound, model, optimizer and controller return to the epoch
with the best novel MRR (last/good.pt), with a lower learning rate and ceiling of λ. The schedule's epochs count on.
"""

from __future__ import annotations

import math
from pathlib import Path

from ..config import Rewind
from ..errors import LVMError
from ..loop import TrainState
from . import checkpoint
from .team import ALONE, Team


class Guard:
    """The escape guard of one run; without `rewind` it does nothing."""

    def __init__(self, rewind: Rewind | None, folder: Path, identity: str, team: Team = ALONE):
        self.settings, self.path, self.identity, self.team = rewind, folder / "last" / "good.pt", identity, team

    def fault(self, state: TrainState, row: dict) -> str:
        """What is wrong with the epoch of `row`; empty if nothing is.

        An untrained model has an escape share of about one half, so that only a rise from below the bound counts.
        """
        r = self.settings
        if r is None:
            return ""
        lowest = min((past["escape"] for past in state.history), default=math.inf)
        if row["escape"] > r.escape >= lowest:
            return f"the escape share is {row['escape']:.3f}, risen above {r.escape:g}"
        if row["novel_mrr"] < (1 - r.fall) * state.peak:
            return f"the novel MRR is {row['novel_mrr']:.4f}, more than {r.fall:.0%} below its best, {state.peak:.4f}"
        return ""

    def keep(self, state: TrainState, row: dict) -> None:
        """Save the state as the one to return to, if no epoch so far had a higher novel MRR."""
        if self.settings and row["novel_mrr"] > state.peak:
            state.peak = row["novel_mrr"]
            # Before state.pt: killed in between, the epoch is trained again, and the file written again as it was.
            if self.team.first:
                checkpoint.save(self.path, state, self.identity, everything=False)

    def rewind(self, state: TrainState, fault: str) -> str:
        """Return to the best epoch, with a cooled learning rate; or say why the run ends, if no rewind is left."""
        if state.rewinds >= self.settings.most:
            return f"{fault}, after {state.rewinds} rewinds"
        where = state.log_scale.device if self.team.size == 1 else "cpu"  # each process has another device
        good = self.team.from_first(lambda: checkpoint.read(self.path, self.identity, where))
        if good.get("peak") != state.peak:
            raise LVMError(f"{self.path}: is of another epoch than the best so far; {checkpoint.RESTORE}")
        rates = [group["lr"] * self.settings.cool for group in state.optimizer.param_groups]
        checkpoint.load(self.path, state, good, everything=False)
        for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        state.rewinds += 1
        return ""
