"""Training a run by several processes: what may be asked for, and starting them on this machine.

A notebook's kernel cannot be several processes (to fork it is unsafe once CUDA or OpenMP has started). So it writes the
run's folder, starts `torchrun … -m lvmlib parallel FOLDER`, and reads each epoch's row from the folder as it appears; a
finished run looks the same however it was trained. torchrun ends all processes when one fails; they also end with the
kernel that started them, by their standard input. For several hosts the user starts the same command on every host, or
under srun. FOLDER must have the same path on all hosts; only the first process writes to it.
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

PROCESS = ("lvmlib", "parallel")  # what the processes run, after `python -m`
ATTACHED = "--attached"  # the word by which they know that a notebook launched them
STRATEGIES = ("auto", "ddp")
EPOCH = "lvmlib.parallel: epoch"  # what the first process prints when a row is in the folder
FAILED = "lvmlib.parallel: process "  # how the last line of a process that fails begins
GRACE = 20.0  # seconds for the launcher to end the others, before they report themselves


class Group(NamedTuple):
    """How many processes a run is asked to have: one for each device of each host."""

    devices: int
    nodes: int

    @property
    def size(self) -> int:
        return self.devices * self.nodes


def group(version: Version, devices: int, nodes: int, strategy: str) -> Group | None:
    """The processes that these parameters ask for; None for one alone. Raises LVMError for impossible ones."""
    for name, value in (("devices", devices), ("nodes", nodes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LVMError(f"{name} is {value!r}; needed is a whole number, 1 or more")
    if strategy not in STRATEGIES:
        raise LVMError(
            f"strategy is {strategy!r}; needed is {' or '.join(STRATEGIES)}: every process holds the whole model"
        )
    asked = Group(devices, nodes)
    if asked.size == 1:
        return None
    if asked.size > version.batch_size:
        raise LVMError(
            f"devices {devices} times nodes {nodes} are more processes than a batch has windows "
            f"({version.batch_size}); raise batch_size, or ask for fewer"
        )
    if version.device not in ("auto", "cpu", "cuda"):
        raise LVMError(f"device {version.device!r}: several processes need auto, cpu or cuda")
    return asked


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


def launch(folder: Path, asked: Group, device: str) -> Iterator[None]:
    """Train the run prepared in `folder` by processes on this machine; yields when an epoch's row is there.

    Closing the iterator ends them. Raises LVMError with the message of the first that fails, or where the machine does
    not have the devices.
    """
    check_devices(asked, device)
    path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *path])}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // asked.devices)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={asked.devices}"]
    command += ["-m", *PROCESS, str(folder.resolve()), ATTACHED]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    output: collections.deque[str] = collections.deque(maxlen=60)
    try:
        for line in process.stdout:
            if line.startswith(EPOCH):
                yield
            else:
                output.append(line.rstrip())
        code = process.wait()
    finally:
        process.stdin.close()  # the processes end with it
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        process.stdout.close()
    if code:
        raise LVMError(
            f"{folder}: the run was ended. {_reason(list(output), asked.size)}\n"
            "The finished epochs are kept: the same call resumes the run"
        )


def _reason(output: list[str], size: int) -> str:
    """The message of the first process that failed, or torchrun's on its end."""
    words = [line.removeprefix("lvmlib.parallel: ") for line in output if line.startswith(FAILED)]
    ended = re.search(r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", "\n".join(output), re.DOTALL)
    if not words and ended:
        code = int(ended[2])
        how = f"by signal {-code} (9 where memory ran out)" if code < 0 else f"with exit code {code}"
        words = [f"process {int(ended[1]) + 1} of {size}: ended without a word, {how}"]
    return words[0] if words else "The last lines were\n" + "\n".join(output)


def describe(record: dict) -> str:
    """A sentence on the processes of a run by its run.yaml; empty for a run by one alone."""
    counts = list(record.get("computed", {}).get("processes", {}).items())
    if not counts:
        return ""
    parts = [f"from epoch {first} on by {size}" for first, size in counts[1:]]
    later = f", {', '.join(parts)}: not bit for bit the same as by a constant number" if parts else ""
    return f"Trained by {counts[0][1]} process{'es' if counts[0][1] > 1 else ''}{later}."
