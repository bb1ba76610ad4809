"""Datasets by name."""

import numpy as np
import pandas as pd
import pytest
from stores import random_store

import lvmlib as lvm
from lvmlib import windows as W
from lvmlib.data import open as O
from lvmlib.data import store as V
from lvmlib.errors import LVMError
from lvmlib.io.paths import EMBEDDED


def test_dataset_from_a_folder_and_from_a_store(folder):
    a, b = lvm.dataset(str(folder), horizon=1), lvm.dataset(V.open_store(folder), horizon=1)
    for split in W.SPLITS:
        assert np.array_equal(getattr(a, split).start, getattr(b, split).start)
        assert getattr(a, split).split == split and getattr(a, split).horizon == 1


NAMES = ("wikipedai", "vectors.py", "/nowhere/at/all", "a\x00b", "x" * 5000, "~no_such_user/s")


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_unknown_data_names_the_known(name):
    with pytest.raises(LVMError, match="wikipedia"):
        lvm.dataset(name)


@pytest.mark.parametrize("name", ["..", "."])
def test_a_folder_that_is_no_store(name):
    with pytest.raises(LVMError, match=V.STORE_FILES[0]):
        lvm.dataset(name)


def test_a_new_source_is_one_entry(monkeypatch):
    monkeypatch.setitem(O.SOURCES, "toy:SEED", lambda n: random_store(int(n[4:])) if n.startswith("toy:") else None)
    assert lvm.dataset("toy:1", horizon=1, context_length=3).store.name == "random1"
    with pytest.raises(LVMError, match="toy:SEED"):
        lvm.dataset("toys")


@pytest.mark.parametrize("missing", W.SPLITS)
def test_a_split_without_articles(missing):
    frame = pd.DataFrame({"title": list("abc"), "split": [s if s != missing else "" for s in W.SPLITS]})
    x, article, position = np.eye(30, dtype=np.float32), np.repeat([0, 1, 2], 10), np.tile(np.arange(10), 3)
    store = V.make_store("hole", x, article, position, frame)
    with pytest.raises(LVMError, match=f"split {missing}"):
        lvm.dataset(store)


def test_embedded_wikipedia():
    store = V.open_store(EMBEDDED / "wikipedia")
    assert store.dim == 384 and store.vectors.dtype == np.float16
    data = lvm.dataset("wikipedia", horizon=2)
    sets = [set(getattr(data, s).article) for s in W.SPLITS]
    assert min(map(len, sets)) >= 10 and len(set.union(*sets)) == sum(map(len, sets))
    fast = lvm.dataset("wikipedia", fast=True)
    assert [len(getattr(fast, s)) for s in W.SPLITS] == [512, 128, 128]


def test_a_dataset_made_here_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path))
    store = random_store(3, gaps=False)
    V.write_store(store, tmp_path / "datasets" / "mine")
    assert lvm.dataset("mine", horizon=1, context_length=3).store.fingerprint == store.fingerprint
    with pytest.raises(LVMError, match=r"wikipedia, mine, .*world:NAME"):
        lvm.dataset("theirs")
    with pytest.raises(LVMError, match="mine"):
        lvm.dataset("../datasets/mine")
