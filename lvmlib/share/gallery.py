"""The executed notebooks of outputs/ as a static site: an index with a card for each run, and a page for each notebook.

    outputs/gallery/
        index.html              the cards, from what each run's folder holds
        pages/NAME.html         the notebooks, by `page`
        gallery.json            marks the folder as a gallery, and lists its pages

Other files in the folder stay (.git, CNAME). Each page works alone, from disk or from any host, and makes no request.
HTML is cleaned (see `page`), but do not publish notebooks of others without reading them.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..config import data_name, resolved
from ..errors import LVMError, format_error
from ..io import stamp
from ..io.disk import explain_os_errors, lock, write_atomic
from ..io.limits import read_json
from ..io.paths import ROOT, outputs
from ..judge.fivecat import GATES
from ..judge.rating import checklist
from ..report.summary import read_report
from ..runs.folder import open_run
from .page import date, page, read, render, title

MARK = "gallery.json"
SHOWCASE = ROOT / "outputs" / "showcase"
APART = ("gallery", "showcase", "datasets", "imported", "fast")  # folders of outputs/ that are no dataset's
GATE_MARKS = {"passed": "✓", "failed": "✗", "open": "○"}
RUN_NOTEBOOKS = {"train": "Training", "diagnostics": "Diagnostics", "fivecat": "5CAT"}


def build(
    out: Path | None = None, root: Path | None = None, showcase: bool = False, fast: bool = False
) -> tuple[Path, dict[str, int]]:
    """Build the gallery of `root` (outputs/) in `out` (outputs/gallery). Returns its index and the number of cards.

    `showcase`: include the committed notebooks of outputs/showcase. `fast`: include fast runs, marked as such. Raises
    LVMError if there is nothing to show, or if `out` has files and is no gallery.
    """
    root = Path(root or outputs())
    out = Path(out or root / "gallery")
    with explain_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with lock(out.with_name(f".{out.name}.gallery.lock"), lambda by: f"{out}: {by} is building it; wait for it"):
            earlier = _own_pages(out)
            cards = _collect(root, showcase, fast)
            if not cards:
                raise LVMError(
                    f"{root}: no run and no executed notebook. Train one (make train VERSION=v22), or show the "
                    'committed notebooks (make gallery ARGS="--showcase")'
                )
            pages: dict[str, bytes] = {}
            for card in cards:
                links = [_add_page(path, pages, card, root) for path in card["notebooks"]]
                card["links"] = [link for link in links if link]
            runs = sum(not card["title"] for card in cards)
            counts = {"runs": runs, "notebooks": len(cards) - runs, "pages": len(pages)}
            _write(out, _index(cards), pages, earlier, counts)
    return out / "index.html", counts


def _index(cards: list[dict]) -> str:
    """Return the HTML of the index. A card with a title is that of a notebook, one without that of a run."""
    about = {"title": "LVM Lab gallery", "gates": GATES, "marks": GATE_MARKS, "spark": spark}
    return render("index.html.j2", cards=cards, built=datetime.datetime.now(datetime.UTC).date(), **about)


def _own_pages(out: Path) -> set[str]:
    """Return the names of the files in pages/ that a gallery wrote. Raises LVMError if `out` is another's folder."""
    for folder in (out, out / "pages"):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise LVMError(f"{folder}: is no folder of a gallery; name another folder, or move it away")
    if not out.exists() or not any(out.iterdir()):
        return set()
    try:
        return {path.name for path in (out / "pages").glob("*")} & set(read_json(out / MARK)["files"])
    except Exception as e:  # whatever a foreign or damaged file makes of it
        why = f"{out / MARK}: {format_error(e)}"
        raise LVMError(f"{out}: has files and is no gallery ({why}); name another folder, or move it away") from e


def _write(out: Path, index: str, pages: Mapping[str, bytes], earlier: set[str], counts: Mapping) -> None:
    """Write a gallery over the one in `out`, whose pages are `earlier`; other files there stay.

    The index is written after its pages, and old pages are deleted last: if this stops anywhere, each file is whole,
    each link works, and the next build finishes the job.
    """
    if foreign := sorted(name for name in pages.keys() - earlier if (out / "pages" / name).exists()):
        path = out / "pages" / foreign[0]
        raise LVMError(f"{path}: was not written by a gallery, but a page needs this name; move it away")

    def write_file(name: str, content: bytes) -> None:
        write_atomic(out / name, lambda partial: partial.write_bytes(content))

    def write_mark(names: Collection[str]) -> None:
        write_file(MARK, json.dumps({**counts, "files": sorted(names)}).encode() + b"\n")

    out.mkdir(exist_ok=True)
    write_mark(pages.keys() | earlier)
    (out / "pages").mkdir(exist_ok=True)
    for name, content in pages.items():
        write_file(f"pages/{name}", content)
    write_file("index.html", index.encode())
    for name in earlier - pages.keys():
        (out / "pages" / name).unlink()
    write_mark(pages)


def _collect(root: Path, showcase: bool, fast: bool) -> list[dict]:
    """Return the cards of runs and of other notebooks, each with `notebooks`, the paths that it links to."""
    cards = []
    for top in (root, root / "fast") if fast else (root,):
        folders = sorted(p.parent for p in top.glob("*/*/*/run.yaml") if _shown(p, top))
        for folder in folders:
            data, version, name = folder.parts[-3:]
            run = {"data": data, "version": version, "title": "", "name": f"{data} / {version} / {name}"}
            paths = [folder / f"{name}{part}.ipynb" for name in RUN_NOTEBOOKS for part in ("", ".partial")]
            cards.append(_card(facts, folder, run, root, top != root, [p for p in paths if p.is_file()]))
        for path in sorted((*top.glob("*.ipynb"), *top.glob("*/*.ipynb"), *top.glob("*/*/*/*.ipynb"))):
            elsewhere = path.parent in folders or path.relative_to(top).parts[0] in APART
            if _shown(path, top) and not elsewhere and not path.name.endswith(".partial.ipynb"):
                cards.append(_card(notebook_facts, path, {}, root, top != root, [path]))
    for path in sorted(SHOWCASE.glob("*.ipynb")) if showcase else ():
        cards.append(_card(showcase_facts, path, {}, root, False, [path]))
    return sorted(cards, key=_order)


def _card(read_facts: Callable, path: Path, run: dict, root: Path, fast: bool, notebooks: list[Path]) -> dict:
    """Return the card of a `run` or of a notebook, or one that says why there is none; never raises."""
    known = {"name": path.stem, "title": path.stem, "data": path.parent.name, "warnings": []} | run
    own = {"fast": fast, "notebooks": notebooks}
    try:
        card = known | read_facts(path) | own
        _index([card]).encode("utf-8")  # values from files may be of any kind, or no Unicode
        for warning in card["warnings"]:
            warning["detail"] = _short(warning["detail"], root)
        return card
    except Exception as e:  # a damaged file makes its reader raise anything
        warning = {"what": "cannot be read", "detail": _short(format_error(e), root)}
        return known | own | {"state": "damaged", "warnings": [warning]}


def _short(text: str, root: Path) -> str:
    """Return a text without the folders of this machine, which the site does not name."""
    return text.replace(f"{root}/", "").replace(f"{ROOT}/", "")


def _order(card: dict) -> tuple:
    if card["title"]:
        return (True,)
    data, version, model, seed = (str(card.get(key) or "") for key in ("data", "version", "model", "seed"))
    return False, data, card["fast"], len(version), version, model != "transformer", model, seed


def _shown(path: Path, top: Path) -> bool:
    return not any(p.startswith(".") or ".old-" in p for p in path.relative_to(top).parts)


def _add_page(path: Path, pages: dict[str, bytes], card: dict, root: Path) -> dict | None:
    """Add a notebook's page to `pages`. Returns its link, or None, with a warning, if it cannot be read."""
    start = root if path.is_relative_to(root) else path.parent.parent
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(path.relative_to(start).with_suffix("").parts)).strip("-.")
    plain = plain[:200] or "notebook"  # file names have at most 255 bytes
    names = (f"{plain}-{i}.html" if i else f"{plain}.html" for i in itertools.count())
    name = next(n for n in names if n not in pages)
    try:
        notebook = read(path)
        pages[name] = page(notebook, home="../index.html").encode("utf-8")
    except Exception as e:  # one damaged notebook must not stop the gallery
        card["warnings"].append({"what": f"{path.name} cannot be shown", "detail": _short(format_error(e), root)})
        return None
    card.setdefault("date", date(notebook))
    text = RUN_NOTEBOOKS.get(path.stem.removesuffix(".partial").split("-")[0], "Open")
    text += ", as far as it came" if path.stem.endswith(".partial") else ""
    return {"href": f"pages/{quote(name)}", "text": text}


def facts(folder: Path) -> dict[str, Any]:
    """Return what a card shows of a run, as plain values; the commands put them into the run's notebook, too.

    Raises LVMError if run.yaml or a table cannot be read. A report that cannot be read gives a warning.
    """
    record, history, steps = open_run(folder)
    version, finished = resolved(record["parameters"], str(folder)), "finished" in record
    warnings = [
        {
            "what": f"{alarm['kind']} (epoch {alarm['epoch']}, step {alarm['step']})",
            "detail": f"{alarm['what'].rstrip('.')}. {alarm['do'].rstrip('.')}",
        }
        for alarm in record.get("alarms") or []
    ]
    if record.get("stopped"):
        warnings.append({"what": "stopped early", "detail": record["stopped"]})
    result = {key: getattr(version, key) for key in ("about", "horizon", "model", "seed", "direction")}
    result |= {
        "name": folder.name,
        "state": "finished" if finished else "unfinished",
        "version": version.name,
        "data": data_name(version.data),
        "epochs": len(history),
        "of_epochs": version.epochs,
        "precision": record.get("computed", {}).get("precision"),
        "commit": record["software"].get("commit"),
        "epoch": [int(e) for e in history["epoch"]],
        "margin": _finite(history["margin"]),
        "novel_mrr": _finite(history["novel_mrr"]),
        "warnings": warnings,
    }
    try:
        result |= _report_facts(read_report(folder / "fivecat.json"))
    except OSError:
        if finished:
            warnings.append({"what": "not judged", "detail": "there is no fivecat.json; run train.ipynb again"})
    except Exception as e:  # a damaged report
        warnings.append({"what": "fivecat.json cannot be read", "detail": format_error(e)})
    result["checks"] = [
        {"what": c.check, "detail": f"{c.measured}, wanted {c.wanted}" + (f"; first at {c.broke}" if c.broke else "")}
        for c in (checklist(version, history, steps) if len(history) else [])
        if c.passed is False
    ]
    return result


def _report_facts(report: dict) -> dict[str, Any]:
    """Return what a card shows of fivecat.json: verdict, reading, gates, validation figures of model and copying."""
    words = {True: "passed", False: "failed"}
    gates = {
        f"{profile}, {'OOD' if split == 'ood' else split}": {g: words.get(w, str(w)) for g, w in outcomes.items()}
        for profile in ("calibrated", "original")
        for split, outcomes in report[profile]["gates"].items()
    }
    figures: dict[str, dict[str, float]] = {"model": {}, "copy last": {}}
    for row in report["calibrated"]["table"]:
        key = {"margin against the last": "margin", "novel MRR": "novel_mrr"}.get(row["measure"])
        if key and row["split"] == "val" and row["predictor"] in figures and row["value"] is not None:
            figures[row["predictor"]][key] = float(row["value"])
    return {
        "verdict": str(report["verdict"]["text"]),
        "success": bool(report["verdict"]["success"]),
        "reading": {key: str(report["reading"][key]) for key in ("label", "text")},
        "gates": gates,
        "copy_last": figures["copy last"],
        "best": figures["model"],
    }


def notebook_facts(path: Path) -> dict[str, Any]:
    """Return what a card shows of another notebook. Raises LVMError if it cannot be read."""
    content = read(path)
    errors = [o for c in content["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    warnings = [{"what": "ended with an error", "detail": str(e.get("evalue", ""))[:300]} for e in errors[-1:]]
    given = {key: str(value) for key, value in stamp.given(path).items()}
    return {"title": title(content), "verdict": _conclusion(content), "given": given, "warnings": warnings}


def showcase_facts(path: Path) -> dict[str, Any]:
    """Return the same of a committed notebook, or the `facts` of the run that it holds; and if its code has changed."""
    content = read(path)
    run = content["metadata"].get("lvmlib", {}).get("run")
    kind, why = stamp.state(content)
    return ({"title": ""} | run | {"name": path.stem} if run else notebook_facts(path)) | {"code": kind, "why": why}


def _conclusion(content: Mapping) -> str:
    """Return what the last cell tagged `conclusion` displayed as Markdown, as plain text."""
    cells = [c for c in content["cells"] if "conclusion" in c["metadata"].get("tags", [])]
    data = [o.get("data", {}) for o in cells[-1].get("outputs", [])] if cells else []
    return " ".join(d["text/markdown"] for d in data if "text/markdown" in d).replace("*", "")


def _finite(values) -> list[float | None]:
    return [round(float(x), 6) if math.isfinite(x) else None for x in values]


def spark(values: list[float | None], copying: float | None) -> dict | None:
    """Return a sparkline's coordinates in a box of 100 × 32: the run's points, and the heights of zero and of copying.

    None for fewer than two values. The scale includes zero and copying.
    """
    known = [x for x in values if x is not None]
    if len(known) < 2:
        return None
    scale = [*known, 0.0, copying or 0.0]
    low, span = min(scale), max(max(scale) - min(scale), 1e-9)

    def y(x: float) -> float:
        return round(31 - 30 * (x - low) / span, 2)

    step = 100 / (len(values) - 1)
    points = " ".join(f"{round(i * step, 2)},{y(x)}" for i, x in enumerate(values) if x is not None)
    return {"points": points, "zero": y(0.0), "copying": None if copying is None else y(copying), "last": known[-1]}
