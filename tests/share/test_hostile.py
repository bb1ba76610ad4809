# ruff: noqa: E501  (a row is a line)
"""Hostile files and parameters: none runs code, none writes outside outputs/, each ends in one LVMError.

`python tests/share/test_hostile.py` prints the table of docs/safety.md. Hostile input of the importers and of exported
folders is in tests/data/test_original.py (with fuzz_importers.py) and tests/share/test_export.py.
"""

import ast
import base64
import dataclasses
import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import lock
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from fuzz_importers import Runs
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from toys import Tags, make_data

import lvmlib as lvm
from lvmlib import LVMError, device
from lvmlib.cli import execute, sweep
from lvmlib.cli.parameters import check_injected
from lvmlib.config import data_name
from lvmlib.data import store as V
from lvmlib.io import disk as files
from lvmlib.io import limits as untrusted
from lvmlib.io.paths import ROOT
from lvmlib.judge.rating import LABELS
from lvmlib.report import plots, readout, summary
from lvmlib.runs import folder as runs
from lvmlib.runs.alarms import Alarm
from lvmlib.share import page
from lvmlib.text import build as encode

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
        files = (p for p in self.around.rglob("*") if p.is_file() and not p.is_relative_to(self.outputs))
        around = [*ROOT.iterdir(), *(ROOT / "params").iterdir(), *self.around.parent.iterdir()]
        return {path: path.read_bytes() for path in files} | dict.fromkeys(around)

    def payload(self) -> Runs:
        return Runs(self.canary)

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
        (self.run / "last" / "state.pt").write_bytes(pickle.dumps(self.payload()))

    def torch_pickle_state(self):
        torch.save({"model": self.payload()}, self.run / "last" / "state.pt")

    def pack_state(self):
        """A checkpoint of 1 MB that would take a gigabyte: torch unpacks packed parts."""
        path, packed = self.run / "last" / "state.pt", self.run / "packed"
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
            for member in archive.infolist():
                target.writestr(member.filename, archive.read(member))
        packed.rename(path)

    def pickle_weights(self):
        (self.run / "best.safetensors").write_bytes(pickle.dumps(self.payload()))

    def endless_weights(self):
        head = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
        (self.run / "best.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)

    def sparse_record(self):
        with open(self.run / "run.yaml", "ab") as file:
            file.truncate(1 << 40)

    def pipe_record(self):
        (self.run / "run.yaml").unlink()
        os.mkfifo(self.run / "run.yaml")

    def object_vectors(self):
        """vectors.npy as an object array, which is a pickle; with its checksum in the datasheet."""
        np.save(self.store / "vectors.npy", np.array([self.payload()], object), allow_pickle=True)
        sheet = (self.store / "datasheet.yaml").read_text()
        digest = hashlib.sha256((self.store / "vectors.npy").read_bytes()).hexdigest()
        (self.store / "datasheet.yaml").write_text(re.sub("vectors.npy: .*", f"vectors.npy: {digest}", sheet))


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


def versioned(*name, **top):
    return lambda place: lvm.run_folder(lvm.version(*(name or ["v22"]), **top))


def named(name):
    return lambda place: lvm.run_folder(lvm.version("v22"), name)


def opened(data):
    return lambda place: lvm.dataset(data)


def encoded(out):
    return lambda place: encode.store_folder("wikipedia", out=out)


def planned(**config):
    return lambda place: sweep.plan({"versions": ["p6"], "seeds": 1, **config})


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
    """A run that was interrupted after its first epoch."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    part = iter(lvm.train(lvm.version("v22", **SETTINGS), lvm.dataset(fast=True), folder))
    next(part)
    part.close()
    return folder


@pytest.fixture
def place(tmp_path, begun, monkeypatch):
    (tmp_path / "inner" / "around").mkdir(parents=True)
    place = Place(tmp_path / "inner" / "around")
    shutil.copytree(begun, place.run)
    V.write_store(make_data().store, place.store)
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
    pickle.loads(pickle.dumps(place.payload()))
    assert place.canary.exists()
    place.canary.unlink()
    import papermill.translators

    hostile = papermill.translators.papermill_translators.find_translator("python3", "python").codify(
        {"version": base64.b64decode(BINARY).replace(b"{}", str(place.canary).encode())}
    )
    exec(hostile, {})
    assert place.canary.exists()


# ---------------------------------------------------------------------------------------- what is opened, and harmless


PARTIAL = ("epochs.csv.partial", "run.yaml.partial", "last/state.pt.partial")


@pytest.mark.parametrize("name", [*PARTIAL, "../seed0-amn.lock", "a pipe"])
def test_training_replaces_links_and_pipes(name, place):
    if name == "a pipe":  # opened for writing, it would block
        os.mkfifo(path := place.run / "run.yaml.partial")
    else:
        (path := place.run / name).symlink_to(place.precious)
    before = place.listing()
    assert len(list(place.resume())) == 2
    assert place.listing() == before and not path.exists()


def test_opening_a_store_writes_through_no_link(place):
    """checked.json is written beside a store, by a name that can be foreseen."""
    for path in place.store.iterdir():
        os.utime(path, (1e9, 1e9))
    for name in ("checked.json", f"checked.json.{os.getpid()}"):
        (place.store / name).symlink_to(place.precious)
    place.open_store()
    assert place.precious.read_text() == "mine"
    assert not (place.store / "checked.json").is_symlink() and (place.store / "checked.json").is_file()


def test_write_whole_replaces_a_link(place):
    (place.outputs / "x").symlink_to(place.precious)
    files.write_atomic(place.outputs / "x", lambda p: p.write_text("new"))
    assert place.precious.read_text() == "mine" and (place.outputs / "x").read_text() == "new"


@pytest.mark.parametrize(
    "data", ["a/b/texts", "~/texts", "My texts (1)", "Tom's", "world:converging", "données", "../x"]
)
def test_harmless_names_pass(data):
    assert not {"/", ".."} & set(data_name(data)) and data_name(data).strip()


@pytest.mark.parametrize(
    "value", ["'; import os; '", '"; import os; "', "\\", '\\"; x="', "\n", "{0}", "${x}", "\u2028", "a\0b"]
)
def test_papermill_makes_literals_of_texts(value):
    """Of texts, and of maps and lists of them; the names and other types are `check_given`'s matter."""
    import papermill.translators

    values = {"version": value, "overrides": {value: [value, {"a": value}]}}
    code = papermill.translators.papermill_translators.find_translator("python3", "python").codify(values)
    nodes = ast.parse(code).body
    assert {n.targets[0].id: ast.literal_eval(n.value) for n in nodes} == values


def test_yaml_of_our_own_is_read_as_the_safe_loader_reads_it():
    import yaml

    for path in [*(ROOT / "params").glob("*.yaml"), *(ROOT / "lvmlib" / "data").rglob("*.yaml")]:
        assert untrusted.read_yaml(path) == yaml.safe_load(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------ rendered pages

MARKUP = (
    "<script>bad()</script><img src=x onerror=bad()>[x](javascript:bad) ![y](/etc/hostname) $\\href{javascript:bad}{z}$"
)


def rendered(*outputs) -> Tags:
    """The page of a notebook that displays these."""
    bundles = [{"text/html": o.to_html()} if hasattr(o, "to_html") else {"text/markdown": o.data} for o in outputs]
    shown = [nbformat.v4.new_output("display_data", data=b) for b in bundles]
    return Tags(page.page(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("show()", outputs=shown)])))


def test_a_page_shows_markup_from_data_as_text(tmp_path):
    from IPython.display import Markdown

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
    assert not hostile.all("img")
    assert not [a for _, a in hostile.tags if "onerror" in a or a.get("href", "").startswith("javascript")]
    assert "<script>bad()</script>" in "".join(hostile.texts)  # shown as text
    # A formula opens and closes within neighbouring texts: here an element stands between them.
    assert not [text for text in hostile.texts if "javascript:bad" in text and "$" in text]
    assert "".join(hostile.texts).count("$\\href{javascript:bad}") >= 4


def test_labels_of_a_report_are_plain_names():
    assert V.plain_name("<script>bad()</script>") != "<script>bad()</script>"
    assert all(V.plain_name(word) == word for word in (*readout.QUANTILES.values(), *LABELS))


# ------------------------------------------------------------------------------------------------------------- sources

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


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from joblib import load", "torch.load(p)", "torch.load(p, weights_only=False)", "eval(x)",
     "np.load(p, allow_pickle=True)", "yaml.load(x, L)", "subprocess.run(x, shell=True)", "os.system(x)", "pd.read_pickle(p)"],
)  # fmt: skip
def test_the_rule_sees_what_it_forbids(line):
    assert faults(ast.parse(line))


def test_the_loader_is_a_safe_one():
    import yaml

    assert issubclass(untrusted.Loader, yaml.SafeLoader)
    unsafe = [tag for tag in untrusted.Loader.yaml_constructors if tag and "python" in tag]
    assert unsafe == [] and not untrusted.Loader.yaml_multi_constructors


# ---------------------------------------------------------------------------------------------------- lock and audit


def locked() -> dict[str, str]:
    lines = [line.partition(";")[0].strip() for line in lock.LOCK.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_the_lock_holds_all_that_pyproject_reaches_within_its_ranges():
    found, missing = lock.reached()
    names = (set(found) | missing) - set(lock.FREE)
    assert names <= set(locked())
    for requirement in lock.asked():
        name = canonicalize_name(requirement.name)
        if name not in lock.FREE:
            assert requirement.specifier.contains(locked()[name]), requirement


def test_the_lock_names_no_host_no_path_and_not_torch():
    lines = [line for line in lock.LOCK.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; python_version [\w.<>=\" ]+)?", line) for line in lines)
    assert lines == sorted(lines, key=lambda line: line.split("==")[0]) and not set(locked()) & set(lock.FREE)


def test_what_is_installed_is_what_is_locked():
    found, _ = lock.reached()
    other = {n: d.version for n, d in found.items() if n not in lock.FREE and d.version != locked().get(n)}
    assert not (other and os.environ.get("LVM_LOCKED")), other  # as `make test` says where it installed by the lock
    if other:
        pytest.skip(f"this environment was not made by make, or before the lock: {other}")


def test_every_install_of_the_makefile_uses_the_lock():
    text = (ROOT / "Makefile").read_text()
    assert "LVM_LOCKED=$(if $(LOCK),1)" in text
    assert text.count("pip install") == 1 and "LOCK ?= --constraint constraints.txt" in text
    assert "pip install --quiet $(LOCK) --editable" in text and text.count("$(INSTALL)") >= 5


@pytest.mark.parametrize(
    "answer, code, words",
    [
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', 0, "audited: 1 packages, 0 advisories"),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]}]}', 1, "a 1: X-1, mended in 2"),
        ('{"dependencies": [{"name": "a", "skip_reason": "not found"}]}', 0, "NOT AUDITED: .*not found"),
        ("", 0, "NOT AUDITED: .*no network"),
        (None, 0, "NOT AUDITED: .*no answer"),
    ],
)  # fmt: skip
def test_the_audit_fails_on_advisories_and_says_where_it_was_not_made(answer, code, words, monkeypatch, capsys):
    def run(command, **options):
        if answer is None:
            raise lock.subprocess.TimeoutExpired(command, 1)
        assert "torch==" in Path(command[-1]).read_text()
        return lock.subprocess.CompletedProcess(command, 0, answer, "no network")

    monkeypatch.setattr(lock.subprocess, "run", run)
    assert lock.audit() == code
    said = capsys.readouterr()
    assert re.search(words, said.out + said.err)


def test_a_version_that_not_every_python_takes_gets_a_marker():
    class Distribution:
        version, metadata = "2", {"Requires-Python": ">=3.12"}

    marked = Requirement(lock.line("a", Distribution))
    assert marked.marker.evaluate({"python_version": "3.13"}) and not marked.marker.evaluate({"python_version": "3.11"})


# ----------------------------------------------------------------------------------------------------------- the table


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
    sys.exit()
