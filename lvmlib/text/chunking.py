"""Text to chunks (paragraphs, sentences or windows of tokens), and a corpus to the chunks that a store is made of.

Units
    paragraph   parted by blank lines; a single newline joins lines
    sentence    as sentencex splits a paragraph; a sentence never crosses paragraphs
    tokens      windows of a fixed number of the encoder's own tokens, each beginning `tokens − overlap` after the last

Axes: M chunks, A articles. `write_chunks` keeps its indexes in an SQLite file, so memory does not grow with M.
"""

from __future__ import annotations

import csv
import difflib
import json
import os
import re
import sqlite3
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LVMError, extra
from ..io.disk import sync, write_whole
from .sources import Document

UNITS = ("paragraph", "sentence", "tokens")
SHORTEST = {"paragraph": 80, "sentence": 30, "tokens": 0}  # characters of a chunk, unless told otherwise
# ISO 639-1. For a code that it does not know, sentencex takes English rules without a word; so codes are checked here.
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
NO_LETTER = re.compile(r"[\W\d_]+")
# Scripts that put no space between words: a character counts as a word there.
SPACELESS = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")

PERMUTATIONS = 128  # of a MinHash signature
SHINGLE = 3  # words
BUCKET = 16  # chunks listed under one band of the signature: what bounds the search in a corpus of templates
BATCH = 4096  # chunks written to the index at a time
STAGE_FILES = ("texts.jsonl", "chunks.npy", "documents.csv", "chunked.json")
WORK_FILES = ("index.sqlite", "rows.bin", "texts.part", "documents.part", "chunks.part", "chunked.json.partial")


@dataclass(frozen=True)
class Cut:
    """How text is cut, checked; `cut` makes it."""

    unit: str
    shortest: int
    longest: int | None
    tokens: int
    overlap: int
    tokenizer: Any
    language: str


def clean(text: str) -> str:
    """`text` in Unicode's composed form (NFC), its line ends as newlines, without characters that nobody reads.

    Control characters and lone surrogates become spaces; soft hyphens, zero-width spaces, direction and byte-order
    marks go; U+2029, the paragraph separator, becomes a blank line.
    """
    text = CONTROL.sub(" ", NEWLINES.sub("\n", text))
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", UNSEEN.sub("", text).replace("\u2029", "\n\n"))


def cut(
    unit: str = "paragraph",
    *,
    shortest: int | None = None,
    longest: int | None = None,
    tokens: int = 128,
    overlap: int = 32,
    tokenizer=None,
    language: str = "en",
) -> Cut:
    """How `chunks` and `write_chunks` cut, checked. Raises LVMError on anything that cannot be used.

    `shortest`, `longest`: characters of a chunk; default 80 for a paragraph, 30 for a sentence, 0 for tokens, and no
    longest. A chunk below `shortest` is dropped. A paragraph above `longest` is split at its sentence ends into parts
    as long as fit; a sentence or window above it is dropped. `tokens`, `overlap`, `tokenizer` (a fast one of Hugging
    Face): for unit tokens; a window is the text from its first token to its last, as it stands; a last window that
    would only repeat tokens of the one before is not made. `language`: ISO 639-1, for the sentence ends.
    """
    if unit not in UNITS:
        near = difflib.get_close_matches(str(unit), UNITS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise LVMError(f"unit: unknown {unit!r}{hint}; known: {', '.join(UNITS)}")
    sizes = {"shortest": (shortest, 0), "longest": (longest, 1), "tokens": (tokens, 1), "overlap": (overlap, 0)}
    for name, (value, least) in sizes.items():
        if value is None and name in ("shortest", "longest"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise LVMError(f"{name}: {value!r} is not a whole number of at least {least}; change it")
    shortest = SHORTEST[unit] if shortest is None else shortest
    if longest is not None and longest < shortest:
        raise LVMError(f"longest: {longest} characters is less than shortest ({shortest}); no chunk could be both")
    if unit == "tokens":
        if overlap >= tokens:
            raise LVMError(f"overlap: {overlap} of {tokens} tokens would never move on; make it smaller than tokens")
        if not getattr(tokenizer, "is_fast", False):
            raise LVMError(
                "tokenizer: unit 'tokens' needs the encoder's own fast tokenizer (is_fast), which tells where a token "
                f"lies in the text; given is {type(tokenizer).__name__}"
            )
    if not isinstance(language, str) or not re.fullmatch(r"[a-z]{2}([-_]\w{1,16})?", language, re.IGNORECASE):
        raise LVMError(f"language: {language!r} is no two-letter code of ISO 639-1, such as en, de or ja")
    language = language.lower().replace("_", "-")
    if language[:2] not in LANGUAGES:
        raise LVMError(
            f"language: unknown code {language!r} in ISO 639-1; name the language whose punctuation is nearest, "
            "such as en, de or ja"
        )
    return Cut(unit, shortest, longest, tokens, overlap, tokenizer, language)


def chunks(text: str, unit: str = "paragraph", *, counts: MutableMapping | None = None, **how) -> list[str]:
    """The chunks of one article's `text`, in order; whitespace in them is single spaces (units paragraph, sentence).

    `how`: see `cut`. `counts` takes note of what was dropped. Raises LVMError on a value that cannot be used.
    """
    return _chunks(text, cut(unit, **how), {} if counts is None else counts)


def _chunks(text: str, how: Cut, counts: MutableMapping) -> list[str]:
    paragraphs = _paragraphs(clean(text))
    if how.unit == "tokens":
        found: Iterable[str] = _windows("\n".join(paragraphs), how)
    elif how.unit == "sentence":
        found = (s for paragraph in paragraphs for s in _sentences(paragraph, how.language))
    elif how.longest is None:
        found = paragraphs
    else:
        found = (part for paragraph in paragraphs for part in _parts(paragraph, how, counts))
    kept = []
    for chunk in found:
        if len(chunk) < how.shortest:
            _count(counts, f"chunks shorter than {how.shortest} characters")
        elif how.longest is not None and len(chunk) > how.longest:
            _count(counts, f"chunks longer than {how.longest} characters")
        elif not LETTER.search(chunk):
            _count(counts, "chunks without a letter")
        else:
            kept.append(chunk)
    return kept


def _count(counts: MutableMapping, what: str, number: int = 1) -> None:
    counts[what] = counts.get(what, 0) + number


def _paragraphs(text: str) -> list[str]:
    found, lines = [], []
    for line in text.split("\n"):
        words = line.split()
        if words:
            lines += words
        elif lines:
            found.append(" ".join(lines))
            lines = []
    if lines:
        found.append(" ".join(lines))
    return found


def _sentences(paragraph: str, language: str) -> Iterator[str]:
    for sentence in extra("sentencex").segment(language, paragraph):
        sentence = sentence.strip()
        if sentence:
            yield sentence


def _parts(paragraph: str, how: Cut, counts: MutableMapping) -> Iterator[str]:
    """A paragraph as it is, or, if it is too long, its sentences in as few runs as fit into `longest`."""
    if len(paragraph) <= how.longest:
        yield paragraph
        return
    _count(counts, f"paragraphs longer than {how.longest} characters, split")
    part = ""
    for sentence in _sentences(paragraph, how.language):
        if part and len(part) + 1 + len(sentence) <= how.longest:
            part += " " + sentence
            continue
        if part:
            yield part
        part = sentence  # one that is too long by itself is dropped and counted by the caller
    if part:
        yield part


def _windows(text: str, how: Cut) -> Iterator[str]:
    begins, ends, base = [], [], 0
    for line in text.split("\n"):  # a paragraph at a time: the offsets of a whole book would fill the memory
        if line:
            made = how.tokenizer(
                line, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
            )
            for begin, end in made["offset_mapping"]:
                if end > begin:  # a token that covers no text has no place
                    begins.append(base + begin)
                    ends.append(base + end)
        base += len(line) + 1
    start = 0
    while start == 0 or len(begins) - start > how.overlap:
        last = min(start + how.tokens, len(begins)) - 1
        if last < 0:
            return
        window = text[begins[start] : ends[last]].strip()
        if window:
            yield window
        start += how.tokens - how.overlap


def normal(chunk: str) -> str:
    """What of a chunk counts when two are compared: its words in lower case, without digits and punctuation."""
    words = NO_LETTER.sub(" ", chunk.casefold())
    if not words.isascii():
        words = SPACELESS.sub(r" \1 ", words)
    return " ".join(words.split())


def shingles(words: str) -> np.ndarray:
    """The set of word triples of a normalised chunk, as sorted 32-bit marks (uint32); of one or two words, that one."""
    parts = words.encode().split(b" ")
    marks = np.fromiter(map(zlib.crc32, parts), np.uint64, len(parts))
    if len(marks) >= SHINGLE:
        made = marks[: len(marks) - SHINGLE + 1]
        for k in range(1, SHINGLE):  # a polynomial in the marks, modulo 2^64
            made = made * np.uint64(0x9E3779B97F4A7C15) + marks[k : len(marks) - SHINGLE + 1 + k]
    else:
        made = marks[:1] * np.uint64(0x9E3779B97F4A7C15) + marks[-1:]
    made = (made ^ (made >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.unique((made >> np.uint64(32)).astype(np.uint32))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|a ∩ b| / |a ∪ b| of two sets of marks."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows) of the signature: the longest bands that still miss at most 1 in 2,000 pairs at `threshold`.

    A pair of Jaccard similarity s shares a band with probability 1 − (1 − s^rows)^bands.
    """
    for rows in range(PERMUTATIONS, 1, -1):
        bands = PERMUTATIONS // rows
        if (1 - threshold**rows) ** bands <= 5e-4:
            return bands, rows
    return PERMUTATIONS, 1


class _Near:
    """Finds the earlier chunk that a chunk nearly repeats: bands of MinHash signatures name a few, their shingles
    decide. The bands lie in SQLite; the text of an earlier chunk is read again from the file of chunks."""

    def __init__(self, database: sqlite3.Connection, threshold: float, read: Callable[[int], str]):
        self.database, self.threshold, self.read = database, threshold, read
        self.bands, self.rows = bands_for(threshold)
        # Marks of 32 bits go in, so that a hash function is not needed.
        self.empty = extra("datasketch").MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int)
        # A band's key: a polynomial in its hash values and its number, modulo 2^64; the seed makes it the same always.
        self.weights = np.random.default_rng(1).integers(1, 2**63, self.rows, dtype=np.uint64) | np.uint64(1)
        self.shifts = np.random.default_rng(2).integers(1, 2**63, self.bands, dtype=np.uint64)
        self.query = f"SELECT key, row FROM band WHERE key IN ({','.join('?' * self.bands)})"
        database.execute("CREATE TABLE band (key INTEGER, row INTEGER, PRIMARY KEY (key, row)) WITHOUT ROWID")

    def keys(self, marks: np.ndarray) -> list[int]:
        signature = self.empty.copy()
        signature.update_batch(marks.tolist())
        values = signature.hashvalues[: self.bands * self.rows].astype(np.uint64).reshape(self.bands, self.rows)
        return ((values * self.weights).sum(1, dtype=np.uint64) + self.shifts).view(np.int64).tolist()

    def repeats(self, row: int, words: str) -> bool:
        """Whether chunk `row` nearly repeats an earlier one; if not, it is listed for those that follow."""
        marks = shingles(words)
        keys = self.keys(marks)
        shared: dict[int, int] = {}
        listed: dict[int, int] = {}
        for key, other in self.database.execute(self.query, keys):
            shared[other] = shared.get(other, 0) + 1
            listed[key] = listed.get(key, 0) + 1
        for other in sorted(shared, key=lambda r: (-shared[r], r)):
            if jaccard(marks, shingles(normal(self.read(other)))) >= self.threshold:
                return True
        free = [(key, row) for key in keys if listed.get(key, 0) < BUCKET]
        self.database.executemany("INSERT OR IGNORE INTO band VALUES (?, ?)", free)
        return False


ROW = np.dtype([("article", "<i4"), ("mark", "<i8"), ("at", "<i8")])  # a chunk: its article, text mark, place in file


def write_chunks(
    documents: Iterable[Document],
    folder: str | os.PathLike,
    *,
    unit: str = "paragraph",
    near_duplicates: float | None = 0.9,
    boilerplate: int = 3,
    counts: MutableMapping | None = None,
    progress: Callable[[int, str], None] | None = None,
    **how,
) -> None:
    """Cut documents into chunks, drop what repeats, and write what remains into `folder`:

        texts.jsonl     a JSON string a row: the chunks (M)
        chunks.npy      (M, 2) int32: article 0 … A − 1, position 0, 1, 2, … within it (dropped chunks close up)
        documents.csv   article, title, source (A); articles without a remaining chunk are left out
        chunked.json    the counts; written last and whole: this stage is finished

    Two chunks are the same if their words are, up to case, digits, punctuation and whitespace. Those that stand in
    `boilerplate` or more articles all go; of other repeats the first stays, always. Of chunks whose sets of word
    triples have a Jaccard similarity of `near_duplicates` or more to one that stays before them, none stays (found by
    MinHash, which misses about 1 pair in 2,000, and settled by the sets themselves). 0 or None switches boilerplate or
    near-duplicates off. The same documents give the same files. `how`: see `cut`.
    `progress(done, what)` hears of articles read and chunks compared. Raises LVMError on bad options, if no chunk
    remains, or if the folder cannot be written.
    """
    asked = cut(unit, **how)
    _check_drops(asked, near_duplicates, boilerplate)
    folder, counts = Path(folder), {} if counts is None else counts
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*STAGE_FILES, *WORK_FILES):
            (folder / name).unlink(missing_ok=True)
        with ExitStack() as stack:
            stack.callback(lambda: [(folder / name).unlink(missing_ok=True) for name in WORK_FILES])
            database = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
            stack.callback(database.close)
            for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "cache_size=-131072"):
                database.execute(f"PRAGMA {pragma}")
            database.execute("BEGIN")
            _read(documents, folder, asked, database, counts, progress)
            _drop(folder, database, near_duplicates or 0, boilerplate or 0, counts, progress)
        sync(folder)  # before the file that says that they are whole
        text = json.dumps(dict(counts), indent=1, ensure_ascii=False)
        write_whole(folder / "chunked.json", lambda partial: partial.write_text(text, encoding="utf-8"))
    except (OSError, sqlite3.Error) as e:
        raise LVMError(f"{folder}: the chunks cannot be written there ({e}); free some room, or name another") from e


def _check_drops(how: Cut, near_duplicates: float | None, boilerplate: int | None) -> None:
    number = isinstance(near_duplicates, (int, float)) and not isinstance(near_duplicates, bool)
    if near_duplicates is not None and not (number and (near_duplicates == 0 or 0.5 <= near_duplicates <= 1)):
        raise LVMError(f"near_duplicates: {near_duplicates!r} must lie between 0.5 and 1; 0 switches it off")
    whole = isinstance(boilerplate, int) and not isinstance(boilerplate, bool)
    if boilerplate is not None and not (whole and (boilerplate == 0 or boilerplate >= 2)):
        raise LVMError(
            f"boilerplate: {boilerplate!r} must be a number of articles, at least 2; 0 switches it off (1 would drop "
            "every chunk)"
        )
    if how.unit == "tokens" and near_duplicates:
        alike = how.overlap / (2 * how.tokens - how.overlap)
        if alike >= near_duplicates - 0.05:
            raise LVMError(
                f"overlap: windows of {how.tokens} tokens that share {how.overlap} have a Jaccard similarity of "
                f"{alike:.2f}: near-duplicates of each other at {near_duplicates}; lower the overlap, or set "
                "near_duplicates to 0"
            )


def _read(documents, folder: Path, how: Cut, database, counts, progress) -> None:
    """First pass: the chunks of all documents into work files; for each text mark, how many articles hold it."""
    database.execute("CREATE TABLE same (mark INTEGER PRIMARY KEY, row INTEGER, articles INTEGER, last INTEGER)")
    upsert = (
        "INSERT INTO same VALUES (?, ?, 1, ?) ON CONFLICT (mark) DO UPDATE SET "
        "articles = articles + (last <> excluded.last), last = excluded.last"
    )
    at = row = article = 0
    batch: list[tuple[int, int, int]] = []
    with ExitStack() as stack:
        texts, rows = (stack.enter_context(open(folder / name, "wb")) for name in ("texts.part", "rows.bin"))
        heads = stack.enter_context(open(folder / "documents.part", "w", encoding="utf-8", newline="\n"))
        for article, document in enumerate(documents, 1):
            heads.write(json.dumps([document.title, document.source]) + "\n")
            for chunk in _chunks(document.text, how, counts):
                line = json.dumps(chunk, ensure_ascii=False).encode() + b"\n"
                texts.write(line)
                mark = int.from_bytes(blake2b(normal(chunk).encode(), digest_size=8).digest(), "little", signed=True)
                batch.append((mark, row, article - 1))
                rows.write(np.array((article - 1, mark, at), ROW).tobytes())
                at += len(line)
                row += 1
            if len(batch) >= BATCH:
                batch.sort()  # neighbours in the index together; of equal marks the articles stay in order
                database.executemany(upsert, batch)
                batch = []
            if progress:
                progress(article, "articles read")
        batch.sort()
        database.executemany(upsert, batch)
    counts["articles read"], counts["chunks cut"] = article, row
    if not row:
        dropped = ", ".join(f"{k}: {v}" for k, v in counts.items()) or "there was none"
        raise LVMError(f"no chunk in {article} articles ({dropped}); lower shortest, or look at the source")


def _drop(folder: Path, database, near_duplicates: float, boilerplate: int, counts, progress) -> None:
    """Second pass: the work files in order; what stays goes into the files of the stage."""
    table = np.memmap(folder / "rows.bin", ROW, "r")
    why = dict.fromkeys(("boilerplate chunks", "repeated chunks", "near-duplicate chunks"), 0)
    articles = 0
    with ExitStack() as stack:
        earlier, source = (stack.enter_context(open(folder / "texts.part", "rb")) for _ in range(2))
        texts = stack.enter_context(open(folder / "texts.jsonl", "wb"))
        kept = stack.enter_context(open(folder / "chunks.part", "wb"))
        heads = stack.enter_context(open(folder / "documents.part", encoding="utf-8"))
        listed = csv.writer(
            stack.enter_context(open(folder / "documents.csv", "w", encoding="utf-8", newline="")), lineterminator="\n"
        )
        listed.writerow(["article", "title", "source"])

        def read(row: int) -> str:
            earlier.seek(int(table["at"][row]))
            return json.loads(earlier.readline())

        near = _Near(database, near_duplicates, read) if near_duplicates else None
        head = current = position = -1
        for first in range(0, len(table), BATCH):
            block = table[first : first + BATCH]
            seen = _seen(database, block["mark"])
            for row, (article, mark, _) in enumerate(block.tolist(), first):
                line = next(source)
                original, holders = seen[mark]
                if boilerplate and holders >= boilerplate:
                    why["boilerplate chunks"] += 1
                    continue
                if original != row:
                    why["repeated chunks"] += 1
                    continue
                if near and near.repeats(row, normal(json.loads(line))):
                    why["near-duplicate chunks"] += 1
                    continue
                if article != current:
                    skipped = article - head - 1
                    title, where = json.loads(next(islice(heads, skipped, None)))
                    listed.writerow([articles, title, where])
                    articles, head, current, position = articles + 1, article, article, 0
                texts.write(line)
                kept.write(np.array((articles - 1, position), "<i4").tobytes())
                position += 1
            if progress:
                progress(min(first + BATCH, len(table)), "chunks compared")
    for name, number in why.items():
        counts[name] = number
    if not articles:
        raise LVMError(
            f"all {len(table)} chunks repeat each other ({why}); look at the source, or set boilerplate and "
            "near_duplicates to 0"
        )
    counts["articles without a remaining chunk"] = counts["articles read"] - articles
    counts["articles"] = articles
    kept = np.memmap(folder / "chunks.part", "<i4", "r").reshape(-1, 2)
    counts["chunks"] = len(kept)
    np.save(folder / "chunks.npy", kept)
    ends = np.append(np.flatnonzero(np.diff(kept[:, 0])), len(kept) - 1)
    counts["articles of one chunk"] = int((kept[ends, 1] == 0).sum())


def _seen(database, marks: np.ndarray) -> dict[int, tuple[int, int]]:
    """mark → (row of its first chunk, number of articles that hold it)."""
    wanted, found = np.unique(marks).tolist(), {}
    for first in range(0, len(wanted), 512):
        some = wanted[first : first + 512]
        query = f"SELECT mark, row, articles FROM same WHERE mark IN ({','.join('?' * len(some))})"
        found.update((mark, (row, articles)) for mark, row, articles in database.execute(query, some))
    return found
