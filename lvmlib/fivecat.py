"""5CAT, the 5→1 causal alignment test (handbook §4): five gates, with chance levels and intervals over articles.

Axes: N windows, B batch, T context length, D vector dimension, K offsets, H rollout steps.

The gates are the original's, except that the target stands at offset 0 and a rollout step is compared with the chunk
that it foretells (the original read its margin and its rollout one step late, §4.1 point 5; its margin is kept as
`margin read late`, since the published figures are that one).

`measure` gives a frame with one row a window and plain numbers only; everything else is a summary of that frame.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import LVMError
from .models import Predictor
from .statistics import chance_recall, chance_reciprocal_rank, over_articles
from .training import write_whole
from .vectors import Dataset, Windows

OFFSETS = tuple(range(-3, 4))  # of the sweep, in chunks around the target
STEPS = 5  # of the rollout
TIE = 1e-6  # cosines nearer than this are equal: a float32 product rounds by its shape
NORMAL_COHERENCE = (0.45, 0.55)
ABLATIONS = ("shuffled", "reversed", "leave one out", "last repeated", "last replaced")
GATES = {"A": "offset sweep", "B": "retrieval rank", "C": "context ablations", "D": "rollout", "E": "bins delta"}

# (gate, measure): (sense, threshold on validation, threshold on OOD); handbook §4
THRESHOLDS = {
    ("A", "margin"): (">=", 0.10, 0.08),
    ("A", "cosine at the target"): (">=", 0.50, 0.48),
    ("B", "R@1"): (">=", 0.55, 0.55),
    ("B", "R@5"): (">=", 0.92, 0.92),
    ("C", "shuffled"): ("<=", -0.15, -0.15),
    ("C", "reversed"): ("<=", -0.10, -0.10),
    ("C", "leave one out"): ("<=", -0.08, -0.08),
    ("C", "last repeated"): ("<=", 0.05, 0.05),
    ("C", "last replaced"): ("<=", 0.05, 0.05),
    ("D", "mean cosine"): (">=", 0.45, 0.42),
    ("E", "difference"): ("<=", 0.05, 0.05),
}


@dataclass(frozen=True, eq=False)
class Report:
    """What `fivecat` found.

    `table`: a row for each split, predictor and measure: split, predictor, gate, measure, value, low, high (95 %
    over articles), chance, threshold, passed (empty without a threshold), windows, articles. `frames`: what
    `measure` gave, by (split, predictor).
    """

    table: pd.DataFrame
    frames: dict[tuple[str, str], pd.DataFrame]

    def value(self, measure: str, split: str = "val", predictor: str = "model", gate: str | None = None) -> float:
        rows = self.rows(split, predictor)
        rows = rows[(rows["measure"] == measure) & ((rows["gate"] == gate) | (gate is None))]
        return float(rows["value"].iloc[0])

    def rows(self, split: str, predictor: str = "model") -> pd.DataFrame:
        return self.table[(self.table["split"] == split) & (self.table["predictor"] == predictor)]

    def gates(self, split: str | None = None, predictor: str = "model") -> dict[str, bool]:
        """Which gates a predictor passes on `split`: those whose every threshold holds. E compares both splits.

        None: on validation and on OOD alike, which is what counts as passing. Raises LVMError for what was not
        measured.
        """
        if split is None:
            val, ood = self.gates("val", predictor), self.gates("ood", predictor)
            return {gate: val[gate] and ood[gate] for gate in GATES}
        judged = self.table[
            (self.table["predictor"] == predictor)
            & self.table["threshold"].notna()
            & self.table["split"].isin([split, "both"])
        ]
        if not (judged["split"] == split).any():
            raise LVMError(f"5CAT holds no {predictor!r} on split {split!r}")
        return {gate: bool(judged["passed"][judged["gate"] == gate].fillna(False).all()) for gate in GATES}

    def to_json(self, path: str | os.PathLike, **more) -> None:
        """Write the table and `more` facts (plain dicts, lists, numbers, text); NaN becomes null."""
        content = _without_nan({**more, "table": self.table.astype(object).to_dict("records")})
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_whole(Path(path), lambda partial: Path(partial).write_text(text, encoding="utf-8"))


def _without_nan(value):
    if isinstance(value, Mapping):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if value is pd.NA or (isinstance(value, float) and math.isnan(value)) else value


def fivecat(model: Predictor, data: Dataset, compare: Mapping[str, Predictor] | None = None) -> Report:
    """5CAT of `model`, and of every predictor in `compare` on the very same windows, on validation and OOD."""
    if "model" in (compare or {}):
        raise LVMError("a predictor to compare with cannot be called 'model'; rename it")
    frames, rows = {}, []
    predictors = {"model": model, **(compare or {})}
    for name, predictor in predictors.items():
        for windows in (data.val, data.ood):
            frame = frames[windows.split, name] = measure(predictor, windows)
            rows += [{"split": windows.split, "predictor": name, **row} for row in summarise(frame)]
        rows.append({"split": "both", "predictor": name, **bins_delta(frames["val", name], frames["ood", name])})
    table = pd.DataFrame(rows)
    judged = [_judge(r) for r in table.to_dict("records")]
    table["threshold"], table["passed"] = [j[0] for j in judged], pd.array([j[1] for j in judged], "boolean")
    return Report(table, frames)


@torch.no_grad()
def measure(
    model: Predictor, windows: Windows, rollout_late: bool = False, seed: int = 0, batch_size: int = 512
) -> pd.DataFrame:
    """Every figure of every window, batch by batch; a frame of N rows:

    article, cosine (at the target), cosine_article (mean over the article's chunks outside the context: what knowing
    the article alone gives), margin last and six rank (the mini-5CAT's: against the last context vector, and among
    target and context), offset k (cosine k chunks from the target; NaN outside the article), rank and candidates (among
    the article's chunks), novel rank and novel candidates (context left out), one column an ablation (change of the
    cosine at the target), rollout h and rollout chance h (NaN outside the article), coherence of the context.

    A rollout step takes the last prediction for the newest chunk, so step h foretells the chunk (h − 1)·horizon after
    the target. `rollout_late` compares it with the chunk h after the target, as the original did. Equal cosines share
    their mean rank. Raises LVMError where the model predicts NaN.
    """
    store, length = windows.store, windows.context_length
    device = next(t.device for t in (*model.parameters(), *model.buffers()))
    training = model.training
    model.eval()
    vectors = torch.from_numpy(store.vectors).to(device)
    begins = np.flatnonzero(np.diff(store.article, prepend=store.article[0] - 1))
    ends = np.append(begins[1:], len(store.article))
    run = np.searchsorted(begins, windows.target, side="right") - 1  # (N,) which article's run
    permutations = np.random.default_rng(seed).random((len(windows), length)).argsort(1)
    parts = []
    for first in range(0, len(windows), batch_size):
        index = np.arange(first, min(first + batch_size, len(windows)))
        context, target = windows.batch(index, vectors)
        rows, low, high = windows.target[index], begins[run[index]], ends[run[index]]
        unit = model(context)[1]
        if not bool(unit.isfinite().all()):
            raise LVMError(
                f"the model predicts NaN or infinite values on split {windows.split} (from window {first} on); "
                "look at its weights and at the context vectors"
            )
        cosine = F.cosine_similarity(unit, target, dim=-1)  # (B,)
        columns = {"article": torch.from_numpy(store.article[rows]), "cosine": cosine}
        to_context = F.cosine_similarity(unit[:, None], context, dim=-1)  # (B, T)
        columns |= {"margin last": cosine - to_context[:, -1], "six rank": 1 + (to_context > cosine[:, None]).sum(1)}
        columns |= {
            f"offset {k:+d}": c
            for k, c in zip(OFFSETS, _cosines_at(unit, rows, OFFSETS, low, high, store, vectors).unbind(1), strict=True)
        }
        columns |= _retrieval(unit, rows, windows.start[index], length, low, high, vectors)
        for name, variants in ablated(context, torch.from_numpy(permutations[index]).to(device)).items():
            changed = torch.stack([F.cosine_similarity(model(v)[1], target, dim=-1) for v in variants])
            columns[name] = changed.mean(0) - cosine
        rolling, rolled = context, unit
        for h in range(1, STEPS + 1):
            at = h if rollout_late else (h - 1) * windows.horizon
            columns[f"rollout {h}"] = _cosines_at(rolled, rows, (at,), low, high, store, vectors)[:, 0]
            columns[f"rollout chance {h}"] = _article_cosine(rolled, windows.start[index], length, low, high, vectors)
            if h < STEPS:
                rolling = torch.cat([rolling[:, 1:], rolled[:, None]], 1)
                rolled = model(rolling)[1]
        columns["cosine_article"] = columns["rollout chance 1"]
        columns["coherence"] = F.cosine_similarity(context[:, 1:], context[:, :-1], dim=-1).mean(1)
        parts.append(pd.DataFrame({k: np.asarray(c.cpu()) for k, c in columns.items()}))
    model.train(training)
    return pd.concat(parts, ignore_index=True)


def ablated(context: Tensor, permutation: Tensor) -> dict[str, list[Tensor]]:
    """The contexts (B, T, D) of each ablation, as the original made them; `permutation` (B, T) is the shuffle.

    Leave one out drops a vector and repeats the last at the end, for each position; `last replaced` puts the first
    vector in the last place (the original calls it cross_article).
    """
    length = context.shape[1]
    without = [[i for i in range(length) if i != out] + [length - 1] for out in range(length)]
    return {
        "shuffled": [context.gather(1, permutation[..., None].expand_as(context))],
        "reversed": [context.flip(1)],
        "leave one out": [context[:, order] for order in without],
        "last repeated": [context[:, -1:].expand_as(context)],
        "last replaced": [torch.cat([context[:, :-1], context[:, :1]], 1)],
    }


def _cosines_at(
    unit: Tensor, rows: np.ndarray, offsets, low: np.ndarray, high: np.ndarray, store, vectors: Tensor
) -> Tensor:
    """(B, K) cosines with the chunks `offsets` away from `rows`; NaN outside the article and across a gap in it."""
    at = rows[:, None] + np.asarray(offsets)
    inside = (at >= low[:, None]) & (at < high[:, None])
    at = np.where(inside, at, rows[:, None])
    inside &= store.position[at] - store.position[rows][:, None] == at - rows[:, None]
    cosines = F.cosine_similarity(unit[:, None], vectors[torch.from_numpy(at).to(unit.device)].float(), dim=-1)
    return cosines.masked_fill(~torch.from_numpy(inside).to(unit.device), float("nan"))


def _retrieval(unit: Tensor, rows, start, length: int, low, high, vectors: Tensor) -> dict[str, Tensor]:
    """Rank of each target among its article's chunks, one product an article; with the context and without it."""
    out = {
        k: torch.empty(len(unit), dtype=torch.float64) for k in ("rank", "candidates", "novel rank", "novel candidates")
    }
    for begin in np.unique(low):
        mine = np.flatnonzero(low == begin)
        end = high[mine[0]]
        chunks = F.normalize(vectors[begin:end].float(), dim=-1)
        cosines = (unit[torch.from_numpy(mine).to(unit.device)] @ chunks.T).cpu()  # (windows, chunks)
        own = cosines[torch.arange(len(mine)), torch.from_numpy(rows[mine] - begin)][:, None]
        above, equal = cosines > own + TIE, (cosines - own).abs() <= TIE
        place = torch.arange(begin, end)[None] - torch.from_numpy(start[mine])[:, None]
        outside = (place < 0) | (place >= length)
        out["rank"][mine] = 1 + above.sum(1) + (equal.sum(1) - 1).double() / 2
        out["candidates"][mine] = float(end - begin)
        out["novel rank"][mine] = 1 + (above & outside).sum(1) + ((equal & outside).sum(1) - 1).double() / 2
        out["novel candidates"][mine] = float(end - begin - length)
    return out


def _article_cosine(unit: Tensor, start, length: int, low, high, vectors: Tensor) -> Tensor:
    """(B,) mean cosine with the chunks of the article outside the context: the chance level of a cosine."""
    means = torch.empty_like(unit)
    for begin in np.unique(low):
        mine = torch.from_numpy(np.flatnonzero(low == begin)).to(unit.device)
        end = int(high[low == begin][0])
        chunks = F.normalize(vectors[begin:end].float(), dim=-1)
        inside = torch.from_numpy(start[low == begin] - begin).to(unit.device)[:, None] + torch.arange(
            length, device=unit.device
        )
        means[mine] = (chunks.sum(0) - chunks[inside].sum(1)) / (end - begin - length)
    return (unit * means).sum(-1)


def summarise(frame: pd.DataFrame) -> list[dict]:
    """Gates A to D of one `measure` frame: a row a measure, with its interval over articles and its chance level."""
    articles = frame["article"].to_numpy()

    def row(gate: str, name: str, values, chance: float) -> dict:
        values = np.asarray(values, float)
        mean, low, high = over_articles(values, articles)
        return {
            "gate": gate,
            "measure": name,
            "value": mean,
            "low": low,
            "high": high,
            "chance": chance,
            "windows": int((~np.isnan(values)).sum()),
            "articles": len(np.unique(articles[~np.isnan(values)])),
        }

    sweep = frame[[f"offset {k:+d}" for k in OFFSETS]]
    sweep = sweep.where(sweep.notna().all(axis=1))  # the same windows at every offset
    means = sweep.mean()
    at = {k: sweep[f"offset {k:+d}"] for k in OFFSETS}
    random_chunk = frame["cosine_article"].where(at[0].notna())

    def margin(k: int) -> list[tuple[str, object, float]]:
        best = at[max((o for o in OFFSETS if o != k), key=lambda o: means[f"offset {o:+d}"])]
        return at[k] - best, float((random_chunk - best).mean())

    rows = [
        row("A", "margin", *margin(0)),
        row("A", "margin read late", *margin(1)),
        row("A", "cosine at the target", at[0], float(random_chunk.mean())),
        row("A", "cosine, all windows", frame["cosine"], float(frame["cosine_article"].mean())),
    ]
    length = int(frame["candidates"].iloc[0] - frame["novel candidates"].iloc[0])
    last = frame["cosine"] - frame["margin last"]
    rows.append(
        row("A", "margin against the last", frame["margin last"], float((frame["cosine_article"] - last).mean()))
    )
    for prefix in ("", "novel "):
        rank, n = frame[prefix + "rank"], frame[prefix + "candidates"].astype(int)
        rows += [row("B", f"{prefix}R@{k}", rank <= k, float(chance_recall(n, k).mean())) for k in (1, 5)]
        rows.append(row("B", prefix + "MRR", 1 / rank, float(chance_reciprocal_rank(n).mean())))
    rows.append(row("B", "R@5 of six", frame["six rank"] <= 5, min(5 / (length + 1), 1.0)))
    rows += [row("C", name, frame[name], 0.0) for name in ABLATIONS]
    rolled, chance = (frame[[f"rollout {kind}{h}" for h in range(1, STEPS + 1)]] for kind in ("", "chance "))
    complete = rolled.notna().all(axis=1)
    rows.append(
        row("D", "mean cosine", rolled.mean(axis=1).where(complete), float(chance[complete].mean(axis=1).mean()))
    )
    return rows


def bins_delta(val: pd.DataFrame, ood: pd.DataFrame) -> dict:
    """Gate E: |validation − OOD| of the mean cosine over windows of normal coherence; NaN where a split has none.

    It has no interval and no chance level here: an absolute difference is above 0 by chance alone.
    """
    normal = [f[f["coherence"].between(*NORMAL_COHERENCE)] for f in (val, ood)]
    windows, articles = sum(map(len, normal)), sum(f["article"].nunique() for f in normal)
    difference = float("nan")
    if all(map(len, normal)):
        difference = abs(normal[0]["cosine"].mean() - normal[1]["cosine"].mean())
    return {
        "gate": "E",
        "measure": "difference",
        "value": difference,
        "low": float("nan"),
        "high": float("nan"),
        "chance": float("nan"),
        "windows": windows,
        "articles": articles,
    }


def _judge(row: Mapping) -> tuple[float, bool | None]:
    """The threshold of a row's measure on its split, and whether it holds (NaN does not); none without a threshold."""
    if (row["gate"], row["measure"]) not in THRESHOLDS:
        return float("nan"), None
    sense, val, ood = THRESHOLDS[row["gate"], row["measure"]]
    threshold = ood if row["split"] == "ood" else val
    return threshold, bool(row["value"] >= threshold if sense == ">=" else row["value"] <= threshold)
