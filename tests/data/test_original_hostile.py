"""Damaged and hostile article files are refused, and nothing in them is run."""

import io
import pickle
import struct
import subprocess
import warnings
import zipfile

import fuzz_importers as fuzz
import numpy as np
import pytest
from fuzz_importers import Runs
from original_files import ARTICLE, CHUNK, COUNT, X, refused


def base(**more):
    return {"vectors": X, "article_indices": ARTICLE, "chunk_indices": CHUNK, **more}


def archive(arrays, compressed=True, raw=()):
    """The bytes of an .npz; `raw`: (member name, bytes) pairs put behind the arrays."""
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", method) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name given twice
        for name, array in arrays.items():
            saved = io.BytesIO()
            np.save(saved, array, allow_pickle=True)
            file.writestr(f"{name}.npy", saved.getvalue())
        for name, data in raw:
            file.writestr(name, data)
    return out.getvalue()


def npy(descr, shape, body):
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + body


def member(name, data):
    """An article file in which one array is these bytes."""
    return archive({k: v for k, v in base().items() if k != name}, raw=[(f"{name}.npy", data)])


def pickled(body, shape=(COUNT,), name="concept_texts"):
    """An article file with an object array whose pickle is `body`."""
    return member(name, npy("|O", shape, body))


ARRAY = pickle.dumps(np.array(["a"] * COUNT, object), 4)
PREFIX = ARRAY[:2] + ARRAY[11 : ARRAY.index(b"]\x94(") + 3]  # without its frame, up to the mark before the items
SUFFIX = b"et\x94b."
NONES = b"N" * (COUNT - 1)
HUGE = b"J\xff\xff\xff\x7f"


def changed(at, value, name="vectors", **more):
    arrays = base(**more)
    arrays[name] = arrays[name].copy()
    arrays[name][at] = value
    return archive(arrays)


class Reduced:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def patched(data: bytes, signature: bytes, offset: int, value: bytes) -> bytes:
    """Every zip record with this signature, changed at an offset."""
    out, at = bytearray(data), data.find(signature)
    while at >= 0:
        out[at + offset : at + offset + len(value)] = value
        at = data.find(signature, at + 1)
    return bytes(out)


def with_system(marker, protocol):
    return pickle.dumps(np.array([Runs(marker)] * COUNT, object), protocol)


GOOD = archive(base(), compressed=False)
ENTRY = b"PK\x01\x02"  # of the directory at the end of a zip

# What would touch `marker` if it were run: (function of the marker, which gives the file; what the message must say)
RUNNING_CASES = {
    "pickle that calls os.system": (lambda m: pickled(with_system(m, 4)), r"concept_texts.*posix\.system"),
    "the same in protocol 2": (lambda m: pickled(with_system(m, 2)), r"posix\.system"),
    "the same in protocol 0": (lambda m: pickled(with_system(m, 0)), r"system|copy_?reg"),
    "payload without an array": (lambda m: pickled(pickle.dumps(Runs(m))), r"posix\.system"),
    "text opcodes": (lambda m: pickled(b"cos\nsystem\n(S'touch %s'\ntR." % str(m).encode()), r"os\.system"),
    "INST": (lambda m: pickled(b"(S'touch %s'\nios\nsystem\n." % str(m).encode()), "KeyError: 105"),
    "builtins.eval": (lambda m: pickled(pickle.dumps(Reduced(eval, (f"open({str(m)!r}, 'w')",)))), r"builtins\.eval"),
    "subprocess in a member that is not needed": (
        lambda m: pickled(pickle.dumps(Reduced(subprocess.run, (["touch", str(m)],))), name="extra"),
        r"array extra.*subprocess\.run",
    ),
    "a header with code in it": (
        lambda m: member("vectors", b"\x93NUMPY\x01\x00v\x00" + f"open({str(m)!r}, 'w')".encode().ljust(117) + b"\n"),
        "vectors: ",
    ),
}

# The items of an object array: (opcodes, what the message must say)
ITEM_CASES = {
    "a call of a returned object": (b"\x8c\x01x\x8c\x01y\x86N\x85R", "calls"),
    "another codec than latin1": (b"c_codecs\nencode\n(X\x01\x00\x00\x00xX\x03\x00\x00\x00hextR", "encode"),
    "extension code": (b"\x82\x01", "KeyError: 130"),
    "extension code of 4 bytes": (b"\x84\x01\x00\x00\x00", "KeyError: 132"),
    "persistent id": (b"Pid\n", "KeyError: 80"),
    "binary persistent id": (b"\x8c\x01xQ", "KeyError: 81"),
    "NEWOBJ": (b"cnumpy\nndarray\n)\x81", "KeyError: 129"),
    "NEWOBJ of a foreign class": (b"ccollections\nCounter\n)\x81", r"collections\.Counter"),
    "OBJ": (b"(cnumpy\nndarray\no", "KeyError: 111"),
    "BUILD on a dict": (b"}}b", "inside"),
    "BUILD on a stand-in": (b"cnumpy\nndarray\n}\x8c\x04nameNsb" + NONES, "inside"),
    "a list that holds itself": (b"]\x94h\x13a" + NONES, "row 0: is list"),
    "a dict that holds itself": (b"}\x94\x8c\x01ah\x13s" + NONES, "row 0: is dict"),
    "the array's own list in itself": (b"h\x12" + NONES, "row 0: is list"),
    "a tuple as a key": (b"}NN\x86Ns" + NONES, "keys that are no texts"),
    "keys put into a list": (b"]\x8c\x01aNs" + NONES, "no texts"),
    "a number of 6,000 digits": (b"I0x" + b"f" * 5000 + b"\n" + NONES, "row 0: is int"),
    "a byte array of 16 exabytes": (b"\x96" + b"\xff" * 8, "KeyError: 150"),
    "a text of 16 exabytes": (b"\x8d" + b"\xff" * 8, "BINUNICODE8 exceeds"),
    "a set": (b"\x8f", "KeyError: 143"),
    "a name that is a list of lists": (b"]]\x93", "STACK_GLOBAL requires str"),
    "a hundred brackets deep": (b"(" * 200, "cannot be read"),
    "a memo number that takes gigabytes": (b"Nr" + HUGE[1:] + b"j\xff\xff\xff\x7e", "UnpicklingError: Memo|KeyError"),
    "millions of empty dicts": (b"}" * 1_100_000, "too large"),
    "doubling tuples": (b"\x8c\x01x\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(19, 90)), "shape"),
    "fewer items than the shape": (b"\x8c\x01a", "shape"),
    "a nested array that claims a huge shape": (
        pickle.dumps(np.arange(3), 2)[2:-1].replace(b"K\x03\x85", HUGE + b"\x85", 1),
        "shape|cannot be read",
    ),
    "a structured type in a pickle": (pickle.dumps(np.zeros(1, [("a", "i4")])[0], 2)[2:-1], "type"),
}

# (the file, what the message must say)
ARTICLE_CASES = {
    "a reduce within a reduce": (
        pickled(pickle.dumps(Reduced(getattr, (Reduced(__import__, ("os",)), "system")))),
        r"builtins\.",
    ),
    "numpy's own loader": (pickled(b"cnumpy\nload\n(X\x01\x00\x00\x00xtR."), r"numpy\.load"),
    "codecs.decode": (pickled(b"c_codecs\ndecode\n."), r"_codecs\.decode"),
    "BUILD twice on an array": (pickled(ARRAY[:-1] + b"(K\x01)NNNtb."), "inside"),
    "more items than the shape": (pickled(ARRAY, shape=(COUNT - 1,)), "concept_texts.*shape|more than"),
    "an array that claims a huge shape": (
        pickled(ARRAY.replace(b"K\x01M" + struct.pack("<H", COUNT), b"K\x01" + HUGE, 1)),
        "shape",
    ),
    "texts that are numbers": (archive(base(concept_texts=np.array([1.5] * COUNT, object))), "row 0: is float"),
    "texts of another length": (archive(base(concept_texts=np.array(["a"]))), r"concept_texts: has shape \(1,\)"),
    "bytes that are no UTF-8": (archive(base(concept_texts=np.array([b"\xff\xfe"] * COUNT))), "UnicodeDecodeError"),
    "characters beyond Unicode": (
        member("concept_texts", npy("<U1", (COUNT,), b"\xff\xff\xff\x7f" * COUNT)),
        "row 0 .*Unicode",
    ),
    "object array that unpacks to too much": (
        pickled(PREFIX + b"\x8d" + struct.pack("<Q", 20 << 20) + b"a" * (20 << 20) + SUFFIX),
        "unpacks to 20,",
    ),
    "huge vectors in the header": (member("vectors", npy("<f4", (10**9, 768), bytes(64))), "1000000000, 768"),
    "a shape that overflows": (member("vectors", npy("<f4", (2**62, 2**62), bytes(64))), "impossible shape"),
    "a negative shape": (member("vectors", npy("<f4", (-4, -4), bytes(64))), "impossible shape"),
    "a shape that is too small": (member("vectors", npy("<f4", (2, 4), bytes(64))), r"\(2, 4\)"),
    "huge unicode": (member("article_indices", npy("<U99999999", (2**20,), bytes(64))), "promises"),
    "a structured type": (archive(base(vectors=np.zeros(5, [("a", "f4"), ("b", "i4")]))), "vectors: has type"),
    "a header that is cut off": (member("vectors", npy("<f4", (1, 4), b"")[:60]), "array header"),
    "a member that is no array": (member("concept_texts", b"hello"), "magic"),
    "a zip cut in half": (GOOD[: len(GOOD) // 2], "not a readable"),
    "a zip without its last bytes": (GOOD[:-10], "not a readable"),
    "a zip of a few bytes": (GOOD[:7], "not a readable"),
    "a zip whose middle is missing": (GOOD[:300] + GOOD[900:], "cannot be read"),
    "an empty file": (b"", "not a readable"),
    "a wrong checksum": (GOOD[:400] + b"\x00\x01\x02\x03" + GOOD[404:], "vectors: .*Bad CRC"),
    "a size in the directory that is not the member's": (
        patched(GOOD, ENTRY, 24, struct.pack("<I", 10**6)),
        "1,000,000 bytes",
    ),
    "a zip bomb of zero vectors": (
        archive({k: np.zeros((1 << 20, 16)[: v.ndim], np.float16) for k, v in base().items()}),
        "rows 0 and 1 ",
    ),
    "a zip bomb that would fill the disk": (
        patched(member("vectors", npy("<f4", (2**24, 16), bytes(64))), ENTRY, 24, struct.pack("<I", 2**30 + 128)),
        "1,073,741,952 bytes",
    ),
    "member names that lead out": (archive(base(), raw=[("../../x.npy", b"x")]), "leads out"),
    "an absolute member name": (archive(base(), raw=[("/tmp/x.npy", b"x")]), "leads out"),
    "a name given twice": (archive(base(), raw=[("vectors.npy", b"x")]), r"'vectors\.npy'.*twice"),
    "an encrypted member": (patched(patched(GOOD, ENTRY, 8, b"\x01"), b"PK\x03\x04", 6, b"\x01"), "encrypted"),
    "an unusual packing": (patched(GOOD, ENTRY, 10, b"\x0e"), "method 14"),
    "an .npy under the name .npz": (npy("<f4", (1, 4), bytes(16)), "np.savez"),
    "a text under the name .npz": (b"vectors: none\n" * 50, "not a readable"),
    "an executable under the name .npz": (b"\x7fELF" + bytes(range(256)) * 9, "not a readable"),
    "no vectors": (archive({"article_indices": [0]}), "missing: vectors "),
    "a sequence file as articles": (archive({"contexts": np.ones((2, 5, 4))}), "sequence file"),
    "integer vectors": (archive(base(vectors=np.ones((COUNT, 4), np.int8))), "int8"),
    "complex vectors": (archive(base(vectors=np.ones((COUNT, 4), np.complex64))), "complex64"),
    "object vectors": (archive(base(vectors=X.astype(object))), "vectors: .*object"),
    "vectors without a dimension": (archive(base(vectors=np.ones(COUNT))), "chunks, dimension"),
    "empty articles": (archive({k: v[:0] for k, v in base().items()}), r"\(0, 4\)"),
    "NaN": (changed((9, 1), np.nan), "row 9 .*NaN"),
    "infinite": (changed((9, 1), -np.inf), "row 9 .*infinite"),
    "zero": (changed(9, 0), "row 9 .*zero"),
    "duplicate positions": (changed(1, 0, "chunk_indices"), "rows 0 and 1 "),
    "a negative article": (changed(3, -1, "article_indices"), "article_indices, row 3: is -1"),
    "a position beyond 32 bits": (changed(3, 2**40, "chunk_indices"), "chunk_indices, row 3: is 1099511627776"),
    "fractions": (
        changed(3, 0.5, "chunk_indices", chunk_indices=CHUNK.astype(float)),
        r"chunk_indices, row 3: is 0\.5",
    ),
    "NaN among the indices": (changed(3, np.nan, "chunk_indices", chunk_indices=CHUNK.astype(float)), "row 3: is nan"),
    "indices that are texts": (archive(base(article_indices=np.array(["a"] * COUNT))), "<U1"),
    "indices that are texts in objects": (archive(base(article_indices=np.array(["a"] * COUNT, object))), "row 0"),
    "indices of another length": (archive(base(article_indices=np.zeros(3, int))), r"\(3,\)"),
    "too few articles to split": (archive({k: v[ARTICLE < 5] for k, v in base().items()}), "5 of 5 articles"),
}
ARTICLE_CASES |= {
    name: (pickled(PREFIX + items + SUFFIX, name="cpe_ids" if "doubling" in name else "concept_texts"), message)
    for name, (items, message) in ITEM_CASES.items()
}


@pytest.mark.parametrize("case", [*RUNNING_CASES, *ARTICLE_CASES])
def test_hostile_article_files(tmp_path, case):
    marker, path = tmp_path / "MARKER", tmp_path / "articles.npz"
    content, message = RUNNING_CASES.get(case) or ARTICLE_CASES[case]
    path.write_bytes(content(marker) if callable(content) else content)
    assert "articles.npz" in refused(path, tmp_path, message, marker)


def test_the_payload_would_have_run(tmp_path):
    """The hostile pickles above are live: numpy with allow_pickle runs them."""
    marker, path = tmp_path / "MARKER", tmp_path / "articles.npz"
    path.write_bytes(pickled(with_system(marker, 4)))
    with np.load(path, allow_pickle=True) as z:
        assert len(z["concept_texts"]) == COUNT
    assert marker.exists()


def test_fuzz():
    counts = fuzz.main(200, seed=1)
    assert sum(counts.values()) == 200
    assert {result for _, result in counts} == {"store", "refused"}
