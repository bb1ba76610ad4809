"""Locks of one process, and files and folders that are set aside."""

import errno
import os

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
