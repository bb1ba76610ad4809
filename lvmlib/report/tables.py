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
from ..judge.spread import COVERED, Spread
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

    numbers = frame.select_dtypes("number")
    integer = (numbers.isna() | (numbers % 1 == 0)).all()
    formats = {c: "{:,.0f}" if integer[c] else f"{{:,.{digits}f}}" for c in numbers} | (formats or {})
    styles = [
        ("caption", "caption-side: top; text-align: left; font-weight: bold; white-space: nowrap"),
        ("th", "text-align: left"),
        *((f"th.col{i}", "text-align: right") for i, c in enumerate(frame) if c in numbers),
        ("td", "white-space: nowrap; font-size: 92%"),
    ]
    return (
        frame.style.format(formats, na_rep="–")
        .hide(axis="index")
        .set_caption(letters(caption))
        # Tables of one page must not share an id; this one depends on the content alone, so that reruns are alike.
        .set_uuid(hashlib.sha1(frame.to_csv().encode() + caption.encode()).hexdigest()[:10])
        .set_properties(subset=list(numbers), **{"text-align": "right"})
        .set_properties(subset=[c for c in frame if c not in numbers], **{"text-align": "left"})
        .set_table_styles([{"selector": selector, "props": props} for selector, props in styles])
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

    rows = []
    for c in verdict.conditions:
        form = "{:.0f}" if "gates" in c["condition"] else "{:.3f}"
        numbers = {"this run": c["value"], "chance": c["chance"], **c["baselines"]}
        shown = {name: "–" if value != value else form.format(value) for name, value in numbers.items()}
        wanted = f"{'>' if c['threshold'] == 0 else '≥'} {c['threshold']:g}"
        row = {"condition": c["condition"], "this run": shown.pop("this run"), "wanted": wanted}
        rows.append(row | {"": "met" if c["met"] else "NOT MET"} | shown)
    return pd.DataFrame(rows).fillna("–")


def gate_table(report: Report, split: str, gates: str = "ABCDEG") -> Styler:
    """Return the measures of a split: the model with its interval, chance, and the predictors compared with.

    Profile `original` adds the thresholds. Differences of validation and OOD (gate E) stand with either split.
    """
    rows = report.table[report.table["split"].isin([split, "both"]) & report.table["gate"].isin(list(gates))]
    own = rows[rows["predictor"] == "model"].reset_index(drop=True)
    columns = {"gate": _named(own["gate"]), "measure": own["measure"], "model": own["value"]}
    columns |= {"95 % over articles": _intervals(own), "chance": own["chance"]}
    caption = f"5CAT, {report.profile}, {split}"
    if report.profile == "original":
        columns["wanted"] = [_threshold(*row) for row in own[["gate", "measure", "threshold"]].to_numpy()]
        columns[""] = own["passed"].map({True: "passed", False: "FAILED"}).fillna("")
        passed = [g for g, ok in report.gates(split).items() if ok]
        caption += f": {len(passed)} of 5 gates passed" + (f" ({', '.join(passed)})" if passed else "")
    elif own["adjusted"].notna().any():
        columns["adjusted"] = own["adjusted"]
    keys = pd.MultiIndex.from_frame(own[["gate", "measure"]])
    for name in report.predictors[1:]:
        other = rows[rows["predictor"] == name].set_index(["gate", "measure"])["value"]
        columns[name] = other.reindex(keys).to_numpy()
    columns |= {name: pd.to_numeric(own[name]).astype(float) for name in ("articles", "windows")}
    return table(pd.DataFrame(columns), caption=caption)


def judgement_table(report: Report, split: str) -> Styler:
    """Return what each gate of profile `calibrated` asks, and what the interval answers."""
    rows = report.judgements(split)
    columns = {"gate": _named(rows["gate"]), "": rows["outcome"].replace("failed", "FAILED")}
    columns |= {"question": rows["question"], "value": rows["value"], "95 % over articles": _intervals(rows)}
    columns |= {"articles": rows["articles"].astype(float), "wanted": rows["wanted"]}
    return table(pd.DataFrame(columns), caption=f"5CAT, calibrated, {split}: what the gates ask")


def spread_table(spread: Spread) -> Styler:
    """Return a row a split and forecast: each figure with its interval, and the model's energy score less it."""

    def text(measure: str, split: str, name: str, form: str = ".3f") -> str:
        row = spread.row(measure, split, name)
        return f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"

    covered, rows = [f"covered by the inner {part:.0%}" for part in COVERED], []
    measures = ["spread ratio", *covered, "KS of ranks by distance"]
    for split in spread.splits:
        for name in spread.forecasts:
            less = "" if name == "model" else text(f"energy score less {name}", split, "model", "+.4f")
            row = {"split": split, "forecast": name, "energy score": text("energy score", split, name)}
            rows.append(row | {"model less it": less, **{m: text(m, split, name) for m in measures}})
        chance = {m: f"{spread.row(m, split)['chance']:.3g}" for m in measures}
        rows.append({"split": split, "forecast": "if calibrated", "energy score": "", "model less it": "", **chance})
    return table(pd.DataFrame(rows), caption="Samples against the truth, 95 % over articles")


def _named(gates: pd.Series) -> pd.Series:
    """Return each gate with its name, in its first row only."""
    return gates.map(lambda gate: f"{gate} {GATES[gate]}").where(~gates.duplicated(), "")


def _intervals(rows: pd.DataFrame) -> list[str]:
    ends = zip(rows["low"], rows["high"], strict=True)
    return ["–" if pd.isna(low) else f"{low:.3f} … {high:.3f}" for low, high in ends]


def _threshold(gate: str, measure: str, threshold: float) -> str:
    if pd.isna(threshold):
        return ""
    return f"{'≥' if THRESHOLDS[gate, measure][0] == '>=' else '≤'} {threshold:.2f}"
