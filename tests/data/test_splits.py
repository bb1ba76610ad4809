"""Splits by article: a planted topic is found, every promise of the rule is counted again, and bad input is told."""

import hashlib

import numpy as np
import pytest

from lvmlib.data import splits
from lvmlib.data.splits import rule, split_articles
from lvmlib.errors import LVMError


def topics(seed, sizes):
    """Articles around two topics far apart; the last 12 are the second topic."""
    rng = np.random.default_rng(seed)
    article = np.repeat(np.arange(len(sizes)), sizes)
    centre = np.zeros((len(sizes), 32))
    centre[:, 0], centre[-12:, 0], centre[-12:, 1] = 1, -0.2, 1
    of_article, of_chunk = rng.standard_normal((len(sizes), 32)), rng.standard_normal((len(article), 32))
    x = centre[article] + 0.2 * of_article[article] + 0.1 * of_chunk
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16), article


@pytest.mark.parametrize("seed", range(3))
def test_the_split_rule_finds_a_planted_topic(seed):
    vectors, article = topics(seed, [20] * 80)
    split = split_articles(vectors, article, [f"T{i}" for i in range(80)])
    assert (split[-12:] == "ood").all() and not (split[:-12] == "ood").any()
    # 12 % of 80 equal articles: 10; the rest trains.
    assert (split == "val").sum() == 10 and (split == "train").sum() == 58
    assert (split == split_articles(vectors, article, [f"T{i}" for i in range(80)])).all()


@pytest.mark.parametrize("ood", ["topic", "random", "source:x"])
@pytest.mark.parametrize("seed", range(40))
def test_nine_usable_articles_are_always_enough(ood, seed, monkeypatch):
    """Small, uneven and padded with what is too short: each split has three usable articles."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(7, 18, 9 + seed % 20)
    sizes[0] *= (1, 50)[seed % 2]  # one article that is most of the corpus
    sizes = np.append(sizes, rng.integers(1, 7, 40 * (seed % 3)))
    monkeypatch.setattr(splits, "TREE", (5000, 12)[seed % 5 == 0])
    vectors, article = topics(seed, sizes)
    titles, sources = [f"T{i}" for i in range(len(sizes))], ["y", "x", "y"] * len(sizes)
    split = split_articles(vectors, article, titles, ood, sources[: len(sizes)])
    assert min(np.sum(split[sizes >= 7] == name) for name in ("train", "val", "ood")) >= 3
    assert (sizes[split == "val"] >= 7).all()
    assert (split == split_articles(vectors, article, titles, ood, sources[: len(sizes)])).all()


def test_a_topic_that_is_no_branch_is_still_a_topic():
    vectors, article = topics(0, [20] * 12 + [10] * 12)  # the branch of the planted topic holds a third of the chunks
    split = split_articles(vectors, article, [f"T{i}" for i in range(24)])
    assert len(set((split == "ood").nonzero()[0] >= 12)) == 1
    vectors, article = topics(0, [20] * 10)
    vectors[article < 3] = -vectors[article < 3]
    assert (split_articles(vectors, article, [f"T{i}" for i in range(10)])[:3] == "ood").all()


def test_too_few_articles_for_the_split_rule():
    vectors, article = topics(0, [20] * 14)
    with pytest.raises(LVMError, match=r"leaves 5 articles .* need 6: name fewer sources"):
        split_articles(vectors, article, [f"T{i}" for i in range(14)], "source:x", ["x"] * 9 + ["y"] * 5)


@pytest.mark.parametrize("articles, at_least", [(80, 10), (40, 5), (24, 3)])
def test_a_random_split_is_the_draw_that_the_rule_describes(articles, at_least):
    rng = np.random.default_rng(articles)
    sizes = rng.integers(7, 12, articles)
    sizes[:3] = 3  # too short: they stay in train, unused
    vectors, article = topics(0, sizes)
    titles = [f"Title {i}" for i in range(articles)]
    split = split_articles(vectors, article, titles, "random")

    def draw(salt, free):
        for seed in range(1000):
            key = {a: hashlib.sha256(f"{salt}{seed}:{titles[a]}".encode()).digest() for a in free}
            chosen = []
            for a in sorted(free, key=key.get):
                if sizes[chosen].sum() >= 0.12 * sizes.sum():
                    break
                chosen.append(a)
            if len(chosen) >= at_least and sizes[chosen].sum() <= 0.15 * sizes.sum():
                return chosen
        return None

    ood = draw("ood:", list(range(3, articles)))
    val = draw("", [a for a in range(3, articles) if a not in ood])
    assert sorted(np.flatnonzero(split == "ood")) == sorted(ood)
    assert sorted(np.flatnonzero(split == "val")) == sorted(val)
    assert (split[:3] == "train").all()


def test_ood_by_source():
    vectors, article = topics(1, [9] * 60)
    sources = np.repeat(["news", "speech", "film"], [30, 8, 22])
    titles = [f"T{i}" for i in range(60)]
    split = split_articles(vectors, article, titles, "source:speech", sources)
    assert (split[sources == "speech"] == "ood").all() and not (split[sources != "speech"] == "ood").any()
    both = split_articles(vectors, article, titles, "source: speech, news", sources)
    assert ((both == "ood") == np.isin(sources, ["speech", "news"])).all() and (both == "val").any()
    assert "speech" in rule("source:speech") and "news" not in rule("source:speech")


def test_more_articles_than_one_tree_holds(monkeypatch):
    """The others go with their nearest article of the tree: the planted topic stays whole."""
    monkeypatch.setattr(splits, "TREE", 80)
    rng = np.random.default_rng(3)
    topic = rng.random(300) < 0.15
    centre = np.zeros((300, 32))
    centre[:, 0], centre[topic, 0], centre[topic, 1] = 1, -0.2, 1
    article = np.repeat(np.arange(300), 8)
    x = (centre + 0.2 * rng.standard_normal((300, 32)))[article] + 0.1 * rng.standard_normal((2400, 32))
    split = split_articles(x / np.linalg.norm(x, axis=1, keepdims=True), article, [f"T{i}" for i in range(300)])
    assert ((split == "ood") == topic).all()


def test_articles_without_a_chunk_change_nothing():
    vectors, article = topics(0, [20] * 80)
    titles = [f"T{i}" for i in range(80)]
    there = split_articles(vectors, article, titles, "random")
    more = split_articles(vectors, article, [*titles, "empty"], "random")
    assert (more[:80] == there).all() and more[80] == "train"
    assert split_articles(vectors, article, [*titles, "empty"])[80] == "train"


@pytest.mark.parametrize(
    "ood, sources, words",
    [
        ("topics", None, "did you mean 'topic'"),
        ("", None, "known: topic, random"),
        (None, None, "known: topic, random"),
        ("source", None, "known: topic, random"),
        ("source:", None, "known: topic, random"),
        ("random:x", None, "known: topic, random"),
        ("source:news", None, "has no sources"),
        ("source:nws", ["news"] * 80, "there are: news"),
        ("source:news", ["news"] * 80, "take more articles"),
        ("source:news", ["news"] + ["film"] * 79, "too few usable articles"),
    ],
)
def test_bad_ood(ood, sources, words):
    vectors, article = topics(0, [20] * 80)
    with pytest.raises(LVMError, match=words):
        split_articles(vectors, article, [f"T{i}" for i in range(80)], ood, sources)


def test_too_few_usable_articles():
    vectors, article = topics(0, [6] * 80)
    with pytest.raises(LVMError, match="only 0 of 80 articles have 7 chunks or more"):
        split_articles(vectors, article, [f"T{i}" for i in range(80)])
