"""Builds that are interrupted, killed or damaged on the way: the same store in the end, and nothing lost."""

import errno
import os
import signal
import time

import numpy as np
import pytest
import torch
from building import CHUNKS, SHARD, Hashed, content, in_child, make
from small import Evil
from toys import until

from lvmlib.data.store import open_store
from lvmlib.errors import LVMError
from lvmlib.text import build as E
from lvmlib.text import shards

for package in ("sentence_transformers", "sentencex", "datasketch", "pyarrow"):
    pytest.importorskip(package, reason='needs the extra "encode": pip install -e ".[encode]"')
pytestmark = pytest.mark.usefixtures("one_thread")

POINTS = {
    "begun": (E, "_begin", 1, "after"),
    "in the middle of cutting": (E.chunking, "_remaining", 1, "before"),
    "after cutting": (E, "_read", 1, "after"),
    "before the first shard": (shards, "_save", 1, "before"),
    "in the fourth shard's file": (shards, "_save", 4, "after"),
    "between shards": (shards, "write_atomic", 4, "after"),
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
    assert len(hashed.seen) == (0 if out.exists() and point == "before clearing up" else CHUNKS - SHARD * finished)


def test_killed_at_random_again_and_again(folder, tmp_path, hashed, whole):
    rng, kills = np.random.default_rng(3), 0
    started = time.monotonic()
    make(folder, tmp_path / "timed" / "out")
    usual = time.monotonic() - started
    for trial in range(2):
        out = tmp_path / str(trial) / "out"
        for _ in range(20):
            pid = in_child(lambda out=out: make(folder, out))
            time.sleep(rng.uniform(0.05, 0.9) * usual)
            os.kill(pid, signal.SIGKILL)
            kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
            if out.exists() and not out.with_name("out.partial").exists():
                break
        make(folder, out)
        assert content(out) == whole and [p.name for p in out.parent.iterdir()] == ["out"]
    assert kills >= 2


FAULTS = {
    "interrupt": (Hashed, "encode", KeyboardInterrupt(), KeyboardInterrupt, None),
    "full memory": (Hashed, "encode", MemoryError(), MemoryError, None),
    "full device": (Hashed, "encode", torch.OutOfMemoryError("full"), LVMError, "lower batch_size from 32"),
    "full disk": (shards, "_save", OSError(errno.ENOSPC, "full"), LVMError, r"shard-00004\.npz.*the disk is full"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_encoding_loses_nothing(folder, tmp_path, hashed, whole, fault, monkeypatch, capsys):
    holder, name, error, raised, words = FAULTS[fault]
    real, calls = getattr(holder, name), []

    def fails(*arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(shards, "watched", lambda: True)
    with monkeypatch.context() as patch, pytest.raises(raised, match=words):
        patch.setattr(holder, name, fails)
        make(folder, tmp_path / "out", progress=True)
    assert len(list((tmp_path / "out.partial").glob("shard*"))) == 4
    hashed.seen = []
    make(folder, tmp_path / "out", progress=True, shard=1000)  # the size of the shards is that of the beginning
    assert len(hashed.seen) == CHUNKS - 4 * SHARD and content(tmp_path / "out") == whole
    shown = capsys.readouterr()  # a bar, which resumes
    encoded = (5 if holder is shards else 4) * SHARD
    assert f"{encoded}/{CHUNKS}" in shown.err and f"{CHUNKS}/{CHUNKS}" in shown.err and shown.out.count("\n") == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "flipped", "swapped", "object array", "no vectors"])
def test_a_damaged_shard_is_encoded_again(folder, tmp_path, work, hashed, whole, damage):
    path, other = (work / f"shard-{n:05d}.npz" for n in (3, 4))
    good = path.read_bytes()
    if damage in ("object array", "no vectors"):
        vectors = {"vectors": np.array([Evil()], object)} if damage == "object array" else {}
        np.savez(path, **vectors, tokens=0, hash=0)
    else:
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 255
        bad = {"cut": good[:-50], "empty": b"", "garbage": b"PK\3\4" + b"x" * 999, "flipped": bytes(flipped)}
        path.write_bytes(bad.get(damage) if damage != "swapped" else other.read_bytes())
    make(folder, tmp_path / "out")
    assert len(hashed.seen) == SHARD and content(tmp_path / "out") == whole


@pytest.mark.parametrize("damage", ["texts", "table", "documents", "counts", "build.yaml"])
def test_a_damaged_work_folder(folder, tmp_path, work, hashed, whole, damage):
    name = {"texts": "texts.jsonl", "table": "chunks.npy", "documents": "documents.csv", "counts": "chunked.json"}
    path = work / "chunks" / name[damage] if damage in name else work / damage
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
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
