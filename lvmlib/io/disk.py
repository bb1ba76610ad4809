"""Write files atomically, lock folders, set files aside, and explain the errors of a disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import LVMError

UNTOUCHED = "what stood there before is untouched"
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}  # of a file system without locks
PROBE = 1 << 20  # bytes that are tried on a disk which may be full
TROUBLE = {
    errno.ENOSPC: ("the disk is full", "free some room"),
    errno.EDQUOT: ("your share of the disk is used up", "free some room, or ask for more"),
    errno.EROFS: ("the disk is read-only", "make it writable, or name another folder, as by LVM_OUTPUTS"),
    errno.EACCES: ("there is no right to write", "mend the rights, or name another folder, as by LVM_OUTPUTS"),
    errno.EPERM: ("there is no right to write", "mend the rights, or name another folder, as by LVM_OUTPUTS"),
    errno.EIO: ("the disk fails", "look at it, and copy away what can be read"),
    errno.ENOENT: ("the folder is gone", "put it back where it was"),
    errno.ENOTDIR: ("a file stands where a folder should", "move that file away"),
    errno.EEXIST: ("a file stands where a folder should", "move that file away"),
}


def write_atomic(path: Path, write: Callable[[Path], object], kept: str = UNTOUCHED) -> None:
    """Call `write(partial)`, flush and rename: the file appears whole or not at all, also after a power cut.

    One process at a time writes in a folder. A partial file is deleted on failure. Raises LVMError if the disk refuses
    (full, read-only, gone); `kept` names what is not lost.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with explain_os_errors(path, kept), _folder(path.parent) as folder:
        try:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()  # it may be a planted link or pipe
            try:
                write(partial)
            except Exception as e:  # torch and safetensors have errors of their own for a full disk
                if getattr(e, "errno", None) is None and (why := _write_error(partial)):
                    raise why from e
                raise
            with open(partial, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        with contextlib.suppress(OSError):  # a system that does not flush folders
            os.fsync(folder)


def set_aside(path: Path, *companions: str) -> Path:
    """Rename a file to NAME.old-1.SUFFIX, a folder to NAME.old-1, or the next number that is free; return the new path.

    `companions`: suffixes of files of the same name, which are renamed with it.
    """
    path = Path(path)
    stem, suffix = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    suffixes = (suffix, *companions)
    number = 1
    while any(os.path.lexists(path.with_name(f"{stem}.old-{number}{s}")) for s in suffixes):
        number += 1
    with explain_os_errors(path):
        for s in suffixes:
            if os.path.lexists(path.with_name(stem + s)):
                path.with_name(stem + s).rename(path.with_name(f"{stem}.old-{number}{s}"))
    return path.with_name(f"{stem}.old-{number}{suffix}")


def job_folder() -> tempfile.TemporaryDirectory:
    """Make a temporary folder whose path leaves room for the name of a socket (about 100 characters in all)."""
    near = "/tmp" if len(tempfile.gettempdir()) > 60 else None
    return tempfile.TemporaryDirectory(prefix="lvm-", dir=near, ignore_cleanup_errors=True)


def sync(folder: Path, files: bool = True) -> None:
    """Wait until a folder's files, and their names, are on the disk."""
    for path in [*(folder.iterdir() if files else []), folder]:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


@contextlib.contextmanager
def explain_os_errors(path: Path, kept: str = UNTOUCHED) -> Iterator[None]:
    """Turn an OSError of writing `path` into an LVMError: what, where, how to fix it, and what is `kept`.

    If the error names another file, such as one that the writer reads, the message names that one.
    """
    try:
        yield
    except Timeout:  # of a lock
        raise
    except OSError as e:
        if other := _elsewhere(e, path):
            raise LVMError(
                f"{path}: was not written, for something else failed: {other}: {e.strerror or e}. To do: mend that, "
                f"then do the same again; {kept}"
            ) from e
        what, advice = TROUBLE.get(e.errno, (f"{type(e).__name__}: {e.strerror or e}", "mend that"))
        rest = "" if e.errno == errno.ENOENT else f"; {kept}"
        raise LVMError(f"{path}: cannot be written: {what}. To do: {advice}, then do the same again{rest}") from e


def _elsewhere(e: OSError, path: Path) -> str:
    """Return the file that an error names, unless it is `path`, its partial, something in them, or a parent folder."""
    names = [
        os.path.abspath(os.fsdecode(x)) for x in (e.filename, e.filename2) if isinstance(x, str | bytes | os.PathLike)
    ]
    target = os.path.abspath(path)
    for name in names:  # of two, as where a file is copied to another, either may be what fails
        if (
            name == target
            or name.startswith((target + ".", target + os.sep))
            or target.startswith(name.rstrip(os.sep) + os.sep)
        ):
            return ""
    return names[0] if names else ""


@contextlib.contextmanager
def lock(path: Path, refused: Callable[[str], str], wait: float = 0.0) -> Iterator[None]:
    """Hold the file `path` for this process alone until the block ends. The system frees it when the process dies.

    The file names its holder. Another holder is waited for `wait` seconds; then LVMError(refused(holder)) is raised.
    On a file system without locks nothing is held.
    """
    file = FileLock(path, fallback_to_soft=False)  # a marker in place of a lock would outlive a killed process
    for seconds in (0.0, wait):
        try:
            with explain_os_errors(path):
                _acquire(file, path, seconds)
            break
        except Timeout:
            holder = _holder(path)
            if wait and not seconds:
                print(f"{path}: held by {holder}; waiting for it to end", flush=True)
    else:
        raise LVMError(refused(holder)) from None
    own = None
    try:
        with contextlib.suppress(OSError):  # a full disk
            own = os.stat(path)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}\n", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            if own and os.path.samestat(own, os.stat(path)):
                path.unlink()
        file.release()


def _acquire(file: FileLock, path: Path, seconds: float) -> None:
    """Acquire a lock, after removing a link or a pipe that lies at its path. Raises Timeout and OSError."""
    for attempt in range(100):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
                path.unlink()
            file.acquire(timeout=seconds, poll_interval=0.1)
            return
        except FileNotFoundError:  # its holder has just ended, and removed the folder
            if attempt == 99:
                raise
        except Timeout:
            raise
        except OSError as e:
            if e.errno not in NO_LOCKS:
                raise
            return


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(400).decode(errors="replace").strip() or "another process"
    return "another process"


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[int]:
    """Open and lock the folder: two writers of one name would share the partial file."""
    file = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system that has no locks for folders
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def _write_error(partial: Path) -> OSError | None:
    """Return the error of writing more to `partial`, if any."""
    try:
        with open(partial, "ab") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        return e
    return None
