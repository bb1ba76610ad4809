"""The store as arrays, windows as row numbers, batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .errors import LVMError
from .io.prefetch import prefetch

SPLITS = ("train", "val", "ood")
DIRECTIONS = {"forward": 1, "backward": -1}  # how a window is read: the step from one chunk to the next
BLOCK_VALUES = 1 << 23  # numbers that are read at a time: a store may be larger than memory


@dataclass(frozen=True, eq=False)
class GivenWindows:
    """Windows that came with a store: `split` (N,) number in SPLITS, `start` (N,) first row; all cut alike."""

    split: np.ndarray
    start: np.ndarray
    horizon: int
    context_length: int


@dataclass(frozen=True, eq=False)
class Store:
    """Vectors of a corpus with their article and position; `data.store` describes the files."""

    name: str
    vectors: np.ndarray  # (M, D)
    article: np.ndarray  # (M,) int32
    position: np.ndarray  # (M,) int32
    articles: pd.DataFrame  # indexed by article number; columns title, split and perhaps source
    datasheet: dict
    fingerprint: str  # sha256 over vectors, chunk table, splits and given windows
    texts: Sequence[str] | None = None  # (M)
    given: GivenWindows | None = None  # windows that came with the store
    opened: tuple[Path, dict] | None = None  # folder, and the state of its large files when they were checked

    @property
    def dim(self) -> int:
        return self.vectors.shape[1]

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split's chunks, in reading order."""
        begins, ends = _split_spans(self, split)
        return ranges(begins, ends - begins)


def blocks(vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of an array (M, D), some megabytes at a time."""
    rows = max(1, BLOCK_VALUES // vectors.shape[1])
    for first in range(0, len(vectors), rows):
        yield first, vectors[first : first + rows]


def neighbours(count: int) -> Iterator[tuple[int, slice]]:
    """All pairs of adjacent rows among `count`, block by block: (second row of the first pair, rows)."""
    for first in range(1, count, BLOCK_VALUES):
        yield first, slice(first - 1, first + BLOCK_VALUES)


def article_spans(article: np.ndarray, position: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(A,) and (A,) int64: each article is the rows begin … end − 1, in the order of the rows.

    `article` (M,), one run of rows for each article; with `position` (M,) a span also ends at a gap in the positions.
    """
    begins = [np.zeros(1, np.int64)]
    for first, rows in neighbours(len(article)):
        new = np.diff(article[rows]) != 0
        if position is not None:
            new |= np.diff(position[rows]) != 1
        begins.append(np.flatnonzero(new) + first)
    begins = np.concatenate(begins)
    return begins, np.append(begins[1:], len(article))


def _split_spans(store: Store, split: str, gapless: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """`article_spans` of a split's articles; `gapless`: of their stretches without a gap."""
    begins, ends = article_spans(store.article, store.position if gapless else None)
    inside = np.isin(store.article[begins], store.articles.index[store.articles["split"] == split])
    return begins[inside], ends[inside]


def ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """(Σ count,) int64: first, first + 1, … of each range, one range after the other, without temporary copies."""
    first, count = first[count > 0], count[count > 0]
    steps = np.ones(count.sum(), np.int64)
    if len(first):
        steps[0] = first[0]
        steps[np.cumsum(count)[:-1]] = np.diff(first) - count[:-1] + 1  # from a range's end to the next one's first
    return np.cumsum(steps, out=steps)


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of one split: N first rows into a store, nothing else.

    `start` (N,) int64; the context is rows start … start + T − 1, the target row start + T − 1 + horizon.
    `step` −1 reads the text backwards: the context is rows start, start − 1, …, and the target lies before it.
    """

    store: Store
    split: str
    start: np.ndarray
    context_length: int
    horizon: int
    step: int = 1

    def __len__(self) -> int:
        return len(self.start)

    @property
    def article(self) -> np.ndarray:
        """(N,) the article of each window."""
        return self.store.article[self.start]

    @property
    def target(self) -> np.ndarray:
        """(N,) the row of each target."""
        return self.start + self.offsets[-1]

    @property
    def offsets(self) -> np.ndarray:
        """(T + 1,) int64: the context's rows relative to `start`, in reading order, and last the target's."""
        return self.step * np.append(np.arange(self.context_length), self.context_length - 1 + self.horizon)

    def context_rows(self, index) -> np.ndarray:
        """(B, T) the rows of the contexts of windows `index` (B,), in reading order."""
        return self.start[np.asarray(index)][:, None] + self.offsets[:-1]

    def target_rows(self, index) -> np.ndarray:
        """(B,) the rows of the targets of windows `index` (B,): `target[index]` without all the others."""
        return self.start[np.asarray(index)] + self.offsets[-1]

    def batch(self, index, vectors: torch.Tensor | OnDemand | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather windows `index` (B,) from `vectors` (`on_device`): context (B, T, D) and target (B, D), float32."""
        vectors = torch.from_numpy(self.store.vectors) if vectors is None else vectors
        rows = self.start[np.asarray(index)][:, None] + self.offsets  # (B, T + 1)
        prefetch(self.store.vectors, rows, vectors)
        # One index_select over rows is several times faster than indexing by (B, T + 1), on a CPU.
        chunks = vectors.index_select(0, torch.from_numpy(rows.ravel()).to(vectors.device)).float()
        chunks = chunks.view(*rows.shape, vectors.shape[1])  # (B, T + 1, D)
        return chunks[:, :-1], chunks[:, -1]

    def batches(self, size: int, vectors: torch.Tensor | None = None):
        """All windows in order, `size` at a time, as `batch` gives them."""
        for index in self.indices(size):
            yield self.batch(index, vectors)

    def indices(self, size: int) -> Iterator[np.ndarray]:
        """The numbers of all windows in order, `size` at a time."""
        for first in range(0, len(self), size):
            yield np.arange(first, min(first + size, len(self)))

    def at_most(self, count: int, first: bool = False) -> Windows:
        """Evenly spaced `count` of the windows, or the first, as the original took them (all, if there are no more)."""
        if first:
            return replace(self, start=self.start[:count])
        keep = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int))
        return replace(self, start=self.start[keep])


class OnDemand:
    """A store's vectors (M, D) in place of a tensor on a device that cannot hold them: sends the rows asked for."""

    def __init__(self, stored: torch.Tensor, device: torch.device):
        self.stored, self.device, self.shape = stored, device, stored.shape

    def __getitem__(self, rows: torch.Tensor | slice) -> torch.Tensor:
        return self.stored[rows if isinstance(rows, slice) else rows.to(self.stored.device)].to(self.device)

    def index_select(self, dim: int, rows: torch.Tensor) -> torch.Tensor:
        return self.stored.index_select(dim, rows.to(self.stored.device)).to(self.device)

    def data_ptr(self) -> int:
        return self.stored.data_ptr()


def on_device(store: Store, device: torch.device) -> torch.Tensor | OnDemand:
    """The store's vectors (M, D) for a model on `device`. On a CPU they stay on disk; a GPU holds them if they take at
    most half of its free memory, else they are sent on demand."""
    stored, device = torch.from_numpy(store.vectors), torch.device(device)
    if device.type == "cuda" and stored.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return OnDemand(stored, device)
    return stored.to(device)


def windows(store: Store, split: str, horizon: int = 2, context_length: int = 5, direction: str = "forward") -> Windows:
    """All windows of a split; none crosses an article or a gap in positions. `backward` reads the articles reversed.

    A store that came with windows gives those, forwards. Raises LVMError if no article is long enough.
    """
    for what, value, known in (("split", split, SPLITS), ("direction", direction, DIRECTIONS)):
        if value not in known:
            raise LVMError(f"unknown {what} {value!r}; known: {', '.join(known)}")
    if horizon < 1 or context_length < 1:
        raise LVMError(f"horizon {horizon} and context_length {context_length} must each be at least 1")
    given = store.given
    if given is not None and (horizon, context_length) != (given.horizon, given.context_length):
        raise LVMError(
            f"{store.name}: its windows have horizon {given.horizon} and context_length {given.context_length}, not "
            f"{horizon} and {context_length}; set the version's to these"
        )
    if given is not None and direction == "forward":  # given windows have no backward form: those are cut anew
        start = given.start[given.split == SPLITS.index(split)]
        if not len(start):
            raise LVMError(f"{store.name}: came with windows, but with none for split {split}; add a file for it")
        return Windows(store, split, start, context_length, horizon)
    span = context_length - 1 + horizon
    begins, ends = _split_spans(store, split, gapless=True)
    start = ranges(begins, np.maximum(ends - begins - span, 0))
    if not len(start):
        longest = np.subtract(*_split_spans(store, split)[::-1]).max(initial=0)
        raise LVMError(
            f"{store.name}, split {split}: no article is long enough: a window of {context_length} with "
            f"horizon {horizon} needs {span + 1} chunks without a gap, the longest article has {longest}"
        )
    step = DIRECTIONS[direction]
    return Windows(store, split, start + span if step == -1 else start, context_length, horizon, step)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A store and its windows: `train`, `val`, `ood`."""

    store: Store
    train: Windows
    val: Windows
    ood: Windows
