"""Predictions in words: which texts lie nearest to a prediction, and where a rollout wanders.

    texts = readout.texts(data.store)                         # the text of every row, where it is at hand
    picked = choose(measure(model, data.val))                 # best, quartiles and worst by novel rank
    show(nearest(model, data.val, picked["window"], texts), data.val, picked)
    show(rollout(model, data.val, picked["window"], texts), data.val, picked)

A prediction is a vector; a text is only ever the nearest one that the store holds, and its cosine says how near.
Axes: B windows, T context length, D vector dimension, R rows.
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
from ..models import Predictor
from ..ranking import TIE
from ..text import slice as wikipedia
from ..windows import Store, Windows

CREDIT = (  # of the embedded data's text
    "text: authors of English Wikipedia, "
    '<a href="https://creativecommons.org/licenses/by-sa/3.0/">CC BY-SA</a>; shortened where … stands'
)
QUANTILES = {0.0: "best", 0.25: "first quartile", 0.5: "median", 0.75: "third quartile", 1.0: "worst"}
# What HTML, Markdown and MathJax could take for markup. A span of its own keeps $ and \ from opening a formula in a
# rendered notebook, which an entity would not.
ESCAPES = {ord(c): f"&#{ord(c)};" for c in "*_`[]|~#"} | {ord(c): f"<span>&#{ord(c)};</span>" for c in "$\\"}


def texts(store: Store) -> Sequence[str]:
    """The text of every row of a store (M): what it kept, or for the embedded dataset what the gensim wheel holds.

    Raises LVMError where there is none.
    """
    return wikipedia.texts(store) if store.texts is None else store.texts


def choose(frame: pd.DataFrame, count: int = 5) -> pd.DataFrame:
    """Windows to look at that nobody picked by hand: evenly spaced quantiles of the novel rank, best to worst.

    `frame`: what `fivecat.measure` gave, a row a window. Gives a frame: window, novel rank, and `said`, the choice in
    words. Of windows that share a rank the middle one in reading order is taken, from an article not yet taken if
    there is one. Raises LVMError for an empty frame or a count below 1.
    """
    if count < 1 or not len(frame):
        raise LVMError(f"{count} of {len(frame)} windows cannot be chosen; take at least one of at least one")
    rank, article = frame["novel rank"].to_numpy(), frame["article"].to_numpy()
    quantiles = np.linspace(0, 1, min(count, len(frame))) if min(count, len(frame)) > 1 else np.array([0.5])
    taken: list[int] = []
    said = []
    for q in quantiles:
        wanted = np.sort(rank)[int(np.rint(q * (len(rank) - 1)))]
        equal = np.flatnonzero(rank == wanted)
        left = np.setdiff1d(equal, taken)
        other = left[~np.isin(article[left], article[taken])]
        pool = other if len(other) else left
        taken.append(int(pool[(len(pool) - 1) // 2]))
        among = "the only such" if len(equal) == 1 else f"one of {len(equal)} such"
        name = QUANTILES.get(float(q), f"{q:.0%} quantile")
        said.append(f"{name} of {len(rank)} windows by novel rank ({wanted:g}, {among})")
    return pd.DataFrame({"window": taken, "novel rank": rank[taken], "said": said})


def nearest(model: Predictor, windows: Windows, index, texts: Sequence[str], k: int = 3) -> pd.DataFrame:
    """What windows `index` (B,) read, what came, and the `k` texts nearest to the prediction.

    `texts` (M): one for each row of the store. A frame, a row a text, with the columns

        window, role    context (as read), truth, nearest in article, nearest in split
        row, article, position, offset    where it stands; offset: chunks after the target as read, empty in others
        cosine          with the prediction, of two heads the one that ranks
        rank, candidates    by cosine among the article's chunks, the context left out; the model is told the article
        rank in split, candidates in split    the same among all chunks of the split: it is not told
        true            whether this is the target
        text            whole, as it stands in the store's source: not escaped

    Ranks are as in `fivecat.measure`: equal cosines share their mean rank; the context has none. Raises LVMError for
    windows that do not exist, for texts of another number than the store's rows, and where the model predicts NaN.
    """
    index = _checked(windows, index, texts, k)
    store, everywhere = windows.store, windows.store.rows(windows.split)
    cosines = _cosines(_predict(model, windows.batch(index)[0], windows)[1], everywhere, store)  # (B, R)
    found = []
    contexts, targets = windows.context_rows(index), windows.target[index]
    for window, context, target, values in zip(index, contexts, targets, cosines, strict=True):
        cosine = pd.Series(values, everywhere)
        novel = cosine.drop(context)
        inside = novel[store.article[novel.index] == store.article[target]]
        for role, rows in (
            ("context", context),
            ("truth", [target]),
            ("nearest in article", _best(inside, k)),
            ("nearest in split", _best(novel, k)),
        ):
            for row in rows:
                found.append(
                    {
                        **_place(windows, window, role, row),
                        "cosine": float(cosine[row]),
                        "rank": _rank(inside, row),
                        "candidates": len(inside),
                        "rank in split": _rank(novel, row),
                        "candidates in split": len(novel),
                        "true": row == target,
                        "text": texts[row],
                    }
                )
    return pd.DataFrame(found).astype({"offset": "Int64"})


def rollout(model: Predictor, windows: Windows, index, texts: Sequence[str], steps: int = 5) -> pd.DataFrame:
    """A rollout of windows `index` (B,), told in the texts of its article nearest to each step, and what truly came.

    Each step takes the last prediction for the newest chunk; step h foretells the chunk (h − 1)·horizon after the
    target. Columns as in `nearest`, without those of the split, and `step`, from 1; roles: `nearest in article`
    (outside the context that was read) and `truth`, whose row is absent where the article has ended or has a gap.
    Errors as there.
    """
    index = _checked(windows, index, texts, steps)
    store = windows.store
    context = windows.batch(index)[0]
    found: list[list[dict]] = [[] for _ in index]
    for step in range(1, steps + 1):
        unit = _predict(model, context, windows)[0]
        context = torch.cat([context[:, 1:], unit[:, None]], 1)
        for i, (window, read, target) in enumerate(
            zip(index, windows.context_rows(index), windows.target[index], strict=True)
        ):
            rows = np.setdiff1d(np.flatnonzero(store.article == store.article[target]), read)
            inside = pd.Series(_cosines(unit[i : i + 1], rows, store)[0], rows)
            true = target + windows.step * (step - 1) * windows.horizon
            there = true in inside.index and store.position[true] - store.position[target] == true - target
            for role, row in [("nearest in article", _best(inside, 1)[0]), *([("truth", true)] if there else [])]:
                found[i].append(
                    {
                        **_place(windows, window, role, row),
                        "step": step,
                        "cosine": float(inside[row]),
                        "rank": _rank(inside, row),
                        "candidates": len(inside),
                        "true": bool(there and row == true),
                        "text": texts[row],
                    }
                )
    return pd.DataFrame([row for rows in found for row in rows]).astype({"offset": "Int64"})


def _checked(windows: Windows, index, texts: Sequence[str], count: int) -> np.ndarray:
    """`index` as (B,) integers. Raises LVMError on what the functions above cannot use."""
    index = np.atleast_1d(np.asarray(index))
    if index.ndim != 1 or not len(index) or not np.issubdtype(index.dtype, np.integer):
        raise LVMError(f"windows are named by whole numbers, at least one; got {index.tolist()!r}")
    if index.min() < 0 or index.max() >= len(windows):
        raise LVMError(f"split {windows.split} has windows 0 to {len(windows) - 1}; got {index.tolist()}")
    if len(texts) != len(windows.store.vectors):
        raise LVMError(
            f"{windows.store.name} has {len(windows.store.vectors)} rows, but {len(texts)} texts were given; "
            "take them from readout.texts(store)"
        )
    if count < 1:
        raise LVMError(f"at least one text or step is needed, not {count}")
    return index


@torch.no_grad()
def _predict(model: Predictor, context: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Unit predictions and ranking predictions (B, D) on the CPU. Raises LVMError where they are not finite."""
    device = next(t.device for t in (*model.parameters(), *model.buffers()))
    training = model.training
    unit, ranker = (head.cpu() for head in model.eval().heads(context.to(device))[1:])
    model.train(training)
    if not bool(unit.isfinite().all() and ranker.isfinite().all()):
        raise LVMError(f"the model predicts NaN or infinite values on split {windows.split}; look at its weights")
    return unit, ranker


def _cosines(unit: Tensor, rows: np.ndarray, store: Store) -> np.ndarray:
    """(B, R) cosines of unit vectors (B, D) with the store's `rows` (R,)."""
    blocks = (rows[first : first + 65536] for first in range(0, len(rows), 65536))  # a split may be larger than memory
    return torch.cat(
        [unit @ F.normalize(torch.from_numpy(store.vectors[b]).float(), dim=-1).T for b in blocks], 1
    ).numpy()


def _best(cosine: pd.Series, k: int) -> list[int]:
    """The `k` rows of the highest cosine; of equal ones the first in reading order."""
    return cosine.sort_values(ascending=False, kind="stable").index[:k].tolist()


def _rank(cosine: pd.Series, row: int) -> float:
    """Rank of `row` among the candidates, equal cosines sharing their mean rank; NaN if it is not one of them."""
    if row not in cosine.index:
        return float("nan")
    own = cosine[row]
    return float(1 + (cosine > own + TIE).sum() + (((cosine - own).abs() <= TIE).sum() - 1) / 2)


def _place(windows: Windows, window: int, role: str, row: int) -> dict:
    """Where a row stands, seen from a window."""
    store, target = windows.store, int(windows.target[window])
    same = store.article[row] == store.article[target]
    return {
        "window": int(window),
        "role": role,
        "row": int(row),
        "article": int(store.article[row]),
        "position": int(store.position[row]),
        "offset": windows.step * (int(store.position[row]) - int(store.position[target])) if same else None,
    }


# --- for a page ------------------------------------------------------------------------------------------------------


def shorten(text: str, width: int = 160) -> str:
    """At most `width` characters on one line, cut at the end of a word, with an ellipsis if anything is left out.

    Control characters go (lone surrogates, changes of direction); the joiners that scripts need stay.
    """
    text = "".join(c for c in " ".join(text.split()) if c.isprintable() or c in "\u200c\u200d")
    if len(text) <= width:
        return text
    head = text[: width - 1]
    if text[width - 1] != " " and " " in head[width // 2 :]:  # a word longer than half the width is cut within
        head = head[: head.rindex(" ")]
    return head.rstrip(" .,;:–—-(") + "…"


def escape(text: str) -> str:
    """Text that nobody vouches for, as HTML that shows it letter by letter, in Markdown and beside MathJax too."""
    return html.escape(text).replace("&#x27;", "&apos;").translate(ESCAPES)  # &apos;: its # would be escaped again


def show(found: pd.DataFrame, windows: Windows, choice: pd.DataFrame | None = None, width: int = 160) -> HTML:
    """What `nearest` or `rollout` found as a page for a notebook: a table a window, plain HTML without colours, every
    text escaped and cut to `width` characters.

    `windows`: those that were asked; `choice`: what `choose` gave, told in the captions. The string is in `.data`.
    """
    said = {} if choice is None else dict(zip(choice["window"], choice["said"], strict=True))
    page = [_table(part, windows, said.get(window, ""), width) for window, part in found.groupby("window", sort=False)]
    if windows.store.datasheet.get("source_sha256") == wikipedia.SLICE_SHA256:
        page.append(f"<p><small>{CREDIT}</small></p>")
    return HTML("".join(page))  # no line breaks: an empty line would end the HTML where Markdown is read


LEFT = 'style="text-align: left; vertical-align: top"'
RIGHT = 'style="text-align: right; vertical-align: top"'
TEXT = 'dir="auto" style="text-align: left; vertical-align: top; overflow-wrap: anywhere"'


def _table(found: pd.DataFrame, windows: Windows, said: str, width: int) -> str:
    """One window's table; a heading for each role, or each step. What would be told twice is told once."""
    store, window = windows.store, int(found["window"].iloc[0])
    read, target = windows.context_rows([window])[0], windows.target[window]
    caption = (
        f"<b>{_title(store, store.article[target])}</b>: chunks {store.position[read[0]]} to "
        f"{store.position[read[-1]]} read, chunk {store.position[target]} foretold" + f"; {escape(said)}" * bool(said)
    )
    rolled = "step" in found
    body, told = [], {}  # row: the step that told its text
    for _, part in found.groupby("step" if rolled else "role", sort=False):
        first = part.iloc[0]
        if first["role"] == "nearest in split":
            others = found["row"][found["role"] == "nearest in article"]
            if part["row"].tolist() == others.tolist():
                body.append(f'<tr><th colspan="4" {LEFT}>{_heading(part, windows)}: the same</th></tr>')
                continue
        body.append(f'<tr><th colspan="4" {LEFT}>{_heading(part, windows)}</th></tr>')
        for row in part.to_dict("records"):
            if rolled and row["role"] == "truth" and first["true"]:
                continue  # it is the nearest one
            marks = {
                "nearest": rolled and row["role"] != "truth",
                "true": row["true"] and (rolled or row["role"] != "truth"),
                "skipped": not pd.isna(row["offset"]) and -windows.horizon < row["offset"] < 0,
            }
            chunk = ", ".join([str(row["position"]), *(mark for mark, holds in marks.items() if holds)])
            text = escape(shorten(row["text"], width))
            rank = row["rank"]
            if row["role"] == "nearest in split":
                text, rank = f"<i>{_title(store, row['article'])}</i>: {text}", row["rank in split"]
            elif rolled and told.setdefault(row["row"], row["step"]) != row["step"]:
                text = f"(as at step {told[row['row']]})"
            body.append(
                f"<tr><td {LEFT}>{chunk}</td><td {RIGHT}>{row['cosine']:.2f}</td>"
                f"<td {RIGHT}>{'' if np.isnan(rank) else f'{rank:g}'}</td><td {TEXT}>{text}</td></tr>"
            )
    head = f"<tr><th {LEFT}>chunk</th><th {RIGHT}>cosine</th><th {RIGHT}>rank</th><th {LEFT}>text</th></tr>"
    return f"<table><caption {LEFT}>{caption}</caption><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def _heading(part: pd.DataFrame, windows: Windows) -> str:
    """What the rows of one role, or of one step, are; ranks beside what chance gives."""
    row = part.iloc[0]
    if "step" in part:
        over = "" if (part["role"] == "truth").any() else "; nothing true to show: the article has ended or has a gap"
        return f"step {row['step']}, of {row['candidates']} chunks{over}"
    article, split = "the article", f"all of {windows.split}"
    if row["role"] == "truth":
        ranks = (
            f"{row[f'rank{key}']:g} of {row[f'candidates{key}']} in {place} "
            f"(by chance {(row[f'candidates{key}'] + 1) / 2:g})"
            for key, place in (("", article), (" in split", split))
        )
        return f"true, {windows.horizon} after the last one read: rank {', '.join(ranks)}"
    return {
        "context": "read",
        "nearest in article": f"nearest in {article}, of {row['candidates']} chunks not read",
        "nearest in split": f"nearest in {split}, of {row['candidates in split']} chunks not read",
    }[row["role"]]


def _title(store: Store, article: int) -> str:
    """An article's title, escaped, or its number where it has none."""
    return escape(shorten(str(store.articles.at[article, "title"]), 80)) or f"article {article}"
