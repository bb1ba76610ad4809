"""The original's files: round trips, conversions that are used again, the command, and bounded memory."""

import contextlib
import os
import tracemalloc

import numpy as np
import pytest
from fuzz_importers import world
from original_files import COUNT, X, article_file, check_windows, saved, sequence_files

import lvmlib as lvm
from lvmlib import windows as W
from lvmlib.cli import commands
from lvmlib.config import Files
from lvmlib.data import npz
from lvmlib.data import original as I
from lvmlib.data import store as V
from lvmlib.errors import LVMError

# --- there and back --------------------------------------------------------------------------------------------------


def test_round_trip_of_the_embedded_data(tmp_path):
    data = lvm.dataset("wikipedia")
    paths = I.export(data, tmp_path / "original")
    for path in paths.values():
        with np.load(path, allow_pickle=False) as z:  # no pickle is written
            assert all(len(z[name]) for name in z.files)
    store = I.convert(paths, tmp_path / "store")
    assert store.vectors.dtype == data.store.vectors.dtype and np.array_equal(store.vectors, data.store.vectors)
    assert np.array_equal(store.article, data.store.article) and np.array_equal(store.position, data.store.position)
    assert store.articles["title"].tolist() == data.store.articles["title"].tolist()
    alone = I.convert({s: paths[s] for s in W.SPLITS}, tmp_path / "alone")
    for split in W.SPLITS:
        first, back, rebuilt = getattr(data, split), W.windows(store, split), W.windows(alone, split)
        assert np.array_equal(back.start, first.start) and np.array_equal(back.article, first.article)
        lone = np.bincount(first.article) < 2  # a skipped chunk of these is in no file
        targets = first.target[~lone[first.article]]
        assert np.array_equal(alone.vectors[rebuilt.target], data.store.vectors[targets])


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


def test_export_refuses(tmp_path):
    (tmp_path / "there").mkdir()
    for direction, folder, message in (("forward", "there", "there"), ("backward", "new", "backwards")):
        with pytest.raises(LVMError, match=message):
            I.export(lvm.dataset("wikipedia", fast=True, direction=direction), tmp_path / folder)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


# --- converted once --------------------------------------------------------------------------------------------------


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """The folder of converted files."""
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs" / "imported"


def test_opened_converts_once(tmp_path, imported, monkeypatch):
    paths, windows = sequence_files(tmp_path)
    paths["articles"] = article_file(tmp_path, name="my articles!")
    first = I.opened(paths)
    check_windows(first, windows)
    V.check_unchanged(first)  # a run asks this: the store has to know its last place
    (folder,) = imported.iterdir()
    assert folder.name.startswith("my-articles-")
    with monkeypatch.context() as m:
        m.setattr(I, "convert", lambda *a, **k: pytest.fail("converted again"))
        for files in (paths, Files(**{key: str(path) for key, path in paths.items()})):
            assert I.opened(files).fingerprint == first.fingerprint
    os.utime(paths["val"], ns=(1, 1))  # another file, for all we know
    I.opened(paths)
    assert I.opened(str(paths["articles"])).given is None and len(list(imported.iterdir())) == 3


def test_another_process_was_first(tmp_path, imported, monkeypatch):
    """It finishes between our look at the folder and our own renaming: its store is taken."""
    path, convert, calls = article_file(tmp_path), I.convert, []

    def slow(files, folder):
        with V.writing(folder):
            calls.append(convert(files, folder))  # the other one

    monkeypatch.setattr(I, "convert", slow)
    store = I.opened(path)
    assert store.fingerprint == calls[0].fingerprint
    (folder,) = imported.iterdir()
    (folder / "vectors.npy").write_bytes(b"short")  # damaged later
    with pytest.raises(LVMError, match=f"vectors.npy.*delete {folder}"):
        I.opened(path)


def test_command_line(tmp_path, monkeypatch, capsys):
    path = article_file(tmp_path, np.where(np.arange(COUNT)[:, None] == 4, 0, X))
    command = ["out", "--articles", path.name, "--name", "n"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LVMError, match="drop-bad"):
        commands.main(["import", *command])
    assert commands.main(["import", *command, "--drop-bad", "--split-ood", "random"]) == 0
    assert "vectors dropped (zero, NaN or infinite): 1" in capsys.readouterr().out
    store = V.open_store(tmp_path / "out")
    assert store.name == "n" and "--drop-bad" in store.datasheet["command"]


# --- bounded memory --------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_vectors(tmp_path, monkeypatch):
    """1 and 4 MB of article vectors with six times that of windows, in blocks of an eighth of a MB: the peak of what
    memory holds grows by less than a tenth of what the larger files have more."""
    monkeypatch.setattr(npz, "BLOCK_BYTES", 1 << 17)
    monkeypatch.setattr(W, "BLOCK_VALUES", 1 << 14)
    dim, peaks = 256, {}
    I.convert(article_file(tmp_path, name="warm"), tmp_path / "warm", ood="random")
    tracemalloc.start()
    for articles in (25, 100):
        folder, rng = tmp_path / str(articles), np.random.default_rng(0)
        folder.mkdir()
        article, chunk = np.repeat(np.arange(articles), 40), np.tile(np.arange(40), articles)
        x = rng.standard_normal((len(article), dim)).astype(np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        order, edge = rng.permutation(len(x)), articles - 20
        sorted_ = saved(folder, "sorted", True, vectors=x, article_indices=article, chunk_indices=chunk)
        unsorted = article_file(folder, x[order], article[order], chunk[order], name="unsorted")
        parts = {"train": range(edge), "val": range(edge, edge + 10), "ood": range(edge + 10, articles)}
        sequences, _ = sequence_files(folder, x, article, chunk, parts={s: set(own) for s, own in parts.items()})
        forms = {
            "sorted": {"articles": sorted_},
            "unsorted": {"articles": unsorted},
            "sequences": {**sequences, "articles": unsorted},
            "rebuilt": sequences,
        }
        for form, files in forms.items():
            tracemalloc.reset_peak()
            start = tracemalloc.get_traced_memory()[0]
            I.convert(files, folder / form, ood="topic" if "train" in files else "random")
            peaks[form, articles] = tracemalloc.get_traced_memory()[1] - start
    tracemalloc.stop()
    more = (100 - 25) * 40 * dim * 4
    for form, times in {"sorted": 1, "unsorted": 1, "sequences": 6, "rebuilt": 5}.items():
        assert peaks[form, 100] - peaks[form, 25] < 0.1 * times * more, (form, peaks)
