"""`python tests/kill_runs.py [KILLS] [SEED]`: jobs killed by SIGKILL at random moments, and begun again until they end.

Each must reach the end of a job that is never killed, bit for bit but for wall times. A kill comes at a moment that is
uniform over the job's usual wall time, often several times in a row on the same folder. The jobs run in forked
processes of one thread, on data made here. tests/runs/test_crash.py does a small form of it.

`python tests/kill_runs.py KILLS SEED commands` does it to what a person starts: `python -m lvmlib train` with papermill
and its kernel, and a sweep by snakemake, both on the embedded data in fast mode. All that was started is killed but the
kernels, which have sessions of their own, and find out.
"""

import os

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # forked processes cannot use the threads of their parent
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from toys import guarded, make_data, version

import lvmlib as lvm
from lvmlib.io.paths import ROOT
from lvmlib.runs import folder as runs

AGAIN = 0.5  # how likely another kill follows on the same folder
MOST = 4  # kills in one folder


class Job(NamedTuple):
    """Something to do in a folder, which goes on where it was stopped; its end as plain values."""

    name: str
    run: Callable[[Path], None]
    end: Callable[[Path], dict]
    command: bool = False  # `run` becomes another program


class Kill(NamedTuple):
    job: str
    share: float  # of the usual wall time
    trial: int


def trained(folder: Path) -> dict:
    """All that a run leaves, without wall times, memory, and the process that computed it."""
    state = torch.load(folder / "last" / "state.pt", weights_only=True)
    for table in ("history", "steps"):
        state[table] = [{k: x for k, x in row.items() if k != "seconds"} for row in json.loads(state[table])]
    record, epochs, steps = lvm.open_run(folder)
    good = folder / "last" / "good.pt"
    return {
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()),
        "state.pt": state,
        "good.pt": torch.load(good, weights_only=True) if good.exists() else None,
        "best.safetensors": (folder / "best.safetensors").read_bytes(),
        "epochs.csv": epochs.drop(columns="seconds"),
        "steps.csv": steps,
        "run.yaml": {k: x for k, x in record.items() if k != "finished"} | {"finished": list(record["finished"])},
    }


def training_job(name: str, own, data, judged: bool = False) -> Job:
    """A run; `judged`: with its best checkpoint's 5CAT and fivecat.json, as train.ipynb goes."""

    def run(folder: Path) -> None:
        run = lvm.train(own, data, folder / "run")
        list(run)
        if judged:
            report = lvm.fivecat(run.best, data, lvm.baselines(data.train))
            report.to_json(run.folder / "fivecat.json", version=own.name, seed=own.seed)

    return Job(name, run, lambda folder: end_of(folder / "run", judged))


def end_of(folder: Path, judged: bool) -> dict:
    return trained(folder) | ({"5CAT": (folder / "fivecat.json").read_bytes()} if judged else {})


def command_job(name: str, arguments: list[str], folders: list[str]) -> Job:
    """A program that trains and judges the runs in these folders, and leaves executed notebooks beside them."""

    def run(folder: Path) -> None:
        surroundings = {**os.environ, "LVM_OUTPUTS": str(folder), "PYTHONPATH": str(ROOT)}
        with open(folder / "output.log", "a", encoding="utf-8") as output:
            os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, *arguments], surroundings)

    def one(folder: Path) -> dict:
        left = end_of(folder, judged=True)
        for path in folder.glob("*.ipynb"):
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            left[path.name] = [c["execution_count"] is not None for c in cells if c["cell_type"] == "code"]
        return left

    return Job(name, run, lambda folder: {n: one(folder / n) for n in folders}, command=True)


def commands() -> list[Job]:
    train = ["-m", "lvmlib", "train", "-p", "version", "v22", "-p", "model", "amn", "-p", "fast", "True"]
    small = ["versions=p6 v22", "models=amn", "seeds=1", "fast=true"]
    sweep = ["-m", "snakemake", "--cores", "2", "--quiet", "all", "--config", *small]
    p6, v22 = (f"fast/wikipedia/{v}/seed0-amn" for v in ("p6", "v22"))
    return [command_job("train.ipynb", train, [v22]), command_job("a sweep", sweep, [p6, v22])]


def jobs() -> list[Job]:
    data = make_data()
    shared = {"control": {"guard": "none"}}
    return [
        training_job("v22, AMN", version("v22", epochs=4), data),
        training_job("share, rewinding", guarded(name="share", model="amn", overrides=shared), data),
        training_job("v22, LSTM (dropout)", version("v22", model="lstm", epochs=4), data),
        training_job("rank, listwise", version("rank", model="bilinear", epochs=5), data),
        training_job("bounded, constrained", version("bounded", model="bilinear", epochs=5, log_every=1), data),
        training_job("energy, sampling", version("energy", model="sampler", epochs=5), data),
        training_job("margin, bfloat16", version("margin", epochs=4, precision="bfloat16"), data),
        training_job("v22 with its 5CAT", version("v22", epochs=2), data, judged=True),
    ]


def started(job: Job, folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            job.run(folder)
        except BaseException as e:
            print(f"{job.name}: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    with contextlib.suppress(PermissionError):  # it is another program already, and has done so itself
        os.setpgid(pid, pid)  # here, too: a kill may come before it could
    return pid


def timed(job: Job, folder: Path) -> float:
    """Do the job without a kill: seconds."""
    folder.mkdir(parents=True)
    begun = time.monotonic()
    assert os.waitpid(started(job, folder), 0)[1] == 0, job.name
    return time.monotonic() - begun


def killed(job: Job, folder: Path, usual: float, seed: int, most: int, trial: int) -> Iterator[Kill]:
    """Begin the job in `folder`, and kill it once or oftener, `most` times at most; then let it end.

    The moments are of `seed` and `trial` alone: a kill that came too late, on a faster machine, shifts no other's.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, trial])
    for count in range(1, most + 1):
        share = rng.uniform()
        pid = started(job, folder)
        time.sleep(share * usual)
        os.killpg(pid, signal.SIGKILL)
        ended = os.waitpid(pid, 0)[1]
        if ended != signal.SIGKILL:
            assert ended == 0, f"{job.name}: failed before it was killed"
            break
        yield Kill(job.name, share, trial)
        if rng.uniform() > AGAIN or count == most:
            break
    assert os.waitpid(started(job, folder), 0)[1] == 0, f"{job.name}: does not go on after a kill"


def unlike(ours, theirs, at: str = "") -> list[str]:
    """Where two ends differ."""
    if type(ours) is not type(theirs):
        return [at]
    if isinstance(ours, dict):
        keys = ours.keys() | theirs.keys()
        return [x for k in keys for x in unlike(ours.get(k), theirs.get(k), f"{at}/{k}")]
    if isinstance(ours, list) and len(ours) == len(theirs):
        return [x for i, pair in enumerate(zip(ours, theirs, strict=True)) for x in unlike(*pair, f"{at}/{i}")]
    alike = {torch.Tensor: torch.equal, pd.DataFrame: pd.DataFrame.equals}
    same = alike.get(type(ours), lambda a, b: a == b or (a != a and b != b))
    return [] if same(ours, theirs) else [at]


def campaign(
    todo: list[Job], kills: int, seed: int, place: Path, most: int = MOST
) -> tuple[list[Kill], dict[tuple[str, int], list[str]]]:
    """`kills` kills, job by job, `most` in one folder: each kill, and for each trial (job, number) where its end
    differs from the whole's."""
    found, ends, whole = [], {}, {}
    if not todo[0].command:
        (place / "first").mkdir()
        todo[0].run(place / "first")  # here: what is imported at first use would else be most of every job's time
    for job in todo:
        usual = timed(job, place / "whole" / job.name)
        whole[job.name] = usual, job.end(place / "whole" / job.name)
    trial = 0
    while len(found) < kills:
        job = todo[trial % len(todo)]
        usual, wanted = whole[job.name]
        folder = place / f"{trial}" / job.name
        before = len(found)
        found += killed(job, folder, usual, seed, min(most, kills - len(found)), trial)
        if len(found) > before:
            ends[job.name, trial] = unlike(job.end(folder), wanted)
            left = (folder.rglob(f"*.{end}") for end in ("partial", "lock", "partial.ipynb"))
            ends[job.name, trial] += [str(path) for paths in left for path in paths]
        trial += 1
    return found, ends


def main(kills: int = 30, seed: int = 0, kind: str = "jobs") -> int:
    torch.set_num_threads(1)
    runs.WAIT, runs.commit = 2.0, lambda: "a commit"  # whoever edits meanwhile changes nothing
    with tempfile.TemporaryDirectory(prefix="lvm-kills-") as place:
        begun = time.monotonic()
        todo = commands() if kind == "commands" else jobs()
        found, ends = campaign(todo, kills, seed, Path(place))
        seconds = time.monotonic() - begun
    print("| job | trials | kills | at which share of its time | identical |\n|---|---|---|---|---|")
    for job in todo:
        shares = [f"{kill.share:.0%}" for kill in found if kill.job == job.name]
        trials = [differ for (name, _), differ in ends.items() if name == job.name]
        if shares:
            print(f"| {job.name} | {len(trials)} | {len(shares)} | {', '.join(shares)} | {not any(trials)} |")
    several = sum(sum(k.trial == t for k in found) > 1 for t in {k.trial for k in found})
    print(f"\n{len(found)} kills in {len(ends)} trials ({several} with several), seed {seed}, {seconds:.0f} s")
    for (name, trial), differ in ends.items():
        if differ:
            print(f"DIFFERS: {name}, trial {trial}: {', '.join(differ[:8])}")
    return int(any(ends.values()))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3]), *sys.argv[3:]))
