"""Open a dataset by its name."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..config import Files, files
from ..errors import LVMError
from ..io.paths import EMBEDDED, ROOT, outputs
from ..windows import SPLITS, Dataset, Store, windows
from .original import opened
from .store import open_store
from .worlds import world


def dataset(
    data: str | Files | Mapping | Store = "wikipedia",
    horizon: int = 2,
    context_length: int = 5,
    fast: bool = False,
    direction: str = "forward",
) -> Dataset:
    """Open a dataset and cut its windows.

    `data`: `wikipedia` (embedded), a name under outputs/datasets/ (made by encode.ipynb), `world:NAME` (a synthetic
    world), a store's folder, a Store, or the original's files: one article file, or a mapping as `params.Files` has it
    (converted once, into outputs/imported/).
    `fast` keeps a few hundred windows of each split, for smoke runs; `direction` as in `windows`. Raises LVMError for
    an unknown name.
    """
    if not isinstance(data, Store):
        data = files(os.fspath(data) if isinstance(data, os.PathLike) else data)
    if isinstance(data, Store):
        store = data
    elif isinstance(data, Files) or data.endswith(".npz"):
        store = opened(data)
    elif data in embedded():
        store = open_store(EMBEDDED / data)
    elif data.startswith("world:"):
        store = world(data.removeprefix("world:"))
    else:
        own = outputs() / "datasets"  # what encode.ipynb makes is known by its name
        places = [ROOT / os.path.expanduser(data)]  # a relative path starts from the checkout
        places = places if "/" in data else [own / data, *places]
        folder = next((p for p in places if os.path.isdir(p)), None)
        if folder is None:
            there = [*embedded(), *(sorted(p.parent.name for p in own.glob("*/datasheet.yaml")))]
            raise LVMError(
                f"data {data!r}: neither one of {', '.join(there)}, nor world:NAME, nor the folder of a store, nor an "
                ".npz file; encode.ipynb makes a dataset of your own texts"
            )
        store = open_store(folder)
    cut = [windows(store, split, horizon, context_length, direction) for split in SPLITS]
    if fast:
        cut = [w.at_most(n) for w, n in zip(cut, (512, 128, 128), strict=True)]
    return Dataset(store, *cut)


def embedded() -> list[str]:
    """Names of the datasets inside the package."""
    return sorted(p.parent.name for p in EMBEDDED.glob("*/datasheet.yaml"))
