"""Write files atomically, lock folders, set files aside, and explain the errors of a disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import LVMError

UNTOUCHED = "an earlier file is untouched"
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}  # of a file system without locks
PROBE = 1 << 20  # bytes that are tried on a disk which may be full
ANOTHER = "or name another folder, as by LVM_OUTPUTS"
TROUBLE = {
    errno.ENOSPC: ("the disk is full", "free some room"),
    errno.EDQUOT: ("your share of the disk is used up", "free some room, or ask for more"),
    errno.EROFS: ("the disk is read-only", f"make it writable, {ANOTHER}"),
    errno.EIO: ("the disk fails", "look at it, and copy away what can be read"),
    errno.ENOENT: ("the folder is gone", "put it back where it was"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), ("there is no right to write", f"mend the rights, {ANOTHER}")),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), ("a file is where a folder should be", "move that file away")),
}


def write_atomic(path: Path, write: Callable[[Path], object], intact: str = UNTOUCHED) -> None:
    """Call `write(partial)`, flush and rename: the file appears whole or not at all, also after a power cut.

    One process at a time writes in a folder. A partial file is deleted on failure. Raises LVMError if the disk refuses
    (full, read-only, gone); `intact` says what is not lost.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with explain_os_errors(path, intact), _opened(path.parent) as folder:
        with contextlib.suppress(OSError):  # a file system that has no locks for folders
            fcntl.flock(folder, fcntl.LOCK_EX)  # two writers of one name would share the partial file
        try:
            partial.unlink(missing_ok=True)  # it may be a planted link or pipe
            _write(partial, write)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        with contextlib.suppress(OSError):  # a system that does not flush folders
            os.fsync(folder)


def _write(partial: Path, write: Callable[[Path], object]) -> None:
    try:
        write(partial)
        _flush(partial)
    except OSError:
        raise
    except Exception:  # torch and safetensors have errors of their own for a full disk: writing more raises OSError
        with open(partial, "ab") as file:
            file.write(bytes(PROBE))
        _flush(partial)
        raise


def _flush(path: Path) -> None:
    with _opened(path) as file:
        os.fsync(file)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


def sync(folder: Path, files: bool = True) -> None:
    """Wait until a folder's files, and their names, are on the disk."""
    for path in [*(folder.iterdir() if files else []), folder]:
        _flush(path)


def set_aside(path: Path, *companions: str) -> Path:
    """Rename a file to NAME.old-1.SUFFIX, a folder to NAME.old-1, or the next number that is free; return the new path.

    `companions`: suffixes of files of the same name, which are renamed with it.
    """
    path = Path(path)
    stem, suffix = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    suffixes = (suffix, *companions)
    for number in itertools.count(1):
        moves = {path.with_name(stem + s): path.with_name(f"{stem}.old-{number}{s}") for s in suffixes}
        if not any(map(os.path.lexists, moves.values())):
            break
    with explain_os_errors(path):
        for old, new in moves.items():
            if os.path.lexists(old):
                old.rename(new)
    return moves[path]


@contextlib.contextmanager
def explain_os_errors(path: Path, intact: str = UNTOUCHED) -> Iterator[None]:
    """Turn an OSError of writing `path` into an LVMError: what, where, how to fix it, and what is `intact`.

    If the error names another file, such as one that the writer reads, the message names that one.
    """
    try:
        yield
    except Timeout:  # of a lock
        raise
    except OSError as e:
        what, advice = TROUBLE.get(e.errno, (f"{type(e).__name__}: {e.strerror or e}", "mend that"))
        problem = f"cannot be written: {what}"
        if other := _other_file(e, path):
            problem, advice = f"was not written, for something else failed: {other}: {e.strerror or e}", "mend that"
        raise LVMError(f"{path}: {problem}. To do: {advice}, then do the same again; {intact}") from e


def _other_file(e: OSError, path: Path) -> str:
    """Return the file that an error names, unless it is `path`, its partial, something in them, or a parent folder."""
    target = os.path.abspath(path)
    names = [os.path.abspath(os.fsdecode(n)) for n in (e.filename, e.filename2) if n and not isinstance(n, int)]
    own = [target, *map(str, Path(target).parents)]
    # Of two names, as where a file is copied to another, either may be what fails.
    is_own = any(name in own or name.startswith((target + ".", target + os.sep)) for name in names)
    return names[0] if names and not is_own else ""


@contextlib.contextmanager
def lock(path: Path, refused: Callable[[str], str], wait: float = 0.0) -> Iterator[None]:
    """Hold the file `path` for this process alone until the block ends. The system frees it when the process dies.

    The file names its holder. Another holder is waited for `wait` seconds; then LVMError(refused(holder)) is raised.
    On a file system without locks nothing is held.
    """
    file = FileLock(path, fallback_to_soft=False)  # a marker in place of a lock would outlive a killed process
    try:
        with explain_os_errors(path):
            _acquire(file, path, wait)
    except Timeout:
        raise LVMError(refused(_holder(path))) from None
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


def _acquire(file: FileLock, path: Path, wait: float) -> None:
    """Acquire a lock, after removing a link or a pipe that lies at its path. Raises Timeout and OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            path.unlink()
    try:
        file.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise
        print(f"{path}: held by {_holder(path)}; waiting for it to end", flush=True)
        file.acquire(timeout=wait, poll_interval=0.1)
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise


def _holder(path: Path) -> str:
    holder = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        holder = file.read(400)
    return holder.decode(errors="replace").strip() or "another process"
