"""The first stage of a build in files: what to encode, or ready vectors, and the article of each row.

chunks.npy      (M, 2) int32: article 0 … A − 1, position in it
documents.csv   article, title, source (A)
texts.jsonl     a JSON string a row (M); ready vectors may have none
vectors.npy     (M, D) float16; only of ready vectors
chunked.json    the counts; written last: this stage is finished
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.store import Texts
from ..io.disk import sync, write_atomic


@dataclass(eq=False)
class Built:
    """The chunks of a build (M) and their articles (A); encoding adds the last three."""

    chunks: np.ndarray  # (M, 2)
    texts: Texts | None  # (M)
    titles: list[str]  # (A)
    sources: list[str]  # (A)
    counts: dict
    parts: Sequence[Path] = ()  # the shards; none of ready vectors
    tokens: np.ndarray | None = None  # (M,) of each text; zeros where they are not known
    limit: int | None = None  # tokens that the encoder reads


def write_tables(
    folder: Path, chunks: np.ndarray, titles: Sequence[str], sources: Sequence[str], counts: Mapping
) -> None:
    """Write the tables beside the texts or vectors in `folder`; the stage is then finished."""
    np.save(folder / "chunks.npy", chunks)
    documents = pd.DataFrame({"title": titles, "source": sources})
    documents.to_csv(folder / "documents.csv", index_label="article", lineterminator="\n")
    sync(folder)
    text = json.dumps(counts, indent=1, ensure_ascii=False)
    write_atomic(folder / "chunked.json", lambda partial: partial.write_text(text, encoding="utf-8"))


def read_tables(folder: Path) -> Built:
    """Return what the stage wrote. Raises OSError or ValueError if it is damaged or not finished."""
    counts = json.loads((folder / "chunked.json").read_text(encoding="utf-8"))
    chunks = np.load(folder / "chunks.npy")
    documents = pd.read_csv(folder / "documents.csv", keep_default_na=False, dtype=str)
    if not len(chunks) or len(documents) != chunks[-1, 0] + 1:
        raise ValueError("tables that do not agree")
    path = folder / "texts.jsonl"
    texts = Texts(path, len(chunks)) if path.exists() or not (folder / "vectors.npy").exists() else None
    return Built(chunks, texts, documents["title"].tolist(), documents["source"].tolist(), counts)
