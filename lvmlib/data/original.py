"""The original's `.npz` files (handbook §1) made a store, and a dataset written back in their form.

    python -m lvmlib import OUT --articles articles.npz [--train train.npz --val val.npz --ood ood.npz]

    convert(files, folder)    the files as a new store folder
    opened(files)             the same, kept under outputs/imported/ and used again
    export(data, folder)      articles.npz, train.npz, val.npz, ood.npz

Vectors are read as streams (`npz`), a few megabytes at a time; in memory are only tables of some bytes a row.

Axes: M chunks, D vector dimension, N windows, T context length, B windows of a block.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..errors import LVMError
from ..io.paths import ROOT, outputs
from ..windows import SPLITS, Dataset, Store
from . import checks, splits
from . import npz as npz_format
from . import store as store_format
from .checks import NORM_TOLERANCE
from .npz import BIGGEST, MOST, Member, Npz, check_room, whole

FORMAT = 1  # raised when what `convert` makes of the same files changes: what is kept from before is then not used
KEYS = (*SPLITS, "articles")
CONTEXTS = ("context_sequences", "contexts")  # also behind train_, val_ or ood_; so are the following
TARGETS = ("target_vectors", "targets")
ARTICLE_ARRAYS = ("vectors", "article_indices", "chunk_indices")
OPTIONAL_ARRAYS = ("concept_texts", "article_titles", "article_sources")

SAME = 0.999  # two vectors with a cosine above are the same chunk: float16 changes it by less than 1e-6
HORIZONS = range(1, 17)
SAMPLE = 256  # windows of a file from which the horizon is told


# --- vectors ----------------------------------------------------------------------------------------------------------


def _float32(x: np.ndarray) -> np.ndarray:
    """A copy; torch is several times faster at float16 than numpy."""
    return torch.tensor(x).float().numpy() if x.dtype == np.float16 else x.astype(np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-15)


def _floats(npz: Npz, name: str, ndim: int, what: str) -> Member:
    member = npz.member(name)
    if member.dtype.kind != "f" or len(member.shape) != ndim or 0 in member.shape:
        raise member.needs(f"{what}, not empty, of float16, float32 or float64")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62
    if 64 * member.shape[0] > memory:
        raise LVMError(f"{member.where}: has {member.shape[0]:,} rows, whose index does not fit in memory; split it")
    return member


def _note(counts: dict, what: str, norms: list[np.ndarray]) -> None:
    if norms:
        norms = np.concatenate(norms)
        counts[what] = len(norms)
        counts[f"norms of the {what}"] = f"{norms.min():.4g} to {norms.max():.4g}"


def _blocks(npz: Npz, member: Member, drop_bad: bool, mended: list, rows: int | None = None):
    """(first row, block in float32, bad rows (B,)); vectors that are no unit vectors are made so, and their norms put
    into `mended`.

    A row is bad if a vector of it is zero, NaN or infinite. Raises LVMError after the last row, with the first bad one
    and their number, if there are any and they are not to be dropped.
    """
    told, bad_rows = "", 0
    for first, block in npz.rows(member, rows):
        with np.errstate(all="ignore"):
            x = _float32(block)
            norm = np.sqrt(np.einsum("...d,...d->...", x, x))
            good = (norm > 1e-15) & (norm < 1e15)
        bad = ~good.reshape(len(block), -1).all(1)
        if bad.any() and not told:
            row = int(np.argmax(bad))
            zero = (norm[row] <= 1e-15).any()
            told = f"row {first + row} has {'a zero vector' if zero else 'NaN or infinite values'}"
        bad_rows += int(bad.sum())
        if told and not drop_bad:
            continue  # only counted from here on
        x[bad] = 0
        off = good & ~(np.abs(norm - 1) <= NORM_TOLERANCE - 1e-6) & ~bad.reshape(-1, *[1] * (norm.ndim - 1))
        if off.any():
            x[off] /= norm[off, None]
            mended.append(norm[off])
        yield first, x, bad
    if told and not drop_bad:
        raise LVMError(
            f"{member.where}: {told} (in all {bad_rows} rows with zero vectors, NaN or infinite values); mend the file "
            "or leave them out by drop_bad (--drop-bad)"
        )


def _key(article: np.ndarray, position: np.ndarray) -> np.ndarray:
    """One int64 of article and position, in their order; −1 where the position cannot be."""
    position = np.asarray(position, np.int64)
    key = (np.asarray(article, np.int64) << 32) | np.maximum(position, 0)
    return np.where((position >= 0) & (position <= BIGGEST), key, -1)


class _Table:
    """The chunks: `vectors` (M, D) on disk; `article`, `position` (M,) of the rows; `bad` (M,): to be dropped."""

    def __init__(self, vectors: np.memmap, article: np.ndarray, position: np.ndarray, bad: np.ndarray, where: str):
        self.vectors, self.article, self.position, self.bad, self.where = vectors, article, position, bad, where
        self.order = np.argsort(_key(article, position), kind="stable")
        self.keys = _key(article, position)[self.order]
        self.bad_before = np.concatenate([[0], np.cumsum(bad, dtype=np.int32)])
        begins = np.flatnonzero(np.diff(article, prepend=-1))
        ends = np.append(begins, len(article))[1:]
        self.runs = {int(article[a]): (a, b) for a, b in zip(begins, ends, strict=True)}

    def find(self, article: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Rows of chunks, −1 where there is none."""
        wanted = _key(article, position)
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[at] == wanted, self.order[at], -1)

    def touched(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Whether there is a bad row from `first` to `last`, both included."""
        return self.bad_before[last + 1] > self.bad_before[first]

    def cosine(self, unit: np.ndarray, rows: np.ndarray, article: np.ndarray) -> np.ndarray:
        """Cosine of unit vectors (…, D) with rows of `article`: −1 where the row is none of its, 1 where it is bad."""
        inside = np.clip(rows, 0, len(self.article) - 1)
        cosine = np.einsum("...d,...d->...", unit, _unit(_float32(self.vectors[inside])))
        own = (rows == inside) & (self.article[inside] == article)
        return np.where(own, np.where(self.bad[inside], 1, cosine), -1.0)


def _allocate(path: Path, shape: tuple[int, int], dtype: np.dtype, where: str) -> np.memmap:
    """A new .npy file of that shape, its place on the disk taken at once, mapped for writing."""
    check_room(path.parent, math.prod(shape) * dtype.itemsize, where)
    vectors = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with contextlib.suppress(AttributeError), open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)  # a full disk would end a process that writes a map
    return vectors


def _articles(npz: Npz, partial: Path, drop_bad: bool, counts: dict) -> tuple[_Table, np.ndarray | None]:
    """The article file as a table on disk (vectors.npy in `partial`), and which row of the file each row was (None: the
    same). The order of the file is kept where articles stand together and positions rise; else rows are sorted."""
    missing = [name for name in ARTICLE_ARRAYS if name not in npz]
    if missing:
        like = any(name.endswith(CONTEXTS) for name in npz.members)
        hint = "; it looks like a sequence file: give it as train, val or ood" if like else ""
        raise LVMError(
            f"{npz.path}: an article file needs the arrays {', '.join(ARTICLE_ARRAYS)}; missing: "
            f"{', '.join(missing)}{hint}; there are: {', '.join(sorted(npz.members))[:200] or 'none'}"
        )
    member = _floats(npz, "vectors", 2, "(chunks, dimension)")
    article, position = (npz.numbers(name, member.shape[0]) for name in ARTICLE_ARRAYS[1:])
    begins = np.flatnonzero(np.diff(article, prepend=-1))
    rising = ((np.diff(position) > 0) | (np.diff(article) != 0)).all()
    order = rank = None
    if not rising or len(np.unique(article[begins])) < len(begins):
        order = np.lexsort((position, article))
        article, position = article[order], position[order]
        twice = np.flatnonzero((np.diff(article) == 0) & (np.diff(position) == 0))
        if len(twice):
            a, b = order[twice[0]], order[twice[0] + 1]
            raise LVMError(
                f"{npz.path}: rows {a} and {b} are both chunk {position[twice[0]]} of article {article[twice[0]]} "
                f"({len(twice)} such pairs); an article has one chunk at a position: keep one of them"
            )
        rank = np.argsort(order)
        counts["rows sorted by article and position"] = len(order)
    dtype = np.dtype(np.float16 if member.dtype.itemsize == 2 else np.float32)
    vectors = _allocate(partial / "vectors.npy", member.shape, dtype, member.where)
    bad, mended = np.zeros(len(vectors), bool), []
    for first, x, gone in _blocks(npz, member, drop_bad, mended):
        rows = slice(first, first + len(x)) if rank is None else rank[first : first + len(x)]
        vectors[rows] = x  # float16 comes back as it was
        bad[rows] = gone
    _note(counts, "vectors normalised", mended)
    return _Table(vectors, article, position, bad, str(npz.path)), order


def _compact(vectors: np.memmap, path: Path, keep: np.ndarray) -> None:
    """Leave out of a vectors.npy the rows that are not to `keep`, in place."""
    at, rows = 0, max(1, npz_format.BLOCK_BYTES // (vectors.shape[1] * vectors.itemsize))
    for first in range(0, len(vectors), rows):
        block = vectors[first : first + rows][keep[first : first + rows]]  # a copy
        vectors[at : at + len(block)] = block
        at += len(block)
    vectors.flush()  # before the file is cut: what lies behind is never touched again
    form = {"descr": vectors.dtype.str, "fortran_order": False, "shape": (at, vectors.shape[1])}
    with open(path, "r+b") as file:
        np.lib.format.write_array_header_1_0(file, form)  # numpy leaves room for a longer first size: it fits
        file.truncate(file.tell() + at * vectors.shape[1] * vectors.itemsize)


def _kept_texts(npz: Npz, raw: Path, path: Path, count: int, order: np.ndarray | None, keep: np.ndarray) -> None:
    """Write the texts of an article file as texts.jsonl: rows `order` of the file, those to `keep`."""
    if npz.member("concept_texts").shape != (count,):
        raise npz.member("concept_texts").needs(f"({count},), a text for each vector")
    with open(raw, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(text) + "\n" for text in npz.texts("concept_texts"))
    if order is None and keep.all():
        raw.rename(path)
        return
    texts = store_format.Texts(raw, count)
    with open(path, "w", encoding="utf-8") as out:
        for row in (np.arange(count) if order is None else order)[keep]:
            out.write(json.dumps(texts[row]) + "\n")


def _names(npz: Npz | None, name: str, articles: np.ndarray) -> list[str] | None:
    """A text for each article number of `articles` (A,), from the array that has one for every number; None without."""
    if npz is None or name not in npz:
        return None
    member = npz.member(name)
    if member.info.file_size > MOST:
        raise LVMError(f"{member.where}: has {member.info.file_size:,} bytes; {MOST:,} is the most that is read")
    listed = list(npz.texts(name))
    if articles.max() >= len(listed):
        raise LVMError(
            f"{member.where}: has {len(listed)} entries, but there is an article {articles.max()}; give one for every "
            "article number from 0 on"
        )
    return [" ".join(re.sub(r"[\x00-\x1f\x7f]", " ", listed[a]).split())[:500] for a in articles]


# --- sequence files ---------------------------------------------------------------------------------------------------


class _Sequences:
    """A sequence file of one split: its arrays, the article of each window, and the position of its target if given."""

    def __init__(self, npz: Npz, split: str):
        self.npz, self.split, self.path = npz, split, npz.path
        there = f"there are: {', '.join(sorted(npz.members))[:200] or 'none'}"
        contexts, own = self._find(CONTEXTS, [f"{split}_", "", "train_"])
        if contexts is None:
            hint = "; it looks like an article file: give it as articles" if "vectors" in npz else ""
            raise LVMError(f"{npz.path}: has no contexts ({', '.join(CONTEXTS)}, train_{CONTEXTS[0]}){hint}; {there}")
        targets, _ = self._find(TARGETS, [own, f"{split}_", "", "train_"])
        if targets is None:
            raise LVMError(f"{npz.path}: has {contexts}, but no targets ({', '.join(TARGETS)}); {there}")
        self.contexts = _floats(npz, contexts, 3, "(windows, context length, dimension)")
        self.count, self.length, self.dim = self.contexts.shape
        needed = f"({self.count}, {self.dim}), a vector of the same dimension for each context"
        self.targets = _floats(npz, targets, 2, needed)
        if self.targets.shape != (self.count, self.dim):
            raise self.targets.needs(needed)
        prefixes = [own, f"{split}_", ""]
        ids, indices, metadata = (self._find((n,), prefixes)[0] for n in ("article_ids", "target_indices", "metadata"))
        if ids is None and metadata is None:
            raise LVMError(
                f"{npz.path}: does not say of which articles its windows are; needed is article_ids (windows,), or "
                "metadata, dicts with article_index and target_chunk_index"
            )
        metadata = metadata if ids is None or indices is None else None
        listed = self._metadata(npz.member(metadata)) if metadata else (None, None)
        self.ids = listed[0] if ids is None else npz.numbers(ids, self.count)
        self.indices = listed[1] if indices is None else npz.numbers(indices, self.count)
        if metadata and not np.array_equal(self.ids, listed[0]):
            row = int(np.argmax(self.ids != listed[0]))
            raise LVMError(
                f"{npz.path}: window {row} is of article {self.ids[row]} by {ids}, of article {listed[0][row]} by "
                f"{metadata}; leave the wrong one out"
            )
        self.used = {contexts, targets, ids, indices, metadata}

    def _find(self, spellings: Sequence[str], prefixes: Sequence[str]) -> tuple[str | None, str]:
        """The name of an array in this file, with the first prefix that has one, and that prefix."""
        for prefix in prefixes:
            found = [prefix + s for s in spellings if prefix + s in self.npz]
            if len(found) > 1:
                raise LVMError(f"{self.path}: holds both {' and '.join(found)}, which mean the same; leave one out")
            if found:
                return found[0], prefix
        return None, ""

    def _metadata(self, member: Member) -> tuple[np.ndarray, np.ndarray | None]:
        """Article numbers (N,), and target indices unless no window has one."""
        if member.dtype.kind != "O" or member.shape != (self.count,):
            raise member.needs(f"({self.count},) dicts with article_index and target_chunk_index")
        items, columns = self.npz.objects(member), []
        for key in ("article_index", "target_chunk_index"):
            if columns and not any(key in item for item in items):
                return columns[0], None
            columns.append(np.empty(self.count, np.int32))
            for row, item in enumerate(items):
                where = f"{member.where}, window {row}"
                if not isinstance(item, dict):
                    raise LVMError(f"{where}: is {type(item).__name__}; needed is a dict with article_index")
                if key not in item:
                    has = ", ".join(sorted(item))[:100] or "nothing"
                    raise LVMError(f"{where}: has no {key}; it has: {has}; give it to all windows")
                columns[-1][row] = whole(item[key], f"{where}, {key}")
        return columns[0], columns[1]

    def blocks(self, drop_bad: bool, mended: list) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers of usable windows (B,), their contexts and, last, targets (B, T + 1, D)), as `_blocks` has them."""
        rows = max(1, npz_format.BLOCK_BYTES // (self.contexts.row_bytes + self.targets.row_bytes))
        both = (_blocks(self.npz, member, drop_bad, mended, rows) for member in (self.contexts, self.targets))
        for (first, x, x_bad), (_, y, y_bad) in zip(*both, strict=True):
            good = np.flatnonzero(~(x_bad | y_bad))
            if len(good):
                yield first + good, np.concatenate([x[good], y[good, None]], 1)


class _Placing:
    """Finds the first row of each window of sequence files in a table, and checks every vector of it.

    `horizon`: None until the first block has told it; all files have the same. `gaps`: as what windows across a gap are
    counted; None: they are refused.
    """

    def __init__(self, table: _Table, horizon: int | None, drop_bad: bool, gaps: str | None, counts: dict):
        self.table, self.horizon, self.drop_bad, self.gaps, self.counts = table, horizon, drop_bad, gaps, counts

    def starts(self, s: _Sequences) -> np.ndarray:
        """(N,) first rows of the windows of a file, −1 for those that are dropped."""
        absent = np.flatnonzero(~np.isin(s.ids, list(self.table.runs)))
        if len(absent):
            raise LVMError(
                f"{s.path}: window {absent[0]} is of article {s.ids[absent[0]]}, which {self.table.where} does not "
                f"have ({len(absent)} such windows); the files do not belong together"
            )
        starts, last = np.full(s.count, -1, np.int64), {}
        for number, x in s.blocks(self.drop_bad, []):
            x = _unit(x)
            if self.horizon is None:
                self._deduce(s, number[:SAMPLE], x[:SAMPLE])
            start = self._by_vectors(s, number, x, last) if s.indices is None else self._by_index(s, number, x)
            found = start >= 0
            first, end = np.where(found, start, 0), np.where(found, start + self._span(s), 0)
            gap = found & (self.table.position[end] - self.table.position[first] != self._span(s))
            for i in np.flatnonzero(gap):
                self._gap(s, number[i])
            touched = found & ~gap & self.table.touched(first, end)
            self._drop("windows that touch dropped vectors", touched.sum())
            starts[number] = np.where(gap | touched, -1, start)
        return starts

    def _span(self, s: _Sequences) -> int:
        return s.length - 1 + self.horizon

    def _drop(self, why: str, count: int = 1) -> None:
        if count:
            self.counts[why] = self.counts.get(why, 0) + int(count)

    def _gap(self, s: _Sequences, number: int) -> None:
        if self.gaps is None:
            raise LVMError(
                f"{s.path}: window {number} (article {s.ids[number]}): crosses a gap in the chunk_indices of its "
                "article, which no window of a store may; leave such windows out by drop_bad (--drop-bad), or number "
                "the chunks without gaps"
            )
        self._drop(self.gaps)

    def _deduce(self, s: _Sequences, number: np.ndarray, x: np.ndarray) -> None:
        """Set the horizon: that at which most of the first windows fit, and fit best."""
        cosines = {}
        for self.horizon in HORIZONS:
            if s.indices is None:
                cosines[self.horizon] = np.array([fit.max(initial=-1) for _, fit in self._fits(s, number, x)])
            else:
                start = self.table.find(s.ids[number], s.indices[number]) - self._span(s)
                cosines[self.horizon] = self._fit(s, start, s.ids[number], x)
        self.horizon = _told(cosines, f"{s.path}: window {number[0]} and following", "the files do not belong together")

    def _fit(self, s: _Sequences, start: np.ndarray, ids: np.ndarray, x: np.ndarray) -> np.ndarray:
        """(B,) smallest cosine of windows (B, T + 1, D) with those that begin at rows `start`."""
        rows = start[:, None] + np.append(np.arange(s.length), self._span(s))
        return self.table.cosine(x, rows, ids[:, None]).min(1)

    # by article number and target index

    def _by_index(self, s: _Sequences, number: np.ndarray, x: np.ndarray) -> np.ndarray:
        ids, t = s.ids[number], s.indices[number].astype(np.int64)
        start = self.table.find(ids, t) - self._span(s)
        for i in np.flatnonzero(self._fit(s, start, ids, x) <= SAME):
            start[i] = self._unfit(s, number[i], x[i])
        return start

    def _unfit(self, s: _Sequences, number: int, x: np.ndarray) -> int:
        """Say why a window (T + 1, D) does not fit; −1 if it is dropped, as a chunk before its target is missing."""
        article, t, cosine = s.ids[number], int(s.indices[number]), {}
        for horizon in {self.horizon, *HORIZONS}:
            rows = self.table.find(article, t - horizon - s.length + 1 + np.arange(s.length))
            rows = np.append(rows, self.table.find(article, t))
            cosine[horizon] = np.where(rows < 0, -1, self.table.cosine(x, rows, article))
        if cosine[self.horizon].min() > SAME:
            self._gap(s, number)
            return -1
        own = self.table.position[slice(*self.table.runs[int(article)])]
        others = [horizon for horizon in HORIZONS if cosine[horizon].min() > SAME]
        hint = f"; with horizon {others[0]} they fit, but all windows of a dataset have one" if others else ""
        first, shown = t - self._span(s), ("none" if c == -1 else f"{c:.3f}" for c in cosine[self.horizon])
        raise LVMError(
            f"{s.path}: window {number} (article {article}, target index {t}): its context and target should be chunks "
            f"{first} to {first + s.length - 1} and {t} of {self.table.where} (horizon {self.horizon}; the article has "
            f"{own.min()} to {own.max()}), but the cosines with them are {', '.join(shown)}{hint}; the files "
            "do not belong together, or target_indices count otherwise than chunk_indices"
        )

    # by article number alone

    def _fits(self, s: _Sequences, number: np.ndarray, x: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(place in the block, smallest cosine with the window that begins at each row of its article), for each."""
        for article in dict.fromkeys(s.ids[number].tolist()):
            begin, end = self.table.runs[article]
            own, count = np.flatnonzero(s.ids[number] == article), end - begin - self._span(s)
            if count < 1:
                yield from ((i, np.empty(0)) for i in own)
                continue
            pieces = max(1, npz_format.BLOCK_BYTES // (4 * s.dim))  # rows of the article at a time
            size = len(own) * (s.length + 1) * (end - begin)
            for part in np.array_split(own, size // npz_format.BLOCK_BYTES + 1):
                wanted = x[part].reshape(-1, s.dim).T
                held = (slice(a, min(a + pieces, end)) for a in range(begin, end, pieces))
                cosine = np.concatenate([_unit(_float32(self.table.vectors[rows])) @ wanted for rows in held])
                cosine[self.table.bad[begin:end]] = 1
                cosine = cosine.reshape(end - begin, len(part), -1)
                steps = [*range(s.length), self._span(s)]
                fit = np.min([cosine[step : step + count, :, j] for j, step in enumerate(steps)], 0)
                yield from zip(part, fit.T, strict=True)

    def _by_vectors(self, s: _Sequences, number: np.ndarray, x: np.ndarray, last: dict) -> np.ndarray:
        """First rows (B,). Where several fit alike, the next one after that of the article's window before."""
        table, starts = self.table, np.empty(len(number), np.int64)
        for i, fit in self._fits(s, number, x):
            article = int(s.ids[number[i]])
            first = np.flatnonzero(fit > SAME)
            if not len(first):
                best = f" (best cosine {fit.max():.3f})" if len(fit) else ""
                raise LVMError(
                    f"{s.path}: window {number[i]} (article {article}): its context and, {self.horizon} chunks after "
                    f"it, its target are not found in that article of {table.where}{best}; the files do not belong "
                    "together, or the windows have several horizons"
                )
            fit, first = fit[first], first + table.runs[article][0]
            end = first + self._span(s)
            whole = table.position[end] - table.position[first] == self._span(s)
            rank = whole * (2 - table.touched(first, end))  # without gap and dropped vectors, if there are such
            kept = rank == rank.max()
            first = first[kept][fit[kept] > fit[kept].max() - 1e-6]
            self._drop("windows with several equal places in their article", len(first) > 1)
            later = first[first > last.get(article, -1)]
            last[article] = starts[i] = later[0] if len(later) else first[0]
        return starts


# --- sequence files without an article file ---------------------------------------------------------------------------


def _told(cosines: dict[int, np.ndarray], where: str, hint: str) -> int:
    """The horizon at which most targets are what they should be: the largest part of them, and with the best cosine."""
    found = []
    for horizon, cosine in cosines.items():
        alike = cosine[cosine > SAME]
        if len(alike) > len(cosine) / 2:
            found.append((round(len(alike) / len(cosine), 2), round(float(alike.mean()), 6), horizon))
    if not found:
        raise LVMError(
            f"{where}: at none of the horizons {HORIZONS[0]} to {HORIZONS[-1]} are most contexts and targets found "
            f"where they should be (at most {max(map(len, cosines.values()))} could be compared); {hint}"
        )
    rivals = [f[2] for f in found if f[:2] == max(found)[:2]]
    if len(rivals) > 1:
        raise LVMError(
            f"{where}: fit the horizons {', '.join(map(str, rivals))} alike, as the chunks repeat; the horizon cannot "
            "be told from these files: add more windows, or the article file"
        )
    return rivals[0]


def _overlap(listed: list[_Sequences], drop_bad: bool, where: str) -> int:
    """The horizon at which targets are what the contexts of other windows hold at their positions, by some windows of
    the longest articles of each file."""
    ids, t, held, steps = [], [], [], np.arange(listed[0].length)
    for s in listed:
        _, article, size = np.unique(s.ids, return_inverse=True, return_counts=True)
        wanted = np.zeros(s.count, bool)
        wanted[np.lexsort((s.indices, s.ids, -size[article]))[:SAMPLE]] = True
        for number, x in s.blocks(drop_bad, []):
            chosen = number[wanted[number]]
            ids, t, held = [*ids, s.ids[chosen]], [*t, s.indices[chosen]], [*held, x[wanted[number]]]
            if number[-1] >= np.flatnonzero(wanted)[-1]:
                break
    if not held:
        raise LVMError(f"{where}: no window is left once those with bad vectors are dropped; mend the files")
    ids, t, x = np.concatenate(ids), np.concatenate(t).astype(np.int64), _unit(np.concatenate(held))
    keys, which = np.unique(_key(ids[:, None], t[:, None] + steps), return_index=True)  # but for a shift by the horizon
    known = x[:, :-1].reshape(-1, x.shape[2])[which]
    table, cosines = _Table(known, keys >> 32, keys & BIGGEST, np.zeros(len(keys), bool), where), {}
    for horizon in HORIZONS:
        rows = table.find(ids, t + len(steps) - 1 + horizon)
        cosines[horizon] = table.cosine(x[:, -1], rows, ids)[rows >= 0]
    return _told(cosines, where, "give the article file as well")


def _rebuilt(listed: list[_Sequences], partial: Path, drop_bad: bool, counts: dict) -> tuple[_Table, int]:
    """The chunks that the windows of sequence files hold, put in order by their target indices, and the horizon. Where
    two windows differ over a chunk, one of them will not fit the table."""
    where = ", ".join(dict.fromkeys(str(s.path) for s in listed))
    for s in listed:
        if s.indices is None:
            raise LVMError(
                f"{s.path}: says of which article each window is, but not where in it; without target_indices (or "
                "target_chunk_index in metadata) the article file is needed: give it as articles"
            )
    horizon = _overlap(listed, drop_bad, where)
    span, dim = listed[0].length - 1 + horizon, listed[0].dim
    steps = np.append(np.arange(listed[0].length), span) - span
    for s in listed:
        if s.indices.min() < span:
            raise LVMError(
                f"{s.path}: window {s.indices.argmin()}: its target index {s.indices.min()} is out of range: with the "
                f"horizon {horizon} its context would begin before its article; check target_indices, or give the "
                "article file as well"
            )
    keys = np.unique(np.concatenate([np.unique(_key(s.ids[:, None], s.indices[:, None] + steps)) for s in listed]))
    dtype = np.dtype(np.float16 if all(s.contexts.dtype.itemsize == 2 for s in listed) else np.float32)
    vectors, missing = _allocate(partial / "vectors.npy", (len(keys), dim), dtype, where), np.ones(len(keys), bool)
    for s in listed:
        mended = []
        for number, x in s.blocks(drop_bad, mended):
            rows = np.searchsorted(keys, _key(s.ids[number][:, None], s.indices[number][:, None] + steps))
            vectors[rows], missing[rows] = x, False
        _note(counts, f"vectors in windows of {s.split} normalised", mended)
    return _Table(vectors, (keys >> 32).astype(np.int32), (keys & BIGGEST).astype(np.int32), missing, where), horizon


# --- convert, opened, export ------------------------------------------------------------------------------------------


def convert(
    files, folder: str | os.PathLike, *, name: str | None = None, ood: str = "topic", drop_bad: bool = False
) -> Store:
    """Write the original's files as a new store folder, and open it.

    `files`: the path of an article file, which is split by `splits.split_articles` with `ood`; or a mapping, or an
    object, with train, val, ood and articles: the sequence files' windows become the store's, placed on the article
    file's chunks and compared with them, or, without an article file, on the chunks that the windows themselves hold.
    A relative path starts from the checkout. `name`: of the store; the file's own by default. `drop_bad` leaves out
    zero, NaN and infinite vectors, with the windows that touch them, and windows across a gap in positions.

    Vectors that are not unit vectors are made so. What was done is counted in the datasheet. Raises LVMError, naming
    file and array, for anything that cannot be used; no folder is left then. No code that a file may hold is run.
    """
    paths, folder = _paths(files), Path(folder)
    rule = splits.rule(ood)
    if ood != "topic" and set(paths) != {"articles"}:
        raise LVMError(f"ood {ood!r}: the sequence files say what is ood; leave it out, or give the article file alone")
    command = [f"--{key} {path.name}" for key, path in paths.items()]
    command += [f"--split-ood {ood}"] * (ood != "topic") + ["--drop-bad"] * drop_bad
    sheet = {
        "description": "Vectors of chunks of text in reading order, imported from the files of the original work.",
        "source": ", ".join(dict.fromkeys(path.name for path in paths.values())),
        "encoder": "not recorded in the files",
        "command": f"python -m lvmlib import OUT {' '.join(command)}",
        "split_rule": rule,
    }
    try:
        with contextlib.ExitStack() as stack, store_format.writing(folder) as partial:
            scratch = partial / "scratch"
            scratch.mkdir()
            archives = {}
            for path in dict.fromkeys(paths.values()):
                archives[path] = Npz(path, scratch)
                stack.callback(archives[path].zip.close)
            articles = _converted({key: archives[path] for key, path in paths.items()}, partial, drop_bad, ood, sheet)
            sheet["source_sha256"] = {key: store_format.sha256_file(path) for key, path in paths.items()}
            shutil.rmtree(scratch)
            try:
                store_format.seal(partial, name or default_name(paths), articles, sheet)
            except LVMError as e:
                raise LVMError(str(e).replace(str(partial), str(folder))) from e
    except OSError as e:
        raise LVMError(f"{folder}: cannot be written ({e.strerror or e}); make room, or name another folder") from e
    return store_format.open_store(folder)


def _paths(files) -> dict[str, Path]:
    """{train, val, ood, articles: path} of those that are given. Raises LVMError for an unknown key, or none."""
    if isinstance(files, str | os.PathLike):
        files = {"articles": files}
    elif not isinstance(files, Mapping):
        files = {key: getattr(files, key, None) for key in KEYS}
    for key, value in files.items():
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise LVMError(f"files: unknown key {key!r}{hint}; known: {', '.join(KEYS)}")
        if value is not None and not isinstance(value, str | os.PathLike):
            raise LVMError(f"files: {key} is {value!r}; needed is the path of an .npz file")
    paths = {key: ROOT / os.path.expanduser(files[key]) for key in KEYS if files.get(key)}
    if not paths:
        raise LVMError(f"files: none is named; give {', '.join(SPLITS)}, or articles, or all")
    return paths


def default_name(paths: Mapping[str, Path]) -> str:
    path = paths.get("articles") or next(iter(paths.values()))
    return re.sub(r"[^\w.-]+", "-", path.stem).strip(".-")[:60] or "imported"


def _converted(archives: dict[str, Npz], partial: Path, drop_bad: bool, ood: str, sheet: dict) -> pd.DataFrame:
    """Write vectors.npy, chunks.npy, perhaps texts.jsonl and windows.npy; fills the datasheet, gives the articles."""
    listed = [_Sequences(archives[split], split) for split in SPLITS if split in archives]
    where, counts = ", ".join(dict.fromkeys(str(s.path) for s in listed)), {}
    for s in listed:
        if (s.length, s.dim) != (listed[0].length, listed[0].dim):
            raise LVMError(
                f"{s.path}: its contexts are {s.length} vectors of {s.dim} dimensions, those of {listed[0].path} "
                f"{listed[0].length} of {listed[0].dim}; files of one dataset are alike"
            )
    checks.check_disjoint({s.split: np.unique(s.ids).tolist() for s in listed}, where)
    source, order, horizon = archives.get("articles"), None, None
    if source is None:
        table, horizon = _rebuilt(listed, partial, drop_bad, counts)
        gaps = "windows dropped, as a chunk between context and target stands in no file"
        matched = "by article number and target index; the chunks are those of the windows, whose overlaps agree"
    else:
        table, order = _articles(source, partial, drop_bad, counts)
        gaps = "windows across a gap" if drop_bad else None
        matched = f"by article number and {{}}; every vector compared with its chunk, cosine above {SAME}"
        if listed and table.vectors.shape[1] != listed[0].dim:
            raise LVMError(
                f"{listed[0].path}: its vectors have {listed[0].dim} dimensions, those of {source.path} "
                f"{table.vectors.shape[1]}; the files do not belong together"
            )
    placing = _Placing(table, horizon, drop_bad, gaps, counts)
    starts = [placing.starts(s) for s in listed]
    _left_out(archives, listed, sheet)

    keep = ~table.bad
    if not keep.any():
        raise LVMError(f"{table.where}: no vector is left once the bad ones are dropped; encode the texts anew")
    if source is not None and "concept_texts" in source:
        _kept_texts(source, partial / "scratch" / "texts", partial / "texts.jsonl", len(keep), order, keep)
        sheet["texts"] = "kept, from the array concept_texts"
    article, position = table.article[keep], table.position[keep]
    table.vectors.flush()
    if not keep.all():
        if source is not None:
            counts["vectors dropped (zero, NaN or infinite)"] = int((~keep).sum())
        _compact(table.vectors, partial / "vectors.npy", keep)
        new_row = np.cumsum(keep) - 1
        starts = [np.where(start >= 0, new_row[start], -1) for start in starts]
    np.save(partial / "chunks.npy", np.stack([article, position], 1))

    numbers, compact = np.unique(article, return_inverse=True)
    titles, sources = (_names(source, f"article_{what}s", numbers) for what in ("title", "source"))
    titles = [t or f"article {a}" for t, a in zip(titles or [""] * len(numbers), numbers, strict=True)]
    again = pd.Series(titles).duplicated(keep=False)
    titles = [f"{t} (article {a})" if twice else t for t, a, twice in zip(titles, numbers, again, strict=True)]
    sheet["dimension"] = int(table.vectors.shape[1])
    windows = {}
    if listed:
        split = np.full(len(numbers), "", dtype="<U5")
        for s, start in zip(listed, starts, strict=True):
            windows[f"windows in {s.split}"] = int((start >= 0).sum())
            if not (start >= 0).any():
                what = "check what was dropped" if source is not None else "give the article file as well"
                raise LVMError(f"{s.path}: none of its {s.count} windows can be placed; {what}")
            split[np.isin(numbers, s.ids)] = s.split
        rows = [(np.full(s.count, SPLITS.index(s.split)), start) for s, start in zip(listed, starts, strict=True)]
        given = np.concatenate(rows, 1).T.astype(np.int64)
        np.save(partial / "windows.npy", given[given[:, 1] >= 0])
        sheet["windows"] = {"horizon": placing.horizon, "context_length": int(listed[0].length)}
        sheet["matched"] = {s.split: matched.format("vectors" if s.indices is None else "target index") for s in listed}
        sheet["split_rule"] = "By the files: an article is in the split whose sequence file holds windows of it."
    else:
        try:
            stored = np.load(partial / "vectors.npy", mmap_mode="c")
            split = splits.split_articles(stored, compact, titles, ood, sources)
        except LVMError as e:
            raise LVMError(f"{source.path}: {e}") from e
    sheet["counts"] = {"chunks": len(article), "articles": len(numbers), **windows, **counts}
    sizes = np.bincount(compact)
    sheet["split"] = {
        n or "not used": {"articles": int((split == n).sum()), "chunks": int(sizes[split == n].sum())}
        for n in (*SPLITS, "")
        if (split == n).any()
    }
    named = {"title": titles, "split": split} | ({} if sources is None else {"source": sources})
    return pd.DataFrame(named, index=pd.Index(numbers, name="article"))


def _left_out(archives: dict[str, Npz], listed: list[_Sequences], sheet: dict) -> None:
    """List the arrays that are not needed. Refuse an object array among them that asks to load something: it waits for
    another reader."""
    used = {(s.path, name) for s in listed for name in s.used}
    if "articles" in archives:
        used |= {(archives["articles"].path, name) for name in (*ARTICLE_ARRAYS, *OPTIONAL_ARRAYS)}
    every = {(npz.path, name): npz for npz in archives.values() for name in npz.members}
    left_out = sorted(set(every) - used)
    for path, name in left_out:
        npz = every[path, name]
        try:
            member = npz.member(name)
        except LVMError:
            continue  # what is not read may be anything
        try:
            if member.dtype.kind == "O" and member.info.file_size <= member.allowed:
                npz.objects(member)
        except LVMError as e:
            raise LVMError(f"{e}; it is not needed here: the file may as well be saved without it") from e
    if left_out:
        sheet["left_out"] = sorted(f"{name} ({path.name})" for path, name in left_out)


def opened(files) -> Store:
    """The store of the original's files (as `convert` takes them): converted once into outputs/imported/, then reused.

    A file that has changed, by size or time, is converted anew. Two processes may do it at once.
    """
    named, paths, known = _paths(files), {}, [FORMAT]
    for key, path in named.items():
        try:
            paths[key] = path.resolve()
            stat = paths[key].stat()
        except (OSError, RuntimeError, ValueError) as e:  # none there, a ring of links, no path at all
            shown = str(path) if str(path).isprintable() else repr(str(path))
            raise LVMError(f"{shown}: cannot be opened ({e}); name an .npz file") from e
        known.append([key, str(paths[key]), stat.st_size, stat.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
    folder = outputs() / "imported" / f"{default_name(named)}-{digest}"
    if not folder.is_dir():
        try:
            return convert(paths, folder)
        except LVMError:
            if not folder.is_dir():  # or another process was first: its is as good
                raise
    try:
        return store_format.open_store(folder)
    except LVMError as e:
        converted = ", ".join(path.name for path in paths.values())
        raise LVMError(f"{e}; it was converted from {converted}: delete {folder}") from e


def export(data: Dataset, folder: str | os.PathLike) -> dict[str, Path]:
    """Write a dataset in the original's form into a new `folder`: articles.npz, train.npz, val.npz and ood.npz.

    articles.npz holds all chunks of the store: vectors (M, D), article_indices, chunk_indices (M,), article_titles,
    article_sources where there are any (a text for every article number), and, if texts were kept, concept_texts (M,),
    plain unicode. That gives every text the room of the longest: where it comes to more than 1 GiB, the texts are left
    out with a warning. No pickle is written. The sequence files hold context_sequences (N, T, D), target_vectors
    (N, D), article_ids, target_indices (N,), in the store's own type, so that reading them gives the same windows.

    Gives the paths by name. Raises LVMError if the folder exists, or if the windows are read backwards.
    """
    store, folder = data.store, Path(folder)
    cut = {split: getattr(data, split) for split in SPLITS}
    for split, w in cut.items():
        if w.step != 1:
            raise LVMError(
                f"{store.name}, split {split}: is read backwards, which the original's form cannot say; export the "
                "dataset read forwards"
            )
    row = store.dim * store.vectors.itemsize
    size = store.vectors.nbytes + sum(len(w) * (w.context_length + 1) for w in cut.values()) * row
    try:
        with store_format.writing(folder) as partial:
            check_room(partial, size, str(folder))
            with zipfile.ZipFile(partial / "articles.npz", "w") as file:
                _put(file, "vectors", store.vectors)
                _put(file, "article_indices", store.article)
                _put(file, "chunk_indices", store.position)
                _put_texts(file, store)
            for split, w in cut.items():
                with zipfile.ZipFile(partial / f"{split}.npz", "w") as file:
                    parts = np.array_split(
                        np.arange(len(w)), len(w) * w.context_length * row // npz_format.BLOCK_BYTES + 1
                    )
                    contexts = (store.vectors[w.context_rows(part)] for part in parts)
                    targets = (store.vectors[w.target[part]] for part in parts)
                    shape, dtype = (len(w), w.context_length, store.dim), store.vectors.dtype
                    _put(file, "context_sequences", contexts, shape, dtype)
                    _put(file, "target_vectors", targets, (len(w), store.dim), dtype)
                    _put(file, "article_ids", w.article)
                    _put(file, "target_indices", store.position[w.target])
    except OSError as e:
        raise LVMError(f"{folder}: cannot be written ({e.strerror or e}); make room, or name another folder") from e
    return {name: folder / f"{name}.npz" for name in ("articles", *SPLITS)}


def _put(file: zipfile.ZipFile, name: str, blocks, shape=None, dtype=None) -> None:
    """An array as a member of `file`, block by block, as np.savez writes it."""
    if isinstance(blocks, np.ndarray):
        shape, dtype, values = blocks.shape, blocks.dtype, blocks
        rows = max(1, npz_format.BLOCK_BYTES // max(1, values[:1].nbytes))
        blocks = (values[first : first + rows] for first in range(0, len(values), rows))
    info = zipfile.ZipInfo(f"{name}.npy")  # without today's date: the same arrays give the same bytes
    info.compress_type = zipfile.ZIP_DEFLATED if np.dtype(dtype).kind == "U" else zipfile.ZIP_STORED
    with file.open(info, "w", force_zip64=True) as out:
        form = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, form)
        for block in blocks:
            out.write(np.ascontiguousarray(block, dtype).tobytes())


def _put_texts(file: zipfile.ZipFile, store: Store) -> None:
    """Titles and sources, a text for every number, unless the numbers are too sparse for a list; texts, if kept."""
    length = int(store.articles.index.max()) + 1
    for column in {"title", "source"} & set(store.articles) if length <= 1000 + 10 * len(store.articles) else ():
        listed = pd.Series("", index=range(length), dtype=object)
        listed[store.articles.index] = store.articles[column].astype(str)
        _put(file, f"article_{column}s", np.array(listed.tolist(), dtype=str))
    if store.texts is None:
        return
    longest = max(1, max(map(len, store.texts)))
    if 4 * longest * len(store.texts) > MOST or any(text.endswith("\x00") for text in store.texts):
        warnings.warn(
            f"{store.name}: its {len(store.texts)} texts of up to {longest} characters are left out of articles.npz: a "
            "plain array would need more than 1 GiB, or lose zero characters at their ends; they stay in the store",
            stacklevel=3,
        )
        return
    rows, dtype = max(1, npz_format.BLOCK_BYTES // (4 * longest)), np.dtype(f"<U{longest}")
    texts, count = iter(store.texts), len(store.texts)
    blocks = (np.array(list(itertools.islice(texts, rows)), dtype) for _ in range(0, count, rows))
    _put(file, "concept_texts", blocks, (count,), dtype)
