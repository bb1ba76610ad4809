"""The files of a run that hold weights: last/state.pt, last/good.pt and best.safetensors.

They carry the run's `identity`; those of another run are refused.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch

from ..errors import LVMError, format_error
from ..io import limits
from ..io.disk import write_atomic
from ..loop import TrainState
from .folder import INTACT

FEASIBLE = 0.01  # a bound missed by so little in an epoch's mean counts as kept: batches scatter about it
RESTORE = "restore the file, or train anew with `fresh`"
LEARNED = ("model", "optimizer", "plateau", "scale", "controller", "peak")
ALL = (*LEARNED, "best", "short", "rewinds", "stopped", "history", "steps")


def save(path: Path, state: TrainState, identity: str, everything: bool = True) -> None:
    """Write the state; `everything`: with the tables and counters that resuming needs."""
    content = {"identity": identity, "peak": state.peak, **state.learned()}
    if everything:
        content |= {name: getattr(state, name) for name in ("epoch", "best", "short", "rewinds", "stopped")}
        content |= {"history": json.dumps(state.history), "steps": json.dumps(state.steps)}
    write_atomic(path, lambda p: torch.save(content, p), INTACT)


def read(path: Path, identity: str, device: torch.device | str, everything: bool = True) -> dict:
    """What `save` wrote. Raises LVMError for a file that is damaged, or of another run."""
    limits.check_state(path)
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        missing = [key for key in (ALL if everything else LEARNED) if key not in dict(saved)]
    except Exception as e:  # whatever a damaged file makes of torch.load
        raise LVMError(f"{path}: cannot be read ({type(e).__name__}); {RESTORE}") from e
    if missing or saved.get("identity") != identity:
        why = f"has no {missing[0]}" if missing else "is a checkpoint of another run"
        raise LVMError(f"{path}: {why}; {RESTORE}")
    return saved


def load(path: Path, state: TrainState, saved: Mapping, everything: bool = True) -> None:
    """Set `state` to what `read` gave of `path`. Raises LVMError where it does not fit the model."""
    with fitting(path):
        state.load_learned(saved)
        if everything:
            state.best, state.short, state.peak = (float(saved[name]) for name in ("best", "short", "peak"))
            state.rewinds, state.stopped = int(saved["rewinds"]), str(saved["stopped"])
            state.history, state.steps = json.loads(saved["history"]), json.loads(saved["steps"])


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Turn whatever torch and pandas raise inside, for another shape or type, into an LVMError."""
    try:
        yield
    except Exception as e:
        raise LVMError(f"{path}: does not fit this run ({format_error(e)}); {RESTORE}") from e


def score(parameters: Mapping, row: Mapping) -> tuple[float, float]:
    """How good an epoch is by its row of the history, lower is better: by how much it misses the constraint, then what
    `select` names. What keeps the bound in training beats what does not (Deb 2000, §3)."""
    select = parameters["select"]
    missed = max(0.0, row["directional"] - FEASIBLE) if parameters["control"].get("constraint") else 0.0
    return missed, -row["novel_mrr"] if select == "novel_mrr" else row[select]


def best_epoch(parameters: Mapping, epochs: pd.DataFrame) -> int:
    """The epoch whose weights best.safetensors holds, by the table of epochs; 0 where there is none."""
    best, found = (math.inf, math.inf), 0
    for row in epochs.to_dict("records"):
        if score(parameters, row) < best:
            best, found = score(parameters, row), int(row["epoch"])
    return found


def save_best(folder: Path, model: torch.nn.Module, identity: str, epoch: int) -> None:
    weights = {k: t.contiguous() for k, t in model.state_dict().items()}
    # By way of memory: its save_file writes to a name of its own beside, which a kill would leave there.
    # One key: safetensors writes several in any order, and the same run would not give the same bytes.
    origin = {"lvmlib": json.dumps({"identity": identity, "epoch": epoch})}
    write_atomic(folder / "best.safetensors", lambda p: p.write_bytes(safetensors.torch.save(weights, origin)), INTACT)


def load_best(folder: Path, model: torch.nn.Module, record: Mapping, epochs: pd.DataFrame) -> None:
    """Load best.safetensors into `model`. Raises LVMError as `check_best`, or where it does not fit."""
    check_best(folder, record, epochs)
    path = folder / "best.safetensors"
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, RuntimeError, safetensors.SafetensorError) as e:
        raise _not_the_weights(path, e) from e


def check_best(folder: Path, record: Mapping, epochs: pd.DataFrame) -> None:
    """Raise LVMError unless best.safetensors is whole, of this run, and of its best epoch."""
    path = folder / "best.safetensors"
    try:
        with safetensors.safe_open(path, "pt") as file:
            origin = json.loads((file.metadata() or {}).get("lvmlib", "{}"))
        if origin.get("identity") != record["identity"]:
            raise ValueError("it is of another run")
        wanted = best_epoch(record["parameters"], epochs)
        # Killed before the state of its epoch was written, it is ahead: that epoch is trained again, to the same.
        ahead = "finished" not in record and origin["epoch"] > len(epochs)
        if origin["epoch"] != wanted and not ahead:
            raise ValueError(f"it is of epoch {origin['epoch']}; the best one by epochs.csv is {wanted}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as e:
        raise _not_the_weights(path, e) from e


def _not_the_weights(path: Path, e: Exception) -> LVMError:
    why = f"{e}" if type(e) is ValueError else f"{type(e).__name__}: {e}"
    return LVMError(f"{path}: not the weights of this run ({why}); {RESTORE}")
