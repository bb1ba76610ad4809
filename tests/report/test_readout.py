"""The text readout against plain loops over single chunks, and on texts that mean harm."""

import importlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch

from lvmlib import models
from lvmlib.baselines import Constant, Linear, untrained
from lvmlib.data.open import EMBEDDED
from lvmlib.data.store import make_store, open_store
from lvmlib.errors import LVMError
from lvmlib.report import readout as R
from lvmlib.windows import windows

measure = importlib.import_module("lvmlib.judge.fivecat").measure  # the package's attribute `fivecat` is the function
T = 5
LENGTHS = {0: ("val", 12), 3: ("train", 9), 4: ("val", 15), 8: ("val", 7), 9: ("ood", 11)}


@pytest.fixture(scope="module")
def store():
    """Three validation articles among others, numbers with holes; article 4 has a gap before its 11th chunk."""
    rng = np.random.default_rng(0)
    article = np.repeat(list(LENGTHS), [n for _, n in LENGTHS.values()])
    position = np.concatenate([np.arange(n) + 3 * ((a == 4) & (np.arange(n) >= 10)) for a, (_, n) in LENGTHS.items()])
    vectors = rng.standard_normal((len(article), 8)) + 0.5
    vectors[:12] += rng.standard_normal(8)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    titles, splits = ["Alpha", "Beta", "", "Delta", "Epsilon"], [s for s, _ in LENGTHS.values()]
    articles = pd.DataFrame({"title": titles, "split": splits}, index=pd.Index(list(LENGTHS), name="article"))
    return make_store("small", vectors.astype(np.float32), article, position, articles)


@pytest.fixture(scope="module")
def texts(store):
    return [f"text of row {row}" for row in range(len(store.vectors))]


@pytest.fixture(scope="module", params=["forward", "backward"])
def val(request, store):
    return windows(store, "val", direction=request.param)


@pytest.fixture
def model(store):
    torch.manual_seed(0)
    return Linear(store.dim, torch.randn(T * store.dim, store.dim))


def predicted(model, chunks):
    """One window's unit prediction (D,), in float64."""
    vector = model(torch.tensor(np.stack(chunks), dtype=torch.float32)[None])[0][0].double().numpy()
    return vector / np.linalg.norm(vector)


def ranked(vector, rows, store):
    """[(cosine, row)] from the nearest on."""
    x = store.vectors.astype(float)
    return sorted(((float(vector @ x[r]) / np.linalg.norm(x[r]), r) for r in rows), reverse=True)


# Neighbours


@pytest.mark.parametrize("k", [4, 99])  # 99: all candidates
def test_nearest_texts_are_those_of_a_plain_loop(store, val, texts, model, k):
    found = R.nearest(model, val, np.arange(len(val)), texts, k)
    assert found["window"].unique().tolist() == list(range(len(val)))
    for window, part in found.groupby("window"):
        start = int(val.start[window])
        context = [start + val.step * i for i in range(T)]
        target = start + val.step * (T - 1 + val.horizon)
        vector = predicted(model, [store.vectors[r] for r in context])
        split = [r for r in range(len(store.article)) if LENGTHS[store.article[r]][0] == "val" and r not in context]
        article = [r for r in split if store.article[r] == store.article[target]]
        near, far = ([r for _, r in ranked(vector, rows, store)[:k]] for rows in (article, split))
        expected = {"context": context, "truth": [target], "nearest in article": near, "nearest in split": far}
        assert {role: rows["row"].tolist() for role, rows in part.groupby("role", sort=False)} == expected
        for row in part.to_dict("records"):
            r = row["row"]
            assert row["cosine"] == pytest.approx(ranked(vector, [r], store)[0][0], abs=1e-5)
            assert row["text"] == texts[r] and row["true"] == (r == target)
            assert (row["article"], row["position"]) == (store.article[r], store.position[r])
            if store.article[r] == store.article[target]:
                assert row["offset"] == val.step * (row["position"] - store.position[target])
            else:
                assert pd.isna(row["offset"])
            for suffix, rows in (("", article), (" in split", split)):
                order = [q for _, q in ranked(vector, rows, store)]
                rank = 1 + order.index(r) if r in order else np.nan
                assert row["candidates" + suffix] == len(rows)
                assert row["rank" + suffix] == pytest.approx(rank, nan_ok=True)


def test_ranks_and_rollouts_are_those_of_5cat(store, texts, model):
    val = windows(store, "val")
    frame, every = measure(model, val), range(len(val))
    truth = R.nearest(model, val, every, texts).query("role == 'truth'")
    assert truth["rank"].tolist() == frame["novel rank"].tolist()
    assert truth["candidates"].tolist() == frame.candidates["novel"].tolist()
    assert np.allclose(truth["cosine"], frame["cosine"], atol=1e-6)
    steps = R.rollout(model, val, every, texts).query("role == 'truth'").pivot(columns="step", index="window")
    assert np.allclose(steps["cosine"][[1, 2]], frame.rollout[:, :2], atol=1e-6, equal_nan=True)


def test_equal_cosines_share_their_rank(store, texts):
    vectors = store.vectors.copy()
    vectors[7:10] = vectors[6]  # window 0 of article 0: target 6, rows 5 to 11 are its candidates
    twins = make_store("twins", vectors, store.article, store.position, store.articles)
    found = R.nearest(Constant(8, T, torch.tensor(vectors[6])), windows(twins, "val"), 0, texts, k=2)
    assert found["rank"][found["role"] == "truth"].tolist() == [2.5]
    assert found["row"][found["role"] == "nearest in article"].tolist() == [6, 7]  # the first in reading order


# Rollouts


def test_rollout_is_that_of_a_plain_loop(store, val, texts, model):
    found = R.rollout(model, val, range(len(val)), texts, steps=4)
    over = 0
    for window, part in found.groupby("window"):
        read = [int(val.start[window]) + val.step * i for i in range(T)]
        target = int(val.target[window])
        chunks = [store.vectors[r] for r in read]
        own = [r for r in range(len(store.article)) if store.article[r] == store.article[target] and r not in read]
        for step in range(1, 5):
            vector = predicted(model, chunks)
            chunks = [*chunks[1:], vector]
            order = ranked(vector, own, store)
            rows = part[part["step"] == step].set_index("role")
            assert rows.at["nearest in article", "row"] == order[0][1]
            assert rows.at["nearest in article", "cosine"] == pytest.approx(order[0][0], abs=1e-5)
            gone = val.step * (step - 1) * val.horizon
            true = [r for r in own if r - target == gone == store.position[r] - store.position[target]]
            assert ("truth" in rows.index) == bool(true)
            over += not true
            if true:
                assert rows.at["truth", "row"] == true[0] and rows.at["truth", "text"] == texts[true[0]]
                assert rows.at["truth", "rank"] == 1 + [r for _, r in order].index(true[0])
                assert rows.at["truth", "offset"] == (step - 1) * val.horizon
            assert rows.at["nearest in article", "true"] == (true == [order[0][1]])
    assert over  # the loop has met ends of articles


def test_models_are_left_as_they_were(store, texts):
    lstm = models.build("lstm", store.dim).train()
    first, second = (R.rollout(lstm, windows(store, "val"), 0, texts) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)  # no dropout
    assert lstm.training and not any(p.grad is not None for p in lstm.parameters())


@pytest.mark.parametrize("call", [R.nearest, R.rollout])
def test_a_model_that_predicts_nan(store, texts, call):
    with pytest.raises(LVMError, match="NaN or infinite"):
        call(Constant(8, T, torch.full((8,), torch.nan)), windows(store, "val"), [0], texts)


# Which windows


def test_choice_is_spread_over_the_ranks():
    rank = np.r_[np.ones(4), np.arange(2, 99), 200.0]
    frame = pd.DataFrame({"novel rank": rank[::-1], "article": 0})
    chosen = R.choose(frame)
    quartiles = np.sort(rank)[np.rint(np.array([0.25, 0.5, 0.75]) * 101).astype(int)]
    assert chosen["novel rank"].tolist() == [1, *quartiles, 200] == frame["novel rank"][chosen["window"]].tolist()
    assert chosen["window"].iloc[0] == 99  # of windows 98 to 101, which share rank 1, the middle one
    assert chosen["choice"].iloc[0] == "best of 102 windows by novel rank (1, one of 4 such)"
    assert chosen["choice"].iloc[4] == "worst of 102 windows by novel rank (200, the only such)"
    assert R.choose(frame, 1)["novel rank"].tolist() == [48]  # one alone is the median, not the best


def test_choice_takes_other_articles_and_no_window_twice():
    frame = pd.DataFrame({"novel rank": [3.0] * 6, "article": [0, 0, 0, 1, 1, 2]})
    assert sorted(frame["article"][R.choose(frame, 3)["window"]]) == [0, 1, 2]
    assert sorted(R.choose(frame, 99)["window"]) == list(range(6))


# The page

HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror='alert(2)'> </td></table> &lt;b&gt; &#60; \"q\" $x^2$ and $5, "
    "\\(y\\) \\begin{equation} **bold** _it_ `code` [link](javascript:x) | cell ~~s~~ # head\n\n<b>last</b>"
)


class Page(HTMLParser):
    """The tags of a page, their attributes, and its pieces of text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.pieces = [], set(), []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.pieces.append(data)


def words(found, *rest):
    return "".join(Page(R.show(found, *rest).data).pieces)


@pytest.mark.parametrize("call", [R.nearest, R.rollout])
def test_hostile_text_is_shown_and_does_nothing(store, model, call):
    articles = store.articles.assign(title="<i onclick=x>$t$</i> **a**")
    titled = replace(windows(store, "val"), store=replace(store, articles=articles))
    page = R.show(call(model, titled, [0, 9], [HOSTILE] * len(store.vectors)), titled, width=999).data
    read = Page(page)
    assert set(read.tags) <= {"table", "caption", "b", "i", "thead", "tbody", "tr", "th", "td", "span"}
    assert read.attributes <= {"style", "colspan", "dir"}
    assert read.tags.count("table") == page.count("</table>") and "\n" not in page
    assert " ".join(HOSTILE.split()) in "".join(read.pieces)
    # alone in its element, neither opens a formula
    assert all(piece in "$\\" for piece in read.pieces if set(piece) & set("$\\"))
    bare = "".join(page.replace(">", "<").split("<")[::2])  # what stands between the tags
    assert not set(bare) & set("*_`[]|~$\\")


@pytest.mark.parametrize("text", [HOSTILE, "", "plain – text", "&amp;", "'\"<>"])
def test_escaping_round_trips(text):
    assert "".join(Page(R.escape(text)).pieces) == text


@pytest.mark.parametrize(
    "text, short",
    [
        ("one two three", "one two three"),
        ("one two  \n three", "one two three"),
        ("one two three four", "one two three…"),
        ("one two three, four", "one two three…"),
        ("one twothree fourfive", "one twothree…"),
        ("x" * 30, "x" * 14 + "…"),
        ("one " + "x" * 30, "one " + "x" * 10 + "…"),
        ("a\u202eb\x00c\ud800d\u200ce", "abcd\u200ce"),
        ("", ""),
    ],
)
def test_shortening(text, short):
    assert R.shorten(text, 15) == short and len(short) <= 15
    short.encode()  # a lone surrogate could not be saved


def test_the_page_says_what_is_what(store, texts, model):
    val = windows(store, "val")
    last = int(np.flatnonzero(val.article == 0)[-1])
    found = R.nearest(model, val, [last], texts)
    page = words(found, val, pd.DataFrame({"window": [last], "novel rank": [1.0], "choice": ["worst of *all*"]}))
    assert page.startswith("Alpha: chunks 5 to 9 read, chunk 11 predicted; worst of *all*")
    truth = found[found["role"] == "truth"].iloc[0]
    assert f"true, 2 after the last one read: rank {truth['rank']:g} of 7 in the article (by chance 4)" in page
    assert f"{truth['rank in split']:g} of 29 in all of val (by chance 15)" in page
    assert "CC BY-SA" not in page  # the texts of a store of one's own are one's own
    over = words(R.rollout(model, val, [last], texts, 2), val)
    assert "step 1, of 7 chunks" in over and "step 2, of 7 chunks; no true chunk" in over


def test_the_page_tells_nothing_twice_and_names_the_skipped_chunk(store, texts):
    val = windows(store, "val")
    constant, skipped = (Constant(8, T, torch.tensor(store.vectors[val.target[0] - i])) for i in (0, 1))
    page = words(R.rollout(constant, val, 0, texts, 3), val)
    assert page.count(texts[val.target[0]]) == 1 and page.count("(as at step 1)") == 2 and "6, nearest, true" in page
    assert "nearest in all of val, of 29 chunks not read: the same" in words(R.nearest(constant, val, 0, texts, 1), val)
    assert "5, skipped" in words(R.nearest(skipped, val, 0, texts), val)


def test_embedded_data_is_credited():
    pytest.importorskip("gensim", reason='needs the extra "encode": pip install -e ".[encode]"')
    store = open_store(EMBEDDED / "wikipedia")
    texts, val = R.texts(store), windows(store, "val").at_most(100)
    mean = untrained(store.dim, T)["mean"]
    chosen = R.choose(measure(mean, val))
    page = words(R.nearest(mean, val, chosen["window"], texts), val, chosen)
    assert page.count("text: authors of English Wikipedia, CC BY-SA") == 1
    assert all(choice in page for choice in chosen["choice"])
    assert R.shorten(texts[val.target[chosen["window"].iloc[0]]]) in page
