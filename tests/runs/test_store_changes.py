"""A dataset that changes under a run, or whose clock is wrong: it is noticed, and the run goes on when it is back."""

import contextlib
import faulthandler
import os
import resource
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
from kill_runs import trained, unlike
from toys import begin, make_data
from toys import version as toy

import lvmlib as lvm
from lvmlib import controller
from lvmlib.data import store as vectors
from lvmlib.errors import LVMError

CHANGED = r"run: nothing is written beyond epoch 1\. .*store: this store was changed"


def dated(folder, hours):
    for path in folder.rglob("*"):
        os.utime(path, (time.time() + 3600 * hours,) * 2)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A dataset as a folder, a copy of it, and the end of an undisturbed run on it."""
    place = tmp_path_factory.mktemp("original")
    folder = vectors.write_store(make_data().store, place / "store")
    dated(folder, -1)
    vectors.open_store(folder)
    shutil.copytree(folder, place / "copy")
    own = toy("v22", model="bilinear", data=str(folder))
    list(lvm.train(own, lvm.dataset(str(folder)), place / "run"))
    return SimpleNamespace(folder=folder, copy=place / "copy", own=own, end=trained(place / "run"))


@pytest.fixture
def stored(original):
    """The dataset's folder, as it was."""
    restore(original)
    return original.folder


def restore(original):
    shutil.rmtree(original.folder, ignore_errors=True)
    shutil.copytree(original.copy, original.folder)


def goes_on(run, original):
    list(lvm.train(original.own, lvm.dataset(str(original.folder)), run))
    assert unlike(trained(run), original.end) == []
    assert not list(run.parent.rglob("*.partial")) and not list(run.parent.rglob("*.lock"))


def rewritten(folder):
    with open(folder / "vectors.npy", "r+b") as file:
        file.seek(-200, os.SEEK_END)
        file.write(bytes(100))


def blanked(folder):
    """As `rewritten`, and the loss of the next step is NaN: the error names the store, not the loss."""
    array = np.load(folder / "vectors.npy", mmap_mode="r+")
    array[:] = np.nan
    array.flush()


def replaced(folder):
    array = np.load(folder / "vectors.npy")
    np.save(folder / "other.npy", array[::-1])
    os.replace(folder / "other.npy", folder / "vectors.npy")


def deleted(folder):
    (folder / "vectors.npy").unlink()


def swapped(folder):
    """Another whole store takes the place of this one."""
    shutil.rmtree(folder)
    vectors.write_store(make_data(seed=9).store, folder)


@pytest.mark.parametrize("change", [rewritten, blanked, replaced, deleted, swapped, shutil.rmtree])
def test_a_store_that_changes_under_a_run_is_named_and_put_back_it_goes_on(original, stored, tmp_path, change):
    rows = iter(lvm.train(original.own, lvm.dataset(str(stored)), tmp_path / "run"))
    next(rows)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"}
    change(stored)
    with pytest.raises(LVMError, match=CHANGED):
        next(rows)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    restore(original)
    goes_on(tmp_path / "run", original)


def test_a_store_cut_short_while_it_is_read_ends_the_process_and_the_checkpoint_goes_on(original, stored, tmp_path):
    """As `cp new.npy vectors.npy` begins. The system ends the process (SIGBUS) without a message."""
    run = begin(original.own, lvm.dataset(str(stored)), tmp_path / "run")
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        real = controller.decide
        controller.decide = lambda *given: (os.truncate(stored / "vectors.npy", 0), real(*given))[1]
        with contextlib.suppress(BaseException):
            list(lvm.train(original.own, lvm.dataset(str(stored)), run))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] & 0x7F == signal.SIGBUS
    restore(original)
    goes_on(run, original)


def test_a_store_that_changed_before_the_loop_is_named(original, stored, tmp_path):
    run = lvm.train(original.own, lvm.dataset(str(stored)), tmp_path / "run")
    replaced(stored)
    with pytest.raises(LVMError, match="this store was changed"):
        next(iter(run))
    assert not (tmp_path / "run").exists()


def test_a_store_from_the_future_is_opened_trained_on_and_watched(original, stored, tmp_path):
    """It is checked whole each time, since nobody knows whether it changes in the same second again."""
    dated(stored, 24)
    (stored / vectors.CHECKED).unlink()
    fingerprint = original.end["run.yaml"]["dataset"]["fingerprint"]
    assert vectors.open_store(stored).fingerprint == fingerprint and not (stored / vectors.CHECKED).exists()
    run = begin(original.own, lvm.dataset(str(stored)), tmp_path / "run")
    dated(stored, 48)
    goes_on(run, original)
    rewritten(stored)
    with pytest.raises(LVMError, match=r"vectors\.npy"):
        vectors.open_store(stored)


def test_a_store_that_was_touched_is_read_again_and_still_watched(stored):
    store = vectors.open_store(stored)
    for seconds in (-50, 50):
        os.utime(stored / "vectors.npy", (time.time() + seconds,) * 2)
        vectors.check_unchanged(store)
    for path in stored.iterdir():  # copied onto itself
        shutil.copy2(path, f"{path}.new")
        os.replace(f"{path}.new", path)
    vectors.check_unchanged(store)
    rewritten(stored)
    with pytest.raises(LVMError, match="this store was changed"):
        vectors.check_unchanged(store)
