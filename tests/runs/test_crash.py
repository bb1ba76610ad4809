"""Nothing is lost: kills, interrupts, two at once, full and read-only disks, damaged and swapped files, clocks, stores
that change. What the researcher is told, and that the last checkpoint goes on to the very end of an undisturbed run."""

import contextlib
import ctypes
import errno
import faulthandler
import functools
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import kill_runs
import numpy as np
import pytest
import torch
from kill_runs import trained, unlike
from toys import guarded, make_data
from toys import version as toy

import lvmlib as lvm
from lvmlib import controller
from lvmlib.data import store as vectors
from lvmlib.errors import LVMError
from lvmlib.io import disk as files
from lvmlib.runs import folder as runs
from lvmlib.runs import run as training


def version(**top):
    """A small run: a checkpoint of some 30 kB."""
    return toy("v22", model="bilinear", **top)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A forked child cannot use the threads of its parent."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(runs, "WAIT", 0.3)
    monkeypatch.setattr(runs, "commit", lambda: "a commit")  # whoever edits meanwhile changes nothing


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The end of an undisturbed run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "commit", lambda: "a commit")
        return undisturbed(version(), data, tmp_path_factory.mktemp("whole"))


def undisturbed(own, data, place):
    list(lvm.train(own, data, place / "run"))
    return trained(place / "run")


def begun(data, place, epochs=1, own=None):
    """A run that was left after so many epochs: its folder."""
    rows = iter(lvm.train(own or version(), data, place / "run"))
    for _ in range(epochs):
        next(rows)
    rows.close()
    return place / "run"


def goes_on(folder, data, whole, own=None):
    rows = [row["epoch"] for row in lvm.train(own or version(), data, folder)]
    assert rows == list(range(1, len(rows) + 1)) and unlike(trained(folder), whole) == []
    assert not list(folder.parent.rglob("*.partial")) and not list(folder.parent.rglob("*.lock"))


# Kills


def test_kills_at_random_moments_change_nothing(tmp_path):
    """A small form of kill_runs.py: training with rewinds, and with its 5CAT (of encoding, see test_encode.py)."""
    chosen = ("share, rewinding", "v22 with its 5CAT")
    todo = [job for job in kill_runs.jobs(tmp_path, encoding=False) if job.name in chosen]
    kills, ends = kill_runs.campaign(todo, 4, 5, tmp_path, most=2)
    assert len(kills) == 4 and len(ends) > 1  # at most 2 in a folder, so in several
    assert not any(ends.values()), ends


def test_the_comparison_of_ends_sees_a_difference(data, whole, tmp_path):
    other = undisturbed(version(seed=1), data, tmp_path)
    found = unlike(whole, other)
    for part in ("/best.safetensors", "/state.pt/model/", "/epochs.csv", "/steps.csv", "/run.yaml/parameters/seed"):
        assert any(x.startswith(part) for x in found), part


def test_killed_before_any_write_it_goes_on_to_the_same_end(data, whole, tmp_path, monkeypatch):
    """Each file of a run in turn is the first that does not appear."""
    real, writes = os.replace, []

    def replace(a, b):
        writes.append(b)
        if len(writes) == at:
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    for number in range(1, 40):
        at = number
        writes.clear()
        try:
            list(lvm.train(version(), data, tmp_path / f"{number}" / "run"))
        except KeyboardInterrupt:
            folder, at = tmp_path / f"{number}" / "run", 0
            goes_on(folder, data, whole)
        else:
            break
    assert 15 < len(writes) < 30


# Interrupted and gone on with


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("where", ["in the loop's body", "in a step", "between state and tables", "in the last file"])
def test_an_interrupted_loop_goes_on_from_the_same_run(data, tmp_path, monkeypatch, where, error):
    """The cell is run again: the same object, rows without gaps or doubles."""
    own = guarded(name="rank", model="bilinear", epochs=3, log_every=1)
    wanted = undisturbed(own, data, tmp_path / "whole")
    run = lvm.train(own, data, tmp_path / "run" / "run")
    name = {"in a step": "decide", "between state and tables": "_write_tables", "in the last file": "replace"}.get(
        where
    )
    holder = {"decide": controller, "_write_tables": training.Run, "replace": os}.get(name)
    at, calls = {"decide": 2, "_write_tables": 3, "replace": 1}.get(name), []
    if name:
        real = getattr(holder, name)

        def interrupted(*given):
            if name != "replace" or "finished:" in Path(given[0]).read_bytes().decode(errors="replace"):
                calls.append(given)
                if len(calls) == at:
                    raise error
            return real(*given)

        monkeypatch.setattr(holder, name, interrupted)
    with pytest.raises(error):
        for row in run:
            if name is None and row["epoch"] == 2:
                raise error
    assert name is None or len(calls) == at
    assert not list(tmp_path.rglob("*.lock"))
    rows = [row["epoch"] for row in run]
    assert rows == [1, 2, 3] == run.history["epoch"].tolist() and run.finished and "finished" in run.record
    assert unlike(trained(run.folder), wanted) == []


def test_a_new_loop_ends_the_one_that_was_left_standing(data, whole, tmp_path):
    """The same process takes its run up again, by the same object or a new one."""
    run = lvm.train(version(), data, tmp_path / "run")
    left = iter(run)
    next(left)
    assert (tmp_path / "run.lock").exists()
    second = iter(run)
    assert next(second)["epoch"] == 1 and list(left) == []
    goes_on(tmp_path / "run", data, whole)
    assert list(second) == []


def test_an_abandoned_loop_holds_nothing(data, tmp_path):
    for _ in lvm.train(version(), data, tmp_path / "run"):
        break
    assert not (tmp_path / "run.lock").exists()


def test_what_goes_on_under_another_commit_is_recorded(data, whole, tmp_path, monkeypatch):
    folder = begun(data, tmp_path)
    monkeypatch.setattr(runs, "commit", lambda: "another")
    begun(data, tmp_path, 2)
    begun(data, tmp_path, 2)
    monkeypatch.setattr(runs, "commit", lambda: "a commit")
    list(lvm.train(version(), data, folder))
    record, _, _ = lvm.open_run(folder)
    assert record["continued"] == [{"epoch": 2, "commit": "another"}, {"epoch": 3, "commit": "a commit"}]
    assert unlike(trained(folder)["state.pt"], whole["state.pt"]) == []
    assert lvm.train(version(), data, folder).found == "finished" and "continued" not in whole["run.yaml"]


# Two at once


@contextlib.contextmanager
def another_process(do):
    """`do()` in a forked process, which then stays; gives its number when `do` is through."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            kept = do()
            os.write(write, b"x")
            time.sleep(60)
            del kept
        finally:
            os._exit(1)
    try:
        os.close(write)
        assert os.read(read, 1) == b"x"
        yield pid
    finally:
        os.close(read)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_second_process_is_told_who_trains(data, whole, tmp_path):
    def hold():
        rows = iter(lvm.train(version(), data, tmp_path / "run"))
        next(rows)
        return rows

    said = rf"run is being trained by process {{}} on {os.uname().nodename} since 20\d\d-.* run_name"
    with another_process(hold) as pid:
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        run = lvm.train(version(), data, tmp_path / "run")  # to read is free
        assert len(run.history) == 1 and run.best
        with pytest.raises(LVMError, match=said.format(pid)):
            next(iter(run))
        with pytest.raises(LVMError, match=said.format(pid)):
            lvm.train(version(), data, tmp_path / "run", fresh=True)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    goes_on(tmp_path / "run", data, whole)  # the dead hold nothing


def test_a_holder_that_is_about_to_end_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "WAIT", 30.0)
    lock, stack = tmp_path / "run.lock", contextlib.ExitStack()
    with another_process(lambda: stack.enter_context(runs.lock_run(tmp_path / "run"))) as pid:
        real = time.sleep
        monkeypatch.setattr(time, "sleep", lambda s: (os.kill(pid, signal.SIGKILL), real(s)))
        with runs.lock_run(tmp_path / "run"):
            assert f"process {os.getpid()} on" in lock.read_text()
        assert f"process {pid} on" in capsys.readouterr().out
    assert not lock.exists()


def test_a_lock_that_was_left_is_no_lock(data, whole, tmp_path):
    """Whatever its age, whatever number it names: only the system's own word counts."""
    (tmp_path / "run.lock").write_text("process 1 on elsewhere since 2999-01-01 00:00:00\n")
    goes_on(tmp_path / "run", data, whole)


def test_a_finished_run_is_read_under_a_lock(data, whole, tmp_path):
    goes_on(tmp_path / "run", data, whole)
    with another_process(lambda: runs.lock_run(tmp_path / "run").__enter__()):
        run = lvm.train(version(), data, tmp_path / "run")
        assert len(list(run)) == 3 and run.best


# Disks


@functools.cache
def own_mounts():
    """Whether what this process mounts from now on is its own, and gone when it is killed (as by `unshare -m`)."""
    if not hasattr(ctypes.CDLL(None), "unshare") or ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS
        return False
    return not subprocess.run(["mount", "--make-rslave", "/"], check=False, capture_output=True).returncode


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place]
    if not own_mounts() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no small disk could be mounted here: needs root, and the right to mount")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(place, left=0):
    with contextlib.suppress(OSError), open(place / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))
    os.truncate(place / "filler", max(0, (place / "filler").stat().st_size - left))


@pytest.mark.parametrize("left", [0, 8_000])
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(data, whole, disk, left):
    folder = begun(data, disk)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    fill(disk, left)
    with pytest.raises(LVMError, match=r"run/.*: cannot be written: the disk is full.*last checkpoint is intact"):
        list(lvm.train(version(), data, folder))
    assert not list(disk.rglob("*.partial")) and not list(disk.rglob("*.lock"))
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert after.keys() == before.keys()
    assert after[folder / "last" / "state.pt"] == before[folder / "last" / "state.pt"]
    (disk / "filler").unlink()
    goes_on(folder, data, whole)


def test_a_full_disk_at_the_start_leaves_a_run_that_can_be_begun(data, whole, disk):
    fill(disk)
    with pytest.raises(LVMError, match="the disk is full"):
        list(lvm.train(version(), data, disk / "run"))
    (disk / "filler").unlink()
    goes_on(disk / "run", data, whole)


def test_a_read_only_disk_is_told(data, whole, disk):
    folder = begun(data, disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(LVMError, match=r"run\.lock: cannot be written: the disk is read-only.*LVM_OUTPUTS"):
        list(lvm.train(version(), data, folder))
    assert len(lvm.open_run(folder)[1]) == 1 and lvm.train(version(), data, folder).best  # to read is free
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    goes_on(folder, data, whole)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_is_told(data, whole, tmp_path):
    folder = begun(data, tmp_path)
    folder.chmod(0o555)
    with pytest.raises(LVMError, match="there is no right to write"):
        list(lvm.train(version(), data, folder))
    folder.chmod(0o755)
    goes_on(folder, data, whole)


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.EACCES, r"there is no right to write.*last checkpoint is intact"),
        (errno.EDQUOT, r"your share of the disk is used up.*last checkpoint is intact"),
        (errno.EIO, r"the disk fails.*last checkpoint is intact"),
        (errno.ESTALE, r"OSError: Stale file handle.*last checkpoint is intact"),
    ],
)
def test_what_the_system_refuses_is_told(data, whole, tmp_path, monkeypatch, number, words):
    folder, real = begun(data, tmp_path), os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: refuse(number) if "state" in str(b) else real(a, b))
    with pytest.raises(LVMError, match=rf"last/state\.pt: cannot be written: {words}"):
        list(lvm.train(version(), data, folder))
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.setattr(os, "replace", real)
    goes_on(folder, data, whole)


def refuse(number):
    raise OSError(number, os.strerror(number))


def test_a_folder_that_vanishes_is_told(data, tmp_path):
    rows = iter(lvm.train(version(), data, tmp_path / "run"))
    next(rows)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(LVMError, match=r"the folder is gone.*put it back"):
        next(rows)
    assert [p.name for p in tmp_path.iterdir()] == ["elsewhere"]


def test_a_source_that_is_gone_is_named_and_no_disk_is_blamed(tmp_path):
    """What the writer reads, in another folder or the target's own."""
    for source in (tmp_path / "elsewhere" / "source", tmp_path / "source"):
        said = rf"file: was not written, .*{source}: No such file or directory\. To do: .*untouched"
        with pytest.raises(LVMError, match=said) as e:
            files.write_atomic(tmp_path / "file", lambda partial, s=source: shutil.copyfile(s, partial))
        assert "folder is gone" not in str(e.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_no_copy_is_blamed_though_the_source_is_named_too(tmp_path, number):
    """So shutil.copyfile tells it: source first, then target."""

    def copy(partial):
        raise OSError(number, os.strerror(number), "/source", None, str(partial))

    with pytest.raises(LVMError, match=r"file: cannot be written: the disk (is full|fails)"):
        files.write_atomic(tmp_path / "file", copy)


def test_a_relative_target_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    for name in ("there/file", str(tmp_path / "there" / "file")):
        for own in ("there", "there/file.partial", str(tmp_path / "there" / "file"), "there/file.x1/vectors.npy"):
            with (
                pytest.raises(LVMError, match="there/file: cannot be written: there is no right"),
                files.explain_os_errors(Path(name)),
            ):
                raise PermissionError(errno.EACCES, "refused", own)
        for other in ("there/filed", "there/other", "elsewhere"):
            with pytest.raises(LVMError, match=f"{other}: refused"), files.explain_os_errors(Path(name)):
                raise PermissionError(errno.EACCES, "refused", other)


# Damaged and swapped files


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "name, words",
    [
        ("last/state.pt", r"state\.pt: cannot be read.*restore the file, or train anew with `fresh`"),
        ("best.safetensors", r"best\.safetensors: not the weights of this run .*restore the file"),
        ("epochs.csv", r"run: .*epochs\.csv.*restore the file"),
        ("run.yaml", r"(?s)run: .*restore the file"),
    ],
)
def test_a_truncated_file_is_told_and_put_back_it_goes_on(data, whole, tmp_path, name, words):
    folder = begun(data, tmp_path, 2)
    shutil.copy(folder / name, tmp_path / "kept")
    cut(folder / name)
    with pytest.raises(LVMError, match=words):
        list(lvm.train(version(), data, folder))
    shutil.copy(tmp_path / "kept", folder / name)
    (tmp_path / "kept").unlink()
    goes_on(folder, data, whole)


@pytest.mark.parametrize(
    "key, value",
    [
        ("model", {"x": torch.zeros(2)}),
        ("optimizer", {}),
        ("history", "no JSON"),
        ("steps", "[1]"),
        ("controller", ["x"]),
        ("best", "low"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_told(data, tmp_path, key, value):
    path = begun(data, tmp_path, 1) / "last" / "state.pt"
    torch.save(torch.load(path, weights_only=True) | {key: value}, path)
    with pytest.raises(LVMError, match=r"state\.pt: does not fit this run .*restore the file, or train anew"):
        list(lvm.train(version(), data, tmp_path / "run"))


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_table_that_lacks_whole_rows_is_mended_from_the_state(data, whole, tmp_path, epochs):
    folder = begun(data, tmp_path, 2) if epochs == 2 else tmp_path / "run"
    if epochs == 3:
        list(lvm.train(version(), data, folder))
    lines = (folder / "epochs.csv").read_text().splitlines(keepends=True)
    (folder / "epochs.csv").write_text("".join(lines[:2]))
    goes_on(folder, data, whole)


@pytest.mark.parametrize(
    "name, words",
    [
        ("last/state.pt", "is a checkpoint of another run"),
        ("best.safetensors", "not the weights of this run .it is of another run"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(data, whole, tmp_path, name, words):
    folder = begun(data, tmp_path, 2)
    for number, (own, there) in enumerate(
        [(version(seed=7), data), (version(), make_data(seed=3)), (version(batch_size=31), data)]
    ):
        other = begun(there, tmp_path / str(number), 2, own)
        kept = (folder / name).read_bytes()
        shutil.copy(other / name, folder / name)
        with pytest.raises(LVMError, match=words):
            list(lvm.train(version(), data, folder))
        (folder / name).write_bytes(kept)
    goes_on(folder, data, whole)


def test_the_best_of_another_epoch_is_refused(data, whole, tmp_path):
    own = version(overrides={"optimizer": {"lr": 0.005}})
    folder = begun(data, tmp_path, 1, own)
    first = (folder / "best.safetensors").read_bytes()
    list(lvm.train(own, data, folder))
    right = (folder / "best.safetensors").read_bytes()
    assert right != first  # the best one is a later one
    (folder / "best.safetensors").write_bytes(first)
    run = lvm.train(own, data, folder)
    with pytest.raises(LVMError, match=r"it is of epoch 1; the best one by epochs\.csv is [23]"):
        _ = run.best
    with pytest.raises(LVMError, match="it is of epoch 1"):
        lvm.export(run, tmp_path / "exported")
    (folder / "best.safetensors").write_bytes(right)
    assert run.best


def test_a_state_of_an_earlier_epoch_goes_on_to_the_same_end(data, whole, tmp_path):
    """A copy that was put back: the epochs since are trained again."""
    folder = begun(data, tmp_path, 1)
    shutil.copy(folder / "last" / "state.pt", tmp_path / "kept")
    begun(data, tmp_path, 2)
    shutil.copy(tmp_path / "kept", folder / "last" / "state.pt")
    goes_on(folder, data, whole)


def test_a_rewind_to_another_epoch_s_state_is_refused(data, tmp_path):
    own = guarded(name="share", model="amn", overrides={"control": {"guard": "none"}})
    wanted = undisturbed(own, data, tmp_path / "whole")
    rewound = next(i for i, row in wanted["epochs.csv"].iterrows() if row["rewound"])
    folder = begun(data, tmp_path, rewound, own)
    kept = folder / "last" / "good.pt"
    content = kept.read_bytes()
    state = torch.load(kept, weights_only=True)
    torch.save(state | {"peak": state["peak"] / 2}, kept)
    with pytest.raises(LVMError, match=r"good\.pt: is of another epoch than the best so far"):
        list(lvm.train(own, data, folder))
    kept.write_bytes(content)
    goes_on(folder, data, wanted, own)


# Clocks


def dated(folder, hours):
    for path in folder.rglob("*"):
        os.utime(path, (time.time() + 3600 * hours,) * 2)


@pytest.mark.parametrize("hours", [-24 * 365, 24 * 365])
def test_a_run_goes_on_and_is_used_again_whatever_its_files_are_dated(data, whole, tmp_path, hours):
    folder = begun(data, tmp_path)
    dated(folder, hours)
    goes_on(folder, data, whole)
    dated(folder, hours)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    run = lvm.train(version(), data, folder)
    assert run.found == "finished" and len(list(run)) == 3
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_store_from_the_future_is_opened_trained_on_and_watched(data, tmp_path):
    """It is checked whole each time, since nobody knows whether it changes in the same second again."""
    folder = vectors.write_store(data.store, tmp_path / "store")
    dated(folder, 24)
    assert vectors.open_store(folder).fingerprint == data.store.fingerprint
    assert not (folder / vectors.CHECKED).exists()
    own = version(data=str(folder))
    wanted = undisturbed(own, lvm.dataset(str(folder)), tmp_path / "whole")
    place = begun(lvm.dataset(str(folder)), tmp_path / "place", own=own)
    dated(folder, 48)
    goes_on(place, lvm.dataset(str(folder)), wanted, own)
    rewritten(folder)
    with pytest.raises(LVMError, match=r"vectors\.npy: its sha256 is not the one"):
        vectors.open_store(folder)


def test_a_check_before_the_clock_was_set_back_is_remembered_by_the_files_alone(stored, monkeypatch):
    """checked.json names no time of its own: what was checked stays so, and a change is seen."""
    wanted = vectors.open_store(stored).fingerprint
    said = (stored / vectors.CHECKED).read_bytes()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * 24 * 365)
    assert vectors.open_store(stored).fingerprint == wanted and (stored / vectors.CHECKED).read_bytes() == said
    rewritten(stored)
    with pytest.raises(LVMError, match=r"vectors\.npy: its sha256 is not the one"):
        vectors.open_store(stored)


# Stores that change under a run


@pytest.fixture
def stored(data, tmp_path):
    """The dataset as a folder, which has a checked.json."""
    folder = vectors.write_store(data.store, tmp_path / "store")
    old = time.time() - 100
    for path in folder.iterdir():
        os.utime(path, (old, old))
    return folder


def rewritten(folder):
    with open(folder / "vectors.npy", "r+b") as file:
        file.seek(-200, os.SEEK_END)
        file.write(bytes(100))


def blanked(folder):
    """As `rewritten`, and the loss of the next step is NaN: it is the store that is told, not the model."""
    array = np.load(folder / "vectors.npy", mmap_mode="r+")
    array[:] = np.nan
    array.flush()


def replaced(folder):
    array = np.load(folder / "vectors.npy")
    np.save(folder / "other.npy", array[::-1])
    os.replace(folder / "other.npy", folder / "vectors.npy")


def deleted(folder):
    (folder / "vectors.npy").unlink()


def cut_short(folder):
    """As `cp new.npy vectors.npy` begins: in place, under the map."""
    os.truncate(folder / "vectors.npy", 0)


def swapped(folder):
    """Another whole store takes the place of this one."""
    shutil.rmtree(folder)
    vectors.write_store(make_data(seed=9).store, folder)


@pytest.mark.parametrize("change", [rewritten, blanked, replaced, deleted, swapped, shutil.rmtree])
def test_a_store_that_changes_under_a_run_is_told_and_put_back_it_goes_on(stored, tmp_path, change):
    own = version(data=str(stored))
    wanted = undisturbed(own, lvm.dataset(str(stored)), tmp_path / "whole")
    shutil.copytree(stored, tmp_path / "kept")
    place = tmp_path / "place"
    rows = iter(lvm.train(own, lvm.dataset(str(stored)), place / "run"))
    next(rows)
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file() and p.suffix != ".lock"}
    change(stored)
    said = r"run: epoch 2 is not kept\. .*store: this store was changed.*checkpoint is intact \(epoch 1\)"
    with pytest.raises(LVMError, match=said):
        next(rows)
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before
    shutil.rmtree(stored, ignore_errors=True)
    (tmp_path / "kept").rename(stored)
    goes_on(place / "run", lvm.dataset(str(stored)), wanted, own)


@pytest.mark.parametrize("change", [rewritten, replaced])
def test_a_store_that_changes_within_an_epoch_is_told_at_its_end(stored, tmp_path, monkeypatch, change):
    own, real, calls = version(data=str(stored)), controller.decide, []
    wanted = undisturbed(own, lvm.dataset(str(stored)), tmp_path / "whole")
    shutil.copytree(stored, tmp_path / "kept")
    folder = begun(lvm.dataset(str(stored)), tmp_path / "place", own=own)

    def decide(*given):
        calls.append(1)
        if len(calls) == 2:
            change(stored)
        return real(*given)

    monkeypatch.setattr(controller, "decide", decide)
    with pytest.raises(LVMError, match=r"run: epoch 2 is not kept\. .*store: this store was changed"):
        list(lvm.train(own, lvm.dataset(str(stored)), folder))
    assert len(calls) > 2  # not before
    shutil.rmtree(stored)
    (tmp_path / "kept").rename(stored)
    goes_on(folder, lvm.dataset(str(stored)), wanted, own)


def test_a_store_cut_short_while_it_is_read_ends_the_process_and_the_checkpoint_goes_on(stored, tmp_path, monkeypatch):
    """The system ends it (SIGBUS): no word can be said. What was written before is whole."""
    own, real = version(data=str(stored)), controller.decide
    wanted = undisturbed(own, lvm.dataset(str(stored)), tmp_path / "whole")
    shutil.copytree(stored, tmp_path / "kept")
    folder = begun(lvm.dataset(str(stored)), tmp_path / "place", own=own)
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        controller.decide = lambda *given: (cut_short(stored), real(*given))[1]
        with contextlib.suppress(BaseException):
            list(lvm.train(own, lvm.dataset(str(stored)), folder))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] & 0x7F == signal.SIGBUS
    shutil.rmtree(stored)
    (tmp_path / "kept").rename(stored)
    goes_on(folder, lvm.dataset(str(stored)), wanted, own)


def test_a_store_that_was_touched_is_read_once_and_still_watched(stored, monkeypatch):
    store, real, calls = vectors.open_store(stored), vectors.open_store, []
    monkeypatch.setattr(vectors, "open_store", lambda folder: calls.append(folder) or real(folder))
    os.utime(stored / "vectors.npy", (time.time() - 50,) * 2)
    for _ in range(3):
        vectors.check_unchanged(store)
    assert len(calls) == 1
    os.utime(stored / "vectors.npy", (time.time() + 50,) * 2)  # may change again in the same instant: not believed
    for _ in range(2):
        vectors.check_unchanged(store)
    assert len(calls) == 3
    rewritten(stored)
    with pytest.raises(LVMError, match="this store was changed"):
        vectors.check_unchanged(store)


def test_a_store_that_changed_before_the_loop_is_told(stored, tmp_path):
    run = lvm.train(version(data=str(stored)), lvm.dataset(str(stored)), tmp_path / "run")
    replaced(stored)
    with pytest.raises(LVMError, match="this store was changed"):
        next(iter(run))
    assert not (tmp_path / "run").exists()


def test_a_store_copied_onto_itself_is_the_same_store(stored, tmp_path):
    rows = iter(lvm.train(version(data=str(stored)), lvm.dataset(str(stored)), tmp_path / "run"))
    next(rows)
    content = {p: p.read_bytes() for p in stored.iterdir()}
    for path, text in content.items():
        Path(f"{path}.new").write_bytes(text)
        os.replace(f"{path}.new", path)
    assert len(list(rows)) == 2
