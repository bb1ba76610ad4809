"""Place the windows of sequence files on the chunks of an article table, or rebuild that table from the windows.

Axes: N windows of a file, B windows of a block, T context length, D vector dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import LVMError
from . import npz as npz_format
from .npz import BIGGEST
from .original_read import Sequences, Table, allocate, chunk_key, note_norms, stored_type, unit

SAME = 0.999  # two vectors with a cosine above are the same chunk: float16 changes it by less than 1e-6
HORIZONS = range(1, 17)
MIXED = "the files do not belong together"
BORDER = "windows across the border of two articles, dropped"
FEW = 10  # one window in so many has to fit: of short articles, most may cross a border
SAMPLE = 256  # windows of a file from which the horizon is deduced


class Placing:
    """Finds the first row of each window of sequence files in a table, and checks every vector of it.

    `horizon`: None until it is deduced from the first block; all files have the same. `gaps`: the name under which
    `counts` counts windows across a gap; None: they are refused.
    """

    def __init__(self, table: Table, horizon: int | None, drop_bad: bool, gaps: str | None, counts: dict):
        self.rebuilt = horizon is not None
        self.table, self.horizon, self.drop_bad, self.gaps, self.counts = table, horizon, drop_bad, gaps, counts

    def starts(self, s: Sequences) -> np.ndarray:
        """(N,) first rows of the windows of a file, −1 for those that are dropped."""
        # In a rebuilt table positions count from an article's first chunk.
        early = s.indices < self._span(s) if self.rebuilt else np.zeros(s.count, bool)
        self._count(BORDER, early.sum())
        absent = np.flatnonzero(~np.isin(s.ids, list(self.table.spans)) & ~early)
        if len(absent):
            raise self._fault(s, absent[0], f"{self.table.where} does not have it ({len(absent)} such windows)")
        starts, last = np.full(s.count, -1, np.int64), {}
        for number, x in s.blocks(self.drop_bad, []):
            number, x = number[~early[number]], unit(x[~early[number]])
            if self.horizon is None:
                self._deduce(s, number[:SAMPLE], x[:SAMPLE])
            start = self._by_vectors(s, number, x, last) if s.indices is None else self._by_index(s, number, x)
            placed = start >= 0
            first, end = np.where(placed, start, 0), np.where(placed, start + self._span(s), 0)
            gap = placed & (self.table.position[end] - self.table.position[first] != self._span(s))
            for i in np.flatnonzero(gap):
                self._gap(s, number[i])
            touched = placed & ~gap & self.table.touched(first, end)
            self._count("windows that touch dropped vectors", touched.sum())
            starts[number] = np.where(gap | touched, -1, start)
        return starts

    def _span(self, s: Sequences) -> int:
        return s.length - 1 + self.horizon

    def _count(self, why: str, count: int = 1) -> None:
        if count:
            self.counts[why] = self.counts.get(why, 0) + int(count)

    def _fault(self, s: Sequences, number: int, what: str, advice: str = MIXED) -> LVMError:
        return LVMError(f"{s.path}: window {number} (article {s.ids[number]}): {what}; {advice}")

    def _gap(self, s: Sequences, number: int) -> None:
        if self.gaps is None:
            raise self._fault(s, number, "crosses a gap in chunk_indices", "use drop_bad (--drop-bad)")
        self._count(self.gaps)

    def _deduce(self, s: Sequences, number: np.ndarray, x: np.ndarray) -> None:
        """Set the horizon: that at which most of the first windows fit, and fit best."""
        cosines = {}
        for self.horizon in HORIZONS:
            if s.indices is None:
                cosines[self.horizon] = np.array([fit.max(initial=-1) for _, fit in self._fits(s, number, x)])
            else:
                start = self.table.find(s.ids[number], s.indices[number]) - self._span(s)
                cosines[self.horizon] = self._cosines(s, start, s.ids[number], x).min(1)
        self.horizon = _best_horizon(cosines, str(s.path), MIXED)

    def _cosines(self, s: Sequences, start: np.ndarray, ids: np.ndarray, x: np.ndarray) -> np.ndarray:
        """(B, T + 1) cosines of windows (B, T + 1, D) with those that begin at rows `start`."""
        rows = start[:, None] + np.append(np.arange(s.length), self._span(s))
        return self.table.cosine(x, rows, ids[:, None])

    def _by_index(self, s: Sequences, number: np.ndarray, x: np.ndarray) -> np.ndarray:
        """(B,) first rows, by article number and target index."""
        ids = s.ids[number]
        start = self.table.find(ids, s.indices[number].astype(np.int64)) - self._span(s)
        for i in np.flatnonzero(self._cosines(s, start, ids, x).min(1) <= SAME):
            self._explain(s, number[i], x[i])
            start[i] = -1
        return start

    def _explain(self, s: Sequences, number: int, x: np.ndarray) -> None:
        """Raise LVMError for a window (T + 1, D) that does not fit. Only count one that begins in the article before,
        or of which a chunk before the target is missing, if such windows are dropped."""
        article, t = s.ids[number], int(s.indices[number])
        first, target = t - self._span(s), int(self.table.find(article, t))
        outside = target >= 0 and first < self.table.position[self.table.spans[article][0]]
        if outside and self.table.cosine(x[-1], target, article) > SAME:
            self._count(BORDER)  # the original's tools cut through all articles, one after the other
            return
        rows = self.table.find(article, np.append(first + np.arange(s.length), t))
        cosine = np.where(rows < 0, -1, self.table.cosine(x, rows, article))
        if cosine.min() > SAME:
            self._gap(s, number)
            return
        shown = ", ".join("none" if c == -1 else f"{c:.3f}" for c in cosine)
        chunks = f"chunks {first} to {first + s.length - 1} and {t}"
        raise self._fault(s, number, f"at horizon {self.horizon} its cosines with {chunks} are {shown}")

    def _fits(self, s: Sequences, number: np.ndarray, x: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """For each window: (place in the block, smallest cosine with the window at each row of its article)."""
        steps = [*range(s.length), self._span(s)]
        for article in dict.fromkeys(s.ids[number].tolist()):
            begin, end = self.table.spans[article]
            own, count = np.flatnonzero(s.ids[number] == article), max(0, end - begin - self._span(s))
            rows = max(1, npz_format.BLOCK_BYTES // (4 * s.dim))  # of the article at a time
            size = len(own) * (s.length + 1) * (end - begin)
            for part in np.array_split(own, size // npz_format.BLOCK_BYTES + 1):
                wanted = x[part].reshape(-1, s.dim).T
                pieces = (self.table.vectors[a : min(a + rows, end)] for a in range(begin, end, rows))
                cosine = np.concatenate([unit(piece.astype(np.float32)) @ wanted for piece in pieces])
                cosine[self.table.bad[begin:end]] = 1
                cosine = cosine.reshape(end - begin, len(part), -1)
                fit = np.min([cosine[step : step + count, :, j] for j, step in enumerate(steps)], 0)
                yield from zip(part, fit.T, strict=True)

    def _by_vectors(self, s: Sequences, number: np.ndarray, x: np.ndarray, last: dict) -> np.ndarray:
        """(B,) first rows, by article number alone. Of several equal places the next one after that of the article's
        window before (`last`)."""
        table, starts = self.table, np.empty(len(number), np.int64)
        for i, fit in self._fits(s, number, x):
            article = int(s.ids[number[i]])
            first = np.flatnonzero(fit > SAME)
            if not len(first) and self._begins_before(s, article, x[i, -1]):
                self._count(BORDER)
                starts[i] = -1
                continue
            if not len(first):
                best = fit.max(initial=-1)
                raise self._fault(s, number[i], f"is nowhere at horizon {self.horizon} (best cosine {best:.3f})")
            fit, first = fit[first], first + table.spans[article][0]
            end = first + self._span(s)
            gapless = table.position[end] - table.position[first] == self._span(s)
            rank = gapless * (2 - table.touched(first, end))  # without gap and dropped vectors, if there are such
            best = rank == rank.max()
            first = first[best][fit[best] > fit[best].max() - 1e-6]
            self._count("windows with several equal places in their article", len(first) > 1)
            later = first[first > last.get(article, -1)]
            last[article] = starts[i] = later[0] if len(later) else first[0]
        return starts

    def _begins_before(self, s: Sequences, article: int, target: np.ndarray) -> bool:
        """Whether `target` (D,) is one of the article's first chunks, which no window inside it can have as target."""
        begin, end = self.table.spans[article]
        rows = np.arange(begin, min(begin + self._span(s), end))
        return bool((self.table.cosine(target, rows, article) > SAME).any())


def _best_horizon(cosines: dict[int, np.ndarray], where: str, advice: str) -> int:
    """The horizon at which the largest part of the targets is found, and with the best mean cosine.

    Raises LVMError if there is none at which one in `FEW` is, or if several are equal.
    """
    fits = {}
    for horizon, cosine in cosines.items():
        same = cosine[cosine > SAME]
        if len(same) > len(cosine) / FEW:
            fits[horizon] = round(len(same) / len(cosine), 2), round(float(same.mean()), 6)
    best = [horizon for horizon, fit in fits.items() if fit == max(fits.values())]
    if len(best) != 1:
        compared = max(map(len, cosines.values()))
        raise LVMError(
            f"{where}: of the horizons {HORIZONS[0]} to {HORIZONS[-1]}, {', '.join(map(str, best)) or 'none'} fit the "
            f"targets of {compared} windows compared, and needed is exactly one; {advice}"
        )
    return best[0]


def _overlap(sequences: list[Sequences], drop_bad: bool, where: str) -> int:
    """The horizon at which targets equal what the contexts of other windows hold at their positions, by some windows of
    the longest articles of each file."""
    ids, t, vectors, steps = [], [], [], np.arange(sequences[0].length)
    for s in sequences:
        _, article, size = np.unique(s.ids, return_inverse=True, return_counts=True)
        # Those that may begin in the article before come last.
        early = s.indices <= s.length
        wanted = np.zeros(s.count, bool)
        wanted[np.lexsort((s.indices, s.ids, -size[article], early))[:SAMPLE]] = True
        for number, x in s.blocks(drop_bad, []):
            chosen = number[wanted[number]]
            ids, t, vectors = [*ids, s.ids[chosen]], [*t, s.indices[chosen]], [*vectors, x[wanted[number]]]
            if number[-1] >= np.flatnonzero(wanted)[-1]:
                break
    if not vectors:
        raise LVMError(f"{where}: no window is left once those with bad vectors are dropped; repair the files")
    ids, t, x = np.concatenate(ids), np.concatenate(t).astype(np.int64), unit(np.concatenate(vectors))
    keys, which = np.unique(chunk_key(ids[:, None], t[:, None] + steps), return_index=True)  # shifted by the horizon
    known = x[:, :-1].reshape(-1, x.shape[2])[which]
    table, cosines = Table(known, keys >> 32, keys & BIGGEST, np.zeros(len(keys), bool), where), {}
    for horizon in HORIZONS:
        rows = table.find(ids, t + len(steps) - 1 + horizon)
        cosines[horizon] = table.cosine(x[:, -1], rows, ids)[rows >= 0]
    return _best_horizon(cosines, where, "give the article file as well")


def rebuild(sequences: list[Sequences], path: Path, drop_bad: bool, counts: dict) -> tuple[Table, int]:
    """The chunks that the windows of sequence files hold, in the order of their target indices, and the horizon; their
    vectors are written to `path`. If two windows differ over a chunk, `Placing` refuses one of them."""
    where = ", ".join(dict.fromkeys(str(s.path) for s in sequences))
    if all(s.known for s in sequences):
        for s in sequences:
            if s.indices is None:
                raise LVMError(
                    f"{s.path}: does not say where in its article a window is; add target_indices, or articles"
                )
        horizon = _overlap(sequences, drop_bad, where)
    else:
        horizon = 1  # nothing is known between context and target, so the one follows the other
        for s in sequences:
            s.stand_alone()
            counts[f"windows in {s.split} without an article, each taken as one of its own: no retrieval"] = s.count
    span, dim = sequences[0].length - 1 + horizon, sequences[0].dim
    steps = np.append(np.arange(sequences[0].length), span) - span
    inside = [s.indices >= span for s in sequences]  # the others begin in the article before
    if not all(own.any() for own in inside):
        raise LVMError(f"{where}: no target has an index of {span} or more (horizon {horizon}); add the article file")
    keys = [
        np.unique(chunk_key(s.ids[own][:, None], s.indices[own][:, None] + steps))
        for s, own in zip(sequences, inside, strict=True)
    ]
    keys = np.unique(np.concatenate(keys))
    vectors = allocate(path, (len(keys), dim), stored_type([s.contexts for s in sequences]), where)
    missing = np.ones(len(keys), bool)
    for s, own in zip(sequences, inside, strict=True):
        norms = []
        for number, x in s.blocks(drop_bad, norms):
            number, x = number[own[number]], x[own[number]]
            rows = np.searchsorted(keys, chunk_key(s.ids[number][:, None], s.indices[number][:, None] + steps))
            vectors[rows], missing[rows] = x, False
        note_norms(counts, f"vectors in windows of {s.split} normalised", norms)
    article, position = (keys >> 32).astype(np.int32), (keys & BIGGEST).astype(np.int32)
    return Table(vectors, article, position, missing, where), horizon
