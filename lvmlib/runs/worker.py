"""One of the processes that torchrun or srun starts: `python -m lvmlib parallel FOLDER`."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback
from pathlib import Path

from .. import config
from ..data import open
from ..errors import LVMError
from .folder import open_run
from .launch import ATTACHED, EPOCH, FAILED, GRACE
from .run import train
from .team import ALONE, Lost, Team, join


def main(arguments: list[str]) -> int:
    """Train the run that is prepared or interrupted in FOLDER, as one of several processes. Returns the exit code."""
    attached = arguments[1:] == [ATTACHED]
    if not arguments or (arguments[1:] and not attached):
        print("usage: torchrun … -m lvmlib parallel FOLDER", file=sys.stderr)
        return 2
    if attached:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    folder, team = Path(arguments[0]), ALONE
    try:
        version = config.resolved(open_run(folder)[0]["parameters"], f"{folder / 'run.yaml'}: parameters")
        team = join(version.device)
        data = open.dataset(
            version.data, version.horizon, version.context_length, fast=version.fast, direction=version.direction
        )
        for row in train(version, data, folder, team=team):
            if team.first:
                print(f"{EPOCH} {row['epoch']:.0f}/{version.epochs}", flush=True)
        team.leave()
    except BaseException as e:
        return _failed(e, team)
    return 0


def _failed(e: BaseException, team: Team) -> int:
    """Report an error once: the first process does if all have it, the lost process if one was lost."""
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    if isinstance(e, Lost):
        time.sleep(GRACE)  # usually the launcher ends this process first
    elif rank:
        time.sleep(1)
    words = str(e)
    if not isinstance(e, LVMError):
        traceback.print_exception(e)
        place = traceback.extract_tb(e.__traceback__)[-1]
        words = f"{type(e).__name__}: {e} ({Path(place.filename).name}, line {place.lineno})"
    words = re.sub(r"\s+", " ", words)
    print(f"{FAILED}{rank + 1} of {os.environ.get('WORLD_SIZE', team.size)}: {words}", file=sys.stderr, flush=True)
    if team is ALONE and rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return 1
    os._exit(1)  # not by the interpreter's end, which may wait for the others


def _end_with_parent() -> None:
    while os.read(0, 1024):  # nothing to read when the notebook's kernel is gone, or has closed it
        pass
    os._exit(1)
