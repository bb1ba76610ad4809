"""The vector store on disk: write, open and check it.

Axes: M chunks in the store, D vector dimension, N windows.

A store is a folder:

    vectors.npy     (M, D) float16 or float32, unit vectors, memory-mapped
    chunks.npy      (M, 2) int32: article number, position within the article; row by row in reading order
    articles.csv    article, title, split (train, val, ood, or empty: not used), and perhaps source
    texts.jsonl     optional: a JSON string a row, in the order of the vectors
    windows.npy     optional, windows that came with the data: (N, 2) int64, the number of the split and the first row;
                    the datasheet has their horizon and context_length under `windows`
    datasheet.yaml  name, how it was made, and the sha256 of the files above
    checked.json    the result of the last full check, and the state of the files at that time
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from ..errors import LVMError
from ..io import limits as untrusted
from ..io.disk import explain_os_errors, sync, write_atomic
from ..io.paths import EMBEDDED
from ..windows import GivenWindows, Store, blocks
from .checks import check_articles, check_chunks, check_given, check_vectors

STORE_FILES = ("vectors.npy", "chunks.npy", "articles.csv", "datasheet.yaml")
OPTIONAL_FILES = ("texts.jsonl", "windows.npy")
CHECKED = "checked.json"
CHECK = 1  # raise it when the checks of `open_store` change: every store is then checked again
TICK = 1.0  # seconds: a second change within this time may leave the same time of change


class Texts(Sequence):
    """The `count` texts in a texts.jsonl, read when asked for; memory holds only where each line begins.

    Raises LVMError if the file does not have `count` lines, or if a line is not a JSON string. `checked`: the count is
    right, or checked later.
    """

    def __init__(self, path: Path, count: int, checked: bool = False):
        self.path, self.count = path, count
        if not checked:
            _ = self.begins

    @functools.cached_property
    def begins(self) -> np.ndarray:
        """(count + 1,) the byte at which each line begins, and the end."""
        begins, at = [np.zeros(1, np.int64)], 0
        with open(self.path, "rb") as file:
            while block := file.read(1 << 24):
                begins.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at + 1)
                at += len(block)
        begins = np.concatenate(begins)
        if len(begins) != self.count + 1 or begins[-1] != at:
            lines = len(begins) - 1
            raise LVMError(f"{self.path}: has {lines} whole lines for {self.count} vectors; restore the file")
        return begins

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self[r] for r in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        with open(self.path, "rb") as file:
            file.seek(self.begins[row])
            return self._text(file.readline(), row)

    def __iter__(self) -> Iterator[str]:
        with open(self.path, "rb") as file:
            for row, line in enumerate(file):
                yield self._text(line, row)

    def _text(self, line: bytes, row: int) -> str:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(text := json.loads(line), str):
                return text
        raise LVMError(f"{self.path}: line {row + 1} is not a text in JSON; restore the file")


def make_store(name: str, vectors, article, position, articles: pd.DataFrame, datasheet: dict | None = None) -> Store:
    """A store from arrays in memory, checked. Raises LVMError as `open_store` does."""
    vectors, article, position = np.asanyarray(vectors), np.asarray(article), np.asarray(position)
    check_vectors(vectors, name)
    if not article.shape == position.shape == (len(vectors),):
        raise LVMError(f"{name}: give each of the {len(vectors)} vectors one article number and one position")
    chunks = check_chunks(np.stack([article, position], 1), len(vectors), name)
    check_articles(articles, chunks[:, 0], name)
    fingerprint = _fingerprint(vectors, chunks, articles)
    return Store(name, vectors, chunks[:, 0], chunks[:, 1], articles, datasheet or {}, fingerprint)


def write_store(store: Store, folder: str | os.PathLike) -> Path:
    """Write a store as a folder, whole or not at all. Raises LVMError if the folder exists."""
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
    """A temporary folder for a store's files: renamed to `folder` when the block ends, deleted if the block fails.

    Call `seal` before the end. Raises LVMError if `folder` exists, and in place of an OSError in the block.
    """
    folder = Path(folder)
    if folder.exists():
        raise LVMError(f"{folder}: is there already; name a new folder, or move the old one aside")
    with explain_os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
        try:
            yield partial
            partial.chmod(0o755)  # mkdtemp makes it the owner's alone
            sync(partial)
            partial.rename(folder)
            sync(folder.parent, files=False)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def seal(partial: Path, name: str, articles: pd.DataFrame, datasheet: Mapping) -> Store:
    """Write articles.csv and the datasheet with the checksums beside the arrays in `partial`, and open the store.

    Raises LVMError as `open_store` does.
    """
    articles.to_csv(partial / "articles.csv", index_label="article")
    files = [*STORE_FILES[:3], *(f for f in OPTIONAL_FILES if (partial / f).exists())]
    content = {"name": name, **datasheet, "sha256": {f: sha256_file(partial / f) for f in files}}
    with open(partial / "datasheet.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(content, file, sort_keys=False, allow_unicode=True)
    return open_store(partial)


def open_store(folder: str | os.PathLike, verify: bool = False) -> Store:
    """Open a store folder; vectors and chunk table stay on disk, memory-mapped.

    The first call checks everything, and writes checked.json with the size, time of change and inode of each large
    file. While these stay the same, later calls read only articles.csv and the datasheet. Files that changed within a
    second of their check are not remembered. `verify` checks everything in any case.

    Raises LVMError, naming the file, for a missing or damaged file, a wrong checksum, or what `checks` refuses.
    """
    folder, began = Path(folder), time.time()
    _require(folder, STORE_FILES)
    state = _state(folder)
    datasheet, recorded, digest = _read_datasheet(folder)
    files = [*STORE_FILES[:3], *(f for f in OPTIONAL_FILES if f in recorded or (folder / f).exists())]
    _require(folder, files)
    state_checked = {"check": CHECK, "datasheet": digest, "files": state}
    fingerprint = None if verify else _remembered(folder, state_checked)
    articles = _read_articles(folder / "articles.csv")
    for name in files if fingerprint is None else ["articles.csv"]:
        if sha256_file(folder / name) != recorded.get(name):
            raise LVMError(f"{folder / name}: its sha256 is not that in datasheet.yaml; restore the file")
    vectors, chunks = _load_array(folder / "vectors.npy"), _load_array(folder / "chunks.npy")
    texts = Texts(folder / "texts.jsonl", len(vectors), checked=True) if "texts.jsonl" in files else None
    given = _read_windows(folder / "windows.npy", datasheet) if "windows.npy" in files else None
    if fingerprint is None:
        check_vectors(vectors, str(folder / "vectors.npy"))
        chunks = check_chunks(chunks, len(vectors), str(folder / "chunks.npy"))
        check_articles(articles, chunks[:, 0], str(folder / "articles.csv"))
        if given is not None:
            check_given(given, chunks, articles, str(folder / "windows.npy"))
        if texts is not None:
            _ = texts.begins
        fingerprint = _fingerprint(vectors, chunks, articles, given)
        _remember(folder, {**state_checked, "fingerprint": fingerprint}, began)
    chunks = np.asarray(chunks).astype(np.int32, copy=False)  # a view of the map, if it is int32 as we write it
    name = plain_name(str(datasheet.get("name") or folder.name))
    opened = folder.resolve(), state
    return Store(name, vectors, chunks[:, 0], chunks[:, 1], articles, datasheet, fingerprint, texts, given, opened)


def check_unchanged(store: Store) -> None:
    """Raise LVMError if the files of a store have changed since it was opened.

    Nothing is read while size, time of change and inode are the same; else the store is checked in full, and files with
    the same content pass. A store in memory never changes.
    """
    if store.opened is None or _state(store.opened[0]) == store.opened[1]:
        return
    folder = store.opened[0]
    try:
        fingerprint = open_store(folder).fingerprint
    except (LVMError, OSError) as e:
        raise LVMError(f"{folder}: this store was changed or removed while it was in use ({e})") from e
    if fingerprint != store.fingerprint:
        raise LVMError(f"{folder}: this store was changed while it was in use; restore it, or start a new run")


def plain_name(name: str) -> str:
    """A name from a file as pages and tables can show it: one line of at most 100 characters, without markup."""
    return "".join("-" if c in "<>[]`$|\\" or not c.isprintable() else c for c in name)[:100]


def _require(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise LVMError(f"{folder / name}: missing; a store folder holds {', '.join(STORE_FILES)}")


def _state(folder: Path) -> dict:
    """Size, time of change and inode of each large file. (The small files are hashed at every opening.)"""
    stats = {}
    for name in ("vectors.npy", "chunks.npy", *OPTIONAL_FILES):
        with contextlib.suppress(FileNotFoundError):
            stat = (folder / name).stat()
            stats[name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}
    return stats


def _remembered(folder: Path, known: dict) -> str | None:
    """The fingerprint in checked.json, if it is of files in just this state."""
    try:
        outcome = untrusted.read_json(folder / CHECKED)
        fingerprint = str(outcome["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return fingerprint if len(fingerprint) == 64 and outcome == {**known, "fingerprint": fingerprint} else None


def _remember(folder: Path, outcome: dict, began: float) -> None:
    """Write checked.json.

    Not if a file changed during the check or just before it, nor in the package or a folder that cannot be written.
    """
    changed = max((stat["mtime_ns"] for stat in outcome["files"].values()), default=0) / 1e9
    if changed > began - TICK or _state(folder) != outcome["files"] or EMBEDDED in folder.resolve().parents:
        return
    with contextlib.suppress(LVMError):  # no right to write, a full disk: the next opening checks again
        text = json.dumps(outcome, indent=1) + "\n"
        write_atomic(folder / CHECKED, lambda partial: partial.write_text(text, encoding="utf-8"))


def _read_datasheet(folder: Path) -> tuple[dict, dict, str]:
    """The datasheet, the checksums in it by file, and its own checksum."""
    try:
        sheet = untrusted.read_bytes(folder / "datasheet.yaml")
        datasheet = untrusted.from_yaml(sheet)
        return datasheet, dict(datasheet["sha256"]), hashlib.sha256(sheet).hexdigest()
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise LVMError(f"{folder / 'datasheet.yaml'}: cannot be read as a datasheet ({e!r}); restore the file") from e


def _read_articles(path: Path) -> pd.DataFrame:
    try:
        # Read as text first: an article listed twice must be seen, not merged.
        table = io.BytesIO(untrusted.read_bytes(path, 1 << 30))
        articles = pd.read_csv(table, keep_default_na=False, dtype=str)
        numbers = articles["article"].to_numpy(object).astype(np.int64)  # by int(): refuses fractions
        if (numbers != numbers.astype(np.int32)).any():
            raise OverflowError("an article number beyond int32")
        columns = ["title", "split", *(["source"] if "source" in articles else [])]
        return articles[columns].set_index(pd.Index(numbers.astype(np.int32), name="article"))
    except (OSError, ValueError, KeyError, OverflowError) as e:
        raise LVMError(f"{path}: needs columns article (a number), title, split ({e})") from e


def _read_windows(path: Path, datasheet: dict) -> GivenWindows:
    table, cut = np.asarray(_load_array(path)), datasheet.get("windows")
    cut = [cut.get(key) for key in ("horizon", "context_length")] if isinstance(cut, dict) else [None]
    if table.shape[1:] != (2,) or table.dtype != np.int64:
        raise LVMError(f"{path}: has shape {table.shape} and type {table.dtype}; needed is (windows, 2) int64")
    if not all(isinstance(number, int) and 1 <= number < 2**31 for number in cut):
        raise LVMError(f"{path}: datasheet.yaml has no windows: {{horizon: …, context_length: …}}; restore the file")
    return GivenWindows(table[:, 0], table[:, 1], *cut)


def _load_array(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped: a header that promises too much is refused before memory is taken."""
    try:
        # Mode "c" (copy on write): nothing reaches the file, and torch takes the array without a warning.
        return np.lib.format.open_memmap(path, mode="c")
    except Exception as e:  # a damaged header comes out of numpy as SyntaxError, TokenError, OverflowError, ...
        raise LVMError(f"{path}: not a readable .npy array ({e}); restore the file") from e


def sha256_file(path: str | os.PathLike) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fingerprint(vectors, chunks, articles: pd.DataFrame, given: GivenWindows | None = None) -> str:
    digest = hashlib.sha256(repr((vectors.shape, str(vectors.dtype))).encode())
    for _, block in blocks(vectors):
        digest.update(np.ascontiguousarray(block).data)
    digest.update(np.ascontiguousarray(chunks, np.int32).data)
    digest.update("\n".join(f"{a}:{s}" for a, s in articles["split"].items()).encode())
    if given is not None:
        digest.update(repr((given.horizon, given.context_length)).encode())
        digest.update(np.stack([given.split, given.start], 1).astype(np.int64).data)
    return digest.hexdigest()
