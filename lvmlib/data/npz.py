"""Read arrays of untrusted .npz files as streams, and object arrays (pickles) without running any code in them.

Of a pickle only plain things are read; nothing that it names is looked up or called. Every fault of a file is an
LVMError that names file and array.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import pickletools
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import LVMError

BLOCK_BYTES = 1 << 22  # of an array, read at a time
MOST = 1 << 30  # bytes of what is read whole: one row, or an object array
OBJECT_BYTES, OBJECT_RATIO = 1 << 24, 100  # an object array unpacks to 16 MiB, or 100 times its size in the zip
BIGGEST = np.iinfo(np.int32).max  # of article numbers and positions in a store
DAMAGED = "copy the file again, or save it again with np.savez"


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    """Whatever zipfile, zlib, pickle or numpy raise on damaged input, as one LVMError."""
    try:
        yield
    except LVMError:
        raise
    except Exception as e:
        raise LVMError(f"{where}: cannot be read ({type(e).__name__}: {str(e)[:200]}); {DAMAGED}") from e


@dataclass(frozen=True)
class Member:
    """An array in a file, as its header describes it; `skip`: the length of the header in bytes."""

    path: Path
    name: str
    info: zipfile.ZipInfo
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    skip: int

    @property
    def where(self) -> str:
        return f"{self.path}: array {self.name}"

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def allowed(self) -> int:
        """The bytes that an object array may have."""
        return min(MOST, max(OBJECT_BYTES, OBJECT_RATIO * self.info.compress_size))

    def needs(self, what: str) -> LVMError:
        return LVMError(f"{self.where}: has shape {self.shape} and type {self.dtype}; needed is {what}")


class Npz:
    """An .npz file, read as a stream; `scratch`: a folder for what must be unpacked first.

    Raises LVMError if the file is not an archive as numpy writes it.
    """

    def __init__(self, path: Path, scratch: Path):
        self.path, self.scratch, self.members = path, scratch, {}
        if not path.is_file():
            raise LVMError(f"{path}: {'is no file' if path.exists() else 'there is no such file'}; name an .npz file")
        with open(path, "rb") as file:
            if file.read(6) == b"\x93NUMPY":
                raise LVMError(f"{path}: is a single .npy array under the name .npz; save it with np.savez(…)")
        try:
            self.zip = zipfile.ZipFile(path)
        except Exception as e:
            raise LVMError(f"{path}: not a readable .npz archive ({str(e)[:200]}); {DAMAGED}") from e
        try:
            for info in self.zip.infolist():
                self._admit(info)
        except BaseException:
            self.zip.close()
            raise

    def __contains__(self, name: str) -> bool:
        return name in self.members

    @property
    def listed(self) -> str:
        """The names of the arrays, for messages."""
        return ", ".join(sorted(self.members))[:200] or "none"

    def _admit(self, info: zipfile.ZipInfo) -> None:
        where = f"{self.path}: member {info.filename[:100]!r}"
        parts = re.split(r"[/\\]", info.filename)
        if ".." in parts or "" in parts or ":" in info.filename:
            raise LVMError(f"{where}: is named like a path that leads out of the archive; do not trust this file")
        if info.flag_bits & 0x41:
            raise LVMError(f"{where}: is encrypted; save the file without a password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise LVMError(f"{where}: is packed by method {info.compress_type}; save it with np.savez")
        stored = info.compress_type == zipfile.ZIP_STORED
        most = info.compress_size if stored else 1040 * info.compress_size + 1024  # deflate packs no tighter
        if info.compress_size > self.path.stat().st_size or info.file_size > most:
            raise LVMError(
                f"{where}: claims {info.file_size:,} bytes, but has {info.compress_size:,} in the file; {DAMAGED}"
            )
        if info.filename.endswith(".npy"):
            name = info.filename.removesuffix(".npy")
            if name in self.members:
                raise LVMError(f"{where}: is there twice; save the file anew with one array of each name")
            self.members[name] = info

    def member(self, name: str) -> Member:
        """An array's header, checked against its size."""
        info, where = self.members[name], f"{self.path}: array {name}"
        with _reading(where), self.zip.open(info) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_2_0 if version == (2, 0) else np.lib.format.read_array_header_1_0
            shape, fortran, dtype = read(file)
            member = Member(self.path, name, info, dtype, shape, fortran, file.tell())
        if dtype.kind not in "fiubUSO" or (dtype.kind == "f" and dtype.itemsize > 8):
            raise LVMError(f"{where}: has type {str(dtype)[:50]}; save it as plain arrays of numbers or texts")
        if not all(0 <= n < 1 << 62 for n in shape):
            raise LVMError(f"{where}: has the impossible shape {str(shape)[:50]}; {DAMAGED}")
        if member.dtype.kind == "O":
            return member
        promised = member.skip + member.dtype.itemsize * math.prod(member.shape)
        if promised != info.file_size:
            raise LVMError(
                f"{where}: promises {shape} of {dtype}, {promised:,} bytes, but has {info.file_size:,}; {DAMAGED}"
            )
        if member.row_bytes > MOST:
            raise LVMError(f"{where}: one row has {member.row_bytes:,} bytes; {MOST:,} is the most that is read")
        return member

    def rows(self, member: Member, rows: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, block) over an array that holds no objects, in this machine's byte order."""
        rows = rows or max(1, BLOCK_BYTES // max(1, member.row_bytes))
        native = member.dtype.newbyteorder("=")
        if member.fortran and len(member.shape) > 1:  # stored by columns: it must be unpacked whole first
            path = self._spooled(member)
            try:
                columns = np.memmap(path, member.dtype, "r", shape=member.shape, order="F")
                for first in range(0, member.shape[0], rows):
                    yield first, np.ascontiguousarray(columns[first : first + rows]).astype(native, copy=False)
            finally:
                path.unlink()
            return
        with _reading(member.where), self.zip.open(member.info) as file, _bar(member) as bar:
            file.read(member.skip)
            for first in range(0, member.shape[0], rows):
                shape = (min(rows, member.shape[0] - first), *member.shape[1:])
                size = math.prod(shape) * member.dtype.itemsize
                data = file.read(size)
                if len(data) < size:
                    raise EOFError(f"ends within row {first + len(data) // member.row_bytes}")
                bar.update(size)
                yield first, np.frombuffer(data, member.dtype).reshape(shape).astype(native, copy=False)
            if file.read(1):  # the read that meets the end also compares the checksum
                raise ValueError("goes on after its end")

    def _spooled(self, member: Member) -> Path:
        size = member.info.file_size - member.skip
        check_room(self.scratch, size, member.where)
        handle, path = tempfile.mkstemp(dir=self.scratch)
        with _reading(member.where), open(handle, "wb") as out, self.zip.open(member.info) as file:
            file.read(member.skip)
            shutil.copyfileobj(file, out, BLOCK_BYTES)
            if out.tell() != size:
                raise EOFError("ends early")
        return Path(path)

    def objects(self, member: Member) -> list:
        """The items of an object array, in order. No code of the file is run, and arrays within are not made.

        Raises LVMError for any pickle but that of an array of plain things, naming what it asks to load, and for one
        that unpacks to too much.
        """
        if member.info.file_size > member.allowed:
            raise LVMError(
                f"{member.where}: an object array that unpacks to {member.info.file_size:,} bytes, more than the "
                f"{member.allowed:,} allowed; save it as a plain array"
            )
        try:
            with _reading(member.where):
                with self.zip.open(member.info) as file:
                    data = io.BytesIO(file.read())
                data.seek(member.skip)
                array = _Unpickler(data, math.prod(member.shape)).load()
                if data.read(1):
                    raise ValueError("goes on after its end")
                return _items(array, member.shape)
        except LVMError as e:
            if not isinstance(e.__cause__, _Refused):
                raise
            raise LVMError(
                f"{member.where}: an object array (a pickle) that {e.__cause__}; nothing of it was run: save it as a "
                "plain array"
            ) from e.__cause__

    def numbers(self, name: str, count: int) -> np.ndarray:
        """(count,) int32 from an array of article numbers or positions."""
        member = self.member(name)
        if member.shape != (count,) or member.dtype.kind not in "iufO":
            raise member.needs(f"({count},) whole numbers, one for each vector or window")
        if member.dtype.kind == "O":
            items = enumerate(self.objects(member))
            return np.array([whole(item, f"{member.where}, row {row}") for row, item in items], np.int32)
        numbers = np.empty(count, np.int32)
        for first, block in self.rows(member):
            with np.errstate(all="ignore"):
                good = (block >= 0) & (block <= BIGGEST) & (block == np.floor(block))
            if not good.all():
                row = int(np.argmin(good))
                whole(block[row].item(), f"{member.where}, row {first + row}")
            numbers[first : first + len(block)] = block
        return numbers

    def texts(self, name: str) -> Iterator[str]:
        """The texts of an array of them; None and NaN are empty texts, and halves of surrogate pairs �."""
        member = self.member(name)
        if len(member.shape) != 1 or member.dtype.kind not in "USO":
            raise member.needs("a row of texts")
        items = self.objects(member) if member.dtype.kind == "O" else self._strings(member)
        for row, item in enumerate(items):
            if item is None or (isinstance(item, float) and item != item):
                item = ""
            if isinstance(item, bytes):
                with _reading(f"{member.where}, row {row}"):
                    item = item.decode()
            if not isinstance(item, str):
                raise LVMError(f"{member.where}, row {row}: is {type(item).__name__}; needed is text")
            yield item if item.isascii() else item.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _strings(self, member: Member) -> Iterator[str | bytes]:
        for first, block in self.rows(member):
            bad = np.flatnonzero(_no_text(block))
            if len(bad):
                raise LVMError(f"{member.where}, row {first + bad[0]}: holds code points that there are not; {DAMAGED}")
            yield from block.tolist()


def whole(item, where: str) -> int:
    """`item` as a whole number that a store can hold."""
    if isinstance(item, bool) or not isinstance(item, int | float) or not 0 <= item <= BIGGEST or item != int(item):
        shown = type(item).__name__ + (f" {item[:40]!r}" if isinstance(item, str) else "")
        if isinstance(item, float) or (isinstance(item, int) and abs(item) < 1 << 64):
            shown = str(item)
        raise LVMError(f"{where}: is {shown}; needed is a whole number from 0 to {BIGGEST}")
    return int(item)


def _no_text(block: np.ndarray) -> np.ndarray:
    """Which of the items (n,) of a unicode array are none: numpy itself lets any 4 bytes pass as a character."""
    if block.dtype.kind != "U" or not block.dtype.itemsize:
        return np.zeros(len(block), bool)
    return (block.view(np.uint32).reshape(len(block), -1) > sys.maxunicode).any(1)


def check_room(folder: Path, size: int, where: str) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise LVMError(f"{where}: needs {size / 1e9:.1f} GB on disk, and {free / 1e9:.1f} GB are free; make room")


def _bar(member: Member) -> tqdm:
    """A progress bar, for reads of 64 MiB or more in a terminal."""
    size = member.info.file_size
    off = True if size < 1 << 26 else None
    return tqdm(total=size, unit="B", unit_scale=True, desc=member.name, delay=3, leave=False, disable=off)


# --- object arrays ----------------------------------------------------------------------------------------------------


class _Refused(ValueError):
    """What a pickle may not do, in words."""


class _Function:
    """Stands for a function or class of numpy that a pickled array names; called, it gives plain values and stand-ins.
    Like all stand-ins it is an instance with slots: nothing can be set on it, nothing made of it."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __setstate__(self, state):
        raise _Refused("sets the inside of what is no new array")

    def __call__(self, *args):
        kinds = tuple(type(a) for a in args)
        if self.name == "_reconstruct" and kinds[:1] == (_Function,):
            return _Array()
        if self.name == "dtype" and kinds[:1] == (str,):
            return _Dtype(args[0])
        if self.name == "scalar" and kinds == (_Dtype, bytes):
            return args[0].value(args[1])
        if self.name == "encode" and kinds == (str, str) and args[1] in ("latin1", "latin-1"):
            return args[0].encode("latin1")  # how protocol 2 writes bytes
        raise _Refused(f"calls numpy's {self.name} with what numpy does not give it")


class _Dtype:
    __slots__ = ("code", "order")

    def __init__(self, code: str):
        self.code, self.order = code, "|"

    def __setstate__(self, state):
        if type(state) is not tuple or len(state) < 5 or any(part is not None for part in state[2:5]):
            raise _Refused("has a structured type")
        self.order = state[1]

    def value(self, data: bytes):
        """The number or text of these bytes."""
        if self.order not in ("|", "<", ">", "=") or not re.fullmatch(r"b1|[iu][1248]|f[248]|[US]\d{1,7}", self.code):
            raise ValueError(f"type {self.code[:20]!r} is not a plain one")
        dtype = np.dtype(self.order + self.code)
        if len(data) != dtype.itemsize:
            raise ValueError(f"has a number of {len(data)} bytes for type {dtype}")
        one = np.frombuffer(data, dtype).astype(dtype.newbyteorder("=")) if data else np.zeros(1, dtype)
        if _no_text(one).any():
            raise ValueError("has a text with code points that there are not")
        return one[0].item()


class _Array:
    __slots__ = ("state",)

    def __init__(self):
        self.state = None

    def __setstate__(self, state):
        if self.state is not None or type(state) is not tuple or len(state) != 5:
            raise _Refused("sets the inside of what is no new array")
        self.state = state


def _items(array, shape: tuple[int, ...]) -> list:
    """The items of the array that a pickle holds. They are unchecked; never walk through them: one can hold itself."""
    _, claimed, dtype, _, items = getattr(array, "state", None) or (None,) * 5
    if type(dtype) is not _Dtype or dtype.code not in ("O", "O8") or type(items) is not list:
        raise ValueError("is no array of objects")
    if claimed != shape or len(items) != math.prod(shape):
        raise ValueError(f"claims the shape {shape}, but holds {len(items)} items")
    return items


ADMITTED = {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
ADMITTED |= {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
OPCODES = """
    GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT NONE
    NEWTRUE NEWFALSE STRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 MARK
    EMPTY_TUPLE EMPTY_LIST EMPTY_DICT TUPLE TUPLE1 TUPLE2 TUPLE3 LIST APPEND APPENDS REDUCE BUILD INST GLOBAL
    STACK_GLOBAL PROTO FRAME STOP
"""
MAKING = re.compile("PUT|MEMOIZE|MARK|TUPLE|LIST|DICT")  # some 100 bytes each, for one in the file


class _Opcodes(dict):
    def __missing__(self, code: int):
        op = pickletools.code2op.get(chr(code))
        raise _Refused(f"uses the opcode {op.name}, which numpy's arrays do not need" if op else f"holds byte {code}")


class _Unpickler(pickle._Unpickler):
    """Loads what numpy writes of an array of plain things; nothing is ever called but the stand-ins above.

    It is Python's own unpickler: the one in C allocates memory by a number in the file, and its opcodes cannot be left
    out. Any opcode that could make, change or hash anything but plain things is refused.
    """

    dispatch = _Opcodes()

    def __init__(self, data: io.BytesIO, count: int):
        super().__init__(data)
        self.left = min(100_000 + 64 * count, 1 << 25)  # opcodes of MAKING that it may have

    def find_class(self, module: str, name: str) -> _Function:
        if (module, name) not in ADMITTED:
            raise _Refused(f"asks to load {module[:100]}.{name[:100]}")
        return _Function(name)

    def put_items(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2 or not all(type(key) is str for key in items[::2]):
            raise _Refused("has a dict with keys that are no texts")  # hashing those may take for ever
        target.update(zip(items[::2], items[1::2], strict=True))

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.put_items([key, value])

    def set_items(self) -> None:
        self.put_items(self.pop_mark())


def _counted(load):
    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise _Refused("is too large for the number of its items")
        load(self)

    return step


for _name in OPCODES.split():
    _code = ord(getattr(pickle, _name))
    _load = pickle._Unpickler.dispatch[_code]
    _Unpickler.dispatch[_code] = _counted(_load) if MAKING.search(_name) else _load
_Unpickler.dispatch[ord(pickle.SETITEM)] = _Unpickler.set_item
_Unpickler.dispatch[ord(pickle.SETITEMS)] = _Unpickler.set_items
