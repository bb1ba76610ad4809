"""Execute one of notebooks/ by papermill: in a temporary folder, then whole to its place."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

from ..errors import LVMError, format_error
from ..io import limits, stamp
from ..io.disk import explain_os_errors, write_atomic
from ..io.paths import NOTEBOOKS, ROOT, outputs
from .parameters import assigned, check_given

RESUMABLE = "what was finished is kept, and the same command goes on from there"
KILLED = (
    "LVMError: the kernel was killed, perhaps for want of memory, or because a store that it reads was cut short. Free "
    f"some memory, or restore that store; {RESUMABLE}"
)
KILLED_CODE = 138  # papermill's exit code for that
DISK_CODE = 74  # that of papermill_ipc.py after an error of the disk; the last line is an OSError's arguments, as JSON


@contextlib.contextmanager
def execute(notebook: str, options: Sequence[str], failed: Path | None = None) -> Iterator[tuple[Path, dict]]:
    """Execute notebooks/NOTEBOOK.ipynb with papermill's `options`; give the stamped result's path and its parameters.

    The file is deleted with the block; where the block fails, it is moved to outputs/. Raises typer.Exit after a
    message if nothing was executed to its end. `failed`: where the notebook grows and stays if it fails; without it a
    failed notebook is moved to outputs/, unless it ends with an LVMError, which says all.
    """
    check_options(notebook, options)
    commit = stamp.commit(notebook)
    with explain_os_errors(outputs(), RESUMABLE):
        outputs().mkdir(parents=True, exist_ok=True)
    near = "/tmp" if len(tempfile.gettempdir()) > 60 else None  # the path of a socket has at most 100 characters or so
    with tempfile.TemporaryDirectory(prefix="lvm-", dir=near, ignore_cleanup_errors=True) as place:
        path = failed or Path(place) / f"{notebook}.ipynb"
        with explain_os_errors(path, RESUMABLE):
            path.unlink(missing_ok=True)  # a link would lead elsewhere
        done = _papermill([str(NOTEBOOKS / f"{notebook}.ipynb"), str(path.absolute()), *options], place)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # papermill was asked for help, or was killed while it wrote
            content = {"cells": []}
        if done.returncode:
            _explain(done, path, content, failed)
            raise typer.Exit(done.returncode)
        if not content["cells"]:
            raise typer.Exit
        code = [c for c in content["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
        if not all(c.get("execution_count") for c in code):
            print(f"\nPrepared, not executed: {short(_move_partial(path))}")
            raise typer.Exit
        with explain_os_errors(path, RESUMABLE):
            if not stamp.stamp(path, notebook, commit):
                print("Files changed while the notebook ran. It counts as rendered from uncommitted files.")
        try:
            yield path, parameters(content)
        except BaseException:
            print(f"\nThe executed notebook is {short(failed or _move_partial(path))}", file=sys.stderr)
            raise


def move(executed: Path, notebook: Path) -> None:
    """Copy an executed notebook to its place: it appears there whole or not at all."""
    with explain_os_errors(notebook):
        notebook.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(notebook, lambda partial: shutil.copyfile(executed, partial))


def parameters(content: dict) -> dict:
    """Return the parameters that a notebook (as JSON) ran with: its parameters cell, then what papermill injected."""
    values = {}
    for cell in content["cells"]:
        if {"parameters", "injected-parameters"} & set(cell["metadata"].get("tags", [])):
            values |= assigned("".join(cell["source"]))
    values["fast"] = values["fast"] or os.environ.get("LVM_FAST") == "1" or None
    return values


def find_notebook(given: str) -> str:
    """Return the name of the notebook of notebooks/ that `given` names or leads to. Raises LVMError for any other."""
    known = {path.stem: path.resolve() for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    for name, path in known.items():
        if given == name or Path(given).resolve() == path:
            return name
    raise LVMError(
        f"{given}: not one of notebooks/ here ({', '.join(known)}); name one of these, or run your own notebook by: "
        "papermill NOTEBOOK OUT.ipynb"
    )


def check_options(notebook: str, options: Sequence[str]) -> None:
    """Raise LVMError if papermill's options name no parameter of the notebook, or give one that is no plain value."""
    import click
    import papermill.cli  # looks at stdin when imported

    try:
        parsed = papermill.cli.papermill.make_context(
            "papermill", [notebook, notebook, *options], resilient_parsing=True
        ).params
        given = [dict(parsed[key]) for key in ("parameters", "parameters_raw")]
        given += [limits.read_yaml(ROOT / path) for path in parsed["parameters_file"]]  # papermill starts there
        texts = [*map(str.encode, parsed["parameters_yaml"]), *map(base64.b64decode, parsed["parameters_base64"])]
        given += map(limits.from_yaml, texts)
    except (click.ClickException, click.exceptions.Exit):
        return  # papermill says what is wrong with its options, or helps
    except (OSError, ValueError) as e:
        raise LVMError(f"parameters: cannot be read ({format_error(e)}); look at the options -f, -y and -b") from e
    known = parameters(json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8")))
    for values in given:
        if not isinstance(values, dict | None):
            raise LVMError(f"parameters: {str(values)[:80]!r} is no `name: value`")
        check_given(values or {}, known)


def short(path: Path) -> Path:
    """Return the path as seen from the working directory, if it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _papermill(arguments: Sequence[str], place: str) -> subprocess.CompletedProcess:
    """Run papermill from ROOT. What cells print is shown as it comes; papermill's own messages are captured.

    `place`: a folder for the kernel's sockets and history.
    """
    # Nobody watches this kernel, whoever calls: one line an epoch.
    environment = {k: v for k, v in os.environ.items() if k != "JPY_SESSION_NAME"}
    environment["LVM_OUTPUTS"] = str(outputs().absolute())  # papermill and the kernel start from ROOT
    environment |= {"IPYTHONDIR": place, "JUPYTER_RUNTIME_DIR": place}
    command = [sys.executable, "-P", str(Path(__file__).with_name("papermill_ipc.py")), "--no-progress-bar"]
    command += ["--stdout-file", "-", "--start-timeout", "600", *arguments]
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode == DISK_CODE:
        try:
            with explain_os_errors(Path(place), RESUMABLE):
                raise OSError(*json.loads(done.stderr.splitlines()[-1]))
        except LVMError as e:
            done.returncode, done.stderr = 1, f"LVMError: {e}"
    return done


def _move_partial(path: Path) -> Path:
    """Move a notebook that was not finished, or has no place, to outputs/; no gallery shows its suffix.

    Where nothing can be written there, on a full disk, say, it goes to a temporary folder that stays.
    """
    target = outputs() / f"{path.stem}.{secrets.token_hex(4)}.partial.ipynb"
    try:
        write_atomic(target, lambda partial: shutil.copyfile(path, partial))
    except LVMError:
        target = Path(shutil.move(path, tempfile.mkdtemp(prefix="lvm-kept-")))
    return target


def _explain(done: subprocess.CompletedProcess, path: Path, content: dict, failed: Path | None) -> None:
    """Print why an execution failed, and where the notebook is."""
    shown = [output for cell in content["cells"] for output in cell.get("outputs", [])]
    errors = [f"{output['ename']}: {output['evalue']}" for output in shown if output["output_type"] == "error"]
    reason = errors[-1] if errors else done.stderr.strip().rpartition("\n")[2]
    if done.returncode == KILLED_CODE:
        reason = KILLED
    explained = reason.startswith("LVMError: ")
    print(f"\n{reason}" if explained else done.stderr, file=sys.stderr)
    if content["cells"] and (failed or not errors or not explained):
        print(f"Failed; the notebook as far as it came: {short(failed or _move_partial(path))}", file=sys.stderr)
