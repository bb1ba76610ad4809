"""Write the datasheet of a built store: how it was made, its counts, its splits, and warnings."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from importlib import metadata

import numpy as np

from ..data import splits
from ..data.store import sha256_file
from ..windows import SPLITS
from .sources import KINDS
from .stage import Built
from .tables import warn_of_order, warn_of_titles

TEXT_PACKAGES = ("sentence-transformers", "transformers", "tokenizers", "torch", "sentencex", "datasketch", "numpy")
QUARTILES = ("shortest", "quartile", "median", "third quartile", "longest")
UNITS = {
    "paragraph": ("Paragraphs", "a paragraph: text between blank lines, its whitespace made single spaces"),
    "sentence": ("Sentences", "a sentence, as sentencex splits a paragraph"),
    "tokens": ("Windows of tokens", "a window of {tokens} tokens of the encoder, {overlap} of them in the next, too"),
}


def datasheet(recipe: dict, kind: str, built: Built, dimension: int, split: np.ndarray) -> dict:
    """Return the datasheet; the same for the same build. `split` (A,) strings."""
    size = np.bincount(built.chunks[:, 0], minlength=len(split))
    tally = {"articles": size > 0, "usable_articles": size >= splits.USABLE, "chunks": size}
    longest = [built.titles[a] for a in np.argsort(-size, kind="stable") if split[a] == "ood"]
    ready = "vectors" in recipe
    what = "Ready vectors of {}" if ready else f"{UNITS[recipe['unit']][0]} of {{}} as unit vectors"
    sheet: dict = {
        "description": f"{what.format(recipe['source'])}, in reading order.",
        "source": recipe["source"] + (f", config {recipe['config']}" if recipe["config"] else ""),
        "source_fingerprint": recipe["source_fingerprint"],
    }
    if built.texts is not None:
        sheet["text_sha256"] = sha256_file(built.texts.path)
    sheet |= KINDS[kind].datasheet
    if ready:
        sheet["encoder"] = "not known: the vectors came with the source; made unit, stored as float16"
        sheet["dimension"] = int(dimension)
    else:
        how = f"frozen; computed in {recipe['precision']}, normalised, stored as float16."
        limit = f" It reads the first {built.limit} tokens of a chunk." if built.limit else ""
        sheet["encoder"] = f"{recipe['encoder']}, {how}{limit}"
        sheet["encoder_revision"] = recipe["encoder_revision"]
        sheet["dimension"] = int(dimension)
        sheet["chunks"] = _describe_chunks(recipe)
    sheet["counts"] = built.counts
    lengths = {} if built.texts is None else {"characters": [len(text) for text in built.texts]}
    lengths |= {"tokens": built.tokens} if built.tokens is not None and built.tokens.any() else {}
    if lengths:
        quartiles = {what: np.quantile(v, [0, 0.25, 0.5, 0.75, 1], method="nearest") for what, v in lengths.items()}
        sheet["lengths"] = {what: dict(zip(QUARTILES, q.tolist(), strict=True)) for what, q in quartiles.items()}
    if warnings := _warnings(recipe, built, split):
        sheet["warnings"] = warnings
    return sheet | {
        "split_rule": splits.rule(recipe["ood"]),
        "split": {s: {k: int(v[split == s].sum()) for k, v in tally.items()} for s in SPLITS},
        "ood_articles": f"{len(longest)}; the longest: {', '.join(longest[:12])}",
        "packages": _versions([*(("pyarrow", "numpy") if ready else TEXT_PACKAGES), *KINDS[kind].packages]),
        "build": recipe,
    }


def _describe_chunks(recipe: dict) -> str:
    longest = f", at most {recipe['longest']}" if recipe["longest"] else ""
    common = f"chunks in {recipe['boilerplate']} or more articles, " if recipe["boilerplate"] else ""
    near = f", near-duplicates (Jaccard {recipe['near_duplicates']})" if recipe["near_duplicates"] else ""
    return (
        f"A chunk is {UNITS[recipe['unit']][1].format(**recipe)}; at least {recipe['shortest']} characters{longest}. "
        f"Left out: {common}repeats{near}. They leave no gap: the chunks before and behind count as neighbours."
    )


def _warnings(recipe: dict, built: Built, split: np.ndarray) -> list[str]:
    article, texts, warnings = built.chunks[:, 0], built.texts, [warn_of_order(built.counts)]
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


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the version of each package that is installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
