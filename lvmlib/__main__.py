"""The commands behind the Makefile.

`python -m lvmlib train -p version v22 …` executes notebooks/train.ipynb through papermill with all of papermill's
options, puts the executed notebook and its HTML copy into the run's folder, and prints where they are and the verdict.
`python -m lvmlib table` draws the runs under outputs/ together into outputs/showcase/versions.csv and .png.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

from .errors import LVMError
from .params import ROOT, version
from .training import outputs, run_folder, write_whole

USAGE = """usage: python -m lvmlib train [papermill options, such as -p version v22 -p seed 1]
       python -m lvmlib table"""


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["train"]:
        return train(arguments[1:])
    if arguments == ["table"]:
        return table()
    print(USAGE, file=sys.stderr)
    return 2


def train(arguments: list[str]) -> int:
    outputs().mkdir(parents=True, exist_ok=True)
    # Executed aside: a refused run must not overwrite the notebook of the run that stands there. Paths start from the
    # checkout, so that the notebook's metadata names no machine.
    executed = outputs() / f"train.{os.getpid()}.ipynb"
    # Whoever calls, a person does not watch this kernel: one line an epoch.
    environment = {k: v for k, v in os.environ.items() if k != "JPY_SESSION_NAME"}
    options = ["--log-output", "--no-progress-bar", "notebooks/train.ipynb", _short(executed, ROOT)]
    code = subprocess.run(
        [sys.executable, "-m", "papermill", *options, *arguments], check=False, cwd=ROOT, env=environment
    ).returncode
    if code:
        if executed.exists():
            print(f"\nFailed; the notebook as far as it came: {_short(executed)}", file=sys.stderr)
            for error in _errors(json.loads(executed.read_text(encoding="utf-8"))):
                print(error, file=sys.stderr)
        return code
    p = _parameters(json.loads(executed.read_text(encoding="utf-8")))
    keys = ("data", "model", "epochs", "direction", "seed", "device", "precision", "fast")
    folder = run_folder(version(p["version"], p["overrides"], **{k: p[k] for k in keys}), p["run_name"])
    notebook = folder / "train.ipynb"
    executed.replace(notebook)
    subprocess.run(
        [sys.executable, "-m", "nbconvert", "--log-level=ERROR", "--to=html", "--embed-images", notebook], check=True
    )
    report = json.loads((folder / "fivecat.json").read_text(encoding="utf-8"))
    print(f"\nnotebook  {_short(notebook)}\nHTML      {_short(notebook.with_suffix('.html'))}")
    print(f"verdict   {report['verdict']['text']}\nreading   {report['reading']['text']}")
    return 0


def table() -> int:
    from . import plots, summary

    frame = summary.runs()
    folder = outputs() / "showcase"
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


def _errors(notebook: dict) -> list[str]:
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    return [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]


def _short(path: Path, start: Path | None = None) -> Path:
    start = start or Path.cwd()
    return path.relative_to(start) if path.is_relative_to(start) else path


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LVMError as e:
        sys.exit(str(e))
