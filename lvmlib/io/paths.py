"""Where versions, notebooks and outputs lie: in a checkout beside the package, else inside the installed package."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "params" / "base.yaml").exists() else None
# Relative paths and outputs/ start here: the checkout, or the working directory of an installed package.
ROOT = CHECKOUT or Path.cwd()
PARAMS = (CHECKOUT or PACKAGE / "shipped") / "params"
NOTEBOOKS = (CHECKOUT or PACKAGE / "shipped") / "notebooks"
EMBEDDED = PACKAGE / "data"  # datasets inside the package


def outputs() -> Path:
    """Return the folder that runs write to: outputs/ under ROOT, or the one that LVM_OUTPUTS names."""
    return Path(os.environ.get("LVM_OUTPUTS") or ROOT / "outputs")
