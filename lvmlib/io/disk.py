"""Files that appear whole or not at all, folders that one process holds, and what a disk says in words."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import LVMError

UNTOUCHED = "what stood there before is untouched"
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


def write_whole(path: Path, write: Callable[[Path], object], kept: str = UNTOUCHED) -> None:
    """`write(partial)`, flush and rename: the file appears whole or not at all, and its name outlives a power cut.

    One process at a time writes in a folder. Raises LVMError where the disk does not take it (full, read-only, gone);
    `kept` says what is not lost by that. However it fails, the part that was written is taken away: it may be what
    filled the disk.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with told(path, kept), _folder(path.parent) as folder:
        try:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()  # it may have come with the folder: a link leads elsewhere, a pipe waits for ever
            try:
                write(partial)
            except Exception as e:  # torch and safetensors have errors of their own for a full disk
                if getattr(e, "errno", None) is None and (why := _refused(partial)):
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
    """Rename a file to NAME.old-1, NAME.old-2 and so on, before its suffix, the next that is free; and with it the
    files of the same name and these suffixes. Returns its new path."""
    kinds = (path.suffix, *companions)
    olds = (path.with_suffix(f".old-{i}{path.suffix}") for i in range(1, 10**6))
    old = next(p for p in olds if not any(p.with_suffix(kind).exists() for kind in kinds))
    with told(old):
        for kind in kinds:
            if path.with_suffix(kind).exists():
                path.with_suffix(kind).rename(old.with_suffix(kind))
    return old


def job_folder() -> tempfile.TemporaryDirectory:
    """A folder of a job's own, with a path that leaves room for the name of a socket (some 100 characters in all)."""
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
def told(path: Path, kept: str = UNTOUCHED) -> Iterator[None]:
    """What the system refuses inside, in words: LVMError with what, where, what to do, and what is `kept`.

    Where the system names a file that is neither `path` nor what is made of it (something that the writer reads), that
    one is told, and no disk is blamed."""
    try:
        yield
    except OSError as e:
        if other := _elsewhere(e, path):
            raise LVMError(
                f"{path}: was not written, for something else failed: {other}: {e.strerror or e}. To do: mend that, "
                f"then do the same again; {kept}"
            ) from e
        what, advice = TROUBLE.get(e.errno, (f"{type(e).__name__}: {e.strerror or e}", "mend that"))
        said = "" if e.errno == errno.ENOENT else f"; {kept}"
        raise LVMError(f"{path}: cannot be written: {what}. To do: {advice}, then do the same again{said}") from e


def _elsewhere(e: OSError, path: Path) -> str:
    """The file that an error names, where that is not `path`, a partial of it, what is in these, or a folder that it
    lies in; else empty."""
    named = [
        os.path.abspath(os.fsdecode(x)) for x in (e.filename, e.filename2) if isinstance(x, str | bytes | os.PathLike)
    ]
    target = os.path.abspath(path)
    for name in named:  # of two, as where a file is copied to another, either may be what fails
        if (
            name == target
            or name.startswith((target + ".", target + os.sep))
            or target.startswith(name.rstrip(os.sep) + os.sep)
        ):
            return ""
    return named[0] if named else ""


@contextlib.contextmanager
def hold(lock: Path, refused: Callable[[str], str], wait: float = 0.0) -> Iterator[None]:
    """The file `lock`, held by this process alone until the block ends or the process does, however that ends.

    The lock is the system's (flock); the file says who holds it and since when, and no age or number in it is ever
    trusted. Another holder is waited for `wait` seconds, with a word, then LVMError(refused(holder)). Where a file
    system has no locks, nothing is held.
    """
    ends, said = time.monotonic() + wait, False
    while True:
        with told(lock):
            file = _opened(lock)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 400, 0).decode(errors="replace").strip() or "another process"
            os.close(file)
            if time.monotonic() >= ends:
                raise LVMError(refused(holder)) from None
            if not said:
                print(f"{lock}: {holder} holds it; waiting up to {wait:g} s for its end", flush=True)
            said = True
            time.sleep(0.1)
            continue
        except OSError:
            pass  # a file system that has no locks
        if _same(file, lock):
            break
        os.close(file)  # its holder has just ended, and taken it away
    try:
        with contextlib.suppress(OSError):  # a full disk: who cannot write a word will be told so soon
            os.ftruncate(file, 0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            if _same(file, lock):
                lock.unlink()
        os.close(file)


def _opened(lock: Path) -> int:
    for _ in range(100):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            pass  # its holder has just ended, and taken the folder away
        except OSError as e:
            if e.errno != errno.ELOOP:
                raise
            lock.unlink(missing_ok=True)  # a link, which came with the folder: what it leads to would be written over
    raise FileNotFoundError(errno.ENOENT, "cannot be made", str(lock))


def _same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[int]:
    """The folder, opened, and held while a file is written: two writers of one name would share the partial file."""
    file = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system that has no locks for folders
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def _refused(partial: Path) -> OSError | None:
    """What the system says when more is written to `partial`; None where it takes it."""
    try:
        with open(partial, "ab") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        return e
    return None
