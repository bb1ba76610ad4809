"""Mutate small valid files of every kind and convert them: only a good store or a clear LVMError may come out.

    python tests/fuzz_importers.py [FILES] [SEED]

A failure is any other exception, a warning, a folder left over, a file that a pickle's code would have made, more than
five seconds, or a message without advice. The failing files are copied.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

from lvmlib.data import original as importers
from lvmlib.errors import LVMError

DIM, LENGTH = 4, 5
SLOWEST = 5.0  # seconds a file may take


class Runs:
    """Pickles as a call of os.system: what must never be run. `marker`: the file it would make."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def world(seed: int = 0, articles: int = 30, dtype=np.float32, dim: int = DIM, longest: int = 10):
    """(vectors, article, chunk) of articles of 7 chunks to `longest`, each near a place of its own."""
    rng = np.random.default_rng(seed)
    size = rng.integers(7, longest + 1, articles)
    article = np.repeat(np.arange(articles), size)
    chunk = np.concatenate([np.arange(n) for n in size])
    x = rng.standard_normal((len(article), dim)) + 2 * rng.standard_normal((articles, dim))[article]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype), article, chunk


def cut(x, article, chunk, chosen, horizon=2):
    """(contexts, targets, article ids, target indices) of all windows of the `chosen` articles."""
    span = LENGTH - 1 + horizon
    first = np.array([r for r in range(len(x) - span) if article[r] == article[r + span] and article[r] in chosen])
    contexts = x[first[:, None] + np.arange(LENGTH)]
    return contexts, x[first + span], article[first], chunk[first + span]


def dicts(ids, indices, **more):
    listed = [
        {"article_index": a, "target_chunk_index": int(t), "kind": "window", **more}
        for a, t in zip(ids, indices, strict=True)
    ]
    out = np.empty(len(listed), object)
    out[:] = listed
    return out


def packed(arrays: dict, compressed: bool = False) -> bytes:
    out = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(out, **arrays)
    return out.getvalue()


def seeds() -> list[tuple[str, dict[str, bytes]]]:
    """(kind, {role: file}) of every form that convert reads."""
    x, article, chunk = world()
    parts = {"train": range(20), "val": range(20, 25), "ood": range(25, 30)}
    windows = {s: cut(x, article, chunk, set(own)) for s, own in parts.items()}
    base = {"vectors": x, "article_indices": article, "chunk_indices": chunk}
    texts = np.array([f"text {i}" * (i % 3) for i in range(len(x))])
    named = {"concept_texts": texts, "article_sources": np.array([f"source {a % 2}" for a in range(30)])}
    objects = {name: array.astype(object) for name, array in (named | {"cpe_ids": texts}).items()}
    orders = {"vectors": np.asfortranarray(x * 3), "chunk_indices": chunk.astype(">f8")}
    shuffled = np.random.default_rng(1).permutation(len(x))
    keys = ("context_sequences", "target_vectors", "article_ids", "target_indices")
    plain = {s: dict(zip(keys, w, strict=True)) for s, w in windows.items()}
    spelt = {
        s: {"contexts": c.astype(np.float16), "targets": t, "metadata": dicts(ids, at)}
        for s, (c, t, ids, at) in windows.items()
    }
    numbers = {s: dicts(np.int64(w[2]), w[3], more=[1, (2.5, None)]) for s, w in windows.items()}
    vectors = {s: {k: p[k] for k in keys[:2]} for s, p in plain.items()}
    sequences = {
        "sequences": {s: packed(p) for s, p in plain.items()},
        "metadata": {s: packed(p, s == "val") for s, p in spelt.items()},
        "numpy metadata": {s: packed(p | {"metadata": numbers[s]}) for s, p in vectors.items()},
        "by vectors": {s: packed(p | {"article_ids": plain[s]["article_ids"]}) for s, p in vectors.items()},
    }
    return [
        ("articles", {"articles": packed(base)}),
        ("texts", {"articles": packed(base | named, True)}),
        ("objects", {"articles": packed(base | objects)}),
        ("unsorted", {"articles": packed({k: v[shuffled] for k, v in base.items()} | {"concept_texts": texts})}),
        ("orders", {"articles": packed(base | orders, True)}),
        *((kind, files | {"articles": packed(base)}) for kind, files in sequences.items()),
        ("rebuilt", sequences["sequences"]),
        ("rebuilt metadata", {s: packed(p, True) for s, p in spelt.items()}),
    ]


# --- mutations -------------------------------------------------------------------------------------------------------


def flip(data: bytes, rng: random.Random, other: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_tail(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Bytes of the zip's directory, which is at its end."""
    return data[:-500] + flip(data[-500:], rng, other)


def truncate(data: bytes, rng: random.Random, other: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def splice(data: bytes, rng: random.Random, other: bytes) -> bytes:
    a, b, n = rng.randrange(len(data)), rng.randrange(len(other)), rng.choice((1, 16, 400, 4000))
    return data[:a] + other[b : b + n] + data[a + rng.choice((0, n)) :]


def delete(data: bytes, rng: random.Random, other: bytes) -> bytes:
    a, n = rng.randrange(len(data)), rng.choice((1, 4, 64, 1000))
    return data[:a] + data[a + n :]


RAW = (flip, flip, flip_tail, flip_tail, truncate, splice, delete)
DESCRIPTIONS = ("<f4", "<f2", "<f8", ">f4", "|O", "|V4", "<c8", "<i4", "<i8", "<u1", "|u1", "|b1", "<U1", "<U9", "|S4")
DESCRIPTIONS += ("<M8[s]", "<f16", "|O8", "<U99999999", "<U0")
NUMBERS = (0, 1, -1, 5, 2**15, 2**31 - 1, 2**31, 2**32, 2**63 - 1, -(2**63), 10**6)
FLOATS = (0.0, float("nan"), float("inf"), -float("inf"), 1e-38, 1e-42, 1e38, 1e4, -1.0, 3.0)


def header(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Another type, shape or order in the header of an array, or damage to it."""
    end = data.index(b"\n") + 1 if b"\n" in data[:400] else 64
    text, how = data[10:end].decode("latin1"), rng.randrange(6)
    if how == 0:
        text = re.sub("'descr': '[^']*'", f"'descr': '{rng.choice(DESCRIPTIONS)}'", text)
    elif how == 1:
        text = text.replace("False", "True")
    elif how in (2, 3):
        sizes = re.findall(r"-?\d+", text[text.find("(") :])
        longer, other_rows = [*sizes, rng.choice((0, 1, 2, 10**9))], [rng.choice(NUMBERS), *sizes[1:]]
        new = rng.choice((sizes[::-1], sizes[:-1], longer, other_rows))
        text = re.sub(r"\([^)]*\)", str(tuple(map(int, new))), text)
    elif how == 4:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice("()[]{}'\",:0L\x00\n") + text[at + 1 :]
    else:
        return data[:6] + bytes([rng.randrange(5), 0]) + struct.pack("<H", rng.randrange(300)) + data[10:]
    text = text.rstrip().ljust(end - 11) + "\n"
    return data[:8] + struct.pack("<H", len(text)) + text.encode("latin1") + data[end:]


def content(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Other numbers among those of the array."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 3)) if len(data) >= 140 else 0):
        form = rng.choice("fdeqiQ")
        with np.errstate(over="ignore"):
            written = np.array(rng.choice(FLOATS if form in "fde" else NUMBERS)).astype("<" + form).tobytes()
        at = 128 + rng.randrange(max(1, (len(out) - 128) // len(written))) * len(written)
        out[at : at + len(written)] = written
    return bytes(out[: len(data)])


PIECES = [bytes([code]) for code in b"Rbo\x81\x92Q012(t]}easu.)N\x8f\x90\x91\x94\x85\x86\x87\x97\x98"]
PIECES += [b"cos\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"(S'touch MARKER'\nios\nsystem\n", b"cbuiltins\neval\n"]
PIECES += [b"Pid\n", b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"h\x00", b"h\x12", b"j\x01\x00\x00\x00"]
PIECES += [b"q\x00", b"r\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"K\x00", b"L99L\n", b"F1e999\n", b"Vx\n", b"g0\n"]
PIECES += [b"\x8a\xff" + b"\1" * 255, b"\x8b\xff\xff\xff\x7f", b"G\x7f\xf8\x00\x00\x00\x00\x00\x00"]
PIECES += [code + b"\xff" * 8 for code in (b"\x8d", b"\x8e", b"\x95", b"\x96", b"X", b"B")]
PIECES += [b"I" + b"9" * 5000 + b"\n", b"]\x94" * 400, b"(" * 300, b"}" * 5000, b"\x85" * 3000]


def opcodes(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Edits of a pickle: opcodes inserted, replaced, taken out, and hostile pieces."""
    if len(data) < 140:
        return data
    at = rng.choice((128, len(data) - 1, rng.randrange(128, len(data)), rng.randrange(128, min(len(data), 420))))
    piece, replaced = rng.choice(PIECES), rng.choice((0, 0, 1, 2, 5))
    return data[:at] + rng.choice((piece, piece, b"")) + data[at + replaced :]


MEMBER = (header, header, content, content, content, content, opcodes, flip, truncate, splice, delete)


def fitted(data: bytes) -> bytes:
    """As many bytes as the header promises, so that what it says is believed."""
    try:
        file = io.BytesIO(data)
        shape, _, dtype = np.lib.format._read_array_header(file, np.lib.format.read_magic(file))
        size = math.prod(shape) * dtype.itemsize
    except Exception:
        return data
    if dtype.hasobject or not 0 <= size < 1 << 20:
        return data
    return data[: file.tell()] + data[file.tell() :][:size].ljust(size, b"\x3c")


def mutated(data: bytes, rng: random.Random, other: bytes, marker: Path) -> bytes:
    """One file changed: its bytes, or those of a member, packed again so that the change gets past the checksum."""
    if rng.random() < 0.25:
        return rng.choice(RAW)(data, rng, other)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = [(i.filename, file.read(i)) for i in file.infolist()]
    at, how = rng.randrange(len(members)), rng.choices(range(7), (4, 3, 3, 4, 4, 2, 80))[0]
    name, body = members[at]
    if how == 0:
        members.pop(at)
    elif how == 1:
        members.append(members[at])
    elif how == 2:
        members[at] = (rng.choice(("../../x.npy", "/x.npy", "x", "a/b.npy", name.upper(), "contexts.npy")), body)
    elif how == 3:
        members[at] = (name, rng.choice(members)[1])
    elif how == 4:
        hostile = io.BytesIO()
        np.save(hostile, np.array([Runs(marker)] * rng.choice((1, 270)), object), allow_pickle=True)
        members[at] = (name, hostile.getvalue())
    elif how == 5:
        members[at] = (name, body[:128] + pickle.dumps(Runs(marker), rng.randrange(6)))
    else:
        kinds = (opcodes, opcodes, opcodes, *MEMBER) if b"'|O'" in body[:128] else MEMBER
        for _ in range(rng.choice((1, 1, 2, 4))):
            body = rng.choice(kinds)(body, rng, other) if body else body
        members[at] = (name, fitted(body) if rng.random() < 0.7 else body)
    out = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(out, "w", method) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name given twice
        for name, body in members:
            file.writestr(name, body)
    return out.getvalue()


# --- the run ---------------------------------------------------------------------------------------------------------


def outcome(files: dict[str, bytes], folder: Path, marker: Path, **options) -> str:
    """Convert `files` in an empty `folder`: "store" or "refused". Raises whatever else comes of them."""
    inputs, out = folder / "in", folder / "out"
    inputs.mkdir(parents=True)
    paths = {role: inputs / f"{role}.npz" for role in files}
    for role, data in files.items():
        paths[role].write_bytes(data)
    begin = time.process_time()
    try:
        with warnings.catch_warnings(action="error"):
            store = importers.convert(paths, out, **options)
        result = "store"
        assert store.texts is None or len(list(store.texts)) == len(store.vectors)
    except LVMError as e:
        result, message = "refused", str(e)
        assert type(e) is LVMError and any(f"{role}.npz" in message for role in files), message
        assert len(message) <= 1500 and (";" in message or "," in message), f"too long or without advice: {message}"
    assert time.process_time() - begin <= SLOWEST
    assert not marker.exists(), "the code of a file was run"
    assert sorted(p.name for p in folder.iterdir()) == ["in", *["out"] * (result == "store")]
    assert not (out / "scratch").exists()
    return result


def main(files: int = 10_000, seed: int = 0) -> Counter:
    """Convert `files` mutated files; gives the outcomes by kind. The first failure is raised, with a copy of its files.

    Not mutated, all must be read.
    """
    rng, listed, counts = random.Random(seed), seeds(), Counter()
    pool = [data for _, own in listed for data in own.values()]
    with tempfile.TemporaryDirectory() as temporary:
        run, marker = Path(temporary, "run"), Path(temporary, "MARKER")
        for kind, own in listed:
            assert outcome(own, run, marker) == "store", f"{kind}, not mutated"
            shutil.rmtree(run)
        for number in range(files):
            kind, own = listed[number % len(listed)]
            changed = dict(own)
            for role in rng.sample(sorted(own), rng.choice((1, 1, 1, min(2, len(own))))):
                changed[role] = mutated(own[role], rng, rng.choice(pool), marker) or b"\x00"
            try:
                counts[kind, outcome(changed, run, marker, drop_bad=rng.random() < 0.3)] += 1
            except BaseException as e:
                copy = shutil.copytree(run, Path(tempfile.mkdtemp(prefix="fuzz-"), "run"))
                e.add_note(f"{kind}, file {number} of seed {seed}: {copy}")
                raise
            shutil.rmtree(run)
    return counts


if __name__ == "__main__":
    print(main(*map(int, sys.argv[1:])))
