"""Read arrays of untrusted .npz files as streams, and object arrays (pickles) without running any code in them.

Every fault of a file is an LVMError that names file and array.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
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
MOST = 1 << 30  # bytes of one row, or of an object array
OBJECT_BYTES, OBJECT_RATIO = 1 << 24, 100  # an object array unpacks to 16 MiB, or 100 times its size in the zip
BIGGEST = np.iinfo(np.int32).max  # of article numbers and positions in a store
SHOW_PROGRESS = 1 << 26  # bytes of an array from which a terminal shows progress
DAMAGED = "copy the file again, or save it again with np.savez"


@contextlib.contextmanager
def _reading(where: str, advice: str = DAMAGED) -> Iterator[None]:
    """Turn whatever zipfile, zlib, pickle or numpy raise on damaged input into an LVMError."""
    try:
        yield
    except LVMError:
        raise
    except Exception as e:
        raise LVMError(f"{where}: cannot be read ({type(e).__name__}: {str(e)[:200]}); {advice}") from e


def check_room(folder: Path, size: int, where: str) -> None:
    """Raise LVMError unless the disk of `folder` has `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise LVMError(f"{where}: needs {size / 1e9:.1f} GB on disk, and {free / 1e9:.1f} GB are free; make room")


@dataclass(frozen=True)
class Member:
    """An array in a file, as its header describes it; `skip`: the length of the header in bytes."""

    where: str
    info: zipfile.ZipInfo
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    skip: int

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
    """An .npz file, read as a stream. `scratch`: a folder for what must be unpacked first.

    Raises LVMError if the file is not an archive as numpy writes it.
    """

    def __init__(self, path: Path, scratch: Path):
        self.path, self.scratch, self.members = path, scratch, {}
        self.used = set()  # names of the arrays that were asked for
        with _reading(str(path), f"not a readable .npz archive: {DAMAGED}"):
            if not path.is_file():
                raise FileNotFoundError("no such file")
            self.zip = zipfile.ZipFile(path)
        for info in self.zip.infolist():
            self._admit(info)

    def __contains__(self, name: str) -> bool:
        return name in self.members

    @property
    def listed(self) -> str:
        """The names of the arrays, for messages."""
        return ", ".join(sorted(self.members))[:200] or "none"

    def _admit(self, info: zipfile.ZipInfo) -> None:
        name, parts = info.filename.removesuffix(".npy"), re.split(r"[/\\]", info.filename)
        stored = info.compress_type == zipfile.ZIP_STORED
        most = info.compress_size if stored else 1040 * info.compress_size + 1024  # deflate packs no tighter
        faults = {
            "is named like a path that leads out of the archive": ".." in parts or "" in parts or ":" in info.filename,
            "is encrypted": info.flag_bits & 0x41,
            f"is packed by method {info.compress_type}": not stored and info.compress_type != zipfile.ZIP_DEFLATED,
            f"claims {info.file_size:,} bytes, but has {info.compress_size:,} in the file": (
                info.compress_size > self.path.stat().st_size or info.file_size > most
            ),
            "is in the archive twice": name in self.members,
        }
        for fault, found in faults.items():
            if found:
                raise LVMError(f"{self.path}: member {info.filename[:100]!r}: {fault}; {DAMAGED}")
        if name != info.filename:
            self.members[name] = info

    def member(self, name: str) -> Member:
        """Return an array's header, checked against its size."""
        info, where = self.members[name], f"{self.path}: array {name}"
        self.used.add(name)
        with _reading(where), self.zip.open(info) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_2_0 if version == (2, 0) else np.lib.format.read_array_header_1_0
            shape, fortran, dtype = read(file)
            member = Member(where, info, dtype, shape, fortran, file.tell())
        if dtype.kind not in "fiubUSO" or (dtype.kind == "f" and dtype.itemsize > 8):
            raise LVMError(f"{where}: has type {str(dtype)[:50]}; save it as plain arrays of numbers or texts")
        if not all(0 <= n < 1 << 62 for n in shape):
            raise LVMError(f"{where}: has the impossible shape {str(shape)[:50]}; {DAMAGED}")
        promised = member.skip + dtype.itemsize * math.prod(shape)
        if dtype.kind != "O" and (promised != info.file_size or member.row_bytes > MOST):
            raise LVMError(f"{where}: promises {shape} of {dtype}, but has {info.file_size:,} bytes; {DAMAGED}")
        return member

    def rows(self, member: Member, rows: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, block) over an array that holds no objects, in this machine's byte order."""
        rows = rows or max(1, BLOCK_BYTES // max(1, member.row_bytes))
        native = member.dtype.newbyteorder("=")
        with _reading(member.where), self.zip.open(member.info) as file, _bar(member) as bar:
            file.read(member.skip)
            spooled = self._spooled(file, member) if member.fortran and len(member.shape) > 1 else None
            for first in range(0, member.shape[0], rows):
                count = min(rows, member.shape[0] - first)
                if spooled is None:
                    block = np.frombuffer(file.read(count * member.row_bytes), member.dtype)
                    block = block.reshape(count, *member.shape[1:])
                else:
                    block = spooled[first : first + count]
                bar.update(count * member.row_bytes)
                yield first, np.asarray(block, native, order="C")

    def _spooled(self, file, member: Member) -> np.memmap:
        """An array stored by columns, unpacked into a temporary file."""
        check_room(self.scratch, member.info.file_size, member.where)
        with tempfile.TemporaryFile(dir=self.scratch) as spool:
            shutil.copyfileobj(file, spool, BLOCK_BYTES)
            spool.flush()
            return np.memmap(spool, member.dtype, "r", shape=member.shape, order="F")

    def objects(self, member: Member) -> list:
        """The items of an object array, in order. No code of the file is run, and arrays within are not made.

        Raises LVMError for any pickle but that of an array of plain things, and for one that unpacks to too much.
        """
        size = member.info.file_size
        if size > member.allowed:
            raise LVMError(
                f"{member.where}: unpacks to {size:,} bytes (at most {member.allowed:,}); save a plain array"
            )
        with _reading(member.where, "it is a pickle, and nothing in it was run: save it as a plain array"):
            data = io.BytesIO(self.zip.read(member.info))
            data.seek(member.skip)
            array = _Unpickler(data, math.prod(member.shape)).load()
            if data.read(1):
                raise ValueError("goes on after its end")
            return _items(array, member.shape)

    def numbers(self, name: str, *shape: int) -> np.ndarray:
        """`shape` int32 from an array of article numbers or positions, a row for each vector or window."""
        member = self.member(name)
        if member.shape != shape or member.dtype.kind not in ("iufO" if len(shape) == 1 else "iuf"):
            raise member.needs(f"{shape} whole numbers, one for each vector or window")
        if member.dtype.kind == "O":
            items = enumerate(self.objects(member))
            return np.array([whole_number(item, f"{member.where}, row {row}") for row, item in items], np.int32)
        numbers = np.concatenate([np.empty((0, *shape[1:]), member.dtype), *(block for _, block in self.rows(member))])
        with np.errstate(all="ignore"):
            good = (numbers >= 0) & (numbers <= BIGGEST) & (numbers == np.floor(numbers))
        if not good.all():
            first = int(np.argmin(good))
            whole_number(numbers.flat[first].item(), f"{member.where}, row {first // math.prod(shape[1:])}")
        return numbers.astype(np.int32)

    def texts(self, name: str) -> Iterator[str]:
        """The texts of an array of them; None and NaN are empty texts, and halves of surrogate pairs �."""
        member = self.member(name)
        if len(member.shape) != 1 or member.dtype.kind not in "USO":
            raise member.needs("a row of texts")
        blocks = [(0, self.objects(member))] if member.dtype.kind == "O" else self.rows(member)
        for first, block in blocks:
            with _reading(f"{member.where}, row {first} and following"):
                items = block if member.dtype.kind == "O" else _plain(block)
                texts = [item.decode() if isinstance(item, bytes) else item for item in items]
            for row, text in enumerate(texts, first):
                if text is None or (isinstance(text, float) and math.isnan(text)):
                    text = ""
                if not isinstance(text, str):
                    raise LVMError(f"{member.where}, row {row}: is {type(text).__name__}; needed is text")
                yield text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _bar(member: Member) -> tqdm:
    """A progress bar in a terminal, for large arrays."""
    size, name = member.info.file_size, member.info.filename
    off = None if size >= SHOW_PROGRESS else True
    return tqdm(total=size, unit="B", unit_scale=True, desc=name, delay=3, leave=False, disable=off)


def whole_number(item, where: str) -> int:
    """`item` as a whole number that a store can hold."""
    if isinstance(item, bool) or not isinstance(item, int | float) or not 0 <= item <= BIGGEST or item != int(item):
        short = isinstance(item, float) or (isinstance(item, int) and abs(item) < 1 << 64)
        shown = item if short else type(item).__name__
        raise LVMError(f"{where}: is {shown}; needed is a whole number from 0 to {BIGGEST}")
    return int(item)


def _plain(block: np.ndarray) -> list:
    """The items (n,) of an array as numbers or texts. Numpy itself lets any 4 bytes pass as a character."""
    if block.dtype.kind == "U" and block.dtype.itemsize and block.view(np.uint32).max(initial=0) > sys.maxunicode:
        raise ValueError("has characters beyond Unicode")
    return block.tolist()


# --- object arrays ----------------------------------------------------------------------------------------------------


class _Made:
    """A function of numpy that a pickle names, or what it makes by calling it: a record, and nothing is called."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple | None = None):
        self.name, self.args, self.state = name, args, None


def _dtype_code(made) -> str:
    """The byte order and code of the plain dtype that a pickle made."""
    if type(made) is not _Made or made.name != "dtype" or type(made.args) is not tuple or type(made.state) is not tuple:
        raise ValueError("has no type as numpy writes it")
    code, order, structure = made.args[0], made.state[1], made.state[2:5]
    if structure != (None, None, None) or order not in ("|", "<", ">", "=") or type(code) is not str:
        raise ValueError("has a structured type")
    return order + code


def _scalar(dtype, data):
    """The number or text of these bytes."""
    code = _dtype_code(dtype)
    if not re.fullmatch(r".(b1|[iu][1248]|f[248]|[US]\d{1,7})", code) or type(data) is not bytes:
        raise ValueError(f"type {code[:20]!r} is not a plain one")
    kind = np.dtype(code)
    if len(data) != kind.itemsize:
        raise ValueError(f"has a number of {len(data)} bytes for type {kind}")
    one = np.frombuffer(data, kind) if data else np.zeros(1, kind)
    return _plain(one.astype(kind.newbyteorder("=")))[0]


def _items(array, shape: tuple[int, ...]) -> list:
    """The items of the array that a pickle holds. They are unchecked; never walk through them: one can hold itself."""
    if type(array) is not _Made or array.name != "_reconstruct" or type(array.state) is not tuple:
        raise ValueError("is no array")
    _, claimed, dtype, _, items = array.state
    if _dtype_code(dtype)[1:] not in ("O", "O8") or type(items) is not list:
        raise ValueError("is no array of objects")
    if claimed != shape or len(items) != math.prod(shape):
        raise ValueError(f"claims the shape {shape}, but holds {len(items)} items")
    return items


ADMITTED = {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
ADMITTED |= {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
OPCODES = """
    GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT NONE
    NEWTRUE NEWFALSE STRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 MARK
    EMPTY_TUPLE EMPTY_LIST EMPTY_DICT TUPLE TUPLE1 TUPLE2 TUPLE3 LIST APPEND APPENDS GLOBAL STACK_GLOBAL PROTO FRAME
    STOP
"""
MAKING = re.compile("PUT|MEMOIZE|MARK|TUPLE|LIST|DICT")  # some 100 bytes each, for one in the file


class _Unpickler(pickle._Unpickler):
    """Load what numpy writes of an array of plain things; nothing that the pickle names is looked up or called.

    It is Python's own unpickler: the one in C allocates memory by a number in the file, and its opcodes cannot be left
    out. An opcode that could make, change or hash anything but plain things is not in `dispatch`.
    """

    def __init__(self, data: io.BytesIO, count: int):
        super().__init__(data)
        self.left = min(100_000 + 64 * count, 1 << 25)  # opcodes of MAKING that it may have

    def find_class(self, module: str, name: str) -> _Made:
        if (module, name) not in ADMITTED:
            raise ValueError(f"asks to load {module[:100]}.{name[:100]}")
        return _Made(name)

    def call(self) -> None:
        args, function = self.stack.pop(), self.stack[-1]
        if type(function) is not _Made or function.args is not None or type(args) is not tuple:
            raise ValueError("calls what is no function of numpy")
        if function.name == "scalar":
            self.stack[-1] = _scalar(*args)
        elif function.name == "encode":  # how protocol 2 writes bytes
            if len(args) != 2 or type(args[0]) is not str or args[1] not in ("latin1", "latin-1"):
                raise ValueError("calls _codecs.encode for another codec than latin1")
            self.stack[-1] = args[0].encode("latin1")
        else:
            self.stack[-1] = _Made(function.name, args)

    def build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if type(made) is not _Made or made.args is None or made.state is not None:
            raise ValueError("sets the inside of what is no new array")
        made.state = state

    def put_items(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2 or not all(type(key) is str for key in items[::2]):
            raise ValueError("has a dict with keys that are no texts")  # hashing those may take for ever
        target.update(zip(items[::2], items[1::2], strict=True))

    def set_item(self) -> None:
        self.put_items([self.stack.pop(-2), self.stack.pop()])

    def set_items(self) -> None:
        self.put_items(self.pop_mark())


def _counted(load):
    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError("is too large for the number of its items")
        load(self)

    return step


_loaders = {name: pickle._Unpickler.dispatch[ord(getattr(pickle, name))] for name in OPCODES.split()}
_Unpickler.dispatch = {
    **{ord(getattr(pickle, n)): _counted(load) if MAKING.search(n) else load for n, load in _loaders.items()},
    ord(pickle.REDUCE): _Unpickler.call,
    ord(pickle.BUILD): _Unpickler.build,
    ord(pickle.SETITEM): _Unpickler.set_item,
    ord(pickle.SETITEMS): _Unpickler.set_items,
}
