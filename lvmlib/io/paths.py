"""Where versions, notebooks and outputs lie: in a checkout beside the package, else inside the installed package."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import LVMError

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "params" / "base.yaml").exists() else None
# Relative paths and outputs/ start here: the checkout, or the working directory of an installed package.
ROOT = CHECKOUT or Path.cwd()
PARAMS = (CHECKOUT or PACKAGE / "shipped") / "params"
NOTEBOOKS = (CHECKOUT or PACKAGE / "shipped") / "notebooks"
UNFIT = set('\\*?"<>|`${};')  # characters of paths, shells and markup: not in the name of a folder made here
LONGEST = 200  # bytes of such a name
EMBEDDED = PACKAGE / "data"  # datasets inside the package


def outputs() -> Path:
    """Return the folder that runs write to: outputs/ under ROOT, or the one that LVM_OUTPUTS names."""
    return Path(os.environ.get("LVM_OUTPUTS") or ROOT / "outputs")


def folder_name(data: str) -> str:
    """Return the last part of a dataset's name or path, without .npz. Raises LVMError if no folder can be named so."""
    name = data.rstrip("/").rsplit("/", 1)[-1].removesuffix(".npz").replace(":", "-")
    if not name or name.startswith(".") or not name.isprintable() or set(name) & UNFIT or len(name.encode()) > LONGEST:
        raise LVMError(
            f"data {data[:LONGEST]!r}: its runs' folder is named after the last part of the path, which must not be "
            f"empty, begin with '.', contain any of {' '.join(sorted(UNFIT))}, or exceed {LONGEST} bytes"
        )
    return name
