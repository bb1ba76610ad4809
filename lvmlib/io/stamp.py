"""The commit that a rendered notebook was executed at, and whether the files behind its numbers have changed since."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from .limits import NOTEBOOK, read_bytes
from .paths import CHECKOUT, NOTEBOOKS

BEHIND = ["lvmlib", "params", *(f":(exclude)lvmlib/{name}" for name in ("share", "cli", "io", "report"))]
DIGITS = 12


def commit(notebook: str = "") -> str:
    """Return the checkout's commit, with `+` if files behind the numbers differ from it; empty outside a checkout.

    `notebook`: name of one of notebooks/ that counts among these files.
    """
    head = _git("rev-parse", f"--short={DIGITS}", "HEAD")
    if not head:
        return ""
    changed = _git("status", "--porcelain", "--", *BEHIND, f"notebooks/{notebook}.ipynb")
    return f"{head}+" if changed else head


def stamp(path: Path, notebook: str, before: str) -> bool:
    """Write into an executed notebook by which commit it ran; return whether that was the same throughout.

    `before`: `commit(notebook)` as it was before the execution.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    same = commit(notebook) == before
    content["metadata"]["lvmlib"] = {"commit": before if same else before.rstrip("+") + "+", "notebook": notebook}
    paths = {"input_path": f"notebooks/{notebook}.ipynb", "output_path": path.name}  # without this machine's folders
    content["metadata"].setdefault("papermill", {}).update(paths)
    write(path, content)
    return same


def write(path: Path, content: dict) -> None:
    """Write a notebook (as JSON)."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def given(path: Path) -> dict:
    """Return the parameters that papermill ran this notebook with; empty if it names none."""
    try:
        parameters = json.loads(read_bytes(path, NOTEBOOK))["metadata"]["papermill"]["parameters"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return parameters if isinstance(parameters, dict) else {}


def state(content: dict) -> tuple[str, str]:
    """Return whether an executed notebook (as JSON) is `current`, `stale` or `unknown`, and why."""
    if not _git("rev-parse", "HEAD"):
        return "unknown", "this is no git checkout"
    own = content.get("metadata", {}).get("lvmlib")
    own = own if isinstance(own, dict) else {}
    made, notebook = str(own.get("commit")), own.get("notebook")
    # Both come from a file that nobody vouches for, and become arguments of git.
    if not re.fullmatch(rf"[0-9a-f]{{{DIGITS},40}}\+?", made):
        return "stale", "it names no commit"
    if notebook not in [path.stem for path in NOTEBOOKS.glob("*.ipynb")]:
        return "stale", "it is not of one of notebooks/"
    if made.endswith("+"):
        return "stale", "it was rendered from uncommitted files"
    if _git("merge-base", "--is-ancestor", made, "HEAD") is None:
        return "stale", f"commit {made} is not in this history"
    if changed := _git("diff", "--name-only", made, "--", *BEHIND, f"notebooks/{notebook}.ipynb"):
        first, *others = changed.splitlines()
        return "stale", f"{first}{' and others' if others else ''} changed since {made}"
    return "current", f"rendered at commit {made}"


def _git(*arguments: str) -> str | None:
    """Return what git prints in the checkout; None if it fails or there is no checkout."""
    if CHECKOUT is None:
        return None
    try:
        command = ["git", *arguments]
        done = subprocess.run(command, check=False, cwd=CHECKOUT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
