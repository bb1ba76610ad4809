"""Read the text of the embedded dataset `wikipedia`: a slice of a dump in the gensim wheel.

Needs gensim, of the extra `encode`, and no network.
"""

from __future__ import annotations

import bz2
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from ..data import store as store_format
from ..errors import LVMError, require
from ..io.paths import EMBEDDED
from ..windows import Store

SLICE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SLICE_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
LICENCE = (
    "The text is by the authors of Wikipedia, under CC BY-SA (https://creativecommons.org/licenses/by-sa/3.0/); "
    "the articles are named in articles.csv."
)
SHORTEST = 80  # characters of a paragraph

# Headings of the sections at the end of an article that are no part of its text.
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
    """Return the slice's articles, [(title, paragraphs)] in the dump's order, and counts of what was dropped.

    A paragraph is running prose of at least 80 characters, wiki markup removed. `path`: the file, if it is not in the
    gensim wheel. Raises LVMError if it is missing or has another sha256, or if gensim is not installed.
    """
    wiki = require("gensim.corpora.wikicorpus")
    path = Path(path or Path(require("gensim").__file__).parent / "test" / "test_data" / SLICE)
    if not path.is_file():
        raise LVMError(f"{path.name}: missing in the installed gensim; install gensim 4.4.0")
    if store_format.sha256_file(path) != SLICE_SHA256:
        raise LVMError(f"{path.name}: its sha256 is not {SLICE_SHA256[:12]}…; reinstall gensim 4.4.0")
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


def rows(articles: list[tuple[str, list[str]]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the paragraphs of all articles, and the article and position of each (M,)."""
    counts = [len(paragraphs) for _, paragraphs in articles]
    position = np.concatenate([np.arange(count) for count in counts])
    return [p for _, paragraphs in articles for p in paragraphs], np.repeat(np.arange(len(articles)), counts), position


def texts(store: Store) -> list[str]:
    """Return the text of every row (M) of the embedded dataset, read from the gensim wheel.

    Raises LVMError for any other store, for one whose rows differ from the embedded dataset's, and without gensim.
    """
    if store.datasheet.get("source_sha256") != SLICE_SHA256:
        raise LVMError(f"{store.name}: it has no texts; encode it again with keep_text=True")
    articles, _ = wikipedia_slice()
    paragraphs, article, position = rows(articles)
    same = store.articles["title"].tolist() == [title for title, _ in articles]
    same = same and np.array_equal(store.article, article) and np.array_equal(store.position, position)
    if same:  # a control shuffles the vectors and leaves the tables as they are
        shipped = store_format.open_store(EMBEDDED / "wikipedia").vectors.astype(np.float32)
        same = shipped.shape == store.vectors.shape and bool(((shipped * store.vectors).sum(1) > 0.99).all())
    if not same:
        raise LVMError(f"{store.name}: its rows are not the slice's paragraphs; open the embedded dataset: wikipedia")
    return paragraphs


def _paragraphs(markup: str, wiki, counts: Counter) -> list[str]:
    """Return the paragraphs of one article's wiki markup, in order; count the dropped lines in `counts`."""
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
    paragraphs, apparatus = {}, 0  # apparatus: level of the apparatus heading we are under, 0 outside
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
            "repeated paragraphs": prose in paragraphs,
        }
        reason = next((reason for reason, applies in reasons.items() if applies), None)
        if reason:
            counts[reason] += 1
        else:
            paragraphs[prose] = True
    return list(paragraphs)
