"""Splits by article: a planted topic is found, every promise of the rule is counted again, and bad input is refused."""

import hashlib

import numpy as np
import pytest

from lvmlib.data import splits
from lvmlib.errors import LVMError


def topics(seed, sizes, second=slice(-12, None)):
    """Articles around two topics far apart; those of `second` are of the second topic."""
    rng = np.random.default_rng(seed)
    article = np.repeat(np.arange(len(sizes)), sizes)
    centre = np.zeros((len(sizes), 32))
    centre[:, 0], centre[second, 0], centre[second, 1] = 1, -0.2, 1
    of_article, of_chunk = rng.standard_normal((len(sizes), 32)), rng.standard_normal((len(article), 32))
    x = centre[article] + 0.2 * of_article[article] + 0.1 * of_chunk
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16), article


def split_of(vectors, article, ood="topic", sources=None, more=()):
    """The splits of articles with titles T0, T1, …, and of `more` titles without chunks."""
    return splits.split_articles(vectors, article, [*(f"T{i}" for i in range(article[-1] + 1)), *more], ood, sources)


@pytest.mark.parametrize("seed", range(3))
def test_the_split_rule_finds_a_planted_topic(seed):
    data = topics(seed, [20] * 80)
    split = split_of(*data)
    assert (split[-12:] == "ood").all() and not (split[:-12] == "ood").any()
    # 12 % of 80 equal articles: 10; the rest trains.
    assert (split == "val").sum() == 10 and (split == "train").sum() == 58
    assert (split == split_of(*data)).all()


@pytest.mark.parametrize("ood", ["topic", "random", "source:x"])
@pytest.mark.parametrize("seed", range(20))
def test_nine_usable_articles_are_always_enough(ood, seed, monkeypatch):
    """Small, uneven and padded with what is too short: each split has three usable articles."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(7, 18, 9 + seed)
    sizes[0] *= (1, 50)[seed % 2]  # one article that is most of the corpus
    sizes = np.append(sizes, rng.integers(1, 7, 40 * (seed % 3)))
    monkeypatch.setattr(splits, "TREE", (5000, 12)[seed % 5 == 0])
    data, sources = topics(seed, sizes), (["y", "x", "y"] * len(sizes))[: len(sizes)]
    split = split_of(*data, ood, sources)
    assert min(np.sum(split[sizes >= 7] == name) for name in ("train", "val", "ood")) >= 3
    assert (sizes[split == "val"] >= 7).all()
    assert (split == split_of(*data, ood, sources)).all()


def test_a_topic_that_is_no_branch_is_still_a_topic():
    split = split_of(*topics(0, [20] * 12 + [10] * 12))  # the branch of the planted topic holds a third of the chunks
    assert len(set((split == "ood").nonzero()[0] >= 12)) == 1
    vectors, article = topics(0, [20] * 10)
    vectors[article < 3] = -vectors[article < 3]
    assert (split_of(vectors, article)[:3] == "ood").all()


@pytest.mark.parametrize("articles, at_least", [(80, 10), (40, 5), (24, 3)])
def test_a_random_split_is_the_draw_that_the_rule_describes(articles, at_least):
    sizes = np.random.default_rng(articles).integers(7, 12, articles)
    sizes[:3] = 3  # too short: they stay in train, unused
    split = split_of(*topics(0, sizes), "random")

    def draw(salt, free):
        for seed in range(1000):
            key = {a: hashlib.sha256(f"{salt}{seed}:T{a}".encode()).digest() for a in free}
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
    data, sources = topics(1, [9] * 60), np.repeat(["news", "speech", "film"], [30, 8, 22])
    for ood, names in (("source:speech", ["speech"]), ("source: speech, news", ["speech", "news"])):
        split = split_of(*data, ood, sources)
        assert ((split == "ood") == np.isin(sources, names)).all() and (split == "val").any()
    assert "speech" in splits.rule("source:speech") and "news" not in splits.rule("source:speech")


def test_more_articles_than_one_tree_holds(monkeypatch):
    """The others go with their nearest article of the tree: the planted topic stays whole."""
    monkeypatch.setattr(splits, "TREE", 80)
    topic = np.random.default_rng(3).random(300) < 0.15
    assert ((split_of(*topics(3, [8] * 300, topic)) == "ood") == topic).all()


def test_articles_without_a_chunk_change_nothing():
    data = topics(0, [20] * 80)
    split = split_of(*data, "random", more=["empty"])
    assert (split[:80] == split_of(*data, "random")).all() and split[80] == "train"
    assert split_of(*data, more=["empty"])[80] == "train"


@pytest.mark.parametrize(
    "ood, sources, word",
    [
        ("topics", None, "'topic'"),
        *((ood, None, "known: topic, random") for ood in ("", None, "source", "source:", "random:x")),
        ("source:news", None, "has no sources"),
        ("source:nws", ["news"] * 80, "known: news"),
        ("source:news", ["news"] * 80, "train and val get 0"),
        ("source:news", ["news"] * 75 + ["film"] * 5, "train and val get 5"),
        ("source:news", ["news"] + ["film"] * 79, "ood gets 1"),
    ],
)
def test_bad_ood(ood, sources, word):
    with pytest.raises(LVMError, match=word):
        split_of(*topics(0, [20] * 80), ood, sources)


def test_too_few_usable_articles():
    with pytest.raises(LVMError, match="only 0 of 80 articles have 7 chunks or more"):
        split_of(*topics(0, [6] * 80))
