"""The original's files: every spelling read, the same windows back, and every damaged or hostile file refused."""

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import fuzz_importers as fuzz
import numpy as np
import pytest
from fuzz_importers import LENGTH, Runs, cut, dicts, world

import lvmlib as lvm
from lvmlib import windows as W
from lvmlib.cli import commands
from lvmlib.data import npz as npz_format
from lvmlib.data import original as I
from lvmlib.data import store as V
from lvmlib.errors import LVMError

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN, ENGLISH = SHARED / "golden" / "fivecat_original.npz", SHARED / "vectors" / "english_sentences.npz"
PARTS = {"train": set(range(20)), "val": set(range(20, 25)), "ood": set(range(25, 30))}


def saved(folder, name, compressed=False, **arrays):
    path = folder / f"{name}.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def article_file(folder, x, article, chunk, name="articles", **more):
    return saved(folder, name, vectors=x, article_indices=article, chunk_indices=chunk, **more)


def sequence_files(folder, x, article, chunk, horizon=2, indices=True, parts=PARTS, **more):
    """{split: path} with plain arrays, and {split: (contexts, targets, ids, target indices)}."""
    windows = {s: cut(x, article, chunk, own, horizon) for s, own in parts.items()}
    paths = {}
    for s, (contexts, targets, ids, at) in windows.items():
        given = {"target_indices": at} if indices else {}
        paths[s] = saved(
            folder, s, context_sequences=contexts, target_vectors=targets, article_ids=ids, **given, **more
        )
    return paths, windows


def check_windows(store, windows, horizon=2):
    """The store's windows are those of the files, in their order, vector for vector."""
    assert (store.given.horizon, store.given.context_length) == (horizon, LENGTH)
    for s, (contexts, targets, ids, at) in windows.items():
        w = W.windows(store, s, horizon, LENGTH)
        assert np.array_equal(store.vectors[w.context_rows(np.arange(len(w)))], contexts)
        assert np.array_equal(store.vectors[w.target], targets)
        assert np.array_equal(w.article, ids)
        assert np.array_equal(store.position[w.target], at)


# --- the forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contexts", ["context_sequences", "contexts", "train_context_sequences"])
@pytest.mark.parametrize("targets", ["target_vectors", "targets", "train_target_vectors"])
@pytest.mark.parametrize("form", ["arrays", "metadata", "both"])
def test_every_spelling(tmp_path, contexts, targets, form):
    x, article, chunk = world()
    windows = {s: cut(x, article, chunk, own) for s, own in PARTS.items()}
    paths = {"articles": article_file(tmp_path, x, article, chunk)}
    for s, (c, t, ids, at) in windows.items():
        metadata = {"metadata": dicts(ids, at, title="t", more=[1, (2, None)])}
        arrays = {"article_ids": ids, "target_indices": at.astype(np.float64)}
        more = {"arrays": arrays, "metadata": metadata, "both": {**arrays, **metadata}}[form]
        paths[s] = saved(tmp_path, s, compressed=form == "both", **{contexts: c, targets: t}, **more)
    store = I.convert(paths, tmp_path / "store")
    check_windows(store, windows)
    assert store.vectors.dtype == np.float32 and np.array_equal(store.vectors, x)
    assert store.articles["split"].tolist() == ["train"] * 20 + ["val"] * 5 + ["ood"] * 5
    assert store.datasheet["encoder"] == "not recorded in the files" and "/" not in store.datasheet["source"]
    assert str(tmp_path) not in (tmp_path / "store" / "datasheet.yaml").read_text()
    assert V.open_store(tmp_path / "store").fingerprint == store.fingerprint


@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize("form", ["article_ids", "metadata"])
def test_article_numbers_only_are_matched_by_vectors(tmp_path, horizon, form):
    x, article, chunk = world(articles=30)
    parts = {s: {a for a in own if (article == a).sum() >= LENGTH + horizon} for s, own in PARTS.items()}
    paths, windows = sequence_files(tmp_path, x, article, chunk, horizon, indices=False, parts=parts)
    rng = np.random.default_rng(0)
    for s, (c, t, ids, at) in windows.items():  # in any order
        order = rng.permutation(len(ids))
        windows[s] = c, t, ids, at = c[order], t[order], ids[order], at[order]
        named = {"article_ids": ids}
        if form == "metadata":
            named = {"metadata": np.array([{"article_index": np.int64(a)} for a in ids], object)}
        paths[s] = saved(tmp_path, s, contexts=c, targets=t, **named)
    store = I.convert({**paths, "articles": article_file(tmp_path, x, article, chunk)}, tmp_path / "store")
    check_windows(store, windows, horizon)
    assert "vectors" in store.datasheet["matched"]["train"]


def test_repeated_chunks_are_told_apart_by_the_whole_context(tmp_path):
    x, article, chunk = world(articles=3, seed=4)
    size = np.bincount(article)
    article = np.repeat(np.arange(3), [size[0], 30, size[2]])
    chunk = np.concatenate([np.arange(n) for n in (size[0], 30, size[2])])
    rng = np.random.default_rng(0)
    long = rng.standard_normal((30, 8)).astype(np.float32)
    long[10:14] = long[0:4]  # four chunks of a context are the same, the fifth tells
    long[22:29] = long[15:22]  # and here a whole window stands twice
    x = np.concatenate([rng.standard_normal((size[0], 8)), long, rng.standard_normal((size[2], 8))]).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    parts = {"train": {1}, "val": {0}, "ood": {2}}
    paths, windows = sequence_files(tmp_path, x, article, chunk, indices=False, parts=parts)
    store = I.convert({**paths, "articles": article_file(tmp_path, x, article, chunk)}, tmp_path / "store")
    check_windows(store, windows)  # the two equal ones in the order of the file
    backwards = {s: [part[::-1] for part in held] for s, held in windows.items()}
    for s, (c, t, ids, _) in backwards.items():
        saved(tmp_path, s, contexts=c, targets=t, article_ids=ids)
    store = I.convert({**paths, "articles": tmp_path / "articles.npz"}, tmp_path / "backwards")
    assert store.datasheet["counts"]["windows with several equal places in their article"] == 2
    w = W.windows(store, "train")
    assert np.array_equal(store.vectors[w.context_rows(np.arange(len(w)))], backwards["train"][0])
    assert len(set(w.start)) == len(w)


@pytest.mark.parametrize("horizon", [1, 2, 3])
@pytest.mark.parametrize("shuffled", [False, True])
def test_sequences_alone_are_rebuilt(tmp_path, horizon, shuffled):
    x, article, chunk = world(longest=20)
    chunk = chunk + 7 * article  # positions need not begin with 0
    parts = {s: {a for a in own if (article == a).sum() >= LENGTH + 2 * horizon - 1} for s, own in PARTS.items()}
    paths, windows = sequence_files(tmp_path, x, article, chunk, horizon, parts=parts)
    if shuffled:
        rng = np.random.default_rng(0)
        for s, held in windows.items():
            order = rng.permutation(len(held[0]))
            windows[s] = c, t, ids, at = [part[order] for part in held]
            paths[s] = saved(tmp_path, s, True, contexts=c, targets=t, metadata=dicts(ids, at))
    store = I.convert(paths, tmp_path / "store")
    check_windows(store, windows, horizon)
    used = np.isin(article, [a for own in parts.values() for a in own])
    assert np.array_equal(store.vectors, x[used]) and np.array_equal(store.position, chunk[used])


def test_rebuilding_drops_windows_whose_skipped_chunk_is_nowhere(tmp_path):
    x, article, chunk = world()
    lone = [a for a in range(20) if (article == a).sum() == 7]  # one window of horizon 2
    paths, windows = sequence_files(tmp_path, x, article, chunk)
    store = I.convert(paths, tmp_path / "store")
    (dropped,) = [n for why, n in store.datasheet["counts"].items() if "between context and target" in why]
    assert dropped == sum(((article == a).sum() == 7) for a in range(30)) and lone
    kept = [~np.isin(w[2], np.flatnonzero(np.bincount(article) == 7)) for w in windows.values()]
    check_windows(store, {s: [p[k] for p in w] for (s, w), k in zip(windows.items(), kept, strict=True)})


def test_one_file_may_hold_all(tmp_path):
    """The golden file of 5CAT: article vectors and the windows of two splits, under val_… and ood_…."""
    if not GOLDEN.exists():
        pytest.skip("the golden file is not here")
    z = np.load(GOLDEN)
    store = I.convert({"val": GOLDEN, "ood": GOLDEN, "articles": GOLDEN}, tmp_path / "store")
    names = ("contexts", "targets", "article_ids", "target_indices")
    windows = {s: [z[f"{s}_{n}"] for n in names] for s in ("val", "ood")}
    check_windows(store, windows)
    assert np.array_equal(store.vectors, z["vectors"])
    assert store.datasheet["left_out"] == ["weights (fivecat_original.npz)"]
    rebuilt = I.convert({"val": GOLDEN, "ood": GOLDEN}, tmp_path / "rebuilt")
    check_windows(rebuilt, windows)


def test_articles_alone_are_split(tmp_path):
    x, article, chunk = world(articles=40)
    article = 3 * article + 2  # numbers without chunks are fine
    path = article_file(tmp_path, x, article, chunk, cpe_ids=np.array(["c"] * len(x), object))
    store = I.convert(path, tmp_path / "store", name="mine")
    assert store.name == "mine" and store.given is None and store.texts is None
    assert set(store.articles["split"]) == set(W.SPLITS)
    assert store.articles.index.tolist() == sorted(set(article)) and store.articles["title"].iloc[0] == "article 2"
    assert "By article" in store.datasheet["split_rule"]
    assert store.datasheet["counts"] == {"chunks": len(x), "articles": 40}
    assert store.datasheet["left_out"] == ["cpe_ids (articles.npz)"]
    assert len(lvm.dataset(store).train) > 0


def test_sources_name_the_split(tmp_path):
    x, article, chunk = world(articles=40)
    sources = np.array(["news", "film", "law,x"])[np.arange(40) % 3]
    for form in (sources, sources.astype(object)):
        path = article_file(tmp_path, x, article, chunk, article_sources=form)
        store = I.convert(path, tmp_path / form.dtype.kind, ood="source:film")
        assert store.articles["source"].tolist() == sources.tolist()
        assert set(store.articles["source"][store.articles["split"] == "ood"]) == {"film"}
    with pytest.raises(LVMError, match=r"'films'"):
        I.convert(path, tmp_path / "none", ood="source:films")
    with pytest.raises(LVMError, match=r"'topics'"):
        I.convert(path, tmp_path / "none", ood="topics")
    short = article_file(tmp_path, x, article, chunk, article_sources=sources[:30])
    with pytest.raises(LVMError, match=r"article_sources: .*39"):
        I.convert(short, tmp_path / "none")
    assert not (tmp_path / "none").exists()


TEXTS = ["plain", "", "naïve – ☃ 𝔘", 'a "quoted"\nline\r\n', "x" * 3000]


@pytest.mark.parametrize("form", ["unicode", "objects", "bytes"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_texts_are_kept(tmp_path, form, shuffled):
    x, article, chunk = world()
    texts = [TEXTS[i % len(TEXTS)] + str(i) * (i % 2) for i in range(len(x))]
    order = np.random.default_rng(0).permutation(len(x)) if shuffled else np.arange(len(x))
    given = [texts[i] for i in order]
    encoded = [t.encode() for t in given]
    more = {
        "unicode": {"concept_texts": np.array(given)},
        "bytes": {"concept_texts": np.array(encoded)},
        "objects": {"concept_texts": np.array([None if t == "" else t for t in given], object)},
    }[form]
    path = article_file(tmp_path, x[order], article[order], chunk[order], **more)
    store = I.convert(path, tmp_path / "store")
    assert np.array_equal(store.vectors, x) and np.array_equal(store.article, article)
    assert list(store.texts) == texts and store.texts[3] == texts[3]
    assert ("rows sorted by article and position" in store.datasheet["counts"]) == shuffled


def test_texts_follow_dropped_rows_and_broken_characters(tmp_path):
    x, article, chunk = world()
    texts = [f"t{i}" for i in range(len(x))]
    texts[0] = "half \ud83d of a pair"
    x[5] = np.nan
    order = np.random.default_rng(0).permutation(len(x))
    path = article_file(tmp_path, x[order], article[order], chunk[order], concept_texts=np.array(texts, object)[order])
    store = I.convert(path, tmp_path / "store", drop_bad=True)
    assert list(store.texts) == ["half \ufffd of a pair", *texts[1:5], *texts[6:]]


def test_the_files_order_is_kept_where_it_will_do(tmp_path):
    """Articles that stand together with rising positions are not moved, whatever their numbers."""
    x, article, chunk = world()
    number = np.random.default_rng(0).permutation(100)
    article = number[article]
    parts = {s: {int(number[a]) for a in own} for s, own in PARTS.items()}
    paths, windows = sequence_files(tmp_path, x, article, chunk, parts=parts)
    store = I.convert({**paths, "articles": article_file(tmp_path, x, article, chunk)}, tmp_path / "store")
    assert np.array_equal(store.article, article) and np.array_equal(store.vectors, x)
    check_windows(store, windows)


@pytest.mark.parametrize("compressed", [False, True])
def test_unsorted_articles_are_sorted(tmp_path, compressed):
    x, article, chunk = world()
    order = np.random.default_rng(0).permutation(len(x))
    path = saved(
        tmp_path,
        "articles",
        compressed,
        vectors=x[order],
        article_indices=article[order].astype(np.uint8),
        chunk_indices=chunk[order].astype(np.float32),
    )
    paths, windows = sequence_files(tmp_path, x, article, chunk)
    store = I.convert({**paths, "articles": path}, tmp_path / "store")
    assert np.array_equal(store.vectors, x) and np.array_equal(store.position, chunk)
    check_windows(store, windows)


# --- the vectors -----------------------------------------------------------------------------------------------------


def test_types_orders_and_norms(tmp_path):
    x, article, chunk = world()
    half, double = x.astype(np.float16), x.astype(np.float64)
    cases = {
        "half": (half, half),
        "double": (double, x),
        "swapped": (x.astype(">f4"), x),
        "columns": (np.asfortranarray(x), x),
        "columns_half": (np.asfortranarray(half), half),
    }
    for name, (given, expected) in cases.items():
        for compressed in (False, True):
            path = saved(
                tmp_path, name, compressed, vectors=given, article_indices=article.astype(">i8"), chunk_indices=chunk
            )
            store = I.convert(path, tmp_path / f"{name}{compressed}")
            assert store.vectors.dtype == expected.dtype and np.array_equal(store.vectors, expected), name
            assert "vectors normalised" not in store.datasheet["counts"]
    scale = np.where(np.arange(len(x)) % 3 == 0, 2.5, 1.0)
    store = I.convert(article_file(tmp_path, double * scale[:, None], article, chunk), tmp_path / "scaled")
    assert np.allclose(store.vectors, x, atol=1e-6)
    assert store.datasheet["counts"]["vectors normalised"] == (scale > 1).sum()
    assert store.datasheet["counts"]["norms of the vectors normalised"] == "2.5 to 2.5"


def test_unnormalised_sequences(tmp_path):
    x, article, chunk = world()
    paths, windows = sequence_files(tmp_path, 3 * x.astype(np.float64), article, chunk)
    with_articles = I.convert({**paths, "articles": article_file(tmp_path, x, article, chunk)}, tmp_path / "a")
    assert np.array_equal(with_articles.vectors, x)
    alone = I.convert(paths, tmp_path / "b")
    rows = W.windows(alone, "val").target
    lone = np.isin(windows["val"][2], np.flatnonzero(np.bincount(article) == 7))
    assert np.allclose(alone.vectors[rows], windows["val"][1][~lone] / 3, atol=1e-6)
    assert alone.datasheet["counts"]["vectors in windows of val normalised"] == len(lone) * 6


@pytest.mark.parametrize("value, what", [(np.nan, "NaN"), (np.inf, "NaN or infinite"), (0.0, "a zero vector")])
def test_bad_article_vectors(tmp_path, value, what):
    x, article, chunk = world()
    paths, windows = sequence_files(tmp_path, x, article, chunk)
    bad = x.copy()
    rows = np.flatnonzero(article == 1)[[2]].tolist() + np.flatnonzero(article == 22).tolist()
    bad[rows] = value
    files = {**paths, "articles": article_file(tmp_path, bad, article, chunk)}
    with pytest.raises(LVMError, match=rf"articles\.npz: array vectors: row {rows[0]} .*{what}.*{len(rows)} bad rows"):
        I.convert(files, tmp_path / "store")
    assert not list(tmp_path.glob("store*"))
    store = I.convert(files, tmp_path / "store", drop_bad=True)
    assert np.array_equal(store.vectors, np.delete(x, rows, 0))
    assert store.datasheet["counts"]["vectors dropped (zero, NaN or infinite)"] == len(rows)
    assert 22 not in store.articles.index
    for s, w in windows.items():
        touched = (w[2] == 22) | ((w[2] == 1) & (w[3] - 6 <= 2) & (w[3] >= 2))
        kept = [part[~touched] for part in w]
        check_windows(store, {s: kept})
    for split in W.SPLITS:  # cut anew, no window crosses the place of a dropped vector either
        starts = W.windows(W.Store(**{**vars(store), "given": None}), split).start
        assert len(starts) and set(W.windows(store, split).start) == set(starts)


def test_bad_sequence_vectors(tmp_path):
    x, article, chunk = world()
    paths, windows = sequence_files(tmp_path, x, article, chunk)
    articles = article_file(tmp_path, x, article, chunk)
    c, t, ids, at = windows["train"]
    c, t = c.copy(), t.copy()
    c[3, 1], t[5] = np.nan, 0
    for indices in ({"target_indices": at}, {}):
        paths["train"] = saved(tmp_path, "train", contexts=c, targets=t, article_ids=ids, **indices)
        files = {**paths, "articles": articles}
        with pytest.raises(LVMError, match=r"contexts: row 3 .*1 bad rows"):
            I.convert(files, tmp_path / "store")
        assert not list(tmp_path.glob("store*"))
        store = I.convert(files, tmp_path / f"dropped{len(indices)}", drop_bad=True)
        check_windows(store, {**windows, "train": [np.delete(part, [3, 5], 0) for part in windows["train"]]})


def test_windows_across_a_gap(tmp_path):
    x, article, chunk = world()
    paths, windows = sequence_files(tmp_path, x, article, chunk)
    gap = chunk.copy()
    own = np.flatnonzero(article == 3)
    gap[own[6:]] += 2  # the file counts on, as if two chunks had been left out
    c, t, ids, at = windows["train"]
    moved = [gap[(article == a) & (chunk == p)][0] for a, p in zip(ids, at, strict=True)]
    paths["train"] = saved(tmp_path, "train", contexts=c, targets=t, article_ids=ids, target_indices=moved)
    files = {**paths, "articles": article_file(tmp_path, x, article, gap)}
    with pytest.raises(LVMError, match=r"article 3.* gap"):
        I.convert(files, tmp_path / "store")
    store = I.convert(files, tmp_path / "store", drop_bad=True)
    crossing = (ids == 3) & (at >= 6)
    assert store.datasheet["counts"]["windows across a gap"] == crossing.sum() > 0
    assert len(W.windows(store, "train")) == (~crossing).sum()
    saved(tmp_path, "train", contexts=c, targets=t, article_ids=ids)
    with pytest.raises(LVMError, match=r"article 3.* gap"):
        I.convert(files, tmp_path / "by_vectors")
    again = I.convert(files, tmp_path / "by_vectors", drop_bad=True)
    assert np.array_equal(again.given.start, store.given.start)


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 2])
def test_round_trip_of_the_embedded_data(tmp_path, horizon):
    data = lvm.dataset("wikipedia", horizon=horizon)
    paths = I.export(data, tmp_path / "original")
    assert sorted(p.name for p in (tmp_path / "original").iterdir()) == sorted(p.name for p in paths.values())
    for path in paths.values():
        with np.load(path, allow_pickle=False) as z:  # no pickle is written
            assert all(len(z[name]) for name in z.files)
    store = I.convert(paths, tmp_path / "store")
    back = lvm.dataset(store, horizon=horizon)
    assert store.vectors.dtype == data.store.vectors.dtype and np.array_equal(store.vectors, data.store.vectors)
    assert np.array_equal(store.article, data.store.article) and np.array_equal(store.position, data.store.position)
    assert store.articles["title"].tolist() == data.store.articles["title"].tolist()
    for split in W.SPLITS:
        ours, theirs = getattr(back, split), getattr(data, split)
        assert np.array_equal(ours.start, theirs.start) and np.array_equal(ours.article, theirs.article)
    alone = lvm.dataset(I.convert({s: paths[s] for s in W.SPLITS}, tmp_path / "alone"), horizon=horizon)
    for split in W.SPLITS:
        ours, theirs = getattr(alone, split), getattr(data, split)
        lone = np.bincount(theirs.article) < horizon  # a skipped chunk of these is in no file
        kept = np.flatnonzero(~lone[theirs.article])
        assert np.array_equal(ours.store.vectors[ours.target], theirs.store.vectors[theirs.target[kept]])


@pytest.mark.parametrize("longest", [10, 2_000_000])
def test_round_trip_with_texts_gaps_and_sources(tmp_path, longest):
    x, article, chunk = world(articles=40, dtype=np.float16)
    chunk[article == 5] *= 2  # nothing but gaps: an article without a window
    texts = np.array([f"☃{i}" for i in range(len(x))], object)
    texts[7] = "é" * longest
    path = article_file(
        tmp_path, x, article, chunk, concept_texts=texts, article_sources=np.array(["a", "b"])[np.arange(40) % 2]
    )
    data = lvm.dataset(I.convert(path, tmp_path / "first"))
    fits = longest == 10  # plain, unless one long text would blow it up
    with contextlib.nullcontext() if fits else pytest.warns(UserWarning, match="texts"):
        paths = I.export(data, tmp_path / "original")
    assert ("concept_texts" in set(np.load(paths["articles"]).files)) == fits
    assert paths["articles"].stat().st_size < 1 << 20
    store = I.convert(paths, tmp_path / "second")
    assert list(store.texts) == list(texts) if fits else store.texts is None
    assert store.articles["source"].tolist() == data.store.articles["source"].tolist()
    for split in W.SPLITS:
        assert np.array_equal(W.windows(store, split).start, getattr(data, split).start)


def test_export_never_over_what_is_there(tmp_path):
    data = lvm.dataset("wikipedia", fast=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(LVMError, match="there"):
        I.export(data, tmp_path / "there")
    backward = lvm.dataset("wikipedia", fast=True, direction="backward")
    with pytest.raises(LVMError, match=r"backwards"):
        I.export(backward, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_opened_converts_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path / "outputs"))
    x, article, chunk = world()
    paths, windows = sequence_files(tmp_path, x, article, chunk)
    paths["articles"] = article_file(tmp_path, x, article, chunk, name="my articles!")
    first = I.opened(paths)
    check_windows(first, windows)
    folders = list((tmp_path / "outputs" / "imported").iterdir())
    assert len(folders) == 1 and folders[0].name.startswith("my-articles-")
    with monkeypatch.context() as m:
        m.setattr(I, "convert", lambda *a, **k: pytest.fail("converted again"))
        assert I.opened(paths).fingerprint == first.fingerprint

        class Files:
            train, val, ood, articles = (str(paths[k]) for k in ("train", "val", "ood", "articles"))

        assert I.opened(Files).fingerprint == first.fingerprint
    os.utime(paths["val"], ns=(1, 1))  # another file, for all we know
    I.opened(paths)
    assert len(list((tmp_path / "outputs" / "imported").iterdir())) == 2
    alone = I.opened(str(paths["articles"]))
    assert alone.given is None and len(list((tmp_path / "outputs" / "imported").iterdir())) == 3


def test_what_was_just_converted_can_be_trained_on(tmp_path, monkeypatch):
    """A run asks before each epoch whether the store is still what was opened: it has to know its last place."""
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path / "outputs"))
    data = lvm.dataset(str(article_file(tmp_path, *world())))
    V.check_unchanged(data.store)
    own = lvm.version("p6", {"batch_size": 64}, data="files", model="amn", epochs=1, device="cpu", precision="float32")
    assert len(list(lvm.train(own, data, tmp_path / "run"))) == 1


def test_opened_by_several_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path / "outputs"))
    path, found, gate = article_file(tmp_path, *world()), [], threading.Barrier(4)

    def use():
        gate.wait()
        found.append(I.opened(path).fingerprint)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert len(list((tmp_path / "outputs" / "imported").iterdir())) == 1


def test_another_process_was_first(tmp_path, monkeypatch):
    """It finishes between our look at the folder and our own renaming: its store is taken."""
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path / "outputs"))
    path, convert, calls = article_file(tmp_path, *world()), I.convert, []

    def slow(files, folder, **options):
        with V.writing(folder) as partial:
            (partial / "ours").touch()
            calls.append(convert(files, folder, **options))  # the other one

    def wrapped(files, folder, **options):
        try:
            return slow(files, folder, **options)
        except OSError as e:
            raise LVMError("as convert says it") from e

    monkeypatch.setattr(I, "convert", wrapped)
    store = I.opened(path)
    assert store.fingerprint == calls[0].fingerprint
    (folder,) = (tmp_path / "outputs" / "imported").iterdir()
    assert not (folder / "ours").exists()
    (folder / "vectors.npy").write_bytes(b"short")  # damaged later
    with pytest.raises(LVMError, match=rf"sha256.*articles\.npz.*{folder}"):
        I.opened(path)


def test_command_line(tmp_path, monkeypatch, capsys):
    x, article, chunk = world()
    x[4] = 0
    path = article_file(tmp_path, x, article, chunk)
    command = ["out", "--articles", path.name, "--name", "n"]
    failed = subprocess.run(
        [sys.executable, "-m", "lvmlib", "import", *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert failed.returncode == 1 and "--drop-bad" in failed.stderr and "Traceback" not in failed.stderr
    monkeypatch.chdir(tmp_path)
    assert commands.main(["import", *command, "--drop-bad", "--split-ood", "random"]) == 0
    assert "vectors dropped (zero, NaN or infinite): 1" in capsys.readouterr().out
    store = V.open_store(tmp_path / "out")
    assert store.name == "n" and "--drop-bad" in store.datasheet["command"]


# --- bounded memory --------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys, threading, time, tracemalloc
from pathlib import Path
from lvmlib import windows
from lvmlib.data import npz, original as I, store as V
npz.BLOCK_BYTES, windows.BLOCK_VALUES = 1 << 18, 1 << 15
top = Path(sys.argv[1])
I.convert(top / "warm.npz", top / "warm", ood="random")  # what is loaded on first use
peak, done = [0], threading.Event()

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

before, found = anonymous(), {}
threading.Thread(target=watch, daemon=True).start()
tracemalloc.start()
for size in ("small", "large"):
    folder = top / size
    sequences = {s: folder / f"{s}.npz" for s in windows.SPLITS}
    for form, files in {
        "articles": {"articles": folder / "articles.npz"},
        "unsorted": {"articles": folder / "unsorted.npz"},
        "sequences": {**sequences, "articles": folder / "unsorted.npz"},
        "rebuilt": sequences,
    }.items():
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
        I.convert(files, folder / form, ood="topic" if "train" in files else "random")
        found[f"{form} {size}"] = tracemalloc.get_traced_memory()[1] - start
done.set()
print(json.dumps([found, peak[0] - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_vectors(tmp_path):
    """3 and 12 MB of article vectors with six times that of windows, in blocks of a quarter of a MB: the peak of what
    is held in memory grows by less than a tenth of what the larger files have more."""
    dim, rows = 256, {}
    article_file(tmp_path, *world(), name="warm")
    for size, articles in {"small": 75, "large": 300}.items():
        folder, rng = tmp_path / size, np.random.default_rng(0)
        folder.mkdir()
        article, chunk = np.repeat(np.arange(articles), 40), np.tile(np.arange(40), articles)
        x = rng.standard_normal((len(article), dim)).astype(np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        order, edge = rng.permutation(len(x)), articles - 20
        saved(folder, "articles", True, vectors=x, article_indices=article, chunk_indices=chunk)
        article_file(folder, x[order], article[order], chunk[order], name="unsorted")
        parts = {"train": range(edge), "val": range(edge, edge + 10), "ood": range(edge + 10, articles)}
        sequence_files(folder, x, article, chunk, parts={s: set(own) for s, own in parts.items()})
        rows[size] = len(x)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    peaks, resident = json.loads(done.stdout)
    more = (rows["large"] - rows["small"]) * dim * 4
    for form, times in {"articles": 1, "unsorted": 1, "sequences": 6, "rebuilt": 5}.items():
        grown = peaks[f"{form} large"] - peaks[f"{form} small"]
        assert grown < 0.1 * times * more, (form, peaks)
    assert resident < 40 << 20, resident  # of 100 MB of files in all


@pytest.mark.skipif(not ENGLISH.exists(), reason="the shared sentence vectors are not here")
def test_english_sentences(tmp_path):
    store = I.convert(ENGLISH, tmp_path / "store", ood="source:mr")
    assert store.vectors.shape == (156_442, 384) and store.vectors.dtype == np.float16
    assert len(store.articles) == 4147 and set(store.articles["source"]) == {
        "mr",
        "abc",
        "brown",
        "state_union",
        "inaugural",
    }
    assert (store.articles["source"] == "mr").sum() == (store.articles["split"] == "ood").sum() == 1989
    with np.load(ENGLISH) as z:
        assert np.array_equal(store.article, z["article_indices"])
        assert np.array_equal(store.vectors[::1000], z["vectors"][::1000])


# --- damaged and hostile files ---------------------------------------------------------------------------------------


def base(**more):
    x, article, chunk = world()
    return {"vectors": x, "article_indices": article, "chunk_indices": chunk, **more}


def archive(arrays, compressed=True, raw=()):
    """The bytes of an .npz; `raw`: (member name, bytes) pairs put behind the arrays."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as file:
        for name, array in arrays.items():
            held = io.BytesIO()
            np.save(held, array, allow_pickle=True)
            file.writestr(f"{name}.npy", held.getvalue())
        for name, data in raw:
            file.writestr(name, data)
    return out.getvalue()


def npy(descr, shape, body, order=False):
    text = repr({"descr": descr, "fortran_order": order, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + body


def claimed(descr, shape, body=b"\0" * 64, name="vectors"):
    """An article file in which one array's header says something else."""
    arrays = base()
    arrays.pop(name)
    return archive(arrays, raw=[(f"{name}.npy", npy(descr, shape, body))])


def pickled(body, shape=None, name="concept_texts"):
    """An article file with an object array whose pickle is `body`."""
    shape = (len(world()[0]),) if shape is None else shape
    return archive(base(), raw=[(f"{name}.npy", npy("|O", shape, body))])


ARRAY = pickle.dumps(np.array(["a"] * len(world()[0]), object), 4)
PREFIX = ARRAY[:2] + ARRAY[11 : ARRAY.index(b"]\x94(") + 3]  # without its frame, up to the mark before the items
SUFFIX = b"et\x94b."


def array_of(items: bytes) -> bytes:
    return PREFIX + items + SUFFIX


def changed(at, value, name="vectors", **more):
    arrays = base(**more)
    arrays[name] = arrays[name].copy()
    arrays[name][at] = value
    return archive(arrays)


class Reduced:
    def __init__(self, what, args):
        self.made = what, args

    def __reduce__(self):
        return self.made


def patched(data: bytes, signature: bytes, offset: int, value: bytes) -> bytes:
    """Every zip record with this signature, changed at an offset."""
    out, at = bytearray(data), data.find(signature)
    while at >= 0:
        out[at + offset : at + offset + len(value)] = value
        at = data.find(signature, at + 1)
    return bytes(out)


def with_system(marker, protocol):
    held = np.empty(len(world()[0]), object)
    held[:] = [Runs(marker)] * len(held)
    return pickle.dumps(held, protocol)


COUNT = len(world()[0])
GOOD = archive(base(), compressed=False)

# name: (the article file's bytes, given the path a payload would touch; what the message must say)
ARTICLE_CASES = {
    "pickle that calls os.system": (lambda m: pickled(with_system(m, 4)), r"concept_texts.*posix\.system"),
    "the same in protocol 2": (lambda m: pickled(with_system(m, 2)), r"posix\.system"),
    "the same in protocol 0": (lambda m: pickled(with_system(m, 0)), r"system|copy_?reg"),
    "payload without an array": (lambda m: pickled(pickle.dumps(Runs(m))), r"posix\.system"),
    "text opcodes": (lambda m: pickled(b"cos\nsystem\n(S'touch %s'\ntR." % str(m).encode()), r"os\.system"),
    "INST": (lambda m: pickled(b"(S'touch %s'\nios\nsystem\n." % str(m).encode()), r"os\.system"),
    "builtins.eval": (lambda m: pickled(pickle.dumps(Reduced(eval, (f"open({str(m)!r}, 'w')",)))), r"builtins\.eval"),
    "a reduce within a reduce": (
        lambda m: pickled(pickle.dumps(Reduced(getattr, (Reduced(__import__, ("os",)), "system")))),
        r"builtins\.",
    ),
    "a call of a returned object": (lambda m: pickled(array_of(b"\x8c\x01x\x8c\x01y\x86N\x85R")), r"TypeError"),
    "subprocess in a member that is not needed": (
        lambda m: pickled(pickle.dumps(Reduced(subprocess.run, (["touch", str(m)],))), name="extra"),
        r"array extra.*subprocess\.run",
    ),
    "numpy's own loader": (lambda m: pickled(b"cnumpy\nload\n(X\x01\x00\x00\x00xtR."), r"numpy\.load"),
    "codecs.decode": (lambda m: pickled(b"c_codecs\ndecode\n."), r"_codecs\.decode"),
    "another codec than latin1": (
        lambda m: pickled(array_of(b"c_codecs\nencode\n(X\x01\x00\x00\x00xX\x03\x00\x00\x00hextR")),
        r"encode",
    ),
    "extension code": (lambda m: pickled(array_of(b"\x82\x01")), r"opcode EXT1"),
    "extension code of 4 bytes": (lambda m: pickled(array_of(b"\x84\x01\x00\x00\x00")), r"opcode EXT4"),
    "persistent id": (lambda m: pickled(array_of(b"Pid\n")), r"PERSID"),
    "binary persistent id": (lambda m: pickled(array_of(b"\x8c\x01xQ")), r"BINPERSID"),
    "NEWOBJ": (lambda m: pickled(array_of(b"cnumpy\nndarray\n)\x81")), r"opcode NEWOBJ"),
    "NEWOBJ of a foreign class": (
        lambda m: pickled(array_of(b"ccollections\nCounter\n)\x81")),
        r"collections\.Counter",
    ),
    "OBJ": (lambda m: pickled(array_of(b"(cnumpy\nndarray\no")), r"opcode OBJ"),
    "BUILD on a dict": (lambda m: pickled(array_of(b"}}b")), r"shape"),
    "BUILD twice on an array": (lambda m: pickled(ARRAY[:-1] + b"(K\x01)NNNtb."), r"inside"),
    "a list that holds itself": (lambda m: pickled(array_of(b"]\x94h\x13a" + b"N" * (COUNT - 1))), r"row 0: is list"),
    "a dict that holds itself": (
        lambda m: pickled(array_of(b"}\x94\x8c\x01ah\x13s" + b"N" * (COUNT - 1))),
        r"row 0: is dict",
    ),
    "the array's own list in itself": (lambda m: pickled(array_of(b"h\x12" + b"N" * (COUNT - 1))), r"row 0: is list"),
    "a tuple as a key": (lambda m: pickled(array_of(b"}NN\x86Ns" + b"N" * (COUNT - 1))), r"keys that are no texts"),
    "keys put into a list": (lambda m: pickled(array_of(b"]\x8c\x01aNs" + b"N" * (COUNT - 1))), r"no texts"),
    "a number of 6,000 digits": (
        lambda m: archive(
            {k: v for k, v in base().items() if k != "chunk_indices"},
            raw=[
                ("chunk_indices.npy", npy("|O", (COUNT,), array_of(b"I0x" + b"f" * 5000 + b"\n" + b"N" * (COUNT - 1))))
            ],
        ),
        r"chunk_indices, row 0: is int",
    ),
    "BUILD on a stand-in": (
        lambda m: pickled(array_of(b"cnumpy\nndarray\n}\x8c\x04nameNsb" + b"N" * (COUNT - 1))),
        r"inside",
    ),
    "a byte array of 16 exabytes": (lambda m: pickled(array_of(b"\x96" + b"\xff" * 8)), r"opcode BYTEARRAY8"),
    "a set": (lambda m: pickled(array_of(b"\x8f")), r"opcode EMPTY_SET"),
    "a name that is a list of lists": (lambda m: pickled(array_of(b"]]\x93")), r"STACK_GLOBAL requires str"),
    "a hundred brackets deep": (lambda m: pickled(array_of(b"(" * 200)), r"cannot be read"),
    "a memo number that takes gigabytes": (
        lambda m: pickled(array_of(b"Nr\xff\xff\xff\x7fj\xff\xff\xff\x7e")),
        r"UnpicklingError: Memo|KeyError",
    ),
    "a text of 16 exabytes": (lambda m: pickled(array_of(b"\x8d" + b"\xff" * 8)), r"BINUNICODE8 exceeds"),
    "millions of empty dicts": (lambda m: pickled(PREFIX + b"}" * 1_100_000 + SUFFIX), r"too large"),
    "doubling tuples": (
        lambda m: pickled(
            PREFIX + b"\x8c\x01x\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(19, 90)) + SUFFIX,
            name="cpe_ids",
        ),
        r"shape",
    ),
    "fewer items than the shape": (lambda m: pickled(array_of(b"\x8c\x01a")), r"shape"),
    "more items than the shape": (lambda m: pickled(ARRAY, shape=(COUNT - 1,)), r"concept_texts.*shape|more than"),
    "an array that claims a huge shape": (
        lambda m: pickled(ARRAY.replace(b"K\x01M" + struct.pack("<H", COUNT), b"K\x01J\xff\xff\xff\x7f", 1)),
        r"shape",
    ),
    "a nested array that claims a huge shape": (
        lambda m: pickled(
            array_of(pickle.dumps(np.arange(3), 2)[2:-1].replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85", 1))
        ),
        r"shape|cannot be read",
    ),
    "a structured type in a pickle": (
        lambda m: pickled(array_of(pickle.dumps(np.zeros(1, [("a", "i4")])[0], 2)[2:-1])),
        r"structured type|plain|numpy",
    ),
    "texts that are numbers": (
        lambda m: archive(base(concept_texts=np.array([1.5] * COUNT, object))),
        r"row 0: is float",
    ),
    "texts of another length": (
        lambda m: archive(base(concept_texts=np.array(["a"]))),
        r"concept_texts: has shape \(1,\)",
    ),
    "bytes that are no UTF-8": (
        lambda m: archive(base(concept_texts=np.array([b"\xff\xfe"] * COUNT))),
        r"UnicodeDecodeError",
    ),
    "code points that there are not": (
        lambda m: archive(base(), raw=[("concept_texts.npy", npy("<U1", (COUNT,), b"\xff\xff\xff\x7f" * COUNT))]),
        r"row 0: .*code points",
    ),
    "object array that unpacks to too much": (
        lambda m: pickled(PREFIX + (b"\x8d" + struct.pack("<Q", 20 << 20) + b"a" * (20 << 20)) + SUFFIX),
        r"unpacks to 20,",
    ),
    "huge vectors in the header": (lambda m: claimed("<f4", (10**9, 768)), r"1000000000, 768"),
    "a shape that overflows": (lambda m: claimed("<f4", (2**62, 2**62)), r"impossible shape"),
    "a negative shape": (lambda m: claimed("<f4", (-4, -4)), r"impossible shape"),
    "a shape that is too small": (lambda m: claimed("<f4", (2, 4)), r"\(2, 4\)"),
    "huge unicode": (lambda m: claimed("<U99999999", (2**20,), name="article_indices"), r"promises|row"),
    "a structured type": (
        lambda m: archive({**base(), "vectors": np.zeros(5, [("a", "f4"), ("b", "i4")])}),
        r"vectors: has type",
    ),
    "a header with code in it": (
        lambda m: archive(
            {k: v for k, v in base().items() if k != "vectors"},
            raw=[("vectors.npy", b"\x93NUMPY\x01\x00v\x00" + b"__import__('os').system('touch x')".ljust(117) + b"\n")],
        ),
        r"vectors: .*malformed",
    ),
    "a header that is cut off": (
        lambda m: archive(
            {"article_indices": [0], "chunk_indices": [0]}, raw=[("vectors.npy", npy("<f4", (1, 4), b"")[:60])]
        ),
        r"reading array header",
    ),
    "a member that is no array": (lambda m: archive(base(), raw=[("concept_texts.npy", b"hello")]), r"reading magic"),
    "a zip cut in half": (lambda m: GOOD[: len(GOOD) // 2], r"not a readable"),
    "a zip without its last bytes": (lambda m: GOOD[:-10], r"not a readable"),
    "a zip of a few bytes": (lambda m: GOOD[:7], r"not a readable"),
    "a zip whose middle is missing": (lambda m: GOOD[:300] + GOOD[900:], r"cannot be read|not a readable"),
    "an empty file": (lambda m: b"", r"not a readable"),
    "a wrong checksum": (lambda m: GOOD[:400] + b"\x00\x01\x02\x03" + GOOD[404:], r"vectors: .*Bad CRC"),
    "a size in the directory that is not the member's": (
        lambda m: patched(GOOD, b"PK\x01\x02", 24, struct.pack("<I", 10**6)),
        r"1,000,000 bytes",
    ),
    "a zip bomb of zero vectors": (
        lambda m: archive(
            {
                "vectors": np.zeros((1 << 20, 16), np.float32),
                **{k: np.zeros(1 << 20, np.int8) for k in base() if k != "vectors"},
            }
        ),
        r"rows 0 and 1 ",
    ),
    "a zip bomb that would fill the disk": (
        lambda m: patched(claimed("<f4", (2**24, 16)), b"PK\x01\x02", 24, struct.pack("<I", 2**30 + 128)),
        r"1,073,741,952 bytes",
    ),
    "member names that lead out": (lambda m: archive(base(), raw=[("../../x.npy", b"x")]), r"leads out"),
    "an absolute member name": (lambda m: archive(base(), raw=[("/tmp/x.npy", b"x")]), r"leads out"),
    "a name given twice": (lambda m: archive(base(), raw=[("vectors.npy", b"x")]), r"'vectors\.npy'.*twice"),
    "an encrypted member": (
        lambda m: patched(patched(GOOD, b"PK\x01\x02", 8, b"\x01"), b"PK\x03\x04", 6, b"\x01"),
        r"is encrypted",
    ),
    "an unusual packing": (lambda m: patched(GOOD, b"PK\x01\x02", 10, b"\x0e"), r"packed by method 14"),
    "an .npy under the name .npz": (lambda m: npy("<f4", (1, 4), b"\0" * 16), r"single \.npy"),
    "a text under the name .npz": (lambda m: b"vectors: none\n" * 50, r"not a readable"),
    "an executable under the name .npz": (lambda m: b"\x7fELF" + bytes(range(256)) * 9, r"not a readable"),
    "no vectors": (lambda m: archive({"article_indices": [0]}), r"missing: vectors, chunk_indices"),
    "a sequence file as articles": (lambda m: archive({"contexts": np.ones((2, 5, 4))}), r"sequence file"),
    "integer vectors": (lambda m: archive(base(vectors=np.ones((COUNT, 4), np.int8))), r"int8"),
    "complex vectors": (lambda m: archive(base(vectors=np.ones((COUNT, 4), np.complex64))), r"complex64"),
    "object vectors": (lambda m: archive(base(vectors=world()[0].astype(object))), r"vectors: .*object"),
    "vectors without a dimension": (lambda m: archive(base(vectors=np.ones(COUNT))), r"chunks, dimension"),
    "empty articles": (
        lambda m: archive(
            {"vectors": np.ones((0, 4)), "article_indices": np.ones(0, int), "chunk_indices": np.ones(0, int)}
        ),
        r"\(0, 4\)",
    ),
    "NaN": (lambda m: changed((9, 1), np.nan), r"row 9 .*NaN"),
    "infinite": (lambda m: changed((9, 1), -np.inf), r"row 9 .*infinite"),
    "zero": (lambda m: changed(9, 0), r"row 9 .*zero"),
    "duplicate positions": (lambda m: changed(1, 0, "chunk_indices"), r"rows 0 and 1 "),
    "a negative article": (lambda m: changed(3, -1, "article_indices"), r"article_indices, row 3: is -1"),
    "a position beyond 32 bits": (
        lambda m: changed(3, 2**40, "chunk_indices"),
        r"chunk_indices, row 3: is 1099511627776",
    ),
    "fractions": (
        lambda m: changed(3, 0.5, "chunk_indices", chunk_indices=world()[2].astype(float)),
        r"chunk_indices, row 3: is 0\.5; needed is a whole number",
    ),
    "NaN among the indices": (
        lambda m: changed(3, np.nan, "chunk_indices", chunk_indices=world()[2].astype(float)),
        r"chunk_indices, row 3: is nan",
    ),
    "indices that are texts": (lambda m: archive(base(article_indices=np.array(["a"] * COUNT))), r"<U1"),
    "indices of another length": (lambda m: archive(base(article_indices=np.zeros(3, int))), r"\(3,\)"),
    "too few articles to split": (
        lambda m: archive({k: v[world()[1] < 5] for k, v in base().items()}),
        r"5 of 5 articles",
    ),
}


def refused(files, folder, message, marker=None, **options):
    before = sorted(p.name for p in folder.iterdir())
    begin = time.process_time()
    with pytest.raises(LVMError, match=message) as caught:
        I.convert(files, folder / "store", **options)
    assert type(caught.value) is LVMError and len(str(caught.value)) < 1200
    assert time.process_time() - begin < 5
    assert sorted(p.name for p in folder.iterdir()) == before  # nothing left, whole or in part
    assert marker is None or not marker.exists()
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", ARTICLE_CASES)
def test_hostile_article_files(tmp_path, case):
    build, message = ARTICLE_CASES[case]
    marker = tmp_path / "MARKER"
    path = tmp_path / "articles.npz"
    path.write_bytes(build(marker))
    told = refused(path, tmp_path, message, marker)
    assert "articles.npz" in told


def test_the_payload_would_have_run(tmp_path):
    """The hostile pickles above are live: numpy with allow_pickle runs them."""
    marker, path = tmp_path / "MARKER", tmp_path / "articles.npz"
    path.write_bytes(pickled(with_system(marker, 4)))
    with np.load(path, allow_pickle=True) as z, np.errstate(all="ignore"):
        assert len(z["concept_texts"]) == COUNT
    assert marker.exists()


def sequences(**change):
    """The four files of a good set; `change`: {file: function of its arrays}."""

    def build(folder):
        x, article, chunk = world()
        paths = {"articles": article_file(folder, x, article, chunk)}
        for s, own in PARTS.items():
            c, t, ids, at = cut(x, article, chunk, own)
            arrays = {"contexts": c, "targets": t, "article_ids": ids, "target_indices": at}
            arrays = {k: v.copy() for k, v in arrays.items()}
            if s in change:
                arrays = change[s](arrays) or arrays
            paths[s] = saved(folder, s, **arrays)
        return paths

    return build


def set_at(name, at, value):
    def change(arrays):
        arrays[name][at] = value

    return change


def without(*names, **more):
    return lambda arrays: {**{k: v for k, v in arrays.items() if k not in names}, **more}


def listed(function):
    """`metadata` in place of the plain arrays, its dicts made by `function(article, target)`."""

    def change(arrays):
        ids, at = arrays["article_ids"].tolist(), arrays["target_indices"].tolist()
        metadata = np.empty(len(ids), object)
        metadata[:] = [function(a, t) for a, t in zip(ids, at, strict=True)]
        return {"contexts": arrays["contexts"], "targets": arrays["targets"], "metadata": metadata}

    return change


def other_horizon(arrays):
    x, article, chunk = world()
    c, t, ids, at = cut(x, article, chunk, PARTS["val"], horizon=3)
    return {"contexts": c, "targets": t, "article_ids": ids, "target_indices": at}


def in_two_splits(arrays):
    x, article, chunk = world()
    c, t, ids, at = cut(x, article, chunk, {20, 3})
    return {"contexts": c, "targets": t, "article_ids": ids, "target_indices": at}


def shifted(arrays):
    arrays["target_indices"] += 1


SEQUENCE_CASES = {
    "an article that the article file lacks": ({"val": set_at("article_ids", 2, 77)}, r"window 2 .*77"),
    "a target index out of range": ({"val": set_at("target_indices", 2, 99)}, r"window 2 .*99\).*none"),
    "a negative target index": ({"val": set_at("target_indices", 2, -3)}, r"target_indices, row 2: is -3"),
    "a wrong target index": ({"val": set_at("target_indices", 0, 2)}, r"window 0 .*-4 to 0 and 2 .*none, .*0\.806"),
    "target indices that count from 1": ({"train": shifted}, r"train\.npz: window \d+ .*target"),
    "a wrong target": (
        {"train": set_at("targets", 1, np.eye(4)[0])},
        r"window 1 .*1 to 5 and 7 .*(1\.000, ){5}-0\.430",
    ),
    "a wrong context vector": (
        {"train": set_at("contexts", (1, 3), np.eye(4)[0])},
        r"window 1 .*(1\.000, ){3}-0\.617, 1\.000, 1\.000",
    ),
    "a wrong article": ({"train": set_at("article_ids", 1, 4)}, r"window 1 \(article 4"),
    "windows of another horizon": ({"val": other_horizon}, r"window 0 .*horizon 2;.*horizon 3 "),
    "an article in two splits": ({"val": in_two_splits}, r"both train and val"),
    "no windows": ({"val": lambda a: {k: v[:0] for k, v in a.items()}}, r"contexts: .*\(0, 5, 4\)"),
    "no contexts": ({"val": without("contexts")}, r"no contexts"),
    "no targets": ({"val": without("targets")}, r"no targets"),
    "no articles": ({"val": without("article_ids")}, r"article_ids"),
    "contexts in two spellings": (
        {"val": lambda a: {**a, "context_sequences": a["contexts"]}},
        r"both context_sequences and contexts",
    ),
    "fewer targets than contexts": (
        {"val": lambda a: {**a, "targets": a["targets"][1:]}},
        r"targets: .*\(11, 4\).*\(12, 4\)",
    ),
    "fewer articles than contexts": ({"val": lambda a: {**a, "article_ids": a["article_ids"][1:]}}, r"article_ids: "),
    "targets of another dimension": (
        {"val": lambda a: {**a, "targets": np.ones((len(a["targets"]), 3))}},
        r"same dimension",
    ),
    "a file of another dimension": (
        {"val": lambda a: {**a, "targets": a["targets"][:, :3], "contexts": a["contexts"][..., :3]}},
        r"5 vectors of 3 .*train\.npz 5 of 4",
    ),
    "a file of another context length": ({"val": lambda a: {**a, "contexts": a["contexts"][:, 1:]}}, r"4 vectors of 4"),
    "integer contexts": ({"val": lambda a: {**a, "contexts": a["contexts"].astype(int)}}, r"contexts: .*int64"),
    "NaN in a context": ({"ood": set_at("contexts", (1, 2, 0), np.nan)}, r"ood\.npz: .*row 1 .*NaN"),
    "metadata without articles": (
        {"val": listed(lambda a, t: {"target_chunk_index": t, "title": "x"})},
        r"window 0: .*article_index",
    ),
    "metadata with texts for numbers": (
        {"val": listed(lambda a, t: {"article_index": str(a), "target_chunk_index": t})},
        r"window 0, article_index: is str",
    ),
    "metadata with lists for numbers": (
        {"val": listed(lambda a, t: {"article_index": [a], "target_chunk_index": t})},
        r"window 0, article_index: is list",
    ),
    "metadata with fractions": (
        {"val": listed(lambda a, t: {"article_index": a + 0.5, "target_chunk_index": t})},
        r"article_index: is 20\.5",
    ),
    "metadata with target indices here and there": (
        {"val": listed(lambda a, t: {"article_index": a, **({"target_chunk_index": t} if t % 2 else {})})},
        r"window \d+: .*target_chunk_index",
    ),
    "metadata of numbers": ({"val": listed(lambda a, t: a)}, r"window 0: is int"),
    "metadata of objects": ({"val": listed(lambda a, t: Path("x"))}, r"pathlib"),
    "metadata that runs code": ({"val": listed(lambda a, t: {"article_index": Runs("MARKER")})}, r"posix\.system"),
    "metadata that runs code, and is not needed": (
        {"val": lambda a: {**a, "metadata": dicts(a["article_ids"], a["target_indices"], more=Runs("MARKER"))}},
        r"metadata.*posix\.system",
    ),
    "metadata that contradicts the plain arrays": (
        {
            "val": lambda a: {
                **{k: v for k, v in a.items() if k != "target_indices"},
                "metadata": dicts(a["article_ids"] + 1, a["target_indices"]),
            }
        },
        r"article_ids.* 21 by metadata",
    ),
    "metadata of one item": ({"val": without("article_ids", metadata=np.array({"a": 1}, object))}, r"metadata: .*\(\)"),
}


@pytest.mark.parametrize("case", SEQUENCE_CASES)
def test_hostile_sequence_files(tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, message = SEQUENCE_CASES[case]
    refused(sequences(**change)(tmp_path), tmp_path, message, tmp_path / "MARKER")


def mirrored(arrays):
    return without("target_indices", contexts=arrays["contexts"][::-1])(arrays)


def noisy(arrays):
    random = np.random.default_rng(0)
    return {**arrays, "targets": random.standard_normal(arrays["targets"].shape)}


def ones(arrays):
    return {**arrays, "targets": arrays["targets"] * 0 + 1, "contexts": arrays["contexts"] * 0 + 1}


def early(arrays):
    return {**arrays, "target_indices": arrays["target_indices"] - 1}


BY_VECTORS = {s: without("target_indices") for s in PARTS}


@pytest.mark.parametrize(
    "change, message",
    [
        (BY_VECTORS | {"val": mirrored}, r"val\.npz: window 0 \(article 20\): .* 2 chunks .*best cosine"),
        (
            BY_VECTORS | {"val": lambda a: without("target_indices")(other_horizon(a))},
            r"val\.npz: window 0 \(article 20\): .* 2 chunks ",
        ),
    ],
)
def test_windows_that_are_nowhere_by_vectors(tmp_path, change, message):
    refused(sequences(**change)(tmp_path), tmp_path, message)


@pytest.mark.parametrize(
    "change, message",
    [
        (BY_VECTORS, r"train\.npz.*target_indices"),
        ({"train": set_at("contexts", (1, 0), np.eye(4)[0])}, r"train\.npz: window \d .*horizon 2; .*-?0\.\d"),
        ({"train": set_at("targets", 0, np.eye(4)[0])}, r"train\.npz: window \d .*horizon 2; .*-?0\.\d"),
        (dict.fromkeys(PARTS, noisy), r"horizons 1 to 16 "),
        (dict.fromkeys(PARTS, ones), r"horizons 1, 2(, \d+)* "),
        (dict.fromkeys(PARTS, lambda a: {k: v[:1] for k, v in a.items()}), r" 0 could be compared"),
        ({"train": early}, r"target index 5 "),
    ],
)
def test_sequences_alone_that_do_not_agree(tmp_path, change, message):
    files = sequences(**change)(tmp_path)
    refused({s: files[s] for s in PARTS}, tmp_path, message)


def test_chunks_that_are_all_the_same_give_no_horizon(tmp_path):
    files = sequences(**dict.fromkeys(PARTS, ones))(tmp_path)
    files["articles"] = article_file(tmp_path, np.ones((COUNT, 4)), *world()[1:])
    refused(files, tmp_path, r"horizons 1, 2(, \d+)* ")


def test_what_is_given_is_checked(tmp_path):
    path = article_file(tmp_path, *world())
    refused({"article": path}, tmp_path, r"'article' .*'articles'")
    refused({}, tmp_path, r"train, val, ood, or articles")
    refused({"articles": 5}, tmp_path, r"articles is 5")
    refused(tmp_path / "none.npz", tmp_path, r"none\.npz")
    refused(tmp_path, tmp_path, str(tmp_path))
    refused({"train": path}, tmp_path, r"articles\.npz.*article file")
    refused({**sequences()(tmp_path)}, tmp_path, r"'random'", ood="random")
    (tmp_path / "there").mkdir()
    (tmp_path / "plain").touch()
    for folder in ("there", "plain/store"):
        with pytest.raises(LVMError, match=folder):
            I.convert(path, tmp_path / folder)
    with pytest.raises(LVMError, match=r"none\.npz"):
        I.opened(tmp_path / "none.npz")


def test_a_full_disk_is_told_before_it_is_filled(tmp_path, monkeypatch):
    path = article_file(tmp_path, *world())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage._replace(free=1000))
    refused(path, tmp_path, r"articles\.npz: array vectors: needs 0\.0 GB")


def test_bad_vectors_are_counted_through_all_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_format, "BLOCK_BYTES", 256)
    x, article, chunk = world()
    refused(article_file(tmp_path, x * 0, article, chunk), tmp_path, rf"row 0 .*zero.*{COUNT} bad rows")
    path = article_file(tmp_path, np.where(article[:, None] < 9, 0, x), article, chunk)
    assert len(I.convert(path, tmp_path / "s", drop_bad=True).vectors) == (article >= 9).sum()


def test_self_references_and_doubling_are_not_walked(tmp_path):
    """Within what is not looked at they are harmless: the windows are read, in no time."""
    x, article, chunk = world()
    paths, windows = sequence_files(tmp_path, x, article, chunk)
    own, doubled = {}, ()
    own["own"] = own
    for _ in range(70):
        doubled = (doubled, doubled)
    for s, (c, t, ids, at) in windows.items():
        paths[s] = saved(tmp_path, s, contexts=c, targets=t, metadata=dicts(ids, at, more=[own, doubled]))
    begin = time.process_time()
    check_windows(I.convert({**paths, "articles": article_file(tmp_path, x, article, chunk)}, tmp_path / "s"), windows)
    assert time.process_time() - begin < 5


def test_all_windows_bad(tmp_path):
    files = sequences(val=set_at("contexts", slice(None), np.nan))(tmp_path)
    refused(files, tmp_path, r"val\.npz: none of its ", drop_bad=True)
    x, article, chunk = world()
    path = article_file(tmp_path, x * 0, article, chunk)
    refused(path, tmp_path, r"no vector is left", drop_bad=True)


def test_fuzz():
    counts = fuzz.main(200, seed=1)
    assert sum(counts.values()) == 200
    assert {result for _, result in counts} == {"store", "refused"}
