"""The one exception of the project's own: bad input, told so that the reader knows what to do."""

from __future__ import annotations

import importlib


class LVMError(ValueError):
    """Input that cannot be used. The message says what is wrong, where, and what to do."""


def require(module: str, extra: str = "encode"):
    """The module, of the extra `extra`. Raises LVMError with the command that installs it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise LVMError(f'the package {e.name or module} is missing; run: pip install -e ".[{extra}]"') from e


def format_error(e: BaseException) -> str:
    """What an exception says, on one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
