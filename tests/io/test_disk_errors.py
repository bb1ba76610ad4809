"""An error of the operating system while a file is written: which file and which cause the message names."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from lvmlib.errors import LVMError
from lvmlib.io import disk


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
