"""Read nltk's plain corpora, as nltk's downloader put them on this machine."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator

from ..errors import LVMError, require
from .readers import Query, wrap_errors


def read_corpus(name: str, query: Query, counts: Counter) -> Iterator[tuple]:
    """Yield (title, text, source) of each article. Outside of brown a line of a file is a paragraph."""
    with _errors(name):
        yield from CORPORA[name](_open(name), name, counts)


def corpus_state(name: str) -> list:
    """Return what changes when the corpus does: of each file its size, and outside a zip file its time of change."""
    with _errors(name):
        reader = _open(name)
        files = dict(zip(reader.fileids(), reader.abspaths(), strict=True))
        return [[f, p.file_size(), os.stat(p).st_mtime_ns if isinstance(p, str) else 0] for f, p in files.items()]


def _errors(name: str):
    return wrap_errors(f"nltk:{name}", f"fetch it again: python -m nltk.downloader --force {name}")


def _open(name: str):
    """Return nltk's reader of a corpus. Raises LVMError, naming the command that downloads it, if it is not there."""
    reader = getattr(require("nltk.corpus"), name)
    try:
        reader.ensure_loaded()
        reader.fileids()
    except LookupError as e:
        raise LVMError(f"nltk:{name}: is not on this machine; run: python -m nltk.downloader {name}") from e
    return reader


def _brown(reader, name: str, counts: Counter) -> Iterator[tuple]:
    """A sample is an article, its genre the source; headings (every word tagged -HL) are left out."""
    for file in reader.fileids():
        paragraphs = []
        for paragraph in reader.tagged_paras(file):
            sentences = [[w for w, _ in s] for s in paragraph if not all((t or "").endswith("-HL") for _, t in s)]
            if headings := len(paragraph) - len(sentences):
                counts["headings"] += headings
            paragraphs.append(" ".join(map(_join_words, sentences)))
        yield file, "\n\n".join(filter(None, paragraphs)), reader.categories(file)[0]


def _reviews(reader, name: str, counts: Counter) -> Iterator[tuple]:
    """A line is a sentence: movie_reviews has no larger unit."""
    for file in reader.fileids():
        lines = (_join_words(line.split()) for line in reader.raw(file).splitlines())
        yield file.removesuffix(".txt"), "\n\n".join(filter(None, lines)), reader.categories(file)[0]


def _news(reader, name: str, counts: Counter) -> Iterator[tuple]:
    """Blank lines separate the items; the first line of an item is its title, each further line a paragraph."""
    for file in reader.fileids():
        for item in re.split(r"\n[ \t\r]*\n", reader.raw(file)):
            lines = [line.strip() for line in item.splitlines() if line.strip()]
            if len(lines) > 1:
                yield lines[0], "\n\n".join(lines[1:]), file.removesuffix(".txt")
            elif lines:
                counts["news items of a single line"] += 1


def _speeches(reader, name: str, counts: Counter) -> Iterator[tuple]:
    for file in reader.fileids():
        yield file.removesuffix(".txt"), "\n\n".join(line.strip() for line in reader.raw(file).splitlines()), name


CORPORA = {"movie_reviews": _reviews, "brown": _brown, "abc": _news, "state_union": _speeches, "inaugural": _speeches}


def _join_words(words: list[str]) -> str:
    """Return the words of a sentence as readable text."""
    doubled = (i > 0 and word == words[i - 1] and word in ";:?!" for i, word in enumerate(words))  # as Brown does
    plain = [word for word, again in zip(words, doubled, strict=True) if not again]
    text = require("nltk.tokenize.treebank").TreebankWordDetokenizer().detokenize(plain)
    text = re.sub(r'" ([^"]*?) ?"', r'"\1"', text)  # the detokenizer takes plain quotation marks for opening ones
    return re.sub(r"(?<=\w)--(?=\w)", " -- ", text)
