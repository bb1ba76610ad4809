"""Read ready vectors from Parquet files or a hub dataset, and order them by article and position, as a store does.

Axes: n rows of a block, M rows in all, A articles, D vector dimension.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..data.checks import NORM_TOLERANCE
from ..errors import LVMError, require
from .readers import DAMAGED, Files, hub_stream, is_text, no_column, parquet_batches, wrap_errors
from .sources import check_limit, locate, title_line, unique

ROWS = 2048  # of a block
# The names that datasets give to a column, the likeliest first.
NAMES = {
    "vectors": ("emb", "embedding", "embeddings", "vector", "vectors"),
    "article": ("wiki_id", "article", "article_id", "doc_id", "page_id", "document_id", "title"),
    "position": ("paragraph_id", "position", "chunk_id", "chunk_index", "paragraph", "index"),
    "text": ("text", "chunk", "content", "passage", "paragraph", "sentence"),
    "title": ("title",),
}
IN_PIECES = "articles whose rows are not together"  # counted where there is no column of positions


@dataclass(frozen=True, eq=False)
class VectorRows:
    """A block of n rows of ready vectors, in the order of the source.

    `article`: n keys, whole numbers or strings; `position` (n,) int64, or None where the order of the rows is the
    order in the article; `vectors` (n, D) float32, finite; `texts`, `titles`: n strings, or None; `source`: the file
    or dataset.
    """

    article: Sequence[int | str]
    position: np.ndarray | None
    vectors: np.ndarray
    texts: Sequence[str] | None
    titles: Sequence[str] | None
    source: str = ""


def vector_rows(
    source: str,
    *,
    config: str | None = None,
    subset: str = "train",
    limit: int | None = None,
    counts: Counter | None = None,
    **columns: str | None,
) -> Iterator[VectorRows]:
    """Return an iterator over the rows of a source of ready vectors (Parquet or hub), in blocks of at most 2,048.

    `columns`: the names of the columns vectors, article, position, text and title. One that is not named is looked for
    under NAMES, if its type fits; `counts["columns"]` tells which were taken. Without a column of positions the order
    of the rows is taken. `limit`: the first so many articles; reading ends where one more begins. Raises LVMError,
    naming file and row (from 1), on a missing column, one of another type, a vector that is null, of another length or
    not finite, and an article or position that is null.
    """
    if unknown := columns.keys() - NAMES.keys():
        raise TypeError(f"vector_rows has no column {sorted(unknown)}; known: {', '.join(NAMES)}")
    check_limit(limit)
    kind, place = locate(source)
    if kind == "hub":
        batches = _hub_batches(place, config, subset)
    elif kind == "parquet":
        batches = _parquet_batches(place, columns)
    else:
        raise LVMError(f"{source}: ready vectors come from .parquet files or from hub:OWNER/NAME; name one of them")
    return _vector_rows(batches, source, columns, limit, Counter() if counts is None else counts)


def _parquet_batches(files: Files, columns: dict) -> Iterator[tuple]:
    """Yield (record batch, rows before it, file's path, source); the first file's columns are those of all."""
    chosen: dict[str, str | None] = {}

    def needed(schema) -> list[str]:
        found = _columns(schema, columns | {role: name for role, name in chosen.items() if name}, str(path), Counter())
        chosen.update({} if chosen else found)
        names = dict.fromkeys(filter(None, chosen.values()))
        for name in names:
            if name not in schema.names:
                raise no_column(name, schema.names, str(path))
        return list(names)

    for path in files.paths:
        row = 0
        for batch in parquet_batches(path, needed, ROWS):
            yield batch, row, str(path), path.name
            row += len(batch)


def _hub_batches(name: str, config: str | None, subset: str) -> Iterator[tuple]:
    source, row = name.partition("@")[0], 0
    with hub_stream(name, config, subset) as stream:
        for table in stream.with_format("arrow").iter(batch_size=ROWS):
            for batch in table.combine_chunks().to_batches():
                yield batch, row, f"hub:{source}", source
                row += len(batch)


def _vector_rows(batches, source: str, names: dict, limit: int | None, counts: Counter) -> Iterator[VectorRows]:
    dimension, seen, columns = None, set(), None
    for batch, first, where, name in batches:
        columns = columns or _columns(batch.schema, names, where, counts)
        with wrap_errors(where, DAMAGED):
            block = {role: batch.column(column) for role, column in columns.items() if column}
            vectors = _vectors(block["vectors"], dimension, first, where)
            keys = _keys(block["article"].to_pylist(), first, where)
            position = _positions(block["position"], first, where) if "position" in block else None
            strings = {role: [s or "" for s in block[role].to_pylist()] for role in ("text", "title") if role in block}
        dimension = vectors.shape[1] if len(vectors) else dimension
        end = len(keys)
        for row, key in enumerate(keys):
            if key not in seen and limit is not None and len(seen) == limit:
                end = row
                break
            seen.add(key)
        counts["rows read"] += end
        if end:
            texts, titles = (strings[role][:end] if role in strings else None for role in ("text", "title"))
            position = None if position is None else position[:end]
            yield VectorRows(keys[:end], position, vectors[:end], texts, titles, name)
        if end < len(keys):
            break
    counts["articles read"] = len(seen)
    if not seen:
        raise LVMError(f"{source}: holds no row; name another source")


def _columns(schema, named: dict, where: str, counts: Counter) -> dict[str, str | None]:
    """Return the column of each role, named or guessed; put them in words into `counts["columns"]`."""
    types = require("pyarrow").types

    def is_number(kind) -> bool:
        return types.is_integer(kind) or types.is_floating(kind)

    def is_vector(kind) -> bool:
        lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        return lists and types.is_floating(kind.value_type)

    def is_key(kind) -> bool:
        return is_text(kind) or is_number(kind.value_type if types.is_dictionary(kind) else kind)

    fits = {"vectors": is_vector, "article": is_key, "position": is_number, "text": is_text, "title": is_text}
    needed = {"vectors": "lists of floating-point numbers", "article": "whole numbers or text"}
    needed |= {"position": "whole numbers", "text": "text", "title": "text"}
    chosen: dict[str, str | None] = {}
    for role, names in NAMES.items():
        name = named.get(role)
        if name is not None and name not in schema.names and (role, name) != ("vectors", "emb"):
            raise no_column(name, schema.names, where)
        if name in schema.names and not fits[role](schema.field(name).type):
            raise LVMError(
                f"{where}: column {name!r} holds {schema.field(name).type}, not {needed[role]}; name another"
            )
        guesses = (n for n in names if n in schema.names and fits[role](schema.field(n).type))
        chosen[role] = name if name in schema.names else next(guesses, None)
        if chosen[role] is None and role in ("vectors", "article"):
            kinds = ", ".join(f"{field.name} ({field.type})" for field in list(schema)[:30]) or "none"
            raise LVMError(f"{where}: no column of {role} found; name it; columns are: {kinds}")
    words = {role: name or ("the order of the rows" if role == "position" else None) for role, name in chosen.items()}
    counts["columns"] = ", ".join(f"{role}: {name}" for role, name in words.items())
    return chosen


def _vectors(column, dimension: int | None, first: int, where: str) -> np.ndarray:
    """Return (n, D) float32 of a column of lists. Raises LVMError, naming the row, for one that cannot be used."""
    if not len(column):
        return np.zeros((0, 0), np.float32)
    null = column.is_null().to_numpy(zero_copy_only=False)
    if hasattr(column.type, "list_size"):
        lengths = np.full(len(column), column.type.list_size)
    else:
        lengths = column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
    dimension = dimension or int(lengths[~null][0] if not null.all() else 0)
    wrong, matrix = null | (lengths != dimension) | (lengths == 0), None
    if not wrong.any():
        with np.errstate(over="ignore"):  # a null in it becomes NaN
            matrix = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), -1)
        wrong = ~np.isfinite(matrix).all(1)
    if wrong.any():
        row = int(wrong.argmax())
        what = "has a null, NaN or infinite value" if matrix is not None else "is null" if null[row] else (
            f"has {lengths[row]} numbers, not {dimension}" if lengths[row] else "is empty"
        )  # fmt: skip
        raise LVMError(f"{where}: row {first + row + 1}: the vector {what}; correct the row, or leave it out")
    return matrix


def _keys(keys: list, first: int, where: str) -> list[int | str]:
    for row, key in enumerate(keys):
        if isinstance(key, float) and key.is_integer():  # what a table with a gap makes of whole numbers
            keys[row] = int(key)
        elif not isinstance(key, (int, str)):
            raise LVMError(f"{where}: row {first + row + 1}: its article is {key}; name another column, or correct it")
    return keys


def _positions(column, first: int, where: str) -> np.ndarray:
    positions = column.to_numpy(zero_copy_only=False).astype(np.float64)  # exact up to 2^53
    right = (positions >= 0) & (positions < 2**31) & (positions == np.floor(positions))
    wrong = ~right  # of NaN, too
    if wrong.any():
        row = int(wrong.argmax())
        raise LVMError(
            f"{where}: row {first + row + 1}: its position is {column[row].as_py()}, not a whole number from 0 to "
            "2,147,483,647; name another column, or correct the row"
        )
    return positions.astype(np.int64)


# ----------------------------------------------------------------------------------------------------- in the order


@dataclass(eq=False)
class _Gathered:
    """What the first pass over the blocks keeps in memory."""

    numbers: dict[int | str, int] = field(default_factory=dict)  # an article's key → its number
    titles: list[str] = field(default_factory=list)  # (A)
    origins: list[str] = field(default_factory=list)  # (A) the source that each article begins in
    articles: list[np.ndarray] = field(default_factory=list)  # a block's numbers (n,) each
    positions: list[np.ndarray] = field(default_factory=list)
    ends: array = field(default_factory=lambda: array("q"))  # (M) the byte at which each text ends
    form: tuple | None = None  # dimension, whether there are positions, whether there are texts


def group_rows(
    rows: Iterable[VectorRows], folder: str | os.PathLike, counts: Counter | None = None
) -> tuple[list[str], list[str]]:
    """Write ready vectors into `folder`, article by article: vectors.npy (M, D), chunks.npy (M, 2) int32 and, where
    there is text, texts.jsonl, as in a store. Return the articles' titles and sources (A).

    Articles are numbered as they first appear, their rows ordered by position (without one: as they come). Vectors are
    made unit and stored as float16; `counts` counts those that were not unit, and the gaps in positions. An article
    without a title is called after its key. The vectors pass through a file, not through memory.
    Raises LVMError, naming article and position, on a zero vector, one that is not finite, or a position that repeats,
    and on blocks that differ in form.
    """
    folder, counts = Path(folder), Counter() if counts is None else counts
    parts = [folder / name for name in ("vectors.part", "texts.part")]
    try:
        gathered = _Gathered()
        with ExitStack() as stack:
            vectors, texts = (stack.enter_context(open(path, "wb")) for path in parts)
            for block in rows:
                _gather(block, gathered, vectors, texts, counts)
        if gathered.form is None:
            raise LVMError("there is no row of vectors; look at the source")
        used: dict[str, int] = {}
        titles = [unique(_title(t, k), used, counts) for t, k in zip(gathered.titles, gathered.numbers, strict=True)]
        _write_ordered(folder, *parts, gathered, titles, counts)
        return titles, gathered.origins
    except OSError as e:
        raise LVMError(f"{folder}: cannot be written ({e.strerror or e}); free some room, or name another") from e
    finally:
        for path in parts:
            path.unlink(missing_ok=True)


def _gather(block: VectorRows, gathered: _Gathered, vectors, texts, counts: Counter) -> None:
    """Append a block's unit vectors and texts to files, and the rest to `gathered`."""
    form = (block.vectors.shape[1], block.position is not None, block.texts is not None)
    gathered.form = gathered.form or form
    if form != gathered.form:
        raise LVMError(
            f"{block.source}: has (dimension, positions, texts) {form}, the rows before it {gathered.form}; build them "
            "apart"
        )
    for key, title in zip(block.article, block.titles or [""] * len(block.article), strict=True):
        number = gathered.numbers.setdefault(key, len(gathered.titles))
        if number == len(gathered.titles):
            gathered.titles.append(title)
            gathered.origins.append(block.source)
        elif title and not gathered.titles[number]:
            gathered.titles[number] = title
    gathered.articles.append(np.array([gathered.numbers[key] for key in block.article], np.int32))
    if block.position is not None:
        gathered.positions.append(np.asarray(block.position, np.int64))
    norms = np.linalg.norm(block.vectors.astype(np.float64), axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 1e-30)))
    if len(bad):
        row = int(bad[0])
        name = _title(gathered.titles[gathered.articles[-1][row]], block.article[row])
        place = f"row {row + 1} of its block" if block.position is None else f"position {int(block.position[row])}"
        what = "is zero" if norms[row] <= 1e-30 else "has NaN or infinite values"
        raise LVMError(f"{block.source}: article {name}, {place}: the vector {what}; leave it out, or encode it again")
    counts["vectors that were not unit"] += int((np.abs(norms - 1) > NORM_TOLERANCE).sum())
    vectors.write((block.vectors / norms[:, None]).astype(np.float16).tobytes())
    if block.texts is not None:
        counts["chunks without text"] += sum(not text for text in block.texts)
        for text in block.texts:
            written = texts.write(json.dumps(text).encode() + b"\n")
            gathered.ends.append(written + (gathered.ends[-1] if gathered.ends else 0))


def _title(title: str, key: int | str) -> str:
    return title_line(title) or title_line(key) or "document"


def _write_ordered(folder, vectors, texts, gathered: _Gathered, titles: list[str], counts: Counter) -> None:
    """Second pass: write the files in the order of articles and positions."""
    dimension, has_position, has_text = gathered.form
    article = np.concatenate(gathered.articles)
    gathered.articles.clear()  # M numbers are in memory once
    if has_position:
        position = np.concatenate(gathered.positions)
        gathered.positions.clear()
        order = np.lexsort((position, article))
        position = position[order]
    else:
        order = np.argsort(article, kind="stable")
        position = np.arange(len(order)) - np.searchsorted(article[order], article[order])
        begins = article[np.append(True, np.diff(article) != 0)]  # the article of each run of rows
        counts[IN_PIECES] = int((np.bincount(begins) > 1).sum())
    number = article[order]
    inside, step = np.diff(number) == 0, np.diff(position)
    repeats = inside & (step == 0)
    if repeats.any():
        row = int(repeats.argmax())
        raise LVMError(
            f"article {titles[number[row]]}: position {position[row]} is there twice ({int(repeats.sum())} such rows); "
            "drop one of each, or name another column of positions"
        )
    counts["gaps in positions"] = int((inside & (step > 1)).sum())
    counts["articles"], counts["chunks"] = len(titles), len(order)
    np.save(folder / "chunks.npy", np.stack([number, position], 1).astype(np.int32))
    given = np.memmap(vectors, np.float16, "r", shape=(len(order), dimension))
    ordered = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float16, given.shape)
    for first in range(0, len(order), ROWS):
        ordered[first : first + ROWS] = given[order[first : first + ROWS]]
    ordered.flush()
    if has_text:
        ends = np.array(gathered.ends)
        begins = np.append(0, ends[:-1])
        with open(texts, "rb") as source, open(folder / "texts.jsonl", "wb") as file:
            for row in order:
                source.seek(begins[row])
                file.write(source.read(ends[row] - begins[row]))


# ---------------------------------------------------------------------------------------------------------- warnings


def warn_of_order(counts: Counter) -> str | None:
    """Return a warning if the positions were taken from the order of the rows, or None."""
    if IN_PIECES not in counts:
        return None
    if not counts[IN_PIECES]:
        return "no column of positions: the order of the rows is taken; if they were shuffled, results are meaningless"
    return (
        f"the order is probably lost: there is no column of positions, and the rows of {counts[IN_PIECES]:,} of "
        f"{counts['articles']:,} articles are not together; name the column of positions, or sort the table"
    )


# Datasets whose vectors were made of title and text together, and where that is said.
TITLED = {
    r"(cohere/|^(?!hub:).*)wikipedia-22-12-\w+-embeddings": "the card of Cohere/wikipedia-22-12-en-embeddings",
    r"wiki_mpnet_embeddings": "the card of olmer/wiki_paragraphs",
}


def title_in_text(titles: Iterable[str], texts: Iterable[str]) -> float:
    """Return the share of chunks whose first line holds the title of their article; `titles`, `texts`: one a chunk."""
    total = hits = 0
    for title, text in zip(titles, texts, strict=True):
        total += 1
        title, line = title.strip().casefold(), text.lstrip().partition("\n")[0].casefold()
        hits += bool(title) and re.search(rf"(?<!\w){re.escape(title)}(?!\w)", line) is not None
    return hits / total if total else 0.0


def warn_of_titles(source: str, titles: Iterable[str] = (), texts: Iterable[str] = ()) -> str | None:
    """Return a warning if the vectors of `source` were made of title and text together, or None.

    Known datasets are recognised by name, others by `titles` and `texts` (one a chunk): at least half of the chunks
    hold their article's title in the first line.
    """
    what = "titles make the chunks of an article alike, so copying looks better than it is; encode without titles"
    for pattern, card in TITLED.items():
        if re.search(pattern, source, re.IGNORECASE):
            return f"{source}: these vectors carry their article's title, says {card}; {what}"
    share = title_in_text(titles, texts)
    return f"{source}: {share:.0%} of the chunks begin with their article's title; {what}" if share >= 0.5 else None
