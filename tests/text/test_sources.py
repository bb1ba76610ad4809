"""Sources: small real files of every kind, the loaders' fakes where a network would be, and hostile input."""

import gzip
import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lvmlib.data import store as V
from lvmlib.errors import LVMError
from lvmlib.text import sources as S
from lvmlib.text import tables as R

HOW = 'needs the extra "encode": pip install -e ".[encode]"'
pa = pytest.importorskip("pyarrow", reason=HOW)
pq = pytest.importorskip("pyarrow.parquet", reason=HOW)


def read(source, **options):
    return [(d.title, d.text, d.source) for d in S.documents(str(source), **options)]


def refused(words, source, *, read=read, **options):
    """The error of reading a source; its message must hold `words` and be one that a person can act on."""
    with pytest.raises(LVMError) as e:
        read(source, **options)
    message = str(e.value)
    for word in [words] if isinstance(words, str) else words:
        assert word in message, message
    assert "Traceback" not in message and len(message) < 1500
    return message


def put(path: Path, content="Text."):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# -------------------------------------------------------------------------------------------------- folders of text


def test_a_folder_of_text_files_in_order_of_their_paths(tmp_path):
    put(tmp_path / "b.txt", "\ufeffB with a mark.\r\nTwo.")
    put(tmp_path / "a.txt", "A")
    put(tmp_path / "a.MD", "# Heading\n\nProse.")
    put(tmp_path / "news" / "deep" / "z.txt", "Z")
    put(tmp_path / "news.txt", "N")
    put(tmp_path / "picture.png", b"\x89PNG\0")
    put(tmp_path / ".hidden.txt", b"\xff\xff")
    put(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.txt", "A")
    counts = {}
    assert read(tmp_path, counts=counts) == [
        ("a", "Prose.", tmp_path.name),
        ("a (2)", "A", tmp_path.name),
        ("b", "B with a mark.\r\nTwo.", tmp_path.name),
        ("news/deep/z", "Z", "news"),
        ("news", "N", tmp_path.name),
    ]
    assert counts == {
        "files of other kinds, passed over": 1, "titles that were there before, numbered": 1, "articles read": 5,
    }  # fmt: skip
    assert [d[0] for d in read(tmp_path, limit=2)] == ["a", "a (2)"]


def test_empty_files_are_counted_and_passed_over(tmp_path):
    for name, content in (("a", ""), ("b", " \n\t\n"), ("c", "\ufeff"), ("d", "Text")):
        put(tmp_path / f"{name}.txt", content)
    put(tmp_path / "e.md", "# Only a heading\n")
    counts = {}
    assert read(tmp_path, counts=counts) == [("d", "Text", tmp_path.name)]
    assert counts == {"empty files": 3, "documents without text": 1, "articles read": 1}


def test_a_null_text_is_counted_as_empty(tmp_path):
    put(tmp_path / "a.jsonl", '{"text": null}\n{"text": ""}\n{"text": "Text."}\n')
    counts = {}
    assert [text for _, text, _ in read(tmp_path / "a.jsonl", counts=counts)] == ["Text."]
    assert counts["documents without text"] == 2


def test_all_unreadable_files_are_told_at_once(tmp_path):
    for number in range(14):
        put(tmp_path / f"{number:02d}.txt", b"caf\xe9" if number else "Text.")
    refused(["13 of 14 files", "01.txt, 02.txt", "10.txt and 3 more", "The first", "byte 3 is 0xe9"], tmp_path)
    assert len(read(tmp_path, limit=1)) == 1


def test_a_folder_in_one_folder_keeps_its_names(tmp_path):
    put(tmp_path / "news" / "a.txt")
    assert read(tmp_path) == [("news/a", "Text.", "news")]


def test_links_are_followed_and_loops_end(tmp_path):
    put(tmp_path / "here" / "a.txt")
    put(tmp_path / "there" / "b.txt", "B")
    (tmp_path / "here" / "loop").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "up").symlink_to("..")
    (tmp_path / "here" / "itself").symlink_to("itself")
    (tmp_path / "here" / "broken.txt").symlink_to("nowhere.txt")
    (tmp_path / "here" / "linked.txt").symlink_to(tmp_path / "there" / "b.txt")
    os.mkfifo(tmp_path / "here" / "pipe.txt")
    assert [text for _, text, _ in read(tmp_path / "here")] == ["Text.", "B", "B"]


MARKDOWN = """---
title: Front
tags: [x]
---
Title
=====

Some *emphasised*, __strong__ and `coded` text with a [link](http://x.y/z_(a) "t"), an ![image](a.png)
and snake_case; 2 * 3 is \\*six\\* <!-- a
comment --> &amp; <b>more</b>[^1]. See <https://x.y>.

| a | b |
|---|--:|
| 1 | 2 |

a | b
--- | ---
1 | 2

## Second ##

- first **item**
1. second [item][ref]
- [x] done

> quoted
> twice

~~~text
code --- | <!--
~~~

***

Last.

[ref]: http://x
[^1]: A note.
"""


def test_markdown_becomes_prose():
    found = [" ".join(block.split()) for block in S.prose(MARKDOWN).split("\n\n") if block.strip()]
    assert found == [
        "Some emphasised, strong and coded text with a link, an and snake_case; 2 * 3 is *six* & more . See .",
        "first item",
        "second item",
        "done",
        "quoted twice",
        "Last.",
    ]
    assert " ".join(S.prose("---\n\nA rule first.\n\n---\n\nAnd one more.").split()) == "A rule first. And one more."
    assert S.prose("Text.\n\n```\nnever closed\n\nlost").strip() == "Text."
    assert S.prose("a\n```") == "a"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="a `~*_-=#>|[]()!<:/\\\n\r1.&;", max_size=80))
@example("---\na:\n" * 3)
def test_any_markdown_is_read(text):
    assert isinstance(S.prose(text), str)
    assert text.count("a") >= S.prose(text).count("a")


def test_hostile_markdown_is_read_in_time():
    for part in ("[a](", "![", "<!--", "<a", "*", "_a", "`", "[[", "> ", "| - ", "&", "\\", "- ", "[a]: ", "[^"):
        S.prose(part * 100_000)
        S.prose((part + "\n") * 50_000)
    S.prose("---\na: b\n" + "x\n" * 100_000)


# ----------------------------------------------------------------------------------------------- JSON Lines, Parquet


ROWS = [
    {"title": "One", "text": "First text.", "id": 1},
    {"title": "One", "text": "Second\n\ntext.", "id": 2},
    {"title": None, "text": "Third.", "id": 3},
    {"text": " ", "title": "empty", "id": 4},
    {"title": "One (2)", "text": "Fourth.", "id": 5},
]
READ = [
    ("One", "First text."),
    ("One (2)", "Second\n\ntext."),
    ("document 3", "Third."),
    ("One (2) (2)", "Fourth."),
]


def put_table(path: Path, kind: str, rows=ROWS):
    if kind == "parquet":
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        return path
    content = "\n".join(json.dumps(row) for row in rows).encode() + b"\r\n\n"
    return put(path, gzip.compress(content) if kind.endswith("gz") else content)


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "jsonl.gz", "parquet"])
def test_tables_give_an_article_a_row(tmp_path, kind):
    path, counts = put_table(tmp_path / f"t.{kind}", kind), {}
    assert read(path, counts=counts) == [(title, text, path.name) for title, text in READ]
    assert counts == {
        "titles that were there before, numbered": 2,
        "documents without a title": 1,
        "documents without text": 1,
        "articles read": 4,
    }
    assert read(path, limit=1) == [("One", "First text.", path.name)]
    assert [t for t, _, _ in read(path, title="id")] == ["1", "2", "3", "5"]
    assert read(path, title=None)[1][0] == "document 2"
    assert read(path, text="title", limit=1) == [("One", "One", path.name)]
    refused(["no column 'txet'", "did you mean 'text'", "id"], path, text="txet")
    refused(["no column 'name'", "title"], path, title="name")
    refused("'id' holds", path, text="id")


def test_a_folder_of_parquet_files(tmp_path):
    put_table(tmp_path / "b.parquet", "parquet", ROWS[:1])
    put_table(tmp_path / "a" / "x.parquet", "parquet", ROWS[1:2])
    assert read(tmp_path) == [("One", "Second\n\ntext.", "x.parquet"), ("One (2)", "First text.", "b.parquet")]
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "c.parquet")
    refused(["c.parquet", "no column 'text'", "body"], tmp_path)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_the_kinds_of_text_that_parquet_has(tmp_path, kind):
    text = pa.array(["a", "b"]).cast(kind)
    pq.write_table(pa.table({"text": text}), tmp_path / "t.parquet")
    assert [text for _, text, _ in read(tmp_path / "t.parquet")] == ["a", "b"]


def test_long_lines_are_read(tmp_path):
    long = "word " * 2_000_000
    path = put_table(tmp_path / "t.jsonl", "jsonl", [{"text": long, "title": "t" * 5000}, {"text": "short"}])
    found = read(path)
    assert found[0][1] == long and len(found[0][0]) == S.TITLE_LENGTH and found[1][1] == "short"


def test_a_line_or_file_beyond_all_articles_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(S, "LARGEST", 1000)
    bomb = put(tmp_path / "bomb.jsonl.gz", gzip.compress(b'{"text": "' + b" " * 50_000_000))
    tracemalloc.start()
    refused(["line 1", "are no article"], bomb)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    put(tmp_path / "f" / "a.txt", "x" * 1001)
    refused(["a.txt", "1,001 bytes"], tmp_path / "f")


def test_titles_are_one_line_and_can_be_written(tmp_path):
    rows = [{"text": "x", "title": t} for t in ("a\nb\t c", "\ud800", "e\u0301\xad", 7, 2.5, True, ["x"], {}, "\u202e")]
    found = [t for t, _, _ in read(put_table(tmp_path / "t.jsonl", "jsonl", rows))]
    assert found == ["a b c", "document 2", "é", "7", "2.5", "document 6", "document 7", "document 8", "document 9"]


# ------------------------------------------------------------------------------------------------------- hostile input


HOSTILE = {
    "non-UTF-8.txt": ("caf\xe9 and more".encode("latin-1"), ["is not UTF-8", "byte 3 is 0xe9", "iconv"]),
    "utf-16.txt": ("Text.".encode("utf-16"), ["is UTF-16", "iconv -f UTF-16"]),
    "utf-32.txt": ("Text.".encode("utf-32"), ["is UTF-32"]),
    "utf-16-without-mark.txt": ("Text.".encode("utf-16-le"), ["NUL", "UTF-16 without a mark"]),
    "nul.txt": (b"Text.\0More.", ["NUL bytes (the first at byte 5)", "take it away"]),
    "zip.txt": (b"PK\x03\x04" + bytes(range(256)), ["NUL"]),
    "control.txt": (b"\x01\x02\x03\x04\x05\x06" * 9, ["control characters", "binary"]),
    "cut-character.md": ("ends in the middle of é".encode()[:-1], ["is not UTF-8"]),
    "surrogate.txt": (b"\xed\xa0\x80", ["is not UTF-8"]),
    "broken.jsonl": (b'{"text": "a"}\n{"text": "b"\n', ["line 2", "is not JSON", "mend or remove"]),
    "list.jsonl": (b'{"text": "a"}\n\n["text"]\n', ["line 3", "holds a list"]),
    "number.jsonl": (b"12\n", ["line 1", "holds a number"]),
    "null-text.jsonl": (b'{"text": null}\n', ["no article with text"]),
    "number-text.jsonl": (b'{"text": 12}\n', ["line 1", "'text' holds a number"]),
    "object-text.jsonl": (b'{"text": {"a": 1}}\n', ["holds an object"]),
    "no-column.jsonl": (b'{"texts": "a", "id": 1}\n', ["line 1", "no column 'text'", "did you mean 'texts'"]),
    "empty-object.jsonl": (b"{}\n", ["no column 'text'", "columns are: none"]),
    "deep.jsonl": (b'{"text": ' + b"[" * 200_000 + b"\n", ["line 1", "is not JSON"]),
    "digits.jsonl": (b'{"text": ' + b"9" * 6000 + b"}\n", ["line 1", "is not JSON"]),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', ["line 1", "is not UTF-8"]),
    "utf-16.jsonl": ('{"text": "a"}'.encode("utf-16"), ["line 1", "is UTF-16"]),
    "binary.jsonl": (bytes(range(256)) * 4, ["line 1"]),
    "blank.jsonl": (b"\n \r\n\n", ["no article with text"]),
    "empty.jsonl": (b"", ["no article with text"]),
    "not-gzip.jsonl.gz": (b'{"text": "a"}\n', ["line 1", "damaged"]),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 5000)[:-30], ["damaged", "fetch it again"]),
    "text.parquet": (b"This is no Parquet file at all.", ["cannot be read as Parquet", "damaged"]),
    "empty.parquet": (b"", ["cannot be read as Parquet"]),
    "magic.parquet": (b"PAR1" + b"\xff" * 64 + b"PAR1", ["cannot be read as Parquet"]),
    "table.csv": (b"a,b\n", ["unknown kind", "a source is a folder"]),
    "single.txt": (b"Text.", ["is one text file", "give the folder"]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_gives_one_clear_error(tmp_path, name):
    content, words = HOSTILE[name]
    in_folder = name.endswith((".txt", ".md")) and name != "single.txt"
    path = put(tmp_path / ("f" if in_folder else "") / name, content)
    assert name in refused(words, path.parent if in_folder else path)


def test_text_with_lone_surrogates_passes_and_is_cleaned_when_it_is_cut(tmp_path):
    chunking = pytest.importorskip("lvmlib.text.chunking")
    path = put(tmp_path / "t.jsonl", b'{"text": "A \\ud800 lone one. ' + b"x" * 80 + b'", "title": "\\udfff"}\n')
    (document,) = S.documents(str(path))
    assert document.title == "document 1"
    (chunk,) = chunking.chunks(document.text)
    assert chunk.encode().startswith(b"A lone one. x")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "none", ["no such folder"]),
        (lambda p: p, ["holds no .txt"]),
        (lambda p: put(p / ".hidden.txt").parent, ["holds no .txt"]),
        (lambda p: put(p / "x.jsonl").parent, ["JSON Lines", "x.jsonl"]),
        (lambda p: put(put(p / "a.txt").parent / "b.parquet").parent, ["both text and Parquet"]),
        (lambda p: put(p / "a.txt", "").parent, ["no article with text"]),
        (lambda p: "", ["no source"]),
        (lambda p: None, ["None is no source"]),
        (lambda p: "a\0b", ["no such folder"]),
        (lambda p: "x" * 5000, ["no such folder"]),
        (lambda p: "hub:", ["hub:OWNER/NAME"]),
        (lambda p: "hub:../../etc", ["hub:OWNER/NAME"]),
        (lambda p: "hub:a/b/c", ["hub:OWNER/NAME"]),
        (lambda p: "nltk:browm", ["did you mean 'brown'"]),
        (lambda p: "nltk:", ["unknown corpus", "nltk:abc"]),
    ],
)
def test_a_source_that_is_none_is_told_what_could_be_one(tmp_path, make, words):
    source = make(tmp_path)
    with pytest.raises(LVMError) as e:
        S.documents(str(source) if isinstance(source, Path) else source)
        list(S.documents(str(source)))  # what is found out only in reading
    assert all(word in str(e.value) for word in words), str(e.value)


def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch):
    put(tmp_path / "a.txt")
    monkeypatch.setattr(Path, "read_bytes", lambda p: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    refused(["a.txt", "Permission denied", "make it readable"], tmp_path)
    monkeypatch.setattr(os, "listdir", lambda p: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    refused(["cannot be opened", "Permission denied"], tmp_path)


@pytest.mark.parametrize("limit", [0, -1, 1.5, "3", True])
def test_a_bad_limit_is_refused(tmp_path, limit):
    put(tmp_path / "a.txt")
    refused("limit", tmp_path, limit=limit)
    with pytest.raises(LVMError, match="limit"):
        R.vector_rows(str(tmp_path), limit=limit)


def test_damaged_parquet_gives_only_clear_errors(tmp_path):
    """Each byte of a file turned over, one at a time: rows or LVMError, nothing else."""
    whole = put_table(tmp_path / "t.parquet", "parquet").read_bytes()
    path, errors = tmp_path / "d.parquet", 0
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            read(path)
        except LVMError as e:
            errors += 1
            assert "d.parquet" in str(e)
    assert errors > 50


# ----------------------------------------------------------------------------------------------------------------- hub


class Stream:
    """What load_dataset gives: rows on demand, and a note of how many were drawn."""

    def __init__(self, rows, fail_at=None):
        self.rows, self.drawn, self.fail_at = rows, 0, fail_at

    def __iter__(self):
        for row in self.rows:
            if self.drawn == self.fail_at:
                raise ConnectionError("the line went dead")
            self.drawn += 1
            yield row


@pytest.fixture
def hub(monkeypatch):
    datasets = pytest.importorskip("datasets", reason=HOW)
    called = []

    def use(stream):
        def load_dataset(*args, **options):
            called.append((args, options))
            if isinstance(stream, Exception):
                raise stream
            return stream

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return called

    return use


def test_a_hub_dataset_is_streamed_by_name(hub):
    stream = Stream({"id": i, "title": f"Article {i}", "text": "" if i == 1 else f"Text {i}."} for i in range(10**9))
    called = hub(stream)
    counts = {}
    found = read("hub:wikimedia/wikipedia", config="20231101.en", limit=3, counts=counts)
    assert found == [(f"Article {i}", f"Text {i}.", "wikimedia/wikipedia") for i in (0, 2, 3)]
    assert called == [(("wikimedia/wikipedia", "20231101.en"), {"split": "train", "streaming": True})]
    assert stream.drawn == 4, "the limit ends the stream"
    assert counts == {"documents without text": 1, "articles read": 3}


def test_a_pinned_revision_and_a_subset_reach_the_loader(hub):
    called = hub(Stream([{"text": "a"}]))
    assert read("hub:a/b@main-1", subset="validation") == [("document 1", "a", "a/b")]
    assert called == [(("a/b", None), {"split": "validation", "streaming": True, "revision": "main-1"})]


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (FileNotFoundError("Couldn't find any data file"), ["FileNotFoundError", "check the name"]),
        (ValueError("BuilderConfig 'x' not found. Available: ['en']"), ["Available: ['en']"]),
        (ConnectionError(""), ["ConnectionError", "network"]),
        (Stream([{"text": "a"}] * 9, fail_at=5), ["line went dead", "network"]),
        (Stream([{"body": "a"}]), ["row 1", "no column 'text'", "body"]),
        (Stream([{"text": "a"}, {"text": 5}]), ["row 2", "holds a number"]),
        (Stream([]), ["no article with text"]),
    ],
)
def test_trouble_with_the_hub_is_told_with_what_to_do(hub, stream, words):
    hub(stream)
    refused(["a/b", *words], "hub:a/b")


def test_the_real_loader_streams_parquet(hub, tmp_path, monkeypatch):
    """The library itself on a local file: the calls fit its interface, of rows as of vectors."""
    datasets = pytest.importorskip("datasets", reason=HOW)
    put_vectors(tmp_path / "v.parquet", article=[1, 1, 2], position=[0, 1, 0])
    real = datasets.load_dataset

    def load_dataset(name, config, *, split, streaming):
        assert (name, config, split, streaming) == ("a/b", None, "train", True)
        return real("parquet", data_files=str(tmp_path / "v.parquet"), split=split, streaming=streaming,
                    cache_dir=str(tmp_path / "cache"))  # fmt: skip

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [t for t, _, _ in read("hub:a/b")] == ["Title 1", "Title 1 (2)", "Title 2"]
    from_hub, from_file = (list(R.vector_rows(s)) for s in ("hub:a/b", str(tmp_path / "v.parquet")))
    assert np.array_equal(from_hub[0].vectors, from_file[0].vectors) and from_hub[0].vectors.shape == (3, 4)
    assert from_hub[0].article == from_file[0].article == [1, 1, 2]
    assert from_hub[0].source == "a/b"


# ---------------------------------------------------------------------------------------------------------------- nltk


@pytest.fixture
def nltk_data(tmp_path, monkeypatch):
    """A folder as nltk's downloader leaves it, each corpus laid out as the real one."""
    corpus = pytest.importorskip("nltk.corpus", reason=HOW)
    base = tmp_path / "nltk_data" / "corpora"
    put(base / "movie_reviews" / "neg" / "cv000_1.txt",
        'plot : two teens drink , and don\'t drive . \nwatch the " movie " ( and run ) ! \n\n')  # fmt: skip
    put(base / "movie_reviews" / "pos" / "cv000_2.txt", "it costs $9 , says mr . smith . \n")
    put(base / "movie_reviews" / "README", "about")
    put(base / "brown" / "ca01",
        "\n\n\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' ,/, it/pps 's/bez odd/jj ./.\n"
        "Is/bez it/pps ?/. ?/.\n"
        "\n\n\nMerger/nn-hl proposed/vbn-hl\nHowever/wrb ,/, a/at $4/nns fee/nn --/-- yes/rb ;/. ;/.\n\n")  # fmt: skip
    put(base / "brown" / "cb01", "\n\tAssembly/nn session/nn brought/vbd good/nn ./.\n")
    put(base / "brown" / "cats.txt", "ca01 news\ncb01 editorial\n")
    put(
        base / "abc" / "rural.txt", "Head one\nFirst line.\nSecond line.\n\nLonely\n \nHead two\nThird line: caf\xe9.\n"
    )
    put(base / "abc" / "science.txt", "Science head\nA line of caf\xe9.\n".encode("latin-1"))
    put(base / "state_union" / "1945-Truman.txt", "PRESIDENT'S ADDRESS\n \nApril 16, 1945\n\nMr. Speaker:\nA line.\n")
    with zipfile.ZipFile(base / "inaugural.zip", "w") as archive:
        archive.writestr("inaugural/1789-Washington.txt", "Fellow-Citizens:\n\nAmong the vicissitudes.\n")
    monkeypatch.setattr("nltk.data.path", [str(tmp_path / "nltk_data")])
    yield base
    for name in S.CORPORA:
        if hasattr(getattr(corpus, name), "_unload"):
            getattr(corpus, name)._unload()


CORPORA = {
    "movie_reviews": [
        ("neg/cv000_1", "plot: two teens drink, and don't drive.\n\nwatch the \"movie\" (and run)!", "neg"),
        ("pos/cv000_2", "it costs $9, says mr. smith.", "pos"),
    ],
    "brown": [
        ("ca01", "The jury said \"no evidence\", it's odd. Is it?\n\nHowever, a $4 fee -- yes;", "news"),
        ("cb01", "Assembly session brought good.", "editorial"),
    ],
    "abc": [
        ("Head one", "First line.\n\nSecond line.", "rural"),
        ("Head two", "Third line: café.", "rural"),
        ("Science head", "A line of café.", "science"),
    ],
    "state_union": [
        ("1945-Truman", "PRESIDENT'S ADDRESS\n\n\n\nApril 16, 1945\n\n\n\nMr. Speaker:\n\nA line.", "state_union"),
    ],
    "inaugural": [("1789-Washington", "Fellow-Citizens:\n\n\n\nAmong the vicissitudes.", "inaugural")],
}  # fmt: skip


@pytest.mark.parametrize("name", S.CORPORA)
def test_nltk_corpora_as_they_are_laid_out(nltk_data, name):
    counts = {}
    assert read(f"nltk:{name}", counts=counts) == CORPORA[name]
    assert read(f"nltk:{name}", limit=1) == CORPORA[name][:1]
    assert counts.pop("articles read") == len(CORPORA[name])
    assert counts == {"brown": {"headings": 1}, "abc": {"news items of a single line": 1}}.get(name, {})
    assert len(S.fingerprint(f"nltk:{name}")) == 64


def test_a_corpus_that_is_not_there_comes_with_its_command(nltk_data, monkeypatch):
    monkeypatch.setattr("nltk.data.path", [str(nltk_data / "nowhere")])
    refused("python -m nltk.downloader brown", "nltk:brown")
    with pytest.raises(LVMError, match=r"nltk\.downloader abc"):
        S.fingerprint("nltk:abc")


def test_a_damaged_corpus_comes_with_its_command(nltk_data):
    put(nltk_data / "brown" / "ca01", b"\xff\xfe\0")
    refused("python -m nltk.downloader --force brown", "nltk:brown")
    (nltk_data / "brown" / "cats.txt").unlink()
    refused("nltk.downloader --force brown", "nltk:brown")


# ------------------------------------------------------------------------------------------------------------ the slice


def test_the_slice_of_wikipedia(monkeypatch):
    wikipedia = pytest.importorskip("lvmlib.text.wikipedia")
    made = [("One", ["a", "b"]), ("Two", ["c"])]
    monkeypatch.setattr(wikipedia, "wikipedia_slice", lambda: (made, {"pages": 5, "articles": 2, "paragraphs": 3}))
    counts = {}
    assert read("wikipedia", counts=counts) == [("One", "a\n\nb", "wikipedia"), ("Two", "c", "wikipedia")]
    assert counts == {"pages": 5, "articles read": 2}
    assert len(S.fingerprint("wikipedia")) == 64


# ---------------------------------------------------------------------------------------------------------- fingerprint


def test_a_fingerprint_tells_what_changed(tmp_path):
    put(tmp_path / "f" / "a.txt", "one")
    put(tmp_path / "f" / "b.txt", "two")
    first = S.fingerprint(str(tmp_path / "f"))
    assert S.fingerprint(str(tmp_path / "f")) == first and int(first, 16) >= 0
    seen = {first}
    for change in (
        lambda: put(tmp_path / "f" / "a.txt", "longer"),
        lambda: os.utime(tmp_path / "f" / "a.txt", ns=(1, 1)),
        lambda: (tmp_path / "f" / "b.txt").rename(tmp_path / "f" / "c.txt"),
        lambda: put(tmp_path / "f" / "d.txt", "new"),
    ):
        change()
        seen.add(S.fingerprint(str(tmp_path / "f")))
    assert len(seen) == 5
    (tmp_path / "f").rename(tmp_path / "g")
    assert S.fingerprint(str(tmp_path / "g")) in seen, "a folder may be moved"
    put(tmp_path / "g" / "e.png", "not read")
    assert S.fingerprint(str(tmp_path / "g")) in seen


def test_a_fingerprint_holds_the_options(tmp_path):
    put(tmp_path / "a.txt")
    places = [str(tmp_path), "hub:a/b", "hub:a/b@1", "hub:a/c", "wikipedia"]
    made = [S.fingerprint(place) for place in places]
    made += [S.fingerprint("hub:a/b", config="x"), S.fingerprint("hub:a/b", subset="x")]
    made += [S.fingerprint(places[0], limit=1), S.fingerprint(places[0], limit=2), S.fingerprint(places[0], text="b")]
    assert len(set(made)) == len(made)
    with pytest.raises(LVMError, match="no such folder"):
        S.fingerprint(str(tmp_path / "none"))


# -------------------------------------------------------------------------------------------------------- ready vectors


def put_vectors(path, article, position=None, vectors=None, kind=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = kind or pa.list_(pa.float32())
    if vectors is None:
        vectors = np.random.default_rng(0).normal(size=(len(article), 4)).round(3).tolist()
    table = {"wiki_id": article, "paragraph_id": position, "emb": pa.array(vectors, kind), **columns}
    table.setdefault("title", [f"Title {key}" for key in article])
    table.setdefault("text", [f"Text {i}." for i in range(len(article))])
    pq.write_table(pa.table({k: v for k, v in table.items() if v is not None}), path, row_group_size=3)
    return path


def rows_of(source, **options):
    return list(R.vector_rows(str(source), **options))


def grouped(source, folder, half=True, **options):
    folder.mkdir(exist_ok=True)
    counts = {}
    titles, sources = R.group_rows(R.vector_rows(str(source), counts=counts, **options), folder, counts, half)
    texts = folder / "texts.jsonl"
    texts = [json.loads(line) for line in texts.read_bytes().splitlines()] if texts.exists() else None
    assert not list(folder.glob("*.part"))
    return np.load(folder / "vectors.npy"), np.load(folder / "chunks.npy"), texts, titles, sources, counts


SHUFFLED = {"article": [7, 9, 7, 8, 9, 7, 8], "position": [2, 0, 0, 5, 1, 1, 3]}


@pytest.mark.parametrize("half", [True, False])
def test_rows_are_grouped_by_article_and_ordered_by_position(tmp_path, half, monkeypatch):
    monkeypatch.setattr(S, "ROWS", 2)  # so that blocks end within articles
    given = np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32) * 3
    given[4] /= np.linalg.norm(given[4])
    path = put_vectors(tmp_path / "v.parquet", **SHUFFLED, vectors=given.tolist())
    vectors, chunks, texts, titles, sources, counts = grouped(path, tmp_path / "s", half)
    order = [2, 5, 0, 1, 4, 6, 3]  # by hand: article 7 (rows 2, 5, 0), 9 (1, 4), 8 (6, 3)
    assert vectors.dtype == (np.float16 if half else np.float32)
    unit = given / np.linalg.norm(given, axis=1, keepdims=True)
    assert np.allclose(vectors, unit[order], atol=1e-3 if half else 1e-6)
    assert chunks.dtype == np.int32
    assert chunks.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 3], [2, 5]]
    assert texts == [f"Text {row}." for row in order]
    assert titles == ["Title 7", "Title 9", "Title 8"] and sources == ["v.parquet"] * 3
    assert counts == {
        "columns": "vectors: emb, article: wiki_id, position: paragraph_id, text: text, title: title",
        "rows read": 7, "articles read": 3, "vectors that were not unit": 6, "chunks without text": 0,
        "gaps in positions": 1, "articles": 3, "chunks": 7,
    }  # fmt: skip


def test_what_is_grouped_is_a_store(tmp_path):
    import pandas as pd

    path = put_vectors(tmp_path / "v.parquet", **SHUFFLED)
    with V.writing(tmp_path / "store") as partial:
        titles, sources = R.group_rows(R.vector_rows(str(path)), partial)
        frame = pd.DataFrame({"title": titles, "split": ["train", "val", "ood"], "source": sources})
        V.seal(partial, "mine", frame, {})
    store = V.open_store(tmp_path / "store")
    assert store.vectors.shape == (7, 4) and next(iter(store.texts)) == "Text 2."


def test_without_positions_the_order_of_the_rows_is_taken_and_said(tmp_path):
    path = put_vectors(tmp_path / "v.parquet", article=["b", "a", "b", "a", "b"])
    _, chunks, texts, _, _, counts = grouped(path, tmp_path / "s")
    assert chunks.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    assert texts == ["Text 0.", "Text 2.", "Text 4.", "Text 1.", "Text 3."]
    assert "position: the order of the rows" in counts["columns"] and counts["gaps in positions"] == 0
    assert "ORDER IS PROBABLY LOST" in R.warn_of_order(counts) and "2 of 2 articles" in R.warn_of_order(counts)
    together = grouped(put_vectors(tmp_path / "w.parquet", article=["b", "b", "b", "a", "a"]), tmp_path / "t")[-1]
    assert R.warn_of_order(together).startswith("no column of positions") and R.warn_of_order({}) is None


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda number: pa.list_(number, 4)])
@pytest.mark.parametrize("number", [pa.float16(), pa.float32(), pa.float64()])
def test_the_kinds_of_vectors_that_parquet_has(tmp_path, kind, number):
    given = np.random.default_rng(2).normal(size=(6, 4)).astype(np.float16)
    vectors = [list(row) for row in given.astype(number.to_pandas_dtype())]
    (block,) = rows_of(put_vectors(tmp_path / "v.parquet", [1] * 6, range(6), vectors, kind(number)))
    assert block.vectors.dtype == np.float32 and np.array_equal(block.vectors, given.astype(np.float32))


def test_columns_are_named_or_guessed_by_what_they_hold(tmp_path):
    vector = pa.array([[1.0, 0.0]] * 2)
    path = tmp_path / "v.parquet"
    # `paragraph` holds text here, `embedding` a name: neither is what its name promises first
    pq.write_table(pa.table({"embedding": ["m", "m"], "vector": vector, "doc_id": ["x", "y"], "paragraph": ["p", "q"],
                             "index": [3, 4]}), path)  # fmt: skip
    counts = {}
    (block,) = rows_of(path, counts=counts)
    assert counts["columns"] == "vectors: vector, article: doc_id, position: index, text: paragraph, title: None"
    assert block.article == ["x", "y"] and block.position.tolist() == [3, 4] and block.texts == ["p", "q"]
    (block,) = rows_of(path, article="index", position="index", text="embedding")
    assert block.article == [3, 4] and block.texts == ["m", "m"] and block.titles is None
    refused(["no column 'indx'", "did you mean 'index'"], path, read=rows_of, position="indx")
    refused(["'embedding' holds string", "floating-point"], path, read=rows_of, vectors="embedding")
    refused(["'doc_id' holds string", "whole numbers"], path, read=rows_of, position="doc_id")
    refused(["'vector' holds list"], path, read=rows_of, text="vector")


def test_keys_that_a_gap_made_floating_point_are_whole_again(tmp_path):
    path = put_vectors(tmp_path / "v.parquet", [1.0, 1.0], [0.0, 1.0])
    (block,) = rows_of(path)
    assert block.article == [1, 1] and block.position.dtype == np.int64


def test_the_limit_counts_articles_and_ends_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(S, "ROWS", 3)
    path = put_vectors(tmp_path / "v.parquet", [1, 1, 2, 2, 3, 3, 1], range(7))
    counts = {}
    found = rows_of(path, limit=2, counts=counts)
    assert [key for block in found for key in block.article] == [1, 1, 2, 2]
    assert counts["articles read"] == 2 and counts["rows read"] == 4


def test_several_files_are_one_source(tmp_path):
    put_vectors(tmp_path / "d" / "0.parquet", [1, 2], [0, 0])
    put_vectors(tmp_path / "d" / "1.parquet", [2, 3], [1, 0])
    _, chunks, _, titles, sources, _ = grouped(tmp_path / "d", tmp_path / "s")
    assert chunks.tolist() == [[0, 0], [1, 0], [1, 1], [2, 0]]
    assert sources == ["0.parquet", "0.parquet", "1.parquet"] and len(titles) == 3
    put_vectors(tmp_path / "d" / "2.parquet", [4], vectors=[[1.0, 0, 0, 0]])
    refused(["2.parquet", "no column 'paragraph_id'"], tmp_path / "d", read=rows_of)
    put_vectors(tmp_path / "d" / "2.parquet", [4], [0], vectors=[[1.0, 0, 0]])
    refused(["2.parquet", "row 1", "has 3 numbers, those before it 4"], tmp_path / "d", read=rows_of)


def test_titles_of_articles_are_filled_in_and_made_unique(tmp_path):
    path = put_vectors(tmp_path / "v.parquet", [1, 2, 3, 4], [0] * 4, title=["Same", "Same", None, "x\ny"])
    assert grouped(path, tmp_path / "s")[3] == ["Same", "Same (2)", "3", "x y"]
    path = put_vectors(tmp_path / "w.parquet", ["k", "l"], [0, 0], title=None, text=[None, "t"])
    *_, texts, titles, _, counts = grouped(path, tmp_path / "t")
    assert titles == ["k", "l"] and texts == ["", "t"] and counts["chunks without text"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vectors": [[1.0, 2.0]] * 4 + [[1.0]]}, ["row 5", "has 1 numbers, those before it 2"]),
        ({"vectors": [[1.0, 2.0]] * 4 + [None]}, ["row 5", "is null"]),
        ({"vectors": [None] * 5}, ["row 1", "is null"]),
        ({"vectors": [[]] * 5}, ["row 1", "is empty"]),
        ({"vectors": [[1.0, 2.0]] * 3 + [[1.0, None]] * 2}, ["row 4", "has a null in it"]),
        ({"vectors": [[1.0, 2.0]] * 4 + [[float("nan"), 1.0]]}, ["row 5", "NaN or infinite"]),
        ({"vectors": [[1e300, 1.0]] * 5, "kind": pa.list_(pa.float64())}, ["row 1", "NaN or infinite"]),
        ({"vectors": [[1.0, 2.0]] * 4 + [None], "kind": pa.list_(pa.float32(), 2)}, ["row 5", "is null"]),
        (
            {"vectors": [[1, 2]] * 5, "kind": pa.list_(pa.int8())},
            ["'emb' holds list", "int8", "not lists of floating-point"],
        ),
        ({"vectors": ["x"] * 5, "kind": pa.string()}, ["'emb' holds string", "name another"]),
        ({"article": [1, 2, None, 4, 5]}, ["row 3", "its article is"]),
        ({"article": [1.0, 1.5, 2.0, 3.0, 4.0]}, ["row 2", "its article is 1.5"]),
        ({"position": [0, 1, 2, 3, None]}, ["row 5", "its place in the article is"]),
        ({"position": [0, 1, -2, 3, 4]}, ["row 3", "-2"]),
        ({"position": [0, 1, 2, 3, 2**31]}, ["row 5", "2147483648"]),
        ({"position": [0.0, 0.5, 2, 3, 4]}, ["row 2", "0.5"]),
    ],
)
def test_hostile_vectors_are_refused_with_their_row(tmp_path, change, words, monkeypatch):
    monkeypatch.setattr(S, "ROWS", 2)  # the rows are counted over blocks
    path = put_vectors(tmp_path / "v.parquet", **{"article": [1, 1, 2, 2, 3], "position": [0, 1, 0, 1, 0], **change})
    assert "v.parquet" in refused(words, path, read=rows_of)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position": [0, 0]}, ["article Title 5", "position 0 is there twice"]),
        ({"vectors": [[1.0, 0.0], [0.0, 0.0]]}, ["article Title 5", "position 1", "is zero"]),
        ({"vectors": [[1.0, 0.0], [1e-40, 0.0]]}, ["is zero"]),
    ],
)
def test_hostile_rows_are_refused_with_article_and_position(tmp_path, change, words):
    path = put_vectors(tmp_path / "v.parquet", **{"article": [5, 5], "position": [0, 1], **change})
    refused(words, path, read=lambda source: grouped(source, tmp_path / "s"))
    assert not list((tmp_path / "s").glob("*.part"))


def test_blocks_that_do_not_agree_or_are_not_there_are_refused(tmp_path):
    unit = np.ones((1, 4), np.float32)
    blocks = [R.VectorRows([1], np.array([0]), unit, None, None, "a"), R.VectorRows([1], None, unit, None, None, "b")]
    with pytest.raises(LVMError, match=r"b: has .*build them apart"):
        R.group_rows(iter(blocks), tmp_path)
    with pytest.raises(LVMError, match="NaN or infinite"):
        R.group_rows([R.VectorRows([1], None, unit * np.nan, None, None)], tmp_path)
    with pytest.raises(LVMError, match="no row of vectors"):
        R.group_rows(iter([]), tmp_path)
    with pytest.raises(LVMError, match="cannot be written"):
        R.group_rows(iter(blocks), tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_ready_vectors_come_from_tables_only(tmp_path):
    put(tmp_path / "a.txt")
    refused("ready vectors come from", tmp_path, read=rows_of)
    refused("ready vectors come from", "wikipedia", read=rows_of)
    pq.write_table(pa.table({"emb": pa.array([], pa.list_(pa.float32())), "wiki_id": pa.array([], pa.int64())}),
                   tmp_path / "e.parquet")  # fmt: skip
    refused("holds no row", tmp_path / "e.parquet", read=rows_of)


def test_a_dataset_without_vectors_says_what_columns_it_has(hub):
    hub(Stream([{"id": "1_0", "text": "a"}]))
    refused(["no column of vectors", "id (string), text (string)"], "hub:a/b", read=rows_of)
    refused(["npy files", "article, position and emb"], "hub:olmer/wiki_mpnet_embeddings", read=rows_of)
    hub(Stream([{"wiki_id": 1, "emb": [1.0, 0.0]}] * 3))
    (block,) = rows_of("hub:a/b")
    assert block.vectors.shape == (3, 2) and block.position is None


def test_damaged_vectors_give_only_clear_errors(tmp_path):
    whole = put_vectors(tmp_path / "v.parquet", **SHUFFLED).read_bytes()
    path, errors = tmp_path / "d.parquet", 0
    for at in range(0, len(whole), 11):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            grouped(path, tmp_path / "s")
        except LVMError as e:
            errors += 1
            assert len(str(e)) < 1500
    assert errors > 50


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(S, "ROWS", 64)

    def peak(blocks):
        def stream():
            rng = np.random.default_rng(0)
            for b in range(blocks):
                vectors = rng.normal(size=(64, 256)).astype(np.float32)
                yield R.VectorRows([b % 7] * 64, np.arange(64) + 64 * (blocks - b), vectors, ["text"] * 64, None)

        tracemalloc.start()
        R.group_rows(stream(), tmp_path)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    few, many = peak(20), peak(200)
    assert many - few < 0.1 * 180 * 64 * 256 * 2, "what grows is the table of rows, not the vectors"


# --------------------------------------------------------------------------------------------------------------- titles


def test_the_share_of_chunks_that_name_their_article():
    titles = ["Berlin", "Berlin", "Art", "", "C++"]
    texts = ["Berlin is a city.", "The city.\nBerlin again.", "Party of artists.", "x", "In C++ one writes."]
    assert R.title_in_text(titles, texts) == pytest.approx(2 / 5)
    assert R.title_in_text([], []) == 0


@pytest.mark.parametrize(
    ("source", "warned"),
    [
        ("hub:Cohere/wikipedia-22-12-en-embeddings", True),
        ("hub:Cohere/wikipedia-22-12-simple-embeddings@abc", True),
        ("downloads/Cohere___wikipedia-22-12-en-embeddings", True),
        ("hub:somebody/wikipedia-22-12-en-embeddings-all-MiniLM-L6-v2", False),
        ("hub:olmer/wiki_mpnet_embeddings", True),
        ("hub:wikimedia/wikipedia", False),
        ("texts/berlin", False),
    ],
)
def test_datasets_known_to_embed_titles_are_warned_of(source, warned):
    sentence = R.warn_of_titles(source, ["Berlin", "Berlin"], ["The city.", "It has a wall."])
    assert bool(sentence) == warned
    if warned:
        assert source in sentence and "the card of" in sentence and sentence.endswith(".")


def test_other_vectors_are_warned_of_by_their_text():
    titles = ["Berlin"] * 4
    texts = ["Berlin: the city.", "Berlin: history.", "Berlin: its people.", "Elsewhere."]
    assert "75% of the chunks" in R.warn_of_titles("mine.parquet", titles, texts)
    assert R.warn_of_titles("mine.parquet", titles, texts[3:] * 4) is None
    assert R.warn_of_titles("mine.parquet") is None


def test_the_extra_is_named_where_a_package_is_missing():
    with pytest.raises(LVMError, match=r'no_such_package is missing; run: pip install -e "\.\[encode\]"'):
        S.extra("no_such_package")
