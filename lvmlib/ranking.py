"""A prediction among the chunks of its target's article: cosines at offsets, and the target's rank.

Axes: N windows, B batch, V variants of a prediction, T context length, D vector dimension, K offsets; of a block: b of
the batch's windows, R chunks.

All figures of an article come from one product of the predictions with its chunks; short articles share one. A
`Block` is such a product, and `Articles.blocks` yields one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import Windows, article_spans

TIE = 1e-6  # cosines nearer than this are equal: a float32 product rounds by its shape
ROWS = 256  # chunks in a product that several articles share
NUMBERS = 1 << 22  # cosines in memory at a time, and about as many numbers of gathered chunks
PART = 1 << 18  # windows, or rows, that arrays of all of them are computed from at a time


@dataclass(frozen=True, eq=False)
class Block:
    """Some windows of a batch against the chunks of their articles, and of a few more."""

    mine: Tensor  # (b,) the windows' places in the batch
    cosines: Tensor  # (b, V, R)
    first: Tensor  # (b, 1) column of the first chunk of the window's article
    size: Tensor  # (b, 1) chunks of that article
    target: Tensor  # (b, 1) column
    context: Tensor  # (b, T) columns
    possible: Tensor  # (R,) whether a chunk is a target of some window

    @cached_property
    def candidates(self) -> Tensor:
        """(b, R, 3) float32, 1 or 0: chunks of the own article, of these outside the context, of these `possible`."""
        place = torch.arange(self.cosines.shape[2], device=self.cosines.device) - self.first  # (b, R)
        own = (place >= 0) & (place < self.size)
        outside = own.scatter(1, self.context, False)
        return torch.stack([own, outside, outside & self.possible], 2).float()

    def at(self, columns: Tensor) -> Tensor:
        """(b, V, K) cosines at `columns` (b, K)."""
        return self.cosines.gather(2, columns[:, None].expand(-1, self.cosines.shape[1], -1))

    def ranks(self, which: slice = slice(None)) -> Tensor:
        """(b, V, 3) rank of the target, from 1, among the three kinds of `candidates`, for the predictions `which`.

        Equal cosines share their mean rank: ½ + Σ (1 for a higher cosine, ½ for an equal one, the target's own too).
        """
        gap = self.cosines[:, which] - self.at(self.target)[:, which]
        places = (gap > TIE).float().add_(gap >= -TIE)  # 2 for above, 1 for equal
        return (1 + torch.bmm(places, self.candidates)) / 2  # float32 is exact: these are halves

    def mean(self, which: slice = slice(None)) -> Tensor:
        """(b, V) mean cosine with the article's chunks outside the context, of the predictions `which`."""
        outside = self.candidates[:, :, 1:2]
        return torch.bmm(self.cosines[:, which], outside)[..., 0] / outside.sum(1)


class Articles:
    """The articles of a split's windows, for comparing predictions with their chunks.

    `vectors` (M, D): the store's, on the predictions' device. Arrays of all windows or rows are made on first use.
    """

    def __init__(self, windows: Windows, vectors: Tensor):
        self.windows, self.vectors, self.device = windows, vectors, vectors.device
        # Apple's devices have no float64; of ranks float32 is exact, too.
        self.wide = torch.float32 if self.device.type == "mps" else torch.float64

    @cached_property
    def _begins(self) -> np.ndarray:
        """(A + 1,) the first row of each article, and the number of rows."""
        article = self.windows.store.article
        return np.append(article_spans(article)[0], len(article))

    def span(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B,) and (B,): rows low … high − 1 are the articles of windows `index`."""
        run = np.searchsorted(self._begins, self.windows.target_rows(index), side="right") - 1
        return self._begins[run], self._begins[run + 1]

    @cached_property
    def candidates(self) -> np.ndarray:
        """(N,) chunks of each window's article, context included."""
        return np.concatenate([high - low for low, high in map(self.span, _parts(len(self.windows)))])

    @property
    def novel_candidates(self) -> np.ndarray:
        """(N,) without the context."""
        return self.candidates - self.windows.context_length

    @cached_property
    def longest(self) -> int:
        """The maximum of `candidates`."""
        return max(int(np.subtract(*self.span(i)[::-1]).max()) for i in _parts(len(self.windows)))

    @cached_property
    def possible(self) -> np.ndarray:
        """(M,) whether a row is the target of some window: an article's first chunks, without a full context, are not.
        Among all chunks, a predictor gains rank by recognising openings."""
        return np.concatenate([self._possible(rows) for rows in _parts(len(self.windows.store.article))])

    def _possible(self, rows: np.ndarray) -> np.ndarray:
        article, position = self.windows.store.article, self.windows.store.position
        reach = self.windows.step * (self.windows.context_length - 1 + self.windows.horizon)
        first = rows - reach
        exists = (first >= 0) & (first < len(article))
        first = np.where(exists, first, rows)
        return exists & (article[first] == article[rows]) & (position[rows] - position[first] == reach)

    @cached_property
    def possible_candidates(self) -> np.ndarray:
        """(N,) `possible` rows among the novel candidates."""
        up_to = np.append(0, np.cumsum(self.possible, dtype=np.int64))

        def counted(index: np.ndarray) -> np.ndarray:
            low, high = self.span(index)
            inside = self.possible[self.windows.context_rows(index)].sum(1)
            return up_to[high] - up_to[low] - inside

        return np.concatenate([counted(index) for index in _parts(len(self.windows))])

    @cached_property
    def pool(self) -> np.ndarray:
        """The rows of the split."""
        return self.windows.store.rows(self.windows.split)

    def unit(self, rows) -> Tensor:
        """(R, D) float32 unit vectors of `rows`, an array or a slice."""
        if not isinstance(rows, slice):
            rows = torch.from_numpy(rows).to(self.device)
        return F.normalize(self.vectors[rows].float(), dim=-1)

    def blocks(self, units: Tensor, index: np.ndarray) -> Iterator[Block]:
        """The cosines of `units` (B, V, D), float32, with all chunks of the articles of windows `index` (B,).

        Each window is in one block. A block has one article, or several of at most ROWS chunks together, and NUMBERS
        cosines at most, but one window at least.
        """
        low, high = self.span(index)
        order = np.argsort(low, kind="stable")
        begins, place, count = np.unique(low[order], return_index=True, return_counts=True)
        sizes = high[order[place]] - begins
        context, target = self.windows.context_rows(index) - low[:, None], self.windows.target_rows(index) - low
        table = np.column_stack([np.arange(len(index)), np.zeros_like(low), high - low, target, context])
        a = 0
        while a < len(begins):
            b = a + max(1, int(np.searchsorted(np.cumsum(sizes[a:]), ROWS, side="right")))
            before = np.cumsum(sizes[a:b]) - sizes[a:b]
            if (begins[a:b] - before == begins[a]).all():  # they are adjacent
                rows = slice(int(begins[a]), int(begins[a] + sizes[a:b].sum()))
            else:
                rows = np.concatenate([np.arange(f, f + n) for f, n in zip(begins[a:b], sizes[a:b], strict=True)])
            chunks, possible = self.unit(rows).T, torch.from_numpy(self.possible[rows]).to(self.device)
            mine = order[place[a] : place[b - 1] + count[b - 1]]
            places, in_order = table[mine], bool((np.diff(mine) == 1).all())
            places[:, 1] = np.repeat(before, count[a:b])
            places[:, 3:] += places[:, 1:2]
            places = torch.from_numpy(places).to(self.device)
            most = max(1, NUMBERS // (units.shape[1] * len(possible)))
            for first in range(0, len(mine), most):
                part = places[first : first + most]
                at = slice(int(mine[first]), int(mine[first]) + len(part)) if in_order else part[:, 0]
                columns = part[:, 1:2], part[:, 2:3], part[:, 3:4], part[:, 4:]
                yield Block(part[:, 0], units[at] @ chunks, *columns, possible)
            a = b

    def columns(self, index: np.ndarray, offsets) -> tuple[np.ndarray, np.ndarray]:
        """(B, K) places in the article of the chunks `offsets` after each target, in reading direction, and whether
        they exist: inside the article and not across a gap in its positions. Elsewhere, the target's own place."""
        position, (low, high), rows = self.windows.store.position, self.span(index), self.windows.target_rows(index)
        at = rows[:, None] + self.windows.step * np.asarray(offsets)
        exists = (at >= low[:, None]) & (at < high[:, None])
        at = np.where(exists, at, rows[:, None])
        exists &= position[at] - position[rows][:, None] == at - rows[:, None]
        return at - low[:, None], exists

    def ranks(self, units: Tensor, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Rank of each window's target among its article's chunks for `units` (V, B, D): with the context, without it,
        and among the `possible` targets of the latter; (V, B) float64 each. See `Block.ranks`."""
        found = torch.empty(units.shape[1], len(units), 3, dtype=self.wide, device=self.device)
        for block in self.blocks(units.transpose(0, 1).contiguous(), index):
            found[block.mine] = block.ranks().to(self.wide)
        return found.permute(2, 1, 0).unbind(0)

    def rivals(self, index: np.ndarray, most: int, rank: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Rows (B, C) of chunks of each window's article outside its context, the target first, and (B, C) whether they
        exist: all, or the `most` with the least `rank` (B, ≥ the longest article), numbers in [0, 1)."""
        low, high = self.span(index)
        rows = low[:, None] + np.arange((high - low).max())  # (B, C)
        context = self.windows.context_rows(index)
        inside = (rows >= context.min(1)[:, None]) & (rows <= context.max(1)[:, None])
        exists = (rows < high[:, None]) & ~inside
        key = np.where(exists, rank[:, : rows.shape[1]], 2.0)
        target = self.windows.target_rows(index)
        key[np.arange(len(index)), target - low] = -1.0
        order = np.argsort(key, 1)[:, :most]
        order = order[:, : max(1, int(np.take_along_axis(exists, order, 1).sum(1).max()))]
        rows, exists = (np.take_along_axis(a, order, 1) for a in (rows, exists))
        return np.where(exists, rows, target[:, None]), exists

    def strangers(self, index: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (K,) of `count` random chunks of the split, by torch's random stream, and (B, K) whether each is of
        another article than the window."""
        rows = self.pool[torch.randint(len(self.pool), (count,)).numpy()]
        own = self.windows.store.article[self.windows.target_rows(index)]
        return rows, self.windows.store.article[rows] != own[:, None]


def _parts(count: int) -> Iterator[np.ndarray]:
    """0 … count − 1, PART at a time."""
    for first in range(0, count, PART):
        yield np.arange(first, min(first + PART, count))


def among_context(ranker: Tensor, context: Tensor, target: Tensor) -> Tensor:
    """(B,) rank of the target, from 1, among itself and the context vectors: the original's mini-5CAT.

    Equal cosines share their mean rank, as in `Block.ranks`; the original counts them against the target.
    """
    cosines = F.cosine_similarity(ranker[:, None], torch.cat([context, target[:, None]], 1), dim=-1)  # (B, T + 1)
    gap = cosines[:, :-1] - cosines[:, -1:]
    return 1 + (gap > TIE).sum(1) + 0.5 * (gap.abs() <= TIE).sum(1)
