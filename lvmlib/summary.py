"""All runs of a dataset side by side, from what their folders hold; behind `python -m lvmlib table`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from .errors import LVMError
from .params import flat, known_versions, version
from .training import NOT_COMPARED, open_run, outputs

# column: (split, gate, measure) of the 5CAT table
MEASURES = {
    "val_cos": ("val", "A", "cosine, all windows"),
    "ood_cos": ("ood", "A", "cosine, all windows"),
    "margin": ("val", "A", "margin"),
    "margin_late": ("val", "A", "margin read late"),
    "of_six": ("val", "B", "R@5 of six"),
    "novel_mrr": ("val", "B", "novel MRR"),
    "novel_mrr_ood": ("ood", "B", "novel MRR"),
}


def runs(dataset: str = "wikipedia", root: Path | None = None) -> pd.DataFrame:
    """A row for each finished and judged run under outputs/<dataset>, and for each trivial predictor (version empty).

    Columns: version, predictor (the model's or trivial predictor's name), seed, epochs, precision, MEASURES, gates_val,
    gates_ood, seconds. Runs whose parameters are not their version's own are left out. Raises LVMError if none is
    left.
    """
    root = (root or outputs()) / dataset
    rows, trivial = [], {}
    for path in sorted(root.glob("*/*/fivecat.json")):
        record, _, _ = open_run(path.parent)
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            table = pd.DataFrame(report["table"]).set_index(["predictor", "split", "gate", "measure"])["value"]
            figures = {p: {m: table[p, *k] for m, k in MEASURES.items()} for p in table.index.unique("predictor")}
        except (OSError, ValueError, KeyError) as e:
            raise LVMError(f"{path}: cannot be read as a 5CAT report ({e!r}); run train.ipynb for it again") from e
        parameters = record["parameters"]
        # Only runs of the version as it stands: seeds, models and precisions may differ, nothing else.
        own = version(parameters["name"], fast=parameters["fast"])
        if "finished" not in record or ".old-" in path.parent.name or _settings(parameters) != _settings(own.to_dict()):
            continue
        rows.append(
            {
                "version": parameters["name"],
                "predictor": parameters["model"],
                "seed": parameters["seed"],
                "epochs": parameters["epochs"],
                "precision": record["computed"]["precision"],
                **figures.pop("model"),
                "gates_val": "".join(g for g, ok in report["gates"]["val"].items() if ok),
                "gates_ood": "".join(g for g, ok in report["gates"]["ood"].items() if ok),
                "seconds": record["finished"]["training_seconds"],
            }
        )
        trivial |= {name: {"version": "", "predictor": name, **values} for name, values in figures.items()}
    if not rows:
        raise LVMError(f"{root}: no finished run with its 5CAT; train one, as by: make train VERSION=v22")
    return pd.DataFrame([*rows, *trivial.values()])


def _settings(parameters: dict) -> dict:
    free = (*NOT_COMPARED, "seed", "model")
    return {k: v for k, v in flat(parameters).items() if not k.startswith(free)}


def by_version(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of `runs` drawn together over seeds: for each figure its mean, and ± half the range over the seeds."""
    figures = list(MEASURES)
    groups = frame.fillna({"precision": "", "epochs": 0}).groupby(["version", "predictor", "epochs", "precision"])
    mean, half = groups[figures].mean(), (groups[figures].max() - groups[figures].min()) / 2
    out = mean.join(half.add_suffix("_half")).join(groups["seed"].count().rename("seeds"))
    order = [*known_versions(), ""]
    out["order"] = [order.index(v) if v in order else len(order) for v in out.index.get_level_values("version")]
    return out.sort_values(["order", "predictor"]).drop(columns="order").reset_index()


def markdown(summary: pd.DataFrame) -> str:
    """`by_version` as a Markdown table."""

    def cell(row, name: str, scale: float = 1, digits: int = 3, sign: str = "") -> str:
        if np.isnan(row[name]):
            return "–"
        spread = f" ± {scale * row[name + '_half']:.{digits}f}" if row["seeds"] > 1 else ""
        return f"{scale * row[name]:{sign}.{digits}f}{spread}"

    lines = [
        "| version | model | seeds | val cos | OOD cos | margin | margin, late | R@5 of six, % | novel MRR |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summary.to_dict("records"):
        name = f"`{row['version']}`" if row["version"] else "untrained"
        cells = [
            cell(row, "val_cos"),
            cell(row, "ood_cos"),
            cell(row, "margin", sign="+"),
            cell(row, "margin_late", sign="+"),
            cell(row, "of_six", 100, 1),
            cell(row, "novel_mrr"),
        ]
        model = ", ".join(word for word in (row["predictor"], row["precision"]) if word)
        lines.append(f"| {name} | {model} | {row['seeds'] or '–'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
