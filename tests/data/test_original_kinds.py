"""The kinds of files that the original's tools wrote (handbook §1, §5.10): spellings, borders, missing arrays."""

import numpy as np
import pytest
from original_files import ARTICLE, CHUNK, LENGTH, PARTS, X, article_file, saved, sequence_files

import lvmlib as lvm
from lvmlib import windows as W
from lvmlib.data import original as I
from lvmlib.data.original_place import BORDER


def cut_across(own, horizon):
    """Windows cut through all chunks of the articles `own`, one article after the other, as the original's tools did:
    contexts, targets, articles and places of the targets; and which cross a border."""
    rows = np.flatnonzero(np.isin(ARTICLE, list(own)))
    at = np.arange(len(rows) - LENGTH + 1 - horizon)
    target = rows[at + LENGTH - 1 + horizon]
    crossing = ARTICLE[rows[at]] != ARTICLE[target]
    return X[rows[at[:, None] + np.arange(LENGTH)]], X[target], ARTICLE[target], CHUNK[target], crossing


def across_files(folder, horizon, names=("contexts", "targets", "article_ids", "target_indices")):
    cuts = {split: cut_across(own, horizon) for split, own in PARTS.items()}
    paths = {s: saved(folder, s, **dict(zip(names, cut[:4], strict=False))) for s, cut in cuts.items()}
    return paths, cuts


@pytest.mark.parametrize("horizon", [1, 2])
@pytest.mark.parametrize("how", ["by index", "by vectors", "rebuilt"])
def test_windows_across_borders_are_counted_and_dropped(how, horizon, tmp_path):
    names = ("contexts", "targets", "article_ids", "target_indices")[: 3 if how == "by vectors" else 4]
    paths, cuts = across_files(tmp_path, horizon, names)
    if how != "rebuilt":
        paths["articles"] = article_file(tmp_path)
    store = I.convert(paths, tmp_path / "store")
    assert store.datasheet["counts"][BORDER] == sum(cut[4].sum() for cut in cuts.values()) > 0
    assert f"{BORDER}: " in I.summary(store)
    for split, (contexts, targets, ids, _, crossing) in cuts.items():
        own = W.windows(store, split, horizon)
        inside = ~crossing
        lost = inside.sum() - len(own)  # rebuilt, an article of one window has no chunk between context and target
        lone = np.isin(np.flatnonzero(np.bincount(ARTICLE) == 7), list(PARTS[split])).sum()
        assert lost == (lone if (how, horizon) == ("rebuilt", 2) else 0)
        if not lost:
            assert np.array_equal(store.vectors[own.context_rows(np.arange(len(own)))], contexts[inside])
            assert np.array_equal(store.vectors[own.target], targets[inside])
            assert np.array_equal(own.article, ids[inside])


def test_a_window_of_another_text_is_still_refused(tmp_path):
    paths, cuts = across_files(tmp_path, 1)
    contexts, targets, ids, at, crossing = cuts["train"]
    targets = targets.copy()
    targets[np.flatnonzero(crossing)[0]] *= -1  # no chunk of the article
    paths["train"] = saved(tmp_path, "train", contexts=contexts, targets=targets, article_ids=ids, target_indices=at)
    with pytest.raises(lvm.LVMError, match=r"train\.npz: window"):
        I.convert(paths | {"articles": article_file(tmp_path)}, tmp_path / "store")


@pytest.mark.parametrize("contexts", ["context_sequences", "contexts", "context", "X", "C", "sequences"])
@pytest.mark.parametrize("targets", ["target_vectors", "targets", "target", "y", "Y", "t"])
@pytest.mark.parametrize("prefix", ["", "train_"])
def test_spellings_of_sequence_files(contexts, targets, prefix, tmp_path):
    names = [prefix + name for name in (contexts, targets, "article_ids", "target_indices")]
    paths, windows = sequence_files(tmp_path, names=names, horizon=1)
    store = I.convert(paths, tmp_path / "store")
    assert len(W.windows(store, "train", 1)) == len(windows["train"][0])


@pytest.mark.parametrize("vectors", ["vectors", "embeddings", "X"])
@pytest.mark.parametrize("articles", ["article_indices", "article_ids"])
@pytest.mark.parametrize("positions", ["chunk_indices", "seq_idx", None])
def test_spellings_of_article_files(vectors, articles, positions, tmp_path):
    arrays = {vectors: X, articles: ARTICLE} | ({positions: CHUNK} if positions else {})
    store = I.convert(saved(tmp_path, "all", **arrays), tmp_path / "store", ood="random")
    wanted = CHUNK if positions else np.concatenate([np.arange(n) for n in np.bincount(ARTICLE)])
    assert np.array_equal(store.vectors, X) and np.array_equal(store.position, wanted)
    assert ("order of their rows" in I.summary(store)) == (positions is None)


@pytest.mark.parametrize("keys", [("article_index", "target_chunk_index"), ("article_id", "target_idx"), None])
def test_articles_by_metadata_or_truth_keys(keys, tmp_path):
    _, windows = sequence_files(tmp_path, horizon=1)
    paths = {}
    for split, (contexts, targets, ids, at) in windows.items():
        more = {"truth_keys": np.stack([ids, at], 1)}
        if keys:
            items = [dict(zip(keys, map(int, pair), strict=True)) for pair in zip(ids, at, strict=True)]
            more = {"metadata": np.array(items, dtype=object)}
        paths[split] = saved(tmp_path, f"{split}2", contexts=contexts, targets=targets, **more)
    store = I.convert(paths, tmp_path / "store")
    for split, (_, _, ids, _) in windows.items():
        assert np.array_equal(W.windows(store, split, 1).article, ids)


@pytest.mark.parametrize("horizon", [1, 2])
def test_windows_without_articles_are_each_their_own(horizon, tmp_path):
    """Nothing is known between context and target: in the store the one follows the other."""
    paths, cuts = across_files(tmp_path, horizon, ("contexts", "targets"))
    store = I.convert(paths, tmp_path / "store")
    assert store.given.horizon == 1 and "no retrieval" in I.summary(store)
    for split, (contexts, targets, *_) in cuts.items():
        own = W.windows(store, split, 1)
        assert len(own) == len(contexts) == len(np.unique(own.article))
        assert np.array_equal(store.vectors[own.context_rows(np.arange(len(own)))], contexts)
        assert np.array_equal(store.vectors[own.target], targets)


def test_fivecat_says_what_windows_without_articles_cannot_tell(tmp_path):
    paths, _ = across_files(tmp_path, 1, ("contexts", "targets"))
    data = lvm.dataset(I.convert(paths, tmp_path / "store"), 1)
    others = lvm.baselines(data.train)
    report = lvm.fivecat(others.pop("weighted mean"), data, others)
    assert [report.gates("val")[gate] for gate in "ABCD"] == ["not measured"] * 4
    assert report.value("cosine at the target") > 0
    assert lvm.reading(report).label == "not measured" and len(lvm.reading(report).sentences) == 2


def test_articles_cannot_be_looked_up_without_numbers(tmp_path):
    paths, _ = across_files(tmp_path, 1, ("contexts", "targets"))
    with pytest.raises(lvm.LVMError, match="article_ids"):
        I.convert(paths | {"articles": article_file(tmp_path)}, tmp_path / "store")
