"""The vector store on disk, splits by article, and windows as row numbers.

Axes: M chunks in the store, D vector dimension, N windows, T context length, B batch.

A store is a folder:

    vectors.npy     (M, D) float16 or float32, unit vectors, memory-mapped
    chunks.npy      (M, 2) int32: article number, position within the article; row by row in reading order
    articles.csv    article, title, split (train, val, ood, or empty: not used), and perhaps source
    texts.jsonl     if the text was kept: a JSON string a row, in the order of the vectors
    windows.npy     if the windows were given, as the original's sequence files give them: (N, 2) int64, the number of
                    the split and the first row; their horizon and context_length stand in the datasheet, windows:
    datasheet.yaml  name, how it was made, and the sha256 of the files above
    checked.json    if it was opened before: what a full check found, and of which state of the files

A window is a run of T consecutive chunks of one article and the target `horizon` chunks after the last of
them. It is kept as one number, the row of its first chunk (8 bytes); vectors are gathered a batch at a time.
Vectors and chunk table stay on disk, so a store may be larger than memory, or than a GPU's.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from . import untrusted
from .errors import LVMError
from .files import sync, told, write_whole
from .params import ROOT, Files, files, outputs

SPLITS = ("train", "val", "ood")
DIRECTIONS = {"forward": 1, "backward": -1}  # how a window is read: the step from one chunk to the next
EMBEDDED = Path(__file__).resolve().parent / "data"
STORE_FILES = ("vectors.npy", "chunks.npy", "articles.csv", "datasheet.yaml")
OPTIONAL_FILES = ("texts.jsonl", "windows.npy")
CHECKED = "checked.json"
CHECK = 1  # raised when the checks of `open_store` change: then every store is checked anew
TICK = 1.0  # seconds: of a file changed this shortly before its check, a further change may leave the same time
BLOCK_VALUES = 1 << 23  # numbers that are read at a time: a store may be larger than memory
NORM_TOLERANCE = 0.01  # float16 rounds a unit vector's norm by less than 1e-3


class Texts(Sequence):
    """The texts of a store, read from texts.jsonl where they are asked for; only where each line begins is in memory.

    Raises LVMError if the file does not have `count` lines, or where a line is no JSON string. `checked`: the count is
    known to be right, so the lines are looked for when the first is asked for.
    """

    def __init__(self, path: str | os.PathLike, count: int, checked: bool = False):
        self.path, self.count = Path(path), count
        if not checked:
            self.begins = _line_begins(self.path, count)

    @functools.cached_property
    def begins(self) -> np.ndarray:
        """(count + 1,) the byte at which each line begins, and the end."""
        return _line_begins(self.path, self.count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self[r] for r in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row = int(row) % len(self)
        with open(self.path, "rb") as file:
            file.seek(self.begins[row])
            line = file.read(self.begins[row + 1] - self.begins[row])
        return self._text(line, row)

    def __iter__(self) -> Iterator[str]:
        with open(self.path, "rb") as file:
            for row, line in enumerate(file):
                yield self._text(line, row)

    def _text(self, line: bytes, row: int) -> str:
        try:
            text = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise LVMError(f"{self.path}: line {row + 1} is not JSON ({e}); restore the file") from e
        if not isinstance(text, str):
            raise LVMError(f"{self.path}: line {row + 1} holds {type(text).__name__}, not a text; restore the file")
        return text


def _line_begins(path: Path, count: int) -> np.ndarray:
    """(count + 1,) the byte at which each line begins, and the end. Raises LVMError unless these are whole lines."""
    begins, at = [np.zeros(1, np.int64)], 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            begins.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at + 1)
            at += len(block)
    begins = np.concatenate(begins)
    if len(begins) != count + 1 or begins[-1] != at:
        raise LVMError(
            f"{path}: has {len(begins) - 1} whole lines for {count} vectors; restore the file, or build the store anew"
        )
    return begins


@dataclass(frozen=True, eq=False)
class GivenWindows:
    """Windows that came with a store: `split` (N,) number in SPLITS, `start` (N,) first row; all cut alike."""

    split: np.ndarray
    start: np.ndarray
    horizon: int
    context_length: int


@dataclass(frozen=True, eq=False)
class Store:
    """Vectors of a corpus with their article and position; see the module's head for the files.

    `vectors` (M, D); `article`, `position` (M,) int32; `articles`: a frame indexed by article number with
    columns title, split and source (may be empty); `fingerprint`: sha256 over vectors, chunk table, splits, and the
    given windows where there are any; `texts` (M) if they were kept; `given`: the windows, if the store came with them;
    `opened`: its folder, and the state of the large files when it was opened; None for one in memory.
    """

    name: str
    vectors: np.ndarray
    article: np.ndarray
    position: np.ndarray
    articles: pd.DataFrame
    datasheet: dict
    fingerprint: str
    texts: Sequence[str] | None = None
    given: GivenWindows | None = None
    opened: tuple[Path, dict] | None = None

    @property
    def dim(self) -> int:
        return self.vectors.shape[1]

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split's chunks, in reading order."""
        begin, end = _runs(self, split)
        return ranges(begin, end - begin)


def make_store(name: str, vectors, article, position, articles: pd.DataFrame, datasheet: dict | None = None) -> Store:
    """A store from arrays in memory, checked. Raises LVMError on anything a training run could trip over."""
    vectors, article, position = np.asanyarray(vectors), np.asarray(article), np.asarray(position)
    check_vectors(vectors, name)
    if not article.shape == position.shape == (len(vectors),):
        raise LVMError(
            f"{name}: {len(vectors)} vectors, but articles {article.shape} and positions {position.shape}; "
            "give each vector one of both"
        )
    chunks = check_chunks(np.stack([article, position], 1), len(vectors), name)
    check_articles(articles, chunks[:, 0], name)
    return Store(
        name, vectors, chunks[:, 0], chunks[:, 1], articles, datasheet or {}, _fingerprint(vectors, chunks, articles)
    )


def write_store(store: Store, folder: str | os.PathLike) -> Path:
    """Write a store as a folder: whole or not at all, and never over something that is there.

    Raises LVMError if the folder exists.
    """
    with writing(folder) as partial:
        np.save(partial / "vectors.npy", store.vectors)
        np.save(partial / "chunks.npy", np.stack([store.article, store.position], 1))
        if store.texts is not None:
            with open(partial / "texts.jsonl", "w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(text) + "\n" for text in store.texts)
        datasheet = store.datasheet
        if store.given is not None:
            np.save(partial / "windows.npy", np.stack([store.given.split, store.given.start], 1).astype(np.int64))
            cut = {"horizon": store.given.horizon, "context_length": store.given.context_length}
            datasheet = {**datasheet, "windows": cut}
        seal(partial, store.name, store.articles, datasheet)
    return Path(folder)


@contextlib.contextmanager
def writing(folder: str | os.PathLike) -> Iterator[Path]:
    """A folder to put a store's files into, beside `folder`; it takes that name when the block ends, and is gone if the
    block fails. `seal` it before. Raises LVMError if `folder` exists."""
    folder = Path(folder)
    if folder.exists():
        raise LVMError(f"{folder}: is there already; name a new folder, or move the old one aside")
    with told(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        yield partial
        with told(folder):
            partial.chmod(0o755)  # mkdtemp makes it the owner's alone
            sync(partial)
            partial.rename(folder)
            sync(folder.parent, files=False)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def seal(partial: Path, name: str, articles: pd.DataFrame, datasheet: Mapping) -> Store:
    """Finish a store whose vectors.npy, chunks.npy (and texts.jsonl, windows.npy) stand in `partial`: writes
    articles.csv and the datasheet with the checksums, and opens it, so that what is wrong is found now."""
    articles.to_csv(partial / "articles.csv", index_label="article")
    files = [*STORE_FILES[:3], *(f for f in OPTIONAL_FILES if (partial / f).exists())]
    content = {"name": name, **datasheet, "sha256": {f: sha256_file(partial / f) for f in files}}
    (partial / "datasheet.yaml").write_text(
        yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    return open_store(partial)


def open_store(folder: str | os.PathLike, verify: bool = False) -> Store:
    """Open a store folder; vectors and chunk table stay on disk, memory-mapped.

    The first time everything is read and checked, and checked.json keeps the outcome, with the size, time of change and
    inode of each large file. Where these are as they were, later calls read and hash only articles.csv and the
    datasheet; where anything differs, or checked.json cannot be read, all is checked again. A folder that cannot be
    written is checked every time; a check within a second of a file's last change is not remembered. Not seen is a
    change that leaves size, time and inode as they were: a time set back by hand, a disk that decays. `verify` checks
    everything in any case.

    Raises LVMError, naming the file, on a missing or damaged file, a wrong checksum, a wrong shape or dtype,
    NaN, zero or unnormalised vectors, articles torn apart, or an article in two splits.
    """
    folder = Path(folder)
    for name in STORE_FILES:
        if not (folder / name).is_file():
            raise LVMError(f"{folder / name}: missing; a store folder holds {', '.join(STORE_FILES)}")
    began, found = time.time(), _state(folder)
    try:
        sheet = untrusted.read_bytes(folder / "datasheet.yaml")
        datasheet = untrusted.from_yaml(sheet)
        recorded = dict(datasheet["sha256"])
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise LVMError(
            f"{folder / 'datasheet.yaml'}: cannot be read as a datasheet with checksums ({e!r}); restore the file"
        ) from e
    optional = [name for name in OPTIONAL_FILES if name in recorded or (folder / name).exists()]
    for name in [*STORE_FILES[:3], *optional]:
        if not (folder / name).is_file():
            raise LVMError(f"{folder / name}: missing, though datasheet.yaml lists it; restore the file")
    known = {"check": CHECK, "datasheet": hashlib.sha256(sheet).hexdigest(), "files": found}
    fingerprint = None if verify else _remembered(folder, known)
    try:
        table = untrusted.read_bytes(folder / "articles.csv", 1 << 30)  # small and read each time: hashed each time
    except (OSError, ValueError) as e:
        raise LVMError(f"{folder / 'articles.csv'}: cannot be read ({e}); restore the file") from e
    for name in [*STORE_FILES[:3], *optional] if fingerprint is None else ["articles.csv"]:
        digest = hashlib.sha256(table).hexdigest() if name == "articles.csv" else sha256_file(folder / name)
        if digest != recorded.get(name):
            raise LVMError(
                f"{folder / name}: its sha256 is not the one in datasheet.yaml; the file is damaged or "
                "was changed: restore it, or build the store anew"
            )
    vectors, chunks = _load_array(folder / "vectors.npy"), _load_array(folder / "chunks.npy")
    articles = _read_articles(table, folder / "articles.csv")
    texts = Texts(folder / "texts.jsonl", len(vectors), fingerprint is not None) if "texts.jsonl" in optional else None
    given = _given(folder / "windows.npy", datasheet) if "windows.npy" in optional else None
    if fingerprint is None:
        check_vectors(vectors, str(folder / "vectors.npy"))
        chunks = check_chunks(chunks, len(vectors), str(folder / "chunks.npy"))
        check_articles(articles, chunks[:, 0], str(folder / "articles.csv"))
        if given is not None:
            check_given(given, chunks, articles, str(folder / "windows.npy"))
        fingerprint = _fingerprint(vectors, chunks, articles, given)
        _remember(folder, {**known, "fingerprint": fingerprint}, began)
    chunks = np.asarray(chunks).astype(np.int32, copy=False)  # a plain view of the map, if it is int32 as we write it
    return Store(
        plain_name(str(datasheet.get("name") or folder.name)),
        vectors,
        chunks[:, 0],
        chunks[:, 1],
        articles,
        datasheet,
        fingerprint,
        texts,
        given,
        (folder.resolve(), found),
    )


def check_unchanged(store: Store) -> None:
    """Raise LVMError if the files of a store are not, or do not say, what they did when it was opened.

    Where size, time of change and inode are the same, nothing is read; else all is, and equal content will do: that
    state is then the one to compare with. What is in memory alone never changes.
    """
    if store.opened is None:
        return
    folder, known = store.opened
    began, found = time.time(), _state(folder)
    if found == known:
        return
    try:
        now = open_store(folder).fingerprint
    except (LVMError, OSError) as e:
        raise LVMError(f"{folder}: this store was changed or taken away while it was in use ({e})") from e
    if now != store.fingerprint:
        raise LVMError(
            f"{folder}: this store was changed while it was in use: its fingerprint was {store.fingerprint[:16]}, and "
            f"is {now[:16]} now"
        )
    if _settled(folder, found, began):
        known.clear()
        known.update(found)


def plain_name(name: str) -> str:
    """A name from a file as pages and tables can show it: one line, without what they would take for markup."""
    kept = "".join("-" if c in "<>[]`$|\\" or not c.isprintable() else c for c in name)
    return kept[:100]


def _state(folder: Path) -> dict:
    """What tells whether the large files of a store are those that were checked: size, time of change, inode.

    The small ones are read at every opening, and known by their checksums."""
    stats = {}
    for name in ("vectors.npy", "chunks.npy", *OPTIONAL_FILES):
        with contextlib.suppress(FileNotFoundError):
            stat = (folder / name).stat()
            stats[name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}
    return stats


def _settled(folder: Path, found: dict, began: float) -> bool:
    """Whether the state `found` before a check that `began` then stands for what was read: no file changed during the
    check, or just before it."""
    changed = max((stat["mtime_ns"] for stat in found.values()), default=0) / 1e9
    return changed <= began - TICK and _state(folder) == found


def _remembered(folder: Path, known: dict) -> str | None:
    """The fingerprint that a full check of files in just this state found; None if there was none."""
    try:
        said = untrusted.read_json(folder / CHECKED)
        fingerprint = said.pop("fingerprint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    good = isinstance(fingerprint, str) and len(fingerprint) == 64 and said == known
    return fingerprint if good else None


def _remember(folder: Path, outcome: dict, began: float) -> None:
    """Write checked.json, unless a file changed during the check or just before it, or the folder is the package's own
    or cannot be written."""
    if not _settled(folder, outcome["files"], began) or EMBEDDED in folder.resolve().parents:
        return
    with contextlib.suppress(LVMError):  # no right to write, a full disk: the next opening checks again
        text = json.dumps(outcome, indent=1) + "\n"
        write_whole(folder / CHECKED, lambda partial: partial.write_text(text, encoding="utf-8"))


def _read_articles(table: bytes, path: Path) -> pd.DataFrame:
    try:
        # Read as text first: an article listed twice must be seen, not merged.
        articles = pd.read_csv(io.BytesIO(table), keep_default_na=False, dtype=str)
        numbers = articles["article"].to_numpy(object).astype(np.int64)  # by int(): refuses fractions
        if (numbers != numbers.astype(np.int32)).any():
            raise OverflowError("an article number beyond int32")
        columns = ["title", "split", *(["source"] if "source" in articles else [])]
        return articles[columns].set_index(pd.Index(numbers.astype(np.int32), name="article"))
    except (OSError, ValueError, KeyError, OverflowError) as e:
        raise LVMError(f"{path}: needs columns article (a number), title, split ({e})") from e


def _given(path: Path, datasheet: dict) -> GivenWindows:
    table, cut = _load_array(path), datasheet.get("windows")
    if table.ndim != 2 or table.shape[1] != 2 or table.dtype != np.int64:
        raise LVMError(f"{path}: has shape {table.shape} and type {table.dtype}; needed is (windows, 2) int64")
    if not isinstance(cut, dict) or not all(
        isinstance(cut.get(k), int) and 1 <= cut[k] < 2**31 for k in ("horizon", "context_length")
    ):
        raise LVMError(f"{path}: datasheet.yaml has no windows: {{horizon: …, context_length: …}}; restore the file")
    table = np.asarray(table)
    return GivenWindows(table[:, 0], table[:, 1], cut["horizon"], cut["context_length"])


def check_given(given: GivenWindows, chunks: np.ndarray, articles: pd.DataFrame, where: str) -> None:
    """Raise LVMError unless each given window lies in one article of its split, without a gap in positions."""
    span = given.context_length - 1 + given.horizon
    inside = (given.start >= 0) & (given.start < len(chunks) - span) & (given.split >= 0) & (given.split < len(SPLITS))
    first = np.where(inside, given.start, 0)
    last = np.minimum(first + span, len(chunks) - 1)
    split_of = articles["split"].map({s: i for i, s in enumerate(SPLITS)}).reindex(chunks[:, 0]).to_numpy()
    good = (
        inside
        & (chunks[first, 0] == chunks[last, 0])
        & (chunks[last, 1].astype(np.int64) - chunks[first, 1] == span)
        & (split_of[first] == given.split)
    )
    if not good.all():
        bad = int(np.flatnonzero(~good)[0])
        raise LVMError(
            f"{where}: window {bad} (split {given.split[bad]}, first row {given.start[bad]}) does not lie in one "
            f"article of its split without a gap ({(~good).sum()} such); import the files anew"
        )


def _load_array(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped: a header that promises too much is refused before memory is taken."""
    try:
        # Mode "c" (copy on write): nothing reaches the file, and torch takes the array without a warning.
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception as e:  # a damaged header comes out of numpy as SyntaxError, TokenError, OverflowError, ...
        raise LVMError(f"{path}: not a readable .npy array ({e}); restore the file") from e
    if not isinstance(array, np.ndarray):
        raise LVMError(f"{path}: is an archive (.npz), not a .npy array; restore the file")
    return array


def blocks(vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of an array (M, D), some megabytes at a time."""
    rows = max(1, BLOCK_VALUES // vectors.shape[1])
    for first in range(0, len(vectors), rows):
        yield first, vectors[first : first + rows]


def check_vectors(vectors: np.ndarray, where: str) -> None:
    """Raise LVMError unless `vectors` is a non-empty (M, D) float array of finite unit vectors."""
    if vectors.ndim != 2 or 0 in vectors.shape or vectors.dtype not in (np.float16, np.float32):
        raise LVMError(
            f"{where}: has shape {vectors.shape} and type {vectors.dtype}; "
            "needed is (chunks, dimension), float16 or float32, not empty"
        )
    for first, block in blocks(vectors):
        norms = np.linalg.norm(block.astype(np.float32), axis=1)
        bad = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))  # negated, so that NaN counts as bad
        if len(bad):
            norm = norms[bad[0]]
            kind = (
                "has NaN or infinite values"
                if not np.isfinite(norm)
                else "is a zero vector"
                if norm == 0
                else f"has norm {norm:.4g}, not 1"
            )
            advice = "normalise the vectors" if np.isfinite(norm) and norm > 0 else "drop or re-encode that chunk"
            raise LVMError(
                f"{where}: row {first + bad[0]} {kind} (first of {len(bad)} such rows in its block); {advice}"
            )


def check_chunks(chunks: np.ndarray, count: int, where: str) -> np.ndarray:
    """`chunks` (M, 2) as int32. Raises LVMError unless it keeps each article in one run of rising positions."""
    if chunks.shape != (count, 2) or not np.issubdtype(chunks.dtype, np.integer):
        raise LVMError(
            f"{where}: has shape {chunks.shape} and type {chunks.dtype}; "
            f"needed is ({count}, 2) integers, a row for each vector"
        )
    if chunks.min() < 0 or chunks.max() > np.iinfo(np.int32).max:
        raise LVMError(f"{where}: article numbers and positions must lie between 0 and {np.iinfo(np.int32).max}")
    chunks = np.asarray(chunks).astype(np.int32, copy=False)  # unsigned differences would never be negative
    article, position = chunks[:, 0], chunks[:, 1]
    numbers, runs = np.unique(article[run_begins(article)], return_counts=True)
    if (runs > 1).any():
        raise LVMError(f"{where}: article {numbers[runs > 1][0]} is torn apart; its rows must stand together")
    for first, rows in _pairs(len(chunks)):
        falling = (np.diff(position[rows]) <= 0) & (np.diff(article[rows]) == 0)
        if falling.any():
            row = int(np.flatnonzero(falling)[0]) + first
            raise LVMError(
                f"{where}: row {row} (article {article[row]}) does not rise in position; "
                "sort each article by position and drop duplicates"
            )
    return chunks


def run_begins(article: np.ndarray, position: np.ndarray | None = None) -> np.ndarray:
    """The rows where a run of one article begins; with `position`, also those after a gap in the positions."""
    found = [np.zeros(1, np.int64)]
    for first, rows in _pairs(len(article)):
        new = np.diff(article[rows]) != 0
        if position is not None:
            new |= np.diff(position[rows]) != 1
        found.append(np.flatnonzero(new) + first)
    return np.concatenate(found)


def _runs(store: Store, split: str, gapless: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end (R,) of the split's runs of rows: one an article, or, `gapless`, one a stretch without a gap."""
    begin = run_begins(store.article, store.position if gapless else None)
    inside = np.isin(store.article[begin], store.articles.index[store.articles["split"] == split])
    return begin[inside], np.append(begin[1:], len(store.article))[inside]


def _pairs(count: int) -> Iterator[tuple[int, slice]]:
    """All neighbours among `count` rows, block by block: (second row of the first pair, rows)."""
    for first in range(1, count, BLOCK_VALUES):
        yield first, slice(first - 1, first + BLOCK_VALUES)


def ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """(Σ count,) int64: first, first + 1, … of each run, one after the other; in no more memory than what it gives."""
    first, count = first[count > 0], count[count > 0]
    steps = np.ones(count.sum(), np.int64)
    if len(first):
        steps[0] = first[0]
        steps[np.cumsum(count)[:-1]] = np.diff(first) - count[:-1] + 1  # from a run's last row to the next one's first
    return np.cumsum(steps, out=steps)


def check_articles(articles: pd.DataFrame, used: np.ndarray, where: str) -> None:
    """Raise LVMError unless every article used is listed once and no article or title is in two splits."""
    missing = np.setdiff1d(used, articles.index)
    if len(missing):
        raise LVMError(f"{where}: article {missing[0]} has chunks but is not listed ({len(missing)} such)")
    unknown = set(articles["split"]) - {*SPLITS, ""}
    if unknown:
        raise LVMError(f"{where}: unknown split {min(unknown)!r}; known: {', '.join(SPLITS)}, or empty")
    check_disjoint({s: articles.index[articles["split"] == s] for s in SPLITS}, where)
    if articles.index.has_duplicates:
        raise LVMError(f"{where}: article {articles.index[articles.index.duplicated()][0]} is listed twice")
    named = articles[(articles["title"] != "") & (articles["split"] != "")]
    check_disjoint({s: named["title"][named["split"] == s] for s in SPLITS}, where)


def check_disjoint(splits: Mapping[str, object], where: str) -> None:
    """Raise LVMError if an article (number or title) is in two of the splits: training would leak."""
    names = list(splits)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            both = sorted(set(splits[a]) & set(splits[b]))
            if both:
                raise LVMError(
                    f"{where}: article {both[0]!r} is in both {a} and {b} ({len(both)} such); "
                    "an article belongs to one split"
                )


def sha256_file(path: str | os.PathLike) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fingerprint(
    vectors: np.ndarray, chunks: np.ndarray, articles: pd.DataFrame, given: GivenWindows | None = None
) -> str:
    digest = hashlib.sha256(repr((vectors.shape, str(vectors.dtype))).encode())
    for _, block in blocks(vectors):
        digest.update(np.ascontiguousarray(block).data)
    digest.update(np.ascontiguousarray(chunks, np.int32).data)
    digest.update("\n".join(f"{a}:{s}" for a, s in articles["split"].items()).encode())
    if given is not None:
        digest.update(repr((given.horizon, given.context_length)).encode())
        digest.update(np.stack([given.split, given.start], 1).astype(np.int64).data)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of one split: N first rows into a store, nothing else.

    `start` (N,) int64; the context is rows start … start + T − 1, the target row start + T − 1 + horizon.
    `step` −1 reads the text backwards: the context is rows start, start − 1, …, and the target lies before it.
    """

    store: Store
    split: str
    start: np.ndarray
    context_length: int
    horizon: int
    step: int = 1

    def __len__(self) -> int:
        return len(self.start)

    @property
    def article(self) -> np.ndarray:
        """(N,) the article of each window."""
        return self.store.article[self.start]

    @property
    def target(self) -> np.ndarray:
        """(N,) the row of each target."""
        return self.start + self.offsets[-1]

    @property
    def offsets(self) -> np.ndarray:
        """(T + 1,) int64: how far from `start` the rows of the context lie, as they are read, and last the target's."""
        return self.step * np.append(np.arange(self.context_length), self.context_length - 1 + self.horizon)

    def context_rows(self, index) -> np.ndarray:
        """(B, T) the rows of the contexts of windows `index` (B,), as they are read."""
        return self.start[np.asarray(index)][:, None] + self.offsets[:-1]

    def target_rows(self, index) -> np.ndarray:
        """(B,) the rows of the targets of windows `index` (B,): `target[index]` without all the others."""
        return self.start[np.asarray(index)] + self.offsets[-1]

    def batch(self, index, vectors: torch.Tensor | OnDemand | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather windows `index` (B,): context (B, T, D) and target (B, D), float32.

        `vectors` (M, D): the store's vectors for a device (`on_device`).
        """
        vectors = torch.from_numpy(self.store.vectors) if vectors is None else vectors
        rows = self.start[np.asarray(index)][:, None] + self.offsets  # (B, T + 1)
        announce(self.store.vectors, rows, vectors)
        # One index_select over rows is several times faster than indexing by (B, T + 1), on a CPU.
        chunks = vectors.index_select(0, torch.from_numpy(rows.ravel()).to(vectors.device)).float()
        chunks = chunks.view(*rows.shape, vectors.shape[1])  # (B, T + 1, D)
        return chunks[:, :-1], chunks[:, -1]

    def batches(self, size: int, vectors: torch.Tensor | None = None):
        """All windows in order, `size` at a time, as `batch` gives them."""
        for first in range(0, len(self), size):
            yield self.batch(np.arange(first, min(first + size, len(self))), vectors)

    def at_most(self, count: int) -> Windows:
        """Evenly spaced `count` of the windows (all, if there are no more): for quick runs."""
        keep = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int))
        return replace(self, start=self.start[keep])


class OnDemand:
    """A store's vectors (M, D) for a device without room for them: rows are gathered in memory and sent as they are
    asked for. It stands where the tensor on the device would: shape, device, and rows by index."""

    def __init__(self, stored: torch.Tensor, device: torch.device):
        self.stored, self.device, self.shape = stored, device, stored.shape

    def __getitem__(self, rows: torch.Tensor | slice) -> torch.Tensor:
        return self.stored[rows if isinstance(rows, slice) else rows.to(self.stored.device)].to(self.device)

    def index_select(self, dim: int, rows: torch.Tensor) -> torch.Tensor:
        return self.stored.index_select(dim, rows.to(self.stored.device)).to(self.device)

    def data_ptr(self) -> int:
        return self.stored.data_ptr()


def on_device(store: Store, device: torch.device) -> torch.Tensor | OnDemand:
    """The store's vectors (M, D) where a model on `device` reads them: there, if they take no more than half of what is
    free of a GPU's memory (the rest is for the model and its batches), else on demand. On a CPU they stay on disk."""
    stored, device = torch.from_numpy(store.vectors), torch.device(device)
    if device.type == "cuda" and stored.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return OnDemand(stored, device)
    return stored.to(device)


def announce(mapped: np.ndarray, rows: np.ndarray, read: torch.Tensor | OnDemand) -> None:
    """Tell the system which `rows` (B, R) of a memory-mapped array (M, D) are read next; does nothing if `read`, which
    they are taken from, is not that map itself.

    What is not in memory then comes from the disk in parallel, and only that. Left to guess, the system fetches
    the read-ahead of the device (up to megabytes) around each row, and a store larger than memory crawls.
    """
    area = mapped.base
    whole = isinstance(mapped, np.memmap) and isinstance(area, mmap.mmap) and mapped.flags.c_contiguous
    # Windows knows no such call.
    if not whole or not rows.size or read.data_ptr() != mapped.ctypes.data or not hasattr(mmap, "MADV_WILLNEED"):
        return
    offset = mapped.offset % mmap.ALLOCATIONGRANULARITY  # of the first value in the map
    begin = (offset + rows.min(1) * mapped.strides[0]) // mmap.PAGESIZE * mmap.PAGESIZE
    end = offset + (rows.max(1) + 1) * mapped.strides[0]
    for at, length in zip(begin.tolist(), (end - begin).tolist(), strict=True):
        area.madvise(mmap.MADV_WILLNEED, at, length)


def shared(forward: Windows, backward: Windows) -> tuple[Windows, Windows]:
    """The windows of both whose target is the same chunk, in the same order: what a text can be compared on, read
    forwards and backwards. Raises LVMError where they share none, or lie in different stores.
    """
    if forward.store.fingerprint != backward.store.fingerprint:
        raise LVMError(f"windows of {forward.store.name} and {backward.store.name} share no target; use one store")
    common, ours, theirs = np.intersect1d(forward.target, backward.target, return_indices=True)
    if not len(common):
        raise LVMError(
            f"{forward.store.name}, split {forward.split}: no chunk is a target in both directions; that needs an "
            f"article of {2 * (forward.context_length + forward.horizon) - 1} consecutive chunks"
        )
    return replace(forward, start=forward.start[ours]), replace(backward, start=backward.start[theirs])


def windows(store: Store, split: str, horizon: int = 2, context_length: int = 5, direction: str = "forward") -> Windows:
    """All windows of a split; none crosses an article or a gap in positions. `backward` reads the articles reversed.

    A store that came with windows of its own gives those, forwards. Articles shorter than context_length + horizon
    give none. Raises LVMError if no article is long enough.
    """
    if split not in SPLITS:
        raise LVMError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if direction not in DIRECTIONS:
        raise LVMError(f"unknown direction {direction!r}; known: {', '.join(DIRECTIONS)}")
    if horizon < 1 or context_length < 1:
        raise LVMError(f"horizon {horizon} and context_length {context_length} must each be at least 1")
    if store.given is not None and (horizon, context_length) != (store.given.horizon, store.given.context_length):
        raise LVMError(
            f"{store.name}: came with windows of {store.given.context_length} with horizon {store.given.horizon}, asked"
            f" for are {context_length} with horizon {horizon}; set `horizon` and `context_length` to what there is"
        )
    if store.given is not None and direction == "forward":  # read backwards, there are no given ones: all are cut
        start = store.given.start[store.given.split == SPLITS.index(split)]
        if not len(start):
            raise LVMError(f"{store.name}: came with windows, but with none for split {split}; add a file for it")
        return Windows(store, split, start, context_length, horizon)
    span = context_length - 1 + horizon
    begin, end = _runs(store, split, gapless=True)
    start = ranges(begin, np.maximum(end - begin - span, 0))
    if not len(start):
        begin, end = _runs(store, split)
        raise LVMError(
            f"{store.name}, split {split}: no article is long enough: a window of {context_length} with "
            f"horizon {horizon} needs {span + 1} chunks without a gap, the longest article has "
            f"{(end - begin).max(initial=0)}"
        )
    step = DIRECTIONS[direction]
    if step == -1:
        start += span
    return Windows(store, split, start, context_length, horizon, step)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A store and its windows: `train`, `val`, `ood`."""

    store: Store
    train: Windows
    val: Windows
    ood: Windows


def dataset(
    data: str | Files | Mapping | Store = "wikipedia",
    horizon: int = 2,
    context_length: int = 5,
    fast: bool = False,
    direction: str = "forward",
) -> Dataset:
    """Open a dataset and cut its windows.

    `data`: `wikipedia` (embedded), a name under outputs/datasets/ (made by encode.ipynb), `world:NAME` (a synthetic
    world), a store's folder, a Store, or the original's files: one article file, or a mapping as `params.Files` has it
    (converted once, into outputs/imported/).
    `fast` keeps a few hundred windows of each split, for smoke runs; `direction` as in `windows`. Raises LVMError for
    an unknown name.
    """
    if not isinstance(data, Store):
        data = files(os.fspath(data) if isinstance(data, os.PathLike) else data)
    if isinstance(data, Store):
        store = data
    elif isinstance(data, Files) or data.endswith(".npz"):
        from .importers import opened

        store = opened(data)
    elif data in embedded():
        store = open_store(EMBEDDED / data)
    elif data.startswith("world:"):
        from .worlds import world

        store = world(data.removeprefix("world:"))
    else:
        own = outputs() / "datasets"  # what encode.ipynb makes is known by its name
        places = [ROOT / os.path.expanduser(data)]  # a relative path starts from the checkout
        places = places if "/" in data else [own / data, *places]
        folder = next((p for p in places if os.path.isdir(p)), None)
        if folder is None:
            there = [*embedded(), *(sorted(p.parent.name for p in own.glob("*/datasheet.yaml")))]
            raise LVMError(
                f"data {data!r}: neither one of {', '.join(there)}, nor world:NAME, nor the folder of a store, nor an "
                ".npz file; encode.ipynb makes a dataset of your own texts"
            )
        store = open_store(folder)
    cut = [windows(store, split, horizon, context_length, direction) for split in SPLITS]
    if fast:
        cut = [w.at_most(n) for w, n in zip(cut, (512, 128, 128), strict=True)]
    return Dataset(store, *cut)


def embedded() -> list[str]:
    """Names of the datasets inside the package."""
    return sorted(p.parent.name for p in EMBEDDED.glob("*/datasheet.yaml"))
