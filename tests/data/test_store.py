"""The vector store: round trip, and every damaged or hostile file refused."""

import pickle
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from fuzz_importers import Runs
from stores import edit_articles, put, random_store, refused, reseal, row_set, same, spoil, with_extras, with_row

from lvmlib import windows as W
from lvmlib.data import checks as C
from lvmlib.data import store as V
from lvmlib.errors import LVMError

MADE = {"vectors": np.eye(2, dtype=np.float32), "article": [0, 0], "position": [0, 1]}


def made(split="train", **change):
    frame = pd.DataFrame({"title": ["a"], "split": [split]}, index=[0])
    return V.make_store("odd", **MADE | change, articles=frame)


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
def test_make_store_refuses_numbers_it_cannot_store(change):
    with pytest.raises(LVMError, match="odd"):
        made(**change)


def test_fingerprint_depends_on_vectors_positions_and_splits():
    eye = MADE["vectors"]
    changes = [{}, {"vectors": eye[::-1]}, {"vectors": eye.astype(np.float16)}, {"position": [0, 2]}, {"split": "val"}]
    assert len({made(**change).fingerprint for change in changes}) == 5
    assert made().fingerprint == made().fingerprint


# --- write and open --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_round_trip(tmp_path, dtype):
    store = random_store(7, dtype)
    opened = V.open_store(V.write_store(store, tmp_path / "new" / "store"))
    assert opened.vectors.dtype == dtype
    same(replace(opened, datasheet=store.datasheet), store)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["store"], "a partial folder was left behind"


TITLES = ["NA", "null"], ["1e5", "007"], ['a, "b"', "x\ny"], ["Ünï — çode", "日本"], ["", ""], [" a ", "#b"]


@pytest.mark.parametrize("titles", TITLES)
def test_titles_survive_the_round_trip(tmp_path, titles):
    frame = pd.DataFrame({"title": titles, "split": ["train", "val"]}, index=[0, 1])
    store = V.make_store("t", np.eye(2, dtype=np.float32), [0, 1], [0, 0], frame)
    assert V.open_store(V.write_store(store, tmp_path / "s")).articles["title"].tolist() == titles


def test_texts_and_given_windows_survive_the_disk(tmp_path):
    store, cut = with_extras()
    opened = V.open_store(V.write_store(store, tmp_path / "s"))
    assert list(opened.texts) == list(store.texts) and opened.texts[3:5] == store.texts[3:5]
    assert opened.texts[-1] == store.texts[-1] and len(opened.texts) == len(store.texts)
    with pytest.raises(IndexError):
        opened.texts[len(store.texts)]
    for split in W.SPLITS:
        assert W.windows(opened, split, horizon=1, context_length=3).start.tolist() == cut[split].tolist()
        backward = W.windows(opened, split, horizon=1, context_length=3, direction="backward")
        assert len(backward) == len(W.windows(replace(store, given=None), split, horizon=1, context_length=3))
    assert opened.fingerprint != V.open_store(V.write_store(replace(store, given=None), tmp_path / "t")).fingerprint
    for horizon, length in ((2, 3), (1, 4)):
        with pytest.raises(LVMError, match="horizon 1 and context_length 3"):
            W.windows(opened, "val", horizon=horizon, context_length=length)


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


@pytest.mark.parametrize("failure", ["disk full", "bad vectors"])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, failure):
    store = random_store(1)
    if failure == "disk full":
        monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *a, **k: (_ for _ in ()).throw(OSError(failure)))
    else:
        store = replace(store, vectors=store.vectors * 0)
    with pytest.raises(LVMError):
        V.write_store(store, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


# --- damaged and hostile files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", V.STORE_FILES)
def test_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, folder / name)
    shutil.rmtree(folder)
    refused(folder, folder)


@pytest.mark.parametrize("name", ["vectors.npy", "chunks.npy"])
@pytest.mark.parametrize("damage", ["truncated", "header only", "empty", "text", "object", "pickle", "npz"])
def test_unreadable_array(folder, tmp_path, name, damage):
    path, content, mark = folder / name, (folder / name).read_bytes(), tmp_path / "mark"
    if damage == "object":
        np.save(path, np.array([Runs(mark)], dtype=object), allow_pickle=True)
    elif damage == "npz":
        with open(path, "wb") as f:
            np.savez(f, a=np.ones(3))
    else:
        damaged = {"truncated": content[:-7], "header only": content[:128], "empty": b"", "text": b"vectors\n"}
        path.write_bytes(damaged.get(damage, pickle.dumps(Runs(mark))))
    reseal(folder)
    refused(folder, name, "restore")
    assert not mark.exists(), "code from the file was run"


SHAPES = {
    "wide": "(4, 1000000000000)",
    "long": "(99999999999999, 2)",
    "beyond int64": "(9999999999999999999999, 2)",
    "negative": "(-1, 2)",
    "fraction": "(2.5, 2)",
    "letters": "('a', 2)",
    "open": "(" * 60,
    "lists": "[[[[",
    "scalar": "()",
}


@pytest.mark.parametrize("name, descr", [("vectors.npy", "<f4"), ("chunks.npy", "<i4")])
@pytest.mark.parametrize("shape", SHAPES)
def test_lying_header(folder, name, descr, shape):
    """The header promises more than the file holds, or nonsense."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {SHAPES[shape]}, }}".ljust(117) + "\n"
    (folder / name).write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 64)
    reseal(folder)
    refused(folder, name)


@pytest.mark.parametrize("name", ["vectors.npy", "chunks.npy"])
def test_any_damaged_header_byte_gives_one_clear_error(folder, name):
    """Every byte of the header changed to a few others: the store is refused or (a blank, say) still the same."""
    content = (folder / name).read_bytes()
    fingerprint, others = V.open_store(folder).fingerprint, []
    for byte in range(128):
        for value in (b"\x00 ", b"9}")[byte % 2]:
            (folder / name).write_bytes(content[:byte] + bytes([value]) + content[byte + 1 :])
            reseal(folder)
            try:
                others += [(byte, value)] * (V.open_store(folder).fingerprint != fingerprint)
            except LVMError as e:
                assert name in str(e) or "vectors.npy" in str(e) or "chunks.npy" in str(e)
    assert not others


ARRAYS = [
    ("vectors.npy", lambda x: x.astype(np.float64), "float64"),
    ("vectors.npy", lambda x: (x * 100).astype(np.int32), "int32"),
    ("vectors.npy", lambda x: x.astype(">f4"), ">f4"),
    ("vectors.npy", lambda x: x.astype(np.complex64), "complex64"),
    ("vectors.npy", lambda x: x[:, :, None], "shape"),
    ("vectors.npy", lambda x: x[:, 0], "shape"),
    ("vectors.npy", lambda x: x[:0], "empty"),
    ("vectors.npy", lambda x: x[:, :0], "empty"),
    ("vectors.npy", lambda x: np.asfortranarray(x) * 2, "norm 2"),
    *(("vectors.npy", row_set(17, value), "row 17 ") for value in (np.nan, np.inf, -np.inf, 0, 0.9)),
    ("vectors.npy", row_set(0, 0), "row 0 "),
    ("chunks.npy", lambda c: c.astype(np.float32), "integers"),
    ("chunks.npy", lambda c: c[:, :1], "shape"),
    ("chunks.npy", lambda c: c.T, "shape"),
    ("chunks.npy", lambda c: c[:-1], "shape"),
    ("chunks.npy", lambda c: c[:, 0], "shape"),
    ("chunks.npy", lambda c: np.concatenate([c[1:], c[:1]]), "one run"),
    ("windows.npy", lambda t: t.astype(np.int32), "int32"),
    ("windows.npy", lambda t: t[:, :1], "shape"),
    *(
        ("windows.npy", lambda t, by=by: np.add(t, by), "window 0 ")
        for by in ([0, -(10**6)], [0, 10**6], [1, 0], [7, 0])
    ),
    ("windows.npy", lambda t: t * [1, 0] + [0, np.iinfo(np.int64).max], "window 0 "),
]


@pytest.mark.parametrize("name, change, word", ARRAYS)
def test_wrong_arrays(tmp_path, name, change, word):
    folder = V.write_store(with_extras()[0], tmp_path / "s")
    spoil(folder, change, name)
    refused(folder, name, word)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])  # unsigned differences are never negative
@pytest.mark.parametrize("step", [0, -1])
def test_positions_must_rise(folder, step, dtype):
    chunks = np.load(folder / "chunks.npy")
    row = int(np.flatnonzero(np.diff(chunks[:, 0]) == 0)[2]) + 1
    spoil(folder, lambda c: row_set((row, 1), c[row - 1, 1] + step)(c).astype(dtype), "chunks.npy")
    refused(folder, "chunks.npy", f"row {row} (article {chunks[row, 0]})")


def test_a_bad_row_beyond_the_first_block_is_named(monkeypatch):
    monkeypatch.setattr(W, "BLOCK_VALUES", 64)
    x = row_set(70, np.nan)(np.tile(np.eye(2, dtype=np.float16), (50, 1)))
    with pytest.raises(LVMError, match="row 70 "):
        C.check_vectors(x, "here")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rounded_unit_vectors_pass(dtype):
    x = np.random.default_rng(0).standard_normal((500, 768))
    C.check_vectors((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype), "here")


NUMBERS = ("-9223372036854775808", "4294967296", "-2147483649", "9" * 30, "1.0", "1e3", "x", "")
ARTICLES = [
    (lambda f: with_row(f, 0, split="val"), "both train and val"),
    (lambda f: with_row(f, 0, split="ood", title="other"), "both train and ood"),
    (lambda f: with_row(f, 0, split="", title="other"), "twice"),
    (lambda f: with_row(f, 0), "twice"),
    (lambda f: put(f, 1, "title", f.title[0]), "'T"),
    (lambda f: put(f, 2, "title", f.title[1]), "both val and ood"),
    *((lambda f, split=split: put(f, 2, "split", split), repr(split)) for split in ("test", "Train", "train ")),
    (lambda f: f.iloc[1:], "not listed"),
    (lambda f: f.iloc[:0], "not listed"),
    (lambda f: f.drop(columns="split"), "columns"),
    (lambda f: f.drop(columns="article"), "columns"),
    (lambda f: put(f, 0, "article", f.article[0] + ".5"), "number"),
    (lambda f: put(f, 0, "article", str(int(f.article[0]) + 2**32)), "number"),
    *((lambda f, n=n: with_row(f, 0, article=n, title="", split=""), "number") for n in NUMBERS),
]


@pytest.mark.parametrize("change, word", ARTICLES)
def test_wrong_articles(folder, change, word):
    edit_articles(folder, change)
    refused(folder, "articles.csv", word)


def test_an_article_without_chunks_may_be_listed(folder):
    edit_articles(folder, lambda f: with_row(f, 0, article="999", title="", split=""))
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


def test_an_enormous_table_of_articles(folder):
    with open(folder / "articles.csv", "ab") as file:
        file.truncate(1 << 40)  # a hole: it takes no room on the disk
    refused(folder, "articles.csv", "larger")


SHEETS = (b"", b"- a list\n", b"name: [unclosed\n", b"just text", b"name: x\n", b"sha256: 5\n", b"sha256: [a, b]\n")
SHEETS += (b"\xff\xfe\x00", b"a: &a [*a", b"x: !!python/object/apply:os.getcwd []", b"sha256:\n", b"sha256: {}\n")
SHEETS += (b"a: \x07", b"[" * 1500)


@pytest.mark.parametrize("content", SHEETS, ids=range(len(SHEETS)))
def test_bad_datasheet(folder, content):
    (folder / "datasheet.yaml").write_bytes(content)
    refused(folder, folder)


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
    reseal(folder)
    for read in (list, lambda texts: texts[2]):
        with pytest.raises(LVMError, match=f"texts.jsonl.*{word}"):
            read(V.open_store(folder).texts)
    path.unlink()
    refused(folder, "texts.jsonl", "missing")


@pytest.mark.parametrize(
    "cut", [None, 3, {"horizon": 1}, {"horizon": 0, "context_length": 3}, {"horizon": "1", "context_length": 3}]
)
def test_windows_without_their_cut(tmp_path, cut):
    folder = V.write_store(with_extras()[0], tmp_path / "s")
    sheet = yaml.safe_load((folder / "datasheet.yaml").read_text(encoding="utf-8"))
    (folder / "datasheet.yaml").write_text(yaml.safe_dump({**sheet, "windows": cut}), encoding="utf-8")
    refused(folder, "windows.npy", "horizon", "context_length")
