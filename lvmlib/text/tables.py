"""Read ready vectors from Parquet files or a hub dataset, and order them by article and position, as a store does.

Axes: n rows of a block, M rows in all, A articles, D vector dimension.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..data.checks import NORM_TOLERANCE
from ..data.store import Texts
from ..errors import LVMError, require
from .readers import DAMAGED, Files, hub_stream, is_text, no_column, parquet_batches, wrap_errors
from .sources import check_limit, locate, title_line, unique
from .stage import write_tables

ROWS = 2048  # of a block
# The names that datasets give to a column, the likeliest first.
NAMES = {
    "vectors": ("emb", "embedding", "embeddings", "vector", "vectors"),
    "article": ("wiki_id", "article", "article_id", "doc_id", "page_id", "document_id", "title"),
    "position": ("paragraph_id", "position", "chunk_id", "chunk_index", "paragraph", "index"),
    "text": ("text", "chunk", "content", "passage", "paragraph", "sentence"),
    "title": ("title",),
}
NEEDED = {"vectors": "lists of floating-point numbers", "article": "whole numbers or text", "position": "whole numbers"}
IN_PIECES = "articles whose rows are not together"  # counted where there is no column of positions


@dataclass(frozen=True, eq=False)
class VectorRows:
    """A block of n rows of ready vectors, in the order of the source."""

    article: Sequence[int | str]  # (n,) keys
    position: np.ndarray | None  # (n,) int64; None: the order of the rows is the order in the article
    vectors: np.ndarray  # (n, D) float32, finite
    texts: Sequence[str] | None  # (n,)
    titles: Sequence[str] | None  # (n,)
    source: str = ""  # the file or dataset


def vector_rows(
    source: str,
    *,
    config: str | None = None,
    subset: str = "train",
    limit: int | None = None,
    counts: Counter | None = None,
    **columns: str | None,
) -> Iterator[VectorRows]:
    """Yield the rows of a source of ready vectors (Parquet or hub), in blocks of at most 2,048.

    `columns`: the names of the columns vectors, article, position, text and title. One without a name is looked for
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
    counts = Counter() if counts is None else counts
    dimension, seen, rows = None, set(), Counter()
    for batch, where, name in batches:
        with wrap_errors(where, DAMAGED):
            chosen = _columns(batch.schema, columns, where, counts)
            keys = _keys(batch.column(chosen["article"]).to_pylist(), rows[where], where)
            new = [key for key in dict.fromkeys(keys) if key not in seen]
            room = len(new) if limit is None else limit - len(seen)
            end = keys.index(new[room]) if room < len(new) else len(keys)
            seen.update(new[:room])
            block = {role: batch.column(column)[:end] for role, column in chosen.items()}
            vectors = _vectors(block["vectors"], dimension, rows[where], where)
            position = _positions(block["position"], rows[where], where) if "position" in block else None
            strings = {role: [s or "" for s in block[role].to_pylist()] for role in ("text", "title") if role in block}
        rows[where] += end
        counts["rows read"] += end
        if end:
            dimension = vectors.shape[1]
            yield VectorRows(keys[:end], position, vectors, strings.get("text"), strings.get("title"), name)
        if end < len(keys):
            break
    counts["articles read"] = len(seen)
    if not seen:
        raise LVMError(f"{source}: holds no row; name another source")


def _parquet_batches(files: Files, columns: dict) -> Iterator[tuple]:
    """Yield (record batch, file's path, source); the first file's columns are those of all."""
    chosen: dict[str, str] = {}

    def needed(schema) -> list[str]:
        found = _columns(schema, columns | chosen, str(path), Counter())
        chosen.update({} if chosen else found)
        return list(dict.fromkeys(chosen.values()))

    for path in files.paths:
        for batch in parquet_batches(path, needed, ROWS):
            yield batch, str(path), path.name


def _hub_batches(name: str, config: str | None, subset: str) -> Iterator[tuple]:
    source = name.partition("@")[0]
    with hub_stream(name, config, subset) as stream:
        for table in stream.with_format("arrow").iter(batch_size=ROWS):
            for batch in table.combine_chunks().to_batches():
                yield batch, f"hub:{source}", source


def _columns(schema, named: dict, where: str, counts: Counter) -> dict[str, str]:
    """Return the column of each role, named or guessed; put them in words into `counts["columns"]`."""
    chosen: dict[str, str] = {}
    for role, names in NAMES.items():
        name = named.get(role)
        if name is not None and name not in schema.names and (role, name) != ("vectors", "emb"):
            raise no_column(name, schema.names, where)
        if name in schema.names and not _fits(role, kind := schema.field(name).type):
            raise LVMError(f"{where}: column {name!r} holds {kind}, not {NEEDED.get(role, 'text')}; name another")
        guesses = [n for n in names if n in schema.names and _fits(role, schema.field(n).type)]
        if name in schema.names or guesses:
            chosen[role] = name if name in schema.names else guesses[0]
        elif role in ("vectors", "article"):
            kinds = ", ".join(f"{field.name} ({field.type})" for field in list(schema)[:30]) or "none"
            raise LVMError(f"{where}: no column of {role} found; name it; columns are: {kinds}")
    words = {role: None for role in NAMES} | {"position": "the order of the rows"} | chosen
    counts["columns"] = ", ".join(f"{role}: {name}" for role, name in words.items())
    return chosen


def _fits(role: str, kind) -> bool:
    """Return whether a column of this Arrow type can have the role."""
    types = require("pyarrow").types
    if role == "vectors":
        lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        return lists and types.is_floating(kind.value_type)
    inner = kind.value_type if types.is_dictionary(kind) else kind
    number = types.is_integer(inner) or types.is_floating(inner)
    return {"article": number or is_text(kind), "position": number}.get(role, is_text(kind))


def _bad_row(where: str, row: int, what: str) -> LVMError:
    return LVMError(f"{where}: row {row + 1}: {what}; correct the row, leave it out, or name another column")


def _vectors(column, dimension: int | None, first: int, where: str) -> np.ndarray:
    """Return (n, D) float32 of a column of lists. Raises LVMError, naming the row, for one that cannot be used."""
    if not len(column):
        return np.zeros((0, 0), np.float32)
    compute = require("pyarrow.compute")
    lengths = compute.fill_null(compute.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    dimension = dimension or int(lengths[0])
    wrong = (lengths != dimension) | (lengths == 0)
    if wrong.any():
        row = int(wrong.argmax())
        raise _bad_row(where, first + row, f"the vector has {lengths[row]} numbers, not {dimension or 'one or more'}")
    with np.errstate(over="ignore"):  # a null in it becomes NaN
        matrix = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), -1)
    finite = np.isfinite(matrix).all(1)
    if not finite.all():
        raise _bad_row(where, first + int(finite.argmin()), "the vector has a null, NaN or infinite value")
    return matrix


def _keys(keys: list, first: int, where: str) -> list[int | str]:
    for row, key in enumerate(keys):
        if isinstance(key, float) and key.is_integer():  # what a table with a gap makes of whole numbers
            keys[row] = int(key)
        elif not isinstance(key, (int, str)):
            raise _bad_row(where, first + row, f"its article is {key}")
    return keys


def _positions(column, first: int, where: str) -> np.ndarray:
    positions = column.to_numpy(zero_copy_only=False).astype(np.float64)  # exact up to 2^53
    valid = (positions >= 0) & (positions < 2**31) & (positions == np.floor(positions))  # False for NaN
    if not valid.all():
        row = int(valid.argmin())
        what = f"its position is {column[row].as_py()}, not a whole number from 0 to 2,147,483,647"
        raise _bad_row(where, first + row, what)
    return positions.astype(np.int64)


# ------------------------------------------------------------------------------------- ordered by article and position


@dataclass(eq=False)
class _Articles:
    """The articles of the blocks read so far, numbered as they first appear."""

    numbers: dict[int | str, int] = field(default_factory=dict)  # key → number
    titles: list[str] = field(default_factory=list)  # (A)
    sources: list[str] = field(default_factory=list)  # (A) where each begins

    def add(self, block: VectorRows) -> np.ndarray:
        """Return the number of each row's article (n,) int32."""
        for key, title in zip(block.article, block.titles or [""] * len(block.article), strict=True):
            number = self.numbers.setdefault(key, len(self.titles))
            if number == len(self.titles):
                self.titles.append(title)
                self.sources.append(block.source)
            self.titles[number] = self.titles[number] or title
        return np.array([self.numbers[key] for key in block.article], np.int32)


def group_rows(
    rows: Iterable[VectorRows],
    folder: Path,
    counts: Counter,
    progress: Callable[[int, str], None] = lambda done, what: None,
) -> None:
    """Write ready vectors into a new `folder`, article by article, as stage.py describes.

    Articles are numbered as they first appear, their rows ordered by position (without one: as they come). Vectors are
    made unit; `counts` counts those that were not, and the gaps in positions. An article without a title is called
    after its key. The vectors pass through a file, not through memory. Raises LVMError, naming article and position,
    on a zero vector and on a position that repeats.
    """
    vectors_part, texts_part = folder / "vectors.part", folder / "texts.part"
    articles, numbers, positions = _Articles(), [], []
    with open(vectors_part, "wb") as vectors, open(texts_part, "w", encoding="utf-8", newline="\n") as texts:
        for block in rows:
            numbers.append(articles.add(block))
            positions.append(block.position)
            vectors.write(_unit(block, counts).tobytes())
            if block.texts is not None:
                texts.writelines(json.dumps(text) + "\n" for text in block.texts)
                counts["chunks without text"] += sum(not text for text in block.texts)
            progress(counts["rows read"], "vectors read")
    used: dict[str, int] = {}
    named = zip(articles.titles, articles.numbers, strict=True)
    titles = [unique(title_line(title) or title_line(key) or "document", used, counts) for title, key in named]
    position = None if block.position is None else np.concatenate(positions)
    order, chunks = _order(np.concatenate(numbers), position, titles, counts)
    given = np.memmap(vectors_part, np.float16, "r", shape=(len(order), block.vectors.shape[1]))
    ordered = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float16, given.shape)
    for first in range(0, len(order), ROWS):
        ordered[first : first + ROWS] = given[order[first : first + ROWS]]
    ordered.flush()
    if block.texts is not None:
        begins = Texts(texts_part, len(order)).begins
        with open(texts_part, "rb") as source, open(folder / "texts.jsonl", "wb") as file:
            for row in order:
                source.seek(begins[row])
                file.write(source.readline())
    vectors_part.unlink()
    texts_part.unlink()
    write_tables(folder, chunks, titles, articles.sources, counts)


def _unit(block: VectorRows, counts: Counter) -> np.ndarray:
    """Return the vectors of a block at length 1, (n, D) float16."""
    norms = np.linalg.norm(block.vectors.astype(np.float64), axis=1)
    if norms.min() <= 1e-30:
        row = int(norms.argmin())
        place = "" if block.position is None else f", position {block.position[row]}"
        raise LVMError(
            f"{block.source}: article {block.article[row]}{place}: the vector is zero; leave it out, or encode it again"
        )
    counts["vectors that were not unit"] += int((np.abs(norms - 1) > NORM_TOLERANCE).sum())
    return (block.vectors / norms[:, None]).astype(np.float16)


def _order(article: np.ndarray, position: np.ndarray | None, titles, counts: Counter) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows in the order of articles and positions (M,), and the store's table of chunks (M, 2)."""
    if position is not None:
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
    return order, np.stack([number, position], 1).astype(np.int32)


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


def warn_of_titles(source: str, titles: Sequence[str] = (), texts: Sequence[str] = ()) -> str | None:
    """Return a warning if the vectors of `source` were made of title and text together, or None.

    Known datasets are recognised by name, others by `titles` and `texts` (one a chunk): at least half of the chunks
    hold their article's title, as words, in the first line.
    """
    what = "titles make the chunks of an article alike, so copying looks better than it is; encode without titles"
    for pattern, card in TITLED.items():
        if re.search(pattern, source, re.IGNORECASE):
            return f"{source}: these vectors carry their article's title, says {card}; {what}"
    hits = 0
    for title, text in zip(titles, texts, strict=True):
        title, line = title.strip().casefold(), text.lstrip().partition("\n")[0].casefold()
        hits += bool(title) and re.search(rf"(?<!\w){re.escape(title)}(?!\w)", line) is not None
    share = hits / max(len(texts), 1)
    return f"{source}: {share:.0%} of the chunks begin with their article's title; {what}" if share >= 0.5 else None
