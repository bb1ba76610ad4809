"""The original's files: round trips, conversions that are kept, the command, and bounded memory."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from fuzz_importers import world
from original_files import ENGLISH, article_file, check_windows, saved, sequence_files

import lvmlib as lvm
from lvmlib import windows as W
from lvmlib.cli import commands
from lvmlib.data import original as I
from lvmlib.data import store as V
from lvmlib.errors import LVMError

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
