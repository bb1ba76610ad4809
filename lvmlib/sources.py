"""Where text and ready vectors come from. A source is one string:

    FOLDER              every .txt and .md file below it, a file an article
    FILE.jsonl          JSON Lines, an object a line and a line an article; also .ndjson, and either with .gz
    FILE.parquet        a row an article; or a folder of such files
    hub:OWNER/NAME      a dataset of the Hugging Face hub, streamed; @REVISION behind it pins one
    nltk:NAME           movie_reviews, brown, abc, state_union or inaugural, as nltk's downloader put it on this machine
    wikipedia           the slice that the embedded dataset is made of

A relative path starts from the checkout. Nothing but `hub:` uses the network, and no code of a dataset is ever run.
Axes: n rows of a block, M rows in all, A articles, D vector dimension.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import hashlib
import html
import importlib
import json
import os
import re
import unicodedata
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from .errors import LVMError, extra
from .params import ROOT
from .vectors import NORM_TOLERANCE

TEXT_SUFFIXES = (".txt", ".md")
LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
CORPORA = ("movie_reviews", "brown", "abc", "state_union", "inaugural")
LARGEST = 1 << 28  # bytes of one article: more is no article, and would be held in memory
ROWS = 2048  # rows of a Parquet file or hub dataset held at a time
TITLE_LENGTH = 300  # characters

# Columns of ready vectors by the names that datasets give them, the likeliest first.
VECTOR_NAMES = ("emb", "embedding", "embeddings", "vector", "vectors")
ARTICLE_NAMES = ("wiki_id", "article", "article_id", "doc_id", "page_id", "document_id", "title")
POSITION_NAMES = ("paragraph_id", "position", "chunk_id", "chunk_index", "paragraph", "index")
TEXT_NAMES = ("text", "chunk", "content", "passage", "paragraph", "sentence")
TITLE_NAMES = ("title",)


@dataclass(frozen=True)
class Document:
    """One article. `title` is one of a kind within its source; `source`: a file, dataset or corpus category."""

    title: str
    text: str
    source: str


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


# ---------------------------------------------------------------------------------------------------------- documents


def documents(
    source: str,
    *,
    text: str = "text",
    title: str | None = "title",
    config: str | None = None,
    subset: str = "train",
    limit: int | None = None,
    counts: MutableMapping | None = None,
) -> Iterator[Document]:
    """The articles of a source, one at a time, in its order; the first `limit` of them.

    `text`, `title`: the columns of JSON Lines, Parquet and hub datasets (an article without a title is called
    'document N' after its place); `config`, `subset`: of a hub dataset, such as hub:wikimedia/wikipedia with config
    20231101.en. A title that was there before gets a number behind it. `counts` takes note of what was passed over.
    Raises LVMError, naming the place and what to do, on anything that cannot be read, and if there is no article.
    """
    counts = {} if counts is None else counts
    _check_limit(limit)
    kind, where = locate(source)
    if kind == "wikipedia":
        records = _slice(counts)
    elif kind == "hub":
        records = _hub(where, config, subset, text, title)
    elif kind == "nltk":
        records = _corpus(where, counts)
    elif kind == "text":
        records = _files(where, _path(source), counts)
    elif kind == "jsonl":
        records = _lines(where[0], text, title)
    else:
        records = _tables(where, text, title)
    return _documents(records, source, limit, counts)


def _documents(records: Iterable[tuple], source: str, limit: int | None, counts: MutableMapping) -> Iterator[Document]:
    """Documents of (title or None, text, source): empty ones left out, titles filled in and made unique."""
    used: dict[str, int] = {}  # title → how often it was given
    made = 0
    for number, (name, text, where) in enumerate(records, 1):
        if not text or text.isspace():
            _count(counts, "documents without text")
            continue
        name = _title(name)
        if not name:
            _count(counts, "documents without a title")
            name = f"document {number}"
        made += 1
        yield Document(_unique(name, used, counts), text, _title(where))
        if made == limit:
            break
    counts["articles read"] = made
    if not made:
        raise LVMError(f"{source}: holds no article with text; look into it, or name another source")


def _title(name) -> str:
    """A title on one line, or ''."""
    if isinstance(name, bool) or not isinstance(name, (str, int, float)):
        return ""
    name = "".join(c if c.isprintable() else " " for c in unicodedata.normalize("NFC", str(name)))
    return " ".join(name.split())[:TITLE_LENGTH].rstrip()


def _unique(name: str, used: dict[str, int], counts: MutableMapping) -> str:
    """`name`, or with a number behind it if it is used; a split names articles by title."""
    given = name
    while given in used:
        used[name] += 1
        given = f"{name} ({used[name]})"
    if given != name:
        _count(counts, "titles that were there before, numbered")
    used[given] = 1
    return given


def _count(counts: MutableMapping, what: str, number: int = 1) -> None:
    counts[what] = counts.get(what, 0) + number


def _check_limit(limit) -> None:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise LVMError(f"limit: {limit!r} is not a number of articles; give a whole number of at least 1, or none")


# ------------------------------------------------------------------------------------------------- what a source names


def locate(source: str) -> tuple[str, str | list[Path]]:
    """(kind, where) of a source: text, jsonl or parquet with paths, hub or nltk with a name, or wikipedia.

    Raises LVMError, saying what can be read, if there is nothing of the kind.
    """
    if not isinstance(source, str) or not source.strip():
        raise LVMError(f"source: {source!r} is no source; {_KINDS}")
    if source == "wikipedia":
        return "wikipedia", source
    kind, _, name = source.partition(":")
    if kind == "hub":
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?", name):
            raise LVMError(f"{source}: a hub dataset is named hub:OWNER/NAME, such as hub:wikimedia/wikipedia")
        return "hub", name
    if kind == "nltk":
        if name not in CORPORA:
            near = difflib.get_close_matches(name, CORPORA, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise LVMError(f"{source}: unknown corpus{hint}; known: {', '.join('nltk:' + c for c in CORPORA)}")
        return "nltk", name
    path = str(_path(source))
    if os.path.isfile(path):
        lower = path.lower()
        if lower.endswith(LINE_SUFFIXES):
            return "jsonl", [Path(path)]
        if lower.endswith(".parquet"):
            return "parquet", [Path(path)]
        if lower.endswith(TEXT_SUFFIXES):
            raise LVMError(f"{source}: is one text file; give the folder that it is in, where each file is an article")
        raise LVMError(f"{source}: is a file of an unknown kind; {_KINDS}")
    if not os.path.isdir(path):
        raise LVMError(f"{source}: no such folder or file ({path}); {_KINDS}")
    found = _walk(path)
    text = [f for f in found if f.name.lower().endswith(TEXT_SUFFIXES)]
    parquet = [f for f in found if f.name.lower().endswith(".parquet")]
    if text and parquet:
        raise LVMError(
            f"{source}: holds both text and Parquet files ({text[0].name}, {parquet[0].name}); put them into folders "
            "of their own, and name one"
        )
    if not text and not parquet:
        lines = [f for f in found if f.name.lower().endswith(LINE_SUFFIXES)]
        advice = f"name one of its JSON Lines files, such as {lines[0]}" if lines else _KINDS
        raise LVMError(f"{source}: holds no .txt, .md or .parquet file; {advice}")
    return ("text", text) if text else ("parquet", parquet)


def _path(source: str) -> Path:
    return ROOT / os.path.expanduser(source)


_KINDS = (
    "a source is a folder of .txt and .md files, a .jsonl or .parquet file, a folder of .parquet files, "
    "hub:OWNER/NAME, nltk:CORPUS or wikipedia; a relative path starts from the checkout"
)


def _walk(folder: str) -> list[Path]:
    """The files below a folder, sorted by path; hidden files and folders are passed over, a loop of links walked once.

    Links are followed; what is neither a file nor a folder (a broken link, a pipe) is passed over.
    """
    found, seen, todo = [], set(), [folder]
    while todo:
        inner = todo.pop()
        try:
            status = os.stat(inner)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            names = os.listdir(inner)
        except OSError as e:
            raise LVMError(f"{inner}: cannot be opened ({e.strerror}); make it readable, or take it away") from e
        for name in names:
            path = os.path.join(inner, name)
            if name.startswith("."):
                continue
            if os.path.isdir(path):
                todo.append(path)
            elif os.path.isfile(path):
                found.append(path)
    return [Path(path) for path in sorted(found, key=lambda path: path.split(os.sep))]


def fingerprint(
    source: str,
    *,
    config: str | None = None,
    subset: str = "train",
    limit: int | None = None,
    **columns: str | None,
) -> str:
    """What a build that goes on compares (sha256, hexadecimal): are these still the articles it began with?

    Of local files, and of an nltk corpus, path, size and time of change; of a hub dataset its name with the revision
    if it has one, config and subset; the slice's own sha256; for all of them the limit and the columns. Nothing is
    fetched: a hub dataset that changes under an unpinned name is not seen.
    """
    kind, where = locate(source)
    if kind == "hub":
        what: object = [where, config, subset]
    elif kind == "wikipedia":
        what = importlib.import_module("lvmlib.wikipedia").SLICE_SHA256
    elif kind == "nltk":
        reader = _reader(where)
        what = [[name, *_stamp(pointer)] for name, pointer in zip(reader.fileids(), reader.abspaths(), strict=True)]
    else:
        what = [[os.path.relpath(path, _path(source)), *_stamp(path)] for path in where]
    about = {"kind": kind, "what": what, "limit": limit, "columns": columns}
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def _stamp(path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, TypeError, ValueError):  # nltk's pointer into a zip file
        return path.file_size() if hasattr(path, "file_size") else 0, 0
    return status.st_size, status.st_mtime_ns


# -------------------------------------------------------------------------------------------------------- text files


def _files(paths: list[Path], base: Path, counts: MutableMapping) -> Iterator[tuple]:
    """Title: the path below `base` without suffix; source: the folder in `base` that the file is in, or `base`."""
    for path in paths:
        try:
            size = path.stat().st_size
            raw = path.read_bytes() if size <= LARGEST else None
        except OSError as e:
            raise LVMError(f"{path}: cannot be read ({e.strerror}); make it readable, or take it away") from e
        if raw is None:
            raise LVMError(f"{path}: {size:,} bytes are no article (at most {LARGEST:,}); part it into one file each")
        text = _text(raw, str(path))
        if not text or text.isspace():
            _count(counts, "empty files")
            continue
        inside = path.relative_to(base)
        if path.suffix.lower() == ".md":
            text = prose(text)
        yield inside.with_suffix("").as_posix(), text, inside.parts[0] if len(inside.parts) > 1 else base.name


MARKS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"))
MARKS += ((codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")


def _text(raw: bytes, where: str) -> str:
    """`raw` as text. Raises LVMError unless it is UTF-8 and free of what only binary files hold."""
    for mark, name in MARKS:
        if raw.startswith(mark):
            raise LVMError(f"{where}: is {name}; convert it: iconv -f {name} -t UTF-8 FILE > NEW")
    if b"\0" in raw:
        raise LVMError(
            f"{where}: holds NUL bytes (the first at byte {raw.index(0)}): a binary file, or UTF-16 without a mark; "
            "take it away, or convert it with iconv"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise LVMError(
            f"{where}: is not UTF-8 (byte {e.start} is 0x{raw[e.start]:02x}); if it is text in another encoding, "
            "convert it (iconv -f LATIN1 -t UTF-8 FILE > NEW); if it is none, take it away"
        ) from e
    odd = len(CONTROL.findall(text))
    if odd > 3 + len(text) // 100:
        raise LVMError(f"{where}: holds {odd} control characters: a binary file; take it away")
    return text


FRONT_MATTER = re.compile(
    r"\A(?:---[ \t]*\n(?=[\w\"'-]+[ \t]*:)|\+\+\+[ \t]*\n).*?\n(?:---|\+\+\+|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL
)
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
DELIMITERS = re.compile(r"[\s|:-]+")  # the row under a table's head
ITEM = re.compile(r"(?:[-*+]|\d{1,3}[.)])[ \t]+(?:\[[ xX]\][ \t]+)?")
DEFINITION = re.compile(r"\[[^\[\]]{1,200}\]:")
IMAGE = re.compile(r"!\[[^\[\]\n]{0,500}\](?:\([^()\n]{0,1000}\)|\[[^\[\]\n]{0,200}\])?")
LINK = re.compile(r"\[([^\[\]\n]{1,500})\](?:\((?:[^()\n]|\([^()\n]{0,300}\)){0,1000}\)|\[[^\[\]\n]{0,200}\])")
NOTE = re.compile(r"\[\^[^\[\]\n]{1,50}\]")
TAG = re.compile(r"</?[A-Za-z][^<>\n]{0,500}>")
ADDRESS = re.compile(r"<(?:https?|mailto):[^<>\s]{0,1000}>")
EMPHASIS = re.compile(  # a mark behind a backslash is none
    r"(?<!\\)\*{1,3}(?=\S)|(?<=[^\s\\])\*{1,3}|(?<![\\\w])_{1,3}(?=\w)|(?<=[^\s\\])_{1,3}(?!\w)|~~|(?<!\\)`+"
)
ESCAPE = re.compile(r"\\([\\`*_{}\[\]()#+.!|>~-])")


def prose(markdown: str) -> str:
    """The running text of a Markdown file.

    Left out: front matter, fenced code, comments, tables, headings, rules, images, definitions of links and notes.
    Links keep their text, list items and quotations theirs (each item a paragraph); marks of emphasis and HTML tags go.
    """
    markdown = FRONT_MATTER.sub("", re.sub("\r\n?", "\n", markdown), count=1)
    kept, fence, comment, table = [""], "", False, False
    for line in markdown.split("\n"):
        if fence:
            mark = line.strip()
            if mark.startswith(fence) and not mark.strip(fence[0]):
                fence = ""
            continue
        opened = None if comment else FENCE.match(line)
        if opened:
            fence = opened[1]
            kept.append("")
            continue
        line, comment = _uncommented(line, comment)
        line = line.strip()
        line = line.lstrip("> \t") if line.startswith(">") else line
        marks = set(line.replace(" ", ""))
        if "|" in line and "-" in line and DELIMITERS.fullmatch(line):
            table, kept[-1] = True, ""
        if table or line.startswith("|"):
            table = table and "|" in line
            if table or line.startswith("|"):
                continue
        if len(line) > 2 and len(marks) == 1 and marks <= set("=-*_"):  # a rule, or what makes the line above a heading
            if marks <= set("=-") and kept[-1] and (len(kept) == 1 or not kept[-2]):
                kept[-1] = ""
            kept.append("")
        elif re.match(r"#{1,6}(\s|$)", line) or DEFINITION.match(line):
            kept.append("")
        elif item := ITEM.match(line):
            kept += ["", line[item.end() :]]
        else:
            kept.append(line.removesuffix("\\"))
    text = "\n".join(kept)
    for pattern, instead in ((IMAGE, ""), (NOTE, ""), (LINK, r"\1"), (ADDRESS, " "), (TAG, " "), (EMPHASIS, "")):
        text = pattern.sub(instead, text)
    return html.unescape(ESCAPE.sub(r"\1", text)).strip("\n")


def _uncommented(line: str, inside: bool) -> tuple[str, bool]:
    """A line without its HTML comments, and whether one goes on behind it; `inside`: one goes on from before."""
    pieces = []
    for number, part in enumerate(line.split("<!--")):
        inside = inside or number > 0
        if inside:
            _, end, part = part.partition("-->")
            inside = not end
        if not inside:
            pieces.append(part)
    return " ".join(pieces), inside


# ------------------------------------------------------------------------------------------ JSON Lines, Parquet, hub


def _lines(path: Path, text: str, title: str | None) -> Iterator[tuple]:
    try:
        file = gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")  # noqa: SIM115 (below)
    except OSError as e:
        raise LVMError(f"{path}: cannot be read ({e.strerror}); make it readable") from e
    with file:
        number = 0
        while True:
            number += 1
            where = f"{path}: line {number}"
            try:
                line = file.readline(LARGEST + 1)
            except (OSError, EOFError, ValueError, zlib.error) as e:
                raise LVMError(f"{where}: cannot be read ({e}); the file is damaged: fetch it again") from e
            if not line:
                return
            if len(line) > LARGEST:
                raise LVMError(f"{where}: more than {LARGEST:,} bytes are no article; part it")
            if line.isspace():
                continue
            try:
                record = json.loads(_text(line, where))
            except LVMError:
                raise
            except (ValueError, RecursionError) as e:
                raise LVMError(f"{where}: is not JSON ({e}); mend or remove the line") from e
            if not isinstance(record, dict):
                raise LVMError(f"{where}: holds {_kind(record)}, not an object {{…}}; mend or remove the line")
            yield *_fields(record, text, title, where), path.name


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _fields(record: Mapping, text: str, title: str | None, where: str) -> tuple:
    """(title or None, text) of a row. Raises LVMError on a missing column or one that is not text."""
    if text not in record:
        raise LVMError(_no_column(text, record, where))
    if not isinstance(record[text], str):
        raise LVMError(
            f"{where}: column {text!r} holds {_kind(record[text])}, not a text; leave such rows out, or name another "
            "column"
        )
    if title is not None and title != "title" and title not in record:  # the default may be missing
        raise LVMError(_no_column(title, record, where))
    return record.get(title), record[text]


def _no_column(name: str, known: Iterable, where: str) -> str:
    known = [str(column) for column in known]
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    listed = ", ".join(known[:30]) + (", …" if len(known) > 30 else "") or "none"
    return f"{where}: no column {name!r}{hint}; columns are: {listed}"


def _tables(paths: list[Path], text: str, title: str | None) -> Iterator[tuple]:
    for path in paths:
        with _parquet(path) as file:
            schema = file.schema_arrow
            if text not in schema.names:
                raise LVMError(_no_column(text, schema.names, str(path)))
            if title is not None and title != "title" and title not in schema.names:
                raise LVMError(_no_column(title, schema.names, str(path)))
            if not _is_text(schema.field(text).type):
                raise LVMError(
                    f"{path}: column {text!r} holds {schema.field(text).type}, not text; name another column"
                )
            columns = [text] + ([title] if title in schema.names and title != text else [])
            row = 0
            for batch in _batches(file, columns, 256, str(path)):
                for record in _guarded(batch.to_pylist, str(path)):
                    row += 1
                    yield *_fields(record, text, title, f"{path}: row {row}"), path.name


def _parquet(path: Path):
    parquet = extra("pyarrow.parquet")
    return _guarded(lambda: parquet.ParquetFile(path, memory_map=False, pre_buffer=False), str(path))


def _batches(file, columns: list[str], size: int, where: str) -> Iterator:
    batches = _guarded(lambda: file.iter_batches(batch_size=size, columns=columns, use_threads=False), where)
    while (batch := _guarded(lambda: next(batches, None), where)) is not None:
        yield batch


def _guarded(call: Callable, where: str):
    """What `call` gives; whatever a damaged file makes pyarrow say comes out as LVMError."""
    try:
        return call()
    except Exception as e:
        first = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise LVMError(f"{where}: cannot be read as Parquet ({first}); the file is damaged: fetch it again") from e


def _is_text(kind) -> bool:
    types = extra("pyarrow").types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _load(name: str, config: str | None, subset: str):
    """The hub dataset as a stream. Raises LVMError with what to do."""
    datasets = extra("datasets")
    name, _, revision = name.partition("@")
    pinned = {"revision": revision} if revision else {}
    try:
        return datasets.load_dataset(name, config, split=subset, streaming=True, **pinned)
    except Exception as e:
        raise LVMError(_hub_trouble(name, config, subset, e)) from e


def _hub_trouble(name: str, config: str | None, subset: str, e: Exception) -> str:
    said = (str(e).strip().splitlines() or [""])[0][:300]
    return (
        f"hub:{name} (config {config}, subset {subset}): cannot be streamed ({type(e).__name__}: {said}); check the "
        "name, config and subset on its page of the hub, and that this machine has a network; without one, fetch its "
        "Parquet files elsewhere and name their folder"
    )


def _hub(name: str, config: str | None, subset: str, text: str, title: str | None) -> Iterator[tuple]:
    rows = iter(_load(name, config, subset))
    source, row = name.partition("@")[0], 0
    while True:
        row += 1
        try:
            record = next(rows, None)
        except Exception as e:
            raise LVMError(_hub_trouble(source, config, subset, e)) from e
        if record is None:
            return
        yield *_fields(record, text, title, f"hub:{source}: row {row}"), source


# --------------------------------------------------------------------------------------------- corpora that are named


def _slice(counts: MutableMapping) -> Iterator[tuple]:
    articles, found = importlib.import_module("lvmlib.wikipedia").wikipedia_slice()
    for name, number in found.items():
        if name not in ("articles", "paragraphs"):  # these are counted anew
            _count(counts, name, number)
    for title, paragraphs in articles:
        yield title, "\n\n".join(paragraphs), "wikipedia"


def _reader(name: str):
    """nltk's reader of a corpus. Raises LVMError with the command that downloads it."""
    reader = getattr(extra("nltk.corpus"), name)
    try:
        reader.ensure_loaded()
        reader.fileids()
    except LookupError as e:
        raise LVMError(f"nltk:{name}: is not on this machine; run: python -m nltk.downloader {name}") from e
    except Exception as e:
        raise LVMError(_corpus_trouble(name, e)) from e
    return reader


def _corpus_trouble(name: str, e: Exception) -> str:
    return f"nltk:{name}: cannot be read ({e!r}); fetch it again: python -m nltk.downloader --force {name}"


def _corpus(name: str, counts: MutableMapping) -> Iterator[tuple]:
    """An nltk corpus. Of the plain ones a line of a file is a paragraph: that is how all four are laid out (a line of
    movie_reviews is a sentence: it has nothing larger), though only some part their lines by blank ones."""
    reader = _reader(name)
    articles = {"brown": _brown, "movie_reviews": _reviews, "abc": _news}.get(name, _speeches)(reader, name, counts)
    while True:
        try:
            article = next(articles, None)
        except LVMError:
            raise
        except Exception as e:
            raise LVMError(_corpus_trouble(name, e)) from e
        if article is None:
            return
        yield article


def _brown(reader, name: str, counts: MutableMapping) -> Iterator[tuple]:
    """A sample is an article, its genre the source; headings (every word tagged -HL) are left out."""
    for file in reader.fileids():
        paragraphs = []
        for paragraph in reader.tagged_paras(file):
            sentences = []
            for tagged in paragraph:
                if all((tag or "").endswith("-HL") for _, tag in tagged):
                    _count(counts, "headings")
                else:
                    sentences.append(_joined([word for word, _ in tagged]))
            paragraphs.append(" ".join(sentences))
        yield file, "\n\n".join(p for p in paragraphs if p), reader.categories(file)[0]


def _reviews(reader, name: str, counts: MutableMapping) -> Iterator[tuple]:
    for file in reader.fileids():
        lines = (_joined(line.split()) for line in reader.raw(file).splitlines())
        yield file.removesuffix(".txt"), "\n\n".join(line for line in lines if line), reader.categories(file)[0]


def _news(reader, name: str, counts: MutableMapping) -> Iterator[tuple]:
    """An item is what blank lines part: a line of heading, its title, and the paragraphs, a line each. Nothing in the
    files tells a section with a heading of its own from an item: it becomes one."""
    for file in reader.fileids():
        for item in re.split(r"\n[ \t\r]*\n", reader.raw(file)):
            lines = [line.strip() for line in item.splitlines() if line.strip()]
            if len(lines) > 1:
                yield lines[0], "\n\n".join(lines[1:]), file.removesuffix(".txt")
            elif lines:
                _count(counts, "news items of a single line")


def _speeches(reader, name: str, counts: MutableMapping) -> Iterator[tuple]:
    for file in reader.fileids():
        yield file.removesuffix(".txt"), "\n\n".join(line.strip() for line in reader.raw(file).splitlines()), name


def _joined(words: list[str]) -> str:
    """Readable text of the words of a sentence."""
    plain: list[str] = []
    for word in words:
        if not (plain and word == plain[-1] and word in ";:?!"):  # the Brown corpus doubles these
            plain.append(word)
    text = extra("nltk.tokenize.treebank").TreebankWordDetokenizer().detokenize(plain)
    text = re.sub(r'" ([^"]*?) ?"', r'"\1"', text)  # plain quotation marks, which the detokenizer takes for opening
    return re.sub(r"(?<=\w)--(?=\w)", " -- ", text)


# ------------------------------------------------------------------------------------------------------- ready vectors


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
    _check_limit(limit)
    kind, where = locate(source)
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
        with _parquet(path) as file:
            found = _columns(file.schema_arrow, {**asked, **columns}, str(path), {})
            columns = columns or found  # those of the first file hold for all
            needed = [column for column in columns.values() if column]
            for column in needed:
                if column not in file.schema_arrow.names:
                    raise LVMError(_no_column(column, file.schema_arrow.names, str(path)))
            row = 0
            for batch in _batches(file, list(dict.fromkeys(needed)), ROWS, str(path)):
                yield batch, row, str(path), path.name
                row += len(batch)


def _hub_batches(name: str, config: str | None, subset: str) -> Iterator[tuple]:
    stream, source, row = _load(name, config, subset), name.partition("@")[0], 0
    batches = _arrow(stream)
    while True:
        try:
            batch = next(batches, None)
        except Exception as e:
            raise LVMError(_hub_trouble(source, config, subset, e)) from e
        if batch is None:
            return
        yield batch, row, f"hub:{source}", source
        row += len(batch)


def _arrow(stream) -> Iterator:
    """Record batches of a dataset's stream, or of plain rows."""
    pyarrow = extra("pyarrow")
    if hasattr(stream, "with_format"):
        for table in stream.with_format("arrow").iter(batch_size=ROWS):
            yield from table.combine_chunks().to_batches()
        return
    rows = iter(stream)
    while block := list(islice(rows, ROWS)):
        yield pyarrow.RecordBatch.from_pylist(block)


def _vector_rows(batches, source: str, asked: dict, limit: int | None, counts: MutableMapping) -> Iterator[VectorRows]:
    dimension, seen, columns = None, set(), None
    for batch, first, where, name in batches:
        if columns is None:
            columns = _columns(batch.schema, asked, where, counts)
        chosen = {role: batch.column(column) for role, column in columns.items() if column}
        matrix = _guarded(lambda chosen=chosen: _matrix(chosen["vectors"]), where)
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
        _count(counts, "rows read", end)
        if end:
            places = chosen.get("position")
            strings = {
                role: [s if s is not None else "" for s in _guarded(chosen[role].to_pylist, where)][:end]
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
        return types.is_integer(plain(kind)) or types.is_floating(plain(kind)) or _is_text(kind)

    roles: dict[str, tuple] = {
        "vectors": (VECTOR_NAMES, is_vectors, "lists of floating-point numbers"),
        "article": (ARTICLE_NAMES, is_key, "whole numbers or strings"),
        "position": (POSITION_NAMES, lambda k: types.is_integer(k) or types.is_floating(k), "whole numbers"),
        "text": (TEXT_NAMES, _is_text, "text"),
        "title": (TITLE_NAMES, _is_text, "text"),
    }
    found: dict[str, str | None] = {}
    said = []
    for role, (names, fits, what) in roles.items():
        name = asked[role]
        if name in schema.names:
            if not fits(schema.field(name).type):
                raise LVMError(f"{where}: column {name!r} holds {schema.field(name).type}, not {what}; name another")
        elif name is not None and not (role == "vectors" and name == VECTOR_NAMES[0]):
            raise LVMError(_no_column(name, schema.names, where))
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
    keys = _guarded(column.to_pylist, where)
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
    titles, sources, articles, places, ends = [], [], [], [], array("q")
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
                sources.append(block.source)
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
    titles = [_unique(_called(title, key), used, counts) for title, key in zip(titles, numbers, strict=True)]
    place = np.concatenate(places) if placed else None
    return dtype, dimension, np.concatenate(articles), place, np.array(ends) if worded else None, titles, sources


def _called(title: str, key: int | str) -> str:
    return _title(title) or _title(key) or "document"


def _grouped(folder, raw, texts, dtype, dimension, article, position, ends, titles, sources, counts) -> tuple:
    """Pass two: the files in the order of articles and positions."""
    if position is None:
        order = np.argsort(article, kind="stable")
        place = np.arange(len(order)) - np.searchsorted(article[order], article[order])
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
    for first in range(0, len(order), ROWS):
        made[first : first + ROWS] = given[order[first : first + ROWS]]
    made.flush()
    if ends is not None:
        begins = np.append(0, ends[:-1])
        with open(texts, "rb") as source, open(folder / "texts.jsonl", "wb") as file:
            for row in order:
                source.seek(begins[row])
                file.write(source.read(ends[row] - begins[row]))
    return titles, sources


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
