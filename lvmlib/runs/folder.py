"""A run's folder: where it is, its record (run.yaml) and tables, and its lock.

`run` describes the files. Two records are of the same run if `differences` finds none.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from .. import losses
from ..config import Version, data_name, flat
from ..errors import LVMError
from ..io import limits
from ..io.disk import lock, write_atomic
from ..io.paths import LONGEST, outputs
from ..io.stamp import commit
from ..windows import Dataset
from .alarms import Alarm
from .validation import SPREAD

INTACT = "the last checkpoint is intact"
# A difference in these makes no other run. The precision that was used does.
NOT_COMPARED = ("about", "expected", "published", "device", "precision")
LARGEST_TABLE = 1 << 30  # bytes: a row a step of a long run
WAIT = 10.0  # seconds: a notebook's kernel lives on for a moment when its parent is killed


def columns(terms: Iterable[str] = losses.TERMS) -> tuple[list[str], list[str]]:
    """The columns of epochs.csv and steps.csv for a version with these loss terms."""
    terms = list(terms)
    ahead = ["train_loss", "val_loss", "val_unit_loss", *terms]
    validation = ["val_cos", "margin", "recall_at_5", "novel_mrr", "val_energy", *SPREAD]
    control, watched = ["rho", "rho_target", "rho_cap"], ["pos", "neg", "gap", "ratio", "escape"]
    bounds = ["lambda_eff", "at_lambda_min", "at_lambda_max"]
    pulls = [*(f"pull_{name}" for name in terms), "rho_gradient", "angle"]
    end = ["skips", "temperature", "rewound", "learning_rate", "seconds"]
    epochs = ["epoch", *ahead, *validation, *control, *bounds, *watched, *pulls, *end]
    steps = ["epoch", "step", "loss", *terms, "lambda_eff", *control, "margin_target", "gate", *watched, *pulls]
    steps += ["skip", "gradient_norm"]
    for table in (epochs, steps):
        if twice := [name for name in table if table.count(name) > 1]:
            raise LVMError(f"losses.extra.{twice[0]}: the tables have a column of this name; rename the loss term")
    return epochs, steps


def run_folder(version: Version, run_name: str | None = None) -> Path:
    """Where a run lives: outputs/<dataset>/<version>/seed<k>, with -<model> for another model than the transformer,
    and with -backward for a run that reads backwards.

    Fast runs have a tree of their own, outputs/fast/. Raises LVMError for a run_name that is not a plain name.
    """
    name = f"seed{version.seed}" + ("" if version.model == "transformer" else f"-{version.model}")
    name += "" if version.direction == "forward" else f"-{version.direction}"
    if run_name is not None:
        name = str(run_name) if isinstance(run_name, int) else run_name  # papermill makes numbers of digits
    plain = isinstance(name, str) and name and all(c.isalnum() or c in "-_." for c in name)
    if not plain or name.startswith(".") or len(name.encode()) > LONGEST:
        raise LVMError(
            f"run_name {str(name)[:LONGEST]!r}: use letters, digits, '-', '_' and '.' (not first), "
            f"at most {LONGEST} bytes"
        )
    return outputs() / ("fast" if version.fast else "") / data_name(version.data) / version.name / name


def open_run(folder: str | os.PathLike) -> tuple[dict, pd.DataFrame, pd.DataFrame]:
    """run.yaml, epochs.csv and steps.csv of a run's folder. Raises LVMError if one is missing or damaged."""
    folder = Path(folder)
    try:
        record = limits.read_yaml(folder / "run.yaml")
        _check_record(record)
        epochs, steps = columns([*losses.TERMS, *(record["parameters"].get("losses", {}).get("extra") or ())])
        return record, _read_table(folder / "epochs.csv", epochs), _read_table(folder / "steps.csv", steps)
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise LVMError(f"{folder}: cannot be read as a run ({e}); train it, or restore the file") from e


def _check_record(record: Any) -> None:
    """Raise ValueError unless the entries of run.yaml are of the kind that is written there."""
    for key in ("parameters", "dataset", "computed", "software"):  # `software` is the last that every run has
        if not isinstance(record, dict) or not isinstance(record.get(key), dict):
            raise ValueError(f"run.yaml has no group of keys {key}, or ends too early")
    finished, windows = record.get("finished", {}), record["dataset"].get("windows", {})
    processes = record["computed"].get("processes", {})
    fitting = {
        "finished": all(map(_is_number, finished.values())),
        "dataset.windows": all(map(_is_number, windows.values())),
        "computed.processes": all(type(epoch) is int and _is_number(count) for epoch, count in processes.items()),
        "stopped": isinstance(record.get("stopped", ""), str),
        "alarms": all(list(map(type, Alarm(**a))) == [int, int, str, str, str] for a in record.get("alarms") or ()),
    }
    if wrong := [key for key, fits in fitting.items() if not fits]:
        raise ValueError(f"run.yaml has a value of another type in {wrong[0]}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """A table of numbers, to the last bit as it was written (pandas' own parser may miss that one)."""
    raw = limits.read_bytes(path, LARGEST_TABLE)
    if not raw.endswith(b"\n"):
        raise ValueError(f"{path.name} is truncated")
    frame = pd.read_csv(io.BytesIO(raw), dtype=str, keep_default_na=False)
    if set(frame.columns) != set(columns):
        raise ValueError(f"{path.name} does not have the columns {', '.join(columns)}")
    frame = frame[columns].map(lambda cell: float(cell) if cell else math.nan)
    return frame.astype({c: int for c in ("epoch", "step", "skip", "skips") if c in frame})


def new_record(version: Version, data: Dataset, device: torch.device, precision: str) -> dict:
    """The content of run.yaml when a run begins."""
    record = {
        "parameters": version.to_dict(),
        "dataset": dataset_record(data),
        "computed": {"device": str(device), "precision": precision, "threads": torch.get_num_threads()},
        "software": {
            "python": platform.python_version(),
            "commit": commit(),
            **{p: metadata.version(p) for p in ("torch", "numpy", "pandas", "safetensors")},
        },
    }
    # A hash of what `differences` compares. Checkpoints carry it, so that those of another run are refused.
    text = json.dumps(_compared(record), sort_keys=True, default=str)
    return {**record, "identity": hashlib.sha256(text.encode()).hexdigest()[:16]}


def dataset_record(data: Dataset) -> dict:
    """The entry `dataset` of run.yaml."""
    windows = {w.split: len(w) for w in (data.train, data.val, data.ood)}
    return {"name": data.store.name, "fingerprint": data.store.fingerprint, "windows": windows}


def record_resumed(record: dict, software: dict, processes: int, done: int) -> None:
    """Enter in `record` what goes on after `done` epochs: other `software`, another number of processes.

    `continued`: a list of epochs with what is new from there on. `computed.processes`: from which epoch on how many
    processes; missing if it was always one.
    """
    before = record["software"]
    for entry in record.get("continued", []):
        before = before | entry
    if done and (new := {k: x for k, x in software.items() if before.get(k) != x}):
        record.setdefault("continued", []).append({"epoch": done + 1, **new})
    counts = record["computed"].pop("processes", {1: 1})
    if not done or list(counts.values())[-1] != processes:
        counts = {**(counts if done else {}), done + 1: processes}
    if counts != {1: 1}:
        record["computed"]["processes"] = counts


def differences(ours: dict, theirs: dict) -> list[str]:
    """How two records differ in what makes them different runs, a text for each key."""
    ours, theirs = _compared(ours), _compared(theirs)
    differing = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
    return [f"{k}: {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in differing]


def _compared(record: dict) -> dict:
    values = {
        **flat(record["parameters"]),
        **flat(record.get("dataset", {}), "dataset."),
        "computed.precision": record.get("computed", {}).get("precision"),
    }
    return {k: value for k, value in values.items() if not k.startswith(NOT_COMPARED)}


def write_tables(folder: Path, record: dict, history: pd.DataFrame, steps: pd.DataFrame) -> None:
    """Write epochs.csv, steps.csv and last run.yaml."""
    write_atomic(folder / "epochs.csv", lambda p: history.to_csv(p, index=False), INTACT)
    write_atomic(folder / "steps.csv", lambda p: steps.to_csv(p, index=False), INTACT)
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
    write_atomic(folder / "run.yaml", lambda p: p.write_text(text, encoding="utf-8"), INTACT)


def lock_run(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold a run's folder for this process alone. Raises LVMError that names the process holding it."""
    advice = "wait for it, stop it, or name this run differently with run_name"
    path = folder.with_name(folder.name + ".lock")
    return lock(path, lambda holder: f"{folder} is being trained by {holder}; {advice}", WAIT)
