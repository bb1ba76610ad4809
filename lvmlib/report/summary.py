"""All runs of a dataset side by side, from what their folders hold; behind `python -m lvmlib table`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..config import Version, flat, known_versions, version
from ..data.store import plain_name
from ..errors import LVMError
from ..io import limits
from ..io.paths import outputs
from ..judge.fivecat import INSTRUMENT, PROFILES
from ..runs.folder import NOT_COMPARED, open_run, run_folder
from ..runs.run import train
from ..windows import Dataset

# column: (profile, split, gate, measure) of the 5CAT tables
MEASURES = {
    "val_cos": ("calibrated", "val", "A", "cosine at the target"),
    "ood_cos": ("calibrated", "ood", "A", "cosine at the target"),
    "margin": ("original", "val", "A", "margin"),
    "margin_late": ("original", "val", "A", "margin read late"),
    "of_six": ("original", "val", "B", "R@5 of six"),
    "margin_last": ("calibrated", "val", "A", "margin against the last"),
    "margin_prev": ("calibrated", "val", "A", "margin against context[-2]"),
    "margin_best": ("calibrated", "val", "A", "margin against the best other"),
    "novel_margin": ("calibrated", "val", "A", "novel margin"),
    "novel_ahead": ("calibrated", "val", "A", "novel margin, ahead"),
    "novel_mrr": ("calibrated", "val", "B", "novel MRR"),
    "novel_mrr_ood": ("calibrated", "ood", "B", "novel MRR"),
    "of_hundred": ("calibrated", "val", "B", "1 of 100"),
    "margin_bought": ("calibrated", "val", "G", "margin bought"),
}


def runs(dataset: str = "wikipedia", root: Path | None = None) -> pd.DataFrame:
    """Return `judged` of every run under outputs/<dataset> whose parameters are its version's own.

    Seed, model, direction and precision may differ. Raises LVMError if there is none.
    """
    root = (root or outputs()) / dataset
    folders = []
    for path in sorted(root.glob("*/*/fivecat.json")):
        record, _, _ = open_run(path.parent)
        parameters = record["parameters"]
        own = version(parameters["name"], fast=parameters["fast"])
        same = _settings(parameters) == _settings(own.to_dict())
        if same and "finished" in record and ".old-" not in path.parent.name:
            folders.append(path.parent)
    if not folders:
        raise LVMError(f"{root}: no finished run with its 5CAT; train one, as by: make train VERSION=v22")
    return judged(folders)


def is_judged(folder: str | Path) -> bool:
    """Return whether a run's folder holds a report of the present instrument."""
    try:
        _figures(Path(folder) / "fivecat.json")
    except LVMError:
        return False
    return True


def _settings(parameters: dict) -> dict:
    free = (*NOT_COMPARED, "seed", "model", "direction")
    return {k: v for k, v in flat(parameters).items() if not k.startswith(free)}


def judged(folders: Sequence[Path]) -> pd.DataFrame:
    """Return a row for each of these runs, and for each baseline that was measured beside them (version empty).

    Columns: version, predictor (the model's or baseline's name), seed, direction, epochs, precision, MEASURES,
    gates_val, gates_ood (of the original), reading (the calibrated label), seconds. Raises LVMError, naming the file,
    for a run without a readable report.
    """
    rows, baselines = [], {}
    for folder in folders:
        record, _, _ = open_run(folder)
        figures, own = _figures(Path(folder) / "fivecat.json")
        parameters = record["parameters"]
        row = {"version": parameters["name"], "predictor": parameters["model"]}
        row |= {k: parameters[k] for k in ("seed", "direction", "epochs")}
        row |= {"precision": record["computed"]["precision"], **own}
        rows.append(row | {"seconds": record["finished"]["training_seconds"]})
        if parameters["direction"] == "forward":  # baselines are shown as they read the text forwards
            baselines |= {name: {"version": "", "predictor": name, **values} for name, values in figures.items()}
    return pd.DataFrame([*rows, *baselines.values()])


def read_report(path: Path) -> dict:
    """Return the content of a fivecat.json. Raises OSError, ValueError, KeyError or TypeError for another content."""
    content = limits.read_json(path)
    if content["instrument"] != INSTRUMENT:
        raise ValueError(f"written by 5CAT instrument {content['instrument']}, this is {INSTRUMENT}")
    return content


def _figures(path: Path) -> tuple[dict[str, dict], dict]:
    """Return the MEASURES of each baseline in a fivecat.json, and those of the model with its gates and reading."""
    try:
        report = read_report(path)
        tables = pd.concat({p: pd.DataFrame(report[p]["table"]) for p in PROFILES}, names=["profile"]).reset_index()
        table = tables.set_index(["predictor", "profile", "split", "gate", "measure"])["value"].sort_index()
        names = list(dict.fromkeys(tables["predictor"]))
        figures = {p: {m: float(table[p, *k]) for m, k in MEASURES.items()} for p in names}
        gates = report["original"]["gates"]
        labels = {f"gates_{s}": "".join(g for g, ok in gates[s].items() if ok) for s in ("val", "ood")}
        labels["reading"] = report["reading"]["label"]
        for word in (*names, *labels.values()):
            if not isinstance(word, str) or plain_name(word) != word:
                raise ValueError(f"{str(word)[:80]!r} is no name of a predictor, a gate or a reading")
        own = figures.pop("model") | labels
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise LVMError(f"{path}: cannot be read as a 5CAT report ({e!r}); run train.ipynb for it again") from e
    return figures, own


def by_version(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `runs` averaged over seeds: each figure's mean, and half its range over the seeds (_half)."""
    frame = frame[frame["direction"].isin(["forward", np.nan])].fillna({"precision": "", "epochs": 0})
    groups = frame.groupby(["version", "predictor", "epochs", "precision"])
    figures = groups[list(MEASURES)]
    half = ((figures.max() - figures.min()) / 2).add_suffix("_half")
    out = figures.mean().join(half).join(groups["seed"].count().rename("seeds")).reset_index()
    order = {name: i for i, name in enumerate([*known_versions(), ""])}
    return out.sort_values(
        ["version", "predictor"], key=lambda c: c.map(order) if c.name == "version" else c, ignore_index=True
    )


COLUMNS = {  # of `markdown`, heading: column, format, factor
    "val cos": ("val_cos", ".3f", 1),
    "OOD cos": ("ood_cos", ".3f", 1),
    "margin": ("margin", "+.3f", 1),
    "margin, late": ("margin_late", "+.3f", 1),
    "R@5 of six, %": ("of_six", ".1f", 100),
    "novel MRR": ("novel_mrr", ".3f", 1),
}


def markdown(summary: pd.DataFrame) -> str:
    """Return `by_version` as a Markdown table."""
    lines = [" | ".join(["| version | model | seeds", *COLUMNS]) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for row in summary.to_dict("records"):
        name = f"`{row['version']}`" if row["version"] else "untrained"
        cells = [name, ", ".join(filter(None, (row["predictor"], row["precision"]))), str(row["seeds"] or "–")]
        for column, form, factor in COLUMNS.values():
            spread = f" ± {factor * row[column + '_half']:{form.lstrip('+')}}" if row["seeds"] > 1 else ""
            cells.append("–" if np.isnan(row[column]) else f"{factor * row[column]:{form}}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def directions(own: Version, forward: Dataset, backward: Dataset, seeds: int = 20) -> dict[int, tuple]:
    """Return the finished runs of `own` in both directions: seed → (best model forward, best model backward).

    Only seeds below `seeds` that have both in their usual folder, with the parameters of `own`.
    """
    pairs = {}
    for seed in range(seeds):
        pair = []
        for data, direction in ((forward, "forward"), (backward, "backward")):
            this = replace(own, seed=seed, direction=direction)
            if (run_folder(this) / "run.yaml").exists():
                with contextlib.suppress(LVMError):  # one with other parameters is another run
                    run = train(this, data)
                    pair += [run.best] if run.finished else []
        if len(pair) == 2:
            pairs[seed] = tuple(pair)
    return pairs
