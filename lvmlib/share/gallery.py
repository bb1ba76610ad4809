"""The executed notebooks of outputs/ as a static site: an index with a card for each run, and a page for each notebook.

    outputs/gallery/
        index.html              the cards: what each run's folder says of it, nothing computed anew but the checklist
        pages/NAME.html         the notebooks, by `page`
        gallery.json            the mark by which a gallery is known, with a list of its pages

It is built aside and then put in place of the last one, file by file. What else lies in the folder stays (.git, CNAME:
who publishes it keeps them there), and a folder that holds something and has no mark is refused. Each file stands
alone: opened from disk or from any host, nothing is fetched. A run that is unfinished, damaged or of an older format
has a card that says so. What was displayed is cleaned (see `page`), but notebooks are one's own: do not publish those
of others without reading them.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..config import data_name, files, resolved
from ..errors import LVMError, said
from ..io import stamp as fingerprint
from ..io.disk import hold, sync, told, write_whole
from ..io.limits import NOTEBOOK, read_bytes, read_json
from ..io.paths import ROOT, outputs
from ..judge.fivecat import GATES, INSTRUMENT
from ..judge.rating import checklist
from ..runs.folder import open_run
from .page import page, read, render, title

MARK = "gallery.json"
FORMAT = 2  # 1 had no list of pages: all HTML in pages/ was taken for its own
SHOWCASE = ROOT / "outputs" / "showcase"
APART = ("gallery", "showcase", "datasets", "imported", "fast")  # under outputs/: no dataset's notebooks
MARKS = {"passed": "✓", "failed": "✗", "open": "○"}
OF_A_RUN = ("train", "diagnostics", "fivecat")
# A line of train.ipynb's log, in rendered notebooks from before they carried what a card needs.
EPOCH = re.compile(r"^epoch +(\d+)/(\d+) .*?margin ([+-]\d\.\d+)", re.MULTILINE)


def build(
    out: Path | None = None, root: Path | None = None, showcase: bool = False, fast: bool = False
) -> tuple[Path, dict[str, int]]:
    """Build the gallery of `root` (outputs/) in `out` (outputs/gallery): its index, and how many cards it has by kind.

    `showcase`: with the committed notebooks of outputs/showcase, too; `fast`: with fast runs, which are marked. Raises
    LVMError where there is nothing to show, and where `out` is something else than a gallery.
    """
    root = Path(root or outputs())
    out = Path(out or root / "gallery")
    new = out.with_name(f".{out.name}.new")
    with told(out), contextlib.ExitStack() as stack:
        _refuse(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = out.with_name(f".{out.name}.gallery.lock")
        stack.enter_context(hold(lock, lambda by: f"{out}: {by} is building it; wait for it"))
        _refuse(new)
        if new.exists():  # of a build that was killed
            shutil.rmtree(new)
        new.mkdir()
        stack.callback(shutil.rmtree, new, ignore_errors=True)
        (new / MARK).write_text(json.dumps({"format": FORMAT}), encoding="utf-8")  # first: by it the next build knows
        (new / "pages").mkdir()
        runs, others = _collect(root, out, showcase, fast)
        if not runs and not others:
            raise LVMError(
                f"{root}: no run and no executed notebook; train one, as by: make train VERSION=v22, or show the "
                'committed ones: make gallery ARGS="--showcase"'
            )
        built = datetime.datetime.now(datetime.UTC).date().isoformat()
        about = {"title": "LVM Lab gallery", "built": built, "gates": GATES, "marks": MARKS}
        about |= {"spark": spark, "last": _last, "sentence": _sentence}
        runs = [_sound(card, runs=[card], others=[], **about) for card in runs]
        others = [_sound(card, runs=[], others=[card], **about) for card in others]
        names: set[str] = set()
        for card in [*runs, *others]:
            card["links"] = [link for path in card.pop("notebooks") if (link := _page(path, new, names, card, root))]
            for warning in card.get("warnings", []):  # errors name files; the site names no machine
                warning["detail"] = warning["detail"].replace(f"{root}/", "").replace(f"{ROOT}/", "")
        index = render("index.html.j2", runs=runs, others=others, **about)
        (new / "index.html").write_text(index, encoding="utf-8")
        counts = {"runs": len(runs), "notebooks": len(others), "pages": len(names)}
        _place(new, out, {"format": FORMAT, "built": built, **counts})
    return out / "index.html", counts


def _refuse(folder: Path) -> None:
    """Raise LVMError where something else than a gallery, or a part of one, stands."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()) or (
        folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file()
    ):  # fmt: skip
        raise LVMError(f"{folder}: is there and is no gallery (it has no {MARK}); name another folder, or move it away")


def _own(out: Path) -> set[str]:
    """The files in pages/ that galleries wrote. Raises LVMError where that cannot be told."""
    _refuse(out)
    pages = out / "pages"
    if pages.is_symlink() or (pages.exists() and not pages.is_dir()):
        raise LVMError(f"{pages}: is there and is no folder of a gallery; move it away")
    there = {p.name for p in pages.iterdir()} if pages.is_dir() else set()
    if not there:
        return there
    try:
        record = read_json(out / MARK)
        if record["format"] == 1:
            return {name for name in there if name.endswith(".html")}
        return there & set(record["files"])  # a list that came from elsewhere may name files of other folders
    except Exception as e:
        raise LVMError(f"{out / MARK}: cannot be read ({said(e)}); restore it, or move {out} away") from e


def _place(new: Path, out: Path, record: dict) -> None:
    """Put the gallery built in `new` over the one in `out`; what no gallery wrote stays there.

    The index comes after the pages that it names, and pages that it names no more go last: wherever this ends, each
    file is whole and each link leads somewhere, and the next build finishes it.
    """
    for folder in (new / "pages", new):  # before the names change: after a power cut, each file is the old or the new
        sync(folder)
    made, own = {p.name for p in (new / "pages").iterdir()}, _own(out)
    if taken := sorted(n for n in made - own if (out / "pages" / n).exists()):
        raise LVMError(f"{out / 'pages' / taken[0]}: is there and is of no gallery, which needs the name; move it away")
    out.mkdir(exist_ok=True)
    _mark(out, record, made | own)
    (out / "pages").mkdir(exist_ok=True)
    for name in sorted(made):
        (new / "pages" / name).replace(out / "pages" / name)
    sync(out / "pages", files=False)
    (new / "index.html").replace(out / "index.html")
    sync(out, files=False)
    for name in own - made:
        (out / "pages" / name).unlink()
    _mark(out, record, made)


def _mark(out: Path, record: dict, pages: set[str]) -> None:
    text = json.dumps(record | {"files": sorted(pages)}) + "\n"
    write_whole(out / MARK, lambda partial: partial.write_text(text, encoding="utf-8"))


# What there is


def _collect(root: Path, out: Path, showcase: bool, fast: bool) -> tuple[list[dict], list[dict]]:
    """Cards of runs and of other notebooks; each with `notebooks`, the paths of those that it links to."""
    runs, others = [], []
    for top, quick in ((root, False), *(((root / "fast", True),) if fast else ())):
        # A fast run lies deeper than `root` is searched: what is found in fast/ is a run of a dataset of that name.
        folders = sorted(p.parent for p in top.glob("*/*/*/run.yaml") if _shown(p, top))
        taken = set(folders)
        for folder in folders:
            found = [folder / f"{name}{part}.ipynb" for name in OF_A_RUN for part in ("", ".partial")]
            runs.append(run_card(folder) | {"fast": quick, "notebooks": [p for p in found if p.is_file()]})
        for path in sorted((*top.glob("*.ipynb"), *top.glob("*/*.ipynb"), *top.glob("*/*/*/*.ipynb"))):
            aside = path.parent in taken or path.relative_to(top).parts[0] in APART
            if _shown(path, top) and not aside and not path.name.endswith(".partial.ipynb"):
                others.append(notebook_card(path) | {"fast": quick, "notebooks": [path]})
    for path in sorted(SHOWCASE.glob("*.ipynb")) if showcase else ():
        card = showcase_card(path)
        (runs if card.get("version") else others).append(card | {"fast": False, "notebooks": [path]})
    runs.sort(key=_order)
    return runs, others


def _order(card: dict) -> tuple:
    data, version, model, seed = (str(card.get(key) or "") for key in ("data", "version", "model", "seed"))
    return data, card["fast"], len(version), version, model != "transformer", model, seed


def _shown(path: Path, top: Path) -> bool:
    return not any(p.startswith(".") or ".old-" in p for p in path.relative_to(top).parts)


def _page(path: Path, site: Path, names: set[str], card: dict, root: Path) -> dict | None:
    """Write a notebook's page into the site; its link, or None where it cannot be read, which the card then says."""
    start = root if path.is_relative_to(root) else path.parent.parent
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(path.relative_to(start).with_suffix("").parts)).strip("-.")
    plain = plain[:200] or "notebook"  # a file's name has at most 255 bytes, and this one is of several
    name = next(n for i in range(10**6) if (n := plain + (f"-{i}" if i else "")) not in names)
    try:
        shown = page(read(path), home="../index.html").encode("utf-8")
    except Exception as e:  # one damaged notebook must not cost the gallery
        card.setdefault("warnings", []).append({"what": f"{path.name} cannot be shown", "detail": said(e)})
        return None
    (site / "pages" / f"{name}.html").write_bytes(shown)  # a disk that does not take it is no damage of the notebook
    names.add(name)
    words = {"train": "Training", "diagnostics": "Diagnostics", "fivecat": "5CAT"}
    stem = path.stem.removesuffix(".partial")
    text = words.get(stem.split("-")[0], "Open") + (", as far as it came" if path.stem.endswith(".partial") else "")
    return {"href": f"pages/{quote(name)}.html", "text": text}


# Cards


def _sound(card: dict, **shown) -> dict:
    """A card if it can be shown, else one that says that it cannot: what a file told may be of any kind."""
    try:
        if not all(isinstance(w["what"], str) and isinstance(w["detail"], str) for w in card.get("warnings", [])):
            raise TypeError("`warnings` are no texts")
        render("index.html.j2", **shown).encode("utf-8")
        return card
    except Exception as e:
        warning = {"what": "what it tells of its run cannot be shown", "detail": said(e)}
        name = str(card.get("name"))
        return {"name": name, "title": name, "state": "damaged", "version": name, "data": str(card.get("data")),
                "warnings": [warning], "fast": card["fast"], "notebooks": card["notebooks"]}  # fmt: skip


def run_card(folder: Path) -> dict[str, Any]:
    """What a card says of a run's folder; never raises."""
    parts = folder.parts[-3:]
    try:
        return facts(folder)
    except Exception as e:  # whatever a damaged file makes its reader raise
        warning = {"what": "damaged, or of an older format", "detail": said(e)}
        card = {"name": " / ".join(parts), "state": "damaged", "version": parts[1], "data": parts[0]}
        return card | {"warnings": [warning]}


def facts(folder: Path) -> dict[str, Any]:
    """What a run's folder says of it, as plain values: also what `fingerprint.stamp` puts into its notebook.

    Raises LVMError where run.yaml or a table cannot be read; a report that cannot is told in `warnings`.
    """
    record, history, steps = open_run(folder)
    p, software = record["parameters"], record.get("software") or {}
    warnings: list[dict] = [_alarm(a) for a in _list(record.get("alarms"))]
    if record.get("stopped"):
        warnings.append({"what": "stopped before its time", "detail": str(record["stopped"])})
    done = isinstance(record.get("finished"), Mapping)
    found = {
        "name": folder.name,
        "state": "finished" if done else "unfinished",
        "version": str(p.get("name") or folder.parts[-2]),
        "about": str(p.get("about") or ""),
        "data": data_name(files(p["data"])),
        "horizon": p.get("horizon"),
        "model": str(p.get("model") or ""),
        "seed": p.get("seed"),
        "direction": p.get("direction", "forward"),
        "precision": (record.get("computed") or {}).get("precision"),
        "epochs": len(history),
        "of_epochs": p.get("epochs"),
        "seconds": (record.get("finished") or {}).get("training_seconds"),
        "commit": str(software.get("commit") or ""),
        "sources": software.get("sources"),
        "date": _date(folder),
        "epoch": [int(e) for e in history["epoch"]],
        "margin": _finite(history["margin"]),
        "novel_mrr": _finite(history["novel_mrr"]),
    }
    try:
        found |= _judged(folder)
    except OSError:
        if done:
            warnings.append({"what": "not judged", "detail": "there is no fivecat.json; run train.ipynb for it again"})
    except Exception as e:  # a damaged report
        warnings.append({"what": "fivecat.json cannot be read", "detail": said(e)})
    if found.get("instrument") not in (None, INSTRUMENT):
        detail = f"by 5CAT instrument {found['instrument']}, this is {INSTRUMENT}; run train.ipynb for it again"
        warnings.append({"what": "judged by an older instrument", "detail": detail})
    try:
        version = resolved(p, str(folder))
        broken = [c for c in checklist(version, history, steps) if c.held is False] if len(history) else []
        found["checks"] = [{"what": c.check, "detail": f"{c.measured}, wanted {c.wanted}"
                            + (f"; first at {c.broke}" if c.broke else "")} for c in broken]  # fmt: skip
    except Exception as e:
        warnings.append({"what": "the checklist was not applied", "detail": said(e)})
    return found | {"warnings": warnings}


def notebook_card(path: Path) -> dict[str, Any]:
    """What a card says of another notebook; never raises."""
    card: dict[str, Any] = {"name": path.stem, "state": "notebook", "data": path.parent.name, "warnings": []}
    try:
        content = read(path)
        papermill = content["metadata"].get("papermill", {})
        card |= {"title": title(content), "date": str(papermill.get("start_time") or "")[:10]}
        card["given"] = {k: str(v) for k, v in (papermill.get("parameters") or {}).items()}
        if conclusion := _said_by(content, "conclusion", tagged=True):
            card["verdict"] = conclusion
        failed = [o for c in content["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
        if failed:
            card["warnings"].append({"what": "ended with an error", "detail": str(failed[-1].get("evalue", ""))[:300]})
    except Exception as e:
        card |= {"title": path.stem, "state": "damaged"}
        card["warnings"].append({"what": "cannot be read", "detail": said(e)})
    return card


def showcase_card(path: Path) -> dict[str, Any]:
    """A committed notebook's card: a run's, where it carries what `facts` found or is of train.ipynb; and of which
    code it is."""
    card = notebook_card(path) | {"data": "showcase"}
    if card["state"] == "damaged":
        return card
    content = read(path)
    try:
        own = content["metadata"].get("lvmlib", {}).get("run")
        if not own and Path(content["metadata"]["papermill"]["input_path"]).stem == "train":
            own = _from_log(content)
        if own:
            card = card | {"given": {}} | json.loads(json.dumps(own)) | {"name": path.stem}
        kind, why = fingerprint.state(content)
    except Exception as e:
        kind, why = "stale", said(e)
    return card | {"code": kind, "why": why}


def _from_log(content: Mapping) -> dict[str, Any]:
    """What the rendered train.ipynb of an older code says of its run: parameters, margins of its log, its words."""
    given = content["metadata"]["papermill"].get("parameters") or {}
    streams = (o for c in content["cells"] for o in c.get("outputs", []) if o["output_type"] == "stream")
    rows = EPOCH.findall("\n".join("".join(o["text"]) for o in streams))
    return {
        "state": "finished",
        "version": str(given.get("version") or "v22"),
        "data": data_name(files(given.get("data") or "wikipedia")),
        "model": str(given.get("model") or "transformer"),
        "seed": given.get("seed", 0),
        "direction": given.get("direction", "forward"),
        "epochs": len(rows),
        "of_epochs": int(rows[-1][1]) if rows else None,
        "epoch": [int(e) for e, _, _ in rows],
        "margin": [float(m) for _, _, m in rows],
        "verdict": _said_by(content, "verdict.text"),
        "reading": {"label": "", "text": _said_by(content, "reading.headline")},
    }


def _said_by(content: Mapping, words: str, tagged: bool = False) -> str:
    """What the last cell with `words` in its code (or so tagged) displayed as Markdown, as plain text."""
    for cell in reversed(content["cells"]):
        if cell["cell_type"] == "code" and words in (
            cell["metadata"].get("tags", []) if tagged else "".join(cell["source"])
        ):
            said_there = ["".join(o["data"]["text/markdown"]) for o in cell["outputs"]
                          if "text/markdown" in o.get("data", {})]  # fmt: skip
            return " ".join(said_there).replace("*", "")
    return ""


def _judged(folder: Path) -> dict[str, Any]:
    """What fivecat.json says: verdict, reading, gates, and copying's figures on validation."""
    report = read_json(folder / "fivecat.json")
    words = {True: "passed", False: "failed"}
    gates = {
        f"{profile}, {'OOD' if split == 'ood' else split}": {g: words.get(w, str(w)) for g, w in judged.items()}
        for profile in ("calibrated", "original")
        for split, judged in report[profile]["gates"].items()
    }
    measures = {"margin": "margin against the last", "novel_mrr": "novel MRR"}
    values = {
        (row["predictor"], row["measure"]): row["value"]
        for row in report["calibrated"]["table"]
        if row["split"] == "val"
    }
    copy, best = ({k: values.get((who, m)) for k, m in measures.items()} for who in ("copy last", "model"))
    return {
        "instrument": report["instrument"],
        "verdict": str(report["verdict"]["text"]),
        "success": bool(report["verdict"]["success"]),
        "reading": {"label": str(report["reading"]["label"]), "text": str(report["reading"]["text"])},
        "gates": gates,
        "copy_last": {name: float(x) for name, x in copy.items() if x is not None},
        "best": {name: float(x) for name, x in best.items() if x is not None},
    }


def _alarm(alarm: Any) -> dict[str, str]:
    """A line of run.yaml's `alarms`: epoch, step, kind, what, do."""
    if not isinstance(alarm, Mapping):
        return {"what": str(alarm), "detail": ""}
    when = ", ".join(f"{key} {alarm[key]}" for key in ("epoch", "step") if alarm.get(key) is not None)
    detail = ". ".join(str(alarm[key]).rstrip(".") for key in ("what", "do") if alarm.get(key))
    return {"what": f"{alarm.get('kind') or 'alarm'}" + (f" ({when})" if when else ""), "detail": detail}


def _finite(values) -> list[float | None]:
    return [round(float(x), 6) if math.isfinite(x) else None for x in values]


def _list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _date(folder: Path) -> str:
    """When the run's notebook was executed, else when its record was last written."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        told = json.loads(read_bytes(folder / "train.ipynb", NOTEBOOK))["metadata"]["papermill"]["start_time"]
        return datetime.date.fromisoformat(told[:10]).isoformat()
    return datetime.datetime.fromtimestamp((folder / "run.yaml").stat().st_mtime, datetime.UTC).date().isoformat()


def _sentence(text: str) -> tuple[str, str]:
    """The first sentence of a text, and the rest."""
    first, _, rest = text.partition(". ")
    return (first + ".", rest) if rest else (text, "")


def _last(values: list[float | None] | None) -> float | str:
    known = [x for x in values or [] if x is not None]
    return known[-1] if known else ""


def spark(values: list[float | None], copying: float | None, width: int = 100, height: int = 32) -> dict | None:
    """A sparkline's coordinates: points of the run, heights of zero and of copying; None for fewer than two values.

    The scale holds zero and copying, so that what looks large is large.
    """
    known = [x for x in values if x is not None]
    if len(known) < 2:
        return None
    every = [*known, 0.0, *([copying] if copying is not None else [])]
    low, span = min(every), max(max(every) - min(every), 1e-9)

    def y(x: float) -> float:
        return round(height - 1 - (x - low) / span * (height - 2), 2)

    step = width / (len(values) - 1)
    points = " ".join(f"{round(i * step, 2)},{y(x)}" for i, x in enumerate(values) if x is not None)
    return {"points": points, "zero": y(0.0), "copying": None if copying is None else y(copying), "last": known[-1]}
