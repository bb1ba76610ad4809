"""Train, validation and OOD: splits by whole articles, the same on every machine.

Axes: M chunks, D vector dimension, A articles.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence

import numpy as np

from .errors import LVMError
from .vectors import blocks

USABLE = 7  # chunks of an article that gives a window: 5 of context, horizon 2
ARTICLES = (10, 5, 3)  # usable articles that validation and OOD have at least: the first that a corpus can give
TREE = 5000  # articles that one topic tree holds; its memory grows with their square

VAL_RULE = (
    "val: of the remaining usable articles (of 7 chunks or more) in the order of sha256('SEED:TITLE'), as many as hold "
    "12 % of the chunks; SEED is the first of 0, 1, 2, ... for which these are at least 10 articles (5 or 3 in a small "
    "corpus) and at most 15 % of the chunks. train: the rest."
)
RULES = {
    "topic": "By article. ood is a topic: Ward's linkage of the article centroids makes a tree; of its branches that "
    "hold 10 to 20 % of the chunks and at least 10 usable articles (5 or 3 in a small corpus), the one whose articles' "
    "median cosine to the nearest article outside it is lowest. Of more than 5,000 articles the tree takes those 5,000 "
    "that come first in the order of sha256('tree:TITLE'), and the others go with the nearest of them. ",
    "random": "By article. ood: drawn as val is, by sha256('ood:SEED:TITLE'). ",
    "source": "By article. ood: all articles of the sources {names}. ",
}


def split_articles(
    vectors: np.ndarray,
    article: np.ndarray,
    titles: Sequence[str],
    ood: str = "topic",
    sources: Sequence[str] | None = None,
) -> np.ndarray:
    """(A,) strings train, val, ood. `vectors` (M, D), may be memory-mapped; `article` (M,): 0 … A − 1; `titles`, and
    `sources` where there are any, (A,). `ood`: topic, random, or source:NAME (several names with commas).

    The rule stands in `rule(ood)`. Raises LVMError if the articles are too few for it, or for an unknown `ood`.
    """
    kind, names = _kind(ood)
    size = np.bincount(article, minlength=len(titles))
    usable = size >= USABLE
    if usable.sum() < 3 * ARTICLES[-1]:
        raise LVMError(
            f"only {usable.sum()} of {len(size)} articles have {USABLE} chunks or more; a split into train, val and "
            f"ood needs {3 * ARTICLES[-1]} such: take more or longer articles, or smaller chunks"
        )
    why = None
    for at_least in ARTICLES:
        try:
            if kind == "topic":
                outside = _topic(vectors, article, titles, size, at_least)
            elif kind == "random":
                outside = np.isin(np.arange(len(size)), _draw("ood:", titles, np.flatnonzero(usable), size, at_least))
            else:
                outside = _of_sources(names, sources, usable)
            split = np.where(outside, "ood", "train")
            split[_draw("", titles, np.flatnonzero(~outside & usable), size, at_least)] = "val"
            if (split[usable] == "train").sum() < at_least:
                raise LVMError("too few articles remain for training; take more articles")
        except LVMError as e:
            why = why or e
        else:
            return split
    raise why


def rule(ood: str) -> str:
    """How `split_articles` splits, in words."""
    kind, names = _kind(ood)
    return RULES[kind].replace("{names}", ", ".join(names)) + VAL_RULE


def _kind(ood: str) -> tuple[str, list[str]]:
    kind, colon, names = ood.partition(":") if isinstance(ood, str) else (repr(ood), "", "")
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if kind not in RULES or bool(listed) != (kind == "source") or (colon and kind != "source"):
        near = difflib.get_close_matches(kind, RULES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near and near[0] != ood else ""
        raise LVMError(f"ood {ood!r}: unknown{hint}; known: topic, random, source:NAME[,NAME…]")
    return kind, listed


def centroids(vectors: np.ndarray, article: np.ndarray, count: int | None = None) -> np.ndarray:
    """(A, D) float64: the mean vector of each article, made unit. `article` (M,): 0 … A − 1. Reads block by block."""
    sums = np.zeros((count or int(article.max()) + 1, vectors.shape[1]))
    for first, block in blocks(vectors):
        np.add.at(sums, article[first : first + len(block)], block.astype(np.float64))
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def _topic(vectors, article, titles, size, at_least: int) -> np.ndarray:
    """(A,) whether an article is of the branch of the topic tree that stands farthest apart."""
    from scipy.cluster.hierarchy import linkage, to_tree

    centre, inside = centroids(vectors, article, len(size)), np.arange(len(size))
    if len(size) > TREE:
        inside = np.sort(_ordered("tree:", titles, np.flatnonzero(size))[:TREE])
    of_tree, within = centre[inside], size[inside]
    cosine = of_tree @ of_tree.T
    branches = []
    for node in to_tree(linkage(of_tree, "ward"), rd=True)[1]:
        if node.count > 0.9 * len(inside):
            continue
        branch = np.isin(np.arange(len(inside)), node.pre_order())
        if 0.10 <= within[branch].sum() / within.sum() <= 0.20 and (within[branch] >= USABLE).sum() >= at_least:
            branches.append((np.median(cosine[branch][:, ~branch].max(1)), branch))
    if not branches:
        raise LVMError(
            f"no branch of the topic tree holds 10 to 20 % of the chunks and {at_least} usable articles; take more "
            "articles, or split with ood: random"
        )
    branch = min(branches, key=lambda b: b[0])[1]
    outside = np.zeros(len(size), bool)
    outside[inside] = branch
    others = np.setdiff1d(np.arange(len(size)), inside)
    for part in np.array_split(others, max(1, len(others) // 4096)):
        outside[part] = branch[(centre[part] @ of_tree.T).argmax(1)] if len(part) else []
    return outside


def _of_sources(names: list[str], sources, usable: np.ndarray) -> np.ndarray:
    there = sorted(set(map(str, sources))) if sources is not None else []
    for name in names:
        if name not in there:
            shown = ", ".join(there[:20]) or "none: this dataset has no sources"
            raise LVMError(f"ood: no article has the source {name!r}; there are: {shown}")
    outside = np.isin(np.asarray(sources, dtype=str), names)
    if (outside & usable).sum() < ARTICLES[-1]:
        raise LVMError(f"ood: the sources {', '.join(names)} hold too few usable articles; name more of them")
    return outside


def _ordered(salt: str, titles: Sequence[str], articles: np.ndarray) -> np.ndarray:
    return np.array(sorted(articles, key=lambda a: hashlib.sha256(f"{salt}{titles[a]}".encode()).digest()), dtype=int)


def _draw(salt: str, titles: Sequence[str], free: np.ndarray, size: np.ndarray, at_least: int) -> np.ndarray:
    """Of the articles `free`, a random draw that holds 12 to 15 % of the chunks; its numbers."""
    for seed in range(1000 if len(size) <= TREE else 20):  # of many articles the first draw will do
        order = _ordered(f"{salt}{seed}:", titles, free)
        share = size[order].cumsum() / size.sum()
        count = int((share < 0.12).sum()) + 1  # the fewest that hold 12 %
        if at_least <= count <= len(order) and share[count - 1] <= 0.15:
            return order[:count]
    raise LVMError(f"no draw of {at_least} usable articles holds 12 to 15 % of the chunks; take more articles")
