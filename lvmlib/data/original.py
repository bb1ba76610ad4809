"""The original's `.npz` files (handbook §1) as a store, and a dataset written back in their form.

    python -m lvmlib import OUT --articles articles.npz [--train train.npz --val val.npz --ood ood.npz]

    convert(files, folder)    the files as a new store folder
    opened(files)             the same, kept under outputs/imported/ and used again
    export(data, folder)      articles.npz, train.npz, val.npz, ood.npz

Vectors are read a few megabytes at a time (`npz`); memory holds only tables of some bytes a row.

Axes: M chunks, D vector dimension, N windows, T context length, A articles.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import LVMError
from ..io.paths import ROOT, outputs
from ..windows import SPLITS, Dataset, Store
from . import checks, splits
from . import npz as npz_format
from . import store as store_format
from .npz import MOST, Npz, check_room
from .original_place import SAME, Placing, rebuild
from .original_read import ARTICLE_ARRAYS, Sequences, read_articles

FORMAT = 1  # raise it when `convert` makes something else of the same files: kept conversions are then not used
KEYS = (*SPLITS, "articles")
OPTIONAL_ARRAYS = ("concept_texts", "article_titles", "article_sources")


def convert(
    files, folder: str | os.PathLike, *, name: str | None = None, ood: str = "topic", drop_bad: bool = False
) -> Store:
    """Write the original's files as a new store folder, and open it.

    `files`: the path of an article file, which is split by `splits.split_articles` with `ood`; or a mapping, or an
    object, with train, val, ood and articles. The windows of sequence files become the store's: they are placed on the
    chunks of the article file and compared with them, or, without one, on the chunks that the windows hold.
    A relative path starts from the checkout. `name`: of the store; the file's own by default. `drop_bad` leaves out
    zero, NaN and infinite vectors, with the windows that touch them, and windows across a gap in positions.

    Vectors are normalised. The datasheet counts what was done. Raises LVMError, naming file and array, for anything
    that cannot be used; no folder is left then. No code in a file is run.
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
            articles = _write({key: archives[path] for key, path in paths.items()}, partial, drop_bad, ood, sheet)
            sheet["source_sha256"] = {key: store_format.sha256_file(path) for key, path in paths.items()}
            shutil.rmtree(scratch)
            try:
                store_format.seal(partial, name or _default_name(paths), articles, sheet)
            except LVMError as e:
                raise LVMError(str(e).replace(str(partial), str(folder))) from e
    except OSError as e:
        raise LVMError(f"{folder}: cannot be written ({e.strerror or e}); make room, or name another folder") from e
    return store_format.open_store(folder)


def _paths(files) -> dict[str, Path]:
    """The paths in `files` by key (train, val, ood, articles). Raises LVMError for an unknown key, or none."""
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
            raise LVMError(f"files: {key} is {value!r}; give the path of an .npz file")
    paths = {key: ROOT / os.path.expanduser(files[key]) for key in KEYS if files.get(key)}
    if not paths:
        raise LVMError(f"files: none is named; give {', '.join(SPLITS)}, or articles, or all")
    return paths


def _default_name(paths: Mapping[str, Path]) -> str:
    path = paths.get("articles") or next(iter(paths.values()))
    return re.sub(r"[^\w.-]+", "-", path.stem).strip(".-")[:60] or "imported"


def _write(archives: dict[str, Npz], partial: Path, drop_bad: bool, ood: str, sheet: dict) -> pd.DataFrame:
    """Write vectors.npy, chunks.npy and, if given, texts.jsonl and windows.npy; fill the datasheet.

    Returns the table of the articles.
    """
    sequences = [Sequences(archives[split], split) for split in SPLITS if split in archives]
    source, counts = archives.get("articles"), {}
    _check_alike(sequences)
    if source is None:
        table, horizon = rebuild(sequences, partial / "vectors.npy", drop_bad, counts)
        gaps = "windows dropped, as a chunk between context and target stands in no file"
    else:
        table, horizon = read_articles(source, partial / "vectors.npy", drop_bad, counts), None
        gaps = "windows across a gap" if drop_bad else None
        if sequences and table.vectors.shape[1] != sequences[0].dim:
            raise LVMError(
                f"{sequences[0].path}: its vectors have {sequences[0].dim} dimensions, those of {source.path} "
                f"{table.vectors.shape[1]}; the files do not belong together"
            )
    placing = Placing(table, horizon, drop_bad, gaps, counts)
    starts = [placing.starts(s) for s in sequences]
    _list_unused(archives, sequences, sheet)
    keep = ~table.bad
    if not keep.any():
        raise LVMError(f"{table.where}: no vector is left once the bad ones are dropped; encode the texts again")
    if source is not None and "concept_texts" in source:
        _write_texts(source, partial, table.file_order, keep)
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
    sheet["dimension"] = int(table.vectors.shape[1])
    sheet["counts"] = {"chunks": len(article), "articles": len(numbers)}
    titles, sources = _titles(source, numbers), _texts_of(source, "article_sources", numbers)
    if sequences:
        split = _write_windows(sequences, starts, numbers, placing.horizon, source is not None, partial, sheet)
    else:
        try:
            stored = np.load(partial / "vectors.npy", mmap_mode="c")
            split = splits.split_articles(stored, compact, titles, ood, sources)
        except LVMError as e:
            raise LVMError(f"{source.path}: {e}") from e
    sheet["counts"] |= counts
    sizes = np.bincount(compact)
    sheet["split"] = {
        name or "not used": {"articles": int((split == name).sum()), "chunks": int(sizes[split == name].sum())}
        for name in (*SPLITS, "")
        if (split == name).any()
    }
    columns = {"title": titles, "split": split} | ({} if sources is None else {"source": sources})
    return pd.DataFrame(columns, index=pd.Index(numbers, name="article"))


def _check_alike(sequences: list[Sequences]) -> None:
    """Raise LVMError if sequence files differ in context length or dimension, or share an article."""
    for s in sequences:
        first = sequences[0]
        if (s.length, s.dim) != (first.length, first.dim):
            raise LVMError(
                f"{s.path}: its contexts are {s.length} vectors of {s.dim} dimensions, those of {first.path} "
                f"{first.length} of {first.dim}; files of one dataset are alike"
            )
    where = ", ".join(dict.fromkeys(str(s.path) for s in sequences))
    checks.check_disjoint({s.split: np.unique(s.ids).tolist() for s in sequences}, where)


def _write_windows(sequences, starts, numbers, horizon: int, compared: bool, partial: Path, sheet: dict) -> np.ndarray:
    """Write windows.npy, fill the datasheet, and return the split (A,) of the articles `numbers` by the files.

    `compared`: the windows were compared with an article file.
    """
    split, rows, sheet["matched"] = np.full(len(numbers), "", dtype="<U5"), [], {}
    for s, start in zip(sequences, starts, strict=True):
        if not (start >= 0).any():
            advice = "check what was dropped" if compared else "give the article file as well"
            raise LVMError(f"{s.path}: none of its {s.count} windows can be placed; {advice}")
        sheet["counts"][f"windows in {s.split}"] = int((start >= 0).sum())
        key = "vectors" if s.indices is None else "target index"
        sheet["matched"][s.split] = (
            f"by article number and {key}; every vector compared with its chunk, cosine above {SAME}"
            if compared
            else "by article number and target index; the chunks are those of the windows, whose overlaps agree"
        )
        split[np.isin(numbers, s.ids)] = s.split
        rows.append((np.full(s.count, SPLITS.index(s.split)), start))
    given = np.concatenate(rows, 1).T.astype(np.int64)
    np.save(partial / "windows.npy", given[given[:, 1] >= 0])
    sheet["windows"] = {"horizon": horizon, "context_length": int(sequences[0].length)}
    sheet["split_rule"] = "By the files: an article is in the split whose sequence file holds windows of it."
    return split


def _compact(vectors: np.memmap, path: Path, keep: np.ndarray) -> None:
    """Delete the rows of a vectors.npy that are not to `keep`, in place."""
    at, rows = 0, max(1, npz_format.BLOCK_BYTES // (vectors.shape[1] * vectors.itemsize))
    for first in range(0, len(vectors), rows):
        block = vectors[first : first + rows][keep[first : first + rows]]  # a copy
        vectors[at : at + len(block)] = block
        at += len(block)
    vectors.flush()  # before the file is cut: nothing is written behind the cut later
    form = {"descr": vectors.dtype.str, "fortran_order": False, "shape": (at, vectors.shape[1])}
    with open(path, "r+b") as file:
        np.lib.format.write_array_header_1_0(file, form)  # numpy leaves room for a longer first size: it fits
        file.truncate(file.tell() + at * vectors.shape[1] * vectors.itemsize)


def _write_texts(npz: Npz, partial: Path, order: np.ndarray | None, keep: np.ndarray) -> None:
    """Write the texts of an article file as texts.jsonl: rows `order` of the file, those to `keep`."""
    raw, path, count = partial / "scratch" / "texts", partial / "texts.jsonl", len(keep)
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


def _texts_of(npz: Npz | None, name: str, articles: np.ndarray) -> list[str] | None:
    """A text for each article number of `articles` (A,), from an array with one for every number; None without it."""
    if npz is None or name not in npz:
        return None
    member = npz.member(name)
    if member.info.file_size > MOST:
        raise LVMError(f"{member.where}: has {member.info.file_size:,} bytes; {MOST:,} is the most that is read")
    texts = list(npz.texts(name))
    if articles.max() >= len(texts):
        raise LVMError(
            f"{member.where}: has {len(texts)} entries, but there is an article {articles.max()}; give one for every "
            "article number from 0 on"
        )
    return [" ".join(re.sub(r"[\x00-\x1f\x7f]", " ", texts[a]).split())[:500] for a in articles]


def _titles(npz: Npz | None, numbers: np.ndarray) -> list[str]:
    """A title for each article of `numbers` (A,), with its number where two are equal or there is none."""
    titles = _texts_of(npz, "article_titles", numbers) or [""] * len(numbers)
    titles = [title or f"article {number}" for title, number in zip(titles, numbers, strict=True)]
    twice = pd.Series(titles).duplicated(keep=False)
    return [f"{t} (article {a})" if again else t for t, a, again in zip(titles, numbers, twice, strict=True)]


def _list_unused(archives: dict[str, Npz], sequences: list[Sequences], sheet: dict) -> None:
    """List the arrays that are not needed. Raise LVMError for an object array among them that asks to load something:
    it would run in another reader."""
    used = {(s.path, name) for s in sequences for name in s.used}
    if "articles" in archives:
        used |= {(archives["articles"].path, name) for name in (*ARTICLE_ARRAYS, *OPTIONAL_ARRAYS)}
    every = {(npz.path, name): npz for npz in archives.values() for name in npz.members}
    unused = sorted(set(every) - used)
    for path, name in unused:
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
    if unused:
        sheet["left_out"] = sorted(f"{name} ({path.name})" for path, name in unused)


def opened(files) -> Store:
    """The store of the original's files (as `convert` takes them), converted once into outputs/imported/.

    A file that has changed, by size or time, is converted again. Two processes may do it at once.
    """
    named, paths, known = _paths(files), {}, [FORMAT]
    for key, path in named.items():
        try:
            paths[key] = path.resolve()
            stat = paths[key].stat()
        except (OSError, RuntimeError, ValueError) as e:  # no file, a ring of links, no path at all
            shown = str(path) if str(path).isprintable() else repr(str(path))
            raise LVMError(f"{shown}: cannot be opened ({e}); name an .npz file") from e
        known.append([key, str(paths[key]), stat.st_size, stat.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
    folder = outputs() / "imported" / f"{_default_name(named)}-{digest}"
    if not folder.is_dir():
        try:
            return convert(paths, folder)
        except LVMError:
            if not folder.is_dir():  # else another process was first, and its store is the same
                raise
    try:
        return store_format.open_store(folder)
    except LVMError as e:
        converted = ", ".join(path.name for path in paths.values())
        raise LVMError(f"{e}; it was converted from {converted}: delete {folder}") from e


def export(data: Dataset, folder: str | os.PathLike) -> dict[str, Path]:
    """Write a dataset in the original's form into a new `folder`: articles.npz, train.npz, val.npz and ood.npz.

    articles.npz: vectors (M, D), article_indices, chunk_indices (M,), article_titles and, if there are any,
    article_sources (a text for every article number) and concept_texts (M,), all without pickle. Plain unicode gives
    every text the length of the longest: texts of more than 1 GiB are left out with a warning. The sequence files:
    context_sequences (N, T, D), target_vectors (N, D), article_ids, target_indices (N,), in the store's type.

    Returns the paths by name. Raises LVMError if the folder exists, or if the windows are read backwards.
    """
    store, folder = data.store, Path(folder)
    cut = {split: getattr(data, split) for split in SPLITS}
    for split, w in cut.items():
        if w.step != 1:
            raise LVMError(f"{store.name}, split {split}: is read backwards; export the dataset read forwards")
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
                pieces = len(w) * w.context_length * row // npz_format.BLOCK_BYTES + 1
                parts = np.array_split(np.arange(len(w)), pieces)
                with zipfile.ZipFile(partial / f"{split}.npz", "w") as file:
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
    """Put an array into `file`, block by block, as np.savez does."""
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
    """Put titles and sources, unless the article numbers are too sparse for a list, and the texts."""
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
            f"{store.name}: its {len(store.texts)} texts of up to {longest} characters are left out of articles.npz: "
            "they need more than 1 GiB there, or end in zero characters, which numpy drops; they stay in the store",
            stacklevel=3,
        )
        return
    rows, dtype = max(1, npz_format.BLOCK_BYTES // (4 * longest)), np.dtype(f"<U{longest}")
    texts, count = iter(store.texts), len(store.texts)
    blocks = (np.array(list(itertools.islice(texts, rows)), dtype) for _ in range(0, count, rows))
    _put(file, "concept_texts", blocks, (count,), dtype)
