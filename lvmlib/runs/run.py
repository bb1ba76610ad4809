"""One run: a loop that yields a history row an epoch, writes its folder, and can be reused or resumed.

    run = train(version, data)
    for row in run: …            # rows already on disk first, then each new epoch as it ends
    run.history, run.steps       # frames; run.best: the best checkpoint as a model

The folder, `outputs/<dataset>/<version>/seed<k>/`:

    run.yaml            parameters, dataset fingerprint, library versions, commit; when finished: time and memory;
                        `continued`: from which epoch on other versions or another commit went on
    steps.csv           a row every `log_every` steps, the first and the last
    epochs.csv          a row an epoch
    best.safetensors    weights of the best epoch on validation, by what `select` names; of a constrained version
                        before all else one that keeps its bound in training
    last/state.pt       all that resuming needs
    last/good.pt        of a version with `rewind`, or `trouble: rewind`: the state it goes back to
    fivecat.json        written by the notebook

A version with `rewind` (the escape guard) is looked at after each epoch: where the validation novel MRR has fallen by
more than a share of its best, or the escape share has risen above a bound, model, optimizer and controller go back to
the end of the epoch with the best novel MRR of those where nothing was wrong, and go on from there with a lower
learning rate and ceiling of λ. The epochs count on: the schedule does not go back. Where a rewind too many is due, the
run ends before its time; it is finished all the same, and `stopped` in run.yaml says why.

What goes wrong is told by `run.alarms`, and by `alarms` in run.yaml (see `alarms`); a version whose `trouble` is rewind
goes back in the same way, one whose is stop ends.

A file appears whole or not at all. The epoch's random stream and data order depend on seed and epoch alone,
so a run resumed at an epoch's end goes on to the same weights, bit for bit on the same machine. Checkpoints carry the
run's `identity` and their epoch: those of another run are refused.

While a run is trained, `<folder>.lock` beside its folder is held by the process that does: a second one is told who it
is. Reading needs no lock. A loop that was interrupted goes on when it is started anew, on the same `Run`, too.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import platform
import resource
import sys
import time
import weakref
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch
import torch
import yaml

from .. import controller, losses, models
from .. import loop as lowering
from ..config import Control, Version
from ..data.store import check_unchanged
from ..device import pick_device, pick_precision
from ..errors import LVMError, said
from ..evaluate import EVALUATION_BATCH, Moments, energy_score, validate
from ..io import limits as untrusted
from ..io.disk import told, write_whole
from ..io.stamp import commit
from ..loop import seeded
from ..ranking import Articles
from ..windows import DIRECTIONS, Dataset, on_device
from . import alarms, parallel
from .folder import (
    EPOCH_COLUMNS,
    FEASIBLE,
    STEP_COLUMNS,
    best_epoch,
    check_best,
    dataset_record,
    differences,
    held,
    identity,
    not_the_weights,
    open_run,
    run_folder,
)

GOOD = ("model", "optimizer", "plateau")  # what the checkpoints hold, without what the first ones did not
STATE = (*GOOD, "best", "history", "steps")
KEPT = "the last checkpoint is intact"


def train(
    version: Version,
    data: Dataset,
    out: str | os.PathLike | None = None,
    fresh: bool = False,
    devices: int = 1,
    nodes: int = 1,
    strategy: str = "auto",
    team: parallel.Team = parallel.ALONE,
) -> Run:
    """The run of `version` on `data` in folder `out` (default: `run_folder`). Iterating over it trains.

    A finished run of the same parameters and data is reused, an interrupted one resumed. One with others is
    refused (LVMError names the differing keys), and so is, once it is iterated over, one that another process trains.
    `fresh` moves the old folder aside, to NAME.old-1 and so on.

    `devices` on each of `nodes` hosts share each batch, by processes of their own, which open the data anew by its
    name in the version (see `parallel`, extra `parallel`); `strategy`: auto or ddp. `team`: this process's place among
    several, which `parallel` gives.
    """
    group = parallel.group(version, devices, nodes, strategy)
    if data.train.step != DIRECTIONS[version.direction]:
        raise LVMError(
            f"version {version.name} reads {version.direction}, the dataset's windows do not; "
            f"cut them with dataset(…, direction={version.direction!r})"
        )
    folder = Path(out) if out is not None else run_folder(version)
    if fresh and (folder / "run.yaml").exists():
        _end_loop(folder)
        with held(folder), told(folder):
            folder.rename(
                next(p for i in range(1, 10**6) if not (p := folder.with_name(f"{folder.name}.old-{i}")).exists())
            )
    return Run(version, data, folder, team, group)


_LOOPS: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # folder → the loop that trains in it here


def _end_loop(folder: Path) -> None:
    """End the loop of this process that was left standing in `folder`, if there is one."""
    loop = _LOOPS.pop(folder.resolve(), None)
    try:
        if loop is not None:
            loop.close()
    except ValueError as e:  # it is running
        raise LVMError(f"{folder} is being trained by another thread of this process; wait for it") from e


class Run:
    """A run and its folder; see `train`. Iterating yields each epoch's row as a dict with EPOCH_COLUMNS."""

    def __init__(
        self,
        version: Version,
        data: Dataset,
        folder: Path,
        team: parallel.Team = parallel.ALONE,
        group: parallel.Group | None = None,
    ):
        self.version, self.data, self.folder = version, data, folder
        self.team, self.group = team, group
        self.device = team.device or pick_device(version.device)
        self.precision = pick_precision(version.precision, self.device)
        self.history = pd.DataFrame(columns=EPOCH_COLUMNS)
        self.steps = pd.DataFrame(columns=STEP_COLUMNS)
        self.own = self._record()  # what a new run's record begins with
        self._state: dict | None = None  # what resuming needs, where something is to be resumed
        self.found = "new"  # or "interrupted", "finished": what stood in the folder
        self._truth: dict[str, float] | None = None  # spread of the validation targets
        self.rates: list[float] = []  # windows a second of each epoch trained here, without validation and files
        self._behind = False  # whether the tables in the folder lack epochs that its state has
        self._look()

    @property
    def finished(self) -> bool:
        return len(self.history) >= self.version.epochs or "stopped" in self.record

    def __len__(self) -> int:
        """The epochs that iterating yields: the version's, or, of a run that was stopped, those that it had."""
        return len(self.history) if self.finished else self.version.epochs

    def __iter__(self) -> Iterator[dict]:
        """The rows so far, then those of the epochs to come. A loop that this process began before ends with that."""
        if self.finished and "finished" in self.record and not self._behind:
            return iter(self.history.to_dict("records"))
        _end_loop(self.folder)
        loop = _LOOPS[self.folder.resolve()] = self._loop()
        return loop

    def _loop(self) -> Iterator[dict]:
        with held(self.folder) if self.team.first else contextlib.nullcontext():
            self._look()  # another process may have been here, or this one's own loop, which was interrupted
            self.team.from_first(self._check)
            if self.finished or self.group is None:
                if self._behind or (len(self.history) and "finished" not in self.record):
                    self._write_tables()  # killed between the state and the tables, or before the last file
                yield from self.history.to_dict("records")
                if not self.finished:
                    yield from self._train()
                return
            self._prepare()
        yield from self._launched()  # in processes of which the first holds the folder

    def _check(self) -> None:
        """Raises LVMError where what the run goes on from, or trains on, is not what it was."""
        check_unchanged(self.data.store)
        if best_epoch(self.record["parameters"], self.history):
            check_best(self.folder, self.record, self.history)

    @property
    def best(self) -> models.Predictor:
        """The checkpoint that is best by the version's `select`, in eval mode on the run's device."""
        model = models.build(self.version.model, self.data.store.dim, self.version.context_length)
        path = self.folder / "best.safetensors"
        check_best(self.folder, self.record, self.history)
        try:
            model.load_state_dict(safetensors.torch.load_file(path))
        except (OSError, RuntimeError, safetensors.SafetensorError) as e:
            raise not_the_weights(path, e) from e
        return model.to(self.device).eval()

    def _record(self) -> dict:
        record = {
            "parameters": self.version.to_dict(),
            "dataset": dataset_record(self.data),
            "computed": {"device": str(self.device), "precision": self.precision, "threads": torch.get_num_threads()},
            "software": {
                "python": platform.python_version(),
                "commit": commit(),
                **{p: metadata.version(p) for p in ("torch", "numpy", "pandas", "safetensors")},
            },
        }
        return {**record, "identity": identity(record)}

    def _look(self) -> None:
        """What stands in the folder, as the first process sees it; nothing is written."""
        self.record, self._state, self.found, self._behind = copy.deepcopy(self.own), None, "new", False
        self.history, self.steps = self.history[:0], self.steps[:0]
        if self.team.first and (self.folder / "run.yaml").exists():
            self._reopen()
        found = self.team.from_first(
            lambda: (self.record, self.history, self.steps, self._state, self.found, self._behind)
        )
        self.record, self.history, self.steps, self._state, self.found, self._behind = found

    def _reopen(self) -> None:
        """Take up what stands in the folder, or refuse it."""
        record, epochs, steps = open_run(self.folder)
        if differing := differences(self.own, record):
            raise LVMError(
                f"{self.folder}: holds a run with other parameters ({'; '.join(differing)}). "
                + "The data are not what it was trained on. " * any("dataset.fingerprint" in d for d in differing)
                + "Name this one apart with run_name, or set `fresh` to move the old folder aside"
            )
        self.record, self.history, self.steps = record, epochs, steps
        if not (self.finished and "finished" in record):
            self.history, self.steps = epochs[:0], steps[:0]
            if not (self.folder / "last" / "state.pt").exists():
                return  # nothing to go on from: as new
            # Killed between the state and the tables, one or both lag an epoch behind: the state is the truth.
            self._state = self._load_state()
            with self._taken("state.pt"):
                self.record["alarms"] = json.loads(self._state.get("broken", "[]"))
                self.history = pd.DataFrame(json.loads(self._state["history"]), columns=EPOCH_COLUMNS)
                self.steps = pd.DataFrame(json.loads(self._state["steps"]), columns=STEP_COLUMNS)
            self._behind = (len(epochs), len(steps)) != (len(self.history), len(self.steps))
            if self._state.get("stopped"):
                self.record["stopped"] = self._state["stopped"]
        self.found = "finished" if self.finished else "interrupted"

    def _prepare(self) -> None:
        """The folder as other processes need it, who then train in it."""
        self._state = None
        self.record["parameters"] = self.version.to_dict()  # what they train by
        if self.group.nodes == 1:
            parallel.ready(self.group, self.version.device)
        # Several hosts may be training in it by now: what stands there is theirs to write.
        if self.group.nodes == 1 or not (self.folder / "run.yaml").exists():
            with told(self.folder, KEPT):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._write_tables()

    def _launched(self) -> Iterator[dict]:
        """Train in other processes; the rows as they appear in the folder."""
        yield from self.history.to_dict("records")
        known = len(self.history)
        if self.group.nodes > 1:
            raise LVMError(
                f"{self.folder}: prepared, after {known} epochs, for {self.group.nodes} hosts, which this one cannot "
                f"start. Start it {parallel.commands(self.folder, self.group)}. Then do this again: it takes up the "
                "finished run"
            )
        for _ in parallel.launch(self.folder, self.group, self.version.device):
            self.record, self.history, self.steps = open_run(self.folder)
            yield from self.history.to_dict("records")[known:]
            known = len(self.history)
        self.record, self.history, self.steps = open_run(self.folder)
        if not self.finished:
            raise LVMError(
                f"{self.folder}: the processes ended after {known} epochs, before the run did; call it again"
            )

    def _train(self) -> Iterator[dict]:
        v, device = self.version, self.device
        if self.team.size > 1:  # the record is that of the process that prepared the folder
            self.record["computed"] |= self._record()["computed"]
        changed = parallel.counted(self.record, len(self.history), self.team.size)
        changed |= self._continued()
        fused = device.type in ("cpu", "cuda")
        with seeded(v.seed, 0):
            model = models.build(v.model, self.data.store.dim, v.context_length).to(device)
        ranks = v.losses.listwise.weight > 0
        scale = torch.nn.Parameter(torch.tensor(-math.log(v.losses.listwise.temperature), device=device))
        groups = self._groups(model)
        if ranks:
            groups.append({"params": [scale], "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=v.optimizer.lr, weight_decay=v.optimizer.weight_decay, fused=fused)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=v.optimizer.plateau_factor, patience=v.optimizer.plateau_patience
        )
        best, short, memory = math.inf, math.inf, controller.START
        rewinds, peak = 0, -math.inf  # peak: the novel MRR of the epoch that a rewind goes back to
        if self._state:
            with self._taken("state.pt"):
                model.load_state_dict(self._state["model"])
                optimizer.load_state_dict(self._state["optimizer"])
                plateau.load_state_dict(self._state["plateau"])
                best, short = float(self._state["best"]), float(self._state.get("short", 0.0))
                memory = controller.State(*map(float, self._state.get("controller", ())))
                rewinds, peak = int(self._state.get("rewinds", 0)), float(self._state.get("peak", -math.inf))
                if ranks:
                    scale.data.copy_(self._state["scale"])
            self._state = None
        else:
            if self.team.first:
                with told(self.folder, KEPT):
                    (self.folder / "last").mkdir(parents=True, exist_ok=True)
            changed = True
            self.record["alarms"] = []
            if "rewind" in alarms.actions(v):  # what is gone back to before an epoch was good
                self._write_good(model, optimizer, plateau, scale, memory, peak)
        if changed:
            self._write_tables()
        vectors = on_device(self.data.store, device)
        articles = {s: Articles(getattr(self.data, s), vectors) for s in ("train", "val")}
        history, steps = self.history.to_dict("records"), self.steps.to_dict("records")
        for epoch in range(len(history) + 1, v.epochs + 1):
            started = time.perf_counter()
            self.team.from_first(self._check_store)  # before it is read: a map of a file that was cut short ends us
            again = 0  # how often the epoch was gone back from in its midst, and trained anew
            while True:
                control = controller.cooled(v.control, alarms.guard(v).cool, rewinds)
                highest = v.optimizer.lr * alarms.guard(v).cool ** rewinds
                learning_rate = optimizer.param_groups[0]["lr"]
                if v.optimizer.schedule == "cosine":
                    learning_rate = self._cosine(highest, (epoch - 1) * self._batches)
                try:
                    begun = time.perf_counter()
                    with seeded(v.seed, epoch):
                        self.team.seed(v.seed, epoch)
                        learned = scale if ranks else None
                        means, logged, memory = self._epoch(
                            epoch, model, optimizer, articles["train"], learned, control, memory, highest
                        )
                    self.rates.append(len(self.data.train) / (time.perf_counter() - begun))
                    self.team.agree(means["train_loss"], model)
                    val = self.team.from_first(lambda: self._validated(model, vectors, articles["val"]))
                    alarms.validated(epoch, epoch * self._batches, learning_rate, means, val)
                    break
                except alarms.Broken as broken:
                    self.team.from_first(self._check_store)  # then it is not the model that is broken
                    if self._ended(broken, rewinds):
                        return
                    memory = self._rewind(model, optimizer, plateau, scale, peak)
                    rewinds, again = rewinds + 1, again + 1
            score = -val["novel_mrr"] if v.select == "novel_mrr" else val[v.select]
            if v.optimizer.schedule == "plateau":
                plateau.step(score)
            # Of a constrained run, what keeps the bound in training beats what does not (Deb 2000, §3).
            missed = max(0.0, means["directional"] - FEASIBLE) if v.control.constraint else 0.0
            if (missed, score) < (short, best):
                best, short = score, missed
                self._write_best(model, epoch)
            temperature = math.exp(-float(scale.detach())) if ranks else math.nan
            lowest = min((past["escape"] for past in history), default=math.inf)
            row = {
                **means,
                **val,
                "epoch": epoch,
                "temperature": temperature,
                "rewound": float(again),
                "learning_rate": learning_rate,
            }
            steps += logged
            why = self._wrong(means["escape"], lowest, val["novel_mrr"], peak)
            action = "rewind" if why else "go_on"
            if not why and alarms.actions(v) != {"go_on"}:
                action, why = self.team.from_first(lambda: alarms.due(v, [*history, row], steps))  # noqa: B023
            if action == "rewind" and rewinds < alarms.guard(v).most:
                rewinds += 1
                row["rewound"] += 1
                memory = self._rewind(model, optimizer, plateau, scale, peak)
            elif action != "go_on":
                self.record["stopped"] = f"epoch {epoch}: {why}" + f", after {rewinds} rewinds" * (action == "rewind")
            elif (v.rewind or "rewind" in alarms.actions(v)) and val["novel_mrr"] > peak:
                peak = val["novel_mrr"]
                self._write_good(model, optimizer, plateau, scale, memory, peak)
            row["seconds"] = time.perf_counter() - started
            history.append({c: row[c] for c in EPOCH_COLUMNS})
            state = {
                "identity": self.record.get("identity", ""),
                "epoch": epoch,
                "rewinds": rewinds,
                "peak": peak,
                "stopped": self.record.get("stopped", ""),
                "broken": json.dumps([a._asdict() for a in self._broken]),
                "best": best,
                "short": short,
                "scale": scale.detach(),
                "controller": list(memory),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "plateau": plateau.state_dict(),
                "history": json.dumps(history),
                "steps": json.dumps(steps),
            }
            self._write("last/state.pt", lambda p, s=state: torch.save(s, p))
            self.history, self.steps = pd.DataFrame(history), pd.DataFrame(steps)
            self._write_tables()
            yield history[-1]
            if self.finished:
                return

    def _validated(self, model, vectors: torch.Tensor, articles: Articles) -> dict[str, float]:
        moments = Moments(vectors.shape[1], _wide(vectors.device))
        val = validate(model, self.data.val, vectors, articles, moments)
        weight = self.version.losses.energy.weight
        val["val_energy"] = energy_score(model, self.data.val, vectors) if weight else math.nan
        self._check_store()
        if not math.isfinite(val["val_cos"]):
            return val | dict.fromkeys(alarms.FACTS, math.nan)
        if self._truth is None:
            truth = Moments(vectors.shape[1], _wide(vectors.device))
            for _, target in self.data.val.batches(EVALUATION_BATCH, vectors):
                truth.add(torch.nn.functional.normalize(target, dim=-1))
            self._truth = truth.facts()
        ours, theirs = moments.facts(), self._truth
        return val | {
            "effective_rank": ours["effective rank"],
            "rank_share": (ours["effective rank"] - 1) / max(theirs["effective rank"] - 1, controller.TINY),
            "variance_share": ours["variance"] / max(theirs["variance"], controller.TINY),
        }

    def _check_store(self) -> None:
        """Raises LVMError where the store was changed under the run: before anything of this epoch is written."""
        try:
            check_unchanged(self.data.store)
        except LVMError as e:
            done = len(self.history)
            raise LVMError(
                f"{self.folder}: epoch {done + 1} is not kept. {e}. {KEPT.capitalize()} (epoch {done}): restore the "
                "store and start again, to go on; or train anew on the other one, with `fresh`"
            ) from e

    def _continued(self) -> bool:
        """Enter in the record that other software, or another commit, goes on here. True where that is so."""
        before = dict(self.record.get("software", {}))
        for entry in self.record.get("continued", []):
            before |= entry
        other = {k: x for k, x in self.own["software"].items() if before.get(k) != x}
        if not len(self.history) or not other:
            return False
        self.record.setdefault("continued", []).append({"epoch": len(self.history) + 1, **other})
        return True

    @property
    def alarms(self) -> list[alarms.Alarm]:
        """What went wrong so far (`alarms`): of rows that are there, and of steps that broke."""
        rows, steps = self.history.to_dict("records"), self.steps.to_dict("records")
        return alarms.alarms(self.version, rows, steps, self._batches, self._broken)

    @property
    def _broken(self) -> list[alarms.Alarm]:
        return alarms.kept(self.record, str(self.folder / "run.yaml"))

    @property
    def _batches(self) -> int:
        return math.ceil(len(self.data.train) / self.version.batch_size)

    def _ended(self, broken: alarms.Broken, rewinds: int) -> bool:
        """Whether the run ends at a loss that is not finite; else it is to go back. Raises LVMError where the version
        goes on at trouble, which nothing can here, and where there is no epoch to end with."""
        action = alarms.action(self.version, "broken")
        back = action == "rewind" and rewinds < alarms.guard(self.version).most
        self.record["alarms"] = [a._asdict() for a in (*self._broken, broken.alarm)]
        if self.team.first and (back or (action != "go_on" and len(self.history))):
            print(broken.alarm.line, flush=True)  # its epoch has no row that would tell it
        if back:
            return False
        if action != "go_on" and len(self.history):
            self.record["stopped"] = broken.alarm.what + f", after {rewinds} rewinds" * (action == "rewind")
        self._write_tables()
        if "stopped" not in self.record:
            raise LVMError(f"{self.folder}: {broken}") from broken
        return True

    def _write(self, name: str, write) -> None:
        """A file of the folder, whole or not at all; by the first process alone."""
        if self.team.first:
            write_whole(self.folder / name, write, KEPT)

    def _write_best(self, model, epoch: int) -> None:
        weights = {k: t.contiguous() for k, t in model.state_dict().items()}
        # By way of memory: its save_file writes to a name of its own beside, which a kill would leave there.
        # One key: safetensors writes several in any order, and the same run would not give the same bytes.
        said = {"lvmlib": json.dumps({"identity": self.record.get("identity", ""), "epoch": epoch})}
        self._write("best.safetensors", lambda p: p.write_bytes(safetensors.torch.save(weights, said)))

    def _wrong(self, escape: float, lowest: float, novel_mrr: float, peak: float) -> str:
        """What the escape guard finds wrong with an epoch; empty where nothing is, or no guard.

        `lowest`: the least escape share before. A model that knows nothing yet has about one half: only one that has
        been below the bound can rise above it. `peak`: the best novel MRR so far.
        """
        r = self.version.rewind
        if r and escape > r.escape >= lowest:
            return f"the escape share is {escape:.3f}, risen above {r.escape:g}"
        if r and novel_mrr < (1 - r.fall) * peak:
            return f"the novel MRR is {novel_mrr:.4f}, more than {r.fall:.0%} below its best, {peak:.4f}"
        return ""

    def _write_good(self, model, optimizer, plateau, scale, memory: controller.State, peak: float) -> None:
        # Before state.pt: killed in between, the epoch is trained again, and the file written again as it was.
        good = {
            "identity": self.record.get("identity", ""),
            "peak": peak,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "plateau": plateau.state_dict(),
            "scale": scale.detach(),
            "controller": list(memory),
        }
        self._write("last/good.pt", lambda p: torch.save(good, p))

    def _rewind(self, model, optimizer, plateau, scale, peak: float) -> controller.State:
        """All of these as at the end of the best epoch, but the learning rate that of now, cooled down; the
        controller's state then."""
        good = self.team.from_first(lambda: self._load_state("good.pt", GOOD))
        if good.get("peak", peak) != peak:
            raise LVMError(
                f"{self.folder / 'last' / 'good.pt'}: is of another epoch than the best so far; restore the file, or "
                "train anew with `fresh`"
            )
        rates = [group["lr"] * alarms.guard(self.version).cool for group in optimizer.param_groups]
        with self._taken("good.pt"):
            model.load_state_dict(good["model"])
            optimizer.load_state_dict(good["optimizer"])
            plateau.load_state_dict(good["plateau"])
            scale.data.copy_(good["scale"])
            memory = controller.State(*map(float, good["controller"]))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return memory

    @contextlib.contextmanager
    def _taken(self, name: str) -> Iterator[None]:
        """What does not fit in a checkpoint that could be read, in words."""
        try:
            yield
        except Exception as e:  # whatever torch and pandas make of another shape or type
            raise LVMError(
                f"{self.folder / 'last' / name}: does not fit this run ({said(e)}); restore the file, or train anew "
                "with `fresh`"
            ) from e

    def _write_tables(self) -> None:
        self.record["alarms"] = [a._asdict() for a in self.alarms]
        self._write("epochs.csv", lambda p: self.history.to_csv(p, index=False))
        self._write("steps.csv", lambda p: self.steps.to_csv(p, index=False))
        record = dict(self.record)
        if self.finished and "finished" not in record:
            record["finished"] = {
                "training_seconds": round(float(self.history["seconds"].sum()), 3),
                "peak_memory_mib": round(peak_memory_mib()),
            }
        text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
        self._write("run.yaml", lambda p: p.write_text(text, encoding="utf-8"))
        self.record, self._behind = record, False  # finished when the folder says so

    def _cosine(self, highest: float, step: int) -> float:
        """The learning rate of a step of the run, from 0 on: of the step alone, so that nothing is resumed."""
        return highest * (1 + math.cos(math.pi * step / (self._batches * self.version.epochs))) / 2

    def _groups(self, model) -> list[dict]:
        """The model's parameters as AdamW takes them: which of them decay."""
        if self.version.optimizer.decay == "all":
            return [{"params": list(model.parameters())}]
        matrices, others = ([p for p in model.parameters() if (p.ndim > 1) == many] for many in (True, False))
        return [{"params": matrices}, {"params": others, "weight_decay": 0.0}]

    def _epoch(
        self,
        epoch: int,
        model,
        optimizer,
        articles: Articles,
        scale,
        control: Control,
        memory: controller.State,
        highest: float,
    ) -> tuple[dict, list[dict], controller.State]:
        """One pass over the training windows: means over the epoch's windows, the rows to log, the controller's state.

        `scale`: the logarithm of 1 / temperature, for a version that has the listwise loss; else None. `control`: the
        version's; `memory`: the controller's state before the first batch; `highest`: the learning rate that a cosine
        begins with.
        """
        v, windows, vectors = self.version, self.data.train, articles.vectors
        longest = articles.longest if scale is not None else 0
        now = controller.phase(v.schedule, epoch)
        # What λ aims at: ρ_target, or for the older rules the fraction.
        target = now.fraction if math.isnan(now.rho_target) else now.rho_target
        order = torch.randperm(len(windows)).numpy()
        last = math.ceil(len(windows) / v.batch_size)
        done = (epoch - 1) * last
        lowered = lowering.Lowered(model) if self.precision == "bfloat16" else None
        acting = lowered.model if lowered else model
        sums: dict[str, float] = {}
        seen = acted = 0
        logged = []
        before = None  # the step before this one
        acting.train()
        for i in range(last):
            if v.optimizer.schedule == "cosine":
                for group in optimizer.param_groups:
                    group["lr"] = self._cosine(highest, done + i)
            index = order[i * v.batch_size : (i + 1) * v.batch_size]
            context, y = windows.batch(index, vectors)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                raw, unit, ranker = self.team.heads(acting, context)
                samples = (
                    self.team.samples(acting, context, v.losses.energy.samples) if v.losses.energy.weight else None
                )
            rivals = None
            if scale is not None:
                rows, there = articles.rivals(
                    index, v.losses.listwise.candidates, torch.rand(len(index), longest).numpy()
                )
                if v.losses.listwise.elsewhere:
                    others, apart = articles.strangers(index, v.losses.listwise.elsewhere)
                    rows = np.concatenate([rows, np.broadcast_to(others, apart.shape)], 1)
                    there = np.concatenate([there, apart], 1)
                chunks = torch.nn.functional.normalize(vectors[torch.from_numpy(rows).to(self.device)].float(), dim=-1)
                rivals = ranker, chunks, torch.from_numpy(there).to(self.device), scale.exp()
            margin = now.margin if v.control.rule != "none" else 0.0
            terms = losses.terms(raw, unit, context, y, margin, v.losses, rivals, v.control.constraint, samples)
            gradients = losses.gradients(terms, raw, samples)
            watched = losses.health(unit, y, context, v.losses.directional.prev) | losses.pulls(gradients, raw)
            names = [*terms._fields, *watched]
            # One transfer a step from the device, for everything the controller and the log need.
            values = dict(zip(names, torch.stack([*terms, *watched.values()]).detach().tolist(), strict=True))
            decision = controller.decide(
                control,
                now,
                values["mse"],
                values["directional"],
                values["pos"],
                values["neg"],
                memory,
                (v.losses.mean_square * values["pull_mse"], values["pull_directional"]),
            )
            memory = decision.state
            optimizer.zero_grad(set_to_none=True)
            losses.backward(terms, v.losses, decision.lambda_eff, raw, gradients)
            if lowered:
                lowered.hand_over()
            self.team.add_gradients(model)
            gradient_norm = lowering.clip(model, v.optimizer.clip_norm)
            weights = terms.weighted(v.losses, decision.lambda_eff)
            loss = sum(weight * values[name] for name, weight in weights.items())
            told = values | {"lambda_eff": decision.lambda_eff}
            if not math.isfinite(loss):
                raise alarms.broken(epoch, done + i + 1, optimizer.param_groups[0]["lr"], loss, told, before, model)
            before = alarms.Last(loss, told, gradient_norm)
            optimizer.step()
            if lowered:
                lowered.renew()
            # Weighted, as they act; a term of weight 0 pulls at nothing, whatever its gradient.
            values |= {f"pull_{k}": weights[k] * values[f"pull_{k}"] if k in weights else 0.0 for k in terms._fields}
            shares = {
                "lambda_eff": decision.lambda_eff,
                "rho": decision.rho,
                "at_lambda_min": _stands(decision, control.lambda_min),
                "at_lambda_max": _stands(decision, control.lambda_max),
                "rho_gradient": values["pull_directional"] / max(values["pull_mse"], controller.TINY),
            }
            if not v.losses.mean_square and decision.lambda_eff:
                shares["rho_gradient"] = math.nan  # a share of nothing
            row = {**values, "loss": loss, **shares}
            acts = len(index) * (v.control.rule != "none" and not decision.skip)
            for key, value in row.items():
                sums[key] = sums.get(key, 0.0) + value * (acts if key in shares else len(index))
            seen, acted = seen + len(index), acted + acts
            sums["skips"] = sums.get("skips", 0) + decision.skip
            step = done + i + 1
            if step == 1 or step % v.log_every == 0 or step == last * v.epochs:
                row |= {
                    "epoch": epoch,
                    "step": step,
                    "rho_target": target,
                    "rho_cap": now.rho_cap,
                    "margin_target": now.margin,
                    "gate": decision.gate,
                    "skip": int(decision.skip),
                    "gradient_norm": float(gradient_norm),
                }
                logged.append({c: row[c] for c in STEP_COLUMNS})
        alarms.finite(epoch, done + last, optimizer.param_groups[0]["lr"], before, model)
        skips = sums.pop("skips")
        # λ and both ρ are means over the windows where the directional term acted: skips are counted apart.
        means = {k: s / max(acted, 1) if k in shares else s / seen for k, s in sums.items()}
        return (
            {
                **means,
                "train_loss": means["loss"],
                "skips": skips,
                "rho_target": target,
                "rho_cap": now.rho_cap,
            },
            logged,
            memory,
        )

    def _load_state(self, name: str = "state.pt", keys: tuple[str, ...] = STATE) -> dict:
        path = self.folder / "last" / name
        untrusted.check_state(path)
        try:
            # Of several processes each has another device: to all of them it goes by way of the CPU.
            where = self.device if self.team.size == 1 else "cpu"
            state = torch.load(path, map_location=where, weights_only=True)
            missing = [key for key in keys if key not in dict(state)]
        except Exception as e:  # whatever a damaged file makes of torch.load
            raise LVMError(
                f"{path}: cannot be read ({type(e).__name__}); restore the file, or train anew with `fresh`"
            ) from e
        # What a run from before this wrote has no identity, nor has its run.yaml.
        if missing or state.get("identity", "") != self.record.get("identity", ""):
            why = f"has no {missing[0]}" if missing else f"is a checkpoint of another run than {self.folder} tells"
            raise LVMError(f"{path}: {why}; restore the file, or train anew with `fresh`")
        return state


def _stands(decision: controller.Decision, bound: float) -> float:
    """1 where λ, before the gate, is at this end of its range, else 0."""
    return float(decision.gate > 0 and math.isclose(decision.lambda_eff, bound * decision.gate))


def _wide(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # Apple's devices have no float64


def peak_memory_mib() -> float:
    """The process's largest resident size so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (1024 if sys.platform != "darwin" else 1024**2)
