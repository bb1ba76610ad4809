"""python workflow/notebook.py NAME OUTPUT PARAMETERS GPUS: a job of a sweep, notebooks/NAME.ipynb through papermill.

While it runs, and where it fails, OUTPUT's stem + .partial.ipynb holds what has been executed, with the error; OUTPUT
appears whole or not at all. PARAMETERS are JSON, GPUS how many it may use (0: no word on that).
"""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(name: str, output: Path, parameters: dict, gpus: int) -> int:
    import papermill
    from traitlets.config import Config

    from lvmlib.io import stamp as fingerprint
    from lvmlib.io.disk import job_folder

    partial = output.with_suffix(".partial.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    if partial.is_symlink():
        partial.unlink()  # it came with the folder, and would lead what is written elsewhere
    # A sweep that was killed may have left a job alive (on another machine, say): two must not train in one folder. The
    # lock is on the partial notebook itself, ends with the process, and moves with the file when it gets its name.
    with open(partial, "a") as lock, job_folder() as place:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{partial}: another job is at it; waiting for its end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if output.exists():
            partial.unlink(missing_ok=True)
            print(f"{output}: another job has made it")
            return 0
        held = hold_gpus(gpus)
        # Jupyter picks free TCP ports and closes them before the kernel opens them again; another kernel may be
        # quicker. Sockets in a folder of the job's own cannot be taken. IPython's history has one writer, too.
        os.environ |= {"IPYTHONDIR": place, "JUPYTER_RUNTIME_DIR": place}
        kernel = Config(KernelManager={"transport": "ipc", "connection_file": f"{place}/kernel.json"})
        os.environ.pop("JPY_SESSION_NAME", None)  # no person watches this kernel: one line an epoch
        os.chdir(ROOT)  # the notebook's metadata names no machine
        before = fingerprint.template(name)
        shown = partial.relative_to(ROOT) if partial.is_relative_to(ROOT) else partial
        try:
            papermill.execute_notebook(
                f"notebooks/{name}.ipynb", str(shown), parameters, progress_bar=False, start_timeout=600, config=kernel
            )
        except papermill.PapermillExecutionError as e:
            print(f"{e.ename}: {e.evalue}\nFailed; the notebook as far as it came: {shown}", file=sys.stderr)
            return 1
        fingerprint.stamp(partial, before)
        os.fsync(lock.fileno())
        os.replace(partial, output)
        for gpu in held:
            gpu.close()
    return 0


def hold_gpus(wanted: int) -> list:
    """Restrict this process to `wanted` GPUs that no other job on this machine holds; wait until there are as many.

    Where a scheduler shows no more than were asked for, they are taken as they are. Returns the locks.
    """
    shown = visible_gpus() if wanted else []
    if len(shown) <= wanted:
        return []
    while True:
        held, theirs = {}, 0
        for gpu in shown:
            path = Path(tempfile.gettempdir()) / f"lvm-gpu-{gpu}.lock"
            try:  # a folder that others write to as well: no link is followed, nothing is cut short
                made = 0 if path.exists() else os.O_CREAT
                lock = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | made, 0o644))
            except OSError as e:
                theirs += 1
                if theirs > len(shown) - wanted:
                    raise SystemExit(f"{path}: cannot be opened ({e.strerror}); remove it, or set gpus to 0") from e
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                continue
            held[gpu] = lock
            if len(held) == wanted:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(held)
                return list(held.values())
        held.clear()
        time.sleep(1 + os.getpid() % 7)  # not all at the same time


def visible_gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    try:
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])))
