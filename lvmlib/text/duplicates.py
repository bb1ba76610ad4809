"""Compare chunks: repeats by their words, near-duplicates by MinHash and the Jaccard similarity of word triples."""

from __future__ import annotations

import re
import sqlite3
import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np

from ..errors import require

NO_LETTER = re.compile(r"[\W\d_]+")
# Scripts that put no space between words: a character counts as a word there.
SPACELESS = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")
PERMUTATIONS = 128  # of a MinHash signature
SHINGLE = 3  # words
BUCKET = 16  # chunks listed under one band of the signature: bounds the search in a corpus of templates


def normal(chunk: str) -> str:
    """Return the words of a chunk in lower case, without digits and punctuation: equal for chunks that repeat."""
    words = NO_LETTER.sub(" ", chunk.casefold())
    if not words.isascii():
        words = SPACELESS.sub(r" \1 ", words)
    return " ".join(words.split())


def shingles(words: str) -> np.ndarray:
    """Return the hashes (sorted uint32) of a normalised chunk's word triples; of one or two words, one hash."""
    parts = words.encode().split(b" ")
    marks = np.fromiter(map(zlib.crc32, parts), np.uint64, len(parts))
    if len(marks) >= SHINGLE:
        hashes = marks[: len(marks) - SHINGLE + 1]
        for k in range(1, SHINGLE):  # a polynomial in the marks, modulo 2^64
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + marks[k : len(marks) - SHINGLE + 1 + k]
    else:
        hashes = marks[:1] * np.uint64(0x9E3779B97F4A7C15) + marks[-1:]
    hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Return |a ∩ b| / |a ∪ b| of two sets of hashes."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def bands_for(threshold: float) -> tuple[int, int]:
    """Return (bands, rows) of the signature: the longest bands that miss at most 1 in 2,000 pairs at `threshold`.

    A pair of Jaccard similarity s shares a band with probability 1 − (1 − s^rows)^bands.
    """
    for rows in range(PERMUTATIONS, 1, -1):
        bands = PERMUTATIONS // rows
        if (1 - threshold**rows) ** bands <= 5e-4:
            return bands, rows
    return PERMUTATIONS, 1


class NearDuplicates:
    """Find chunks that nearly repeat an earlier one: MinHash bands, kept in SQLite, name candidates; shingles decide.

    `read(row)` returns the text of an earlier chunk.
    """

    def __init__(self, database: sqlite3.Connection, threshold: float, read: Callable[[int], str]):
        self.database, self.threshold, self.read = database, threshold, read
        self.bands, self.rows = bands_for(threshold)
        # The shingles are 32-bit hashes already.
        self.empty = require("datasketch").MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int)
        # A band's key: a polynomial in its hash values and its number, modulo 2^64.
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
        """Return whether chunk `row` nearly repeats an earlier one; if not, list it for those that follow."""
        marks = shingles(words)
        keys = self.keys(marks)
        found = self.database.execute(self.query, keys).fetchall()
        listed, shared = Counter(key for key, _ in found), Counter(other for _, other in found)
        for other in sorted(shared, key=lambda r: (-shared[r], r)):
            if jaccard(marks, shingles(normal(self.read(other)))) >= self.threshold:
                return True
        free = [(key, row) for key in keys if listed[key] < BUCKET]
        self.database.executemany("INSERT OR IGNORE INTO band VALUES (?, ?)", free)
        return False
