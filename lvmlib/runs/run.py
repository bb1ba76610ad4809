"""One run: an iterator over epochs that writes its folder, and can be reused or resumed.

    run = train(version, data)
    for row in run: …            # rows already on disk first, then each new epoch as it ends
    run.history, run.steps       # frames; run.best: the best checkpoint as a model

The folder, `outputs/<dataset>/<version>/seed<k>/`:

    run.yaml            parameters, dataset fingerprint, library versions, commit, alarms; `finished`: time and memory;
                        `stopped`: why it ended early; `continued`: the epochs at which versions or commit changed
    steps.csv           a row every `log_every` steps, the first and the last
    epochs.csv          a row an epoch
    best.safetensors    weights of the best epoch (`checkpoint.score`)
    last/state.pt       all that resuming needs
    last/good.pt        of a version with `rewind`: the state that it returns to (`guard`)

A file appears whole or not at all. An epoch's random stream and data order depend on seed and epoch alone, so a
resumed run ends with the same weights, bit for bit on the same machine. While a run is trained, its process holds
`<folder>.lock`; reading needs no lock. An interrupted loop resumes when you run it again, on the same `Run`, too.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

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
from .team import ALONE, Team
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

    A finished run of the same parameters and data is reused, an interrupted one resumed. Raises LVMError for a run
    with other parameters (the message names the keys), and on iterating if another process trains it. `fresh` renames
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


_LOOPS: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # folder → this process's loop that trains in it


def _end_loop(place: Path) -> None:
    """End the loop that this process left open in this folder, if there is one."""
    try:
        if (loop := _LOOPS.pop(place.resolve(), None)) is not None:
            loop.close()
    except ValueError as e:  # it is running
        raise LVMError(f"{place} is being trained by another thread of this process; wait for it") from e


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
        """Read the folder, in the first process for all."""
        device = self.device if self.team.size == 1 else "cpu"  # each process has another device
        saved = self.team.from_first(lambda: checkpoint.read_folder(self.folder, self.version, self.own, device))
        self.record, self.history, self.steps, self._state = saved

    @property
    def finished(self) -> bool:
        return checkpoint.is_finished(self.version, self.record, self.history)

    @property
    def status(self) -> str:
        """new, interrupted or finished."""
        if self.finished:
            return "finished"
        return "interrupted" if len(self.history) else "new"

    def __len__(self) -> int:
        """The epochs that iterating yields: the version's, or those of a run that was stopped."""
        return len(self.history) if self.finished else self.version.epochs

    def __iter__(self) -> Iterator[dict]:
        """The rows so far, then those of the epochs to come. Ends a loop that this process began on it before."""
        if "finished" in self.record:
            return iter(self.history.to_dict("records"))
        _end_loop(self.folder)
        loop = _LOOPS[self.folder.resolve()] = self._loop()
        return loop

    def _loop(self) -> Iterator[dict]:
        with folder.lock_run(self.folder) if self.team.first else contextlib.nullcontext():
            self._open()  # again: another process, or an interrupted loop of this one, may have written since
            self.team.from_first(self._check)
            if self.finished or self.group is None:
                if self.finished and "finished" not in self.record:
                    self._write_tables()  # the last process was killed before it
                yield from self.history.to_dict("records")
                if not self.finished:
                    yield from self._train()
                return
            self._prepare()
        yield from self._follow()  # without the lock: the first of the processes takes it

    def _check(self) -> None:
        """Raise LVMError if the dataset or the best checkpoint is not what it was."""
        self._check_store()
        if len(self.history):
            checkpoint.check_best(self.folder, self.record, self.history)

    def _check_store(self) -> None:
        try:
            check_unchanged(self.data.store)
        except LVMError as e:
            raise LVMError(
                f"{self.folder}: nothing is written beyond epoch {len(self.history)}. {e}. "
                "Restore the store and resume, or start over with `fresh`"
            ) from e

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
        broken = [alarms.Alarm(**a) for a in self.record.get("alarms") or () if a["kind"] == "broken"]
        return alarms.alarms(self.version, rows, steps, batches, broken)

    def _train(self) -> Iterator[dict]:
        v, state = self.version, self._begin()
        vectors = on_device(self.data.store, self.device)
        task = Task(v, self.data.train, vectors, self.precision, self.team, Articles(self.data.train, vectors))
        validation = Validation(self.data.val, vectors, energy=v.losses.energy.weight > 0)
        guard = Guard(v.rewind, self.folder, self.record["identity"], self.team)
        while state.epoch < v.epochs and not state.stopped:
            began, number = time.perf_counter(), state.epoch + 1
            try:
                means, steps = epoch(state, task)
                self.rates.append(len(self.data.train) / (time.perf_counter() - began))
                self.team.agree(means["train_loss"], state.model)
                validated = self.team.from_first(lambda: validation(state.model))
                broken = alarms.check_validation(number, number * task.batches, means, validated)
            except StepBroke as e:
                broken = alarms.explain(v, e)
            self.team.from_first(self._check_store)
            if broken:
                self._stop_broken(broken)
                return
            state.steps += [{c: step[c] for c in self.steps} for step in steps]
            row = {**means, **validated, "epoch": number, "rewound": 0.0}
            self._after_epoch(state, guard, row)
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
        """The state that training goes on from; writes the tables, with who goes on in the record."""
        losses.active(self.version.losses)
        if self.team.size > 1:  # the record is that of the process that prepared the folder
            self.record["computed"] |= self.own["computed"]
        folder.record_resumed(self.record, self.own["software"], self.team.size, len(self.history))
        state = start(self.version, self.data.store.dim, self.device)
        if self._state:
            checkpoint.load(self.folder / "last" / "state.pt", state, self._state)
            self._state = None  # it holds a copy of the weights
        elif self.team.first:
            with explain_os_errors(self.folder, folder.INTACT):
                (self.folder / "last").mkdir(parents=True, exist_ok=True)
        self._write_tables()
        return state

    def _after_epoch(self, state: TrainState, guard: Guard, row: dict) -> None:
        """Act on an epoch's figures: step the learning rate, save the best checkpoint, rewind or stop."""
        v = self.version
        missed, score = checkpoint.score(self.record["parameters"], row)
        if v.optimizer.schedule == "plateau":
            state.plateau.step(score)
        if (missed, score) < (state.short, state.best):
            state.short, state.best = missed, score
            if self.team.first:
                checkpoint.save_best(self.folder, state.model, self.record["identity"], row["epoch"])
        row["temperature"] = math.exp(-float(state.log_scale.detach())) if v.losses.listwise.weight else math.nan
        if fault := guard.fault(state, row):
            why = guard.rewind(state, fault)
            row["rewound"] = float(not why)
        else:
            history = [*state.history, row]
            why = self.team.from_first(lambda: alarms.due(v, history, state.steps)) if v.trouble == "stop" else ""
            if not why:
                guard.keep(state, row)
        state.stopped = f"epoch {row['epoch']}: {why}" if why else ""

    def _stop_broken(self, broken: alarms.Alarm) -> None:
        """End the run at a figure that is not finite. Raises LVMError unless `trouble` is stop and an epoch is kept."""
        self.record["alarms"] = [broken._asdict()]
        stop = self.version.trouble == "stop" and len(self.history) > 0
        if stop:
            self.record["stopped"] = broken.what
            if self.team.first:
                print(broken.line, flush=True)  # the log shows a row's alarms, and this epoch has no row
        self._write_tables()
        if not stop:
            raise LVMError(f"{self.folder}: {broken.what}; {broken.do}")

    def _write_tables(self) -> None:
        """Write the tables and run.yaml, with `finished` if the run is; only then the run is finished here, too."""
        self.record["alarms"] = [a._asdict() for a in self.alarms]
        record = dict(self.record)
        if self.finished and "finished" not in record:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
            record["finished"] = {
                "training_seconds": round(float(self.history["seconds"].sum()), 3),
                "peak_memory_mib": round(peak / (1024**2 if sys.platform == "darwin" else 1024)),
            }
        if self.team.first:
            folder.write_tables(self.folder, record, self.history, self.steps)
        self.record = record

    def _prepare(self) -> None:
        """Write the folder as the processes need it that will train in it."""
        self._state = None
        self.record["parameters"] = self.version.to_dict()  # with this call's `device`, which makes no other run
        if self.group.nodes == 1:
            launch.check_devices(self.group, self.version.device)
        elif (self.folder / "run.yaml").exists():
            return  # the hosts may have begun to train: only they write in the folder
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
        for _ in launch.launch(self.folder, self.group):
            self.record, self.history, self.steps = folder.open_run(self.folder)
            yield from self.history.to_dict("records")[known:]
            known = len(self.history)
        self._open()
        if not self.finished:
            raise LVMError(f"{self.folder}: the processes ended early, after {known} epochs; run the loop again")
