"""The parameters of a notebook, checked before they are run."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..errors import LVMError
from ..io import limits
from ..io.inherit import nearest, read
from ..io.paths import PARAMS


def check_injected(cells: list[str]) -> None:
    """Raise LVMError for an injected parameter that the notebook's own cell does not have, or that is no plain value.

    `cells`: IPython's `In`. papermill itself only warns. The injected cell has run by then; `check_given` comes before.
    """
    injected = [i for i, source in enumerate(cells) if source.startswith("# Parameters\n")]
    nodes = [node for source in cells[: min(injected, default=0)] for node in ast.parse(source).body]
    targets = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    known = {target.id for target in targets if isinstance(target, ast.Name)}
    for number in injected:
        check_names(assigned(cells[number]), known)


def assigned(source: str) -> dict[str, Any]:
    """Return the names and values of a cell of parameters. Raises LVMError for what is no name with a plain value."""
    values = {}
    for node in ast.parse(source).body:
        try:
            (target,) = node.targets
            values[target.id] = ast.literal_eval(node.value)
        except (AttributeError, ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as e:
            raise LVMError(
                f"parameters: {ast.unparse(node)[:80]!r} is no name with a plain value, and it has been run; check "
                "where these parameters come from, and give them by `make`, which refuses such"
            ) from e
    return values


def check_names(names: Iterable[str], known: Collection[str]) -> None:
    """Raise LVMError for a name that is not among `known`, the notebook's parameters."""
    for name in names:
        if name not in known:
            hint, elsewhere = nearest(str(name)[:80], known), ""
            if "overrides" in known and name in read(PARAMS, "base")[0]:
                hint, elsewhere = "", f", or in `-y 'overrides: {{{name}: …}}'`"
            raise LVMError(
                f"parameter {str(name)[:80]!r} is not one of this notebook's{hint}; known: "
                f"{', '.join(sorted(known))}{elsewhere}"
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
