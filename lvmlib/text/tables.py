"""Ready vectors: tables with an embedding column, grouped by article and put in order, as a store has them.

    Parquet files, or a hub dataset (sources.py says how they are named), with columns for vector, article and position

Axes: n rows of a block, M rows in all, A articles, D vector dimension.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from ..data.checks import NORM_TOLERANCE
from ..errors import LVMError, extra
from . import sources

# Columns of ready vectors by the names that datasets give them, the likeliest first.
VECTOR_NAMES = ("emb", "embedding", "embeddings", "vector", "vectors")
ARTICLE_NAMES = ("wiki_id", "article", "article_id", "doc_id", "page_id", "document_id", "title")
POSITION_NAMES = ("paragraph_id", "position", "chunk_id", "chunk_index", "paragraph", "index")
TEXT_NAMES = ("text", "chunk", "content", "passage", "paragraph", "sentence")
TITLE_NAMES = ("title",)
IN_PIECES = "articles whose rows do not stand together"  # counted where there is no column of positions


@dataclass(frozen=True, eq=False)
class VectorRows:
    """A block of n rows of ready vectors, as they stand in the source.

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
    vectors: str = "emb",
    article: str | None = None,
    position: str | None = None,
    text: str | None = None,
    title: str | None = None,
    config: str | None = None,
    subset: str = "train",
    limit: int | None = None,
    counts: MutableMapping | None = None,
) -> Iterator[VectorRows]:
    """The rows of a source of ready vectors (Parquet or hub), in blocks of at most 2,048.

    A column that is not named is looked for under the names that datasets use, if it holds what it should: the
    vectors under emb, embedding, …, the article under wiki_id, article_id, …, title, the place in it under
    paragraph_id, position, …; `counts["columns"]` says which was taken. Without a column of places the order of the
    rows is taken, and said so. `limit`: the first so many articles: reading ends where one more begins, so rows of
    those that stand later are not seen. Raises LVMError, naming file and row (counted from 1), on a missing column,
    one of another type, a vector that is null, of another length, or not finite, and an article or place that is null.
    """
    counts = {} if counts is None else counts
    sources.check_limit(limit)
    kind, where = sources.locate(source)
    asked = {"vectors": vectors, "article": article, "position": position, "text": text, "title": title}
    if kind == "hub":
        batches = _hub_batches(where, config, subset)
    elif kind == "parquet":
        batches = _parquet_batches(where, asked)
    else:
        raise LVMError(f"{source}: ready vectors come from .parquet files, or from hub:OWNER/NAME; name one of them")
    return _vector_rows(batches, source, asked, limit, counts)


def _parquet_batches(paths: list[Path], asked: dict) -> Iterator[tuple]:
    columns: dict[str, str | None] = {}
    for path in paths:
        with sources.open_parquet(path) as file:
            found = _columns(file.schema_arrow, {**asked, **columns}, str(path), {})
            columns = columns or found  # those of the first file hold for all
            needed = [column for column in columns.values() if column]
            for column in needed:
                if column not in file.schema_arrow.names:
                    raise LVMError(sources.no_column(column, file.schema_arrow.names, str(path)))
            row = 0
            for batch in sources.record_batches(file, list(dict.fromkeys(needed)), sources.ROWS, str(path)):
                yield batch, row, str(path), path.name
                row += len(batch)


def _hub_batches(name: str, config: str | None, subset: str) -> Iterator[tuple]:
    stream, source, row = sources.load_hub(name, config, subset), name.partition("@")[0], 0
    batches = _arrow(stream)
    while True:
        try:
            batch = next(batches, None)
        except Exception as e:
            raise LVMError(sources.hub_trouble(source, config, subset, e)) from e
        if batch is None:
            return
        yield batch, row, f"hub:{source}", source
        row += len(batch)


def _arrow(stream) -> Iterator:
    """Record batches of a dataset's stream, or of plain rows."""
    pyarrow = extra("pyarrow")
    if hasattr(stream, "with_format"):
        for table in stream.with_format("arrow").iter(batch_size=sources.ROWS):
            yield from table.combine_chunks().to_batches()
        return
    rows = iter(stream)
    while block := list(islice(rows, sources.ROWS)):
        yield pyarrow.RecordBatch.from_pylist(block)


def _vector_rows(batches, source: str, asked: dict, limit: int | None, counts: MutableMapping) -> Iterator[VectorRows]:
    dimension, seen, columns = None, set(), None
    for batch, first, where, name in batches:
        if columns is None:
            columns = _columns(batch.schema, asked, where, counts)
        chosen = {role: batch.column(column) for role, column in columns.items() if column}
        matrix = sources.guarded(lambda chosen=chosen: _matrix(chosen["vectors"]), where)
        bad = _bad_vector(matrix, chosen["vectors"], dimension)
        if bad:
            raise LVMError(f"{where}: row {first + bad[0] + 1}: the vector {bad[1]}; mend the file, or leave it out")
        dimension = matrix.shape[1] if len(matrix) else dimension
        keys = _keys(chosen["article"], first, where)
        end = len(keys)
        for row, key in enumerate(keys):
            if key not in seen:
                if limit is not None and len(seen) == limit:
                    end = row
                    break
                seen.add(key)
        sources.count(counts, "rows read", end)
        if end:
            places = chosen.get("position")
            strings = {
                role: [s if s is not None else "" for s in sources.guarded(chosen[role].to_pylist, where)][:end]
                for role in ("text", "title")
                if role in chosen
            }
            yield VectorRows(
                keys[:end],
                None if places is None else _places(places, first, where)[:end],
                matrix[:end],
                strings.get("text"),
                strings.get("title"),
                name,
            )
        if end < len(keys):
            break
    counts["articles read"] = len(seen)
    if not seen:
        raise LVMError(f"{source}: holds no row; name another source")


def _columns(schema, asked: dict, where: str, counts: MutableMapping) -> dict[str, str | None]:
    """The column of each role, named or guessed; `counts["columns"]` tells which."""
    types = extra("pyarrow").types

    def plain(kind):
        return kind.value_type if types.is_dictionary(kind) else kind

    def is_vectors(kind) -> bool:
        lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        return lists and types.is_floating(kind.value_type)

    def is_key(kind) -> bool:
        return types.is_integer(plain(kind)) or types.is_floating(plain(kind)) or sources.is_text(kind)

    roles: dict[str, tuple] = {
        "vectors": (VECTOR_NAMES, is_vectors, "lists of floating-point numbers"),
        "article": (ARTICLE_NAMES, is_key, "whole numbers or strings"),
        "position": (POSITION_NAMES, lambda k: types.is_integer(k) or types.is_floating(k), "whole numbers"),
        "text": (TEXT_NAMES, sources.is_text, "text"),
        "title": (TITLE_NAMES, sources.is_text, "text"),
    }
    found: dict[str, str | None] = {}
    said = []
    for role, (names, fits, what) in roles.items():
        name = asked[role]
        if name in schema.names:
            if not fits(schema.field(name).type):
                raise LVMError(f"{where}: column {name!r} holds {schema.field(name).type}, not {what}; name another")
        elif name is not None and not (role == "vectors" and name == VECTOR_NAMES[0]):
            raise LVMError(sources.no_column(name, schema.names, where))
        else:
            name = next((n for n in names if n in schema.names and fits(schema.field(n).type)), None)
        found[role] = name
        said.append(f"{role}: {name}" if name or role != "position" else "position: the order of the rows")
    for role in ("vectors", "article"):
        if found[role] is None:
            kinds = ", ".join(f"{field.name} ({field.type})" for field in list(schema)[:30])
            advice = f"name the column of the {role}" if role == "article" else "name the column of the vectors"
            if "wiki_mpnet_embeddings" in where:
                advice = "as its card says, its vectors lie in .npy files with a file of paragraph ids each: make a "
                advice += "Parquet file of them, with columns article, position and emb"
            raise LVMError(f"{where}: no column of {role} found; {advice}; columns are: {kinds or 'none'}")
    counts["columns"] = ", ".join(said)
    return found


def _matrix(column) -> np.ndarray:
    """(n, D) float32 of a column of lists; (n, 0) where they are not all of one length, or one is null."""
    flat = column.flatten()
    lengths = _lengths(column)
    if column.null_count or flat.null_count or len(np.unique(lengths)) > 1:
        return np.zeros((len(column), 0), np.float32)
    with np.errstate(over="ignore"):
        values = flat.to_numpy(zero_copy_only=False).astype(np.float32)
    return values.reshape(len(column), -1) if len(column) else np.zeros((0, 0), np.float32)


def _lengths(column) -> np.ndarray:
    if hasattr(column.type, "list_size"):
        return np.full(len(column), column.type.list_size)
    return column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)


def _bad_vector(matrix: np.ndarray, column, dimension: int | None) -> tuple[int, str] | None:
    """(row in the block, what is wrong) of the first vector that cannot be used, or None."""
    if not len(column):
        return None
    null = column.is_null().to_numpy(zero_copy_only=False)
    lengths = _lengths(column)
    dimension = dimension or int(lengths[~null][0] if not null.all() else 0)
    wrong = null | (lengths != dimension) | (lengths == 0)
    if wrong.any():
        row = int(wrong.argmax())
        if null[row]:
            return row, "is null"
        return row, f"has {lengths[row]} numbers, those before it {dimension}" if lengths[row] else "is empty"
    if not matrix.shape[1]:  # the lengths agree, so a number is null
        return int(column.flatten().is_null().to_numpy(zero_copy_only=False).argmax()) // dimension, "has a null in it"
    wrong = ~np.isfinite(matrix).all(1)
    return (int(wrong.argmax()), "has NaN or infinite values") if wrong.any() else None


def _keys(column, first: int, where: str) -> list[int | str]:
    keys = sources.guarded(column.to_pylist, where)
    for row, key in enumerate(keys):
        if isinstance(key, float) and key.is_integer():  # what a table with a gap makes of whole numbers
            keys[row] = int(key)
        elif not isinstance(key, (int, str)):
            raise LVMError(
                f"{where}: row {first + row + 1}: its article is {key}; name another column, or mend the row"
            )
    return keys


def _places(column, first: int, where: str) -> np.ndarray:
    places = column.to_numpy(zero_copy_only=False).astype(np.float64)  # exact up to 2^53
    wrong = ~((places >= 0) & (places < 2**31) & (places == np.floor(places)))  # negated, so that NaN counts
    if wrong.any():
        row = int(wrong.argmax())
        raise LVMError(
            f"{where}: row {first + row + 1}: its place in the article is {column[row].as_py()}, not a whole number "
            "from 0 to 2,147,483,647; name another column, or mend the row"
        )
    return places.astype(np.int64)


def group_rows(
    rows: Iterable[VectorRows], folder: str | os.PathLike, counts: MutableMapping | None = None, half: bool = True
) -> tuple[list[str], list[str]]:
    """Ready vectors into `folder`, article by article: vectors.npy (M, D), chunks.npy (M, 2) int32 and, where there is
    text, texts.jsonl, as a store has them. Gives the articles' titles and sources (A), in the order of their numbers.

    Articles are numbered as they first appear, their rows ordered by position (without one: numbered as they come).
    Vectors are made unit, stored as float16 (`half`) or float32; `counts` tells how many were not, and the gaps in
    positions. An article without a title is called after its key. The vectors pass through a file beside the others,
    never all through memory. Raises LVMError, naming article and position, on a zero vector, one that is not finite,
    or a position that is there twice, and on blocks that do not agree.
    """
    folder, counts = Path(folder), {} if counts is None else counts
    parts = [folder / name for name in ("vectors.part", "texts.part")]
    try:
        with ExitStack() as stack:
            raw, texts = (stack.enter_context(open(path, "wb")) for path in parts)
            gathered = _gather(rows, raw, texts, counts, np.float16 if half else np.float32)
        return _grouped(folder, *parts, *gathered, counts)
    except OSError as e:
        raise LVMError(
            f"{folder}: cannot be written ({e.strerror or e}); free some room, or name another folder"
        ) from e
    finally:
        for path in parts:
            path.unlink(missing_ok=True)


def _gather(rows: Iterable[VectorRows], raw, texts, counts: MutableMapping, dtype) -> tuple:
    """Pass one: unit vectors and texts into files as they come, and all that `_grouped` needs of them."""
    numbers: dict[int | str, int] = {}
    titles, origins, articles, places, ends = [], [], [], [], array("q")
    dimension, placed, worded, at, done = None, None, None, 0, 0
    for name in ("vectors that were not unit", "chunks without text"):
        counts.setdefault(name, 0)
    for block in rows:
        vectors = np.asarray(block.vectors)
        agreed = (vectors.shape[1], block.position is not None, block.texts is not None)
        if dimension is None:
            dimension, placed, worded = agreed
        elif agreed != (dimension, placed, worded):
            raise LVMError(
                f"{block.source}: has (dimension, positions, texts) {agreed}, the rows before it "
                f"{(dimension, placed, worded)}; build them apart"
            )
        names = block.titles or [""] * len(block.article)
        for key, title in zip(block.article, names, strict=True):
            number = numbers.setdefault(key, len(titles))
            if number == len(titles):
                titles.append(title)
                origins.append(block.source)
            elif title and not titles[number]:
                titles[number] = title
        articles.append(np.array([numbers[key] for key in block.article], np.int32))
        if placed:
            places.append(np.asarray(block.position, np.int64))
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
        bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 1e-30)))
        if len(bad):
            row = int(bad[0])
            name = _called(titles[numbers[block.article[row]]], block.article[row])
            place = f"position {int(block.position[row])}" if placed else f"row {done + row + 1} of all"
            what = "is zero" if norms[row] <= 1e-30 else "has NaN or infinite values"
            raise LVMError(
                f"{block.source}: article {name}, {place}: the vector {what}; leave it out, or encode the text anew"
            )
        counts["vectors that were not unit"] += int((np.abs(norms - 1) > NORM_TOLERANCE).sum())
        raw.write((vectors / norms[:, None]).astype(dtype).tobytes())
        if worded:
            for text in block.texts:
                counts["chunks without text"] += not text
                at += texts.write(json.dumps(text).encode() + b"\n")
                ends.append(at)
        done += len(vectors)
    if not titles:
        raise LVMError("there is no row of vectors; look at the source")
    if not worded:
        del counts["chunks without text"]
    used: dict[str, int] = {}
    titles = [sources.unique(_called(title, key), used, counts) for title, key in zip(titles, numbers, strict=True)]
    place = np.concatenate(places) if placed else None
    return dtype, dimension, np.concatenate(articles), place, np.array(ends) if worded else None, titles, origins


def _called(title: str, key: int | str) -> str:
    return sources.title_line(title) or sources.title_line(key) or "document"


def _grouped(folder, raw, texts, dtype, dimension, article, position, ends, titles, origins, counts) -> tuple:
    """Pass two: the files in the order of articles and positions."""
    if position is None:
        order = np.argsort(article, kind="stable")
        place = np.arange(len(order)) - np.searchsorted(article[order], article[order])
        begins = article[np.append(True, np.diff(article) != 0)]  # of each run of rows, its article
        counts[IN_PIECES] = int((np.bincount(begins) > 1).sum())
    else:
        order = np.lexsort((position, article))
        place = position[order]
    number = article[order]
    inside, step = np.diff(number) == 0, np.diff(place)
    if (inside & (step == 0)).any():
        row = int((inside & (step == 0)).argmax())
        raise LVMError(
            f"article {titles[number[row]]}: position {place[row]} is there twice ({int((inside & (step == 0)).sum())} "
            "such rows); drop one of each, or name another column of positions"
        )
    counts["gaps in positions"] = int((inside & (step > 1)).sum())
    counts["articles"], counts["chunks"] = len(titles), len(order)
    np.save(folder / "chunks.npy", np.stack([number, place], 1).astype(np.int32))
    given = np.memmap(raw, dtype, "r", shape=(len(order), dimension))
    made = np.lib.format.open_memmap(folder / "vectors.npy", "w+", dtype, given.shape)
    for first in range(0, len(order), sources.ROWS):
        made[first : first + sources.ROWS] = given[order[first : first + sources.ROWS]]
    made.flush()
    if ends is not None:
        begins = np.append(0, ends[:-1])
        with open(texts, "rb") as source, open(folder / "texts.jsonl", "wb") as file:
            for row in order:
                source.seek(begins[row])
                file.write(source.read(ends[row] - begins[row]))
    return titles, origins


def warn_of_order(counts: MutableMapping) -> str | None:
    """A sentence of warning if the positions in the articles were not given but taken from the order of the rows."""
    if IN_PIECES not in counts:
        return None
    what = "no column of positions: the order of the rows is taken for the order in the article"
    if not counts[IN_PIECES]:
        return f"{what}; if the rows were ever shuffled, every result is meaningless: name the column of positions"
    return (
        f"THE ORDER IS PROBABLY LOST: {what}, but the rows of {counts[IN_PIECES]:,} of {counts['articles']:,} articles "
        "do not even stand together; every result would be meaningless: name the column of positions, or sort the table"
    )


# -------------------------------------------------------------------------------------------- titles in embedded text

# Datasets whose vectors were made of title and text together, and where that is said.
TITLED = (
    (
        re.compile(r"(cohere/|^(?!hub:).*)wikipedia-22-12-\w+-embeddings", re.IGNORECASE),
        'the card of Cohere/wikipedia-22-12-en-embeddings: computed for title+" "+text',
    ),
    (
        re.compile(r"wiki_mpnet_embeddings", re.IGNORECASE),
        "the card of olmer/wiki_paragraphs, which it embeds: the title is prepended to each paragraph",
    ),
)


def title_in_text(titles: Iterable[str], texts: Iterable[str]) -> float:
    """The share of chunks whose first line holds the title of their article; `titles`, `texts`: one a chunk."""
    total = held = 0
    for title, text in zip(titles, texts, strict=True):
        total += 1
        title, line = title.strip().casefold(), text.lstrip().partition("\n")[0].casefold()
        held += bool(title) and re.search(rf"(?<!\w){re.escape(title)}(?!\w)", line) is not None
    return held / total if total else 0.0


def warn_of_titles(source: str, titles: Iterable[str] = (), texts: Iterable[str] = ()) -> str | None:
    """A sentence of warning if the vectors of `source` were made of title and text together, or None.

    Known datasets are known by name; of others, `titles` and `texts` (one a chunk) tell, where they are given: at
    least half of the chunks would hold their article's title in the first line.
    """
    what = (
        "what all chunks of an article share makes them alike, so that similarity within an article is too high and "
        "copying looks better than it is; compare datasets with care, or encode the text anew without titles"
    )
    for pattern, reason in TITLED:
        if pattern.search(source):
            return f"{source}: these vectors carry their article's title ({reason}); {what}."
    share = title_in_text(titles, texts)
    if share < 0.5:
        return None
    return f"{source}: {share:.0%} of the chunks hold their article's title in the first line; {what}."
