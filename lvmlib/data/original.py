"""The original's `.npz` files (handbook §1) as a store, and a dataset written back in their form.

    python -m lvmlib import OUT --articles articles.npz [--train train.npz --val val.npz --ood ood.npz]

    convert(files, folder)    the files as a new store folder
    opened(files)             the same, converted once into outputs/imported/
    export(data, folder)      articles.npz, train.npz, val.npz, ood.npz

Vectors are read a few megabytes at a time (`npz`); memory holds only tables of some bytes a row.

Axes: M chunks, D vector dimension, N windows, T context length, A articles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ..config import Files
from ..errors import LVMError
from ..io.paths import ROOT, outputs
from ..windows import SPLITS, Dataset, Store, blocks
from . import checks, splits
from . import store as store_format
from .npz import MOST, Npz
from .original_place import SAME, Placing, rebuild
from .original_read import Sequences, allocate, read_articles

FORMAT = 1  # raise it when `convert` makes something else of the same files: earlier conversions are then not used
KEYS = (*SPLITS, "articles")
OPTIONAL_ARRAYS = ("concept_texts", "article_titles", "article_sources")


def convert(
    files: str | os.PathLike | Mapping | Files,
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    ood: str = "topic",
    drop_bad: bool = False,
) -> Store:
    """Write the original's files as a new store folder, and open it.

    `files`: the path of an article file, which is split by `splits.split_articles` with `ood`; or a mapping, or Files,
    with train, val, ood and articles. The windows of sequence files become the store's: they are placed on the chunks
    of the article file and compared with them, or, without one, on the chunks that the windows hold. A relative path
    starts from the checkout. `name`: of the store; the file's own by default. `drop_bad` leaves out zero, NaN and
    infinite vectors, with the windows that touch them, and windows across a gap in positions.

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
    with contextlib.ExitStack() as stack:
        partial = stack.enter_context(store_format.writing(folder))
        scratch = partial / "scratch"
        scratch.mkdir()
        archives = {}
        for path in dict.fromkeys(paths.values()):
            archives[path] = Npz(path, scratch)
            stack.callback(archives[path].zip.close)
        articles = _write({key: archives[path] for key, path in paths.items()}, partial, drop_bad, ood, sheet)
        sheet["source_sha256"] = {key: store_format.sha256_file(path) for key, path in paths.items()}
        shutil.rmtree(scratch)
        store_format.seal(partial, name or _default_name(paths), articles, sheet)
    return store_format.open_store(folder)


def _paths(files) -> dict[str, Path]:
    """The paths in `files` by key (train, val, ood, articles)."""
    if isinstance(files, Files):
        files = vars(files)
    elif not isinstance(files, Mapping):
        files = {"articles": files}
    unknown = set(files) - set(KEYS)
    paths = {key: ROOT / os.path.expanduser(files[key]) for key in KEYS if files.get(key)}
    if unknown or not paths:
        given = ", ".join(sorted(unknown)) or "none"
        raise LVMError(f"files: {given} given; name .npz files by the keys {', '.join(KEYS)}")
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
    placing = _read(source, sequences, partial / "scratch" / "vectors.npy", drop_bad, counts)
    table, starts = placing.table, [placing.starts(s) for s in sequences]
    _list_unused(archives, sheet)
    keep = ~table.bad
    if not keep.any():
        raise LVMError(f"{table.where}: no vector is left once the bad ones are dropped; encode the texts again")
    if source is not None and "concept_texts" in source:
        _write_texts(source, partial, table.file_order, keep)
        sheet["texts"] = "kept, from the array concept_texts"
    _write_vectors(table.vectors, partial, keep)
    if not keep.all():
        if source is not None:
            counts["vectors dropped (zero, NaN or infinite)"] = int((~keep).sum())
        new_row = np.cumsum(keep) - 1
        starts = [np.where(start >= 0, new_row[start], -1) for start in starts]
    article = table.article[keep]
    np.save(partial / "chunks.npy", np.stack([article, table.position[keep]], 1))
    numbers, compact = np.unique(article, return_inverse=True)
    sheet["dimension"] = int(table.vectors.shape[1])
    sheet["counts"] = {"chunks": len(article), "articles": len(numbers)}
    titles, sources = _titles(source, numbers), _texts_of(source, "article_sources", numbers)
    if sequences:
        split = _write_windows(sequences, starts, numbers, placing.horizon, source is not None, partial, sheet)
    else:
        stored = np.load(partial / "vectors.npy", mmap_mode="c")
        try:
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


def _read(source: Npz | None, sequences: list[Sequences], path: Path, drop_bad: bool, counts: dict) -> Placing:
    """Read the table of the chunks, its vectors written to `path`, ready for windows to be placed on it.

    Raises LVMError if files differ in context length or dimension, or if sequence files share an article.
    """
    where = ", ".join(dict.fromkeys(str(s.path) for s in sequences))
    if len({(s.length, s.dim) for s in sequences}) > 1:
        shapes = ", ".join(f"{s.length} × {s.dim}" for s in sequences)
        raise LVMError(f"{where}: their contexts are {shapes}; files of one dataset have equal lengths and dimensions")
    checks.check_disjoint({s.split: np.unique(s.ids).tolist() for s in sequences}, where)
    if source is None:
        table, horizon = rebuild(sequences, path, drop_bad, counts)
        gaps = "windows dropped, as a chunk between context and target is in no file"
        return Placing(table, horizon, drop_bad, gaps, counts)
    if alone := [s for s in sequences if not s.known]:
        raise LVMError(f"{alone[0].path}: has no article numbers to look up; add article_ids, or leave out articles")
    table = read_articles(source, path, drop_bad, counts)
    dim = table.vectors.shape[1]
    if sequences and dim != sequences[0].dim:
        raise LVMError(f"{where}: have {sequences[0].dim} dimensions, and {source.path} has {dim}; encode both alike")
    return Placing(table, None, drop_bad, "windows across a gap" if drop_bad else None, counts)


def _write_vectors(vectors: np.ndarray, partial: Path, keep: np.ndarray) -> None:
    """Write the rows to `keep` as vectors.npy; without bad ones the file in scratch becomes it."""
    if keep.all():
        vectors.flush()
        (partial / "scratch" / "vectors.npy").rename(partial / "vectors.npy")
        return
    shape, at = (int(keep.sum()), vectors.shape[1]), 0
    written = allocate(partial / "vectors.npy", shape, vectors.dtype, "the vectors without the bad ones")
    for first, block in blocks(vectors):
        good = block[keep[first : first + len(block)]]
        written[at : at + len(good)] = good
        at += len(good)
    written.flush()


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


def _write_texts(npz: Npz, partial: Path, order: np.ndarray, keep: np.ndarray) -> None:
    """Write the texts of an article file as texts.jsonl: rows `order` of the file, those to `keep`."""
    raw, count = partial / "scratch" / "texts", len(keep)
    if npz.member("concept_texts").shape != (count,):
        raise npz.member("concept_texts").needs(f"({count},), a text for each vector")
    with open(raw, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(text) + "\n" for text in npz.texts("concept_texts"))
    texts = store_format.Texts(raw, count)
    with open(partial / "texts.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(texts[row]) + "\n" for row in order[keep])


def _texts_of(npz: Npz | None, name: str, articles: np.ndarray) -> list[str] | None:
    """A text for each article number of `articles` (A,), from an array with one for every number; None without it."""
    if npz is None or name not in npz:
        return None
    member = npz.member(name)
    texts = list(npz.texts(name)) if member.info.file_size <= MOST else []
    if articles.max() >= len(texts):
        raise member.needs(f"at most {MOST:,} bytes of texts, one for each article number from 0 to {articles.max()}")
    return [" ".join(re.sub(r"[\x00-\x1f\x7f]", " ", texts[a]).split())[:500] for a in articles]


def _titles(npz: Npz | None, numbers: np.ndarray) -> list[str]:
    """A title for each article of `numbers` (A,), with its number where two are equal or there is none."""
    titles = _texts_of(npz, "article_titles", numbers) or [""] * len(numbers)
    titles = [title or f"article {number}" for title, number in zip(titles, numbers, strict=True)]
    twice = pd.Series(titles).duplicated(keep=False)
    return [f"{t} (article {a})" if again else t for t, a, again in zip(titles, numbers, twice, strict=True)]


def _list_unused(archives: dict[str, Npz], sheet: dict) -> None:
    """List the arrays that are not needed. Raise LVMError for an object array among them that asks to load something:
    it would run in another reader."""
    left_out = []
    for npz in dict.fromkeys(archives.values()):
        optional = OPTIONAL_ARRAYS if npz is archives.get("articles") else ()
        for name in sorted(npz.members.keys() - npz.used - set(optional)):
            left_out.append(f"{name} ({npz.path.name})")
            try:
                member = npz.member(name)
            except LVMError:
                continue  # what is not read may be anything
            if member.dtype.kind == "O" and member.info.file_size <= member.allowed:
                npz.objects(member)
    if left_out:
        sheet["left_out"] = sorted(left_out)


def summary(store: Store) -> str:
    """One line: what was read of the original's files, and what was dropped, sorted or assumed, with its count."""
    counts = store.datasheet["counts"]
    return f"{store.name}: " + "; ".join(
        f"{what}: {n:,}" if isinstance(n, int) else f"{what}: {n}" for what, n in counts.items()
    )


def opened(files: str | os.PathLike | Mapping | Files) -> Store:
    """The store of the original's files (as `convert` takes them), converted once into outputs/imported/.

    A file that has changed, by size or time, is converted again. Two processes may do it at once.
    """
    paths, state = _paths(files), [FORMAT]
    name = _default_name(paths)
    for key, path in paths.items():
        try:
            paths[key] = path.resolve()
            stat = paths[key].stat()
        except (OSError, RuntimeError, ValueError) as e:  # no file, a ring of links, no path at all
            raise LVMError(f"{str(path)!r}: cannot be opened ({e}); name an .npz file") from e
        state.append([key, str(paths[key]), stat.st_size, stat.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:12]
    folder = outputs() / "imported" / f"{name}-{digest}"
    if not folder.is_dir():
        try:
            store = convert(paths, folder)
            print(summary(store), flush=True)
            return store
        except LVMError:
            if not folder.is_dir():  # else another process was first, and its store is the same
                raise
    try:
        return store_format.open_store(folder)
    except LVMError as e:
        raise LVMError(f"{e}; it was converted from other files: delete {folder}, and they are converted again") from e


def export(data: Dataset, folder: str | os.PathLike) -> dict[str, Path]:
    """Write a dataset in the original's form into a new `folder`: articles.npz, train.npz, val.npz and ood.npz.

    articles.npz: vectors (M, D), article_indices, chunk_indices (M,), article_titles and, if there are any,
    article_sources (a text for every article number) and concept_texts (M,). The sequence files: context_sequences
    (N, T, D), target_vectors (N, D), article_ids, target_indices (N,), in the store's type. Nothing is pickled; memory
    holds the contexts of one split. Plain unicode gives every text the length of the longest: texts of more than 1 GiB
    are left out with a warning.

    Returns the paths by name. Raises LVMError if the folder exists, or if the windows are read backwards.
    """
    store, folder = data.store, Path(folder)
    table = store.articles.reindex(range(store.articles.index.max() + 1), fill_value="")
    listed = {f"article_{c}s": table[c].to_numpy(str) for c in ("title", "source") if c in table}
    if store.texts is not None and 4 * max(map(len, store.texts)) * len(store.texts) > MOST:
        warnings.warn(f"{store.name}: texts need more than {MOST:,} bytes and are left out", stacklevel=2)
    elif store.texts is not None:
        listed["concept_texts"] = np.array(list(store.texts))
    with store_format.writing(folder) as partial:
        articles = {"vectors": store.vectors, "article_indices": store.article, "chunk_indices": store.position}
        np.savez_compressed(partial / "articles.npz", **articles, **listed)
        for split in SPLITS:
            w = getattr(data, split)
            if w.step != 1:
                raise LVMError(f"{store.name}, split {split}: is read backwards; export the dataset read forwards")
            np.savez(
                partial / f"{split}.npz",
                context_sequences=store.vectors[w.context_rows(np.arange(len(w)))],
                target_vectors=store.vectors[w.target],
                article_ids=w.article,
                target_indices=store.position[w.target],
            )
    return {name: folder / f"{name}.npz" for name in ("articles", *SPLITS)}
