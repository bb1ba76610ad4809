"""Tables as a reader sees them."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Sequence

import pandas as pd
from pandas.io.formats.style import Styler

from ..judge.fivecat import Report
from ..judge.gates import GATES, THRESHOLDS
from ..judge.rating import Check, Verdict
from ..judge.spread import Spread
from ..losses import TERMS
from ..runs import alarms
from ..runs.validation import SPREAD


def table(
    frame: pd.DataFrame, caption: str = "", digits: int = 3, formats: dict | None = None, escaped: bool = False
) -> Styler:
    """Return a frame rounded, without index, with whole numbers whole and gaps as –. `formats`: column → format.

    Texts, headings and caption are shown letter by letter; `escaped`: the texts are HTML already.
    """
    if not escaped:
        frame = frame.rename(columns=letters)
        formats = {letters(column): form for column, form in (formats or {}).items()}
        words = [c for c in frame if not pd.api.types.is_numeric_dtype(frame[c])]
        frame = frame.assign(**{c: frame[c].map(letters) for c in words})

    def shown(values: pd.Series) -> str | None:
        if not pd.api.types.is_numeric_dtype(values):
            return None
        return "{:,.0f}" if (values.dropna() % 1 == 0).all() else f"{{:,.{digits}f}}"

    numbers = list(frame.select_dtypes("number"))
    right = [{"selector": f"th.col{i}", "props": "text-align: right"} for i, c in enumerate(frame) if c in numbers]
    above = "caption-side: top; text-align: left; font-weight: bold; white-space: nowrap"
    return (
        frame.style.format({c: shown(frame[c]) for c in frame} | (formats or {}), na_rep="–")
        .hide(axis="index")
        .set_caption(letters(caption))
        # Tables of one page must not share an id; this one depends on the content alone, so that reruns are alike.
        .set_uuid(hashlib.sha1(frame.to_csv().encode() + caption.encode()).hexdigest()[:10])
        .set_properties(subset=numbers, **{"text-align": "right"})
        .set_properties(subset=[c for c in frame if c not in numbers], **{"text-align": "left"})
        .set_table_styles(
            [
                {"selector": "caption", "props": above},
                {"selector": "th", "props": "text-align: left"},
                *right,
                {"selector": "td", "props": "white-space: nowrap; font-size: 92%"},
            ]
        )
    )


def letters(text):
    """Return text as HTML that shows it letter by letter, beside MathJax too; anything else as it is."""
    opening = {ord(c): f"<span>&#{ord(c)};</span>" for c in "$\\"}
    return html.escape(text, quote=False).translate(opening) if isinstance(text, str) else text


def history_table(history: pd.DataFrame) -> Styler:
    """Return a run's epochs as a table, without the columns that diagnostics.ipynb shows."""
    formats = dict.fromkeys(("train_loss", "val_loss"), "{:.5f}") | {"lambda_eff": "{:.4f}", "learning_rate": "{:.1e}"}
    hidden = [*TERMS, *SPREAD, "at_lambda_min", "at_lambda_max"]
    shown = history.drop(columns=hidden).dropna(axis=1, how="all")
    return table(shown, formats=formats | {"seconds": "{:.1f}"})


def alarms_table(rows: Sequence[alarms.Alarm]) -> Styler:
    """Return a run's alarms as a table, with lines that break."""
    frame = pd.DataFrame(rows, columns=["epoch", "step", "kind", "what", "what to do"])
    wide = table(frame).set_properties(subset=["what", "what to do"], **{"min-width": "14em"})
    return wide.set_table_styles([{"selector": "td", "props": "white-space: normal"}], overwrite=False)


def checklist_frame(checks: list[Check]) -> pd.DataFrame:
    """Return the checklist for `table`."""
    words = {True: "held", False: "BROKEN", None: "not applicable"}
    rows = [(c.every, c.check, c.wanted, c.measured, words[c.passed], c.broke) for c in checks]
    return pd.DataFrame(rows, columns=["every", "check", "wanted", "measured", "", "first broken"])


def conditions_frame(verdict: Verdict) -> pd.DataFrame:
    """Return the success conditions for `table`, a column for each baseline."""

    def shown(condition: dict, value: float) -> str:
        return "–" if value != value else f"{value:.0f}" if "gates" in condition["condition"] else f"{value:.3f}"

    rows = [
        {
            "condition": c["condition"],
            "this run": shown(c, c["value"]),
            "wanted": f"{'>' if c['threshold'] == 0 else '≥'} {c['threshold']:g}",
            "": "met" if c["met"] else "NOT MET",
            "chance": shown(c, c["chance"]),
            **{name: shown(c, value) for name, value in c["baselines"].items()},
        }
        for c in verdict.conditions
    ]
    return pd.DataFrame(rows).fillna("–")


def gate_table(report: Report, split: str, gates: str = "ABCDEG") -> Styler:
    """Return the measures of a split: the model with its interval, chance, and the predictors compared with.

    Profile `original` adds the thresholds. Differences of validation and OOD (gate E) stand with either split.
    """
    rows = report.table[report.table["split"].isin([split, "both"]) & report.table["gate"].isin(list(gates))]
    own = rows[rows["predictor"] == "model"].set_index(["gate", "measure"])
    frame = pd.DataFrame(
        {
            "gate": [f"{g} {GATES[g]}" for g, _ in own.index],
            "measure": [m for _, m in own.index],
            "model": own["value"].to_numpy(),
            "95 % over articles": _intervals(own),
            "chance": own["chance"].to_numpy(),
        }
    )
    if report.profile == "original":
        words = {True: "passed", False: "FAILED"}
        frame["wanted"] = [_threshold(g, m, t) for (g, m), t in zip(own.index, own["threshold"], strict=True)]
        frame[""] = [words[p] if pd.notna(p) else "" for p in own["passed"]]
    elif own["adjusted"].notna().any():
        frame["adjusted"] = own["adjusted"].to_numpy()
    for name in report.predictors[1:]:
        other = rows[rows["predictor"] == name].set_index(["gate", "measure"])["value"]
        frame[name] = other.reindex(own.index).to_numpy()
    for name in ("articles", "windows"):
        frame[name] = pd.to_numeric(own[name]).astype(float).to_numpy()
    frame["gate"] = frame["gate"].where(~frame["gate"].duplicated(), "")
    caption = f"5CAT, {report.profile}, {split}"
    if report.profile == "original":
        passed = [g for g, ok in report.gates(split).items() if ok]
        caption += f": {len(passed)} of 5 gates passed" + (f" ({', '.join(passed)})" if passed else "")
    return table(frame, caption=caption)


def judgement_table(report: Report, split: str) -> Styler:
    """Return what each gate of profile `calibrated` asks, and what the interval answers."""
    rows = report.judgements(split)
    gates = rows["gate"].map(lambda g: f"{g} {GATES[g]}")
    frame = pd.DataFrame(
        {
            "gate": gates.where(~gates.duplicated(), ""),
            "": rows["outcome"].replace("failed", "FAILED"),
            "question": rows["question"],
            "value": rows["value"],
            "95 % over articles": _intervals(rows),
            "articles": rows["articles"].astype(float),
            "wanted": rows["wanted"],
        }
    )
    return table(frame, caption=f"5CAT, calibrated, {split}: what the gates ask")


def spread_table(spread: Spread) -> Styler:
    """Return a row a split and forecast: each figure with its interval, and the model's energy score less it."""

    def text(measure: str, split: str, name: str, form: str = ".3f") -> str:
        row = spread.row(measure, split, name)
        return f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"

    measures = ["spread ratio", *(m for m in dict.fromkeys(spread.table["measure"]) if m.startswith("covered"))]
    measures.append("KS of ranks by distance")
    rows = []
    for split in spread.splits:
        for name in spread.forecasts:
            less = "" if name == "model" else text(f"energy score less {name}", split, "model", "+.4f")
            rows.append({"split": split, "forecast": name, "energy score": text("energy score", split, name)})
            rows[-1] |= {"model less it": less, **{m: text(m, split, name) for m in measures}}
        chance = {m: f"{spread.row(m, split)['chance']:.3g}" for m in measures}
        rows.append({"split": split, "forecast": "if calibrated", "energy score": "", "model less it": "", **chance})
    return table(pd.DataFrame(rows), caption="Samples against the truth, 95 % over articles")


def _intervals(rows: pd.DataFrame) -> list[str]:
    ends = zip(rows["low"], rows["high"], strict=True)
    return ["–" if pd.isna(low) else f"{low:.3f} … {high:.3f}" for low, high in ends]


def _threshold(gate: str, measure: str, threshold: float) -> str:
    if pd.isna(threshold):
        return ""
    return f"{'≥' if THRESHOLDS[gate, measure][0] == '>=' else '≤'} {threshold:.2f}"
