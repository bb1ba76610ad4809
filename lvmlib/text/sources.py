"""Read articles from a source. A source is one string:

    FOLDER              every .txt and .md file below it, a file an article
    FILE.jsonl          JSON Lines, an object a line and a line an article; also .ndjson, and either with .gz
    FILE.parquet        a row an article; or a folder of such files
    hub:OWNER/NAME      a dataset of the Hugging Face hub, streamed; @REVISION behind it pins one
    nltk:NAME           movie_reviews, brown, abc, state_union or inaugural, downloaded before
    wikipedia           the slice that the embedded dataset is made of

A relative path starts from the checkout. Only `hub:` uses the network. No code of a dataset is run. To add a kind of
source, add an entry to KINDS.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import LVMError
from ..io.inherit import nearest
from ..io.paths import ROOT
from . import slice as wikipedia
from .corpora import CORPORA, corpus_state, read_corpus
from .readers import HUB_NAME, Files, Query, read_files, read_hub, read_lines, read_parquet

TITLE_LENGTH = 300  # characters


@dataclass(frozen=True)
class Document:
    """One article. `title` is unique in its source; `source` is a file, a dataset or a category of a corpus."""

    title: str
    text: str
    source: str


def documents(
    source: str,
    *,
    text: str = "text",
    title: str | None = "title",
    config: str | None = None,
    subset: str = "train",
    limit: int | None = None,
    counts: Counter | None = None,
) -> Iterator[Document]:
    """Yield the articles of a source, in its order; the first `limit` of them.

    `text`, `title`: columns of JSON Lines, Parquet and hub datasets. An article without a title is called 'document N';
    a title that repeats gets a number. `config`, `subset`: of a hub dataset. `counts` counts what was left out. Raises
    LVMError, naming the place, on anything that cannot be read, and if there is no article.
    """
    check_limit(limit)
    kind, place = locate(source)
    counts = Counter() if counts is None else counts
    records = KINDS[kind].read(place, Query(text, title, config, subset), counts)
    used: dict[str, int] = {}
    number = 0
    for row, (given, content, where) in enumerate(records, 1):
        if not content or content.isspace():
            counts["documents without text"] += 1
            continue
        line = title_line(given)
        if not line:
            counts["documents without a title"] += 1
        number += 1
        yield Document(unique(line or f"document {row}", used, counts), content, title_line(where))
        if number == limit:
            break
    counts["articles read"] = number
    if not number:
        raise LVMError(f"{source}: holds no article with text; name another source")


def title_line(title) -> str:
    """Return a title on one line, or ''."""
    if isinstance(title, bool) or not isinstance(title, (str, int, float)):
        return ""
    title = "".join(c if c.isprintable() else " " for c in unicodedata.normalize("NFC", str(title)))
    return " ".join(title.split())[:TITLE_LENGTH].rstrip()


def unique(title: str, used: dict[str, int], counts: Counter) -> str:
    """Return `title`, with a number behind it if it is in `used` (title → how often); a split names articles by it."""
    given = title
    while given in used:
        used[title] += 1
        given = f"{title} ({used[title]})"
    if given != title:
        counts["repeated titles, numbered"] += 1
    used[given] = 1
    return given


def check_limit(limit, name: str = "limit") -> None:
    """Raise LVMError, naming the parameter, unless `limit` is None or a number of articles."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise LVMError(f"{name}: {limit!r} is not a whole number of at least 1; change it, or leave it out")


def locate(source: str) -> tuple[str, str | Files]:
    """Return (kind, place) of a source: a key of KINDS, and a name or Files. Raises LVMError if it names nothing."""
    if not isinstance(source, str) or not source.strip():
        raise LVMError(f"source: {source!r} is no source; {_HELP}")
    kind, _, name = source.partition(":")
    if kind in KINDS and KINDS[kind].check:
        return kind, KINDS[kind].check(name)
    path = ROOT / os.path.expanduser(source)
    if os.path.isfile(path):
        kind = _kind_of(path)
        if kind is None or not KINDS[kind].alone:
            raise LVMError(f"{source}: {'name its folder' if kind else 'unknown suffix'}; {_HELP}")
        return kind, Files(path, [path])
    if not os.path.isdir(path):
        raise LVMError(f"{source}: no such folder or file ({path}); {_HELP}")
    files = _walk(path)
    by_kind: dict[str, list[Path]] = {}
    for file in files:
        if kind := _kind_of(file):
            by_kind.setdefault(kind, []).append(file)
    kinds = [kind for kind in by_kind if KINDS[kind].folder]
    if len(kinds) > 1:
        first = ", ".join(by_kind[kind][0].name for kind in kinds)
        raise LVMError(f"{source}: holds files of several kinds ({first}); put each kind into a folder of its own")
    if not kinds:
        advice = "".join(f"name {paths[0]}; " for paths in by_kind.values())
        raise LVMError(f"{source}: holds no .txt, .md or .parquet file; {advice}{_HELP}")
    paths = by_kind[kinds[0]]
    return kinds[0], Files(path, paths, len(files) - len(paths))


_HELP = (
    "a source is a folder of .txt and .md files, a .jsonl or .parquet file, a folder of .parquet files, "
    "hub:OWNER/NAME, nltk:CORPUS or wikipedia; a relative path starts from the checkout"
)


def _kind_of(path: Path) -> str | None:
    return next((name for name, kind in KINDS.items() if path.name.lower().endswith(kind.suffixes or ("\0",))), None)


def _walk(folder: Path) -> list[Path]:
    """Return the files below a folder, sorted by path, without hidden ones. Links are followed, each folder once."""

    def refuse(e: OSError):
        raise LVMError(f"{e.filename}: cannot be opened ({e.strerror}); make it readable, or take it away") from e

    files, seen = [], set()
    for inner, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(inner)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = (name for name in folders if not name.startswith("."))
        files += (Path(inner, name) for name in names if not name.startswith("."))
    return sorted(filter(os.path.isfile, files), key=lambda path: path.parts)


def fingerprint(source: str, config: str | None = None, subset: str = "train") -> str:
    """Return a sha256 (hexadecimal) of the source's state, which a resumed build compares.

    Of files: path, size and time of change. Nothing is fetched: of a hub dataset only the name and revision are known.
    """
    kind, place = locate(source)
    state = {"kind": kind, "state": KINDS[kind].state(place), "config": config, "subset": subset}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _file_state(files: Files) -> list:
    states = [(path, path.stat()) for path in files.paths]
    return [[os.path.relpath(path, files.base), state.st_size, state.st_mtime_ns] for path, state in states]


def _hub_name(name: str) -> str:
    if not re.fullmatch(HUB_NAME, name):
        raise LVMError(f"hub:{name}: name it hub:OWNER/NAME, such as hub:wikimedia/wikipedia")
    return name


def _corpus_name(name: str) -> str:
    if name not in CORPORA:
        known = ", ".join(f"nltk:{corpus}" for corpus in CORPORA)
        raise LVMError(f"nltk:{name}: unknown corpus{nearest(name, CORPORA)}; known: {known}")
    return name


def _read_slice(name: str, query: Query, counts: Counter) -> Iterator[tuple]:
    articles, dropped = wikipedia.wikipedia_slice()
    counts.update({what: number for what, number in dropped.items() if what not in ("articles", "paragraphs")})
    for title, paragraphs in articles:
        yield title, "\n\n".join(paragraphs), "wikipedia"


def _slice_name(name: str) -> str:
    if name:
        raise LVMError(f"wikipedia:{name}: name it wikipedia, or a hub dataset hub:wikimedia/wikipedia")
    return "wikipedia"


@dataclass(frozen=True)
class Kind:
    """A kind of source: how it is named, read and compared, and what the datasheet says of it."""

    read: Callable[..., Iterator[tuple]]  # (place, query, counts) → (title or None, text, source) of each article
    state: Callable[..., object] = _file_state  # place → what changes when the articles change
    check: Callable[[str], str] | None = None  # of a kind that is named KIND:NAME: returns the name, or raises LVMError
    suffixes: tuple[str, ...] = ()  # of a kind that is files
    alone: bool = False  # whether one file is a source
    folder: bool = False  # whether a folder of files is
    packages: tuple[str, ...] = ()  # whose versions the datasheet names
    datasheet: Mapping = field(default_factory=dict)  # further entries


KINDS = {
    "text": Kind(read_files, suffixes=(".txt", ".md"), folder=True),
    "jsonl": Kind(read_lines, suffixes=(".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"), alone=True),
    "parquet": Kind(read_parquet, suffixes=(".parquet",), alone=True, folder=True, packages=("pyarrow",)),
    "hub": Kind(read_hub, state=str, check=_hub_name, packages=("datasets", "pyarrow")),
    "nltk": Kind(read_corpus, state=corpus_state, check=_corpus_name, packages=("nltk",)),
    "wikipedia": Kind(
        _read_slice,
        state=lambda _: wikipedia.SLICE_SHA256,
        check=_slice_name,
        packages=("gensim",),
        datasheet={"source_sha256": wikipedia.SLICE_SHA256, "licence": wikipedia.LICENCE},
    ),
}
