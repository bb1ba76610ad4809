"""The vector store: windows re-derived in plain loops, round trip, and every damaged or hostile file refused."""

import json
import mmap
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import lvmlib as lvm
from lvmlib import windows as W
from lvmlib.data import checks as C
from lvmlib.data import open as O
from lvmlib.data import store as V
from lvmlib.errors import LVMError
from lvmlib.io.paths import EMBEDDED

DIM = 6


def random_store(seed, dtype=np.float32, gaps=True, articles=12, longest=25):
    """Articles of 1 to `longest` chunks in shuffled numbering, some with gaps in their positions."""
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(np.arange(3, 3 + 2 * articles, 2))
    article, position = [], []
    for number in numbers:
        steps = rng.choice([1, 2, 5], p=[0.8, 0.15, 0.05], size=rng.integers(1, longest + 1)) if gaps else [1] * longest
        article += [number] * len(steps)
        position += list(np.cumsum(steps) + rng.integers(0, 4))
    x = rng.standard_normal((len(article), DIM))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)
    split = [("train", "val", "ood", "")[i % 4] for i in range(articles)]
    frame = pd.DataFrame({"title": [f"T{n}" for n in numbers], "split": split}, index=pd.Index(numbers, name="article"))
    return V.make_store(f"random{seed}", x, article, position, frame)


def naive_starts(store, split, horizon, context_length):
    """First rows of the windows, by the definition, in plain loops."""
    found = []
    for first in range(len(store.article)):
        if store.articles.loc[store.article[first], "split"] != split:
            continue
        rows = range(first, first + context_length + horizon)
        if rows[-1] < len(store.article) and all(
            store.article[r] == store.article[first] and store.position[r] == store.position[first] + r - first
            for r in rows
        ):
            found.append(first)
    return found


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


@settings(max_examples=300, deadline=None)
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
@pytest.mark.parametrize("horizon", [1, 2, 3])
@pytest.mark.parametrize("context_length", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_windows_equal_brute_force(seed, context_length, horizon, direction):
    """The same runs of chunks in both directions; backwards each is read from its last chunk to its first."""
    store = random_store(seed)
    assert ((np.diff(store.position) != 1) & (np.diff(store.article) == 0)).sum() > 5  # there are gaps
    for split in W.SPLITS:
        expected = naive_starts(store, split, horizon, context_length)
        if not expected:
            with pytest.raises(LVMError, match=f"split {split}"):
                W.windows(store, split, horizon, context_length, direction)
            continue
        w = W.windows(store, split, horizon, context_length, direction)
        runs = [[*range(s, s + context_length + horizon)][:: W.DIRECTIONS[direction]] for s in expected]
        assert (w.step, len(w)) == (W.DIRECTIONS[direction], len(expected))
        assert w.start.tolist() == [run[0] for run in runs] and w.target.tolist() == [run[-1] for run in runs]
        assert w.article.tolist() == [store.article[run[0]] for run in runs]
        index = np.arange(len(w))
        np.testing.assert_array_equal(w.context_rows(index), [run[:context_length] for run in runs])
        context, target = w.batch(index)
        for b, run in enumerate(runs):
            assert np.array_equal(context[b].numpy(), store.vectors[run[:context_length]])
            assert np.array_equal(target[b].numpy(), store.vectors[run[-1]])


@pytest.mark.parametrize(
    "key, arguments",
    [
        ("valid", {"split": "valid"}),
        ("horizon 0", {"horizon": 0}),
        ("horizon -1", {"horizon": -1}),
        ("context_length 0", {"context_length": 0}),
        ("sideways", {"direction": "sideways"}),
    ],
)
def test_impossible_windows(key, arguments):
    with pytest.raises(LVMError, match=key):
        W.windows(random_store(0), **{"split": "train"} | arguments)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6))))
def test_ranges(runs):
    first, count = np.array(runs, int).reshape(-1, 2).T
    assert W.ranges(first, count).tolist() == [f + i for f, c in runs for i in range(c)]


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


def test_exactly_long_enough_and_one_too_short():
    frame = pd.DataFrame({"title": ["a", "b"], "split": ["train", "val"]}, index=[0, 1])
    x = np.eye(13, 16, dtype=np.float32)
    store = V.make_store("edge", x, [0] * 7 + [1] * 6, [*range(7), *range(6)], frame)
    assert W.windows(store, "train", horizon=2).start.tolist() == [0]
    with pytest.raises(LVMError, match=r"split val.* 7 .* 6"):
        W.windows(store, "val", horizon=2)
    assert W.windows(store, "val", horizon=1).start.tolist() == [7]


@pytest.mark.parametrize("where", ["memory", "disk", "disk, by columns", "a tensor of its own"])
@pytest.mark.parametrize("direction", W.DIRECTIONS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_batch_wherever_the_vectors_lie(tmp_path, dtype, direction, horizon, where):
    store = random_store(5, dtype)
    if where != "memory":
        folder = V.write_store(store, tmp_path / "s")
        if where == "disk, by columns":
            spoil(folder, np.asfortranarray)
        store = V.open_store(folder)
    w = W.windows(store, "train", horizon, 4, direction)
    vectors = torch.from_numpy(store.vectors.copy()) if where == "a tensor of its own" else None
    index, step = np.random.default_rng(1).integers(0, len(w), 9), W.DIRECTIONS[direction]
    context, target = w.batch(index, vectors)
    for b, i in enumerate(index):
        for t in range(4):
            assert np.array_equal(context[b, t].numpy(), store.vectors[w.start[i] + step * t].astype(np.float32))
        at = w.start[i] + step * (3 + horizon)
        assert np.array_equal(target[b].numpy(), store.vectors[at].astype(np.float32)) and w.target[i] == at
    assert w.target_rows(index).tolist() == w.target[index].tolist()
    assert (w.start[index][:, None] + w.offsets)[:, :-1].tolist() == w.context_rows(index).tolist()
    assert [x.shape for x in w.batch(np.arange(0), vectors)] == [(0, 4, DIM), (0, DIM)]


@pytest.mark.parametrize("direction", W.DIRECTIONS)
def test_a_batch_prefetches_the_pages_of_its_windows_and_no_others(tmp_path, direction, monkeypatch):
    """Each window's rows lie in one announced area, which begins at a page and reaches no further than they do."""
    wide = 700  # so that a row is not far from a page
    x = np.zeros((60, wide), np.float32)
    x[:, 0] = 1
    frame = pd.DataFrame({"title": ["a"], "split": ["train"]}, index=[0])
    store = V.open_store(V.write_store(V.make_store("w", x, [0] * 60, range(60), frame), tmp_path / "s"))
    w, said = W.windows(store, "train", 2, 5, direction), []

    class Area:
        def madvise(self, option, at, length):
            store.vectors.base.madvise(option, at, length)  # the system takes it
            said.append((at, at + length))

    class Mapped(np.memmap):
        base = Area()

    monkeypatch.setattr(mmap, "mmap", Area)
    mapped = store.vectors.view(Mapped)
    index = np.arange(len(w))[::5]
    W.prefetch(mapped, w.start[index][:, None] + w.offsets, torch.from_numpy(store.vectors))
    header = (tmp_path / "s" / "vectors.npy").stat().st_size - x.nbytes
    for i, (begin, end) in zip(index, said, strict=True):
        rows = sorted([w.start[i], w.target[i]])
        first, last = header + 4 * wide * rows[0], header + 4 * wide * (rows[1] + 1)
        assert begin % mmap.PAGESIZE == 0 and first - mmap.PAGESIZE < begin <= first and end == last
    W.prefetch(mapped, w.start[index][:, None] + w.offsets, torch.from_numpy(store.vectors.copy()))
    W.prefetch(mapped, np.zeros((0, 6), int), torch.from_numpy(store.vectors))
    assert len(said) == len(index)  # vectors that lie elsewhere are not read from the map, and no rows are no pages


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
    whole, rows = torch.from_numpy(w.store.vectors), torch.tensor([[3, 1], [0, 7]])
    lazy = W.OnDemand(whole, torch.device("cpu"))
    assert torch.equal(lazy[rows], whole[rows]) and torch.equal(lazy[2:9], whole[2:9])
    assert torch.equal(lazy.index_select(0, rows[0]), whole[rows[0]]) and lazy.data_ptr() == whole.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(w.batch([0, 1], lazy), w.batch([0, 1]), strict=True))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_batches_cover_all_in_order(size):
    w = W.windows(random_store(2), "train")
    parts = list(w.batches(size))
    assert all(len(p[0]) <= size for p in parts)
    whole = w.batch(np.arange(len(w)))
    assert torch.equal(torch.cat([c for c, _ in parts]), whole[0])
    assert torch.equal(torch.cat([y for _, y in parts]), whole[1])


@pytest.mark.parametrize("direction", W.DIRECTIONS)
@pytest.mark.parametrize("count", [1, 5, 10_000])
def test_at_most(count, direction):
    w = W.windows(random_store(2), "train", direction=direction)
    few = w.at_most(count)
    assert len(few) == min(count, len(w)) and few.step == w.step
    assert set(few.start) <= set(w.start) and (np.diff(few.start) > 0).all()


def test_windows_hold_row_numbers_only(tmp_path):
    """No (N, T, D) copy: what a Windows object holds besides the shared store is 8 bytes a window."""
    store = V.open_store(V.write_store(random_store(3), tmp_path / "s"))
    w = W.windows(store, "train")
    arrays = [a for a in vars(w).values() if isinstance(a, np.ndarray)]
    assert w.store is store
    assert sum(a.nbytes for a in arrays) == 8 * len(w)
    assert isinstance(store.vectors, np.memmap)
    assert torch.from_numpy(store.vectors).data_ptr() == store.vectors.ctypes.data


MADE = {"vectors": np.eye(2, dtype=np.float32), "article": [0, 0], "position": [0, 1]}


@pytest.mark.parametrize(
    "change",
    [
        {"article": [0, 0.5]},
        {"position": [0, 1.5]},
        {"article": [0, np.nan]},
        {"position": [0, 2**32 + 1]},
        {"article": ["0", "0"], "position": ["a", "b"]},
        {"article": [0]},
        {"article": [0] * 3, "position": range(3)},
    ],
)
def test_make_store_refuses_numbers_it_cannot_keep(change):
    frame = pd.DataFrame({"title": ["a"], "split": ["train"]}, index=[0])
    with pytest.raises(LVMError, match="odd"):
        V.make_store("odd", **MADE | change, articles=frame)


# --- write and open --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_round_trip(tmp_path, dtype):
    store = random_store(7, dtype)
    opened = V.open_store(V.write_store(store, tmp_path / "new" / "store"))
    assert opened.name == store.name and opened.dim == DIM and opened.vectors.dtype == dtype
    assert np.array_equal(opened.vectors, store.vectors)
    assert np.array_equal(opened.article, store.article) and np.array_equal(opened.position, store.position)
    pd.testing.assert_frame_equal(opened.articles, store.articles, check_index_type=False)
    assert opened.fingerprint == store.fingerprint
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["store"], "a partial folder was left behind"


TITLES = ["NA", "null"], ["1e5", "007"], ['a, "b"', "x\ny"], ["Ünï — çode", "日本"], ["", ""], [" a ", "#b"]


@pytest.mark.parametrize("titles", TITLES)
def test_titles_survive_the_round_trip(tmp_path, titles):
    frame = pd.DataFrame({"title": titles, "split": ["train", "val"]}, index=[0, 1])
    store = V.make_store("t", np.eye(2, dtype=np.float32), [0, 1], [0, 0], frame)
    assert V.open_store(V.write_store(store, tmp_path / "s")).articles["title"].tolist() == titles


def test_fingerprint_tells_vectors_positions_and_splits():
    def made(x=None, position=(0, 1), split="train"):
        frame = pd.DataFrame({"title": ["a"], "split": [split]}, index=[0])
        return V.make_store("f", np.eye(2, dtype=np.float32) if x is None else x, [0, 0], position, frame).fingerprint

    all_of_them = [
        made(),
        made(np.eye(2, dtype=np.float32)[::-1]),
        made(np.eye(2, dtype=np.float16)),
        made(position=(0, 2)),
        made(split="val"),
    ]
    assert len(set(all_of_them)) == 5
    assert made() == all_of_them[0]


@pytest.mark.parametrize("kind", ["store", "file", "empty folder"])
def test_never_overwrites(tmp_path, kind):
    there = tmp_path / "s"
    if kind == "store":
        V.write_store(random_store(1), there)
    elif kind == "file":
        there.write_text("mine")
    else:
        there.mkdir()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(LVMError, match=str(there)):
        V.write_store(random_store(2), there)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_interrupted_write_leaves_no_store(tmp_path, monkeypatch):
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        V.write_store(random_store(1), tmp_path / "s")
    assert not (tmp_path / "s").exists()
    monkeypatch.undo()
    V.write_store(random_store(1), tmp_path / "s")


# --- damaged and hostile stores --------------------------------------------------------------------------------------


class Trap:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def folder(tmp_path):
    return V.write_store(random_store(11, gaps=False), tmp_path / "s")


def reseal(folder, *more):
    """Make the checksums right again, so that the check behind them is what must speak."""
    sheet = yaml.safe_load((folder / "datasheet.yaml").read_text(encoding="utf-8"))
    sheet["sha256"] = {f: V.sha256_file(folder / f) for f in (*V.STORE_FILES[:3], *more)}
    (folder / "datasheet.yaml").write_text(yaml.safe_dump(sheet), encoding="utf-8")


def refused(folder, *words):
    with pytest.raises(LVMError) as e:
        V.open_store(folder)
    for word in words:
        assert str(word) in str(e.value), f"{word!r} not in: {e.value}"


@pytest.mark.parametrize("name", V.STORE_FILES)
def test_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, folder / name)
    shutil.rmtree(folder)
    refused(folder, folder)


@pytest.mark.parametrize("name", ["vectors.npy", "chunks.npy"])
@pytest.mark.parametrize("damage", ["truncated", "header only", "empty", "text", "object", "pickle", "npz"])
def test_unreadable_array(folder, tmp_path, name, damage):
    path, whole, mark = folder / name, (folder / name).read_bytes(), tmp_path / "mark"
    if damage == "object":
        np.save(path, np.array([Trap(mark)], dtype=object), allow_pickle=True)
    elif damage == "npz":
        with open(path, "wb") as f:
            np.savez(f, a=np.ones(3))
    else:
        path.write_bytes(
            {
                "truncated": whole[:-7],
                "header only": whole[:128],
                "empty": b"",
                "text": b"vectors\n",
                "pickle": pickle.dumps(Trap(mark)),
            }[damage]
        )
    reseal(folder)
    refused(folder, name, "restore")
    assert not mark.exists(), "code from the file was run"


@pytest.mark.parametrize("name", ["vectors.npy", "chunks.npy"])
@pytest.mark.parametrize(
    "shape",
    [
        "(4, 1000000000000)",
        "(99999999999999, 2)",
        "(9999999999999999999999, 2)",
        "(-1, 2)",
        "(2.5, 2)",
        "('a', 2)",
        "(" * 60,
        "[[[[",
        "()",
    ],
    ids=["wide", "long", "beyond int64", "negative", "fraction", "letters", "open", "lists", "scalar"],
)
def test_lying_header(folder, name, shape):
    """The header promises more than the file holds, or nonsense."""
    descr = {"vectors.npy": "<f4", "chunks.npy": "<i4"}[name]
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    header = header.ljust(117) + "\n"
    (folder / name).write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 64)
    reseal(folder)
    refused(folder, name)


@pytest.mark.parametrize("name", ["vectors.npy", "chunks.npy"])
def test_any_damaged_header_byte_gives_one_clear_error(folder, name):
    """Every byte of the header changed to a few others: the store is refused or (a blank, say) still the same."""
    whole = (folder / name).read_bytes()
    fingerprint, others = V.open_store(folder).fingerprint, []
    for byte in range(128):
        for value in b"\x00 'x(9}\xff":
            (folder / name).write_bytes(whole[:byte] + bytes([value]) + whole[byte + 1 :])
            reseal(folder)
            try:
                others += [(byte, value)] * (V.open_store(folder).fingerprint != fingerprint)
            except LVMError as e:
                assert name in str(e) or "vectors.npy" in str(e) or "chunks.npy" in str(e)
    assert not others


def spoil(folder, change, name="vectors.npy", *more):
    """Save another array under a name, with the right checksum."""
    np.save(folder / name, change(np.load(folder / name)))
    reseal(folder, *more)


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda x: x.astype(np.float64), "float64"),
        (lambda x: (x * 100).astype(np.int32), "int32"),
        (lambda x: x.astype(">f4"), ">f4"),
        (lambda x: x.astype(np.complex64), "complex64"),
        (lambda x: x[:, :, None], "shape"),
        (lambda x: x[:, 0], "shape"),
        (lambda x: x[:0], "empty"),
        (lambda x: x[:, :0], "empty"),
        (lambda x: np.asfortranarray(x) * 2, "norm 2"),
    ],
)
def test_wrong_vectors(folder, change, word):
    spoil(folder, change)
    refused(folder, "vectors.npy", word)


def row_set(row, value):
    def change(x):
        x[row] = value
        return x

    return change


@pytest.mark.parametrize(
    "value, word", [(np.nan, "NaN"), (np.inf, "inf"), (-np.inf, "inf"), (0, "zero"), (0.9, "norm")]
)
@pytest.mark.parametrize("row", [0, 17, -1])
def test_a_bad_row_is_named(folder, value, word, row):
    spoil(folder, row_set(row, value))
    refused(folder, "vectors.npy", f"row {row % len(np.load(folder / 'vectors.npy'))} ", word)


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda c: c.astype(np.float32), "integers"),
        (lambda c: c[:, :1], "shape"),
        (lambda c: c.T, "shape"),
        (lambda c: c[:-1], "shape"),
        (lambda c: c[:, 0], "shape"),
        (lambda c: np.concatenate([c[1:], c[:1]]), "one run"),
    ],
)
def test_wrong_chunks(folder, change, word):
    spoil(folder, change, "chunks.npy")
    refused(folder, "chunks.npy", word)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])  # unsigned differences are never negative
@pytest.mark.parametrize("step", [0, -1])
def test_positions_must_rise(folder, step, dtype):
    chunks = np.load(folder / "chunks.npy")
    row = int(np.flatnonzero(np.diff(chunks[:, 0]) == 0)[2]) + 1
    spoil(folder, lambda c: row_set((row, 1), c[row - 1, 1] + step)(c).astype(dtype), "chunks.npy")
    refused(folder, "chunks.npy", f"row {row} (article {chunks[row, 0]})")


def test_a_bad_row_beyond_the_first_block_is_named():
    x = np.zeros((70_000, 2), np.float16)
    x[:, 0] = 1
    x[69_000] = np.nan
    with pytest.raises(LVMError, match="row 69000 "):
        C.check_vectors(x, "here")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rounded_unit_vectors_pass(dtype):
    x = np.random.default_rng(0).standard_normal((500, 768))
    C.check_vectors((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype), "here")


def edit_articles(folder, change):
    frame = pd.read_csv(folder / "articles.csv", keep_default_na=False, dtype=str)
    change(frame).to_csv(folder / "articles.csv", index=False)
    reseal(folder)


def with_row(frame, like, **values):
    return pd.concat([frame, frame.iloc[[like]].assign(**values)], ignore_index=True)


def put(frame, row, column, value):
    frame.loc[row, column] = value
    return frame


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: with_row(f, 0, split="val"), ["both train and val"]),
        (lambda f: with_row(f, 0, split="ood", title="other"), ["both train and ood"]),
        (lambda f: with_row(f, 0, split="", title="other"), ["twice"]),
        (lambda f: with_row(f, 0), ["twice"]),
        (lambda f: put(f, 1, "title", f.title[0]), ["both train and val", "'T"]),
        (lambda f: put(f, 2, "title", f.title[1]), ["both val and ood"]),
        (lambda f: put(f, 2, "split", "test"), ["'test'"]),
        (lambda f: put(f, 2, "split", "Train"), ["'Train'"]),
        (lambda f: put(f, 2, "split", "train "), ["'train '"]),
        (lambda f: f.iloc[1:], ["not listed"]),
        (lambda f: f.iloc[:0], ["not listed"]),
        (lambda f: f.drop(columns="split"), ["columns"]),
        (lambda f: f.drop(columns="article"), ["columns"]),
        (lambda f: put(f, 0, "article", f.article[0] + ".5"), ["number"]),
        (lambda f: put(f, 0, "article", str(int(f.article[0]) + 2**32)), ["number"]),
    ],
)
def test_wrong_articles(folder, change, words):
    edit_articles(folder, change)
    refused(folder, "articles.csv", *words)


NUMBERS = ("-9223372036854775808", "4294967296", "-2147483649", "9" * 30, "1.0", "1e3", "x", "")


@pytest.mark.parametrize("number", NUMBERS)
def test_article_numbers_that_cannot_be_kept(folder, number):
    edit_articles(folder, lambda f: with_row(f, 0, article=number, title="", split=""))
    refused(folder, "articles.csv", "number")
    edit_articles(folder, lambda f: put(f, len(f) - 1, "article", "999"))  # an article without chunks may be listed
    assert 999 in V.open_store(folder).articles.index


UNREADABLE = {
    "empty": b"",
    "not UTF-8": b"article,title,split\n1,\xff\xfe,train\n",
    "open quote": b'article,title,split\n1,"a,train\n',
    "ragged": b"article,title,split\n1,a,b,c,d\n2\n3,a,train\n",
    "binary": b"\x00\x01\x02",
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_articles(folder, case):
    (folder / "articles.csv").write_bytes(UNREADABLE[case])
    reseal(folder)
    refused(folder, "articles.csv")


SHEETS = (b"", b"- a list\n", b"name: [unclosed\n", b"just text", b"name: x\n", b"sha256: 5\n", b"sha256: [a, b]\n")
SHEETS += (b"\xff\xfe\x00", b"a: &a [*a", b"x: !!python/object/apply:os.getcwd []", b"sha256:\n", b"sha256: {}\n")
SHEETS += (b"a: \x07", b"[" * 5000)


@pytest.mark.parametrize("content", SHEETS, ids=range(len(SHEETS)))
def test_bad_datasheet(folder, content):
    (folder / "datasheet.yaml").write_bytes(content)
    refused(folder, folder)


# --- the remembered check --------------------------------------------------------------------------------------------


def age(folder, seconds=3600):
    """Make the files look as if they had been written an hour ago."""
    for path in folder.iterdir():
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - int(seconds * 1e9)))


@pytest.fixture
def checks(monkeypatch):
    """The full checks that are done from now on."""
    done, check = [], C.check_vectors
    monkeypatch.setattr(V, "check_vectors", lambda *args: (done.append(args[1]), check(*args)))
    return done


@pytest.fixture
def known(folder, checks):
    """A store folder whose check is remembered."""
    age(folder)
    V.open_store(folder)
    assert (folder / V.CHECKED).is_file()
    checks.clear()
    return folder


def same(a, b):
    assert a.fingerprint == b.fingerprint and a.name == b.name and a.datasheet == b.datasheet
    assert np.array_equal(a.vectors, b.vectors) and a.articles.equals(b.articles)
    assert np.array_equal(a.article, b.article) and np.array_equal(a.position, b.position)
    assert a.article.dtype == b.article.dtype == np.int32


def test_a_remembered_check_reads_no_vector_and_no_chunk(known, checks, monkeypatch):
    whole = V.open_store(known, verify=True)
    assert len(checks) == 1
    for name in ("sha256_file", "check_chunks", "check_articles", "_fingerprint"):
        monkeypatch.setattr(V, name, lambda *a: pytest.fail("read again"))
    same(V.open_store(known), whole)
    assert len(checks) == 1
    moved = known.rename(known.with_name("moved"))
    same(V.open_store(moved), whole)
    assert len(checks) == 1  # the same files under another name


def test_columns_are_views_of_the_map(known):
    store = V.open_store(known)
    for column in (store.article, store.position):
        base = column
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base, mmap.mmap)


def test_texts_and_given_windows_of_a_remembered_check(tmp_path, checks, monkeypatch):
    folder = V.write_store(with_extras()[0], tmp_path / "s")
    age(folder)
    whole = V.open_store(folder)
    checks.clear()
    monkeypatch.setattr(V, "check_given", lambda *a: pytest.fail("checked again"))
    again = V.open_store(folder)
    same(again, whole)
    assert not checks and list(again.texts) == list(whole.texts) and again.texts[4] == whole.texts[4]
    assert len(again.texts) == len(whole.texts) == len(whole.vectors)
    assert again.given.start.tolist() == whole.given.start.tolist() and again.given.split.dtype == np.int64
    (folder / "texts.jsonl").write_bytes((folder / "texts.jsonl").read_bytes() + b'"more"\n')
    refused(folder, "texts.jsonl", "sha256")


@pytest.mark.parametrize("name", V.STORE_FILES[:3])
def test_a_wrong_checksum_is_seen_in_spite_of_a_remembered_check(known, name):
    content = bytearray((known / name).read_bytes())
    content[-2] ^= 1
    (known / name).write_bytes(content)
    refused(known, name, "sha256")
    refused(known, name, "sha256")  # a refusal is not remembered as a success


def test_another_file_of_the_same_size_and_time_is_seen(known):
    path = known / "vectors.npy"
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-2] ^= 1
    (known / "new").write_bytes(content)
    os.utime(known / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(known / "new", path)  # another inode
    refused(known, "vectors.npy", "sha256")


def test_what_is_not_seen_and_that_verify_sees_it(known):
    """As the docstring says: bytes changed in place, and the time set back."""
    path = known / "vectors.npy"
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x00\x01")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    V.open_store(known)
    with pytest.raises(LVMError, match=r"vectors.npy: its sha256"):
        V.open_store(known, verify=True)


def test_a_change_within_a_second_of_the_check_is_seen(folder, checks):
    """Its time may be the same: so what is younger than a second is not remembered."""
    path = folder / "vectors.npy"
    V.open_store(folder)
    assert len(checks) == 1 and not (folder / V.CHECKED).exists()
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused(folder, "vectors.npy", "sha256")


def test_a_file_that_changes_while_it_is_checked_is_not_remembered(folder, monkeypatch):
    age(folder)
    monkeypatch.setattr(V, "_fingerprint", lambda *a: os.utime(folder / "chunks.npy") or "0" * 64)
    V.open_store(folder)
    assert not (folder / V.CHECKED).exists()


def test_a_new_datasheet_or_a_new_file_is_checked_anew(known, checks):
    sheet = yaml.safe_load((known / "datasheet.yaml").read_text(encoding="utf-8"))
    (known / "datasheet.yaml").write_text(yaml.safe_dump({**sheet, "name": "other"}), encoding="utf-8")
    assert V.open_store(known).name == "other" and len(checks) == 1
    (known / "texts.jsonl").write_text("")
    refused(known, "texts.jsonl", "sha256")


def test_a_copied_memory_is_none(known, tmp_path, checks):
    shutil.copytree(known, tmp_path / "copy")  # it keeps sizes and times
    assert (tmp_path / "copy" / V.CHECKED).is_file()
    same(V.open_store(tmp_path / "copy"), V.open_store(known))
    assert checks == [str(tmp_path / "copy" / "vectors.npy")]
    store = random_store(12, gaps=False)
    other = V.write_store(store, tmp_path / "other")
    shutil.copy2(known / V.CHECKED, other / V.CHECKED)
    assert V.open_store(other).fingerprint == store.fingerprint
    assert checks[-1] == str(other / "vectors.npy")


MEMORIES = (
    lambda b: b"",
    lambda b: b[:-9],
    lambda b: b"[]",
    lambda b: b"5",
    lambda b: b"{}",
    lambda b: b"\xff\xfe\x00",
    lambda b: b"[" * 100_000,
    lambda b: b.replace(b'"check": 1', b'"check": 0'),
    lambda b: b.replace(b'"size": ', b'"size": 1'),
    *(
        lambda b, change=change: json.dumps(json.loads(b) | change).encode()
        for change in ({"fingerprint": 7}, {"fingerprint": "short"}, {"files": []}, {"more": 1})
    ),
)


@pytest.mark.parametrize("content", MEMORIES)
def test_a_damaged_memory_is_none_and_is_mended(known, checks, content):
    path, whole = known / V.CHECKED, (known / V.CHECKED).read_bytes()
    path.write_bytes(content(whole))
    assert path.read_bytes() != whole
    for _ in range(2):
        V.open_store(known)
        assert len(checks) == 1 and path.read_bytes() == whole


@pytest.mark.parametrize("where", ["write", "rename", "a folder in its place"])
def test_a_memory_that_cannot_be_written(folder, checks, monkeypatch, where):
    age(folder)

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    if where == "a folder in its place":
        (folder / V.CHECKED).mkdir()
    else:
        monkeypatch.setattr(*((V.Path, "write_text") if where == "write" else (V.os, "replace")), deny)
    before = sorted(folder.iterdir())
    same(V.open_store(folder), V.open_store(folder))
    assert len(checks) == 2 and sorted(folder.iterdir()) == before


def test_the_package_is_not_written(folder, monkeypatch):
    monkeypatch.setattr(V, "EMBEDDED", folder.parent)
    age(folder)
    V.open_store(folder)
    assert not (folder / V.CHECKED).exists()


def test_sealing_remembers_what_was_written_long_enough_ago(tmp_path, checks):
    store = random_store(11, gaps=False)
    with V.writing(tmp_path / "s") as partial:
        np.save(partial / "vectors.npy", store.vectors)
        np.save(partial / "chunks.npy", np.stack([store.article, store.position], 1))
        age(partial, 2)
        V.seal(partial, "s", store.articles, {})
    checks.clear()
    assert V.open_store(tmp_path / "s").fingerprint == store.fingerprint and not checks


def test_a_table_of_wider_integers_opens_the_same(known, checks):
    whole = V.open_store(known)
    np.save(known / "wider.npy", np.load(known / "chunks.npy").astype(np.int64))
    (known / "wider.npy").rename(known / "chunks.npy")  # not written into the file that `whole` has mapped
    reseal(known)
    age(known)
    same(replace(V.open_store(known), datasheet=whole.datasheet), whole)
    same(replace(V.open_store(known), datasheet=whole.datasheet), whole)
    assert len(checks) == 1


# --- dataset ---------------------------------------------------------------------------------------------------------


def test_dataset_from_a_folder_and_from_a_store(folder):
    a, b = lvm.dataset(str(folder), horizon=1), lvm.dataset(V.open_store(folder), horizon=1)
    for split in W.SPLITS:
        assert np.array_equal(getattr(a, split).start, getattr(b, split).start)
        assert getattr(a, split).split == split and getattr(a, split).horizon == 1


NAMES = ("wikipedai", "vectors.py", "/nowhere/at/all", "a\x00b", "x" * 5000, "~no_such_user/s")


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_unknown_data_names_the_known(name):
    with pytest.raises(LVMError, match="wikipedia"):
        lvm.dataset(name)


@pytest.mark.parametrize("name", ["..", "."])
def test_a_folder_that_is_no_store(name):
    with pytest.raises(LVMError, match=V.STORE_FILES[0]):
        lvm.dataset(name)


def test_a_new_source_is_one_entry(monkeypatch):
    monkeypatch.setitem(O.SOURCES, "toy:SEED", lambda n: random_store(int(n[4:])) if n.startswith("toy:") else None)
    assert lvm.dataset("toy:1", horizon=1, context_length=3).store.name == "random1"
    with pytest.raises(LVMError, match="toy:SEED"):
        lvm.dataset("toys")


@pytest.mark.parametrize("missing", W.SPLITS)
def test_a_split_without_articles(missing):
    frame = pd.DataFrame({"title": list("abc"), "split": [s if s != missing else "" for s in W.SPLITS]})
    x, article, position = np.eye(30, dtype=np.float32), np.repeat([0, 1, 2], 10), np.tile(np.arange(10), 3)
    store = V.make_store("hole", x, article, position, frame)
    with pytest.raises(LVMError, match=f"split {missing}"):
        lvm.dataset(store)


def test_embedded_wikipedia():
    store = V.open_store(EMBEDDED / "wikipedia")
    assert store.dim == 384 and store.vectors.dtype == np.float16
    data = lvm.dataset("wikipedia", horizon=2)
    sets = [set(getattr(data, s).article) for s in W.SPLITS]
    assert min(map(len, sets)) >= 10 and not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    fast = lvm.dataset("wikipedia", fast=True)
    assert [len(getattr(fast, s)) for s in W.SPLITS] == [512, 128, 128]


# --- reading direction -----------------------------------------------------------------------------------------------


def test_backward_on_a_store_is_forward_on_the_store_reversed():
    store = random_store(6, longest=60)
    rows, position = [], store.position.copy()
    for number in dict.fromkeys(store.article):
        own = np.flatnonzero(store.article == number)
        rows += own[::-1].tolist()
        position[own] = store.position[own][-1] - store.position[own][::-1]
    turned = V.make_store("turned", store.vectors[rows], store.article, position, store.articles)
    for split in W.SPLITS:
        ours, theirs = W.windows(store, split, direction="backward"), W.windows(turned, split)
        assert sorted(ours.target.tolist()) == sorted(np.array(rows)[theirs.target].tolist())
        place = {int(t): i for i, t in enumerate(ours.target)}
        same = [place[rows[t]] for t in theirs.target]
        for a, b in zip(ours.batch(same), theirs.batch(np.arange(len(theirs))), strict=True):
            assert torch.equal(a, b)


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
    one, two = W.shared(ahead, back)
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

    assert len(W.shared(*cut(13))[0]) == 3  # one target in each of three articles: six chunks on either side
    with pytest.raises(LVMError, match=" 13 "):
        W.shared(*cut(12))
    with pytest.raises(LVMError, match="random1 and random2"):
        W.shared(cut(20)[0], cut(20, seed=2)[1])


# --- texts and given windows -----------------------------------------------------------------------------------------


def with_extras(seed=5):
    """A store that kept its texts and came with some of its windows, in an order of their own."""
    store = random_store(seed, gaps=False)
    cut = {s: W.windows(store, s, horizon=1, context_length=3).start[::-2] for s in W.SPLITS}
    split = np.concatenate([np.full(len(start), i) for i, start in enumerate(cut.values())])
    given = W.GivenWindows(split, np.concatenate(list(cut.values())), 1, 3)
    texts = [f"row {i}\nof \u2028 many \u00e9 \U0001f600" for i in range(len(store.vectors))]
    return replace(store, texts=texts, given=given), cut


def test_texts_and_given_windows_survive_the_disk(tmp_path):
    store, cut = with_extras()
    opened = V.open_store(V.write_store(store, tmp_path / "s"))
    assert list(opened.texts) == list(store.texts) and opened.texts[3:5] == store.texts[3:5]
    assert opened.texts[-1] == store.texts[-1] and len(opened.texts) == len(store.texts)
    with pytest.raises(IndexError):
        opened.texts[len(store.texts)]
    for split in W.SPLITS:
        windows = W.windows(opened, split, horizon=1, context_length=3)
        assert windows.start.tolist() == cut[split].tolist()
        backward = W.windows(opened, split, horizon=1, context_length=3, direction="backward")
        assert len(backward) == len(W.windows(random_store(5, gaps=False), split, horizon=1, context_length=3))
    assert opened.fingerprint != V.open_store(V.write_store(replace(store, given=None), tmp_path / "t")).fingerprint
    for horizon, length in ((2, 3), (1, 4)):
        with pytest.raises(LVMError, match="horizon 1 and context_length 3"):
            W.windows(opened, "val", horizon=horizon, context_length=length)


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda lines: lines[:-1], "lines"),
        (lambda lines: [*lines, lines[0]], "lines"),
        (lambda lines: [*lines[:-1], lines[-1].rstrip()], "lines"),
        (lambda lines: [*lines[:2], b'"open\n', *lines[3:]], "line 3 "),
        (lambda lines: [*lines[:2], b"7\n", *lines[3:]], "line 3 "),
    ],
)
def test_damaged_texts(tmp_path, change, word):
    folder = V.write_store(with_extras()[0], tmp_path / "s")
    path = folder / "texts.jsonl"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    refused(folder, "texts.jsonl", "sha256")
    reseal(folder, "texts.jsonl", "windows.npy")
    for read in (list, lambda texts: texts[2]):
        with pytest.raises(LVMError, match=f"texts.jsonl.*{word}"):
            read(V.open_store(folder).texts)
    path.unlink()
    refused(folder, "texts.jsonl", "missing")


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda t: t.astype(np.int32), "int32"),
        (lambda t: t[:, :1], "shape"),
        (lambda t: t - [0, 10**6], "window 0 "),
        (lambda t: t + np.array([0, 10**6]), "window 0 "),
        (lambda t: t + np.array([1, 0]), "window 0 "),
        (lambda t: t + np.array([7, 0]), "window 0 "),
        (lambda t: t * [1, 0] + [0, np.iinfo(np.int64).max], "window 0 "),
    ],
)
def test_damaged_windows(tmp_path, change, word):
    folder = V.write_store(with_extras()[0], tmp_path / "s")
    spoil(folder, change, "windows.npy", "texts.jsonl", "windows.npy")
    refused(folder, "windows.npy", word)


@pytest.mark.parametrize(
    "cut", [None, 3, {"horizon": 1}, {"horizon": 0, "context_length": 3}, {"horizon": "1", "context_length": 3}]
)
def test_windows_without_their_cut(tmp_path, cut):
    folder = V.write_store(with_extras()[0], tmp_path / "s")
    sheet = yaml.safe_load((folder / "datasheet.yaml").read_text(encoding="utf-8"))
    (folder / "datasheet.yaml").write_text(yaml.safe_dump({**sheet, "windows": cut}), encoding="utf-8")
    refused(folder, "windows.npy", "horizon", "context_length")


def test_a_writing_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(LVMError, match=r"vectors\.npy"), V.writing(tmp_path / "s") as partial:
        store = random_store(1, gaps=False)
        np.save(partial / "vectors.npy", np.zeros_like(store.vectors))
        np.save(partial / "chunks.npy", np.stack([store.article, store.position], 1))
        V.seal(partial, "s", store.articles, {})
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_made_here_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path))
    store = random_store(3, gaps=False)
    V.write_store(store, tmp_path / "datasets" / "mine")
    assert lvm.dataset("mine", horizon=1, context_length=3).store.fingerprint == store.fingerprint
    with pytest.raises(LVMError, match=r"wikipedia, mine, .*world:NAME"):
        lvm.dataset("theirs")
    with pytest.raises(LVMError, match="mine"):
        lvm.dataset("../datasets/mine")
