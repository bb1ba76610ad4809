"""The parameters of a notebook, checked before they are run."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Mapping

from ..errors import LVMError
from ..io import limits
from ..io.inherit import nearest, read
from ..io.paths import PARAMS


def check_injected(cells: list[str]) -> None:
    """Raise LVMError for an injected parameter that the notebook's own cell does not have, or that is no plain value.

    `cells`: IPython's `In`. papermill itself only warns. The injected cell has run by then; `check_given` comes before.
    """
    injected = [i for i, source in enumerate(cells) if source.startswith("# Parameters\n")]
    if not injected:
        return
    known = {name for source in cells[: injected[0]] for name in _assigned(source)}
    for number in injected:
        check_names(_assigned(cells[number]), known)
        for node in ast.parse(cells[number]).body:
            if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and _is_plain(node)):
                raise LVMError(
                    f"parameters: {ast.unparse(node)[:80]!r} is no name with a plain value, and it has been run; check "
                    "where these parameters come from, and give them by `make`, which refuses such"
                )


def check_names(names: Iterable[str], known: Collection[str]) -> None:
    """Raise LVMError for a name that is not among `known`, the notebook's parameters."""
    for name in names:
        if name not in known:
            also = (
                f", or in `-y 'overrides: {{{name}: …}}'`"
                if "overrides" in known and name in read(PARAMS, "base")[0]
                else ""
            )
            raise LVMError(
                f"parameter {str(name)[:80]!r} is not one of this notebook's"
                f"{nearest(str(name)[:80], known) if not also else ''}; known: {', '.join(sorted(known))}{also}"
            )


def check_given(given: Mapping, known: Collection[str]) -> None:
    """Raise LVMError unless `given`, the parameters for a notebook, are of `known` names and plain values.

    papermill writes names, and values of other types, into the notebook as they are: they would be run as code.
    """
    check_names(given, known)
    for name, value in given.items():
        try:
            limits.plain(value)
        except ValueError as e:
            raise LVMError(f"parameter {name!r}: {e}; give plain values") from e


def _is_plain(node: ast.Assign) -> bool:
    try:
        ast.literal_eval(node.value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return isinstance(node.targets[0], ast.Name)


def _assigned(source: str) -> list[str]:
    return [
        t.id
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for t in node.targets
        if isinstance(t, ast.Name)
    ]
