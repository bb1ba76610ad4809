"""Open a dataset by its name.

A new source is one entry in `SOURCES`: a function that opens the store of a name, or gives None.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from ..config import Files, files
from ..errors import LVMError
from ..io.paths import EMBEDDED, ROOT, outputs
from ..windows import SPLITS, Dataset, Store, windows
from .original import opened
from .store import open_store
from .worlds import world

FAST = {"train": 512, "val": 128, "ood": 128}  # windows of a smoke run


def embedded() -> list[str]:
    """Names of the datasets inside the package."""
    return sorted(p.parent.name for p in EMBEDDED.glob("*/datasheet.yaml"))


def own() -> list[str]:
    """Names of the datasets under outputs/datasets/."""
    return sorted(p.parent.name for p in (outputs() / "datasets").glob("*/datasheet.yaml"))


def _open_folder(name: str) -> Store | None:
    """The store in a folder: under outputs/datasets/ if `name` has no slash, else from the checkout."""
    folder = ROOT / os.path.expanduser(name)
    made = outputs() / "datasets" / name
    folder = made if "/" not in name and os.path.isdir(made) else folder
    return open_store(folder) if os.path.isdir(folder) else None


SOURCES: dict[str, Callable[[str], Store | None]] = {  # the first that knows the name opens it
    "an .npz file": lambda name: opened(name) if name.endswith(".npz") else None,
    "an embedded dataset": lambda name: open_store(EMBEDDED / name) if name in embedded() else None,
    "world:NAME": lambda name: world(name.removeprefix("world:")) if name.startswith("world:") else None,
    "the folder of a store": _open_folder,
}


def dataset(
    data: str | Files | Mapping | Store = "wikipedia",
    horizon: int = 2,
    context_length: int = 5,
    fast: bool = False,
    direction: str = "forward",
) -> Dataset:
    """Open a dataset and cut its windows.

    `data`: `wikipedia` (embedded), a name under outputs/datasets/ (made by encode.ipynb), `world:NAME` (a synthetic
    world), a store's folder, a Store, or the original's files: one article file, or a mapping as `config.Files` has it
    (converted once, into outputs/imported/).
    `fast` keeps a few hundred windows of each split, for smoke runs; `direction` as in `windows`. Raises LVMError for
    an unknown name.
    """
    store = (
        data if isinstance(data, Store) else _open(files(os.fspath(data) if isinstance(data, os.PathLike) else data))
    )
    cut = {split: windows(store, split, horizon, context_length, direction) for split in SPLITS}
    if fast:
        cut = {split: w.at_most(FAST[split]) for split, w in cut.items()}
    return Dataset(store, **cut)


def _open(data: str | Files) -> Store:
    if isinstance(data, Files):
        return opened(data)
    for open_source in SOURCES.values():
        if (store := open_source(data)) is not None:
            return store
    raise LVMError(
        f"data {data!r}: neither one of {', '.join([*embedded(), *own()])}, nor {', nor '.join(SOURCES)}; encode.ipynb "
        "makes a dataset of your texts"
    )
