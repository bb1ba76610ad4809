"""The original's files: every spelling is read, and the same windows come back."""

import io
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fuzz_importers import LENGTH, cut, dicts, world
from original_files import ARTICLE, CHUNK, NAMES, PARTS, X, article_file, check_windows, refused, saved, sequence_files

import lvmlib as lvm
from lvmlib import windows as W
from lvmlib.data import original as I
from lvmlib.data import store as V

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "fivecat_original.npz"

# --- the forms -------------------------------------------------------------------------------------------------------


SPELLINGS = [
    ("context_sequences", "target_vectors"),
    ("contexts", "targets"),
    ("train_context_sequences", "train_target_vectors"),
]


@pytest.mark.parametrize("contexts, targets", SPELLINGS)
@pytest.mark.parametrize("form", ["arrays", "metadata", "both"])
def test_every_spelling(tmp_path, contexts, targets, form):
    windows = {s: cut(X, ARTICLE, CHUNK, own) for s, own in PARTS.items()}
    paths = {"articles": article_file(tmp_path)}
    for s, (c, t, ids, at) in windows.items():
        metadata = {"metadata": dicts(ids, at, title="t", more=[1, (2, None)])}
        arrays = {"article_ids": ids, "target_indices": at.astype(np.float64)}
        more = {"arrays": arrays, "metadata": metadata, "both": {**arrays, **metadata}}[form]
        paths[s] = saved(tmp_path, s, compressed=form == "both", **{contexts: c, targets: t}, **more)
    store = I.convert(paths, tmp_path / "store")
    check_windows(store, windows)
    assert store.vectors.dtype == np.float32 and np.array_equal(store.vectors, X)
    assert store.articles["split"].tolist() == ["train"] * 20 + ["val"] * 5 + ["ood"] * 5
    assert store.datasheet["encoder"] == "not recorded in the files"
    assert str(tmp_path) not in (tmp_path / "store" / "datasheet.yaml").read_text()
    assert V.open_store(tmp_path / "store").fingerprint == store.fingerprint


@pytest.mark.parametrize("protocol", range(2, 6))  # those that numpy has written
def test_metadata_of_every_pickle_protocol(tmp_path, protocol):
    paths, windows = sequence_files(tmp_path)
    for s, (c, t, ids, at) in windows.items():
        metadata = dicts(np.int64(ids), at, title="naïve", score=np.float32(0.5), raw=b"\xff")
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": metadata.shape})
        saved(tmp_path, s, contexts=c, targets=t)
        with zipfile.ZipFile(paths[s], "a") as file:
            file.writestr("metadata.npy", head.getvalue() + pickle.dumps(metadata, protocol))
    check_windows(I.convert(paths | {"articles": article_file(tmp_path)}, tmp_path / "store"), windows)


@pytest.mark.parametrize("horizon, form", [(1, "metadata"), (2, "article_ids"), (5, "article_ids")])
def test_article_numbers_only_are_matched_by_vectors(tmp_path, horizon, form):
    x, article, chunk = world(articles=30)
    parts = {s: {a for a in own if (article == a).sum() >= LENGTH + horizon} for s, own in PARTS.items()}
    order = np.random.default_rng(0).permutation
    paths, windows = sequence_files(tmp_path, x, article, chunk, horizon, NAMES[:3], parts, order)
    for s, (c, t, ids, _) in windows.items() if form == "metadata" else ():
        metadata = np.array([{"article_index": np.int64(a)} for a in ids], object)
        saved(tmp_path, s, contexts=c, targets=t, metadata=metadata)
    store = I.convert({**paths, "articles": article_file(tmp_path, x, article, chunk)}, tmp_path / "store")
    check_windows(store, windows, horizon)
    assert "vectors" in store.datasheet["matched"]["train"]


def test_repeated_chunks_are_found_by_the_whole_context(tmp_path):
    size = np.array([8, 30, 8])
    article, chunk = np.repeat(np.arange(3), size), np.concatenate([np.arange(n) for n in size])
    x = np.random.default_rng(0).standard_normal((len(article), 8)).astype(np.float32)
    x[18:22] = x[8:12]  # four chunks of a context are the same, the fifth differs
    x[30:37] = x[23:30]  # and here a whole window is there twice
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    files = {"x": x, "article": article, "chunk": chunk, "names": NAMES[:3]}
    files |= {"parts": {"train": {1}, "val": {0}, "ood": {2}}}
    paths, windows = sequence_files(tmp_path, **files)
    paths["articles"] = article_file(tmp_path, x, article, chunk)
    check_windows(I.convert(paths, tmp_path / "store"), windows)  # the two equal ones in the order of the file
    _, backwards = sequence_files(tmp_path, **files, order=lambda count: np.arange(count)[::-1])
    store = I.convert(paths, tmp_path / "backwards")
    assert store.datasheet["counts"]["windows with several equal places in their article"] == 2
    w = W.windows(store, "train")
    assert np.array_equal(store.vectors[w.context_rows(np.arange(len(w)))], backwards["train"][0])
    assert len(set(w.start)) == len(w)


@pytest.mark.parametrize("horizon, shuffled", [(1, True), (2, False), (3, True)])
def test_sequences_alone_are_rebuilt(tmp_path, horizon, shuffled):
    x, article, chunk = world(longest=20)
    chunk = chunk + 7 * article  # positions need not begin with 0
    parts = {s: {a for a in own if (article == a).sum() >= LENGTH + 2 * horizon - 1} for s, own in PARTS.items()}
    order = np.random.default_rng(0).permutation if shuffled else np.arange
    paths, windows = sequence_files(tmp_path, x, article, chunk, horizon, parts=parts, order=order)
    store = I.convert(paths, tmp_path / "store")
    check_windows(store, windows, horizon)
    used = np.isin(article, [a for own in parts.values() for a in own])
    assert np.array_equal(store.vectors, x[used]) and np.array_equal(store.position, chunk[used])


def test_rebuilding_drops_windows_whose_skipped_chunk_is_nowhere(tmp_path):
    lone = np.flatnonzero(np.bincount(ARTICLE) == 7)  # one window of horizon 2
    paths, windows = sequence_files(tmp_path)
    store = I.convert(paths, tmp_path / "store")
    (dropped,) = [n for why, n in store.datasheet["counts"].items() if "between context and target" in why]
    assert dropped == len(lone) > 0
    check_windows(store, {s: [part[~np.isin(w[2], lone)] for part in w] for s, w in windows.items()})


def test_one_file_may_hold_all(tmp_path):
    """The golden file of 5CAT: article vectors and the windows of two splits, under val_… and ood_…."""
    z = np.load(GOLDEN)
    store = I.convert({"val": GOLDEN, "ood": GOLDEN, "articles": GOLDEN}, tmp_path / "store")
    windows = {s: [z[f"{s}_{n}"] for n in NAMES] for s in ("val", "ood")}
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
    refused(path, tmp_path, "'films'", ood="source:films")
    refused(path, tmp_path, "'topics'", ood="topics")
    short = article_file(tmp_path, x, article, chunk, article_sources=sources[:30])
    refused(short, tmp_path, "article_sources: .*39")


TEXTS = ["plain", "", "naïve – ☃ 𝔘", 'a "quoted"\nline\r\n', "x" * 3000]


@pytest.mark.parametrize("form", ["unicode", "objects", "bytes"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_texts_are_kept(tmp_path, form, shuffled):
    texts = [TEXTS[i % len(TEXTS)] + str(i) * (i % 2) for i in range(len(X))]
    order = np.random.default_rng(0).permutation(len(X)) if shuffled else np.arange(len(X))
    given = [texts[i] for i in order]
    encoded = [t.encode() for t in given]
    more = {
        "unicode": {"concept_texts": np.array(given)},
        "bytes": {"concept_texts": np.array(encoded)},
        "objects": {"concept_texts": np.array([None if t == "" else t for t in given], object)},
    }[form]
    path = article_file(tmp_path, X[order], ARTICLE[order], CHUNK[order], **more)
    store = I.convert(path, tmp_path / "store")
    assert np.array_equal(store.vectors, X) and np.array_equal(store.article, ARTICLE)
    assert list(store.texts) == texts and store.texts[3] == texts[3]
    assert ("rows sorted by article and position" in store.datasheet["counts"]) == shuffled


def test_texts_follow_dropped_rows_and_broken_characters(tmp_path):
    texts = [f"t{i}" for i in range(len(X))]
    texts[0] = "half \ud83d of a pair"
    x = np.where(np.arange(len(X))[:, None] == 5, np.nan, X)
    order = np.random.default_rng(0).permutation(len(X))
    path = article_file(tmp_path, x[order], ARTICLE[order], CHUNK[order], concept_texts=np.array(texts, object)[order])
    store = I.convert(path, tmp_path / "store", drop_bad=True)
    assert list(store.texts) == ["half \ufffd of a pair", *texts[1:5], *texts[6:]]


def test_the_files_order_is_kept_where_it_will_do(tmp_path):
    """Articles whose chunks are together, with rising positions, are not moved, whatever their numbers."""
    number = np.random.default_rng(0).permutation(100)
    article, parts = number[ARTICLE], {s: set(number[list(own)].tolist()) for s, own in PARTS.items()}
    paths, windows = sequence_files(tmp_path, article=article, parts=parts)
    store = I.convert({**paths, "articles": article_file(tmp_path, article=article)}, tmp_path / "store")
    assert np.array_equal(store.article, article) and np.array_equal(store.vectors, X)
    check_windows(store, windows)


# --- the vectors -----------------------------------------------------------------------------------------------------


FORMS = {
    "half": lambda x: x.astype(np.float16),
    "double": lambda x: x.astype(np.float64),
    "swapped": lambda x: x.astype(">f4"),
    "columns": np.asfortranarray,
    "columns of halves": lambda x: np.asfortranarray(x.astype(np.float16)),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_types_and_orders(tmp_path, form, compressed):
    numbers = {"article_indices": ARTICLE.astype(">i8"), "chunk_indices": CHUNK}
    store = I.convert(saved(tmp_path, "a", compressed, vectors=FORMS[form](X), **numbers), tmp_path / "store")
    expected = X.astype(np.float16) if "hal" in form else X
    assert store.vectors.dtype == expected.dtype and np.array_equal(store.vectors, expected)
    assert "vectors normalised" not in store.datasheet["counts"]


def test_norms(tmp_path):
    scale = np.where(np.arange(len(X)) % 3 == 0, 2.5, 1.0)
    paths, windows = sequence_files(tmp_path, 3 * X.astype(np.float64))
    store = I.convert({**paths, "articles": article_file(tmp_path, X * scale[:, None])}, tmp_path / "scaled")
    assert np.allclose(store.vectors, X, atol=1e-6)
    assert store.datasheet["counts"]["vectors normalised"] == (scale > 1).sum()
    assert store.datasheet["counts"]["norms of the vectors normalised"] == "2.5 to 2.5"
    alone = I.convert(paths, tmp_path / "alone")
    lone = np.isin(windows["val"][2], np.flatnonzero(np.bincount(ARTICLE) == 7))
    assert np.allclose(alone.vectors[W.windows(alone, "val").target], windows["val"][1][~lone] / 3, atol=1e-6)
    assert alone.datasheet["counts"]["vectors in windows of val normalised"] == len(lone) * 6


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_bad_article_vectors(tmp_path, value):
    paths, windows = sequence_files(tmp_path)
    bad = X.copy()
    rows = np.flatnonzero(ARTICLE == 1)[[2]].tolist() + np.flatnonzero(ARTICLE == 22).tolist()
    bad[rows] = value
    files = {**paths, "articles": article_file(tmp_path, bad)}
    refused(files, tmp_path, rf"articles\.npz: array vectors: row {rows[0]} .*{len(rows)} bad rows")
    store = I.convert(files, tmp_path / "store", drop_bad=True)
    assert np.array_equal(store.vectors, np.delete(X, rows, 0))
    assert store.datasheet["counts"]["vectors dropped (zero, NaN or infinite)"] == len(rows)
    assert 22 not in store.articles.index
    for s, w in windows.items():
        touched = (w[2] == 22) | ((w[2] == 1) & (w[3] - 6 <= 2) & (w[3] >= 2))
        check_windows(store, {s: [part[~touched] for part in w]})
    for split in W.SPLITS:  # cut anew, no window crosses the place of a dropped vector either
        starts = W.windows(replace(store, given=None), split).start
        assert len(starts) and set(W.windows(store, split).start) == set(starts)


def test_bad_sequence_vectors(tmp_path):
    paths, windows = sequence_files(tmp_path)
    articles = article_file(tmp_path)
    c, t, ids, at = windows["train"]
    c, t = c.copy(), t.copy()
    c[3, 1], t[5] = np.nan, 0
    for indices in ({"target_indices": at}, {}):
        paths["train"] = saved(tmp_path, "train", contexts=c, targets=t, article_ids=ids, **indices)
        files = {**paths, "articles": articles}
        refused(files, tmp_path, "contexts: row 3 .*1 bad rows")
        store = I.convert(files, tmp_path / f"dropped{len(indices)}", drop_bad=True)
        check_windows(store, {**windows, "train": [np.delete(part, [3, 5], 0) for part in windows["train"]]})


def test_windows_across_a_gap(tmp_path):
    paths, windows = sequence_files(tmp_path)
    gap = CHUNK.copy()
    own = np.flatnonzero(ARTICLE == 3)
    gap[own[6:]] += 2  # the file counts on, as if two chunks had been left out
    c, t, ids, at = windows["train"]
    moved = [gap[(a == ARTICLE) & (p == CHUNK)][0] for a, p in zip(ids, at, strict=True)]
    paths["train"] = saved(tmp_path, "train", contexts=c, targets=t, article_ids=ids, target_indices=moved)
    files = {**paths, "articles": article_file(tmp_path, chunk=gap)}
    refused(files, tmp_path, "article 3.* gap")
    store = I.convert(files, tmp_path / "store", drop_bad=True)
    crossing = (ids == 3) & (at >= 6)
    assert store.datasheet["counts"]["windows across a gap"] == crossing.sum() > 0
    assert len(W.windows(store, "train")) == (~crossing).sum()
    saved(tmp_path, "train", contexts=c, targets=t, article_ids=ids)
    refused(files, tmp_path, "article 3.* gap")
    again = I.convert(files, tmp_path / "by_vectors", drop_bad=True)
    assert np.array_equal(again.given.start, store.given.start)
