"""Locks of one process, files and folders that are set aside, and what the message of a disk's error names."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from lvmlib.errors import LVMError
from lvmlib.io import disk


def test_a_lock_has_one_holder_who_is_named_and_leaves_nothing(tmp_path, capsys):
    path = tmp_path / "folder" / "x.lock"
    with disk.lock(path, str):
        for wait in (0, 0.3):
            with pytest.raises(LVMError, match=f"busy: process {os.getpid()} on"):
                disk.lock(path, lambda holder: f"busy: {holder}", wait).__enter__()
    assert capsys.readouterr().out.count(str(path)) == 1  # printed by the one that waits
    assert not list(path.parent.iterdir())
    with disk.lock(path, str):
        assert path.exists()


@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: path.symlink_to(path.with_name("precious"))])
def test_a_planted_link_or_pipe_is_removed_and_not_followed(tmp_path, plant):
    (tmp_path / "precious").write_text("mine")
    plant(tmp_path / "x.lock")
    with disk.lock(tmp_path / "x.lock", str):
        assert (tmp_path / "x.lock").read_text().startswith("process ")
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("number", sorted(disk.NO_LOCKS))
def test_a_file_system_without_locks_holds_nothing(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with disk.lock(tmp_path / "x.lock", str), disk.lock(tmp_path / "x.lock", str):
        pass


def test_what_refuses_a_lock_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LVMError, match=r"file/x\.lock") as e:
        disk.lock(tmp_path / "file" / "x.lock", str).__enter__()
    assert e.value.__cause__.errno in (errno.ENOTDIR, errno.EEXIST)


@pytest.mark.parametrize("name", ["run", "run.v1"])
def test_folders_are_set_aside_by_number(tmp_path, name):
    (tmp_path / f"{name}.old-1").symlink_to("nowhere")  # a broken link is in the way, too
    for number in (2, 3):
        (tmp_path / name).mkdir()
        assert disk.set_aside(tmp_path / name) == tmp_path / f"{name}.old-{number}"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_is_set_aside_with_its_companions(tmp_path):
    for name in ("a.ipynb", "a.html", "a.old-1.html"):
        (tmp_path / name).write_text(name)
    assert disk.set_aside(tmp_path / "a.ipynb", ".html") == tmp_path / "a.old-2.ipynb"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.old-1.html", "a.old-2.html", "a.old-2.ipynb"]


@pytest.mark.parametrize(
    "number, reason",
    [
        (errno.EACCES, "there is no right to write"),
        (errno.EDQUOT, "your share of the disk is used up"),
        (errno.EIO, "the disk fails"),
        (errno.ESTALE, "OSError: Stale file handle"),
    ],
)
def test_what_the_system_refuses_is_named(tmp_path, monkeypatch, number, reason):
    def replace(a, b):
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").write_text("before")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(LVMError, match=rf"file: cannot be written: {reason}.*the last one is intact"):
        disk.write_atomic(tmp_path / "file", lambda p: p.write_text("after"), "the last one is intact")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]


def test_a_missing_source_or_a_disk_that_takes_no_copy_is_named(tmp_path):
    """A writer that copies: shutil.copyfile names the source first, then the target."""
    for source in (tmp_path / "elsewhere" / "source", tmp_path / "source"):
        with pytest.raises(LVMError, match=rf"file: was not written, .*{source}: No such file or directory"):
            disk.write_atomic(tmp_path / "file", lambda partial, s=source: shutil.copyfile(s, partial))
        assert list(tmp_path.iterdir()) == []

    def copy(partial):
        raise OSError(errno.ENOSPC, "no room", "/source", None, str(partial))

    with pytest.raises(LVMError, match="file: cannot be written: the disk is full"):
        disk.write_atomic(tmp_path / "file", copy)


def test_a_relative_target_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    own = ("there", "there/file.partial", str(tmp_path / "there" / "file"), "there/file.x1/vectors.npy")
    for name in ("there/file", str(tmp_path / "there" / "file")):
        for other in (*own, "there/filed", "there/other", "elsewhere"):
            message = "there/file: cannot be written: there is no right" if other in own else f"{other}: refused"
            with pytest.raises(LVMError, match=message), disk.explain_os_errors(Path(name)):
                raise PermissionError(errno.EACCES, "refused", other)
