"""The entry to 5CAT, the 5→1 causal alignment test (handbook §4), and its `Report`.

    measure.py   figures per window, from one pass of the model
    health.py    figures of a whole split, from the same pass
    table.py     rows with intervals and chance levels
    gates.py     questions, thresholds, outcomes

Profile `original`: the definitions of the original work: gates A to E against fixed thresholds. Figures that it read
one step late (margin, rollout) stay beside the right reading, named so. `calibrated`, the default: the same questions,
asked so that copying the context or leaving it gains nothing, against baselines on the same windows.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ..baselines import untrained
from ..config import watched
from ..errors import LVMError
from ..io.disk import write_atomic
from ..models import Predictor, device_of
from ..windows import Dataset, Windows
from .gates import GATES, UNTRAINED, answers, threshold_of, worst
from .measure import Measurements, judge, measure, score
from .table import bins_delta, figure, health_rows, summarise, with_interval

__all__ = ["GATES", "INSTRUMENT", "PROFILES", "Report", "figure", "fivecat", "judge", "measure", "score", "summarise"]
INSTRUMENT = 3  # raised whenever a definition changes: reports of different instruments do not compare
PROFILES = ("calibrated", "original")


@dataclass(frozen=True, eq=False)
class Report:
    """The result of `fivecat`: the table of figures, and from it the gates and differences between predictors.

    `frames`: what `measure` gave, by (split, predictor); `facts`: what `health` gave. `precision`: of the model.
    """

    profile: str
    frames: dict[tuple[str, str], Measurements]
    facts: dict[tuple[str, str], dict]
    horizon: int = 2
    context_length: int = 5
    precision: str = "float32"

    @cached_property
    def table(self) -> pd.DataFrame:
        """split (`both` for a difference of splits), predictor, and the columns of `table.Row`; in profile `original`
        also threshold and passed (empty without a threshold)."""
        rows, frames = [], self.frames
        for name in self.predictors:
            for split in self.splits:
                own = summarise(frames[split, name], self.profile, self.horizon, self.context_length)
                if self.profile == "calibrated":
                    own += health_rows(self.facts[split, name])
                rows += [{"split": split, "predictor": name, **row} for row in own]
            if {("val", name), ("ood", name)} <= set(frames):
                own = bins_delta(frames["val", name], frames["ood", name], self.profile)
                rows += [{"split": "both", "predictor": name, **row} for row in own]
        table = pd.DataFrame(rows)
        if self.profile == "original":
            threshold, passed = zip(*map(threshold_of, table.to_dict("records")), strict=True)
            table["threshold"], table["passed"] = list(threshold), pd.array(list(passed), "boolean")
        return table

    def as_profile(self, profile: str) -> Report:
        """The same measurements, summarised by the definitions of `profile`."""
        return self if self.profile == profile else replace(self, profile=profile)

    @property
    def original(self) -> Report:
        return self.as_profile("original")

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(split for split, _ in self.frames))

    @property
    def predictors(self) -> list[str]:
        return list(dict.fromkeys(name for _, name in self.frames))

    def value(self, measure: str, split: str = "val", predictor: str = "model", gate: str | None = None) -> float:
        return float(self.row(measure, split, predictor, gate)["value"])

    def row(self, measure: str, split: str = "val", predictor: str = "model", gate: str | None = None) -> pd.Series:
        """One row of the table. Raises LVMError where there is none."""
        rows = self.rows(split, predictor)
        rows = rows[(rows["measure"] == measure) & ((rows["gate"] == gate) | (gate is None))]
        if not len(rows):
            raise LVMError(f"this {self.profile} 5CAT has no {measure!r} of {predictor!r} on split {split!r}")
        return rows.iloc[0]

    def rows(self, split: str, predictor: str = "model") -> pd.DataFrame:
        return self.table[(self.table["split"] == split) & (self.table["predictor"] == predictor)]

    def gates(self, split: str | None = None, predictor: str = "model") -> dict[str, bool] | dict[str, str]:
        """The outcome of each gate on `split`, or with None on all together; gate E compares validation with OOD.

        `original`: whether every threshold is reached; None: on validation and on OOD. `calibrated`: passed, failed,
        open or not measured (`judgements`); None: the gravest. Raises LVMError for what was not measured.
        """
        if split is None:
            each = [self.gates(s, predictor) for s in (("val", "ood") if self.profile == "original" else self.splits)]
            combined = all if self.profile == "original" else worst
            return {gate: combined([g[gate] for g in each]) for gate in each[0]}
        if not len(self.rows(split, predictor)):
            raise LVMError(f"5CAT has no {predictor!r} on split {split!r}")
        if self.profile == "calibrated":
            judged = self.judgements(split, predictor)
            return {gate: worst(judged["outcome"][judged["gate"] == gate]) for gate in GATES if gate != "F"}
        judged = pd.concat([self.rows(split, predictor), self.rows("both", predictor)])
        judged = judged[judged["threshold"].notna()]
        passed = {gate: judged["passed"][judged["gate"] == gate].fillna(False) for gate in "ABCDE"}
        return {gate: bool(len(p) and p.all()) for gate, p in passed.items()}  # what was not measured does not pass

    def paired(self, measure: str, split: str = "val", predictor: str = "model", other: str = "copy last") -> dict:
        """`predictor` minus `other` on the same windows, of a name that `figure` knows, as `with_interval` gives it."""
        # Gate B is this difference in novel MRR, between the model and the best baseline.
        one, two = self.frames[split, predictor], self.frames[split, other]
        return with_interval(figure(one, measure) - figure(two, measure), one.article)

    def best_trivial(self, measure: str, split: str = "val", among=None, but: str = "") -> str:
        """The baseline with the highest mean of `measure`, a name that `figure` knows, on these windows."""
        names = [n for n in among or self.predictors if n not in ("model", but)]
        return max(names, key=lambda n: pd.Series(figure(self.frames[split, n], measure)).mean())

    def escapes(self, split: str = "val", predictor: str = "model") -> bool:
        """Whether the margin comes from leaving the context (`health`), and the rank is no better than that of copying
        and averaging: leaving the context gains no rank."""
        if not self.facts[split, predictor]["escape"]:
            return False
        other = self.best_trivial("possible MRR", split, [n for n in UNTRAINED if n != predictor])
        return not self.paired("possible MRR", split, predictor, other)["low"] > 0

    def judgements(self, split: str, predictor: str = "model") -> pd.DataFrame:
        """Profile `calibrated`: gate, question, value, low, high, articles, wanted, outcome of each of `QUESTIONS`."""
        return answers(self, split, predictor)

    def to_json(self, path: str | os.PathLike, **more) -> None:
        """Write the tables of both profiles, the gates of `model`, health, and `more` plain facts; NaN becomes null."""
        content = {"instrument": INSTRUMENT, "precision": self.precision, **more}
        for profile in PROFILES:
            report = self.as_profile(profile)
            gates = {split: report.gates(split) for split in self.splits}
            content[profile] = {"gates": gates, "table": report.table.astype(object).to_dict("records")}
        content["health"] = [{"split": s, "predictor": p, **f} for (s, p), f in self.facts.items()]
        text = json.dumps(_without_nan(content), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomic(Path(path), lambda partial: Path(partial).write_text(text + "\n", encoding="utf-8"))


def _without_nan(value):
    if isinstance(value, Mapping):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if value is pd.NA or (isinstance(value, float) and math.isnan(value)) else value


def fivecat(
    model: Predictor,
    data: Dataset | Mapping[str, Windows],
    compare: Mapping[str, Predictor] | None = None,
    profile: str = "calibrated",
    precision: str = "float32",
) -> Report:
    """Run 5CAT on `model`, and on every predictor in `compare` on the same windows.

    `data`: a dataset, of which validation and OOD are taken, or any windows by the name of their split. Copy last and
    the mean of the context are always compared with. `precision`: of the model, as in `measure`; the others are in
    float32. Raises LVMError for an unknown profile or precision.
    """
    if profile not in PROFILES:
        raise LVMError(f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")
    if "model" in (compare or {}):
        raise LVMError("a predictor to compare with cannot be called 'model'; rename it")
    splits = {"val": data.val, "ood": data.ood} if isinstance(data, Dataset) else dict(data)
    if not splits:
        raise LVMError("5CAT has no windows; give a dataset, or windows by name of split")
    some = next(iter(splits.values()))
    _check(splits, some)
    simple = untrained(some.store.dim, some.context_length)
    device = device_of(model)
    predictors = {"model": model, **{n: p.to(device) for n, p in {**simple, **(compare or {})}.items()}}
    frames, facts, total = {}, {}, len(predictors) * sum(map(len, splits.values()))
    with tqdm(total=total, desc="5CAT", unit="window", delay=1, disable=not watched()) as bar:
        for name, p in predictors.items():
            for split, w in splits.items():
                end, own = bar.n + len(w), precision if name == "model" else "float32"
                frames[split, name], facts[split, name] = judge(p, w, own, bar.update)
                bar.update(end - bar.n)  # cached results come at once
    return Report(profile, frames, facts, some.horizon, some.context_length, precision)


def _check(splits: Mapping[str, Windows], some: Windows) -> None:
    """Raise LVMError for windows that one report cannot hold."""
    for name, windows in splits.items():
        if not len(windows):
            raise LVMError(f"split {name} has no windows")
        for key in ("context_length", "horizon", "step"):
            if getattr(windows, key) != getattr(some, key):
                raise LVMError(f"split {name} has {key} {getattr(windows, key)}, another {getattr(some, key)}")
    if some.context_length < 2:
        raise LVMError(f"5CAT needs a context of two vectors or more; these windows have {some.context_length}")
    if {"val", "ood"} <= set(splits) and splits["val"].store is splits["ood"].store:
        common = np.intersect1d(splits["val"].article, splits["ood"].article)
        if len(common):
            raise LVMError(f"val and ood share {len(common)} articles (as {common[0]}); each belongs to one split")
