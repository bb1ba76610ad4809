"""Read the original's .npz files (handbook §1): article files into a table on disk, sequence files block by block.

Axes: M chunks, D vector dimension, N windows, T context length, B windows of a block.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import LVMError
from ..windows import article_spans
from . import npz as npz_format
from .checks import NORM_TOLERANCE
from .npz import BIGGEST, Member, Npz, check_room, whole_number

# Spellings that the original's code reads (handbook §1, §5.10), with or without the prefix train_, val_ or ood_.
CONTEXTS = ("context_sequences", "contexts", "context", "X", "C", "sequences")
TARGETS = ("target_vectors", "targets", "target", "y", "Y", "t")
INDICES = ("target_indices", "target_idx")
METADATA = (("article_index", "article_id"), ("target_chunk_index", "target_idx"))  # keys of a window's dict
FIRST = {"train": 0, "val": 1 << 29, "ood": 1 << 30}  # article numbers of windows that come without
# Of article files: vectors, article, position.
ARTICLE_ARRAYS = (("vectors", "embeddings", "X"), ("article_indices", "article_ids"), ("chunk_indices", "seq_idx"))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-15)


def find(npz: Npz, spellings: Sequence[str], prefixes: Sequence[str] = ("",)) -> str | None:
    """The name of an array in a file, by its first prefix that has one. Raises LVMError for two of one meaning."""
    for prefix in prefixes:
        names = [prefix + s for s in spellings if prefix + s in npz]
        if len(names) > 1:
            raise LVMError(f"{npz.path}: holds both {' and '.join(names)}, which mean the same; leave one out")
        if names:
            return names[0]
    return None


def _require(npz: Npz, needed: Mapping[str, object], advice: str) -> None:
    missing = [name for name, found in needed.items() if not found]
    if missing:
        raise LVMError(f"{npz.path}: missing: {', '.join(missing)} (it has {npz.listed}); {advice}")


def _vectors(npz: Npz, name: str, ndim: int, needed: str) -> Member:
    """The header of an array of vectors. Raises LVMError unless it has floats, `ndim` axes, and an index that fits."""
    member = npz.member(name)
    if member.dtype.kind != "f" or len(member.shape) != ndim or 0 in member.shape:
        raise member.needs(f"{needed}, not empty, of float16, float32 or float64")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62
    if 64 * member.shape[0] > memory:
        raise LVMError(f"{member.where}: has {member.shape[0]:,} rows, whose index does not fit in memory; split it")
    return member


def read_blocks(npz: Npz, member: Member, drop_bad: bool, norms: list, rows: int | None = None):
    """(first row, block of unit vectors in float32, bad rows (B,)); `norms` collects those of normalised vectors.

    A row is bad if one of its vectors is zero, NaN or infinite. Raises LVMError after the last row, with the first bad
    row and their number, if there are any and they are not to be dropped.
    """
    count, first_bad = 0, 0
    for first, block in npz.rows(member, rows):
        with np.errstate(all="ignore"):
            x = block.astype(np.float32)
            norm = np.sqrt(np.einsum("...d,...d->...", x, x))
            good = (norm > 1e-15) & (norm < 1e15)
        bad = ~good.reshape(len(block), -1).all(1)
        if bad.any() and not drop_bad:
            first_bad = first_bad if count else first + int(np.argmax(bad))
            count += int(bad.sum())
        if count:
            continue  # from here on rows are only counted
        x[bad] = 0
        off = good & ~(np.abs(norm - 1) <= NORM_TOLERANCE - 1e-6) & ~bad.reshape(-1, *[1] * (norm.ndim - 1))
        if off.any():
            x[off] /= norm[off, None]
            norms.append(norm[off])
        yield first, x, bad
    if count:
        fault = f"row {first_bad} is zero, NaN or infinite ({count} bad rows)"
        raise LVMError(f"{member.where}: {fault}; repair the file, or use drop_bad (--drop-bad)")


def note_norms(counts: dict, what: str, norms: list[np.ndarray]) -> None:
    """Count normalised vectors, with the range of their norms."""
    if norms:
        norms = np.concatenate(norms)
        counts[what] = len(norms)
        counts[f"norms of the {what}"] = f"{norms.min():.4g} to {norms.max():.4g}"


def chunk_key(article: np.ndarray, position: np.ndarray) -> np.ndarray:
    """One int64 of article and position, in their order; −1 for an impossible position."""
    position = np.asarray(position, np.int64)
    key = (np.asarray(article, np.int64) << 32) | np.maximum(position, 0)
    return np.where((position >= 0) & (position <= BIGGEST), key, -1)


class Table:
    """The chunks: `vectors` (M, D) on disk; `article`, `position` (M,); `bad` (M,): rows to drop; `file_order` (M,):
    each row's row in the file; `spans`: article → (first row, end)."""

    def __init__(self, vectors: np.ndarray, article, position, bad, where: str, file_order: np.ndarray | None = None):
        self.vectors, self.article, self.position, self.bad = vectors, article, position, bad
        self.where, self.file_order = where, file_order
        keys = chunk_key(article, position)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._bad_before = np.concatenate([[0], np.cumsum(bad, dtype=np.int32)])
        begins, ends = article_spans(article)
        self.spans = {int(article[a]): (a, b) for a, b in zip(begins, ends, strict=True)}

    def find(self, article: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Rows of chunks, −1 where there is none."""
        wanted = chunk_key(article, position)
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[at] == wanted, self._order[at], -1)

    def touched(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Whether there is a bad row from `first` to `last`, both included."""
        return self._bad_before[last + 1] > self._bad_before[first]

    def cosine(self, x: np.ndarray, rows: np.ndarray, article: np.ndarray) -> np.ndarray:
        """Cosine of unit vectors (…, D) with rows of `article`: −1 for a row of another article, 1 for a bad row."""
        inside = np.clip(rows, 0, len(self.article) - 1)
        cosine = np.einsum("...d,...d->...", x, unit(self.vectors[inside].astype(np.float32)))
        own = (rows == inside) & (self.article[inside] == article)
        return np.where(own, np.where(self.bad[inside], 1, cosine), -1.0)


def allocate(path: Path, shape: tuple[int, int], dtype: type, where: str) -> np.memmap:
    """A new .npy file mapped for writing, its disk space reserved: writing a map on a full disk kills the process."""
    check_room(path.parent, math.prod(shape) * np.dtype(dtype).itemsize, where)
    vectors = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with contextlib.suppress(AttributeError), open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return vectors


def read_articles(npz: Npz, path: Path, drop_bad: bool, counts: dict) -> Table:
    """The chunks of an article file, their vectors written to `path`.

    The order of the file is kept where articles are in one run of rows and positions rise; else rows are sorted.
    Without positions, an article's chunks are in the order of its rows. Raises LVMError for a missing array or a chunk
    given twice.
    """
    vectors_name, article_name, position_name = (find(npz, spellings) for spellings in ARTICLE_ARRAYS)
    needed = {"vectors": vectors_name, "article_indices": article_name}
    _require(npz, needed, "give a sequence file as train, val or ood")
    member = _vectors(npz, vectors_name, 2, "(chunks, dimension)")
    article = npz.numbers(article_name, member.shape[0])
    if position_name:
        position = npz.numbers(position_name, member.shape[0])
    else:
        position = pd.Series(article).groupby(article).cumcount().to_numpy(np.int32)
        counts["chunks without a position, taken in the order of their rows"] = len(position)
    order = np.arange(len(article))
    begins = article_spans(article)[0]
    rising = ((np.diff(position) > 0) | (np.diff(article) != 0)).all()
    if not rising or len(np.unique(article[begins])) < len(begins):
        order = np.lexsort((position, article))
        article, position = article[order], position[order]
        twice = np.flatnonzero((np.diff(article) == 0) & (np.diff(position) == 0))
        if len(twice):
            a, b = order[twice[0]], order[twice[0] + 1]
            raise LVMError(
                f"{npz.path}: rows {a} and {b} are the same chunk ({len(twice)} such pairs); keep one of them"
            )
        counts["rows sorted by article and position"] = len(order)
    vectors = allocate(path, member.shape, stored_type([member]), member.where)
    rank, bad, norms = np.argsort(order), np.zeros(len(vectors), bool), []
    for first, x, bad_rows in read_blocks(npz, member, drop_bad, norms):
        rows = rank[first : first + len(x)]
        vectors[rows], bad[rows] = x, bad_rows  # float16 comes back as it was
    note_norms(counts, "vectors normalised", norms)
    return Table(vectors, article, position, bad, str(npz.path), order)


def stored_type(members: Sequence[Member]) -> type:
    """float16 if all arrays have it, else float32."""
    return np.float16 if all(member.dtype.itemsize == 2 for member in members) else np.float32


class Sequences:
    """A sequence file of one split: its arrays, `ids` (N,) the article of each window, and `indices` (N,) the position
    of each target, or None."""

    def __init__(self, npz: Npz, split: str):
        self.npz, self.split, self.path = npz, split, npz.path
        prefixes = (f"{split}_", "", "train_")
        contexts, targets, ids, indices, metadata, keys = (
            find(npz, names, prefixes)
            for names in (CONTEXTS, TARGETS, ("article_ids",), INDICES, ("metadata",), ("truth_keys",))
        )
        _require(npz, {"contexts": contexts, "targets": targets}, "give an article file as articles")
        self.contexts = _vectors(npz, contexts, 3, "(windows, context length, dimension)")
        self.count, self.length, self.dim = self.contexts.shape
        shape = f"({self.count}, {self.dim}), a vector of the same dimension for each context"
        self.targets = _vectors(npz, targets, 2, shape)
        if self.targets.shape != (self.count, self.dim):
            raise self.targets.needs(shape)
        metadata = metadata if ids is None or indices is None else None
        listed = self._metadata(npz.member(metadata)) if metadata else (None, None)
        if keys and not metadata and (ids is None or indices is None):  # (N, 2): article and position of each target
            listed = npz.numbers(keys, self.count, 2).T
        self.known = bool(ids or metadata or keys)  # else every window counts as an article of its own
        if not self.known:
            self.stand_alone()
            return
        self.ids = listed[0] if ids is None else npz.numbers(ids, self.count)
        self.indices = listed[1] if indices is None else npz.numbers(indices, self.count)
        if metadata and not np.array_equal(self.ids, listed[0]):
            row = int(np.argmax(self.ids != listed[0]))
            articles = f"{self.ids[row]} by {ids}, {listed[0][row]} by {metadata}"
            raise LVMError(f"{npz.path}: window {row} is of article {articles}; leave the wrong one out")

    def stand_alone(self) -> None:
        """Make each window an article of its own, its target right after its context."""
        self.ids = FIRST[self.split] + np.arange(self.count, dtype=np.int32)
        self.indices = np.full(self.count, self.length, np.int32)

    def _metadata(self, member: Member) -> tuple[np.ndarray, np.ndarray | None]:
        """Article numbers (N,), and target indices (N,) unless no window has one."""
        if member.dtype.kind != "O" or member.shape != (self.count,):
            raise member.needs(f"({self.count},) dicts with article_index and target_chunk_index")
        items = self.npz.objects(member)
        dicts = [item for item in items if isinstance(item, dict)]
        found = [next((k for k in names if any(k in item for item in dicts)), None) for names in METADATA]
        keys = [found[0] or METADATA[0][0], *found[1:]][: 1 + bool(found[1])]
        columns = np.empty((2, self.count), np.int32)
        for row, item in enumerate(items):
            where = f"{member.where}, window {row}"
            if not isinstance(item, dict) or any(key not in item for key in keys):
                raise LVMError(f"{where}: needed is a dict with {' and '.join(keys)}, as for the other windows")
            columns[: len(keys), row] = [whole_number(item[key], f"{where}, {key}") for key in keys]
        return columns[0], columns[1] if len(keys) == 2 else None

    def blocks(self, drop_bad: bool, norms: list) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers of good windows (B,), their contexts and, last, targets (B, T + 1, D)), as `read_blocks`."""
        rows = max(1, npz_format.BLOCK_BYTES // (self.contexts.row_bytes + self.targets.row_bytes))
        both = (read_blocks(self.npz, member, drop_bad, norms, rows) for member in (self.contexts, self.targets))
        for (first, x, x_bad), (_, y, y_bad) in zip(*both, strict=True):
            good = np.flatnonzero(~(x_bad | y_bad))
            if len(good):
                yield first + good, np.concatenate([x[good], y[good, None]], 1)
