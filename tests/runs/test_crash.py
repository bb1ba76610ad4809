"""Nothing is lost: kills, interrupts, two processes at once, full and read-only disks, damaged and swapped files. The
error says what happened, and the last checkpoint goes on to the very end of an undisturbed run."""

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import kill_runs
import pytest
import torch
from kill_runs import trained, unlike
from toys import begin, guarded, make_data
from toys import version as toy

import lvmlib as lvm
from lvmlib import controller
from lvmlib.errors import LVMError
from lvmlib.runs import folder as runs
from lvmlib.runs import run as training

REWINDING = guarded(name="share", model="amn", overrides={"control": {"guard": "none"}})


def version(**top):
    """A small run: a checkpoint of some 30 kB."""
    return toy("v22", model="bilinear", **top)


def undisturbed(own, data, place):
    list(lvm.train(own, data, place / "run"))
    return trained(place / "run")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The end of an undisturbed run."""
    return undisturbed(version(), data, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def rewound(data, tmp_path_factory):
    """The end of an undisturbed run that rewinds twice, and is stopped."""
    end = undisturbed(REWINDING, data, tmp_path_factory.mktemp("rewound"))
    assert end["epochs.csv"]["rewound"].sum() == 2 and "stopped" in end["run.yaml"]
    return end


@pytest.fixture
def two(data, tmp_path, tmp_path_factory):
    """The folder of a run that was left after two epochs."""
    source = tmp_path_factory.getbasetemp() / "two" / "run"
    if not source.exists():
        begin(version(), data, source, 2)
    return Path(shutil.copytree(source, tmp_path / "run"))


def goes_on(folder, data, whole, own=None):
    rows = [row["epoch"] for row in lvm.train(own or version(), data, folder)]
    assert rows == list(range(1, len(rows) + 1)) and unlike(trained(folder), whole) == []
    assert not list(folder.parent.rglob("*.partial")) and not list(folder.parent.rglob("*.lock"))


def contents(place):
    return {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}


# Kills


def test_kills_at_random_moments_change_nothing(tmp_path):
    """A small form of kill_runs.py: training with rewinds, and with its 5CAT."""
    chosen = ("share, rewinding", "v22 with its 5CAT")
    todo = [job for job in kill_runs.jobs() if job.name in chosen]
    kills, ends = kill_runs.campaign(todo, 4, 5, tmp_path, most=2)
    assert len(kills) == 4 and len(ends) > 1  # at most 2 in a folder, so in several
    assert not any(ends.values()), ends


def test_the_comparison_of_ends_sees_a_difference(data, whole, tmp_path):
    found = unlike(whole, undisturbed(version(seed=1), data, tmp_path))
    for part in ("/best.safetensors", "/state.pt/model/", "/epochs.csv", "/steps.csv", "/run.yaml/parameters/seed"):
        assert any(x.startswith(part) for x in found), part


def killed_at(number, do):
    """Whether `do()`, in a forked process, was killed just before its file of this number appeared."""
    pid = os.fork()
    if pid == 0:
        real, writes = os.replace, []

        def replace(a, b):
            writes.append(b)
            if len(writes) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            real(a, b)

        os.replace = replace
        with contextlib.suppress(BaseException):
            do()
            os._exit(0)
        os._exit(1)
    end = os.waitpid(pid, 0)[1]
    assert end in (0, signal.SIGKILL)
    return end == signal.SIGKILL


@pytest.mark.parametrize("kind, every", [("whole", 1), ("rewound", 5)])
def test_killed_before_any_write_it_goes_on_to_the_same_end(data, tmp_path, request, kind, every):
    """Each file of a run in turn is the first that does not appear, those of a rewind and a stop among them."""
    own, wanted = {"whole": version(), "rewound": REWINDING}[kind], request.getfixturevalue(kind)
    number = 1
    while killed_at(number, lambda n=number: list(lvm.train(own, data, tmp_path / f"{n}" / "run"))):
        goes_on(tmp_path / f"{number}" / "run", data, wanted, own)
        number += every
    assert number > 15


# Interrupted and resumed


@pytest.mark.parametrize(
    "error, holder, name, at",
    [
        (KeyboardInterrupt, None, "", 0),  # in the loop's body
        (ZeroDivisionError, controller, "decide", 2),  # in a step
        (KeyboardInterrupt, training.Run, "_write_tables", 3),  # between state and tables
        (ZeroDivisionError, os, "replace", 1),  # of the last file
    ],
)
def test_an_interrupted_loop_goes_on_from_the_same_run(data, whole, tmp_path, monkeypatch, error, holder, name, at):
    """The cell is run again: the same object, rows without gaps or doubles."""
    run, calls = lvm.train(version(), data, tmp_path / "run"), []
    if name:
        real = getattr(holder, name)

        def interrupted(*given):
            if name != "replace" or b"finished:" in Path(given[0]).read_bytes():
                calls.append(given)
                if len(calls) == at:
                    raise error
            return real(*given)

        monkeypatch.setattr(holder, name, interrupted)
    with pytest.raises(error):
        for row in run:
            if not name and row["epoch"] == 2:
                raise error
    assert len(calls) == at and not list(tmp_path.rglob("*.lock"))
    rows = [row["epoch"] for row in run]
    assert rows == [1, 2, 3] == run.history["epoch"].tolist() and "finished" in run.record
    assert unlike(trained(run.folder), whole) == []


def test_a_new_loop_ends_the_one_that_was_left_standing(data, whole, tmp_path):
    """The same process resumes its run, by the same object or a new one; a loop that is abandoned holds no lock."""
    run = lvm.train(version(), data, tmp_path / "run")
    left = iter(run)
    next(left)
    assert (tmp_path / "run.lock").exists()
    second = iter(run)
    assert next(second)["epoch"] == 1 and list(left) == []
    goes_on(tmp_path / "run", data, whole)
    assert list(second) == []
    for _ in lvm.train(version(), data, tmp_path / "other"):
        break
    assert not (tmp_path / "other.lock").exists()


def test_another_commit_that_goes_on_is_recorded(data, whole, tmp_path, monkeypatch):
    folder = begin(version(), data, tmp_path / "run")
    monkeypatch.setattr(runs, "commit", lambda: "another")
    begin(version(), data, folder, 2)
    monkeypatch.setattr(runs, "commit", lambda: "a commit")
    list(lvm.train(version(), data, folder))
    end = trained(folder)
    assert end["run.yaml"]["continued"] == [{"epoch": 2, "commit": "another"}, {"epoch": 3, "commit": "a commit"}]
    assert unlike(end["state.pt"], whole["state.pt"]) == [] and "continued" not in whole["run.yaml"]
    assert lvm.train(version(), data, folder).finished


# Two at once


@contextlib.contextmanager
def another_process(do):
    """`do()` in a forked process, which then stays; gives its number when `do` is through."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            _kept = do()
            os.write(write, b"x")
            time.sleep(60)
        os._exit(1)
    os.close(write)
    try:
        assert os.read(read, 1) == b"x"
        yield pid
    finally:
        os.close(read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_second_process_learns_who_trains(data, whole, tmp_path):
    def hold():
        rows = iter(lvm.train(version(), data, tmp_path / "run"))
        next(rows)
        return rows

    with another_process(hold) as pid:
        before = contents(tmp_path)
        run = lvm.train(version(), data, tmp_path / "run")  # to read is free
        assert len(run.history) == 1 and run.best
        holder = rf"process {pid} on {os.uname().nodename} since 20\d\d-.* run_name"
        with pytest.raises(LVMError, match=holder):
            next(iter(run))
        with pytest.raises(LVMError, match=holder):
            lvm.train(version(), data, tmp_path / "run", fresh=True)
        assert contents(tmp_path) == before
    goes_on(tmp_path / "run", data, whole)  # a dead process holds nothing
    with another_process(lambda: runs.lock_run(tmp_path / "run").__enter__()):
        run = lvm.train(version(), data, tmp_path / "run")
        assert len(list(run)) == 3 and run.best  # a finished run is read under a lock, too


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


@pytest.mark.parametrize("epochs, left", [(0, 0), (1, 0), (1, 8_000)])
def test_after_a_full_disk_the_run_goes_on_when_there_is_room(data, whole, disk, epochs, left):
    folder = begin(version(), data, disk / "run", epochs) if epochs else disk / "run"
    before = contents(folder)
    fill(disk, left)
    with pytest.raises(LVMError, match=r"cannot be written: the disk is full.*" + "checkpoint is intact" * epochs):
        list(lvm.train(version(), data, folder))
    assert not list(disk.rglob("*.partial")) and not list(disk.rglob("*.lock"))
    after = contents(folder)
    state = folder / "last" / "state.pt"
    assert after.keys() == before.keys() and after.get(state) == before.get(state)
    (disk / "filler").unlink()
    goes_on(folder, data, whole)


def test_a_read_only_disk_is_named(data, whole, disk):
    folder = begin(version(), data, disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(LVMError, match=r"run\.lock: cannot be written: the disk is read-only.*LVM_OUTPUTS"):
        list(lvm.train(version(), data, folder))
    assert len(lvm.open_run(folder)[1]) == 1 and lvm.train(version(), data, folder).best  # to read is free
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    goes_on(folder, data, whole)


def test_a_folder_that_vanishes_is_named(data, tmp_path):
    rows = iter(lvm.train(version(), data, tmp_path / "run"))
    next(rows)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(LVMError, match=r"the folder is gone.*put it back"):
        next(rows)
    assert [p.name for p in tmp_path.iterdir()] == ["elsewhere"]


# Damaged and swapped files


TEXTS = (b"", b"\xff\xfe", b"a: [", b"x,y\n1,2\n")


@pytest.mark.parametrize("name", ["run.yaml", "epochs.csv", "steps.csv", "last/state.pt", "best.safetensors"])
def test_a_damaged_file_is_named_and_put_back_it_goes_on(data, whole, two, tmp_path, name):
    path = two / name
    content = path.read_bytes()
    torch.save(os.getcwd, tmp_path / "function")  # refused by weights_only
    for damaged in (content[: len(content) // 2], (tmp_path / "function").read_bytes(), *TEXTS):
        path.write_bytes(damaged)
        with pytest.raises(LVMError, match=f"(?s)run.*{path.name if path.suffix != '.yaml' else ''}.*restore"):
            _ = lvm.train(version(), data, two).best
    path.write_bytes(content)
    (tmp_path / "function").unlink()
    goes_on(two, data, whole)


def test_a_checkpoint_that_does_not_fit_is_named(data, two):
    path = two / "last" / "state.pt"
    state = torch.load(path, weights_only=True)
    other = {"model": {"x": torch.zeros(2)}, "optimizer": {}, "controller": ["x"], "best": "low"}
    changes = [{key: value} for key, value in (other | {"history": "no JSON", "steps": "[1]"}).items()]
    for changed in (*(state | change for change in changes), {"identity": state["identity"]}):
        torch.save(changed, path)
        with pytest.raises(LVMError, match=r"state\.pt: does not fit this run"):
            list(lvm.train(version(), data, two))


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_table_that_lacks_rows_is_mended_from_the_state(data, whole, two, epochs):
    begin(version(), data, two, epochs)
    lines = (two / "epochs.csv").read_text().splitlines(keepends=True)
    (two / "epochs.csv").write_text("".join(lines[:2]))
    goes_on(two, data, whole)


def test_a_checkpoint_of_another_run_is_refused(data, whole, two, tmp_path):
    others = (version(seed=7), data), (version(), make_data(seed=3)), (version(batch_size=31), data)
    for number, (own, store) in enumerate(others):
        other = begin(own, store, tmp_path / str(number), 2)
        for name in ("last/state.pt", "best.safetensors"):
            content = (two / name).read_bytes()
            shutil.copy(other / name, two / name)
            with pytest.raises(LVMError, match=f"{name}: does not fit this run .it is of another run"):
                list(lvm.train(version(), data, two))
            (two / name).write_bytes(content)
    goes_on(two, data, whole)


def test_the_best_of_another_epoch_is_refused(data, tmp_path):
    own = version(overrides={"optimizer": {"lr": 0.005}})
    folder = begin(own, data, tmp_path / "run")
    best = folder / "best.safetensors"
    first = best.read_bytes()
    list(lvm.train(own, data, folder))
    right = best.read_bytes()
    assert right != first  # the best one is a later one
    best.write_bytes(first)
    run = lvm.train(own, data, folder)
    for use in (lambda: run.best, lambda: lvm.export(run, tmp_path / "exported")):
        with pytest.raises(LVMError, match="it is of epoch 1"):
            use()
    best.write_bytes(right)
    assert run.best


def test_a_state_of_an_earlier_epoch_goes_on_to_the_same_end(data, whole, two, tmp_path):
    """A copy that was put back: the epochs since are trained again."""
    first = begin(version(), data, tmp_path / "first" / "run")
    shutil.copy(first / "last" / "state.pt", two / "last" / "state.pt")
    goes_on(two, data, whole)


def test_a_rewind_to_another_epochs_state_is_refused(data, rewound, tmp_path):
    epochs = int(rewound["epochs.csv"]["rewound"].idxmax())  # until the one before it
    path = begin(REWINDING, data, tmp_path / "run", epochs) / "last" / "good.pt"
    content, state = path.read_bytes(), torch.load(path, weights_only=True)
    torch.save(state | {"peak": state["peak"] / 2}, path)
    with pytest.raises(LVMError, match=r"good\.pt: is of another epoch than the best so far"):
        list(lvm.train(REWINDING, data, tmp_path / "run"))
    path.write_bytes(content)
    goes_on(tmp_path / "run", data, rewound, REWINDING)
