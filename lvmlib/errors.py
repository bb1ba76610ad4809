"""`LVMError`, the error meant for users."""

from __future__ import annotations

import importlib


class LVMError(ValueError):
    """Input that cannot be used. The message says what is wrong, where, and what to do."""


def require(module: str, extra: str = "encode"):
    """Import a module of the extra `extra`. Raises LVMError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise LVMError(f'the package {e.name or module} is missing; run: pip install -e ".[{extra}]"') from e


def format_error(e: BaseException) -> str:
    """Return an exception's type and message on one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
