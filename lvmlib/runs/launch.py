"""Training a run by several processes: which are asked for, and starting them on this machine.

A notebook's kernel writes the run's folder, starts torchrun with a `worker` for each process, and reads each epoch's
row from the folder as it appears. torchrun ends all processes when one fails; they also end with the kernel that
started them, when their standard input closes.

On several hosts the user starts `torchrun … -m lvmlib parallel FOLDER` on every host, or once under srun. FOLDER must
have the same path on all hosts; only the first process writes to it.
"""

from __future__ import annotations

import collections
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .. import errors
from ..config import Version
from ..errors import LVMError
from ..io.paths import PACKAGE

WORKER = "lvmlib.runs.worker"  # the module that the processes run: `python -m lvmlib parallel` imports far more
ATTACHED = "--attached"  # their argument if a notebook launched them
EPOCH = "lvmlib.parallel: epoch"  # what the first process prints when a row is in the folder
FAILED = "lvmlib.parallel: process "  # how the last line of a process that fails begins
GRACE = 20.0  # seconds for the launcher to end the others, before they report themselves


class Group(NamedTuple):
    """How many processes a run is asked to have: one for each device of each host."""

    devices: int
    nodes: int


def group(version: Version, devices: int, nodes: int, strategy: str) -> Group | None:
    """The processes that these parameters ask for; None for one alone. Raises LVMError for impossible ones."""
    for name, value in (("devices", devices), ("nodes", nodes)):
        if type(value) is not int or value < 1:
            raise LVMError(f"{name} is {value!r}; needed is a whole number, 1 or more")
    if strategy not in ("auto", "ddp"):
        raise LVMError(f"strategy is {strategy!r}; needed is auto or ddp")
    if devices * nodes == 1:
        return None
    if devices * nodes > version.batch_size:
        raise LVMError(
            f"devices {devices} times nodes {nodes} are more processes than a batch has windows "
            f"({version.batch_size}); raise batch_size, or ask for fewer"
        )
    if version.device not in ("auto", "cpu", "cuda"):
        raise LVMError(f"device {version.device!r}: several processes need auto, cpu or cuda")
    return Group(devices, nodes)


def commands(folder: Path, asked: Group) -> str:
    """The commands that start a prepared run on several hosts."""
    run = f"-m lvmlib parallel {shlex.quote(str(folder.resolve()))}"
    return (
        f"on each host, with the first one's name for HOST: torchrun --nnodes {asked.nodes} --nproc-per-node "
        f"{asked.devices} --rdzv-backend c10d --rdzv-endpoint HOST:29400 --rdzv-id lvmlib {run} — or once, under "
        f"Slurm: srun --nodes {asked.nodes} --ntasks-per-node {asked.devices} --kill-on-bad-exit=1 python {run}"
    )


def check_devices(asked: Group, device: str) -> None:
    """Raise LVMError if this machine cannot start the processes."""
    errors.require("lightning_fabric", "parallel")
    gpus = torch.cuda.device_count()
    on_cpu = device == "cpu" or (device == "auto" and not gpus)
    if not on_cpu and asked.devices > gpus:
        raise LVMError(f"devices is {asked.devices}; this machine has {gpus} that CUDA sees. Ask for as many, or cpu")


def launch(folder: Path, asked: Group) -> Iterator[None]:
    """Train the run prepared in `folder` by processes on this machine; yields when an epoch's row is there.

    Closing the iterator ends them. Raises LVMError with the message of the first that fails.
    """
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    threads = str(max(1, (os.cpu_count() or 1) // asked.devices))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={asked.devices}"]
    command += ["-m", WORKER, str(folder.resolve()), ATTACHED]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, **pipes, env=environment, text=True, errors="replace", start_new_session=True)
    output: collections.deque[str] = collections.deque(maxlen=60)
    try:
        for line in process.stdout:
            if line.startswith(EPOCH):
                yield
            else:
                output.append(line.rstrip())
        process.wait()
    finally:
        process.stdin.close()  # the processes end with it
        try:
            process.terminate()
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
    if process.returncode:
        raise LVMError(
            f"{folder}: the run was ended. {_reason(list(output), asked.devices)}\n"
            "The finished epochs are kept: the same call resumes the run"
        )


def _reason(output: list[str], size: int) -> str:
    """The message of the first process that failed, or torchrun's on its end."""
    failed = [line for line in output if line.startswith(FAILED)]
    if failed:
        return failed[0].removeprefix("lvmlib.parallel: ")
    ended = re.search(r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", "\n".join(output), re.DOTALL)
    if not ended:
        return "The last lines were\n" + "\n".join(output)
    code = int(ended[2])
    how = f"by signal {-code} (9 if memory ran out)" if code < 0 else f"with exit code {code}"
    return f"process {int(ended[1]) + 1} of {size}: ended without a message, {how}"


def describe(record: dict) -> str:
    """A sentence on the processes of a run by its run.yaml; empty for a run by one alone."""
    counts = record.get("computed", {}).get("processes", {})
    if not counts:
        return ""
    (_, size), *later = counts.items()
    words = [f"Trained by {size} process" + "es" * (size > 1)]
    words += [f"from epoch {first} on by {size}" for first, size in later]
    return ", ".join(words) + (": not bit for bit the same as by a constant number." if later else ".")
