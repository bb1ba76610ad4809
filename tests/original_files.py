"""Files in the original's form, for tests."""

import time

import numpy as np
import pytest
from fuzz_importers import LENGTH, cut, world

from lvmlib import windows as W
from lvmlib.data import original as I
from lvmlib.errors import LVMError

X, ARTICLE, CHUNK = world()
COUNT = len(X)
NAMES = ("contexts", "targets", "article_ids", "target_indices")
PARTS = {"train": set(range(20)), "val": set(range(20, 25)), "ood": set(range(25, 30))}


def saved(folder, name, compressed=False, **arrays):
    path = folder / f"{name}.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def article_file(folder, x=X, article=ARTICLE, chunk=CHUNK, name="articles", **more):
    return saved(folder, name, vectors=x, article_indices=article, chunk_indices=chunk, **more)


def sequence_files(folder, x=X, article=ARTICLE, chunk=CHUNK, horizon=2, names=NAMES, parts=PARTS, order=np.arange):
    """{split: path} with the arrays `names`, and {split: (contexts, targets, ids, target indices)}.

    `order`: the places of so many windows of a file in it."""
    paths, windows = {}, {}
    for s, own in parts.items():
        arrays = cut(x, article, chunk, own, horizon)
        rows = order(len(arrays[0]))
        windows[s] = [part[rows] for part in arrays]
        paths[s] = saved(folder, s, **dict(zip(names, windows[s], strict=False)))
    return paths, windows


def check_windows(store, windows, horizon=2):
    """The store's windows are those of the files, in their order, vector for vector."""
    assert (store.given.horizon, store.given.context_length) == (horizon, LENGTH)
    for s, (contexts, targets, ids, at) in windows.items():
        w = W.windows(store, s, horizon, LENGTH)
        assert np.array_equal(store.vectors[w.context_rows(np.arange(len(w)))], contexts)
        assert np.array_equal(store.vectors[w.target], targets)
        assert np.array_equal(w.article, ids)
        assert np.array_equal(store.position[w.target], at)


def refused(files, folder, message, marker=None, **options):
    """Check that `files` are not converted, and return the error."""
    before = sorted(p.name for p in folder.iterdir())
    begin = time.process_time()
    with pytest.raises(LVMError, match=message) as caught:
        I.convert(files, folder / "refused", **options)
    assert type(caught.value) is LVMError and len(str(caught.value)) < 1200
    assert time.process_time() - begin < 5
    assert sorted(p.name for p in folder.iterdir()) == before  # nothing left, whole or in part
    assert marker is None or not marker.exists()
    return str(caught.value)
