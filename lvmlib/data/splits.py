"""Train, validation and OOD: splits by whole articles, the same on every machine.

Axes: M chunks, D vector dimension, A articles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ..errors import LVMError
from ..io.inherit import nearest
from ..windows import blocks

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
    """(A,) strings train, val, ood, by `rule(ood)`.

    `vectors` (M, D), may be memory-mapped; `article` (M,): 0 … A − 1; `titles`, and `sources` if any, (A,).
    `ood`: topic, random, or source:NAME (several names with commas). A small or uneven corpus gets the nearest shares
    that leave each split 3 usable articles; its topic may then be an article with its nearest neighbours.
    Raises LVMError for an unknown `ood`, and for what `check_articles` refuses.
    """
    kind, _ = _kind(ood)
    size = np.bincount(article, minlength=len(titles))
    usable, outside = size >= USABLE, check_articles(size, ood, sources)
    centre = centroids(vectors, article, len(size)) if kind == "topic" else None
    for at_least, loose in (*((a, False) for a in ARTICLES), (ARTICLES[-1], True)):
        if kind == "topic":
            outside = _topic(centre, titles, size, at_least, loose)
        elif kind == "random":
            drawn = _draw("ood:", titles, np.flatnonzero(usable), size, at_least, 2 * at_least, loose)
            outside = None if drawn is None else np.isin(np.arange(len(size)), drawn)
        if outside is None:
            continue
        val = _draw("", titles, np.flatnonzero(~outside & usable), size, at_least, at_least, loose)
        if val is not None:
            break
    split = np.where(outside, "ood", "train")
    split[val] = "val"
    return split


def check_articles(size: np.ndarray, ood: str = "topic", sources: Sequence[str] | None = None) -> np.ndarray | None:
    """Raise LVMError unless articles of so many chunks, `size` (A,), can be split.

    Returns (A,) whether an article is of the sources that `ood` names, or None if it names none.
    """
    kind, names = _kind(ood)
    usable, least = size >= USABLE, ARTICLES[-1]
    if usable.sum() < 3 * least:
        raise LVMError(
            f"only {usable.sum()} of {len(size)} articles have {USABLE} chunks or more; a split into train, val and "
            f"ood needs {3 * least} such: take more or longer articles, or smaller chunks"
        )
    if kind != "source":
        return None
    known = sorted(set(map(str, sources))) if sources is not None else []
    if unknown := sorted(set(names) - set(known)):
        shown = ", ".join(known[:20]) or "none: this dataset has no sources"
        raise LVMError(f"ood: no article has the source {unknown[0]!r}; known: {shown}")
    outside = np.isin(np.asarray(sources, dtype=str), names)
    inside, left = (usable & outside).sum(), (usable & ~outside).sum()
    if inside < least or left < 2 * least:
        raise LVMError(
            f"ood {ood!r}: of the articles with {USABLE} chunks or more, ood gets {inside} ({least} are needed), "
            f"train and val get {left} ({2 * least} are needed); name other sources, or take more articles"
        )
    return outside


def rule(ood: str) -> str:
    """How `split_articles` splits, in words."""
    kind, names = _kind(ood)
    return RULES[kind].replace("{names}", ", ".join(names)) + VAL_RULE


def _kind(ood: str) -> tuple[str, list[str]]:
    kind, colon, names = ood.partition(":") if isinstance(ood, str) else (repr(ood), "", "")
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if kind not in RULES or bool(listed) != (kind == "source") or (colon and kind != "source"):
        raise LVMError(f"ood {ood!r}: unknown{nearest(kind, RULES)}; known: topic, random, source:NAME[,NAME…]")
    return kind, listed


def centroids(vectors: np.ndarray, article: np.ndarray, count: int | None = None) -> np.ndarray:
    """(A, D) float32: the mean vector of each article, made unit. `article` (M,): 0 … A − 1."""
    sums = np.zeros((count or int(article.max()) + 1, vectors.shape[1]), np.float32)
    for first, block in blocks(vectors):
        np.add.at(sums, article[first : first + len(block)], block.astype(np.float32))
    norms = np.sqrt(np.einsum("ad,ad->a", sums, sums, dtype=np.float64))
    sums /= np.maximum(norms, 1e-12).astype(np.float32)[:, None]
    return sums


def _topic(centre: np.ndarray, titles, size: np.ndarray, at_least: int, loose: bool) -> np.ndarray | None:
    """(A,) whether an article is in the most distant branch of the topic tree; None without a branch.

    `loose`: without a branch, the most distant group of an article and its nearest by `centre` (A, D).
    """
    from scipy.cluster.hierarchy import linkage, to_tree

    inside = np.arange(len(size))
    if len(size) > TREE:
        inside = np.sort(_ordered("tree:", titles, np.flatnonzero(size))[:TREE])
        if loose and (size[inside] >= USABLE).sum() < 3 * at_least:
            inside = np.sort(_ordered("tree:", titles, np.flatnonzero(size >= USABLE))[:TREE])
    of_tree, within = centre[inside].astype(np.float64), size[inside]
    usable, share = within >= USABLE, within / within.sum()
    cosine = of_tree @ of_tree.T
    branches = []
    for node in to_tree(linkage(of_tree, "ward"), rd=True)[1]:
        if node.count > 0.9 * len(inside):
            continue
        branch = np.isin(np.arange(len(inside)), node.pre_order())
        enough = usable[branch].sum() >= at_least and usable[~branch].sum() >= 2 * at_least
        if enough and 0.10 <= within[branch].sum() / within.sum() <= 0.20:
            branches.append((0, np.median(cosine[branch][:, ~branch].max(1)), branch))
    for article in np.flatnonzero(usable) if loose and not branches else ():
        near = np.flatnonzero(usable)
        near = near[np.argsort(-cosine[article, near], kind="stable")]
        count = np.clip((share[near].cumsum() < 0.12).sum() + 1, at_least, len(near) - 2 * at_least)
        branch = np.isin(np.arange(len(inside)), near[:count])
        apart = np.median(cosine[branch][:, near[count:]].max(1))
        branches.append((max(share[branch].sum(), 0.20), apart, branch))
    if not branches:
        return None
    branch = min(branches, key=lambda b: b[:2])[2]
    outside = np.zeros(len(size), bool)
    outside[inside] = branch
    others = np.setdiff1d(np.arange(len(size)), inside)
    for part in np.array_split(others, max(1, len(others) // 4096)):
        outside[part] = branch[(centre[part] @ centre[inside].T).argmax(1)] if len(part) else []
    return outside


def _ordered(salt: str, titles: Sequence[str], articles: np.ndarray) -> np.ndarray:
    return np.array(sorted(articles, key=lambda a: hashlib.sha256(f"{salt}{titles[a]}".encode()).digest()), dtype=int)


def _draw(salt: str, titles, free: np.ndarray, size: np.ndarray, at_least: int, leave: int, loose: bool):
    """Draw articles at random from `free`: the numbers of a draw with 12 to 15 % of the chunks that leaves `leave`
    articles; without one None, or, if `loose`, the nearest draw."""
    closest = np.inf, None
    for seed in range(1000 if len(size) <= TREE else 20):  # of many articles the first draw will do
        order = _ordered(f"{salt}{seed}:", titles, free)
        share = size[order].cumsum() / size.sum()
        count = int((share < 0.12).sum()) + 1  # the fewest that hold 12 %
        if at_least <= count <= len(order) - leave and share[count - 1] <= 0.15:
            return order[:count]
        count = min(max(count, at_least), len(order) - leave)
        if loose and count >= at_least:
            off = max(0.12 - share[count - 1], share[count - 1] - 0.15)
            closest = min(closest, (off, order[:count]), key=lambda n: n[0])
    return closest[1]
