"""Predictions in words: the texts nearest to a prediction, and to each step of a rollout.

A prediction is a vector; its text is the nearest one in the store, with the cosine.
Axes: B windows, D vector dimension, R rows.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import HTML
from torch import Tensor

from ..errors import LVMError
from ..evaluate import evaluating
from ..models import Predictor, device_of
from ..ranking import TIE
from ..text import slice as wikipedia
from ..windows import Store, Windows

CREDIT = (  # of the embedded data's text
    "text: authors of English Wikipedia, "
    '<a href="https://creativecommons.org/licenses/by-sa/3.0/">CC BY-SA</a>; shortened where … stands'
)
QUANTILES = {0.0: "best", 0.25: "first quartile", 0.5: "median", 0.75: "third quartile", 1.0: "worst"}
# What HTML, Markdown and MathJax could take for markup. Only a span keeps $ and \ from opening a formula.
ESCAPES = {ord(c): f"&#{ord(c)};" for c in "*_`[]|~#"} | {ord(c): f"<span>&#{ord(c)};</span>" for c in "$\\"}


def texts(store: Store) -> Sequence[str]:
    """Return the text of every row of a store (M): its own, or for the embedded dataset that of the gensim wheel.

    Raises LVMError if there is none.
    """
    return wikipedia.texts(store) if store.texts is None else store.texts


def choose(frame: pd.DataFrame, count: int = 5) -> pd.DataFrame:
    """Return windows at even quantiles of the novel rank, best to worst: window, novel rank, `choice` in words.

    `frame`: what `fivecat.measure` gave, a row a window. Of windows with the same rank it takes the middle one in
    reading order, from another article if there is one. One window alone is the median.
    """
    rank, article = np.asarray(frame["novel rank"]), np.asarray(frame["article"])
    count = min(count, len(rank))
    chosen, choice = [], []
    for q in np.linspace(0, 1, count) if count > 1 else [0.5]:
        wanted = np.sort(rank)[int(np.rint(q * (len(rank) - 1)))]
        equal = np.flatnonzero(rank == wanted)
        left = np.setdiff1d(equal, chosen)
        other = left[~np.isin(article[left], article[chosen])] if chosen else left
        pool = other if len(other) else left
        chosen.append(int(pool[(len(pool) - 1) // 2]))
        among = "the only such" if len(equal) == 1 else f"one of {len(equal)} such"
        name = QUANTILES.get(float(q), f"{q:.0%} quantile")
        choice.append(f"{name} of {len(rank)} windows by novel rank ({wanted:g}, {among})")
    return pd.DataFrame({"window": chosen, "novel rank": rank[chosen], "choice": choice})


def nearest(model: Predictor, windows: Windows, index, texts: Sequence[str], k: int = 3) -> pd.DataFrame:
    """Return the contexts and targets of windows `index` (B,), and the `k` texts nearest to each prediction.

    `texts` (M): one for each row of the store. A frame, a row a text, with the columns

        window, role    context (in reading order), truth, nearest in article, nearest in split
        row, article, position, offset    its place; offset: chunks after the target as read, empty in other articles
        cosine          with the prediction (with several heads, the one that ranks)
        rank, candidates    by cosine among the article's chunks, the context left out (equal cosines: mean rank)
        rank in split, candidates in split    the same among all chunks of the split
        true            whether this is the target
        text            whole and not escaped

    Raises LVMError for a model that gives NaN.
    """
    index = np.atleast_1d(index)
    store, rows = windows.store, []
    split = store.rows(windows.split)
    cosines = _cosines(_predict(model, windows.batch(index)[0], windows)[1], split, store)  # (B, R)
    contexts, targets = windows.context_rows(index), windows.target_rows(index)
    for window, context, target, values in zip(index, contexts, targets, cosines, strict=True):
        cosine = pd.Series(values, split)
        novel = cosine.drop(context)
        inside = novel[store.article[novel.index] == store.article[target]]
        near, far = inside.nlargest(k).index, novel.nlargest(k).index  # of equal ones the first in reading order
        roles = {"context": context, "truth": [target], "nearest in article": near, "nearest in split": far}
        for role, row in ((role, row) for role, members in roles.items() for row in members):
            found = _row(windows, window, role, row, inside) | {"true": row == target, "text": texts[row]}
            found |= {"rank in split": _rank(novel, row), "candidates in split": len(novel)}
            rows.append(found | {"cosine": float(cosine[row])})
    return pd.DataFrame(rows).astype({"offset": "Int64"})


def rollout(model: Predictor, windows: Windows, index, texts: Sequence[str], steps: int = 5) -> pd.DataFrame:
    """Return a rollout of windows `index` (B,) in the texts of its article nearest to each step, and the true ones.

    Each step takes the last prediction for the newest chunk; step h predicts the chunk (h − 1)·horizon after the
    target. Columns as in `nearest`, without those of the split, and `step`, from 1. Roles: `nearest in article`
    (outside the first context) and `truth`, which has no row after the article's end or in a gap. Errors as there.
    """
    index = np.atleast_1d(index)
    store, rows, context = windows.store, [[] for _ in index], windows.batch(index)[0]
    contexts, targets = windows.context_rows(index), windows.target_rows(index)
    for step in range(1, steps + 1):
        unit = _predict(model, context, windows)[0]
        context = torch.cat([context[:, 1:], unit[:, None]], 1)
        for i, (window, read, target) in enumerate(zip(index, contexts, targets, strict=True)):
            candidates = np.setdiff1d(np.flatnonzero(store.article == store.article[target]), read)
            inside = pd.Series(_cosines(unit[i : i + 1], candidates, store)[0], candidates)
            true = target + windows.step * (step - 1) * windows.horizon
            exists = true in inside.index and store.position[true] - store.position[target] == true - target
            for role, row in [("nearest in article", inside.idxmax()), *([("truth", true)] if exists else [])]:
                found = _row(windows, window, role, row, inside) | {"step": step, "text": texts[row]}
                rows[i].append(found | {"true": bool(exists and row == true)})
    return pd.DataFrame([row for part in rows for row in part]).astype({"offset": "Int64"})


@torch.no_grad()
def _predict(model: Predictor, context: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Return unit and ranking predictions (B, D) on the CPU. Raises LVMError if they are not finite."""
    with evaluating(model):
        unit, ranker = (head.cpu() for head in model.heads(context.to(device_of(model)))[1:])
    if not bool(unit.isfinite().all() and ranker.isfinite().all()):
        raise LVMError(f"the model predicts NaN or infinite values on split {windows.split}; look at its weights")
    return unit, ranker


def _cosines(unit: Tensor, rows: np.ndarray, store: Store) -> np.ndarray:
    """Return (B, R) cosines of unit vectors (B, D) with the store's `rows` (R,)."""
    blocks = np.split(rows, range(65536, len(rows), 65536))  # a split may be larger than memory
    units = (F.normalize(torch.from_numpy(store.vectors[block]).float(), dim=-1) for block in blocks)
    return torch.cat([unit @ x.T for x in units], 1).numpy()


def _rank(cosine: pd.Series, row: int) -> float:
    """Return the rank of `row` among the candidates, equal cosines sharing their mean rank; NaN if it is none."""
    if row not in cosine.index:
        return float("nan")
    gap = cosine - cosine[row]
    return float(((gap > TIE).sum() + (gap >= -TIE).sum() + 1) / 2)


def _row(windows: Windows, window: int, role: str, row: int, inside: pd.Series) -> dict:
    """Return the place of a row as seen from a window, and its rank among the cosines `inside` its article."""
    store, target = windows.store, int(windows.target_rows([window])[0])
    article, position = int(store.article[row]), int(store.position[row])
    offset = windows.step * (position - int(store.position[target])) if article == store.article[target] else None
    place = {"row": int(row), "article": article, "position": position, "offset": offset}
    ranked = {"cosine": float(inside.get(row, np.nan)), "rank": _rank(inside, row), "candidates": len(inside)}
    return {"window": int(window), "role": role} | place | ranked


# Pages


def shorten(text: str, width: int = 160) -> str:
    """Return at most `width` characters on one line, cut at the end of a word, with an ellipsis if it is cut.

    Drops control characters (lone surrogates, changes of direction), but not the joiners that scripts need.
    """
    text = "".join(c for c in " ".join(text.split()) if c.isprintable() or c in "\u200c\u200d")
    if len(text) <= width:
        return text
    head = text[: width - 1]
    if text[width - 1] != " " and " " in head[width // 2 :]:  # a word longer than half the width is cut within
        head = head[: head.rindex(" ")]
    return head.rstrip(" .,;:–—-(") + "…"


def escape(text: str) -> str:
    """Return untrusted text as HTML that shows it letter by letter, in Markdown and beside MathJax too."""
    return html.escape(text).replace("&#x27;", "&apos;").translate(ESCAPES)  # &apos;: its # would be escaped again


def credit(store: Store) -> str:
    """Return the credit for the embedded dataset's texts as HTML, empty for other stores."""
    embedded = store.datasheet.get("source_sha256") == wikipedia.SLICE_SHA256
    return f"<p><small>{CREDIT}</small></p>" if embedded else ""


def show(found: pd.DataFrame, windows: Windows, choice: pd.DataFrame | None = None, width: int = 160) -> HTML:
    """Return the result of `nearest` or `rollout` as plain HTML: a table a window, texts escaped and cut to `width`.

    `windows`: those of the result; `choice`: what `choose` gave, for the captions. The string is in `.data`.
    """
    choices = {} if choice is None else dict(zip(choice["window"], choice["choice"], strict=True))
    tables = [_table(part, windows, choices.get(w, ""), width) for w, part in found.groupby("window", sort=False)]
    return HTML("".join(tables) + credit(windows.store))


LEFT, RIGHT = (f'style="text-align: {side}; vertical-align: top"' for side in ("left", "right"))
CHUNK = 'style="text-align: left; vertical-align: top; white-space: nowrap"'
TEXT = 'dir="auto" style="text-align: left; vertical-align: top; overflow-wrap: anywhere"'


def html_row(chunk: str, numbers: Sequence[str], text: str) -> str:
    """Return a table's row: a chunk, numbers about it, and its text, all as HTML."""
    cells = "".join(f"<td {RIGHT}>{number}</td>" for number in numbers)
    return f"<tr><td {CHUNK}>{chunk}</td>{cells}<td {TEXT}>{text}</td></tr>"


def html_table(caption: str, columns: Sequence[str], parts: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return a table of (heading, rows), without line breaks: an empty line would end HTML in Markdown."""
    first, *numbers, last = columns
    head = "".join(f"<th {RIGHT}>{name}</th>" for name in numbers)
    body = "".join(
        f'<tr><th colspan="{len(columns)}" {LEFT}>{heading}</th></tr>{"".join(rows)}' for heading, rows in parts
    )
    return (
        f"<table><caption {LEFT}>{caption}</caption><thead><tr><th {LEFT}>{first}</th>{head}<th {LEFT}>{last}</th>"
        f"</tr></thead><tbody>{body}</tbody></table>"
    )


def _table(found: pd.DataFrame, windows: Windows, choice: str, width: int) -> str:
    """Return one window's table with a heading for each role, or each step. No text is shown twice."""
    store, window, rolled = windows.store, int(found["window"].iloc[0]), "step" in found
    read, target = windows.context_rows([window])[0], windows.target[window]
    chunks = f"chunks {store.position[read[0]]} to {store.position[read[-1]]} read"
    caption = f"<b>{title(store, store.article[target])}</b>: {chunks}, chunk {store.position[target]} predicted"
    caption += f"; {escape(choice)}" * bool(choice)
    parts, shown = [], {}  # row: the step that showed its text
    for _, part in found.groupby("step" if rolled else "role", sort=False):
        others = found["row"][found["role"] == "nearest in article"].tolist()
        same = part["role"].iloc[0] == "nearest in split" and part["row"].tolist() == others
        rows = []
        for row in [] if same else part.to_dict("records"):
            if rolled and row["role"] == "truth" and part["true"].iloc[0]:
                continue  # it is the nearest one
            text, rank = escape(shorten(row["text"], width)), row["rank"]
            if row["role"] == "nearest in split":
                text, rank = f"<i>{title(store, row['article'])}</i>: {text}", row["rank in split"]
            elif rolled and shown.setdefault(row["row"], row["step"]) != row["step"]:
                text = f"(as at step {shown[row['row']]})"
            numbers = f"{row['cosine']:.2f}", "" if np.isnan(rank) else f"{rank:g}"
            rows.append(html_row(_chunk(row, windows, rolled), numbers, text))
        parts.append((_heading(part, windows) + ": the same" * same, rows))
    return html_table(caption, ("chunk", "cosine", "rank", "text"), parts)


def _chunk(row: dict, windows: Windows, rolled: bool) -> str:
    """Return a chunk's position, and what is special about it."""
    marks = {
        "nearest": rolled and row["role"] != "truth",
        "true": row["true"] and (rolled or row["role"] != "truth"),
        "skipped": not pd.isna(row["offset"]) and -windows.horizon < row["offset"] < 0,
    }
    return ", ".join([str(row["position"]), *(mark for mark, holds in marks.items() if holds)])


def _heading(part: pd.DataFrame, windows: Windows) -> str:
    """Return what the rows of one role, or of one step, are; ranks beside chance."""
    row, split = part.iloc[0], f"all of {windows.split}"
    if "step" in part:
        over = "" if (part["role"] == "truth").any() else "; no true chunk: the article has ended or has a gap"
        return f"step {row['step']}, of {row['candidates']} chunks{over}"
    if row["role"] == "context":
        return "read"
    if row["role"] == "truth":
        inside = f"{row['rank']:g} of {row['candidates']} in the article (by chance {(row['candidates'] + 1) / 2:g})"
        number = row["candidates in split"]
        anywhere = f"{row['rank in split']:g} of {number} in {split} (by chance {(number + 1) / 2:g})"
        return f"true, {windows.horizon} after the last one read: rank {inside}, {anywhere}"
    if row["role"] == "nearest in article":
        return f"nearest in the article, of {row['candidates']} chunks not read"
    return f"nearest in {split}, of {row['candidates in split']} chunks not read"


def title(store: Store, article: int) -> str:
    """Return an article's title, escaped, or its number if it has none."""
    return escape(shorten(str(store.articles.at[article, "title"]), 80)) or f"article {article}"
