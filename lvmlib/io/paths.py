"""Where the checkout, its versions and its outputs lie."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the checkout: paths never start from the working directory
PARAMS = ROOT / "params"
OUTPUTS = ROOT / "outputs"
EMBEDDED = ROOT / "lvmlib" / "data"  # datasets inside the package


def outputs() -> Path:
    """The folder that runs write to: outputs/ of the checkout, or what LVM_OUTPUTS names."""
    return Path(os.environ.get("LVM_OUTPUTS") or OUTPUTS)
