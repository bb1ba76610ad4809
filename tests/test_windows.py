"""Windows and batches, against plain loops."""

import itertools
import mmap

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import DIM, naive_starts, random_store, spoil

import lvmlib as lvm
from lvmlib import windows as W
from lvmlib.data import store as V
from lvmlib.errors import LVMError
from lvmlib.judge.arrow import shared

# --- windows ---------------------------------------------------------------------------------------------------------


@st.composite
def tables(draw):
    """Articles, some without a chunk, with any gaps; and splits."""
    steps = draw(st.lists(st.lists(st.sampled_from([1, 1, 1, 1, 2, 7]), max_size=12), min_size=1, max_size=8))
    numbers = draw(st.permutations(range(0, 3 * len(steps), 3)))
    article = [n for n, s in zip(numbers, steps, strict=True) for _ in s]
    position = [int(p) for s in steps for p in np.cumsum(s)]
    split = [draw(st.sampled_from((*W.SPLITS, ""))) for _ in steps]
    return article, position, pd.DataFrame({"title": "", "split": split}, index=numbers)


@settings(max_examples=80, deadline=None)
@given(tables(), st.integers(1, 5), st.integers(1, 3), st.sampled_from([np.float16, np.float32]), st.integers(1, 9))
def test_windows_rows_and_batches_are_those_of_the_definition(table, length, horizon, dtype, block):
    """The same runs of chunks in both directions; backwards each is read from its last chunk to its first."""
    article, position, frame = table
    if not article:
        return
    angle = np.arange(len(article))
    store = V.make_store("any", np.c_[np.cos(angle), np.sin(angle)].astype(dtype), article, position, frame)
    for split, direction in itertools.product(W.SPLITS, W.DIRECTIONS):
        inside = [i for i, a in enumerate(article) if frame.loc[a, "split"] == split]
        runs = [range(s, s + length + horizon) for s in naive_starts(store, split, horizon, length)]
        rows = np.array([run[:: W.DIRECTIONS[direction]] for run in runs])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(W, "BLOCK_VALUES", block)  # runs across the borders of blocks
            assert store.rows(split).tolist() == inside
            if not runs:
                longest = max((article.count(a) for a in {article[i] for i in inside}), default=0)
                with pytest.raises(LVMError, match=f"split {split}.* {longest}$"):
                    W.windows(store, split, horizon, length, direction)
                continue
            w = W.windows(store, split, horizon, length, direction)
        index = np.random.default_rng(1).permutation(len(rows))
        np.testing.assert_array_equal(
            [w.start, w.target, w.article], [rows[:, 0], rows[:, -1], store.article[rows[:, 0]]]
        )
        np.testing.assert_array_equal(w.context_rows(index), rows[index, :length])
        np.testing.assert_array_equal(w.target_rows(index), rows[index, -1])
        context, target = w.batch(index)
        assert context.dtype == target.dtype == torch.float32 and len(w) == len(rows)
        np.testing.assert_array_equal(context, store.vectors[rows[index, :length]])
        np.testing.assert_array_equal(target, store.vectors[rows[index, -1]])


@pytest.mark.parametrize(
    "key, value",
    [("split", "valid"), ("horizon", 0), ("horizon", -1), ("context_length", 0), ("direction", "sideways")],
)
def test_impossible_windows(key, value):
    with pytest.raises(LVMError, match=f"{key} '?{value}"):
        W.windows(random_store(0), **{"split": "train"} | {key: value})


@pytest.mark.parametrize("row", [7, 8, 9, 15, 16])
def test_a_table_that_is_wrong_at_the_border_of_a_block(monkeypatch, row):
    monkeypatch.setattr(W, "BLOCK_VALUES", 8)
    frame = pd.DataFrame({"title": ["a", "b"], "split": ["train", "val"]}, index=[0, 1])
    article, position = np.zeros(20, int), np.arange(20)
    for table, value, named in ((position, row - 1, f"row {row} "), (article, 1, "article 0 ")):
        before, table[row] = table[row], value
        with pytest.raises(LVMError, match=named):
            V.make_store("t", np.ones((20, 1), np.float32), article, position, frame)
        table[row] = before


@pytest.mark.parametrize("direction", W.DIRECTIONS)
@pytest.mark.parametrize("columns", [False, True])
def test_batches_of_a_store_on_disk_are_those_of_memory(tmp_path, direction, columns):
    store = random_store(5, np.float16)
    folder = V.write_store(store, tmp_path / "s")
    if columns:  # an array that is stored column by column
        spoil(folder, np.asfortranarray)
    opened = V.open_store(folder)
    here, there = (W.windows(s, "train", 2, 4, direction) for s in (store, opened))
    for index in (np.random.default_rng(1).integers(0, len(here), 9), np.arange(0)):
        for vectors in (None, torch.from_numpy(opened.vectors.copy())):
            assert all(map(torch.equal, here.batch(index), there.batch(index, vectors)))
    assert here.batch(np.arange(0))[0].shape == (0, 4, DIM)


@pytest.mark.parametrize("direction", W.DIRECTIONS)
def test_a_batch_prefetches_the_pages_of_its_windows_and_no_others(tmp_path, direction, monkeypatch):
    """Each window's rows lie in one announced area, which begins at a page and reaches no further than they do."""
    wide, calls = 700, []  # so that a row is not far from a page
    x = np.eye(1, wide, dtype=np.float32).repeat(60, 0)
    frame = pd.DataFrame({"title": ["a"], "split": ["train"]}, index=[0])
    store = V.open_store(V.write_store(V.make_store("w", x, [0] * 60, range(60), frame), tmp_path / "s"))
    w = W.windows(store, "train", 2, 5, direction)

    class Area:
        def madvise(self, option, at, length):
            store.vectors.base.madvise(option, at, length)  # the system takes it
            calls.append((at, at + length))

    class Mapped(np.memmap):
        base = Area()

    monkeypatch.setattr(mmap, "mmap", Area)
    mapped, index, stored = store.vectors.view(Mapped), np.arange(len(w))[::5], torch.from_numpy(store.vectors)
    rows = w.start[index][:, None] + w.offsets
    W.prefetch(mapped, rows, stored)
    header = (tmp_path / "s" / "vectors.npy").stat().st_size - x.nbytes
    for (begin, end), own in zip(calls, rows, strict=True):
        first, last = header + 4 * wide * own.min(), header + 4 * wide * (own.max() + 1)
        assert begin % mmap.PAGESIZE == 0 and first - mmap.PAGESIZE < begin <= first and end == last
    W.prefetch(mapped, rows, stored.clone())  # vectors that lie elsewhere are not read from the map
    W.prefetch(mapped, rows[:0], stored)
    assert len(calls) == len(index)


def test_vectors_go_to_a_device_that_has_room_and_on_demand_to_one_that_has_not(tmp_path, monkeypatch):
    store = V.open_store(V.write_store(random_store(5, np.float16), tmp_path / "s"))
    assert W.on_device(store, "cpu").data_ptr() == store.vectors.ctypes.data  # the map itself
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * store.vectors.nbytes - 1, 0))
    lazy = W.on_device(store, gpu)
    assert isinstance(lazy, W.OnDemand) and lazy.device == gpu and lazy.shape == store.vectors.shape
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * store.vectors.nbytes, 0))
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: moved.append((len(self), device)))
    W.on_device(store, gpu)
    assert moved == [(len(store.vectors), gpu)]


def test_on_demand_gives_what_the_tensor_gives():
    w = W.windows(random_store(5, np.float16), "train")
    tensor, rows = torch.from_numpy(w.store.vectors), torch.tensor([[3, 1], [0, 7]])
    lazy = W.OnDemand(tensor, torch.device("cpu"))
    assert torch.equal(lazy[rows], tensor[rows]) and torch.equal(lazy[2:9], tensor[2:9])
    assert torch.equal(lazy.index_select(0, rows[0]), tensor[rows[0]]) and lazy.data_ptr() == tensor.data_ptr()
    assert all(map(torch.equal, w.batch([0, 1], lazy), w.batch([0, 1])))


@pytest.mark.parametrize("direction", W.DIRECTIONS)
def test_batches_cover_all_in_order_and_at_most_takes_some(direction):
    w = W.windows(random_store(2), "train", direction=direction)
    for size in (1, 7, 1000):
        contexts, targets = zip(*w.batches(size), strict=True)
        assert all(len(context) <= size for context in contexts)
        assert all(map(torch.equal, (torch.cat(contexts), torch.cat(targets)), w.batch(np.arange(len(w)))))
    for count in (1, 5, 10_000):
        some = w.at_most(count)
        assert len(some) == min(count, len(w)) and some.step == w.step
        assert set(some.start) <= set(w.start) and (np.diff(some.start) > 0).all()


def test_windows_hold_row_numbers_only(tmp_path):
    """No (N, T, D) copy: what a Windows object holds besides the shared store is 8 bytes a window."""
    store = V.open_store(V.write_store(random_store(3), tmp_path / "s"))
    w = W.windows(store, "train")
    assert w.store is store and isinstance(store.vectors, np.memmap)
    assert sum(a.nbytes for a in vars(w).values() if isinstance(a, np.ndarray)) == 8 * len(w)


# --- reading direction -----------------------------------------------------------------------------------------------


def test_dataset_reads_every_split_in_its_direction():
    ahead, back = (lvm.dataset(random_store(3), direction=d) for d in W.DIRECTIONS)
    for split in W.SPLITS:
        np.testing.assert_array_equal(getattr(ahead, split).start, getattr(back, split).target)  # of the same runs


@pytest.mark.parametrize("horizon", [1, 2])
def test_shared_are_the_windows_of_both_with_the_same_target(horizon):
    store = random_store(0, longest=80)
    ahead, back = (W.windows(store, "train", horizon, 3, d) for d in W.DIRECTIONS)
    both = shared(ahead, back)
    common = sorted({*ahead.target.tolist()} & {*back.target.tolist()})
    assert both[0].target.tolist() == both[1].target.tolist() == common != []
    for w, step in zip(both, (1, -1), strict=True):  # context on either side of the target
        rows = np.array(common)[:, None] - step * (horizon + np.arange(2, -1, -1))
        np.testing.assert_array_equal(w.context_rows(range(len(w))), rows)


def test_shared_needs_articles_long_enough_and_one_store():
    def cut(length, seed=1):
        store = random_store(seed, gaps=False, longest=length)
        return [W.windows(store, "train", 2, 5, d) for d in ("forward", "backward")]

    assert len(shared(*cut(13))[0]) == 3  # one target in each of three articles: six chunks on either side
    with pytest.raises(LVMError, match=" 13 "):
        shared(*cut(12))
    with pytest.raises(LVMError, match="random1 and random2"):
        shared(cut(20)[0], cut(20, seed=2)[1])
