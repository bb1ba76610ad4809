"""The result of a full check is remembered, and only for files in the same state."""

import json
import mmap
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from stores import age, random_store, refused, reseal, same, with_extras

from lvmlib.data import store as V
from lvmlib.errors import LVMError


def flipped(path):
    """The bytes of a file, one of them changed."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    return content


def test_a_remembered_check_reads_no_vector_and_no_chunk(known, checks, monkeypatch):
    fresh = V.open_store(known, verify=True)
    assert len(checks) == 1
    for name in ("check_chunks", "check_articles", "_fingerprint"):
        monkeypatch.setattr(V, name, lambda *a: pytest.fail("read again"))
    again = V.open_store(known)
    same(again, fresh)
    same(V.open_store(known.rename(known.with_name("moved"))), fresh)  # the same files under another name
    assert len(checks) == 1
    for column in (again.article, again.position):
        while isinstance(column, np.ndarray):
            column = column.base
        assert isinstance(column, mmap.mmap)


def test_texts_and_given_windows_of_a_remembered_check(tmp_path, checks, monkeypatch):
    folder = V.write_store(with_extras()[0], tmp_path / "s")
    age(folder)
    fresh = V.open_store(folder)
    checks.clear()
    monkeypatch.setattr(V, "check_given", lambda *a: pytest.fail("checked again"))
    again = V.open_store(folder)
    same(again, fresh)
    assert not checks and list(again.texts) == list(fresh.texts) and again.texts[4] == fresh.texts[4]
    assert len(again.texts) == len(fresh.texts) == len(fresh.vectors)
    assert again.given.start.tolist() == fresh.given.start.tolist() and again.given.split.dtype == np.int64
    (folder / "texts.jsonl").write_bytes((folder / "texts.jsonl").read_bytes() + b'"more"\n')
    refused(folder, "texts.jsonl", "sha256")


@pytest.mark.parametrize("name", V.STORE_FILES[:3])
def test_a_wrong_checksum_is_seen_in_spite_of_a_remembered_check(known, name):
    (known / name).write_bytes(flipped(known / name))
    refused(known, name, "sha256")
    refused(known, name, "sha256")  # a refusal is not remembered as a success


def change(path, other_inode=False):
    """Change a file's bytes, not its size or time."""
    stat, written = path.stat(), path.with_name("new") if other_inode else path
    written.write_bytes(flipped(path))
    os.utime(written, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    written.rename(path)


def test_another_file_of_the_same_size_and_time_is_seen(known):
    change(known / "vectors.npy", other_inode=True)
    refused(known, "vectors.npy", "sha256")


def test_verify_sees_bytes_changed_in_place_with_the_time_set_back(known):
    change(known / "vectors.npy")
    V.open_store(known)
    with pytest.raises(LVMError, match=r"vectors.npy: its sha256"):
        V.open_store(known, verify=True)


def test_a_change_within_a_second_of_the_check_is_seen(folder, checks):
    """Its time may be the same: so what is younger than a second is not remembered."""
    V.open_store(folder)
    assert len(checks) == 1 and not (folder / V.CHECKED).exists()
    change(folder / "vectors.npy")
    refused(folder, "vectors.npy", "sha256")


def test_a_file_that_changes_while_it_is_checked_is_not_remembered(folder, monkeypatch):
    age(folder)
    monkeypatch.setattr(V, "_fingerprint", lambda *a: os.utime(folder / "chunks.npy") or "0" * 64)
    V.open_store(folder)
    assert not (folder / V.CHECKED).exists()


def test_a_new_datasheet_or_a_new_file_is_checked_anew(known, checks):
    sheet = yaml.safe_load((known / "datasheet.yaml").read_text(encoding="utf-8"))
    (known / "datasheet.yaml").write_text(yaml.safe_dump({**sheet, "name": "other"}), encoding="utf-8")
    assert V.open_store(known).name == "other" and len(checks) == 1
    (known / "texts.jsonl").write_text("")
    refused(known, "texts.jsonl", "sha256")


def test_a_copied_memory_is_none(known, tmp_path, checks):
    shutil.copytree(known, tmp_path / "copy")  # with sizes and times
    same(V.open_store(tmp_path / "copy"), V.open_store(known))
    store = random_store(12, gaps=False)
    other = V.write_store(store, tmp_path / "other")
    shutil.copy2(known / V.CHECKED, other / V.CHECKED)
    assert V.open_store(other).fingerprint == store.fingerprint
    assert [checks[0], checks[-1]] == [str(tmp_path / name / "vectors.npy") for name in ("copy", "other")]


MEMORIES = [lambda b, bad=bad: bad for bad in (b"", b"[]", b"5", b"{}", b"\xff\xfe\x00", b"[" * 100_000)]
MEMORIES += [lambda b: b[:-9], lambda b: b.replace(b'"size": ', b'"size": 1')]
MEMORIES += [
    lambda b, part=part: json.dumps(json.loads(b) | part).encode()
    for part in ({"check": 0}, {"fingerprint": 7}, {"fingerprint": "short"}, {"files": []}, {"more": 1})
]


@pytest.mark.parametrize("content", MEMORIES)
def test_a_damaged_memory_is_none_and_is_mended(known, checks, content):
    path, before = known / V.CHECKED, (known / V.CHECKED).read_bytes()
    path.write_bytes(content(before))
    assert path.read_bytes() != before
    for _ in range(2):
        V.open_store(known)
        assert len(checks) == 1 and path.read_bytes() == before


@pytest.mark.parametrize("where", ["write", "rename", "a folder in its place"])
def test_a_memory_that_cannot_be_written(folder, checks, monkeypatch, where):
    age(folder)

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    if where == "a folder in its place":
        (folder / V.CHECKED).mkdir()
    else:
        monkeypatch.setattr(*((V.Path, "write_text") if where == "write" else (V.os, "replace")), deny)
    before = sorted(folder.iterdir())
    same(V.open_store(folder), V.open_store(folder))
    assert len(checks) == 2 and sorted(folder.iterdir()) == before


def test_the_package_is_not_written(folder, monkeypatch):
    monkeypatch.setattr(V, "EMBEDDED", folder.parent)
    age(folder)
    V.open_store(folder)
    assert not (folder / V.CHECKED).exists()


def test_a_table_of_wider_integers_opens_the_same(known, checks):
    fresh = V.open_store(known)
    np.save(known / "wider.npy", np.load(known / "chunks.npy").astype(np.int64))
    (known / "wider.npy").rename(known / "chunks.npy")  # not written into the file that `fresh` has mapped
    reseal(known)
    age(known)
    for _ in range(2):
        same(replace(V.open_store(known), datasheet=fresh.datasheet), fresh)
    assert len(checks) == 1
