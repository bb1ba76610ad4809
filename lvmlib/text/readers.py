"""Read the articles of text files, JSON Lines, Parquet and hub datasets, as (title or None, text, source)."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import LVMError, require
from ..io.inherit import nearest
from .markdown import prose

HUB_NAME = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?"  # OWNER/NAME@REVISION
LARGEST = 1 << 28  # bytes of one article, which is held in memory


@dataclass(frozen=True)
class Query:
    """The columns to read, and a hub dataset's config and subset."""

    text: str = "text"
    title: str | None = "title"
    config: str | None = None
    subset: str = "train"


@dataclass(frozen=True)
class Files:
    """The files of a source, sorted; `base`: the file or folder named; `others`: files of other kinds there."""

    base: Path
    paths: list[Path]
    others: int = 0


@contextlib.contextmanager
def wrap_errors(where: str, advice: str) -> Iterator[None]:
    """Raise any exception of the block as LVMError: libraries have many for a damaged file or a dead network."""
    try:
        yield
    except LVMError:
        raise
    except Exception as e:
        reason = (str(e).strip().splitlines() or [""])[0][:300]
        raise LVMError(f"{where}: cannot be read ({type(e).__name__}: {reason}); {advice}") from e


DAMAGED = "the file is damaged: fetch it again"


def read_files(files: Files, query: Query, counts: Counter) -> Iterator[tuple]:
    """Title: the path below the base, without suffix. Source: the folder in the base that the file is in, or the base.

    After the first file that cannot be read, the others are only checked, and one error names all that cannot.
    """
    if files.others:
        counts["files of other kinds, passed over"] += files.others
    bad: dict[str, LVMError] = {}
    for path in files.paths:
        inside = path.relative_to(files.base)
        try:
            text = _file_text(path)
        except LVMError as e:
            bad[inside.as_posix()] = e
        if bad:
            continue
        if not text or text.isspace():
            counts["empty files"] += 1
            continue
        text = prose(text) if path.suffix.lower() == ".md" else text
        yield inside.with_suffix("").as_posix(), text, inside.parts[0] if len(inside.parts) > 1 else files.base.name
    if bad:
        names = ", ".join([*bad][:10]) + (f" and {len(bad) - 10:,} more" if len(bad) > 10 else "")
        raise LVMError(
            f"{files.base}: {len(bad):,} of {len(files.paths):,} files cannot be read: {names}. First: "
            f"{next(iter(bad.values()))}"
        )


def _file_text(path: Path) -> str:
    with wrap_errors(str(path), "make it readable, or take it away"):
        size = path.stat().st_size
        if size > LARGEST:
            raise LVMError(f"{path}: {size:,} bytes are too many for an article (at most {LARGEST:,}); split it")
        return decode(path.read_bytes(), str(path))


_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")


def decode(raw: bytes, where: str) -> str:
    """Return `raw` as text. Raises LVMError unless it is UTF-8 without what only binary files hold."""
    try:
        text = raw.decode("utf-8-sig")
        control = len(_CONTROL.findall(text))
        if "\0" not in text and control <= 3 + len(text) // 100:
            return text
        reason = f"it holds {control} control characters: a binary file, or UTF-16"
    except UnicodeDecodeError as e:
        reason = f"byte {e.start} is 0x{raw[e.start]:02x}"
    raise LVMError(
        f"{where}: is no UTF-8 text ({reason}); remove it, or convert it: iconv -f LATIN1 -t UTF-8 FILE > NEW"
    )


def read_lines(files: Files, query: Query, counts: Counter) -> Iterator[tuple]:
    path = files.base
    with (
        wrap_errors(str(path), DAMAGED),
        gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as file,
    ):
        for number, line in enumerate(iter(lambda: file.readline(LARGEST + 1), b""), 1):
            where = f"{path}: line {number}"
            if len(line) > LARGEST:
                raise LVMError(f"{where}: more than {LARGEST:,} bytes are too many for an article; split it")
            if line.isspace():
                continue
            with wrap_errors(where, "correct or remove the line"):
                record = json.loads(decode(line, where))
            if not isinstance(record, dict):
                raise LVMError(f"{where}: holds {type(record).__name__}, not an object {{…}}; correct or remove it")
            yield *_fields(record, query, where), path.name


def _fields(record: Mapping, query: Query, where: str) -> tuple:
    """Return (title or None, text) of a row; null is no text. Raises LVMError on a missing column or another type."""
    check_columns(record, query, where)
    text = record[query.text]
    if not isinstance(text, str | None):
        raise LVMError(
            f"{where}: column {query.text!r} holds {type(text).__name__}, not text; drop such rows, or name another"
        )
    return record.get(query.title), text or ""


def check_columns(names: Iterable, query: Query, where: str) -> None:
    """Raise LVMError unless the columns of a query are there. A column `title` may be missing: it is the default."""
    for name in (query.text, query.title):
        if name not in names and (name == query.text or name not in (None, "title")):
            raise no_column(name, names, where)


def no_column(name: str, known: Iterable, where: str) -> LVMError:
    """Return the error for a column that is not there, with the nearest name."""
    known = [str(column) for column in known]
    listed = ", ".join(known[:30]) + (", …" if len(known) > 30 else "") or "none"
    return LVMError(f"{where}: no column {name!r}{nearest(name, known)}; columns are: {listed}")


def read_parquet(files: Files, query: Query, counts: Counter) -> Iterator[tuple]:
    def columns(schema) -> list[str]:
        check_columns(schema.names, query, str(path))
        if not is_text(kind := schema.field(query.text).type):
            raise LVMError(f"{path}: column {query.text!r} holds {kind}, not text; name another column")
        return list({query.text, query.title} & {*schema.names})

    for path in files.paths:
        row = 0
        with wrap_errors(f"{path}: as Parquet", DAMAGED):
            for batch in parquet_batches(path, columns, 256):
                for record in batch.to_pylist():
                    row += 1
                    yield *_fields(record, query, f"{path}: row {row}"), path.name


def parquet_batches(path: Path, columns: Callable[..., list[str]], size: int) -> Iterator:
    """Yield a file's record batches of at most `size` rows. `columns(schema)` returns the names of those to read."""
    parquet = require("pyarrow.parquet")
    with (
        wrap_errors(f"{path}: as Parquet", DAMAGED),
        parquet.ParquetFile(path, memory_map=False, pre_buffer=False) as file,
    ):
        yield from file.iter_batches(size, columns=columns(file.schema_arrow), use_threads=False)


def is_text(kind) -> bool:
    """Return whether an Arrow type holds strings."""
    types = require("pyarrow").types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


@contextlib.contextmanager
def hub_stream(name: str, config: str | None, subset: str) -> Iterator:
    """Open a hub dataset as a stream of rows. Raises LVMError if it, or a row, does not come."""
    datasets = require("datasets")
    name, _, revision = name.partition("@")
    with wrap_errors(
        f"hub:{name} (config {config}, subset {subset})",
        "check name, config, subset and network; without a network, fetch its Parquet files and name their folder",
    ):
        pinned = {"revision": revision} if revision else {}
        yield datasets.load_dataset(name, config, split=subset, streaming=True, **pinned)


def read_hub(name: str, query: Query, counts: Counter) -> Iterator[tuple]:
    source = name.partition("@")[0]
    with hub_stream(name, query.config, query.subset) as stream:
        for row, record in enumerate(stream, 1):
            yield *_fields(record, query, f"hub:{source}: row {row}"), source
