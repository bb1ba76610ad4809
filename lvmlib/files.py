"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, write) -> None:
    """`write(partial)` and rename: the file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    if partial.is_symlink():
        partial.unlink()  # it came with the folder, and would lead what is written elsewhere
    write(partial)
    with open(partial, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(partial, path)
