"""The commands behind the Makefile.

`python -m lvmlib train -p version v22 …` executes notebooks/train.ipynb through papermill with all of papermill's
options, puts the executed notebook and its HTML copy into the run's folder, and prints where they are and the verdict.
`python -m lvmlib encode -p source FOLDER -p out NAME` and `python -m lvmlib data -p data NAME` do the same with
notebooks/encode.ipynb and notebooks/data.ipynb; their notebooks lie in outputs/NAME/.
`torchrun … -m lvmlib parallel FOLDER` is a process of several that train the run prepared in FOLDER (`runs.worker`).
`python -m lvmlib render diagnostics outputs/showcase/diagnostics-v22.ipynb -p version v22` executes one of notebooks/
into a file, which then says by which code it was made (see `fingerprint`).
`python -m lvmlib gallery` makes a static site of what stands under outputs/ (see `gallery`).
`python -m lvmlib table` draws the runs under outputs/ together into outputs/showcase/versions.csv and .png.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ..config import Version, data_name, files, version
from ..errors import LVMError, said
from ..io import limits as untrusted
from ..io import stamp as fingerprint
from ..io.disk import TROUBLE, job_folder, set_aside, told, write_whole
from ..io.paths import ROOT, outputs
from ..report import plots, summary
from ..runs import worker
from ..runs.folder import differences, run_folder
from ..share import gallery as gallery_module
from ..share import page
from ..text.build import store_folder
from .parameters import check_given

USAGE = """usage: python -m lvmlib train [papermill options, such as -p version v22 -p seed 1]
       python -m lvmlib encode -p source FOLDER -p out NAME [papermill options, such as -p unit sentence]
       python -m lvmlib data -p data NAME [papermill options]
       torchrun … -m lvmlib parallel FOLDER
       python -m lvmlib render NOTEBOOK OUT.ipynb [papermill options]
       python -m lvmlib gallery [--out FOLDER] [--showcase] [--fast]
       python -m lvmlib table"""

# papermill's own command, but that its kernel speaks through sockets in a folder of its own: Jupyter picks free TCP
# ports and closes them before the kernel opens them again, and the kernel of a command beside this may be quicker.
PAPERMILL = """
import functools, sys
from papermill import cli
from traitlets.config import Config
kernel = Config(KernelManager={"transport": "ipc", "connection_file": sys.argv.pop(1)})
cli.execute_notebook = functools.partial(cli.execute_notebook, config=kernel)
cli.papermill(prog_name="papermill")
"""
KEPT = "what was finished is kept, and the same command goes on from there"


def main(arguments: list[str]) -> int:
    commands = {"train": train, "encode": encode, "data": preflight, "parallel": worker.main}
    commands |= {"render": render, "gallery": gallery}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    if arguments == ["table"]:
        return table()
    print(USAGE, file=sys.stderr)
    return 2


def train(arguments: list[str]) -> int:
    begun = time.time()
    executed, p = _execute("train", arguments)
    if executed is None:
        return p
    folder = run_folder(_version(p), p["run_name"])
    _tell_run(executed, folder)
    stood = _keep(executed, folder / "train.ipynb")
    if stood and (folder / "run.yaml").stat().st_mtime < begun:
        # The run was only opened. The new notebook tells of it what the old one told, and takes over its time: else a
        # sweep would make diagnostics and 5CAT of that run again.
        os.utime(folder / "train.ipynb", ns=(stood.st_atime_ns, stood.st_mtime_ns))
    report = json.loads((folder / "fivecat.json").read_text(encoding="utf-8"))
    print(f"verdict   {report['verdict']['text']}\nreading   {report['reading']['text']}")
    return 0


def encode(arguments: list[str]) -> int:
    begun = time.time()
    executed, p = _execute("encode", arguments)
    if executed is None:
        return p
    store = store_folder(p["source"], p["unit"], p["out"], p["vectors"] is not None, bool(p["fast"]))
    notebook = _kept(p) / store.name / "encode.ipynb"
    if notebook.exists() and (store / "datasheet.yaml").stat().st_mtime < begun:
        executed.unlink()  # the store was only opened: the notebook that stands there tells how it was made
        print(f"\nThe store was there already.\nnotebook  {_short(notebook)}")
    else:
        _keep(executed, notebook)
    known = store.name if store.parent == outputs() / "datasets" else store  # such a one is known by its name
    print(f"store     {_short(store)}\nnext      make data DATA={known}; make train VERSION=v22 DATA={known}")
    return 0


def preflight(arguments: list[str]) -> int:
    executed, p = _execute("data", arguments)
    if executed is None:
        return p
    name = data_name(files(p["data"]))
    said = _last_words(json.loads(executed.read_text(encoding="utf-8")))
    _keep(executed, _kept(p) / name / ("data.ipynb" if p["horizon"] == 2 else f"data-horizon{p['horizon']}.ipynb"))
    print(f"verdict   {said}")
    return 0


def render(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[0].startswith("-") or not arguments[1].endswith(".ipynb"):
        print(USAGE, file=sys.stderr)
        return 2
    executed, p = _execute(_notebook(arguments[0]), arguments[2:])
    if executed is None:
        return p
    notebook = Path(arguments[1])
    _move(executed, notebook)
    print(f"\nnotebook  {_short(notebook)}")
    return 0


def gallery(arguments: list[str]) -> int:

    parser = argparse.ArgumentParser("python -m lvmlib gallery", description="A static site of the runs under outputs/")
    parser.add_argument("--out", type=Path, help="the folder; else outputs/gallery")
    parser.add_argument("--showcase", action="store_true", help="with the committed notebooks of outputs/showcase")
    parser.add_argument("--fast", action="store_true", help="with fast runs, marked as such")
    given = parser.parse_args(arguments)
    index, counts = gallery_module.build(given.out, showcase=given.showcase, fast=given.fast)
    print(f"gallery   {_short(index)}\ncards     {counts['runs']} runs, {counts['notebooks']} other notebooks")
    return 0


def _notebook(given: str) -> str:
    """The name of one of our notebooks, which `given` is or leads to. Raises LVMError for any other: a fingerprint is
    taken of notebooks/ alone."""
    known = {path.stem: path.resolve() for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    for name, path in known.items():
        if given == name or Path(given).resolve() == path:
            return name
    raise LVMError(
        f"{given}: not one of notebooks/ here ({', '.join(known)}); name one of these, as in: python -m lvmlib render "
        "notebooks/compare.ipynb OUT.ipynb. Your own notebook is run by: papermill NOTEBOOK OUT.ipynb"
    )


def _execute(name: str, arguments: list[str]) -> tuple[Path, dict] | tuple[None, int]:
    """Execute notebooks/NAME.ipynb by papermill: the executed notebook and its parameters, or None and exit code.

    The executed notebook is stamped with the code that it is of."""
    _check_parameters(name, arguments)
    before = fingerprint.template(name)
    executed = _aside(name)
    # Whoever calls, a person does not watch this kernel: one line an epoch.
    environment = {k: v for k, v in os.environ.items() if k != "JPY_SESSION_NAME"}
    environment["LVM_OUTPUTS"] = str(outputs().absolute())  # papermill and the kernel start from the checkout
    try:
        done = _papermill([f"notebooks/{name}.ipynb", str(_short(executed.absolute(), ROOT)), *arguments], environment)
    except (KeyboardInterrupt, SystemExit):  # papermill has been killed by then; the kernel sees it, and ends
        executed.unlink(missing_ok=True)
        raise
    begun = executed.exists() and executed.stat().st_size > 0
    if not begun:
        executed.unlink(missing_ok=True)
    if done.returncode:
        errors = _errors(executed)
        if errors and errors[-1].startswith("LVMError: "):  # says all there is to say
            executed.unlink()
            print(f"\n{errors[-1]}", file=sys.stderr)
        else:
            print((not errors and _cause(done.stderr, executed)) or done.stderr, file=sys.stderr)
            if begun:
                print(f"Failed; the notebook as far as it came: {_short(_in_sight(executed))}", file=sys.stderr)
        return None, done.returncode
    if not begun:  # papermill was asked for help
        return None, 0
    if not fingerprint.ran(json.loads(executed.read_text(encoding="utf-8"))):
        print(f"\nPrepared, not executed: {_short(_in_sight(executed))}")
        return None, 0
    with told(executed, KEPT):
        certain = fingerprint.stamp(executed, before)
    if not certain:
        print("The code was changed while the notebook ran: it does not count as of the present code.")
    return executed, _parameters(json.loads(executed.read_text(encoding="utf-8")))


def _aside(name: str) -> Path:
    """A new file in outputs() to execute a notebook into, which this process holds until it ends: a refused run must
    not overwrite the notebook of the run that stands there.

    It is hidden, so that what killed processes left is known, and nobody's: that is taken away. The lock is the
    system's (flock); a process id would be another's in another container.
    """
    with told(outputs(), KEPT):
        outputs().mkdir(parents=True, exist_ok=True)
        for left in outputs().glob(".*.????????.partial.ipynb"):
            with contextlib.suppress(OSError), open(left, "rb+") as other:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
        while True:
            executed = outputs() / f".{name}.{secrets.token_hex(4)}.partial.ipynb"
            file = os.open(executed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            with contextlib.suppress(OSError):  # a file system that has no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if executed.exists():  # else another process took it away before it was held
                return executed


def _in_sight(executed: Path) -> Path:
    """Give a notebook that did not come to its end, or not to its place, a name that is not hidden; its new path. By
    its suffix it is none that the gallery shows."""
    seen = executed.with_name(executed.name.removeprefix("."))
    with told(seen, f"the notebook is {_short(executed)}"):
        return executed.rename(seen)


def _papermill(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run papermill in the checkout. What the cells print is shown as it comes; papermill's own words are kept."""
    with job_folder() as place:
        command = [sys.executable, "-c", PAPERMILL, f"{place}/kernel.json", "--no-progress-bar", "--stdout-file", "-"]
        environment = environment | {"IPYTHONDIR": place, "JUPYTER_RUNTIME_DIR": place}
        return subprocess.run(
            [*command, *arguments], check=False, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )


def _cause(said: str, executed: Path) -> str:
    """What papermill itself died of by its last words, on one line; empty where that is for it to tell."""
    last = (said.strip().splitlines() or [""])[-1]
    if last.endswith("DeadKernelError: Kernel died"):
        return (
            "LVMError: the kernel was killed, perhaps for want of memory, or because a store that it reads was cut "
            f"short in place. To do: free some memory, or restore that store; {KEPT} (a training from its last "
            "checkpoint, which is intact)"
        )
    refused = re.fullmatch(r"\w*Error: \[Errno (\d+)\] [^:]*(?:: '(.*)')?", last)
    if not refused or int(refused[1]) not in TROUBLE:
        return ""
    number, where = int(refused[1]), [str(ROOT / refused[2])] if refused[2] else []
    try:
        with told(executed, KEPT):
            raise OSError(number, os.strerror(number), *where)
    except LVMError as e:
        return f"LVMError: {e}"


def _check_parameters(name: str, arguments: list[str]) -> None:
    """Raise LVMError where papermill's options name no parameter of the notebook, or give one no plain value."""
    import click
    import papermill.cli

    try:
        options = papermill.cli.papermill.make_context(
            "papermill", [name, name, *arguments], resilient_parsing=True
        ).params
        given = [dict(options[key]) for key in ("parameters", "parameters_raw")]
        given += [untrusted.read_yaml(ROOT / path) for path in options["parameters_file"]]  # papermill starts there
        texts = [*map(str.encode, options["parameters_yaml"]), *map(base64.b64decode, options["parameters_base64"])]
        given += map(untrusted.from_yaml, texts)
    except (click.ClickException, click.exceptions.Exit):
        return  # papermill says what is wrong with its options, or helps
    except (OSError, ValueError) as e:
        raise LVMError(f"parameters: cannot be read ({said(e)}); look at the options -f, -y and -b") from e
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    known = _parameters(notebook)
    for parameters in given:
        if not isinstance(parameters, dict | None):
            raise LVMError(f"parameters: {str(parameters)[:80]!r} is no `name: value`")
        check_given(parameters or {}, known)


def _keep(executed: Path, notebook: Path) -> os.stat_result | None:
    """Move an executed notebook to its place, with an HTML copy, and say where they are.

    One that stands there and was run with other parameters is set aside, as NAME.old-1.ipynb and so on; of one that is
    replaced, what the system knows of it is returned.
    """
    stood = notebook.stat() if notebook.exists() else None
    if stood and not _alike(notebook, executed):
        print(f"\nset aside  {_short(set_aside(notebook, '.html'))}: it was run with other parameters")
        stood = None
    _move(executed, notebook)
    page.write(notebook, notebook.with_suffix(".html"))
    print(f"\nnotebook  {_short(notebook)}\nHTML      {_short(notebook.with_suffix('.html'))}")
    return stood


def _alike(*notebooks: Path) -> bool:
    """Whether two executed notebooks were run with the same parameters, given or not; those of train.ipynb, whether
    they make the same run. A damaged notebook is like no other."""
    try:
        one, other = (_parameters(json.loads(path.read_text(encoding="utf-8"))) for path in notebooks)
        if "version" in one:  # None is what the version says, which may be given as well
            return not differences(*({"parameters": _version(p).to_dict()} for p in (one, other)))
        return one == other
    except Exception:  # whatever a damaged file makes its reader raise
        return False


def _version(p: dict) -> Version:
    """The version that train.ipynb trains by these parameters."""
    keys = ("data", "model", "epochs", "direction", "seed", "device", "precision", "trouble", "fast")
    return version(p["version"], p["overrides"], **{k: p.get(k) for k in keys})


def _move(executed: Path, notebook: Path) -> None:
    """Move an executed notebook to its place, which may be on another disk: it appears there whole or not at all."""
    try:
        with told(notebook):
            notebook.parent.mkdir(parents=True, exist_ok=True)
        write_whole(notebook, lambda partial: shutil.copyfile(executed, partial))
    except LVMError:
        print(f"\nThe executed notebook is {_short(_in_sight(executed))}", file=sys.stderr)
        raise
    executed.unlink()


def _tell_run(executed: Path, folder: Path) -> None:
    """Put what the gallery tells of a run into its stamped notebook, which may be shown apart from the folder."""

    content = json.loads(executed.read_text(encoding="utf-8"))
    content["metadata"].setdefault("lvmlib", {})["run"] = gallery_module.facts(folder)
    with told(executed, KEPT):
        fingerprint.write(executed, content)


def _kept(p: dict) -> Path:
    return outputs() / "fast" if p["fast"] else outputs()


def table() -> int:

    frame = summary.runs()
    folder = outputs() / "showcase"
    with told(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "versions.csv", lambda p: frame.to_csv(p, index=False, float_format="%.6g"))
    plots.use_style()
    write_whole(folder / "versions.png", lambda p: plots.versions(frame).savefig(p, format="png", dpi=110))
    print(summary.markdown(summary.by_version(frame)))
    return 0


def _parameters(notebook: dict) -> dict:
    """The parameters that an executed notebook ran with: its parameters cell, then what papermill injected."""
    values = {}
    for cell in notebook["cells"]:
        if {"parameters", "injected-parameters"} & set(cell["metadata"].get("tags", [])):
            for node in ast.parse("".join(cell["source"])).body:
                values[node.targets[0].id] = ast.literal_eval(node.value)
    values["fast"] = values["fast"] or os.environ.get("LVM_FAST") == "1" or None
    return values


def _errors(executed: Path) -> list[str]:
    """The errors in an executed notebook; none where papermill was killed while it wrote it, or before."""
    try:
        notebook = json.loads(executed.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    return [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]


def _last_words(notebook: dict) -> str:
    """The conclusion that a notebook ends its verdict with: what the cell tagged so displayed, as plain text."""
    (cell,) = [c for c in notebook["cells"] if "conclusion" in c["metadata"].get("tags", [])]
    return " ".join("".join(o["data"]["text/markdown"]) for o in cell["outputs"] if "data" in o).replace("*", "")


def _short(path: Path, start: Path | None = None) -> Path:
    start = start or Path.cwd()
    return path.relative_to(start) if path.is_relative_to(start) else path


def _terminated(number: int, frame: object) -> None:
    print("\nTerminated. What was finished is kept: the same command goes on from there.", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def run() -> None:
    signal.signal(signal.SIGTERM, _terminated)  # else papermill and its kernel would train on, with nobody to stop them
    try:
        sys.exit(main(sys.argv[1:]))
    except LVMError as e:
        sys.exit(str(e))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. What was finished is kept: the same command goes on from there.")
