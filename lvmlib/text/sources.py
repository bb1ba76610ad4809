"""Where text comes from, and the tables of ready vectors. A source is one string:

    FOLDER              every .txt and .md file below it, a file an article
    FILE.jsonl          JSON Lines, an object a line and a line an article; also .ndjson, and either with .gz
    FILE.parquet        a row an article; or a folder of such files
    hub:OWNER/NAME      a dataset of the Hugging Face hub, streamed; @REVISION behind it pins one
    nltk:NAME           movie_reviews, brown, abc, state_union or inaugural, as nltk's downloader put it on this machine
    wikipedia           the slice that the embedded dataset is made of

A relative path starts from the checkout. Nothing but `hub:` uses the network, and no code of a dataset is ever run.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import LVMError, extra
from ..io.paths import ROOT

TEXT_SUFFIXES = (".txt", ".md")
LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
CORPORA = ("movie_reviews", "brown", "abc", "state_union", "inaugural")
LARGEST = 1 << 28  # bytes of one article: more is no article, and would be held in memory
ROWS = 2048  # rows of a Parquet file or hub dataset held at a time
TITLE_LENGTH = 300  # characters


@dataclass(frozen=True)
class Document:
    """One article. `title` is one of a kind within its source; `source`: a file, dataset or corpus category."""

    title: str
    text: str
    source: str


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
    check_limit(limit)
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
            count(counts, "documents without text")
            continue
        name = title_line(name)
        if not name:
            count(counts, "documents without a title")
            name = f"document {number}"
        made += 1
        yield Document(unique(name, used, counts), text, title_line(where))
        if made == limit:
            break
    counts["articles read"] = made
    if not made:
        raise LVMError(f"{source}: holds no article with text; look into it, or name another source")


def title_line(name) -> str:
    """A title on one line, or ''."""
    if isinstance(name, bool) or not isinstance(name, (str, int, float)):
        return ""
    name = "".join(c if c.isprintable() else " " for c in unicodedata.normalize("NFC", str(name)))
    return " ".join(name.split())[:TITLE_LENGTH].rstrip()


def unique(name: str, used: dict[str, int], counts: MutableMapping) -> str:
    """`name`, or with a number behind it if it is used; a split names articles by title."""
    given = name
    while given in used:
        used[name] += 1
        given = f"{name} ({used[name]})"
    if given != name:
        count(counts, "titles that were there before, numbered")
    used[given] = 1
    return given


def count(counts: MutableMapping, what: str, number: int = 1) -> None:
    """Take note of `number` more of `what`."""
    counts[what] = counts.get(what, 0) + number


def check_limit(limit, name: str = "limit") -> None:
    """Raises LVMError, naming the parameter, unless `limit` is None or a number of articles."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise LVMError(f"{name}: {limit!r} is not a number of articles; give a whole number of at least 1, or none")


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
        what = importlib.import_module("lvmlib.text.wikipedia").SLICE_SHA256
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
    """Title: the path below `base` without suffix; source: the folder in `base` that the file is in, or `base`.

    From the first file on that cannot be read, the rest are only tried, so that all of these are told at once.
    """
    others = len(_walk(str(base))) - len(paths)
    if others:
        count(counts, "files of other kinds, passed over", others)
    bad: list[tuple[Path, LVMError]] = []
    for path in paths:
        try:
            text = _file_text(path)
        except LVMError as e:
            bad.append((path, e))
        if bad:
            continue
        if not text or text.isspace():
            count(counts, "empty files")
            continue
        inside = path.relative_to(base)
        if path.suffix.lower() == ".md":
            text = prose(text)
        yield inside.with_suffix("").as_posix(), text, inside.parts[0] if len(inside.parts) > 1 else base.name
    if len(bad) == 1:
        raise bad[0][1]
    if bad:
        named = ", ".join(path.relative_to(base).as_posix() for path, _ in bad[:10])
        more = f" and {len(bad) - 10:,} more" if len(bad) > 10 else ""
        raise LVMError(
            f"{base}: {len(bad):,} of {len(paths):,} files cannot be read as text: {named}{more}. "
            f"The first: {bad[0][1]}"
        )


def _file_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= LARGEST else None
    except OSError as e:
        raise LVMError(f"{path}: cannot be read ({e.strerror}); make it readable, or take it away") from e
    if raw is None:
        raise LVMError(f"{path}: {size:,} bytes are no article (at most {LARGEST:,}); part it into one file each")
    return _text(raw, str(path))


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
    """(title or None, text) of a row; null is no text. Raises LVMError on a missing column or one of another kind."""
    if text not in record:
        raise LVMError(no_column(text, record, where))
    if not isinstance(record[text], str | None):
        raise LVMError(
            f"{where}: column {text!r} holds {_kind(record[text])}, not a text; leave such rows out, or name another "
            "column"
        )
    if title is not None and title != "title" and title not in record:  # the default may be missing
        raise LVMError(no_column(title, record, where))
    return record.get(title), record[text] or ""


def no_column(name: str, known: Iterable, where: str) -> str:
    """What to tell of a column that is not there: the nearest name, and those there are."""
    known = [str(column) for column in known]
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    listed = ", ".join(known[:30]) + (", …" if len(known) > 30 else "") or "none"
    return f"{where}: no column {name!r}{hint}; columns are: {listed}"


def _tables(paths: list[Path], text: str, title: str | None) -> Iterator[tuple]:
    for path in paths:
        with open_parquet(path) as file:
            schema = file.schema_arrow
            if text not in schema.names:
                raise LVMError(no_column(text, schema.names, str(path)))
            if title is not None and title != "title" and title not in schema.names:
                raise LVMError(no_column(title, schema.names, str(path)))
            if not is_text(schema.field(text).type):
                raise LVMError(
                    f"{path}: column {text!r} holds {schema.field(text).type}, not text; name another column"
                )
            columns = [text] + ([title] if title in schema.names and title != text else [])
            row = 0
            for batch in record_batches(file, columns, 256, str(path)):
                for record in guarded(batch.to_pylist, str(path)):
                    row += 1
                    yield *_fields(record, text, title, f"{path}: row {row}"), path.name


def open_parquet(path: Path):
    """A Parquet file, to read in batches. Raises LVMError where it is damaged."""
    parquet = extra("pyarrow.parquet")
    return guarded(lambda: parquet.ParquetFile(path, memory_map=False, pre_buffer=False), str(path))


def record_batches(file, columns: list[str], size: int, where: str) -> Iterator:
    """Batches of `size` rows at most of a Parquet file's columns. Raises LVMError where it is damaged."""
    batches = guarded(lambda: file.iter_batches(batch_size=size, columns=columns, use_threads=False), where)
    while (batch := guarded(lambda: next(batches, None), where)) is not None:
        yield batch


def guarded(call: Callable, where: str):
    """What `call` gives; whatever a damaged file makes pyarrow say comes out as LVMError."""
    try:
        return call()
    except Exception as e:
        first = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise LVMError(f"{where}: cannot be read as Parquet ({first}); the file is damaged: fetch it again") from e


def is_text(kind) -> bool:
    """Whether an Arrow type holds strings."""
    types = extra("pyarrow").types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def load_hub(name: str, config: str | None, subset: str):
    """The hub dataset as a stream. Raises LVMError with what to do."""
    datasets = extra("datasets")
    name, _, revision = name.partition("@")
    pinned = {"revision": revision} if revision else {}
    try:
        return datasets.load_dataset(name, config, split=subset, streaming=True, **pinned)
    except Exception as e:
        raise LVMError(hub_trouble(name, config, subset, e)) from e


def hub_trouble(name: str, config: str | None, subset: str, e: Exception) -> str:
    """What to tell of a hub dataset that does not come."""
    said = (str(e).strip().splitlines() or [""])[0][:300]
    return (
        f"hub:{name} (config {config}, subset {subset}): cannot be streamed ({type(e).__name__}: {said}); check the "
        "name, config and subset on its page of the hub, and that this machine has a network; without one, fetch its "
        "Parquet files elsewhere and name their folder"
    )


def _hub(name: str, config: str | None, subset: str, text: str, title: str | None) -> Iterator[tuple]:
    rows = iter(load_hub(name, config, subset))
    source, row = name.partition("@")[0], 0
    while True:
        row += 1
        try:
            record = next(rows, None)
        except Exception as e:
            raise LVMError(hub_trouble(source, config, subset, e)) from e
        if record is None:
            return
        yield *_fields(record, text, title, f"hub:{source}: row {row}"), source


# --------------------------------------------------------------------------------------------- corpora that are named


def _slice(counts: MutableMapping) -> Iterator[tuple]:
    articles, found = importlib.import_module("lvmlib.text.wikipedia").wikipedia_slice()
    for name, number in found.items():
        if name not in ("articles", "paragraphs"):  # these are counted anew
            count(counts, name, number)
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
                    count(counts, "headings")
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
                count(counts, "news items of a single line")


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
