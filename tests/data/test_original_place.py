"""Sequence files that are damaged, hostile, or do not belong together are refused."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from fuzz_importers import Runs, cut, dicts, world
from original_files import COUNT, PARTS, article_file, check_windows, refused, saved, sequence_files, without

from lvmlib.data import npz as npz_format
from lvmlib.data import original as I
from lvmlib.errors import LVMError


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
