# ruff: noqa: E501  (a row is a line)
"""Hostile files and parameters: none runs code, none writes outside outputs/, each ends in one LVMError.

`python tests/share/test_hostile.py` prints the table of docs/safety.md. Hostile input of the importers and of exported
folders is in tests/data/test_original.py (with fuzz_importers.py) and tests/share/test_export.py.
"""

import ast
import base64
import dataclasses
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from fuzz_importers import Runs
from IPython.display import Markdown
from papermill.translators import papermill_translators
from stores import reseal
from toys import Tags, make_data

import lvmlib as lvm
from lvmlib import LVMError, device
from lvmlib.cli import execute, sweep
from lvmlib.cli.parameters import check_injected
from lvmlib.config import data_name
from lvmlib.data import store as V
from lvmlib.io import limits as untrusted
from lvmlib.io.paths import ROOT
from lvmlib.judge.rating import LABELS
from lvmlib.report import plots, readout, summary
from lvmlib.runs import folder as runs
from lvmlib.runs.alarms import Alarm
from lvmlib.share import page
from lvmlib.text import build as encode

TRANSLATOR = papermill_translators.find_translator("python3", "python")
SETTINGS = {"model": "amn", "fast": True, "epochs": 2}


class Place:
    """A folder with outputs/ in it; everything else in it, and the checkout, must stay as it is."""

    def __init__(self, around: Path):
        self.around, self.outputs, self.canary = around, around / "outputs", around / "canary"
        self.run = self.outputs / "fast" / "wikipedia" / "v22" / "seed0-amn"
        self.store = self.outputs / "datasets" / "texts"
        self.precious = around / "precious"
        self.precious.write_text("mine")

    def listing(self) -> dict:
        """Everything outside outputs/, with its content."""
        outside = (p for p in self.around.rglob("*") if p.is_file() and not p.is_relative_to(self.outputs))
        around = [*ROOT.iterdir(), *(ROOT / "params").iterdir(), *self.around.parent.iterdir()]
        return {path: path.read_bytes() for path in outside} | dict.fromkeys(around)

    # What opens the files

    def resume(self):
        return lvm.train(lvm.version("v22", **SETTINGS), lvm.dataset(fast=True))

    def best(self):
        return self.resume().best

    def tables(self):
        return runs.open_run(self.run)

    def report(self):
        return summary.judged([self.run])

    def open_store(self):
        return V.open_store(self.store)

    # What is done to them

    def pickle_state(self):
        (self.run / "last" / "state.pt").write_bytes(pickle.dumps(Runs(self.canary)))

    def torch_pickle_state(self):
        torch.save({"model": Runs(self.canary)}, self.run / "last" / "state.pt")

    def pack_state(self):
        """A checkpoint of 1 MB that would take a gigabyte: torch unpacks packed parts."""
        path, packed = self.run / "last" / "state.pt", self.run / "packed"
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
            for member in archive.infolist():
                target.writestr(member.filename, archive.read(member))
        packed.rename(path)

    def pickle_weights(self):
        (self.run / "best.safetensors").write_bytes(pickle.dumps(Runs(self.canary)))

    def endless_weights(self):
        head = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
        (self.run / "best.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)

    def sparse_record(self):
        os.truncate(self.run / "run.yaml", 1 << 40)

    def pipe_record(self):
        (self.run / "run.yaml").unlink()
        os.mkfifo(self.run / "run.yaml")

    def object_vectors(self):
        """vectors.npy as an object array, which is a pickle; with its checksum in the datasheet."""
        np.save(self.store / "vectors.npy", np.array([Runs(self.canary)], object), allow_pickle=True)
        reseal(self.store)


def put(file, text, of="run"):
    """`text` in place of a file's content; YAML in it stands for a tag that runs a command."""
    return lambda place: (getattr(place, of) / file).write_text(
        text.replace("YAML", f"!!python/object/apply:os.system ['touch {place.canary}']")
    )


def swap(file, old, new):
    def change(place):
        text = (place.run / file).read_text()
        assert len(re.findall(old, text)) == 1, old
        (place.run / file).write_text(re.sub(old, lambda _: new, text))

    return change


def given(*arguments):
    return lambda place: execute.check_options("train", [a.format(place.canary) for a in arguments])


def injected(line):
    cells = ["", 'version = "v22"\noverrides = {}']
    return lambda place: check_injected([*cells, "# Parameters\n" + line.replace("CANARY", str(place.canary))])


def calls(function):
    return lambda *values, **named_values: lambda place: function(*values, **named_values)


versioned = calls(lambda *name, **top: lvm.run_folder(lvm.version(*(name or ["v22"]), **top)))
named = calls(lambda name: lvm.run_folder(lvm.version("v22"), name))
opened = calls(lvm.dataset)
encoded = calls(lambda out: encode.store_folder("wikipedia", out=out))
planned = calls(lambda **config: sweep.plan({"versions": ["p6"], "seeds": 1, **config}))


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [*{a},*{a}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BINARY = base64.b64encode(b'";import os;os.system("touch {}");"').decode()
DIGITS = "9" * 100_000
DEEP = "[" * 100_000


class Row(NamedTuple):
    where: str  # it comes in
    tries: str
    words: str  # in the LVMError
    act: Callable[[Place], object]
    before: Callable[[Place], object] | None = None


ROWS = [
    Row("checkpoint `state.pt`", "a pickle that calls os.system", "state.pt", Place.resume, Place.pickle_state),
    Row("checkpoint `state.pt`", "the same inside torch's own format", "state.pt", Place.resume, Place.torch_pickle_state),
    Row("checkpoint `state.pt`", "packed parts that fill the memory", "state.pt.*packed", Place.resume, Place.pack_state),
    Row("weights `best.safetensors`", "a pickle by that name", "best.safetensors", Place.best, Place.pickle_weights),
    Row("weights `best.safetensors`", "a head that claims 4 TB", "best.safetensors", Place.best, Place.endless_weights),
    Row("`run.yaml`", "a tag that calls os.system", "seed0-amn", Place.tables, put("run.yaml", "a: YAML")),
    Row("`run.yaml`", "aliases of aliases", "seed0-amn.*2,000,000", Place.tables, put("run.yaml", LAUGHS)),
    Row("`run.yaml`", "merge keys that double", "seed0-amn.*merge", Place.tables, put("run.yaml", MERGES)),
    Row("`run.yaml`", "10⁵ lists in each other", "seed0-amn.*50", Place.tables, put("run.yaml", DEEP)),
    Row("`run.yaml`", "a list in itself", "seed0-amn.*50", Place.tables, put("run.yaml", "a: &a [*a]")),
    Row("`run.yaml`", "10⁵ digits", "seed0-amn.*digits", Place.tables, put("run.yaml", f"a: {DIGITS}")),
    Row("`run.yaml`", "a file of a terabyte", "seed0-amn.*run.yaml", Place.tables, Place.sparse_record),
    Row("`run.yaml`", "a pipe", "seed0-amn.*run.yaml", Place.tables, Place.pipe_record),
    Row("`run.yaml`", "text for a number", "dataset.windows", Place.tables, swap("run.yaml", r"train: \d+", "train: '<b>'")),
    Row("`run.yaml`", "text for a group", "seed0-amn.*run.yaml", Place.tables, put("run.yaml", "{parameters: {}, computed: x}")),
    Row("`epochs.csv`", "text for a number", "seed0-amn", Place.tables, swap("epochs.csv", r"\n1,", "\n=cmd|'/C calc'!A1,")),
    Row("`fivecat.json`", "10⁵ lists in each other", "fivecat.json", Place.report, put("fivecat.json", DEEP)),
    Row("`fivecat.json`", "10⁵ digits", "fivecat.json", Place.report, put("fivecat.json", f'{{"instrument": {DIGITS}}}')),
    Row("store: `datasheet.yaml`", "a tag that calls os.system", "datasheet.yaml", Place.open_store, put("datasheet.yaml", "sha256: YAML", "store")),
    Row("store: `datasheet.yaml`", "aliases of aliases", "datasheet.yaml", Place.open_store, put("datasheet.yaml", LAUGHS, "store")),
    Row("store: `datasheet.yaml`", "10⁵ lists in each other", "datasheet.yaml", Place.open_store, put("datasheet.yaml", DEEP, "store")),
    Row("store: `vectors.npy`", "an object array: a pickle", "vectors.npy", Place.open_store, Place.object_vectors),
    Row("parameter `data`", "`..`, to write runs beside outputs/", "data", versioned(data="..")),
    Row("parameter `data`", "the same behind a path", "data", versioned(data="some/..")),
    Row("parameter `data`", "the root folder", "data", versioned(data="/")),
    Row("parameter `data`", "a hidden folder", "data", versioned(data=".ssh")),
    Row("parameter `data`", "a NUL character", "data", versioned(data="a\0b")),
    Row("parameter `data`", "a line break", "data", versioned(data="a\nb")),
    Row("parameter `data`", "a name of 300 characters", "data", versioned(data="a" * 300)),
    Row("parameter `data`", "a file's name of dots", "data", versioned(data={"articles": "x/...npz"})),
    Row("parameter `data`", "signs of the shell", "data", versioned(data="a;touch $b")),
    Row("parameter `data`", "look-alikes of `..`", "\u2025|u2025", opened("\u2025")),
    Row("parameter `data`", "a NUL character in a file's name", "npz", opened({"articles": "a\0.npz"})),
    Row("parameter `version`", "a path", "version", versioned("../params/base")),
    Row("parameter `version`", "code", "version", versioned("v22'; import os; os.mkdir('x'); '")),
    Row("parameter `version`", "a look-alike of v22", "version", versioned("v\uff12\uff12")),
    Row("parameter `version`", "a NUL character", "version", versioned("v22\0")),
    Row("parameter `run_name`", "a path", "run_name", named("../../../x")),
    Row("parameter `run_name`", "an absolute path", "run_name", named("/tmp/x")),
    Row("parameter `run_name`", "a line break", "run_name", named("a\nb")),
    Row("parameter `run_name`", "a name of 300 characters", "run_name", named("a" * 300)),
    Row("parameter `out`", "`..`", "out", encoded("..")),
    Row("parameter `out`", "a NUL character", "out", encoded("a\0b")),
    Row("parameter `out`", "a line break", "out", encoded("a\n")),
    Row("parameter `out`", "a name of 300 characters", "out", encoded("a" * 300)),
    Row("parameter `overrides`", "a key that is none", "__class__", versioned(overrides={"__class__": 1})),
    Row("parameter `overrides`", "a key of another kind", "key", versioned(overrides={(1, 2): {}})),
    Row("parameter `overrides`", "a number of 10⁵ digits", "digits", versioned(overrides={"seed": 10**100_000})),
    Row("parameter `overrides`", "a format string", "device", lambda p: device.pick_device("{0.__class__}")),
    Row("papermill's options", "code for a name (-p)", "import os", given("-p", "version = 1; import os; os.system('touch {}'); x", "1")),
    Row("papermill's options", "code for a name (-y)", "import os", given("-y", "{{'import os; os.mkdir(\"{}\"); x': 1}}")),
    Row("papermill's options", "code in bytes, which it writes unquoted", "bytes", given("-y", f"version: !!binary {BINARY}")),
    Row("papermill's options", "the same in a nested value", "bytes", given("-b", base64.b64encode(f"overrides: {{a: !!binary {BINARY}}}".encode()).decode())),
    Row("papermill's options", "a set, which it writes unquoted", "set", given("-y", "overrides: {{a: !!set {{x}}}}")),
    Row("papermill's options", "a tag that calls os.system", "constructor", given("-y", "version: !!python/object/apply:os.system ['touch {}']")),
    Row("injected cell", "a known name with code behind it", "plain", injected("version = 'v22'; __import__('os').system('touch CANARY')")),
    Row("injected cell", "a call for a value", "plain", injected("version = print('CANARY')")),
    Row("injected cell", "an import", "plain", injected("import os")),
    Row("injected cell", "a known name's part", "plain", injected("version.x = 1")),
    Row("`sweep.yaml`", "a version by path", "version", planned(versions=["../x"])),
    Row("`sweep.yaml`", "a dataset `..`", "vectors.npy", planned(datasets=[".."])),
    Row("`sweep.yaml`", "an unknown key", "__import__", planned(__import__="os")),
    Row("`sweep.yaml`", "code for an override", "import os", planned(overrides={"x; import os": 1})),
]  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Outputs with a store and a run that was interrupted after its first epoch."""
    place = Place(tmp_path_factory.mktemp("begun"))
    part = iter(lvm.train(lvm.version("v22", **SETTINGS), lvm.dataset(fast=True), place.run))
    next(part)
    part.close()
    V.write_store(make_data().store, place.store)
    return place.outputs


@pytest.fixture
def place(tmp_path, begun, monkeypatch):
    (tmp_path / "inner" / "around").mkdir(parents=True)
    place = Place(tmp_path / "inner" / "around")
    shutil.copytree(begun, place.outputs)
    monkeypatch.setenv("LVM_OUTPUTS", str(place.outputs))
    monkeypatch.setenv("HOME", str(place.around))
    monkeypatch.chdir(place.around)
    return place


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.where}: {row.tries}")
def test_hostile_input_does_nothing_and_ends_in_one_error(row, place):
    if row.before is not None:
        row.before(place)
    before = place.listing()
    with pytest.raises(LVMError, match=f"(?s){row.words}") as error:
        row.act(place)
    assert len(str(error.value)) < 3000 and "\0" not in str(error.value)
    assert not place.canary.exists()
    assert place.listing() == before


def test_the_payloads_would_have_run(place):
    """Opened without care, the same payloads make the canary: the rows above can fail."""
    pickle.loads(pickle.dumps(Runs(place.canary)))
    assert place.canary.exists()
    place.canary.unlink()
    value = base64.b64decode(BINARY).replace(b"{}", str(place.canary).encode())
    exec(TRANSLATOR.codify({"version": value}), {})
    assert place.canary.exists()


# What is opened, and harmless


def test_training_replaces_links_and_pipes(place):
    links = [place.run / name for name in ("epochs.csv.partial", "last/state.pt.partial", "../seed0-amn.lock")]
    for path in links:
        path.symlink_to(place.precious)
    os.mkfifo(pipe := place.run / "run.yaml.partial")  # opened for writing, it would block
    before = place.listing()
    assert len(list(place.resume())) == 2
    assert place.listing() == before and not any(os.path.lexists(path) for path in (*links, pipe))


def test_opening_a_store_writes_through_no_link(place):
    """checked.json is written beside a store, by a name that can be foreseen."""
    for path in place.store.iterdir():
        os.utime(path, (1e9, 1e9))
    checked = place.store / "checked.json"
    for path in (checked, place.store / f"checked.json.{os.getpid()}"):
        path.symlink_to(place.precious)
    place.open_store()
    assert place.precious.read_text() == "mine" and checked.is_file() and not checked.is_symlink()


def test_harmless_names_pass():
    for data in ("a/b/texts", "~/texts", "My texts (1)", "Tom's", "world:converging", "données", "../x"):
        assert not {"/", ".."} & set(data_name(data)) and data_name(data).strip()


def test_papermill_makes_literals_of_texts():
    """Of texts, and of maps and lists of them; the names and other types are `check_options`' matter."""
    texts = ["'; import os; '", '"; import os; "', "\\", '\\"; x="', "\n", "{0}", "${x}", "\u2028", "a\0b"]
    values = {"version": texts, "overrides": {text: [text, {"a": text}] for text in texts}}
    assert {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(TRANSLATOR.codify(values)).body} == values


def test_yaml_of_our_own_is_read_as_the_safe_loader_reads_it():
    for path in [*(ROOT / "params").glob("*.yaml"), *(ROOT / "lvmlib" / "data").rglob("*.yaml")]:
        assert untrusted.read_yaml(path) == yaml.safe_load(path.read_text(encoding="utf-8"))


# Rendered pages

MARKUP = (
    "<script>bad()</script><img src=x onerror=bad()>[x](javascript:bad) ![y](/etc/hostname) $\\href{javascript:bad}{z}$"
)


def rendered(*outputs) -> Tags:
    """The page of a notebook that displays these."""
    bundles = [{"text/html": o.to_html()} if hasattr(o, "to_html") else {"text/markdown": o.data} for o in outputs]
    shown = [nbformat.v4.new_output("display_data", data=b) for b in bundles]
    return Tags(page.page(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("show()", outputs=shown)])))


def test_a_page_shows_markup_from_data_as_text(tmp_path):
    store = make_data().store
    store.articles["title"] = [f"{MARKUP} {i}" for i in range(len(store.articles))]
    named = V.open_store(V.write_store(dataclasses.replace(store, name=MARKUP), tmp_path / "s"))
    frame = pd.DataFrame({MARKUP: named.articles["title"], "number": 1.0})
    hostile = rendered(
        plots.table(frame, caption=MARKUP, formats={"number": "{:.1f}"}),
        Markdown(f"**{named.name}**, {readout.escape(named.articles['title'].iloc[0])}"),
        plots.table(pd.DataFrame({"a": [readout.escape(MARKUP)]}), caption=named.name, escaped=True),
        plots.alarms_table([Alarm(1, 1, "broken", MARKUP, MARKUP)]),
    )
    assert len(hostile.all("script")) == 1  # ours
    assert not hostile.all("img") and not [
        a for _, a in hostile.tags if "onerror" in a or a.get("href", "").startswith("javascript")
    ]
    assert "<script>bad()</script>" in "".join(hostile.texts)  # shown as text
    # A formula opens and closes within neighbouring texts: here an element stands between them.
    assert not [text for text in hostile.texts if "javascript:bad" in text and "$" in text]
    assert "".join(hostile.texts).count("$\\href{javascript:bad}") >= 4


def test_labels_of_a_report_are_plain_names():
    assert V.plain_name("<script>bad()</script>") != "<script>bad()</script>"
    assert all(V.plain_name(word) == word for word in (*readout.QUANTILES.values(), *LABELS))


# Sources

FORBIDDEN = {"eval", "exec", "compile", "__import__"}
UNSAFE = {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "jsonpickle", "cPickle"}


def faults(tree: ast.AST) -> list[str]:
    """Return what a source may not do, by its syntax."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"imports {n}" for n in names if n.split(".")[0] in UNSAFE]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {k.arg: k.value for k in node.keywords}
        true = {k for k, v in options.items() if isinstance(v, ast.Constant) and v.value is True}
        if name in FORBIDDEN or name in ("os.system", "os.popen") or "shell" in options:
            found.append(f"calls {name}")
        if name.endswith("torch.load") and "weights_only" not in true:
            found.append("torch.load without weights_only")
        if "allow_pickle" in true or "trust_remote_code" in true or name.endswith(".read_pickle"):
            found.append(f"{name}: pickles or foreign code")
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load") or name.endswith("Loader.construct_python"):
            found.append(name)
    return found


SOURCES = {p.relative_to(ROOT).as_posix(): p for d in ("lvmlib", "workflow") for p in sorted((ROOT / d).rglob("*.py"))}
SOURCES |= {p.name: p for p in sorted((ROOT / "notebooks").glob("*.ipynb"))}


# npz.py overrides all of pickle's class that looks a name up; limits.py gives yaml.load a child of the safe loader.
ALLOWED = {"lvmlib/data/npz.py": ["imports pickle"], "lvmlib/io/limits.py": ["yaml.load"]}


@pytest.mark.parametrize("name", SOURCES)
def test_no_source_opens_a_pickle_or_runs_text(name):
    text = SOURCES[name].read_text(encoding="utf-8")
    if name.endswith(".ipynb"):
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n".join(c.source for c in cells if c.cell_type == "code")
    assert faults(ast.parse(text)) == ALLOWED.get(name, [])


def test_the_rule_sees_what_it_forbids():
    for line in ("import pickle", "from joblib import load", "torch.load(p)", "torch.load(p, weights_only=False)",
                 "eval(x)", "np.load(p, allow_pickle=True)", "yaml.load(x, L)", "subprocess.run(x, shell=True)",
                 "os.system(x)", "pd.read_pickle(p)"):  # fmt: skip
        assert faults(ast.parse(line)), line


def test_the_loader_is_a_safe_one():
    assert issubclass(untrusted.Loader, yaml.SafeLoader) and not untrusted.Loader.yaml_multi_constructors
    assert not [tag for tag in untrusted.Loader.yaml_constructors if tag and "python" in tag]


# The table


HAPPENS = {
    "papermill's options": "`make` and `python -m lvmlib` refuse them before anything runs",
    "injected cell": "papermill called by hand has run it; the notebook says so, and stops before anything else",
}


def markdown() -> str:
    """The table of docs/safety.md: a line for each way in."""
    lines = ["| comes in by | tries | what happens |", "|---|---|---|"]
    for where in dict.fromkeys(row.where for row in ROWS):
        tries = [row.tries for row in ROWS if row.where == where]
        lines.append(f"| {where} | {'; '.join(tries)} | {HAPPENS.get(where, 'refused in one error that names it')} |")
    return "\n".join(lines)


def test_the_docs_have_the_table():
    assert markdown() in (ROOT / "docs" / "safety.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    print(markdown())
