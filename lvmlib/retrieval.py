"""A prediction among the chunks of its target's article: cosines at offsets, and the target's rank.

Axes: N windows, B batch, V variants of a prediction, T context length, D vector dimension, K offsets.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .vectors import Windows

TIE = 1e-6  # cosines nearer than this are equal: a float32 product rounds by its shape


class Articles:
    """The articles of a split's windows, ready for comparing predictions with their chunks.

    `vectors` (M, D): the store's vectors on the device of the predictions. `low`, `high` (N,): each window's article
    is rows low … high − 1. `possible` (M,): the rows that are the target of some window. An article's first chunks are
    none (they have no whole context), so that a predictor may gain rank by knowing what an opening looks like.
    """

    def __init__(self, windows: Windows, vectors: Tensor):
        self.windows, self.vectors, self.device = windows, vectors, vectors.device
        article = windows.store.article
        begins = np.flatnonzero(np.diff(article, prepend=article[0] - 1))
        run = np.searchsorted(begins, windows.target, side="right") - 1
        self.low, self.high = begins[run], np.append(begins[1:], len(article))[run]
        self.candidates = self.high - self.low  # (N,) with the context left in
        self.novel_candidates = self.candidates - windows.context_length
        reach = windows.step * (windows.context_length - 1 + windows.horizon)
        first = np.arange(len(article)) - reach
        there = (first >= 0) & (first < len(article))
        first = np.where(there, first, 0)
        same = (article[first] == article) & (windows.store.position - windows.store.position[first] == reach)
        self.possible = there & same
        up_to = np.append(0, np.cumsum(self.possible))
        inside = self.possible[windows.context_rows(np.arange(len(windows)))].sum(1)
        self.possible_candidates = up_to[self.high] - up_to[self.low] - inside  # (N,) with the context left out

    def cosines_at(self, unit: Tensor, index: np.ndarray, offsets) -> Tensor:
        """(B, K) cosines of `unit` (B, D) with the chunks `offsets` after the target, in reading direction; NaN
        outside the article and across a gap in its positions."""
        rows, position = self.windows.target[index], self.windows.store.position
        at = rows[:, None] + self.windows.step * np.asarray(offsets)
        inside = (at >= self.low[index][:, None]) & (at < self.high[index][:, None])
        at = np.where(inside, at, rows[:, None])
        inside &= position[at] - position[rows][:, None] == at - rows[:, None]
        chunks = self.vectors[torch.from_numpy(at).to(self.device)].float()
        cosines = F.cosine_similarity(unit[:, None], chunks, dim=-1)
        return cosines.masked_fill(~torch.from_numpy(inside).to(self.device), float("nan"))

    def ranks(self, units: Tensor, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Rank of each window's target among its article's chunks for `units` (V, B, D): with the context among the
        candidates, with it left out, and of the latter among the `possible` targets alone; (V, B) float64 each, from 1.
        Equal cosines share their mean rank.

        One product an article. The target is never in the context.
        """
        whole, novel, possible = (torch.empty(units.shape[:2], dtype=torch.float64) for _ in range(3))
        for mine, begin, chunks in self._grouped(index):
            cosines = (units[:, mine] @ chunks.T).cpu()  # (V, windows, chunks)
            own = torch.from_numpy(self.windows.target[index[mine]] - begin)
            own = cosines.gather(2, own[None, :, None].expand(len(units), -1, 1))
            above, equal = cosines > own + TIE, (cosines - own).abs() <= TIE
            outside = torch.ones(cosines.shape[1:], dtype=torch.bool)
            outside.scatter_(1, torch.from_numpy(self.windows.context_rows(index[mine]) - begin), False)
            whole[:, mine] = 1 + above.sum(2) + (equal.sum(2) - 1).double() / 2
            novel[:, mine] = 1 + (above & outside).sum(2) + ((equal & outside).sum(2) - 1).double() / 2
            outside &= torch.from_numpy(self.possible[begin : begin + len(chunks)])
            possible[:, mine] = 1 + (above & outside).sum(2) + ((equal & outside).sum(2) - 1).double() / 2
        return whole, novel, possible

    def rivals(self, index: np.ndarray, most: int, rank: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Rows (B, C) of chunks of each window's article outside its context, the target first, and (B, C) whether a
        chunk is there: all of them, or `most`, those of the least `rank` (B, ≥ the longest article), numbers in [0, 1).
        """
        low, high = self.low[index], self.high[index]
        rows = low[:, None] + np.arange((high - low).max())  # (B, C)
        context = self.windows.context_rows(index)
        inside = (rows >= context.min(1)[:, None]) & (rows <= context.max(1)[:, None])
        there = (rows < high[:, None]) & ~inside
        key = np.where(there, rank[:, : rows.shape[1]], 2.0)
        key[np.arange(len(index)), self.windows.target[index] - low] = -1.0
        order = np.argsort(key, 1)[:, :most]
        order = order[:, : max(1, int(np.take_along_axis(there, order, 1).sum(1).max()))]
        rows, there = (np.take_along_axis(a, order, 1) for a in (rows, there))
        return np.where(there, rows, self.windows.target[index][:, None]), there

    def strangers(self, index: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (K,) of `count` chunks of the split, by torch's random stream, and (B, K) whether each is of another
        article than the window."""
        pool = self.windows.store.rows(self.windows.split)
        rows = pool[torch.randint(len(pool), (count,)).numpy()]
        own = self.windows.store.article[self.windows.target[index]]
        return rows, self.windows.store.article[rows] != own[:, None]

    def mean_cosine(self, unit: Tensor, index: np.ndarray) -> Tensor:
        """(B,) mean cosine of `unit` (B, D) with the article's chunks outside the context: what knowing the article
        alone gives."""
        means = torch.empty_like(unit)
        for mine, begin, chunks in self._grouped(index):
            context = torch.from_numpy(self.windows.context_rows(index[mine]) - begin).to(self.device)
            means[mine] = (chunks.sum(0) - chunks[context].sum(1)) / (len(chunks) - self.windows.context_length)
        return (unit * means).sum(-1)

    def _grouped(self, index: np.ndarray):
        """For each article in the batch: its windows' places in it, its first row, its unit chunks (n, D)."""
        for begin in np.unique(self.low[index]):
            mine = np.flatnonzero(self.low[index] == begin)
            yield mine, int(begin), F.normalize(self.vectors[begin : self.high[index[mine[0]]]].float(), dim=-1)


def among_context(ranker: Tensor, context: Tensor, target: Tensor) -> Tensor:
    """(B,) rank of the target, from 1, among itself and the context vectors: that of the original's mini-5CAT."""
    cosines = F.cosine_similarity(ranker[:, None], torch.cat([context, target[:, None]], 1), dim=-1)  # (B, T + 1)
    return 1 + (cosines[:, :-1] > cosines[:, -1:]).sum(1)


def negatives(windows: Windows, index: np.ndarray, rng_seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each window of `index`: a random order of its context (B, T), and rows (B, count) of random chunks of the
    split's other articles, without repeats; −1 where there are too few.

    Both depend on the seed and the window's target alone, so that a window is the same in any batch or selection.
    """
    pool = windows.store.rows(windows.split)
    begins = dict(zip(*np.unique(windows.store.article[pool], return_index=True), strict=True))
    lengths = dict(zip(*np.unique(windows.store.article[pool], return_counts=True), strict=True))
    orders = np.empty((len(index), windows.context_length), np.int64)
    rows = np.full((len(index), count), -1, np.int64)
    for i, window in enumerate(index):
        random = np.random.default_rng([rng_seed, int(windows.target[window])])
        orders[i] = random.permutation(windows.context_length)
        mine = windows.store.article[windows.start[window]]
        others = len(pool) - lengths[mine]
        drawn = random.choice(others, min(count, others), replace=False)
        rows[i, : len(drawn)] = pool[np.where(drawn < begins[mine], drawn, drawn + lengths[mine])]
    return orders, rows
