"""Windows and batches, against plain loops."""

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


@settings(max_examples=120, deadline=None)
@given(tables(), st.integers(1, 4), st.integers(1, 3), st.sampled_from(W.SPLITS), st.integers(1, 9))
def test_windows_and_rows_by_runs_are_those_of_the_definition(table, length, horizon, split, block):
    article, position, frame = table
    if not article:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(W, "BLOCK_VALUES", block)  # runs across the borders of blocks
        store = V.make_store("any", np.ones((len(article), 1), np.float32), article, position, frame)
        inside = [i for i, a in enumerate(article) if frame.loc[a, "split"] == split]
        assert store.rows(split).tolist() == inside
        for direction, off in (("forward", 0), ("backward", length - 1 + horizon)):
            try:
                found = W.windows(store, split, horizon, length, direction).start
            except LVMError as e:
                longest = max((article.count(a) for a in {article[i] for i in inside}), default=0)
                assert split in str(e) and str(e).endswith(f" {longest}")
                found = np.zeros(0)
            assert found.tolist() == [s + off for s in naive_starts(store, split, horizon, length)]


@pytest.mark.parametrize("direction", W.DIRECTIONS)
@pytest.mark.parametrize("horizon, context_length", [(1, 1), (1, 5), (2, 2), (2, 5), (3, 5)])
@pytest.mark.parametrize("dtype, seed", [(np.float32, 0), (np.float16, 1)])
def test_windows_and_batches_equal_brute_force(seed, dtype, context_length, horizon, direction):
    """The same runs of chunks in both directions; backwards each is read from its last chunk to its first."""
    store, step = random_store(seed, dtype), W.DIRECTIONS[direction]
    assert ((np.diff(store.position) != 1) & (np.diff(store.article) == 0)).sum() > 5  # there are gaps
    for split in W.SPLITS:
        expected = naive_starts(store, split, horizon, context_length)
        if not expected:
            with pytest.raises(LVMError, match=f"split {split}"):
                W.windows(store, split, horizon, context_length, direction)
            continue
        w = W.windows(store, split, horizon, context_length, direction)
        rows = np.array([[*range(s, s + context_length + horizon)][::step] for s in expected])
        assert (w.step, len(w)) == (step, len(expected))
        np.testing.assert_array_equal(
            [w.start, w.target, w.article], [rows[:, 0], rows[:, -1], store.article[rows[:, 0]]]
        )
        index = np.random.default_rng(1).permutation(len(w))
        np.testing.assert_array_equal(w.context_rows(index), rows[index, :context_length])
        np.testing.assert_array_equal(w.target_rows(index), rows[index, -1])
        context, target = w.batch(index)
        assert context.dtype == target.dtype == torch.float32
        np.testing.assert_array_equal(context, store.vectors[rows[index, :context_length]])
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
    position = list(range(20))
    position[row] = position[row - 1]
    with pytest.raises(LVMError, match=f"row {row} "):
        V.make_store("t", np.ones((20, 1), np.float32), [0] * 20, position, frame)
    article = [0] * 20
    article[row] = 1
    with pytest.raises(LVMError, match="article 0 "):
        V.make_store("t", np.ones((20, 1), np.float32), article, range(20), frame)


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
            for a, b in zip(here.batch(index), there.batch(index, vectors), strict=True):
                assert torch.equal(a, b)
    assert here.batch(np.arange(0))[0].shape == (0, 4, DIM)


@pytest.mark.parametrize("direction", W.DIRECTIONS)
def test_a_batch_prefetches_the_pages_of_its_windows_and_no_others(tmp_path, direction, monkeypatch):
    """Each window's rows lie in one announced area, which begins at a page and reaches no further than they do."""
    wide = 700  # so that a row is not far from a page
    x = np.zeros((60, wide), np.float32)
    x[:, 0] = 1
    frame = pd.DataFrame({"title": ["a"], "split": ["train"]}, index=[0])
    store = V.open_store(V.write_store(V.make_store("w", x, [0] * 60, range(60), frame), tmp_path / "s"))
    w, calls = W.windows(store, "train", 2, 5, direction), []

    class Area:
        def madvise(self, option, at, length):
            store.vectors.base.madvise(option, at, length)  # the system takes it
            calls.append((at, at + length))

    class Mapped(np.memmap):
        base = Area()

    monkeypatch.setattr(mmap, "mmap", Area)
    mapped = store.vectors.view(Mapped)
    index = np.arange(len(w))[::5]
    W.prefetch(mapped, w.start[index][:, None] + w.offsets, torch.from_numpy(store.vectors))
    header = (tmp_path / "s" / "vectors.npy").stat().st_size - x.nbytes
    for i, (begin, end) in zip(index, calls, strict=True):
        rows = sorted([w.start[i], w.target[i]])
        first, last = header + 4 * wide * rows[0], header + 4 * wide * (rows[1] + 1)
        assert begin % mmap.PAGESIZE == 0 and first - mmap.PAGESIZE < begin <= first and end == last
    W.prefetch(mapped, w.start[index][:, None] + w.offsets, torch.from_numpy(store.vectors.copy()))
    W.prefetch(mapped, np.zeros((0, 6), int), torch.from_numpy(store.vectors))
    assert len(calls) == len(index)  # vectors that lie elsewhere are not read from the map, and no rows are no pages


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
    assert all(torch.equal(a, b) for a, b in zip(w.batch([0, 1], lazy), w.batch([0, 1]), strict=True))


@pytest.mark.parametrize("direction", W.DIRECTIONS)
def test_batches_cover_all_in_order_and_at_most_takes_some(direction):
    w = W.windows(random_store(2), "train", direction=direction)
    for size in (1, 7, 1000):
        parts = list(w.batches(size))
        assert all(len(context) <= size for context, _ in parts)
        for part, full in zip(zip(*parts, strict=True), w.batch(np.arange(len(w))), strict=True):
            assert torch.equal(torch.cat(part), full)
    for count in (1, 5, 10_000):
        some = w.at_most(count)
        assert len(some) == min(count, len(w)) and some.step == w.step
        assert set(some.start) <= set(w.start) and (np.diff(some.start) > 0).all()


def test_windows_hold_row_numbers_only(tmp_path):
    """No (N, T, D) copy: what a Windows object holds besides the shared store is 8 bytes a window."""
    store = V.open_store(V.write_store(random_store(3), tmp_path / "s"))
    w = W.windows(store, "train")
    arrays = [a for a in vars(w).values() if isinstance(a, np.ndarray)]
    assert w.store is store
    assert sum(a.nbytes for a in arrays) == 8 * len(w)
    assert isinstance(store.vectors, np.memmap)
    assert torch.from_numpy(store.vectors).data_ptr() == store.vectors.ctypes.data


# --- reading direction -----------------------------------------------------------------------------------------------


def test_dataset_reads_every_split_in_its_direction():
    ahead, back = (lvm.dataset("wikipedia", direction=d) for d in ("forward", "backward"))
    for split in W.SPLITS:
        one, two = getattr(ahead, split), getattr(back, split)
        assert (one.step, two.step, len(one)) == (1, -1, len(two))
        np.testing.assert_array_equal(one.start, two.target)  # the same runs: first here is last there


@pytest.mark.parametrize("horizon", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_shared_are_the_windows_of_both_with_the_same_target(seed, horizon):
    store = random_store(seed, longest=80)
    ahead, back = (W.windows(store, "train", horizon, 3, d) for d in ("forward", "backward"))
    one, two = shared(ahead, back)
    common = [t for t in ahead.target.tolist() if t in set(back.target.tolist())]
    assert one.target.tolist() == two.target.tolist() == common and common
    assert (one.step, two.step) == (1, -1)
    assert set(one.start) <= set(ahead.start) and set(two.start) <= set(back.start)
    np.testing.assert_array_equal(one.batch(np.arange(len(one)))[1], two.batch(np.arange(len(two)))[1])
    for i, target in enumerate(common):  # context on either side of the target, in one article
        assert one.context_rows([i])[0].tolist() == [target - horizon - 2, target - horizon - 1, target - horizon]
        assert two.context_rows([i])[0].tolist() == [target + horizon + 2, target + horizon + 1, target + horizon]
        assert store.article[target - horizon - 2] == store.article[target + horizon + 2]


def test_shared_needs_articles_long_enough_and_one_store():
    def cut(length, seed=1):
        store = random_store(seed, gaps=False, longest=length)
        return [W.windows(store, "train", 2, 5, d) for d in ("forward", "backward")]

    assert len(shared(*cut(13))[0]) == 3  # one target in each of three articles: six chunks on either side
    with pytest.raises(LVMError, match=" 13 "):
        shared(*cut(12))
    with pytest.raises(LVMError, match="random1 and random2"):
        shared(cut(20)[0], cut(20, seed=2)[1])
