"""A run's folder, read: where it lies, its record and tables, its best epoch, and who holds it.

What stands in it, and who writes it: `training`. Whether two records are of the same run is told by `differences`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import safetensors

from ..config import LONGEST, Version, data_name, flat
from ..errors import LVMError
from ..io import limits as untrusted
from ..io.disk import hold
from ..io.paths import outputs
from ..windows import Dataset
from . import alarms

PULLS = (
    "pull_mse",
    "pull_directional",
    "pull_floor",
    "pull_norm",
    "pull_orthogonality",
    "pull_listwise",
    "pull_energy",
)
EPOCH_COLUMNS = (
    "epoch",
    "train_loss",
    "val_loss",
    "mse",
    "directional",
    "floor",
    "norm",
    "orthogonality",
    "listwise",
    "energy",
    "val_cos",
    "margin",
    "recall_at_5",
    "novel_mrr",
    "val_energy",
    *alarms.FACTS,
    "rho",
    "rho_target",
    "rho_cap",
    "lambda_eff",
    "at_lambda_min",
    "at_lambda_max",
    "pos",
    "neg",
    "gap",
    "ratio",
    "escape",
    *PULLS,
    "rho_gradient",
    "angle",
    "skips",
    "temperature",
    "rewound",
    "learning_rate",
    "seconds",
)
STEP_COLUMNS = (
    "epoch",
    "step",
    "loss",
    "mse",
    "directional",
    "floor",
    "norm",
    "orthogonality",
    "listwise",
    "energy",
    "lambda_eff",
    "rho",
    "rho_target",
    "rho_cap",
    "margin_target",
    "gate",
    "pos",
    "neg",
    "gap",
    "ratio",
    "escape",
    *PULLS,
    "rho_gradient",
    "angle",
    "skip",
    "gradient_norm",
)
# What the first runs did not log, or did not have as a parameter, with the value that they ran with.
LATER = ("escape", *PULLS, "rho_gradient", "angle", "listwise", "novel_mrr", "temperature", "rewound")
LATER += ("energy", "val_energy", *alarms.FACTS, "at_lambda_min", "at_lambda_max")
EARLIER = {"direction": "forward", "select": "val_loss", "optimizer.decay": "all", "losses.mean_square": 1.0}
EARLIER |= {"losses.listwise.weight": 0.0, "losses.listwise.temperature": 0.1, "losses.listwise.candidates": 128}
EARLIER |= {"losses.listwise.elsewhere": 0, "optimizer.schedule": "plateau"}
EARLIER |= {"control.smoothing": 0.99, "control.measure": "value", "control.kp": 0.0, "control.ki": 0.1}
EARLIER |= {"control.constraint": None, "rewind": None}
EARLIER |= {"losses.energy.weight": 0.0, "losses.energy.samples": 8, "trouble": "go_on"}
# Words, figures to compare with, and where it is computed make no other run. The precision that was used does.
NOT_COMPARED = ("about", "expected", "published", "device", "precision")
LARGEST_TABLE = 1 << 30  # bytes: a row a step of a long run
WAIT = 10.0  # seconds: a notebook's kernel lives on for a moment when its parent is killed
FEASIBLE = 0.01  # a bound missed by so little in an epoch's mean counts as kept: batches scatter about it


def run_folder(version: Version, run_name: str | None = None) -> Path:
    """Where a run lives: outputs/<dataset>/<version>/seed<k>, for another model than the transformer seed<k>-<model>;
    read backwards, -backward follows.

    Fast runs have a tree of their own, outputs/fast/. Raises LVMError for a run_name that is not a plain name.
    """
    name = f"seed{version.seed}" + ("" if version.model == "transformer" else f"-{version.model}")
    name += "" if version.direction == "forward" else f"-{version.direction}"
    if run_name is not None:
        name = str(run_name) if isinstance(run_name, int) else run_name  # papermill makes numbers of digits
    if (
        not isinstance(name, str)
        or not name
        or not all(c.isalnum() or c in "-_." for c in name)
        or name.startswith(".")
        or len(name.encode()) > LONGEST
    ):
        raise LVMError(
            f"run_name {str(name)[:LONGEST]!r}: use letters, digits, '-', '_' and '.', begin with none of the last, "
            f"and use at most {LONGEST} bytes"
        )
    return outputs() / ("fast" if version.fast else "") / data_name(version.data) / version.name / name


def open_run(folder: str | os.PathLike) -> tuple[dict, pd.DataFrame, pd.DataFrame]:
    """run.yaml, epochs.csv and steps.csv of a run's folder. Raises LVMError where one is missing or damaged.

    In a run from before a column was logged, that column is empty.
    """
    folder = Path(folder)
    try:
        record = untrusted.read_yaml(folder / "run.yaml")
        if not isinstance(record, dict) or not isinstance(record.get("parameters"), dict):
            raise ValueError("no parameters in run.yaml")
        _check_record(record)
        if "software" not in record:  # the last of what all runs say
            raise ValueError("run.yaml ends too early")
        epochs, steps = (_read_table(folder / name) for name in ("epochs.csv", "steps.csv"))
        for frame, columns, name in ((epochs, EPOCH_COLUMNS, "epochs.csv"), (steps, STEP_COLUMNS, "steps.csv")):
            if set(columns) - set(frame.columns) - set(LATER) or set(frame.columns) - set(columns):
                raise ValueError(f"{name} does not have the columns {', '.join(columns)}")
        epochs, steps = epochs.reindex(columns=EPOCH_COLUMNS), steps.reindex(columns=STEP_COLUMNS)
    except (OSError, ValueError) as e:
        raise LVMError(
            f"{folder}: not the folder of a run that can be read ({e}); train it, or restore the file"
        ) from e
    return record, epochs, steps


def _check_record(record: dict) -> None:
    """Raise ValueError unless what is told of a run in run.yaml is of the kind that is written there."""
    for key in ("dataset", "computed", "software", "finished"):
        if not isinstance(record.get(key, {}), dict):
            raise ValueError(f"{key} in run.yaml is no group of keys")
    tables = {
        "finished": record.get("finished", {}),
        "dataset.windows": record.get("dataset", {}).get("windows", {}),
        "computed.processes": record.get("computed", {}).get("processes", {}),
    }
    for key, table in tables.items():
        numbers = table.values() if isinstance(table, dict) else [table]
        if any(type(x) not in (int, float) or not math.isfinite(x) for x in numbers):
            raise ValueError(f"{key} in run.yaml holds something else than numbers")
    if any(type(first) is not int for first in tables["computed.processes"]):
        raise ValueError("computed.processes in run.yaml names something else than epochs")
    if not isinstance(record.get("stopped", ""), str):
        raise ValueError("stopped in run.yaml is no text")


def dataset_record(data: Dataset) -> dict:
    """What run.yaml says of the data."""
    windows = {w.split: len(w) for w in (data.train, data.val, data.ood)}
    return {"name": data.store.name, "fingerprint": data.store.fingerprint, "windows": windows}


def differences(ours: dict, theirs: dict) -> list[str]:
    """In what the records (run.yaml) of two runs differ that makes them different runs, in words."""
    ours, theirs = EARLIER | _compared(ours), EARLIER | _compared(theirs)
    return [
        f"{k}: {theirs.get(k)!r} there, {ours.get(k)!r} here"
        for k in {**theirs, **ours}
        if theirs.get(k) != ours.get(k)
    ]


def identity(record: dict) -> str:
    """What tells a run's checkpoints from all others': a hash of what `differences` compares in its run.yaml.

    It is taken once, when the run begins, and kept in run.yaml: parameters that come to be later do not change it.
    """
    said = json.dumps(_compared(record), sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _compared(record: dict) -> dict:
    values = {
        **flat(record["parameters"]),
        **flat(record.get("dataset", {}), "dataset."),
        "computed.precision": record.get("computed", {}).get("precision"),
    }
    return {k: value for k, value in values.items() if not k.startswith(NOT_COMPARED)}


def best_epoch(parameters: dict, epochs: pd.DataFrame) -> int:
    """The epoch whose weights best.safetensors holds, by the table of epochs; 0 where there is none."""
    select = parameters.get("select", EARLIER["select"])
    constrained = parameters["control"].get("constraint")
    best, found = (math.inf, math.inf), 0
    for row in epochs.to_dict("records"):
        score = -row["novel_mrr"] if select == "novel_mrr" else row[select]
        missed = max(0.0, row["directional"] - FEASIBLE) if constrained else 0.0
        if (missed, score) < best:
            best, found = (missed, score), int(row["epoch"])
    return found


def check_best(folder: Path, record: dict, epochs: pd.DataFrame) -> None:
    """Raise LVMError unless best.safetensors is whole and of this run, as run.yaml and the table of epochs tell.

    Of a run from before checkpoints carried an identity, only that it is whole.
    """
    path = folder / "best.safetensors"
    try:
        with safetensors.safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {}).get("lvmlib", "{}"))
        if "identity" not in record:
            return
        if said.get("identity") != record["identity"]:
            raise ValueError("it is of another run")
        wanted = best_epoch(record["parameters"], epochs)
        # Killed before the state of its epoch was written, it is ahead: that epoch is trained again, to the same.
        ahead = "finished" not in record and said["epoch"] > len(epochs)
        if said["epoch"] != wanted and not ahead:
            raise ValueError(f"it is of epoch {said['epoch']}; the best one by epochs.csv is {wanted}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as e:
        raise not_the_weights(path, e) from e


def not_the_weights(path: Path, e: Exception) -> LVMError:
    why = f"{e}" if type(e) is ValueError else f"{type(e).__name__}: {e}"
    return LVMError(f"{path}: not the weights of this run ({why}); train anew with `fresh`, or restore the file")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """A run's folder, held by this process alone; see `files.hold`."""

    def refused(holder: str) -> str:
        return f"{folder} is being trained by {holder}; wait for it, stop it, or name this run apart with run_name"

    with hold(folder.with_name(folder.name + ".lock"), refused, WAIT):
        yield


def _read_table(path: Path) -> pd.DataFrame:
    """A table of numbers, to the last bit as it was written (pandas' own parser may miss that one)."""
    raw = untrusted.read_bytes(path, LARGEST_TABLE)
    if not raw.endswith(b"\n"):
        raise ValueError(f"{path.name} is cut off")
    frame = pd.read_csv(io.BytesIO(raw), dtype=str, keep_default_na=False)
    frame = frame.map(lambda cell: float(cell) if cell else math.nan)
    return frame.astype({c: int for c in ("epoch", "step", "skip", "skips") if c in frame})
