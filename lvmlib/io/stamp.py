"""Of which code a rendered notebook is: a fingerprint of the sources that make its numbers, and whether it still holds.

A fingerprint is a hash of what a file does: comments, docstrings and blank lines change nothing in it, and it does not
depend on the Python that takes it. A notebook depends on the rooms that it names and on all that these import, on the
version files and on the embedded data; a run (`software.sources` in its run.yaml) on what `training` says.

Whoever executes a notebook takes the fingerprint before and after, and stamps the executed one where both agree
(`metadata.lvmlib`). Nothing else stamps: a notebook that stands there cannot be made current but by executing it.
A stamp says what the notebook ran by. Of runs that it only opened (compare, diagnostics, 5CAT) it does not tell.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import json
import subprocess
import tokenize
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import yaml

from ..errors import LVMError
from .limits import NOTEBOOK, read_bytes
from .paths import PARAMS, ROOT

ROOMS = Path(__file__).resolve().parents[1]
DIGITS = 12
# What they do shows in no figure and no table; `untrusted` gives what a file says, or refuses it.
NO_NUMBERS = {"errors", "files", "fingerprint", "gallery", "page", "untrusted"}
EMBEDDED = ("data/wikipedia/datasheet.yaml",)  # holds the vectors' own hash


class State(NamedTuple):
    """What is known of a rendered notebook: `current`, `stale`, or `false` where its stamp is not its own; and why."""

    kind: str
    why: str


def sources(rooms: Iterable[str]) -> dict[str, str]:
    """The files behind these rooms (names of modules of lvmlib) and their hashes: all that they import, the version
    files, the embedded data. A room that is not there is left out."""
    found = {f"lvmlib/{path.name}": _of_code(path) for path in _reached(rooms)}
    found |= {f"params/{path.name}": _of_yaml(path) for path in sorted(PARAMS.glob("*.yaml"))}
    return found | {f"lvmlib/{name}": _of_yaml(ROOMS / name) for name in EMBEDDED if (ROOMS / name).exists()}


@functools.cache
def training(watched: bool = False) -> str:
    """One hash for the rooms that a run's weights and history come from: training.py and all that it imports.

    Left out are NO_NUMBERS and, but for a run that is `watched` (its `trouble` stops it or sends it back), alarms:
    where a run goes on whatever they say, they only tell. What they tell of a run is computed from its rows whenever
    it is shown, and a notebook that shows it depends on them by its own `sources`. parallel stays, with its words: it
    deals out windows and adds gradients. The run's parameters stand in its run.yaml, and its data's fingerprint, too.
    """
    left_out = set() if watched else {"alarms"}
    return _short(json.dumps({p.name: _of_code(p) for p in _reached(["training"]) if p.stem not in left_out}))


def notebook(content: dict) -> dict:
    """What a notebook (as JSON) ran, or would run by: {"cells": hash of its code cells, "sources": `sources`}."""
    code = _code(content)
    return {"cells": _short("\n\n".join(map(meaning, code))), "sources": sources(_named(code))}


def stamp(path: Path, before: dict) -> bool:
    """Write into an executed notebook what it ran by, where that is certain and it ran whole; say whether so.

    `before`: `notebook` of its template as it was before the execution.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    certain = ran(content) and notebook(content) == before
    content["metadata"]["lvmlib"] = {**before, "executed": _executed(content)} if certain else {}
    write(path, content)
    return certain


def ran(content: dict) -> bool:
    """Whether every code cell of a notebook (as JSON) was executed; papermill can be told only to prepare one."""
    cells = (c for c in content["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip())
    return all(c.get("execution_count") for c in cells)


def write(path: Path, content: dict) -> None:
    """Write a notebook (as JSON) in place: it lies aside still, and a lock on it stays."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def template(name: str) -> dict:
    """`notebook` of notebooks/NAME.ipynb as it stands. Raises LVMError where there is none."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    try:
        return notebook(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise LVMError(f"{path}: not a notebook that can be read ({type(e).__name__}); restore the file") from e


def given(path: Path) -> dict:
    """What papermill was told to run this notebook with; empty for a notebook that tells nothing."""
    try:
        told = json.loads(read_bytes(path, NOTEBOOK))["metadata"]["papermill"]["parameters"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def state(content: dict) -> State:
    """Whether an executed notebook (as JSON) is of the present code."""
    own = content.get("metadata", {}).get("lvmlib", {})
    came_from = Path(str(content.get("metadata", {}).get("papermill", {}).get("input_path") or "")).stem
    try:
        present = template(came_from)
    except LVMError:
        return State("stale", "it is of no notebook that is here")
    is_here = notebook(content)["cells"]
    if "cells" in own and (own["cells"], own.get("executed")) != (is_here, _executed(content)):
        return State("false", "its stamp is of another notebook or of another execution; render it again")
    if is_here != present["cells"]:
        return State("stale", f"its code cells differ from those of notebooks/{came_from}.ipynb")
    if "sources" not in own:
        return State("stale", "it does not say by which code it was made")
    then, now = own["sources"], present["sources"]
    if changed := [name for name in {**then, **now} if then.get(name) != now.get(name)]:
        others = f" and {len(changed) - 4} more" if len(changed) > 5 else ""
        return State("stale", f"{', '.join(changed[:4] if others else changed)}{others} changed since")
    run = own.get("run", {})
    if run and run.get("sources") not in (training(), training(watched=True)):
        return State("stale", f"its run was trained by other code (commit {run.get('commit') or 'unknown'})")
    return State("current", "rendered by the present code")


@functools.lru_cache(512)
def meaning(source: str) -> str:
    """What a Python text does: its lines without comments, docstrings and blank ones. Text that does not parse is
    given back as it is."""
    try:
        tree = ast.parse(source)
        comments = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    except (SyntaxError, tokenize.TokenError):
        return source
    lines = source.splitlines()
    for comment in comments:
        row, column = comment.start
        lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and type(first.value.value) is str
                and first.lineno > getattr(node, "lineno", 0)
            ):
                lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _code(content: dict) -> list[str]:
    """The code cells of a notebook, but for what papermill injected."""
    cells = (c for c in content["cells"] if c["cell_type"] == "code")
    return ["".join(c["source"]) for c in cells if "injected-parameters" not in c.get("metadata", {}).get("tags", [])]


def _executed(content: dict) -> str | None:
    return content.get("metadata", {}).get("papermill", {}).get("start_time")


def _named(code: list[str]) -> set[str]:
    """The rooms that cells name: `from lvmlib import plots`, and `lvm.train` through lvmlib/__init__.py."""
    exported = {}
    for node in ast.parse((ROOMS / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            exported |= {alias.asname or alias.name: node.module for alias in node.names}
    rooms = set()
    for cell in code:
        try:
            tree = ast.parse(cell)
        except SyntaxError:  # a magic
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lvmlib":
                inner = node.module.partition(".")[2]
                rooms |= {inner} if inner else {exported.get(alias.name, alias.name) for alias in node.names}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lvm":
                rooms.add(exported.get(node.attr, node.attr))
    return rooms


def _reached(rooms: Iterable[str]) -> list[Path]:
    """The files of these rooms and of all rooms that they import, wherever in the file they do."""
    found, waiting = set(), set(rooms)
    while waiting:
        path = ROOMS / f"{waiting.pop()}.py"
        if path.exists() and path not in found and path.stem not in NO_NUMBERS:
            found.add(path)
            waiting |= _imports(path.read_text(encoding="utf-8"))
    return sorted(found)


@functools.lru_cache(512)
def _imports(source: str) -> frozenset[str]:
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            rooms |= {node.module} if node.module else {alias.name for alias in node.names}
    return frozenset(rooms)


def _of_code(path: Path) -> str:
    return _short(meaning(path.read_text(encoding="utf-8")))


def _of_yaml(path: Path) -> str:
    try:
        said = json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), sort_keys=True, default=str)
    except yaml.YAMLError:
        said = path.read_text(encoding="utf-8")
    return _short(said)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def commit() -> str:
    """The checkout's commit, marked `+` if files differ from it; empty outside a checkout."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            check=False,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
