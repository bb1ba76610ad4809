"""Damaged and hostile article files are refused, and nothing in them is run."""

import io
import pickle
import struct
import subprocess
import zipfile

import fuzz_importers as fuzz
import numpy as np
import pytest
from fuzz_importers import Runs, world
from original_files import COUNT, refused

# --- damaged and hostile files ---------------------------------------------------------------------------------------


def base(**more):
    x, article, chunk = world()
    return {"vectors": x, "article_indices": article, "chunk_indices": chunk, **more}


def archive(arrays, compressed=True, raw=()):
    """The bytes of an .npz; `raw`: (member name, bytes) pairs put behind the arrays."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as file:
        for name, array in arrays.items():
            held = io.BytesIO()
            np.save(held, array, allow_pickle=True)
            file.writestr(f"{name}.npy", held.getvalue())
        for name, data in raw:
            file.writestr(name, data)
    return out.getvalue()


def npy(descr, shape, body, order=False):
    text = repr({"descr": descr, "fortran_order": order, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + body


def claimed(descr, shape, body=b"\0" * 64, name="vectors"):
    """An article file in which one array's header says something else."""
    arrays = base()
    arrays.pop(name)
    return archive(arrays, raw=[(f"{name}.npy", npy(descr, shape, body))])


def pickled(body, shape=None, name="concept_texts"):
    """An article file with an object array whose pickle is `body`."""
    shape = (len(world()[0]),) if shape is None else shape
    return archive(base(), raw=[(f"{name}.npy", npy("|O", shape, body))])


ARRAY = pickle.dumps(np.array(["a"] * len(world()[0]), object), 4)
PREFIX = ARRAY[:2] + ARRAY[11 : ARRAY.index(b"]\x94(") + 3]  # without its frame, up to the mark before the items
SUFFIX = b"et\x94b."


def array_of(items: bytes) -> bytes:
    return PREFIX + items + SUFFIX


def changed(at, value, name="vectors", **more):
    arrays = base(**more)
    arrays[name] = arrays[name].copy()
    arrays[name][at] = value
    return archive(arrays)


class Reduced:
    def __init__(self, what, args):
        self.made = what, args

    def __reduce__(self):
        return self.made


def patched(data: bytes, signature: bytes, offset: int, value: bytes) -> bytes:
    """Every zip record with this signature, changed at an offset."""
    out, at = bytearray(data), data.find(signature)
    while at >= 0:
        out[at + offset : at + offset + len(value)] = value
        at = data.find(signature, at + 1)
    return bytes(out)


def with_system(marker, protocol):
    held = np.empty(len(world()[0]), object)
    held[:] = [Runs(marker)] * len(held)
    return pickle.dumps(held, protocol)


GOOD = archive(base(), compressed=False)

# name: (the article file's bytes, given the path a payload would touch; what the message must say)
ARTICLE_CASES = {
    "pickle that calls os.system": (lambda m: pickled(with_system(m, 4)), r"concept_texts.*posix\.system"),
    "the same in protocol 2": (lambda m: pickled(with_system(m, 2)), r"posix\.system"),
    "the same in protocol 0": (lambda m: pickled(with_system(m, 0)), r"system|copy_?reg"),
    "payload without an array": (lambda m: pickled(pickle.dumps(Runs(m))), r"posix\.system"),
    "text opcodes": (lambda m: pickled(b"cos\nsystem\n(S'touch %s'\ntR." % str(m).encode()), r"os\.system"),
    "INST": (lambda m: pickled(b"(S'touch %s'\nios\nsystem\n." % str(m).encode()), r"os\.system"),
    "builtins.eval": (lambda m: pickled(pickle.dumps(Reduced(eval, (f"open({str(m)!r}, 'w')",)))), r"builtins\.eval"),
    "a reduce within a reduce": (
        lambda m: pickled(pickle.dumps(Reduced(getattr, (Reduced(__import__, ("os",)), "system")))),
        r"builtins\.",
    ),
    "a call of a returned object": (lambda m: pickled(array_of(b"\x8c\x01x\x8c\x01y\x86N\x85R")), r"TypeError"),
    "subprocess in a member that is not needed": (
        lambda m: pickled(pickle.dumps(Reduced(subprocess.run, (["touch", str(m)],))), name="extra"),
        r"array extra.*subprocess\.run",
    ),
    "numpy's own loader": (lambda m: pickled(b"cnumpy\nload\n(X\x01\x00\x00\x00xtR."), r"numpy\.load"),
    "codecs.decode": (lambda m: pickled(b"c_codecs\ndecode\n."), r"_codecs\.decode"),
    "another codec than latin1": (
        lambda m: pickled(array_of(b"c_codecs\nencode\n(X\x01\x00\x00\x00xX\x03\x00\x00\x00hextR")),
        r"encode",
    ),
    "extension code": (lambda m: pickled(array_of(b"\x82\x01")), r"opcode EXT1"),
    "extension code of 4 bytes": (lambda m: pickled(array_of(b"\x84\x01\x00\x00\x00")), r"opcode EXT4"),
    "persistent id": (lambda m: pickled(array_of(b"Pid\n")), r"PERSID"),
    "binary persistent id": (lambda m: pickled(array_of(b"\x8c\x01xQ")), r"BINPERSID"),
    "NEWOBJ": (lambda m: pickled(array_of(b"cnumpy\nndarray\n)\x81")), r"opcode NEWOBJ"),
    "NEWOBJ of a foreign class": (
        lambda m: pickled(array_of(b"ccollections\nCounter\n)\x81")),
        r"collections\.Counter",
    ),
    "OBJ": (lambda m: pickled(array_of(b"(cnumpy\nndarray\no")), r"opcode OBJ"),
    "BUILD on a dict": (lambda m: pickled(array_of(b"}}b")), r"shape"),
    "BUILD twice on an array": (lambda m: pickled(ARRAY[:-1] + b"(K\x01)NNNtb."), r"inside"),
    "a list that holds itself": (lambda m: pickled(array_of(b"]\x94h\x13a" + b"N" * (COUNT - 1))), r"row 0: is list"),
    "a dict that holds itself": (
        lambda m: pickled(array_of(b"}\x94\x8c\x01ah\x13s" + b"N" * (COUNT - 1))),
        r"row 0: is dict",
    ),
    "the array's own list in itself": (lambda m: pickled(array_of(b"h\x12" + b"N" * (COUNT - 1))), r"row 0: is list"),
    "a tuple as a key": (lambda m: pickled(array_of(b"}NN\x86Ns" + b"N" * (COUNT - 1))), r"keys that are no texts"),
    "keys put into a list": (lambda m: pickled(array_of(b"]\x8c\x01aNs" + b"N" * (COUNT - 1))), r"no texts"),
    "a number of 6,000 digits": (
        lambda m: archive(
            {k: v for k, v in base().items() if k != "chunk_indices"},
            raw=[
                ("chunk_indices.npy", npy("|O", (COUNT,), array_of(b"I0x" + b"f" * 5000 + b"\n" + b"N" * (COUNT - 1))))
            ],
        ),
        r"chunk_indices, row 0: is int",
    ),
    "BUILD on a stand-in": (
        lambda m: pickled(array_of(b"cnumpy\nndarray\n}\x8c\x04nameNsb" + b"N" * (COUNT - 1))),
        r"inside",
    ),
    "a byte array of 16 exabytes": (lambda m: pickled(array_of(b"\x96" + b"\xff" * 8)), r"opcode BYTEARRAY8"),
    "a set": (lambda m: pickled(array_of(b"\x8f")), r"opcode EMPTY_SET"),
    "a name that is a list of lists": (lambda m: pickled(array_of(b"]]\x93")), r"STACK_GLOBAL requires str"),
    "a hundred brackets deep": (lambda m: pickled(array_of(b"(" * 200)), r"cannot be read"),
    "a memo number that takes gigabytes": (
        lambda m: pickled(array_of(b"Nr\xff\xff\xff\x7fj\xff\xff\xff\x7e")),
        r"UnpicklingError: Memo|KeyError",
    ),
    "a text of 16 exabytes": (lambda m: pickled(array_of(b"\x8d" + b"\xff" * 8)), r"BINUNICODE8 exceeds"),
    "millions of empty dicts": (lambda m: pickled(PREFIX + b"}" * 1_100_000 + SUFFIX), r"too large"),
    "doubling tuples": (
        lambda m: pickled(
            PREFIX + b"\x8c\x01x\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(19, 90)) + SUFFIX,
            name="cpe_ids",
        ),
        r"shape",
    ),
    "fewer items than the shape": (lambda m: pickled(array_of(b"\x8c\x01a")), r"shape"),
    "more items than the shape": (lambda m: pickled(ARRAY, shape=(COUNT - 1,)), r"concept_texts.*shape|more than"),
    "an array that claims a huge shape": (
        lambda m: pickled(ARRAY.replace(b"K\x01M" + struct.pack("<H", COUNT), b"K\x01J\xff\xff\xff\x7f", 1)),
        r"shape",
    ),
    "a nested array that claims a huge shape": (
        lambda m: pickled(
            array_of(pickle.dumps(np.arange(3), 2)[2:-1].replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85", 1))
        ),
        r"shape|cannot be read",
    ),
    "a structured type in a pickle": (
        lambda m: pickled(array_of(pickle.dumps(np.zeros(1, [("a", "i4")])[0], 2)[2:-1])),
        r"structured type|plain|numpy",
    ),
    "texts that are numbers": (
        lambda m: archive(base(concept_texts=np.array([1.5] * COUNT, object))),
        r"row 0: is float",
    ),
    "texts of another length": (
        lambda m: archive(base(concept_texts=np.array(["a"]))),
        r"concept_texts: has shape \(1,\)",
    ),
    "bytes that are no UTF-8": (
        lambda m: archive(base(concept_texts=np.array([b"\xff\xfe"] * COUNT))),
        r"UnicodeDecodeError",
    ),
    "code points that there are not": (
        lambda m: archive(base(), raw=[("concept_texts.npy", npy("<U1", (COUNT,), b"\xff\xff\xff\x7f" * COUNT))]),
        r"row 0: .*code points",
    ),
    "object array that unpacks to too much": (
        lambda m: pickled(PREFIX + (b"\x8d" + struct.pack("<Q", 20 << 20) + b"a" * (20 << 20)) + SUFFIX),
        r"unpacks to 20,",
    ),
    "huge vectors in the header": (lambda m: claimed("<f4", (10**9, 768)), r"1000000000, 768"),
    "a shape that overflows": (lambda m: claimed("<f4", (2**62, 2**62)), r"impossible shape"),
    "a negative shape": (lambda m: claimed("<f4", (-4, -4)), r"impossible shape"),
    "a shape that is too small": (lambda m: claimed("<f4", (2, 4)), r"\(2, 4\)"),
    "huge unicode": (lambda m: claimed("<U99999999", (2**20,), name="article_indices"), r"promises|row"),
    "a structured type": (
        lambda m: archive({**base(), "vectors": np.zeros(5, [("a", "f4"), ("b", "i4")])}),
        r"vectors: has type",
    ),
    "a header with code in it": (
        lambda m: archive(
            {k: v for k, v in base().items() if k != "vectors"},
            raw=[("vectors.npy", b"\x93NUMPY\x01\x00v\x00" + b"__import__('os').system('touch x')".ljust(117) + b"\n")],
        ),
        r"vectors: .*malformed",
    ),
    "a header that is cut off": (
        lambda m: archive(
            {"article_indices": [0], "chunk_indices": [0]}, raw=[("vectors.npy", npy("<f4", (1, 4), b"")[:60])]
        ),
        r"reading array header",
    ),
    "a member that is no array": (lambda m: archive(base(), raw=[("concept_texts.npy", b"hello")]), r"reading magic"),
    "a zip cut in half": (lambda m: GOOD[: len(GOOD) // 2], r"not a readable"),
    "a zip without its last bytes": (lambda m: GOOD[:-10], r"not a readable"),
    "a zip of a few bytes": (lambda m: GOOD[:7], r"not a readable"),
    "a zip whose middle is missing": (lambda m: GOOD[:300] + GOOD[900:], r"cannot be read|not a readable"),
    "an empty file": (lambda m: b"", r"not a readable"),
    "a wrong checksum": (lambda m: GOOD[:400] + b"\x00\x01\x02\x03" + GOOD[404:], r"vectors: .*Bad CRC"),
    "a size in the directory that is not the member's": (
        lambda m: patched(GOOD, b"PK\x01\x02", 24, struct.pack("<I", 10**6)),
        r"1,000,000 bytes",
    ),
    "a zip bomb of zero vectors": (
        lambda m: archive(
            {
                "vectors": np.zeros((1 << 20, 16), np.float32),
                **{k: np.zeros(1 << 20, np.int8) for k in base() if k != "vectors"},
            }
        ),
        r"rows 0 and 1 ",
    ),
    "a zip bomb that would fill the disk": (
        lambda m: patched(claimed("<f4", (2**24, 16)), b"PK\x01\x02", 24, struct.pack("<I", 2**30 + 128)),
        r"1,073,741,952 bytes",
    ),
    "member names that lead out": (lambda m: archive(base(), raw=[("../../x.npy", b"x")]), r"leads out"),
    "an absolute member name": (lambda m: archive(base(), raw=[("/tmp/x.npy", b"x")]), r"leads out"),
    "a name given twice": (lambda m: archive(base(), raw=[("vectors.npy", b"x")]), r"'vectors\.npy'.*twice"),
    "an encrypted member": (
        lambda m: patched(patched(GOOD, b"PK\x01\x02", 8, b"\x01"), b"PK\x03\x04", 6, b"\x01"),
        r"is encrypted",
    ),
    "an unusual packing": (lambda m: patched(GOOD, b"PK\x01\x02", 10, b"\x0e"), r"packed by method 14"),
    "an .npy under the name .npz": (lambda m: npy("<f4", (1, 4), b"\0" * 16), r"single \.npy"),
    "a text under the name .npz": (lambda m: b"vectors: none\n" * 50, r"not a readable"),
    "an executable under the name .npz": (lambda m: b"\x7fELF" + bytes(range(256)) * 9, r"not a readable"),
    "no vectors": (lambda m: archive({"article_indices": [0]}), r"missing: vectors, chunk_indices"),
    "a sequence file as articles": (lambda m: archive({"contexts": np.ones((2, 5, 4))}), r"sequence file"),
    "integer vectors": (lambda m: archive(base(vectors=np.ones((COUNT, 4), np.int8))), r"int8"),
    "complex vectors": (lambda m: archive(base(vectors=np.ones((COUNT, 4), np.complex64))), r"complex64"),
    "object vectors": (lambda m: archive(base(vectors=world()[0].astype(object))), r"vectors: .*object"),
    "vectors without a dimension": (lambda m: archive(base(vectors=np.ones(COUNT))), r"chunks, dimension"),
    "empty articles": (
        lambda m: archive(
            {"vectors": np.ones((0, 4)), "article_indices": np.ones(0, int), "chunk_indices": np.ones(0, int)}
        ),
        r"\(0, 4\)",
    ),
    "NaN": (lambda m: changed((9, 1), np.nan), r"row 9 .*NaN"),
    "infinite": (lambda m: changed((9, 1), -np.inf), r"row 9 .*infinite"),
    "zero": (lambda m: changed(9, 0), r"row 9 .*zero"),
    "duplicate positions": (lambda m: changed(1, 0, "chunk_indices"), r"rows 0 and 1 "),
    "a negative article": (lambda m: changed(3, -1, "article_indices"), r"article_indices, row 3: is -1"),
    "a position beyond 32 bits": (
        lambda m: changed(3, 2**40, "chunk_indices"),
        r"chunk_indices, row 3: is 1099511627776",
    ),
    "fractions": (
        lambda m: changed(3, 0.5, "chunk_indices", chunk_indices=world()[2].astype(float)),
        r"chunk_indices, row 3: is 0\.5; needed is a whole number",
    ),
    "NaN among the indices": (
        lambda m: changed(3, np.nan, "chunk_indices", chunk_indices=world()[2].astype(float)),
        r"chunk_indices, row 3: is nan",
    ),
    "indices that are texts": (lambda m: archive(base(article_indices=np.array(["a"] * COUNT))), r"<U1"),
    "indices of another length": (lambda m: archive(base(article_indices=np.zeros(3, int))), r"\(3,\)"),
    "too few articles to split": (
        lambda m: archive({k: v[world()[1] < 5] for k, v in base().items()}),
        r"5 of 5 articles",
    ),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", ARTICLE_CASES)
def test_hostile_article_files(tmp_path, case):
    build, message = ARTICLE_CASES[case]
    marker = tmp_path / "MARKER"
    path = tmp_path / "articles.npz"
    path.write_bytes(build(marker))
    told = refused(path, tmp_path, message, marker)
    assert "articles.npz" in told


def test_the_payload_would_have_run(tmp_path):
    """The hostile pickles above are live: numpy with allow_pickle runs them."""
    marker, path = tmp_path / "MARKER", tmp_path / "articles.npz"
    path.write_bytes(pickled(with_system(marker, 4)))
    with np.load(path, allow_pickle=True) as z, np.errstate(all="ignore"):
        assert len(z["concept_texts"]) == COUNT
    assert marker.exists()


def test_fuzz():
    counts = fuzz.main(200, seed=1)
    assert sum(counts.values()) == 200
    assert {result for _, result in counts} == {"store", "refused"}
