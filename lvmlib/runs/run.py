"""One run: an iterator over epochs that writes its folder, and can be reused or resumed.

    run = train(version, data)
    for row in run: …            # rows already on disk first, then each new epoch as it ends
    run.history, run.steps       # frames; run.best: the best checkpoint as a model

The folder, `outputs/<dataset>/<version>/seed<k>/`:

    run.yaml            parameters, dataset fingerprint, library versions, commit, alarms; when finished: time and
                        memory; `stopped`: why it ended early; `continued`: from which epoch on other software went on
    steps.csv           a row every `log_every` steps, the first and the last
    epochs.csv          a row an epoch
    best.safetensors    weights of the best epoch (`checkpoint.score`)
    last/state.pt       all that resuming needs
    last/good.pt        of a version with `rewind`: the state that it returns to (`guard`)
    fivecat.json        written by the notebook

A file appears whole or not at all. The epoch's random stream and data order depend on seed and epoch alone, so a run
resumed at an epoch's end goes on to the same weights, bit for bit on the same machine.

While a run is trained, its process holds `<folder>.lock`; a second one gets an error that names it. Reading needs no
lock. An interrupted loop resumes when you run it again, on the same `Run`, too.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import resource
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from .. import losses, models
from ..config import Version
from ..data.store import check_unchanged
from ..device import pick_device, pick_precision
from ..errors import LVMError
from ..io.disk import explain_os_errors, set_aside
from ..loop import StepBroke, Task, TrainState, epoch, start
from ..ranking import Articles
from ..windows import DIRECTIONS, Dataset, on_device
from . import alarms, checkpoint, folder, launch
from .guard import Guard
from .team import ALONE, Team, record_size
from .validation import Validation


def train(
    version: Version,
    data: Dataset,
    out: str | os.PathLike | None = None,
    fresh: bool = False,
    devices: int = 1,
    nodes: int = 1,
    strategy: str = "auto",
    team: Team = ALONE,
) -> Run:
    """The run of `version` on `data` in folder `out` (default: `run_folder`). Iterating over it trains.

    A finished run of the same parameters and data is reused, an interrupted one resumed. One with others is refused
    (LVMError names the differing keys); so is, when iterated over, one that another process trains. `fresh` renames
    the old folder to NAME.old-1 and so on.

    `devices` on each of `nodes` hosts share each batch, by processes of their own (`launch`, extra `parallel`);
    `strategy`: auto or ddp. `team`: this process's place among several, given by `worker`.
    """
    group = launch.group(version, devices, nodes, strategy)
    if data.train.step != DIRECTIONS[version.direction]:
        raise LVMError(
            f"version {version.name} reads {version.direction}, the dataset's windows do not; "
            f"cut them with dataset(…, direction={version.direction!r})"
        )
    place = Path(out) if out is not None else folder.run_folder(version)
    if fresh and (place / "run.yaml").exists():
        _end_loop(place)
        with folder.lock_run(place):
            set_aside(place)
    return Run(version, data, place, team, group)


_LOOPS: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # folder → the loop that trains in it here


def _end_loop(place: Path) -> None:
    """End the loop of this process that was left open in this folder, if there is one."""
    loop = _LOOPS.pop(place.resolve(), None)
    try:
        if loop is not None:
            loop.close()
    except ValueError as e:  # it is running
        raise LVMError(f"{place} is being trained by another thread of this process; wait for it") from e


class Saved(NamedTuple):
    """What is in a run's folder."""

    record: dict
    history: pd.DataFrame
    steps: pd.DataFrame
    found: str = "new"  # or "interrupted", "finished"
    state: dict | None = None  # what resuming needs
    behind: bool = False  # the tables lack epochs that the state has


def is_finished(version: Version, record: dict, history: pd.DataFrame) -> bool:
    return len(history) >= version.epochs or "stopped" in record


def read_folder(place: Path, version: Version, own: dict, device: torch.device | str) -> Saved:
    """What is in the folder; nothing is written. Raises LVMError for another run than that of the record `own`."""
    history, steps = (pd.DataFrame(columns=columns) for columns in _columns(version))
    empty = Saved(copy.deepcopy(own), history, steps)
    if not (place / "run.yaml").exists():
        return empty
    record, history, steps = folder.open_run(place)
    if differing := folder.differences(own, record):
        raise LVMError(
            f"{place}: holds a run with other parameters ({'; '.join(differing)}). "
            + "The data are not those it was trained on. " * any("dataset.fingerprint" in d for d in differing)
            + "Name this run differently with run_name, or set `fresh` to rename the old folder"
        )
    if is_finished(version, record, history) and "finished" in record:
        return Saved(record, history, steps, "finished")
    path = place / "last" / "state.pt"
    if not path.exists():
        return empty._replace(record=record)
    # Killed between the state and the tables, one or both lag an epoch behind: the state is the truth.
    state, lengths = checkpoint.read(path, record.get("identity", ""), device), (len(history), len(steps))
    with checkpoint.fitting(path):
        saved = json.loads(state["history"]), json.loads(state["steps"])
        history, steps = map(pd.DataFrame, saved, (None, None), _columns(version))
    record |= {"alarms": []} | ({"stopped": state["stopped"]} if state["stopped"] else {})
    found = "finished" if is_finished(version, record, history) else "interrupted"
    return Saved(record, history, steps, found, state, (len(history), len(steps)) != lengths)


def _columns(version: Version) -> tuple[tuple[str, ...], tuple[str, ...]]:
    terms = losses.names(version.losses)
    return folder.epoch_columns(terms), folder.step_columns(terms)


class Run:
    """A run and its folder; see `train`. Iterating yields each epoch's row as a dict with the columns of epochs.csv."""

    def __init__(
        self, version: Version, data: Dataset, place: Path, team: Team = ALONE, group: launch.Group | None = None
    ):
        self.version, self.data, self.folder, self.team, self.group = version, data, place, team, group
        self.device = team.device or pick_device(version.device)
        self.precision = pick_precision(version.precision, self.device)
        self.own = folder.new_record(version, data, self.device, self.precision)
        self.rates: list[float] = []  # windows a second of each epoch trained here, without validation and files
        self._open()

    def _open(self) -> None:
        """Take up what is in the folder, as the first process sees it."""
        device = self.device if self.team.size == 1 else "cpu"  # each process has another device
        self._saved = self.team.from_first(lambda: read_folder(self.folder, self.version, self.own, device))
        self.record, self.history, self.steps, self.found = self._saved[:4]

    @property
    def finished(self) -> bool:
        return is_finished(self.version, self.record, self.history)

    def __len__(self) -> int:
        """The epochs that iterating yields: the version's, or those of a run that was stopped."""
        return len(self.history) if self.finished else self.version.epochs

    def __iter__(self) -> Iterator[dict]:
        """The rows so far, then those of the epochs to come. Ends a loop that this process began on it before."""
        if self.finished and "finished" in self.record and not self._saved.behind:
            return iter(self.history.to_dict("records"))
        _end_loop(self.folder)
        loop = _LOOPS[self.folder.resolve()] = self._loop()
        return loop

    def _loop(self) -> Iterator[dict]:
        with folder.lock_run(self.folder) if self.team.first else contextlib.nullcontext():
            self._open()  # another process may have been here, or this one's own loop, which was interrupted
            self.team.from_first(self._check)
            if self.finished or self.group is None:
                if self._saved.behind or (len(self.history) and "finished" not in self.record):
                    self._write_tables()  # killed between the state and the tables, or before the last file
                yield from self.history.to_dict("records")
                if not self.finished:
                    yield from self._train()
                return
            self._prepare()
        yield from self._follow()  # processes of which the first holds the folder

    def _check(self) -> None:
        """Raise LVMError if the dataset or the best checkpoint is not what it was."""
        check_unchanged(self.data.store)
        if checkpoint.best_epoch(self.record["parameters"], self.history):
            checkpoint.check_best(self.folder, self.record, self.history)

    @property
    def best(self) -> models.Predictor:
        """The best checkpoint (`checkpoint.score`), in eval mode on the run's device."""
        model = models.build(self.version.model, self.data.store.dim, self.version.context_length)
        checkpoint.load_best(self.folder, model, self.record, self.history)
        return model.to(self.device).eval()

    @property
    def alarms(self) -> list[alarms.Alarm]:
        """What went wrong so far."""
        rows, steps = self.history.to_dict("records"), self.steps.to_dict("records")
        batches = math.ceil(len(self.data.train) / self.version.batch_size)
        broken = alarms.read_broken(self.record, str(self.folder / "run.yaml"))
        return alarms.alarms(self.version, rows, steps, batches, broken)

    def _train(self) -> Iterator[dict]:
        v, state = self.version, self._begin()
        vectors = on_device(self.data.store, self.device)
        articles = Articles(self.data.train, vectors)
        task = Task(v, self.data.train, vectors, self.precision, self.team, articles)
        validation = Validation(self.data.val, vectors, energy=v.losses.energy.weight > 0)
        guard = Guard(v.rewind, self.folder, self.record["identity"], self.team)
        while state.epoch < v.epochs and not state.stopped:
            began, number = time.perf_counter(), state.epoch + 1
            try:
                means, rows = epoch(state, task)
                self.rates.append(len(self.data.train) / (time.perf_counter() - began))
                self.team.agree(means["train_loss"], state.model)
                found = self.team.from_first(lambda: validation(state.model))
                broken = alarms.check_validation(number, number * task.batches, means, found)
            except StepBroke as broke:
                broken = alarms.explain(v, broke)
            self.team.from_first(self._check_store)
            if broken:
                self._stop_broken(broken)
                return
            row = self._judge(state, guard, {**means, **found, "epoch": number}, rows)
            row["seconds"] = time.perf_counter() - began
            state.history.append({c: row[c] for c in self.history})
            if state.stopped:
                self.record["stopped"] = state.stopped
            if self.team.first:
                checkpoint.save(self.folder / "last" / "state.pt", state, self.record["identity"])
            self.history, self.steps = pd.DataFrame(state.history), pd.DataFrame(state.steps)
            self._write_tables()
            yield state.history[-1]

    def _begin(self) -> TrainState:
        """The state that training goes on from, and the record of who goes on."""
        losses.active(self.version.losses)
        if self.team.size > 1:  # the record is that of the process that prepared the folder
            self.record["computed"] |= self.own["computed"]
        changed = record_size(self.record, len(self.history), self.team.size)
        changed |= folder.record_software(self.record, self.own["software"], len(self.history))
        state = start(self.version, self.data.store.dim, self.device)
        if self._saved.state:
            checkpoint.load(self.folder / "last" / "state.pt", state, self._saved.state)
            self._saved = self._saved._replace(state=None)  # it holds a copy of the weights
        else:
            if self.team.first:
                with explain_os_errors(self.folder, folder.INTACT):
                    (self.folder / "last").mkdir(parents=True, exist_ok=True)
            self.record["alarms"], changed = [], True
        if changed:
            self._write_tables()
        return state

    def _judge(self, state: TrainState, guard: Guard, row: dict, rows: list[dict]) -> dict:
        """What follows from an epoch's figures: the learning rate's schedule, the best checkpoint, a rewind, a stop."""
        v = self.version
        missed, score = checkpoint.score(self.record["parameters"], row)
        if v.optimizer.schedule == "plateau":
            state.plateau.step(score)
        if (missed, score) < (state.short, state.best):
            state.short, state.best = missed, score
            if self.team.first:
                checkpoint.save_best(self.folder, state.model, self.record["identity"], row["epoch"])
        row["temperature"] = math.exp(-float(state.log_scale.detach())) if v.losses.listwise.weight else math.nan
        row["rewound"] = 0.0
        state.steps += [{c: r[c] for c in self.steps} for r in rows]
        if fault := guard.fault(state, row):
            why = guard.rewind(state, fault)
            row["rewound"] = float(not why)
        else:
            history = [*state.history, row]
            why = self.team.from_first(lambda: alarms.due(v, history, state.steps)) if v.trouble == "stop" else ""
            if not why:
                guard.keep(state, row)
        state.stopped = f"epoch {row['epoch']}: {why}" if why else ""
        return row

    def _check_store(self) -> None:
        """Raise LVMError if the dataset has changed since training began: before anything of this epoch is written."""
        try:
            check_unchanged(self.data.store)
        except LVMError as e:
            done = len(self.history)
            raise LVMError(
                f"{self.folder}: epoch {done + 1} is not kept. {e}. {folder.INTACT.capitalize()} (epoch {done}): "
                "restore the store and start again, or train anew on the other one, with `fresh`"
            ) from e

    def _stop_broken(self, broken: alarms.Alarm) -> None:
        """End the run at a figure that is not finite. Raises LVMError unless `trouble` is stop and an epoch is kept."""
        earlier = alarms.read_broken(self.record, str(self.folder / "run.yaml"))
        self.record["alarms"] = [a._asdict() for a in (*earlier, broken)]
        stop = self.version.trouble == "stop" and len(self.history) > 0
        if stop:
            self.record["stopped"] = broken.what
            if self.team.first:
                print(broken.line, flush=True)  # its epoch has no row that would tell it
        self._write_tables()
        if not stop:
            raise LVMError(f"{self.folder}: {broken.what}; {broken.do}")

    def _write_tables(self) -> None:
        self.record["alarms"] = [a._asdict() for a in self.alarms]
        record = dict(self.record)
        if self.finished and "finished" not in record:
            record["finished"] = {
                "training_seconds": round(float(self.history["seconds"].sum()), 3),
                "peak_memory_mib": round(peak_memory_mib()),
            }
        if self.team.first:
            folder.write_tables(self.folder, record, self.history, self.steps)
        self.record, self._saved = record, self._saved._replace(behind=False)  # finished when the folder says so

    def _prepare(self) -> None:
        """Write the folder as the processes need it that will train in it."""
        self._saved = self._saved._replace(state=None)
        self.record["parameters"] = self.version.to_dict()  # what they train by
        if self.group.nodes == 1:
            launch.check_devices(self.group, self.version.device)
        # Several hosts may be training in it by now: what is there is theirs to write.
        if self.group.nodes == 1 or not (self.folder / "run.yaml").exists():
            with explain_os_errors(self.folder, folder.INTACT):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._write_tables()

    def _follow(self) -> Iterator[dict]:
        """Start the processes, and yield the rows as they appear in the folder."""
        yield from self.history.to_dict("records")
        known = len(self.history)
        if self.group.nodes > 1:
            raise LVMError(
                f"{self.folder}: prepared, after {known} epochs, for {self.group.nodes} hosts. Start it "
                f"{launch.commands(self.folder, self.group)}. Then do this again to get the finished run"
            )
        for _ in launch.launch(self.folder, self.group, self.version.device):
            self.record, self.history, self.steps = folder.open_run(self.folder)
            yield from self.history.to_dict("records")[known:]
            known = len(self.history)
        self.record, self.history, self.steps = folder.open_run(self.folder)
        if not self.finished:
            raise LVMError(
                f"{self.folder}: the processes ended after {known} epochs, before the run did; call it again"
            )


def peak_memory_mib() -> float:
    """The process's largest resident size so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (1024 if sys.platform != "darwin" else 1024**2)
