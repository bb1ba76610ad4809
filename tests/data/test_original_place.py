"""Sequence files that are damaged, hostile, or do not belong together are refused."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from fuzz_importers import Runs, cut, dicts
from original_files import ARTICLE, CHUNK, NAMES, PARTS, X, article_file, check_windows, refused, saved, sequence_files

from lvmlib.data import npz as npz_format
from lvmlib.data import original as I
from lvmlib.errors import LVMError


def sequences(folder, **change):
    """The four files of a good set; `change`: {file: function of its arrays}."""
    paths, windows = sequence_files(folder)
    for s, function in change.items():
        saved(folder, s, **function(dict(zip(NAMES, windows[s], strict=True))))
    return {**paths, "articles": article_file(folder)}


def put(name, at, value):
    def change(arrays):
        arrays[name][at] = value
        return arrays

    return change


def each(name, function):
    """An array made by `function` of the array that is there."""
    return lambda arrays: {**arrays, name: function(arrays[name])}


def without(*names, **more):
    return lambda arrays: {**{k: v for k, v in arrays.items() if k not in names}, **more}


def listed(function):
    """`metadata` in place of the plain arrays, its dicts made by `function(article, target)`."""

    def change(arrays):
        metadata = np.empty(len(arrays["targets"]), object)
        metadata[:] = [function(*pair) for pair in zip(*(arrays[n].tolist() for n in NAMES[2:]), strict=True)]
        return without(*NAMES[2:], metadata=metadata)(arrays)

    return change


def windows_of(articles, horizon=2):
    return lambda arrays: dict(zip(NAMES, cut(X, ARTICLE, CHUNK, articles, horizon), strict=True))


def contradicting(arrays):
    metadata = dicts(arrays["article_ids"] + 1, arrays["target_indices"])
    return without("target_indices", metadata=metadata)(arrays)


def running(arrays):
    return {**arrays, "metadata": dicts(arrays["article_ids"], arrays["target_indices"], more=Runs("MARKER"))}


ONE = np.eye(4)[0]

# (what is done to val.npz, what the message must say)
VAL_CASES = {
    "an article that the article file lacks": (put("article_ids", 2, 77), "window 2 .*77"),
    "a target index out of range": (put("target_indices", 2, 99), r"window 2 .* 99 .*none"),
    "a negative target index": (put("target_indices", 2, -3), "target_indices, row 2: is -3"),
    "a wrong target index": (put("target_indices", 0, 2), r"window 0 .*-4 to 0 and 2 .*none, .*0\.806"),
    "target indices that count from 1": (each("target_indices", lambda t: t + 1), "window 0 .*chunks 1 to 5 and 7"),
    "a wrong target": (put("targets", 1, ONE), r"window 1 .*1 to 5 and 7 .*(1\.000, ){5}-?0\.\d"),
    "a wrong context vector": (put("contexts", (1, 3), ONE), r"window 1 .*(1\.000, ){3}-?0\.\d+, 1\.000, 1\.000"),
    "a wrong article": (put("article_ids", 1, 24), r"window 1 \(article 24"),
    "windows of another horizon": (windows_of(PARTS["val"], 3), "window 0 .*horizon 2"),
    "an article in two splits": (windows_of({20, 3}), "both train and val"),
    "no windows": (lambda a: {k: v[:0] for k, v in a.items()}, r"contexts: .*\(0, 5, 4\)"),
    "no contexts": (without("contexts"), "missing: contexts"),
    "no targets": (without("targets"), "missing: targets"),
    "no articles": (without("article_ids"), "add article_ids"),
    "contexts in two spellings": (
        lambda a: {**a, "context_sequences": a["contexts"]},
        "both context_sequences and contexts",
    ),
    "fewer targets than contexts": (each("targets", lambda t: t[1:]), r"targets: .*\(11, 4\).*\(12, 4\)"),
    "fewer articles than contexts": (each("article_ids", lambda a: a[1:]), "article_ids: "),
    "targets of another dimension": (each("targets", lambda t: t[:, :3]), "same dimension"),
    "a file of another dimension": (
        lambda a: {**a, "targets": a["targets"][:, :3], "contexts": a["contexts"][..., :3]},
        "5 × 4, 5 × 3",
    ),
    "a file of another context length": (each("contexts", lambda c: c[:, 1:]), "5 × 4, 4 × 4"),
    "integer contexts": (each("contexts", lambda c: c.astype(int)), "contexts: .*int64"),
    "NaN in a context": (put("contexts", (1, 2, 0), np.nan), r"val\.npz: .*row 1 .*NaN"),
    "metadata without articles": (listed(lambda a, t: {"target_chunk_index": t}), "window 0: .*article_index"),
    "metadata with texts for numbers": (
        listed(lambda a, t: {"article_index": str(a), "target_chunk_index": t}),
        "window 0, article_index: is str",
    ),
    "metadata with lists for numbers": (
        listed(lambda a, t: {"article_index": [a], "target_chunk_index": t}),
        "window 0, article_index: is list",
    ),
    "metadata with fractions": (
        listed(lambda a, t: {"article_index": a + 0.5, "target_chunk_index": t}),
        r"article_index: is 20\.5",
    ),
    "metadata with target indices here and there": (
        listed(lambda a, t: {"article_index": a, **({"target_chunk_index": t} if t % 2 else {})}),
        r"window \d+: .*target_chunk_index",
    ),
    "metadata of numbers": (listed(lambda a, t: a), "window 0: .*dict"),
    "metadata of objects": (listed(lambda a, t: Path("x")), "pathlib"),
    "metadata that runs code": (listed(lambda a, t: {"article_index": Runs("MARKER")}), r"posix\.system"),
    "metadata that runs code, and is not needed": (running, r"metadata.*posix\.system"),
    "metadata that contradicts the plain arrays": (contradicting, "article_ids.* 21 by metadata"),
    "metadata of one item": (without("article_ids", metadata=np.array({"a": 1}, object)), r"metadata: .*\(\)"),
}


@pytest.mark.parametrize("case", VAL_CASES)
def test_hostile_sequence_files(tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, message = VAL_CASES[case]
    refused(sequences(tmp_path, val=change), tmp_path, message, tmp_path / "MARKER")


NO_INDICES = without("target_indices")
NOISE = each("targets", lambda t: np.random.default_rng(0).standard_normal(t.shape))


def ones(arrays):
    return {**arrays, "targets": arrays["targets"] * 0 + 1, "contexts": arrays["contexts"] * 0 + 1}


@pytest.mark.parametrize(
    "change",
    [
        lambda a: NO_INDICES(each("contexts", lambda c: c[::-1])(a)),
        lambda a: NO_INDICES(windows_of(PARTS["val"], 3)(a)),
    ],
)
def test_windows_that_are_nowhere_by_vectors(tmp_path, change):
    files = sequences(tmp_path, **dict.fromkeys(PARTS, NO_INDICES) | {"val": change})
    refused(files, tmp_path, r"val\.npz: window 0 \(article 20\): .*best cosine")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict.fromkeys(PARTS, NO_INDICES), r"train\.npz.*target_indices"),
        ({"train": put("contexts", (1, 0), ONE)}, r"train\.npz: window \d .*horizon 2.*-?0\.\d"),
        ({"train": put("targets", 0, ONE)}, r"train\.npz: window \d .*horizon 2.*-?0\.\d"),
        (dict.fromkeys(PARTS, NOISE), "horizons 1 to 16, none fit"),
        (dict.fromkeys(PARTS, ones), r"horizons 1 to 16, 1, 2(, \d+)* fit"),
        (dict.fromkeys(PARTS, lambda a: {k: v[:1] for k, v in a.items()}), " 0 windows compared"),
    ],
)
def test_sequences_alone_that_do_not_agree(tmp_path, change, message):
    files = sequences(tmp_path, **change)
    refused({s: files[s] for s in PARTS}, tmp_path, message)


def test_chunks_that_are_all_the_same_give_no_horizon(tmp_path):
    files = sequences(tmp_path, **dict.fromkeys(PARTS, ones))
    files["articles"] = article_file(tmp_path, X * 0 + 1)
    refused(files, tmp_path, r"horizons 1 to 16, 1, 2(, \d+)* fit")


def test_what_is_given_is_checked(tmp_path):
    path = article_file(tmp_path)
    refused({"article": path}, tmp_path, "article given")
    refused({}, tmp_path, "none given")
    refused(tmp_path / "none.npz", tmp_path, r"none\.npz")
    refused(tmp_path, tmp_path, str(tmp_path))
    refused({"train": path}, tmp_path, r"articles\.npz.*article file")
    refused(sequences(tmp_path), tmp_path, "'random'", ood="random")
    (tmp_path / "there").mkdir()
    (tmp_path / "plain").touch()
    for folder in ("there", "plain/store"):
        with pytest.raises(LVMError, match=folder):
            I.convert(path, tmp_path / folder)
    with pytest.raises(LVMError, match=r"none\.npz"):
        I.opened(tmp_path / "none.npz")


def test_a_full_disk_is_refused_before_it_is_filled(tmp_path, monkeypatch):
    path = article_file(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage._replace(free=1000))
    refused(path, tmp_path, r"articles\.npz: array vectors: needs 0\.0 GB")


def test_bad_vectors_are_counted_through_all_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_format, "BLOCK_BYTES", 256)
    path = article_file(tmp_path, X * 0)
    refused(path, tmp_path, rf"row 0 .*zero.*{len(X)} bad rows")
    refused(path, tmp_path, "no vector is left", drop_bad=True)
    path = article_file(tmp_path, np.where(ARTICLE[:, None] < 9, 0, X))
    assert len(I.convert(path, tmp_path / "s", drop_bad=True).vectors) == (ARTICLE >= 9).sum()


def test_all_windows_bad(tmp_path):
    files = sequences(tmp_path, val=put("contexts", slice(None), np.nan))
    refused(files, tmp_path, r"val\.npz: none of its ", drop_bad=True)


def test_self_references_and_doubling_are_not_walked(tmp_path):
    """Within what is not looked at they are harmless: the windows are read, in no time."""
    paths, windows = sequence_files(tmp_path)
    own, doubled = {}, ()
    own["own"] = own
    for _ in range(70):
        doubled = (doubled, doubled)
    for s, (c, t, ids, at) in windows.items():
        paths[s] = saved(tmp_path, s, contexts=c, targets=t, metadata=dicts(ids, at, more=[own, doubled]))
    paths["articles"] = article_file(tmp_path)
    begin = time.process_time()
    check_windows(I.convert(paths, tmp_path / "s"), windows)
    assert time.process_time() - begin < 5
