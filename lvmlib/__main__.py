"""`python -m lvmlib train -p version v22 …`: what `make train` runs.

Executes notebooks/train.ipynb through papermill with all of papermill's options, puts the executed notebook and its
HTML copy into the run's folder, and prints where they are and the verdict.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .params import OUTPUTS, ROOT, version
from .training import run_folder


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] != "train":
        print("usage: python -m lvmlib train [papermill options, such as -p version v22 -p seed 1]", file=sys.stderr)
        return 2
    OUTPUTS.mkdir(exist_ok=True)
    # Executed aside: a refused run must not overwrite the notebook of the run that stands there.
    executed = OUTPUTS / f"train.{os.getpid()}.ipynb"
    code = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            "--log-output",
            "--no-progress-bar",
            ROOT / "notebooks" / "train.ipynb",
            executed,
            *arguments[1:],
        ],
        check=False,
    ).returncode
    if code:
        if executed.exists():
            print(f"\nFailed; the notebook as far as it came: {_short(executed)}", file=sys.stderr)
        return code
    p = json.loads(executed.read_text(encoding="utf-8"))["metadata"]["papermill"]["parameters"]
    keys = ("data", "model", "epochs", "seed", "device", "precision", "fast")
    folder = run_folder(version(p["version"], p.get("overrides"), **{k: p.get(k) for k in keys}), p.get("run_name"))
    notebook = folder / "train.ipynb"
    executed.replace(notebook)
    subprocess.run(
        [sys.executable, "-m", "nbconvert", "--log-level=ERROR", "--to=html", "--embed-images", notebook], check=True
    )
    verdict = json.loads((folder / "fivecat.json").read_text(encoding="utf-8"))["verdict"]["text"]
    print(f"\nnotebook  {_short(notebook)}\nHTML      {_short(notebook.with_suffix('.html'))}\nverdict   {verdict}")
    return 0


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
