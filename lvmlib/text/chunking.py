"""Cut text into chunks (paragraphs, sentences or windows of tokens), and a corpus into the chunks of a store.

Units
    paragraph   between blank lines; a single newline joins lines
    sentence    as sentencex splits a paragraph; a sentence never crosses paragraphs
    tokens      windows of a fixed number of the encoder's own tokens, each beginning `tokens − overlap` after the last

Axes: M chunks, A articles. `write_chunks` keeps its indexes in an SQLite file, so memory does not grow with M.
"""

from __future__ import annotations

import json
import re
import sqlite3
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LVMError, require
from ..io.inherit import nearest
from .duplicates import NearDuplicates, normal
from .sources import Document
from .stage import write_tables

UNITS = ("paragraph", "sentence", "tokens")
SHORTEST = {"paragraph": 80, "sentence": 30, "tokens": 0}  # characters of a chunk, by default
# ISO 639-1. For an unknown code sentencex takes the rules of English without a warning.
CODES = (
    "aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo "
    "es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka "
    "kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng "
    "nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su "
    "sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)
LANGUAGES = frozenset(CODES.split())

NEWLINES = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028]")
# Nothing to read: soft hyphen, zero-width space, marks of writing direction, byte-order mark. The zero-width joiners
# stay: Persian and the scripts of India spell with them.
UNSEEN = re.compile("[\xad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]")
CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")  # and halves of surrogate pairs
LETTER = re.compile(r"[^\W\d_]")

SCHEMA = (
    *(f"PRAGMA {p}" for p in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "cache_size=-131072")),
    "BEGIN",
    "CREATE TABLE chunk (row INTEGER PRIMARY KEY, article INTEGER, mark INTEGER, line BLOB)",
    # Of each mark (a hash of a chunk's words): its first row, the number of articles that hold it, the last of them.
    "CREATE TABLE same (mark INTEGER PRIMARY KEY, first INTEGER, articles INTEGER, last INTEGER)",
)
COUNT_ARTICLES = (
    "INSERT INTO same VALUES (?, ?, 1, ?) ON CONFLICT (mark) DO UPDATE SET "
    "articles = articles + (last <> excluded.last), last = excluded.last"
)
COMPARED = (
    "SELECT row, article, line, first, articles FROM chunk CROSS JOIN same ON same.mark = chunk.mark ORDER BY row"
)


@dataclass(frozen=True)
class Cut:
    """How text is cut. Raises LVMError on a value that cannot be used.

    A chunk below `shortest` is dropped. A paragraph above `longest` is split at its sentence ends into parts as long
    as fit; a sentence or window above it is dropped. A window is the text from its first token to its last; a last
    window that would only repeat tokens of the one before is not made.
    """

    unit: str = "paragraph"
    shortest: int | None = None  # characters; None: 80 for a paragraph, 30 for a sentence, 0 for tokens
    longest: int | None = None  # characters
    tokens: int = 128  # of a window
    overlap: int = 32  # tokens
    language: str = "en"  # ISO 639-1, for the sentence ends
    tokenizer: Any = None  # the encoder's, a fast one of Hugging Face; unit tokens needs it

    def __post_init__(self):
        if self.unit not in UNITS:
            raise LVMError(f"unit: unknown {self.unit!r}{nearest(self.unit, UNITS)}; known: {', '.join(UNITS)}")
        if self.shortest is None:
            object.__setattr__(self, "shortest", SHORTEST[self.unit])
        for name, least in {"shortest": 0, "longest": 1, "tokens": 1, "overlap": 0}.items():
            value = getattr(self, name)
            valid = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not valid and (name, value) != ("longest", None):
                raise LVMError(f"{name}: {value!r} is not a whole number of at least {least}; change it")
        if self.longest is not None and self.longest < self.shortest:
            raise LVMError(f"longest: {self.longest} characters is less than shortest ({self.shortest}); raise it")
        if self.unit == "tokens" and self.overlap >= self.tokens:
            raise LVMError(f"overlap: {self.overlap} must be smaller than tokens ({self.tokens}); lower it")
        code = str(self.language).lower().replace("_", "-")
        if not re.fullmatch(r"[a-z]{2}(-\w{1,16})?", code) or code[:2] not in LANGUAGES:
            raise LVMError(
                f"language: {self.language!r} is no two-letter code of ISO 639-1; take the language whose punctuation "
                "is nearest, such as en, de or ja"
            )
        object.__setattr__(self, "language", code)


def clean(text: str) -> str:
    """Return `text` in composed form (NFC), its line ends as newlines, without invisible characters.

    Control characters and lone surrogates become spaces; U+2029, the paragraph separator, becomes a blank line.
    """
    text = CONTROL.sub(" ", NEWLINES.sub("\n", text))
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", UNSEEN.sub("", text).replace("\u2029", "\n\n"))


def chunks(text: str, unit: str = "paragraph", *, counts: Counter | None = None, **how) -> list[str]:
    """Return the chunks of one article, in order; whitespace in them is single spaces (units paragraph, sentence).

    `how`: the fields of Cut. `counts` counts what was dropped. Raises LVMError on a value that cannot be used.
    """
    cut, counts = Cut(unit, **how), Counter() if counts is None else counts
    paragraphs = [" ".join(block.split()) for block in re.split(r"\n\s*\n", clean(text)) if block.strip()]
    if cut.unit == "tokens":
        pieces: Iterable[str] = _windows("\n".join(paragraphs), cut)
    elif cut.unit == "sentence":
        pieces = (sentence for paragraph in paragraphs for sentence in _sentences(paragraph, cut.language))
    else:
        pieces = (part for paragraph in paragraphs for part in _parts(paragraph, cut, counts))
    chosen = []
    for chunk in pieces:
        if len(chunk) < cut.shortest:
            counts[f"chunks shorter than {cut.shortest} characters"] += 1
        elif cut.longest is not None and len(chunk) > cut.longest:
            counts[f"chunks longer than {cut.longest} characters"] += 1
        elif not LETTER.search(chunk):
            counts["chunks without a letter"] += 1
        else:
            chosen.append(chunk)
    return chosen


def _sentences(paragraph: str, language: str) -> Iterator[str]:
    return filter(None, map(str.strip, require("sentencex").segment(language, paragraph)))


def _parts(paragraph: str, cut: Cut, counts: Counter) -> list[str]:
    """Return a paragraph as it is, or, if it is too long, its sentences in as few runs as fit into `longest`."""
    if cut.longest is None or len(paragraph) <= cut.longest:
        return [paragraph]
    counts[f"paragraphs longer than {cut.longest} characters, split"] += 1
    parts = [""]
    for sentence in _sentences(paragraph, cut.language):
        if parts[-1] and len(parts[-1]) + 1 + len(sentence) <= cut.longest:
            parts[-1] += " " + sentence
        else:
            parts.append(sentence)  # one that is too long by itself is dropped and counted by the caller
    return parts[1:]


def _windows(text: str, cut: Cut) -> Iterator[str]:
    if not getattr(cut.tokenizer, "is_fast", False):
        kind = type(cut.tokenizer).__name__
        raise LVMError(f"tokenizer: unit tokens needs a fast tokenizer, not {kind}; take another encoder")
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "truncation": False, "verbose": False}
    spans, base = [], 0
    for line in text.split("\n"):  # a paragraph at a time: the offsets of a whole book take too much memory
        if line:
            offsets = cut.tokenizer(line, **options)["offset_mapping"]
            spans += [(base + begin, base + end) for begin, end in offsets if end > begin]  # some cover no text
        base += len(line) + 1
    for start in range(0, max(1, len(spans) - cut.overlap), cut.tokens - cut.overlap):
        tokens = spans[start : start + cut.tokens]
        window = text[tokens[0][0] : tokens[-1][1]].strip() if tokens else ""
        if window:
            yield window


def write_chunks(
    documents: Iterable[Document],
    folder: Path,
    *,
    near_duplicates: float | None = 0.9,
    boilerplate: int | None = 3,
    counts: Counter | None = None,
    progress: Callable[[int, str], None] = lambda done, what: None,
    **how,
) -> None:
    """Cut documents into chunks, drop what repeats, and write the others into a new `folder`, as stage.py describes.

    Positions count the chunks that stay; articles without one are left out. Chunks are the same if their words are, up
    to case, digits, punctuation and whitespace. Chunks that are in `boilerplate` or more articles are all dropped; of
    other repeats the first stays. Then a chunk is dropped if its set of word triples has a Jaccard similarity of
    `near_duplicates` or more to an earlier chunk that stays (found by MinHash, which misses about 1 pair in 2,000).
    0 or None switches either off. `how`: the fields of Cut. `progress(done, what)` is called with the articles read
    and the chunks compared. Raises LVMError on bad options, and if no chunk remains.
    """
    cut = Cut(**how)
    _check_drops(cut, near_duplicates, boilerplate)
    counts = Counter() if counts is None else counts
    index = folder / "index.sqlite"
    try:
        with closing(sqlite3.connect(index, isolation_level=None)) as database:
            for statement in SCHEMA:
                database.execute(statement)
            heads = _read(documents, how, database, counts, progress)
            articles = array("i")  # of the chunks that stay
            with open(folder / "texts.jsonl", "wb") as texts:
                for article, line in _remaining(database, near_duplicates or 0, boilerplate or 0, counts, progress):
                    articles.append(article)
                    texts.write(line)
    finally:
        index.unlink(missing_ok=True)
    if not articles:
        raise LVMError(f"all chunks repeat each other ({dict(counts)}); set boilerplate and near_duplicates to 0")
    remaining, number, size = np.unique(articles, return_inverse=True, return_counts=True)
    position = np.arange(len(number)) - np.repeat(np.cumsum(size) - size, size)
    counts["articles without a remaining chunk"] = len(heads) - len(remaining)
    counts["articles"], counts["chunks"] = len(remaining), len(number)
    counts["articles of one chunk"] = int((size == 1).sum())
    titles, sources = zip(*(heads[article] for article in remaining), strict=True)
    write_tables(folder, np.stack([number, position], 1).astype(np.int32), titles, sources, counts)


def _check_drops(cut: Cut, near_duplicates: float | None, boilerplate: int | None) -> None:
    for name, value, types, least, most in (
        ("near_duplicates", near_duplicates, int | float, 0.5, 1),
        ("boilerplate", boilerplate, int, 2, np.inf),
    ):
        valid = isinstance(value, types | None) and not isinstance(value, bool)
        if not valid or (value and not least <= value <= most):
            raise LVMError(f"{name}: {value!r} is no number from {least} to {most}; correct it, or take 0 for none")
    jaccard = cut.overlap / (2 * cut.tokens - cut.overlap) if cut.unit == "tokens" else 0  # of one window to the next
    if near_duplicates and jaccard >= near_duplicates - 0.05:
        raise LVMError(
            f"overlap: windows of {cut.tokens} tokens that share {cut.overlap} are near-duplicates of each other "
            f"(Jaccard {jaccard:.2f}, near_duplicates {near_duplicates}); lower overlap or drop near_duplicates"
        )


def _read(documents, how: dict, database, counts: Counter, progress) -> list[tuple[str, str]]:
    """First pass: put all chunks into the database, and for each hash the articles that hold it.

    Returns the articles' titles and sources.
    """
    heads, row = [], 0
    for article, document in enumerate(documents):
        heads.append((document.title, document.source))
        for chunk in chunks(document.text, counts=counts, **how):
            line = json.dumps(chunk, ensure_ascii=False).encode() + b"\n"
            mark = int.from_bytes(blake2b(normal(chunk).encode(), digest_size=8).digest(), "little", signed=True)
            database.execute("INSERT INTO chunk VALUES (?, ?, ?, ?)", (row, article, mark, line))
            database.execute(COUNT_ARTICLES, (mark, row, article))
            row += 1
        progress(article + 1, "articles read")
    counts["articles read"], counts["chunks cut"] = len(heads), row
    if not row:
        raise LVMError(f"no chunk in {len(heads)} articles ({dict(counts)}); lower shortest, or look at the source")
    return heads


def _remaining(database, near_duplicates: float, boilerplate: int, counts: Counter, progress) -> Iterator:
    """Second pass: yield (article, line of texts.jsonl) of the chunks that stay; count the others."""

    def read(row: int) -> str:
        return json.loads(database.execute("SELECT line FROM chunk WHERE row = ?", (row,)).fetchone()[0])

    for reason in ("boilerplate chunks", "repeated chunks", "near-duplicate chunks"):
        counts[reason] = 0
    near = NearDuplicates(database, near_duplicates, read) if near_duplicates else None
    for row, article, line, first, holders in database.execute(COMPARED):
        if boilerplate and holders >= boilerplate:
            counts["boilerplate chunks"] += 1
        elif first != row:
            counts["repeated chunks"] += 1
        elif near and near.repeats(row, normal(json.loads(line))):
            counts["near-duplicate chunks"] += 1
        else:
            yield article, line
        progress(row + 1, "chunks compared")
