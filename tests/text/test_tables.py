"""Ready vectors: read from tables of every kind, grouped and ordered by hand, and hostile tables."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from test_sources import HOW, put, read, refused

from lvmlib.errors import LVMError
from lvmlib.text import tables as R
from lvmlib.text.stage import read_tables

pa = pytest.importorskip("pyarrow", reason=HOW)
pq = pytest.importorskip("pyarrow.parquet", reason=HOW)


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


def grouped(source, folder, **options):
    folder.mkdir()
    counts = Counter()
    R.group_rows(R.vector_rows(str(source), counts=counts, **options), folder, counts)
    made = read_tables(folder)
    assert not list(folder.glob("*.part")) and made.counts == counts
    texts = None if made.texts is None else list(made.texts)
    return np.load(folder / "vectors.npy"), made.chunks, texts, made.titles, made.sources, counts


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


SHUFFLED = {"article": [7, 9, 7, 8, 9, 7, 8], "position": [2, 0, 0, 5, 1, 1, 3]}


def test_rows_are_grouped_by_article_and_ordered_by_position(tmp_path, monkeypatch):
    monkeypatch.setattr(R, "ROWS", 2)  # so that blocks end within articles
    given = np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32) * 3
    given[4] /= np.linalg.norm(given[4])
    path = put_vectors(tmp_path / "v.parquet", **SHUFFLED, vectors=given.tolist())
    vectors, chunks, texts, titles, sources, counts = grouped(path, tmp_path / "s")
    order = [2, 5, 0, 1, 4, 6, 3]  # by hand: article 7 (rows 2, 5, 0), 9 (1, 4), 8 (6, 3)
    assert vectors.dtype == np.float16
    unit = given / np.linalg.norm(given, axis=1, keepdims=True)
    assert np.allclose(vectors, unit[order], atol=1e-3)
    assert chunks.dtype == np.int32
    assert chunks.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 3], [2, 5]]
    assert texts == [f"Text {row}." for row in order]
    assert titles == ["Title 7", "Title 9", "Title 8"] and sources == ["v.parquet"] * 3
    assert counts == {
        "columns": "vectors: emb, article: wiki_id, position: paragraph_id, text: text, title: title",
        "rows read": 7, "articles read": 3, "vectors that were not unit": 6, "chunks without text": 0,
        "gaps in positions": 1, "articles": 3, "chunks": 7,
    }  # fmt: skip


def test_without_positions_the_order_of_the_rows_is_taken_and_said(tmp_path):
    path = put_vectors(tmp_path / "v.parquet", article=["b", "a", "b", "a", "b"])
    _, chunks, texts, _, _, counts = grouped(path, tmp_path / "s")
    assert chunks.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    assert texts == ["Text 0.", "Text 2.", "Text 4.", "Text 1.", "Text 3."]
    assert "position: the order of the rows" in counts["columns"] and counts["gaps in positions"] == 0
    assert "2 of 2 articles" in R.warn_of_order(counts)
    together = grouped(put_vectors(tmp_path / "w.parquet", article=["b", "b", "b", "a", "a"]), tmp_path / "t")[-1]
    assert "no column of positions" in R.warn_of_order(together) and R.warn_of_order(Counter()) is None


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
    counts = Counter()
    (block,) = rows_of(path, counts=counts)
    assert counts["columns"] == "vectors: vector, article: doc_id, position: index, text: paragraph, title: None"
    assert block.article == ["x", "y"] and block.position.tolist() == [3, 4] and block.texts == ["p", "q"]
    (block,) = rows_of(path, article="index", position="index", text="embedding")
    assert block.article == [3, 4] and block.texts == ["m", "m"] and block.titles is None
    (block,) = rows_of(put_vectors(tmp_path / "w.parquet", [1.0, 1.0], [0.0, 1.0]))  # as a gap makes whole numbers
    assert block.article == [1, 1] and block.position.dtype == np.int64
    refused(["no column 'indx'", "did you mean 'index'"], path, read=rows_of, position="indx")
    refused(["'embedding' holds string", "floating-point"], path, read=rows_of, vectors="embedding")
    refused(["'doc_id' holds string", "whole numbers"], path, read=rows_of, position="doc_id")
    refused(["'vector' holds list"], path, read=rows_of, text="vector")


def test_the_limit_counts_articles_and_ends_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(R, "ROWS", 3)
    path = put_vectors(tmp_path / "v.parquet", [1, 1, 2, 2, 3, 3, 1], range(7))
    counts = Counter()
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
    refused(["2.parquet", "row 1", "3 numbers"], tmp_path / "d", read=rows_of)


def test_titles_of_articles_are_filled_in_and_made_unique(tmp_path):
    path = put_vectors(tmp_path / "v.parquet", [1, 2, 3, 4], [0] * 4, title=["Same", "Same", None, "x\ny"])
    assert grouped(path, tmp_path / "s")[3] == ["Same", "Same (2)", "3", "x y"]
    path = put_vectors(tmp_path / "w.parquet", ["k", "l"], [0, 0], title=None, text=[None, "t"])
    *_, texts, titles, _, counts = grouped(path, tmp_path / "t")
    assert titles == ["k", "l"] and texts == ["", "t"] and counts["chunks without text"] == 1


HOSTILE = [
    ({"vectors": [[1.0, 2.0]] * 4 + [[1.0]]}, ["row 5", "1 numbers"]),
    ({"vectors": [[1.0, 2.0]] * 4 + [None]}, ["row 5", "0 numbers"]),
    ({"vectors": [None] * 5}, ["row 1", "0 numbers"]),
    ({"vectors": [[]] * 5}, ["row 1", "0 numbers"]),
    ({"vectors": [[1.0, 2.0]] * 3 + [[1.0, None]] * 2}, ["row 4", "null"]),
    ({"vectors": [[1.0, 2.0]] * 4 + [[float("nan"), 1.0]]}, ["row 5", "NaN"]),
    ({"vectors": [[1e300, 1.0]] * 5, "kind": pa.list_(pa.float64())}, ["row 1", "NaN"]),
    ({"vectors": [[1.0, 2.0]] * 4 + [None], "kind": pa.list_(pa.float32(), 2)}, ["row 5", "0 numbers"]),
    ({"vectors": [[1, 2]] * 5, "kind": pa.list_(pa.int8())}, ["no column of vectors", "emb (list", "int8"]),
    ({"vectors": ["x"] * 5, "kind": pa.string()}, ["no column of vectors", "emb (string)"]),
    ({"article": [1, 2, None, 4, 5]}, ["row 3", "its article is"]),
    ({"article": [1.0, 1.5, 2.0, 3.0, 4.0]}, ["row 2", "its article is 1.5"]),
    ({"position": [0, 1, 2, 3, None]}, ["row 5", "position"]),
    ({"position": [0, 1, -2, 3, 4]}, ["row 3", "-2"]),
    ({"position": [0, 1, 2, 3, 2**31]}, ["row 5", "2147483648"]),
    ({"position": [0.0, 0.5, 2, 3, 4]}, ["row 2", "0.5"]),
    ({"position": [0, 1, 7, 7, 0]}, ["article Title 2", "position 7 is there twice"]),
    ({"vectors": [[1.0, 0.0]] * 3 + [[0.0, 0.0]] * 2}, ["article 2", "position 1", "is zero"]),
    ({"vectors": [[1.0, 0.0]] * 4 + [[1e-40, 0.0]]}, ["article 3", "is zero"]),
]


@pytest.mark.parametrize(("change", "words"), HOSTILE)
def test_hostile_vectors_are_refused_with_their_row_or_article(tmp_path, change, words, monkeypatch):
    monkeypatch.setattr(R, "ROWS", 2)  # the rows are counted over blocks
    path = put_vectors(tmp_path / "v.parquet", **{"article": [1, 1, 2, 2, 3], "position": [0, 1, 0, 1, 0], **change})
    refused(words, path, read=lambda source: grouped(source, tmp_path / "s"))
    assert not (tmp_path / "s" / "chunked.json").exists()


def test_what_holds_no_ready_vectors_is_refused(tmp_path, hub):
    datasets = pytest.importorskip("datasets", reason=HOW)
    put(tmp_path / "a.txt")
    refused("ready vectors come from", tmp_path, read=rows_of)
    refused("ready vectors come from", "wikipedia", read=rows_of)
    for limit in (0, -1, 1.5, "3", True):
        refused("limit", tmp_path, read=rows_of, limit=limit)
    with pytest.raises(TypeError, match="titel"):
        rows_of(tmp_path, titel="x")
    pq.write_table(pa.table({"emb": pa.array([], pa.list_(pa.float32())), "wiki_id": pa.array([], pa.int64())}),
                   tmp_path / "e.parquet")  # fmt: skip
    refused("holds no row", tmp_path / "e.parquet", read=rows_of)
    hub(datasets.Dataset.from_list([{"id": "1_0", "text": "a"}]).to_iterable_dataset())
    refused(["no column of vectors", "id (string), text (string)"], "hub:a/b", read=rows_of)


def test_damaged_parquet_gives_only_clear_errors(tmp_path):
    """A byte in 17 of a file turned over, one at a time: rows, articles or LVMError, nothing else."""
    intact = put_vectors(tmp_path / "v.parquet", **SHUFFLED).read_bytes()
    path, errors = tmp_path / "d.parquet", Counter()
    for at in range(0, len(intact), 17):
        path.write_bytes(intact[:at] + bytes([intact[at] ^ 0xFF]) + intact[at + 1 :])
        for call in (read, lambda source, at=at: grouped(source, tmp_path / str(at))):
            try:
                call(path)
            except LVMError as e:
                errors[call is read] += 1
                assert len(str(e)) < 1500 and ("d.parquet" in str(e) or "article" in str(e))
    assert errors[True] > 25 and errors[False] > 25


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(R, "ROWS", 64)

    def peak(blocks):
        def stream():
            rng = np.random.default_rng(0)
            for b in range(blocks):
                vectors = rng.normal(size=(64, 256)).astype(np.float32)
                yield R.VectorRows([b % 7] * 64, np.arange(64) + 64 * (blocks - b), vectors, ["text"] * 64, None)

        tracemalloc.start()
        R.group_rows(stream(), tmp_path, Counter())
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    few, many = peak(20), peak(200)
    assert many - few < 0.2 * 180 * 64 * 256 * 2, "what grows is the table of rows, not the vectors"


# --------------------------------------------------------------------------------------------------------------- titles


@pytest.mark.parametrize(
    ("source", "warned"),
    [
        ("hub:Cohere/wikipedia-22-12-simple-embeddings@abc", True),
        ("downloads/Cohere___wikipedia-22-12-en-embeddings", True),
        ("hub:somebody/wikipedia-22-12-en-embeddings-all-MiniLM-L6-v2", False),
        ("hub:olmer/wiki_mpnet_embeddings", True),
        ("hub:wikimedia/wikipedia", False),
    ],
)
def test_datasets_known_to_embed_titles_are_warned_of(source, warned):
    sentence = R.warn_of_titles(source, ["Berlin", "Berlin"], ["The city.", "It has a wall."])
    assert bool(sentence) == warned
    if warned:
        assert source in sentence and "the card of" in sentence


def test_other_vectors_are_warned_of_by_their_text():
    titles = ["Berlin", "Berlin", "Art", "C++"]
    texts = ["Berlin is a city.", "The city.\nBerlin again.", "Party of artists.", "In C++ one writes."]
    assert "50% of the chunks" in R.warn_of_titles("mine.parquet", titles, texts)
    assert R.warn_of_titles("mine.parquet", titles[1:], texts[1:]) is None
    assert R.warn_of_titles("mine.parquet", ["", "x"], ["a", "x."]) is not None
    assert R.warn_of_titles("mine.parquet") is None
