"""Sources: small real files of every kind, the loaders' fakes where a network would be, and hostile input."""

import gzip
import json
import os
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from lvmlib.errors import LVMError
from lvmlib.text import chunking, readers
from lvmlib.text import sources as S

HOW = 'needs the extra "encode": pip install -e ".[encode]"'
pa = pytest.importorskip("pyarrow", reason=HOW)
pq = pytest.importorskip("pyarrow.parquet", reason=HOW)


def read(source, **options):
    return [(d.title, d.text, d.source) for d in S.documents(str(source), **options)]


def refused(words, source, *, read=read, **options):
    """The error of reading a source; its message must hold `words` and be short."""
    with pytest.raises(LVMError) as e:
        read(source, **options)
    message = str(e.value)
    assert all(word in message for word in ([words] if isinstance(words, str) else words)), message
    assert len(message) < 1500
    return message


def put(path: Path, content="Text."):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# -------------------------------------------------------------------------------------------------- folders of text


def test_a_folder_of_text_files_in_order_of_their_paths(tmp_path):
    put(tmp_path / "b.txt", "\ufeffB with a mark.\r\nTwo.")
    put(tmp_path / "a.txt", "A")
    for name, content in (("c.txt", ""), ("d.txt", " \n\t\n"), ("e.txt", "\ufeff"), ("f.md", "# Only a heading\n")):
        put(tmp_path / name, content)
    put(tmp_path / "a.MD", "# Heading\n\nProse.")
    put(tmp_path / "news" / "deep" / "z.txt", "Z")
    put(tmp_path / "news.txt", "N")
    put(tmp_path / "picture.png", b"\x89PNG\0")
    put(tmp_path / ".hidden.txt", b"\xff\xff")
    put(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.txt", "A")
    counts = Counter()
    assert read(tmp_path, counts=counts) == [
        ("a", "Prose.", tmp_path.name),
        ("a (2)", "A", tmp_path.name),
        ("b", "B with a mark.\r\nTwo.", tmp_path.name),
        ("news/deep/z", "Z", "news"),
        ("news", "N", tmp_path.name),
    ]
    assert counts == {
        "files of other kinds, passed over": 1,
        "repeated titles, numbered": 1,
        "articles read": 5,
        "empty files": 3,
        "documents without text": 1,
    }
    assert [d[0] for d in read(tmp_path, limit=2)] == ["a", "a (2)"]


def test_all_unreadable_files_are_named_at_once(tmp_path):
    for number in range(14):
        put(tmp_path / f"{number:02d}.txt", b"caf\xe9" if number else "Text.")
    refused(["13 of 14 files", "01.txt, 02.txt", "10.txt and 3 more", "byte 3 is 0xe9"], tmp_path)
    assert len(read(tmp_path, limit=1)) == 1


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


# ----------------------------------------------------------------------------------------------- JSON Lines, Parquet


ROWS = [
    {"title": "One", "text": "First text.", "id": 1},
    {"title": "One", "text": "Second\n\ntext.", "id": 2},
    {"title": None, "text": "Third.", "id": 3},
    {"text": " ", "title": "empty", "id": 4},
    {"text": None, "title": "null", "id": 5},
    {"title": "One (2)", "text": "Fourth.", "id": 6},
]
TITLES = ["One", "One (2)", "document 3", "One (2) (2)"]
TEXTS = ["First text.", "Second\n\ntext.", "Third.", "Fourth."]


def put_table(path: Path, kind: str, rows=ROWS):
    if kind == "parquet":
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        return path
    content = "\n".join(json.dumps(row) for row in rows).encode() + b"\r\n\n"
    return put(path, gzip.compress(content) if kind.endswith("gz") else content)


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "jsonl.gz", "parquet"])
def test_tables_give_an_article_a_row(tmp_path, kind):
    path, counts = put_table(tmp_path / f"t.{kind}", kind), Counter()
    assert read(path, counts=counts) == [(*row, path.name) for row in zip(TITLES, TEXTS, strict=True)]
    assert counts == {
        "repeated titles, numbered": 2,
        "documents without a title": 1,
        "documents without text": 2,
        "articles read": 4,
    }
    assert read(path, limit=1) == [("One", "First text.", path.name)]
    assert [t for t, _, _ in read(path, title="id")] == ["1", "2", "3", "6"]
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
    pq.write_table(pa.table({"text": pa.array(["a", "b"]).cast(kind)}), tmp_path / "t.parquet")
    assert [text for _, text, _ in read(tmp_path / "t.parquet")] == ["a", "b"]


def test_long_lines_are_read(tmp_path):
    long = "word " * 2_000_000
    found = read(put_table(tmp_path / "t.jsonl", "jsonl", [{"text": long, "title": "t" * 5000}, {"text": "short"}]))
    assert found[0][1] == long and len(found[0][0]) == S.TITLE_LENGTH and found[1][1] == "short"


def test_a_line_or_file_larger_than_any_article_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST", 1000)
    bomb = put(tmp_path / "bomb.jsonl.gz", gzip.compress(b'{"text": "' + b" " * 50_000_000))
    tracemalloc.start()
    refused(["line 1", "1,000 bytes"], bomb)
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
    "non-UTF-8.txt": ("caf\xe9 and more".encode("latin-1"), ["byte 3 is 0xe9"]),
    "utf-16.txt": ("Text.".encode("utf-16"), ["byte 0 is 0xff", "iconv"]),
    "utf-32.txt": ("Text.".encode("utf-32"), ["byte 0 is 0xff"]),
    "utf-16-without-mark.txt": ("Text.".encode("utf-16-le"), ["binary file, or UTF-16"]),
    "nul.txt": (b"Text.\0More.", ["binary file"]),
    "zip.txt": (b"PK\x03\x04" + bytes(range(256)), ["no UTF-8"]),
    "control.txt": (b"\x01\x02\x03\x04\x05\x06" * 9, ["54 control characters"]),
    "cut-character.md": ("ends in the middle of é".encode()[:-1], ["no UTF-8"]),
    "surrogate.txt": (b"\xed\xa0\x80", ["no UTF-8"]),
    "broken.jsonl": (b'{"text": "a"}\n{"text": "b"\n', ["line 2"]),
    "list.jsonl": (b'{"text": "a"}\n\n["text"]\n', ["line 3", "list"]),
    "number.jsonl": (b"12\n", ["line 1", "int"]),
    "null-text.jsonl": (b'{"text": null}\n', ["no article"]),
    "number-text.jsonl": (b'{"text": 12}\n', ["line 1", "'text' holds int"]),
    "object-text.jsonl": (b'{"text": {"a": 1}}\n', ["'text' holds dict"]),
    "no-column.jsonl": (b'{"texts": "a", "id": 1}\n', ["line 1", "no column 'text'", "did you mean 'texts'"]),
    "empty-object.jsonl": (b"{}\n", ["no column 'text'", "none"]),
    "deep.jsonl": (b'{"text": ' + b"[" * 200_000 + b"\n", ["line 1", "RecursionError"]),
    "digits.jsonl": (b'{"text": ' + b"9" * 6000 + b"}\n", ["line 1"]),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', ["line 1", "no UTF-8"]),
    "utf-16.jsonl": ('{"text": "a"}'.encode("utf-16"), ["line 1"]),
    "binary.jsonl": (bytes(range(256)) * 4, ["line 1"]),
    "blank.jsonl": (b"\n \r\n\n", ["no article"]),
    "empty.jsonl": (b"", ["no article"]),
    "not-gzip.jsonl.gz": (b'{"text": "a"}\n', ["damaged"]),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 5000)[:-30], ["damaged"]),
    "text.parquet": (b"This is no Parquet file at all.", ["Parquet", "damaged"]),
    "empty.parquet": (b"", ["Parquet", "damaged"]),
    "magic.parquet": (b"PAR1" + b"\xff" * 64 + b"PAR1", ["Parquet", "damaged"]),
    "table.csv": (b"a,b\n", ["suffix", "a source is a folder"]),
    "single.txt": (b"Text.", ["name its folder"]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_gives_one_clear_error(tmp_path, name):
    content, words = HOSTILE[name]
    in_folder = name.endswith((".txt", ".md")) and name != "single.txt"
    path = put(tmp_path / ("f" if in_folder else "") / name, content)
    assert name in refused(words, path.parent if in_folder else path)


def test_lone_surrogates_are_read_and_cleaned_when_the_text_is_cut(tmp_path):
    path = put(tmp_path / "t.jsonl", b'{"text": "A \\ud800 lone one. ' + b"x" * 80 + b'", "title": "\\udfff"}\n')
    (document,) = S.documents(str(path))
    assert document.title == "document 1"
    (chunk,) = chunking.chunks(document.text)
    assert chunk.encode().startswith(b"A lone one. x")


NO_SOURCES = {
    "": "no source", None: "None is no source", "a\0b": "no such folder", "x" * 5000: "no such folder",
    "hub:": "hub:OWNER/NAME", "hub:../../etc": "hub:OWNER/NAME", "hub:a/b/c": "hub:OWNER/NAME",
    "nltk:browm": "did you mean 'brown'", "nltk:": "nltk:abc", "wikipedia:en": "hub:wikimedia/wikipedia",
}  # fmt: skip
NO_FOLDERS = {
    (): "holds no .txt", (".hidden.txt",): "holds no .txt", ("x.jsonl",): "x.jsonl",
    ("a.txt", "b.parquet"): "a.txt, b.parquet", ("empty.md",): "no article",
}  # fmt: skip


@pytest.mark.parametrize("source", NO_SOURCES)
def test_a_source_that_is_none_gets_an_error_with_advice(source):
    with pytest.raises(LVMError, match=NO_SOURCES[source]):
        list(S.documents(source))


@pytest.mark.parametrize("names", NO_FOLDERS)
def test_a_folder_that_is_no_source(tmp_path, names):
    for name in names:
        put(tmp_path / name, "" if name == "empty.md" else "Text.")
    refused(NO_FOLDERS[names], tmp_path)


def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch):
    put(tmp_path / "a.txt")
    monkeypatch.setattr(Path, "read_bytes", lambda p: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    refused(["a.txt", "Permission denied"], tmp_path)
    monkeypatch.setattr(os, "scandir", lambda p: (_ for _ in ()).throw(PermissionError(13, "Permission denied", p)))
    refused([str(tmp_path), "Permission denied"], tmp_path)


# ----------------------------------------------------------------------------------------------------------------- hub


class Stream:
    """What load_dataset gives: rows on demand; counts how many were drawn."""

    def __init__(self, rows, fail_at=None):
        self.rows, self.drawn, self.fail_at = rows, 0, fail_at

    def __iter__(self):
        for row in self.rows:
            if self.drawn == self.fail_at:
                raise ConnectionError("the line went dead")
            self.drawn += 1
            yield row


def test_a_hub_dataset_is_streamed_by_name(hub):
    stream = Stream({"id": i, "title": f"Article {i}", "text": "" if i == 1 else f"Text {i}."} for i in range(10**9))
    called = hub(stream)
    counts = Counter()
    found = read("hub:wikimedia/wikipedia", config="20231101.en", limit=3, counts=counts)
    assert found == [(f"Article {i}", f"Text {i}.", "wikimedia/wikipedia") for i in (0, 2, 3)]
    assert called[-1] == (("wikimedia/wikipedia", "20231101.en"), {"split": "train", "streaming": True})
    assert stream.drawn == 4, "the limit ends the stream"
    assert counts == {"documents without text": 1, "articles read": 3}
    called = hub(Stream([{"text": "a"}]))
    assert read("hub:a/b@main-1", subset="validation") == [("document 1", "a", "a/b")]
    assert called[-1] == (("a/b", None), {"split": "validation", "streaming": True, "revision": "main-1"})


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (FileNotFoundError("Couldn't find any data file"), ["FileNotFoundError"]),
        (ValueError("BuilderConfig 'x' not found. Available: ['en']"), ["Available: ['en']"]),
        (ConnectionError(""), ["ConnectionError", "network"]),
        (Stream([{"text": "a"}] * 9, fail_at=5), ["line went dead", "network"]),
        (Stream([{"body": "a"}]), ["row 1", "no column 'text'", "body"]),
        (Stream([{"text": "a"}, {"text": 5}]), ["row 2", "int"]),
        (Stream([]), ["no article"]),
    ],
)
def test_trouble_with_the_hub_gets_an_error_with_advice(hub, stream, words):
    hub(stream)
    refused(["a/b", *words], "hub:a/b")


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
    counts = Counter()
    assert read(f"nltk:{name}", counts=counts) == CORPORA[name]
    assert read(f"nltk:{name}", limit=1) == CORPORA[name][:1]
    assert counts.pop("articles read") == len(CORPORA[name])
    assert counts == {"brown": {"headings": 1}, "abc": {"news items of a single line": 1}}.get(name, {})
    assert len(S.fingerprint(f"nltk:{name}")) == 64


def test_a_missing_or_damaged_corpus_comes_with_its_command(nltk_data, monkeypatch):
    put(nltk_data / "brown" / "ca01", b"\xff\xfe\0")
    refused("nltk.downloader --force brown", "nltk:brown")
    (nltk_data / "brown" / "cats.txt").unlink()
    refused("nltk.downloader --force brown", "nltk:brown")
    monkeypatch.setattr("nltk.data.path", [str(nltk_data / "nowhere")])
    refused("nltk.downloader abc", "nltk:abc")
    refused("nltk.downloader abc", "nltk:abc", read=S.fingerprint)


# ------------------------------------------------------------------------------------------------ slice, fingerprint


def test_a_fingerprint_changes_with_the_files(tmp_path):
    folder = tmp_path / "f"
    put(folder / "a.txt", "one")
    put(folder / "b.txt", "two")
    seen = [S.fingerprint(str(folder)), S.fingerprint(str(folder))]
    for change in (
        lambda: put(folder / "a.txt", "longer"),
        lambda: os.utime(folder / "a.txt", ns=(1, 1)),
        lambda: (folder / "b.txt").rename(folder / "c.txt"),
        lambda: put(folder / "d.txt", "new"),
        lambda: put(folder / "e.png", "not read"),
    ):
        change()
        seen.append(S.fingerprint(str(folder)))
    assert seen[0] == seen[1] and seen[-1] == seen[-2] and len(set(seen)) == 5
    assert S.fingerprint(str(folder.rename(tmp_path / "g"))) == seen[-1], "a folder may be moved"


def test_a_fingerprint_depends_on_name_config_and_subset(tmp_path):
    put(tmp_path / "a.txt")
    made = [S.fingerprint(place) for place in (str(tmp_path), "hub:a/b", "hub:a/b@1", "hub:a/c", "wikipedia")]
    made += [S.fingerprint("hub:a/b", config="x"), S.fingerprint("hub:a/b", subset="x")]
    assert len(set(made)) == len(made)
