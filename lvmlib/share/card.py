"""The model card of an exported folder: what the model reads and returns, its calibrated 5CAT, its limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

TEMPLATE = Path(__file__).resolve().parent / "site" / "card.md.j2"
PREDICTORS = ("model", "copy last", "mean")
SHOWN = (  # in the card's tables: (gate, measure)
    ("A", "cosine at the target"),
    ("A", "margin against the last"),
    ("A", "novel margin"),
    ("B", "novel MRR"),
    ("B", "novel R@5"),
    ("B", "1 of 100"),
    ("C", "shuffled, novel MRR"),
    ("D", "mean rollout"),
    ("G", "margin bought"),
)
METRICS = {("A", "cosine at the target"): "cosine", ("B", "novel MRR"): "mrr", ("B", "novel R@5"): "recall_at_5"}


def one_line(text: Any) -> str:
    """Return text from outside on one line, without characters that a terminal or Markdown interprets."""
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable() and c not in "`|<>")[:500]


def card(config, windows: Mapping[str, int], report: Mapping | None, fast: bool) -> str:
    """Return the card in Markdown, with the hub's YAML head. `config`: of `export`; `windows`: number by split.

    `report`: the content of fivecat.json. Raises KeyError if it lacks a figure of METRICS.
    """
    report = report or {"calibrated": {"gates": {}, "table": []}}
    gates, table = report["calibrated"]["gates"], report["calibrated"]["table"]
    splits = [_split(name, gates[name], [row for row in table if row["split"] == name]) for name in gates]
    words = {name: report.get(name, {}).get("text", "") for name in ("reading", "verdict")}
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True)
    return template.render(c=config, windows=windows, splits=splits, fast=fast, **words) + "\n"


def _split(name: str, gates: Mapping[str, str], table: list[Mapping]) -> dict[str, Any]:
    """Return what the card shows of a split: its size, the outcome of each gate, the hub's metrics, a table's lines."""
    rows = {(row["predictor"], row["gate"], row["measure"]): row for row in table}
    values = {key: rows["model", *key]["value"] for key in METRICS}
    metrics = [{"type": METRICS[k], "name": k[1], "value": round(x, 4)} for k, x in values.items() if x is not None]
    lines = []
    for key in SHOWN:
        if own := rows.get(("model", *key)):
            cells = [rows.get((predictor, *key)) for predictor in PREDICTORS] + [{"value": own["chance"]}]
            lines.append((*key, *map(_figure, cells)))
    gates = ", ".join(f"{gate} {outcome}" for gate, outcome in gates.items())
    counts = {key: int(rows["model", "A", "cosine at the target"][key]) for key in ("articles", "windows")}
    return {"name": name, "gates": gates, "metrics": metrics, "lines": lines} | counts


def _figure(row: Mapping | None) -> str:
    """Return a value with its interval, or a dash."""
    if row is None or row["value"] is None:
        return "–"
    return f"{row['value']:.3f}" + ("" if row.get("low") is None else f" [{row['low']:.3f}, {row['high']:.3f}]")
