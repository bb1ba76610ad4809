"""Write the datasheet of a built store: how it was made, its counts, its splits, and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from ..data import splits
from ..data.store import sha256_file
from ..windows import SPLITS
from .sources import KINDS
from .tables import warn_of_order, warn_of_titles

TEXT_PACKAGES = ("sentence-transformers", "transformers", "tokenizers", "torch", "sentencex", "datasketch", "numpy")
QUANTILES = {"shortest": 0, "quartile": 0.25, "median": 0.5, "third quartile": 0.75, "longest": 1}
UNITS = {
    "paragraph": ("Paragraphs", "a paragraph: text between blank lines, its whitespace made single spaces"),
    "sentence": ("Sentences", "a sentence, as sentencex splits a paragraph"),
    "tokens": ("Windows of tokens", "a window of {tokens} tokens of the encoder, {overlap} of them in the next, too"),
}


@dataclass(frozen=True)
class Built:
    """The articles of a build, the counts and lengths of its chunks, and its shards."""

    counts: dict
    lengths: dict[str, np.ndarray]  # (M,) each: characters, tokens
    titles: list[str]
    sources: list[str]
    parts: Sequence[Path] = ()  # the shards; none where chunks/vectors.npy is whole
    limit: int | None = None  # tokens that the encoder reads


def datasheet(recipe: dict, kind: str, built: Built, dimension: int, article: np.ndarray, split, texts) -> dict:
    """Return the datasheet; the same for the same build. `article` (M,), `split` (A,), `texts`: (M) or None."""
    size = np.bincount(article, minlength=len(split))
    tally = {"articles": size > 0, "usable_articles": size >= splits.USABLE, "chunks": size}
    longest = [built.titles[a] for a in np.argsort(-size, kind="stable") if split[a] == "ood"]
    ready = "vectors" in recipe
    what = "Ready vectors of {}" if ready else f"{UNITS[recipe['unit']][0]} of {{}} as unit vectors"
    sheet: dict = {
        "description": f"{what.format(recipe['source'])}, in reading order.",
        "source": recipe["source"] + (f", config {recipe['config']}" if recipe["config"] else ""),
        "source_fingerprint": recipe["source_fingerprint"],
    }
    if texts is not None:
        sheet["text_sha256"] = sha256_file(texts.path)
    sheet |= KINDS[kind].datasheet
    if ready:
        sheet["encoder"] = "not known: the vectors came with the source; made unit, stored as float16"
    else:
        limit = f" It reads the first {built.limit} tokens of a chunk." if built.limit else ""
        sheet["encoder"] = f"{recipe['encoder']}, frozen; computed in {recipe['precision']}, normalised, stored as "
        sheet["encoder"] += f"float16.{limit}"
        sheet["encoder_revision"] = recipe["encoder_revision"]
    sheet["dimension"] = int(dimension)
    if not ready:
        sheet["chunks"] = _describe_chunks(recipe)
    sheet["counts"] = built.counts
    if built.lengths:
        sheet["lengths"] = {what: _quantiles(values) for what, values in built.lengths.items() if values.any()}
    if warnings := _warnings(recipe, built, article, texts, split):
        sheet["warnings"] = warnings
    packages = dict.fromkeys((*(("pyarrow", "numpy") if ready else TEXT_PACKAGES), *KINDS[kind].packages))
    return sheet | {
        "split_rule": splits.rule(recipe["ood"]),
        "split": {s: {k: int(v[split == s].sum()) for k, v in tally.items()} for s in SPLITS},
        "ood_articles": f"{len(longest)}; the longest: {', '.join(longest[:12])}",
        "packages": {package: _version(package) for package in packages if _version(package)},
        "build": recipe,
    }


def _describe_chunks(recipe: dict) -> str:
    longest = f", at most {recipe['longest']}" if recipe["longest"] else ""
    dropped = [f"chunks in {recipe['boilerplate']} or more articles"] if recipe["boilerplate"] else []
    dropped += ["repeats"]
    dropped += [f"near-duplicates (Jaccard {recipe['near_duplicates']})"] if recipe["near_duplicates"] else []
    return (
        f"A chunk is {UNITS[recipe['unit']][1].format(**recipe)}; at least {recipe['shortest']} characters{longest}. "
        f"Left out: {', '.join(dropped)}. They leave no gap: the chunks before and behind count as neighbours."
    )


def _quantiles(values: np.ndarray) -> dict:
    return {name: int(np.quantile(values, share, method="nearest")) for name, share in QUANTILES.items()}


def _warnings(recipe: dict, built: Built, article: np.ndarray, texts, split: np.ndarray) -> list[str]:
    warnings = [warn_of_order(built.counts)]
    single = built.counts.get("articles of one chunk", 0)
    if recipe.get("unit") == "paragraph" and single > len(split) / 2:
        warnings.append(
            f"{single:,} of {len(split):,} articles are one chunk: a paragraph ends at a blank line, not at the end of "
            "a line; put blank lines in, or take the unit sentence"
        )
    val, ood = (float((split[article] == name).mean()) for name in ("val", "ood"))
    if not 0.12 <= val <= 0.15 or (not 0.10 <= ood <= 0.20 and not recipe["ood"].startswith("source")):
        warnings.append(
            f"val holds {val:.0%} and ood {ood:.0%} of the chunks: too few articles, or too unequal ones, for the "
            "shares of the split rule"
        )
    rows = []
    if texts is not None:  # 10,000 are enough
        rows = np.unique(np.linspace(0, len(article) - 1, min(10_000, len(article))).round().astype(int))
    titles = [built.titles[article[row]] for row in rows]
    begins = [texts[row].lstrip()[: len(title) + 1] for row, title in zip(rows, titles, strict=True)]
    warnings.append(warn_of_titles(recipe["source"], titles, begins))
    cut_off = built.counts.get("chunks cut off by the encoder", 0) / len(article)
    if cut_off >= 0.1:
        warnings.append(
            f"{cut_off:.0%} of the chunks are longer than the {built.limit} tokens that the encoder reads; take a "
            "smaller unit, or set longest"
        )
    return [warning for warning in warnings if warning]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
