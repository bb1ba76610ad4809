"""One of the processes that torchrun or srun starts: `python -m lvmlib parallel FOLDER`, or this module."""

from __future__ import annotations

import os
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
    if arguments[1:] not in ([], [ATTACHED]) or not arguments:
        print("usage: torchrun … -m lvmlib parallel FOLDER", file=sys.stderr)
        return 2
    if ATTACHED in arguments[1:]:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    folder, team = Path(arguments[0]), ALONE
    try:
        version = config.resolved(open_run(folder)[0]["parameters"], f"{folder / 'run.yaml'}: parameters")
        team = join(version.device)
        cut = (version.horizon, version.context_length, version.fast, version.direction)
        for row in train(version, open.dataset(version.data, *cut), folder, team=team):
            if team.first:
                print(f"{EPOCH} {row['epoch']:.0f}/{version.epochs}", flush=True)
        team.leave()
    except BaseException as e:
        _report(e, team)
        if team is ALONE and "TORCHELASTIC_RUN_ID" not in os.environ:
            return 1
        os._exit(1)  # not by the interpreter's end, which may wait for the others
    return 0


def _report(e: BaseException, team: Team) -> None:
    """Print an error as one line. A process that lost another one waits first: the other's own message says more."""
    if isinstance(e, Lost):
        time.sleep(GRACE)  # usually the launcher ends this process first
    message = str(e)
    if not isinstance(e, LVMError):
        traceback.print_exception(e)
        place = traceback.extract_tb(e.__traceback__)[-1]
        message = f"{type(e).__name__}: {e} ({Path(place.filename).name}, line {place.lineno})"
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    size = os.environ.get("WORLD_SIZE", team.size)
    print(f"{FAILED}{rank + 1} of {size}: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _end_with_parent() -> None:
    while os.read(0, 1024):  # it ends when the notebook's kernel is gone, or has closed it
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
