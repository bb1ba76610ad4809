"""The files of a run that hold weights, and what of its folder a run is resumed from.

last/state.pt, last/good.pt and best.safetensors carry the run's `identity`; those of another run are refused.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch

from .. import losses
from ..config import SELECT, Version
from ..errors import LVMError, format_error
from ..io import limits
from ..io.disk import write_atomic
from ..loop import TrainState
from . import folder
from .folder import INTACT

FEASIBLE = 0.01  # a bound missed by so little in an epoch's mean counts as kept: batches scatter about it
RESTORE = "restore the file, or train anew with `fresh`"


def save(path: Path, state: TrainState, identity: str, everything: bool = True) -> None:
    """Write the state; `everything`: with the tables and counters that resuming needs."""
    content = {"identity": identity, "peak": state.peak, **state.learned()}
    if everything:
        content |= {name: getattr(state, name) for name in ("epoch", "best", "short", "rewinds", "stopped")}
        content |= {"history": json.dumps(state.history), "steps": json.dumps(state.steps)}
    write_atomic(path, lambda p: torch.save(content, p), INTACT)


def read(path: Path, identity: str, device: torch.device | str) -> dict:
    """What `save` wrote. Raises LVMError for a file that is damaged, or of another run."""
    limits.check_state(path)
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # whatever a damaged file makes of torch.load
        raise LVMError(f"{path}: cannot be read ({type(e).__name__}); {RESTORE}") from e
    with fitting(path):
        if saved["identity"] != identity:
            raise ValueError("it is of another run")
    return saved


def load(path: Path, state: TrainState, saved: Mapping, everything: bool = True) -> None:
    """Set `state` to what `read` gave of `path`. Raises LVMError if it does not fit the model."""
    with fitting(path):
        state.load_learned(saved)
        if everything:
            state.best, state.short, state.peak = (float(saved[name]) for name in ("best", "short", "peak"))
            state.rewinds, state.stopped = int(saved["rewinds"]), str(saved["stopped"])
            state.history, state.steps = json.loads(saved["history"]), json.loads(saved["steps"])


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Turn any error inside, for another shape, type or run, into an LVMError."""
    try:
        yield
    except Exception as e:
        why = f"{e}" if type(e) is ValueError else format_error(e)
        raise LVMError(f"{path}: does not fit this run ({why}); {RESTORE}") from e


def is_finished(version: Version, record: dict, history: pd.DataFrame) -> bool:
    return len(history) >= version.epochs or "stopped" in record


def read_folder(
    place: Path, version: Version, own: dict, device: torch.device | str
) -> tuple[dict, pd.DataFrame, pd.DataFrame, dict | None]:
    """A folder's record, history, steps, and the state that resuming needs: None for a new run or a finished one.

    Raises LVMError if it holds another run than that of the record `own`.
    """
    columns = folder.columns(losses.names(version.losses))
    history, steps = (pd.DataFrame(columns=names) for names in columns)
    if not (place / "run.yaml").exists():
        return copy.deepcopy(own), history, steps, None
    record, *tables = folder.open_run(place)
    if differing := folder.differences(own, record):
        raise LVMError(
            f"{place}: holds a run with other parameters ({'; '.join(differing)}). "
            "Name this run differently with run_name, or set `fresh` to rename the old folder"
        )
    if "finished" in record and is_finished(version, record, tables[0]):
        return record, *tables, None
    # A kill between writing state.pt and the tables leaves the tables an epoch behind: only the state counts.
    record = {k: x for k, x in record.items() if k not in ("finished", "stopped", "alarms")}
    path = place / "last" / "state.pt"
    if not path.exists():
        return record, history, steps, None
    state = read(path, record.get("identity", ""), device)
    with fitting(path):
        tables = (json.loads(state[name]) for name in ("history", "steps"))
        history, steps = (pd.DataFrame(rows, columns=names) for rows, names in zip(tables, columns, strict=True))
        record |= {"stopped": state["stopped"]} if state["stopped"] else {}
    return record, history, steps, state


def score(parameters: Mapping, row: Mapping) -> tuple[float, float]:
    """How good an epoch is by its row of the history, lower is better: by how much it misses the constraint, then what
    `select` names. An epoch that meets the bound in training beats one that does not (Deb 2000, §3)."""
    figure = row[parameters["select"]]
    missed = max(0.0, row["directional"] - FEASIBLE) if parameters["control"].get("constraint") else 0.0
    return missed, -figure if SELECT[parameters["select"]] else figure


def best_epoch(parameters: Mapping, epochs: pd.DataFrame) -> int:
    """The epoch whose weights best.safetensors holds, by the table of epochs; 0 if there is none."""
    rows = epochs.to_dict("records")
    return int(min(rows, key=lambda row: score(parameters, row))["epoch"]) if rows else 0


def save_best(place: Path, model: torch.nn.Module, identity: str, epoch: int) -> None:
    weights = {k: t.contiguous() for k, t in model.state_dict().items()}
    # Not by its save_file, which writes to a name of its own beside; a kill would leave that file there.
    # One key: safetensors writes several in any order, and the same run would not give the same bytes.
    origin = {"lvmlib": json.dumps({"identity": identity, "epoch": epoch})}
    write_atomic(place / "best.safetensors", lambda p: p.write_bytes(safetensors.torch.save(weights, origin)), INTACT)


def load_best(place: Path, model: torch.nn.Module, record: Mapping, epochs: pd.DataFrame) -> None:
    """Load best.safetensors into `model`. Raises LVMError as `check_best`, or if it does not fit."""
    check_best(place, record, epochs)
    path = place / "best.safetensors"
    with fitting(path):
        model.load_state_dict(safetensors.torch.load_file(path))


def check_best(place: Path, record: Mapping, epochs: pd.DataFrame) -> None:
    """Raise LVMError unless best.safetensors is undamaged, of this run, and of its best epoch."""
    path = place / "best.safetensors"
    with fitting(path):
        with safetensors.safe_open(path, "pt") as file:
            origin = json.loads(file.metadata()["lvmlib"])
        if origin.get("identity") != record["identity"]:
            raise ValueError("it is of another run")
        wanted = best_epoch(record["parameters"], epochs)
        # A kill before the state of its epoch was written leaves it ahead: that epoch is trained again, to the same.
        ahead = "finished" not in record and origin["epoch"] > len(epochs)
        if origin["epoch"] != wanted and not ahead:
            raise ValueError(f"it is of epoch {origin['epoch']}; the best one by epochs.csv is {wanted}")
