# ruff: noqa: E501  (a row is a line)
"""Files and parameters made to do harm: none runs code, none writes outside outputs/, each ends in one LVMError.

`python tests/share/test_hostile.py` prints the table of docs/safety.md. What the importers and an exported folder are given is
tried by tests/data/test_original.py (with fuzz_importers.py) and tests/share/test_export.py, and not repeated here.
"""

import ast
import base64
import dataclasses
import hashlib
import html.parser
import json
import os
import pickle
import re
import shutil
import struct
import sys
import zipfile
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

import lvmlib as lvm
from lvmlib import LVMError, device
from lvmlib import windows as windows_module
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
    """A folder with outputs/ in it; all else of it, and of the checkout, must stay as it is."""

    def __init__(self, around: Path):
        self.around, self.outputs, self.canary = around, around / "outputs", around / "canary"
        self.precious = around / "precious"
        self.precious.write_text("mine")

    @property
    def run(self) -> Path:
        return self.outputs / "fast" / "wikipedia" / "v22" / "seed0-amn"

    @property
    def store(self) -> Path:
        return self.outputs / "datasets" / "texts"

    def listing(self) -> dict:
        """Everything outside outputs/, with its content."""
        found = {}
        for path in self.around.rglob("*"):
            if path.is_file() and not path.is_relative_to(self.outputs):
                found[path] = path.read_bytes()
        return found | dict.fromkeys([*ROOT.iterdir(), *(ROOT / "params").iterdir(), *self.around.parent.iterdir()])

    def payload(self) -> Runs:
        return Runs(self.canary)

    def yaml(self) -> str:
        return f"!!python/object/apply:os.system ['touch {self.canary}']"


# ------------------------------------------------------------------------------------------------------- what is tried


def resumed(place):
    return lvm.train(lvm.version("v22", **SETTINGS), lvm.dataset(fast=True))


def best(place):
    return resumed(place).best


def table(place):
    return runs.open_run(place.run)


def judged(place):
    return summary.judged([place.run])


def store(place):
    return V.open_store(place.store)


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


def pickled(place):
    (place.run / "last" / "state.pt").write_bytes(pickle.dumps(place.payload()))


def torch_pickled(place):
    torch.save({"model": place.payload()}, place.run / "last" / "state.pt")


def bomb(place):
    """A checkpoint of 1 MB that would take a gigabyte: torch unpacks what it finds packed."""
    path = place.run / "last" / "state.pt"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(place.run / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        for member in archive.infolist():
            packed.writestr(member.filename, archive.read(member))
    (place.run / "packed").rename(path)


def weights_pickled(place):
    (place.run / "best.safetensors").write_bytes(pickle.dumps(place.payload()))


def weights_endless(place):
    head = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (place.run / "best.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)


def put(file, text, of="run"):
    """`text` in place of a file's content; YAML is what is put there for the word YAML."""
    return lambda place: (getattr(place, of) / file).write_text(text.replace("YAML", place.yaml()))


def swapped(file, old, new):
    def change(place):
        text = (place.run / file).read_text()
        assert len(re.findall(old, text)) == 1, old
        (place.run / file).write_text(re.sub(old, lambda _: new, text))

    return change


def sparse(place):
    with open(place.run / "run.yaml", "ab") as file:
        file.truncate(1 << 40)


def piped(place):
    (place.run / "run.yaml").unlink()
    os.mkfifo(place.run / "run.yaml")


def objects(place):
    """vectors.npy as an object array, which is a pickle."""
    np.save(place.store / "vectors.npy", np.array([place.payload()], object), allow_pickle=True)
    resealed(place)


def resealed(place):
    """The datasheet with the checksums of what lies there: whoever makes a file makes its checksum."""
    sheet = (place.store / "datasheet.yaml").read_text()
    digest = hashlib.sha256((place.store / "vectors.npy").read_bytes()).hexdigest()
    (place.store / "datasheet.yaml").write_text(re.sub("vectors.npy: .*", f"vectors.npy: {digest}", sheet))


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [*{a},*{a}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BINARY = base64.b64encode(b'";import os;os.system("touch {}");"').decode()
DIGITS = "9" * 100_000
DEEP = "[" * 100_000


def nothing(place):
    pass


class Row(NamedTuple):
    where: str  # it comes in
    tries: str
    words: str  # of the LVMError
    act: object
    before: object = nothing


ROWS = [
    Row("checkpoint `state.pt`", "a pickle that calls os.system", "state.pt: cannot be read", resumed, pickled),
    Row("checkpoint `state.pt`", "the same inside torch's own format", "state.pt: cannot be read", resumed, torch_pickled),
    Row("checkpoint `state.pt`", "packed parts that fill the memory", "state.pt: cannot be read.* packed", resumed, bomb),
    Row("weights `best.safetensors`", "a pickle by that name", "safetensors: not the weights", best, weights_pickled),
    Row("weights `best.safetensors`", "a head that claims 4 TB", "safetensors: not the weights", best, weights_endless),
    Row("`run.yaml`", "a tag that calls os.system", "not the folder of a run", table, put("run.yaml", "a: YAML")),
    Row("`run.yaml`", "aliases of aliases", "not the folder.*2,000,000 values", table, put("run.yaml", LAUGHS)),
    Row("`run.yaml`", "merge keys that double", "not the folder.*merge keys", table, put("run.yaml", MERGES)),
    Row("`run.yaml`", "10⁵ lists in each other", "not the folder.*50 deep", table, put("run.yaml", DEEP)),
    Row("`run.yaml`", "a list in itself", "not the folder.*50 deep", table, put("run.yaml", "a: &a [*a]")),
    Row("`run.yaml`", "10⁵ digits", "not the folder.*digits", table, put("run.yaml", f"a: {DIGITS}")),
    Row("`run.yaml`", "a file of a terabyte", "not the folder.*larger than", table, sparse),
    Row("`run.yaml`", "a pipe", "not the folder.*no plain file", table, piped),
    Row("`run.yaml`", "text for a number", "dataset.windows.*than numbers", table, swapped("run.yaml", r"train: \d+", "train: '<b>'")),
    Row("`run.yaml`", "text for a group", "computed in run.yaml", table, put("run.yaml", "{parameters: {}, computed: x}")),
    Row("`epochs.csv`", "text for a number", "not the folder of a run", table, swapped("epochs.csv", r"\n1,", "\n=cmd|'/C calc'!A1,")),
    Row("`fivecat.json`", "10⁵ lists in each other", "fivecat.json: cannot be read", judged, put("fivecat.json", DEEP)),
    Row("`fivecat.json`", "10⁵ digits", "fivecat.json: cannot be read", judged, put("fivecat.json", f'{{"instrument": {DIGITS}}}')),
    Row("store: `datasheet.yaml`", "a tag that calls os.system", "datasheet.yaml: cannot", store, put("datasheet.yaml", "sha256: YAML", "store")),
    Row("store: `datasheet.yaml`", "aliases of aliases", "datasheet.yaml: cannot", store, put("datasheet.yaml", LAUGHS, "store")),
    Row("store: `datasheet.yaml`", "10⁵ lists in each other", "datasheet.yaml: cannot", store, put("datasheet.yaml", DEEP, "store")),
    Row("store: `vectors.npy`", "an object array: a pickle", "vectors.npy: not a readable", store, objects),
    Row("parameter `data`", "`..`, to write runs beside outputs/", "data '..': its runs", versioned(data="..")),
    Row("parameter `data`", "the same behind a path", "data .*its runs", versioned(data="some/..")),
    Row("parameter `data`", "the root folder", "data '/': its runs", versioned(data="/")),
    Row("parameter `data`", "a hidden folder", "data '.ssh': its runs", versioned(data=".ssh")),
    Row("parameter `data`", "a NUL character", "data .*its runs", versioned(data="a\0b")),
    Row("parameter `data`", "a line break", "data .*its runs", versioned(data="a\nb")),
    Row("parameter `data`", "a name of 300 characters", "data .*its runs", versioned(data="a" * 300)),
    Row("parameter `data`", "a file's name of dots", "data .*its runs", versioned(data={"articles": "x/...npz"})),
    Row("parameter `data`", "signs of the shell", "data .*its runs", versioned(data="a;touch $b")),
    Row("parameter `data`", "look-alikes of `..`", "neither one of", opened("\u2025")),
    Row("parameter `data`", "a NUL character in a file's name", "cannot be opened", opened({"articles": "a\0.npz"})),
    Row("parameter `version`", "a path", "unknown version", versioned("../params/base")),
    Row("parameter `version`", "code", "unknown version", versioned("v22'; import os; os.mkdir('x'); '")),
    Row("parameter `version`", "a look-alike of v22", "unknown version", versioned("v\uff12\uff12")),
    Row("parameter `version`", "a NUL character", "unknown version", versioned("v22\0")),
    Row("parameter `run_name`", "a path", "run_name", named("../../../x")),
    Row("parameter `run_name`", "an absolute path", "run_name", named("/tmp/x")),
    Row("parameter `run_name`", "a line break", "run_name", named("a\nb")),
    Row("parameter `run_name`", "a name of 300 characters", "run_name", named("a" * 300)),
    Row("parameter `out`", "`..`", "out '..': use letters", encoded("..")),
    Row("parameter `out`", "a NUL character", "out .*: use letters", encoded("a\0b")),
    Row("parameter `out`", "a line break", "out .*: use letters", encoded("a\n")),
    Row("parameter `out`", "a name of 300 characters", "out .*: use letters", encoded("a" * 300)),
    Row("parameter `overrides`", "a key that is none", "unknown key '__class__'", versioned(overrides={"__class__": 1})),
    Row("parameter `overrides`", "a key of another kind", "unknown key", versioned(overrides={(1, 2): {}})),
    Row("parameter `overrides`", "a number of 10⁵ digits", "thousands of digits", versioned(overrides={"seed": 10**100_000})),
    Row("parameter `overrides`", "a format string", "device", lambda p: device.pick_device("{0.__class__}")),
    Row("papermill's options", "code for a name (-p)", "is not one of", given("-p", "version = 1; import os; os.system('touch {}'); x", "1")),
    Row("papermill's options", "code for a name (-y)", "is not one of", given("-y", "{{'import os; os.mkdir(\"{}\"); x': 1}}")),
    Row("papermill's options", "code in bytes, which it writes unquoted", "a bytes", given("-y", f"version: !!binary {BINARY}")),
    Row("papermill's options", "the same in a nested value", "a bytes", given("-b", base64.b64encode(f"overrides: {{a: !!binary {BINARY}}}".encode()).decode())),
    Row("papermill's options", "a set, which it writes unquoted", "a set", given("-y", "overrides: {{a: !!set {{x}}}}")),
    Row("papermill's options", "a tag that calls os.system", "constructor", given("-y", "version: !!python/object/apply:os.system ['touch {}']")),
    Row("injected cell", "a known name with code behind it", "no name with a plain value", injected("version = 'v22'; __import__('os').system('touch CANARY')")),
    Row("injected cell", "a call for a value", "no name with a plain value", injected("version = print('CANARY')")),
    Row("injected cell", "an import", "no name with a plain value", injected("import os")),
    Row("injected cell", "a known name's part", "no name with a plain value", injected("version.x = 1")),
    Row("`sweep.yaml`", "a version by path", "unknown version", planned(versions=["../x"])),
    Row("`sweep.yaml`", "a dataset `..`", "vectors.npy: missing", planned(datasets=[".."])),
    Row("`sweep.yaml`", "an unknown key", "unknown key", planned(__import__="os")),
    Row("`sweep.yaml`", "code for an override", "unknown key", planned(overrides={"x; import os": 1})),
]  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that was interrupted after its first epoch."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    part = iter(lvm.train(lvm.version("v22", **SETTINGS), lvm.dataset(fast=True), folder))
    next(part)
    part.close()
    return folder


def made(name="texts", titles=None, **sheet):
    """A small store of three articles, one of each split."""
    x = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    articles = pd.DataFrame({"title": titles or ["a", "b", "c"], "split": list(windows_module.SPLITS)})
    made = V.make_store(
        name,
        x / np.linalg.norm(x, axis=1, keepdims=True),
        np.repeat([0, 1, 2], 10),
        np.tile(np.arange(10), 3),
        articles,
    )
    return dataclasses.replace(made, datasheet=sheet)


@pytest.fixture
def place(tmp_path, begun, monkeypatch):
    (tmp_path / "inner" / "around").mkdir(parents=True)
    place = Place(tmp_path / "inner" / "around")
    shutil.copytree(begun, place.run)
    V.write_store(made(), place.store)
    monkeypatch.setenv("LVM_OUTPUTS", str(place.outputs))
    monkeypatch.setenv("HOME", str(place.around))
    monkeypatch.chdir(place.around)
    return place


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.where}: {row.tries}")
def test_what_is_hostile_does_nothing_and_is_told_in_one_error(row, place):
    row.before(place)
    before = place.listing()
    with pytest.raises(LVMError, match=f"(?s){row.words}") as told:
        row.act(place)
    assert len(str(told.value)) < 3000 and "\0" not in str(told.value)
    assert not place.canary.exists()
    assert place.listing() == before


def test_the_payloads_would_have_run(place):
    """Opened as they must not be, the same pickle makes the canary: what the rows above show is not vacuous."""
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


@pytest.mark.parametrize("name", ["epochs.csv", "run.yaml", "last/state.pt"])
def test_nothing_is_written_through_a_link_in_a_runs_folder(place, name):
    link = place.run / f"{name}.partial"
    link.symlink_to(place.precious)
    before = place.listing()
    assert len(list(resumed(place))) == 2
    assert place.listing() == before and not link.exists()


def test_a_link_for_a_lock_is_replaced_and_what_it_leads_to_is_not_written_over(place):
    lock = place.run.with_name(place.run.name + ".lock")
    lock.symlink_to(place.precious)
    before = place.listing()
    assert len(list(resumed(place))) == 2
    assert place.listing() == before and place.precious.read_text() == "mine" and not lock.exists()


def test_a_pipe_by_the_name_of_a_partial_file_does_not_hold_a_run(place):
    pipe = place.run / "run.yaml.partial"
    os.mkfifo(pipe)
    assert len(list(resumed(place))) == 2 and not pipe.exists()


def test_nothing_is_written_through_a_link_in_a_stores_folder(place):
    """checked.json is written beside a store wherever it lies: by a name that can be foreseen."""
    for path in place.store.iterdir():
        os.utime(path, (1e9, 1e9))
    for name in ("checked.json", f"checked.json.{os.getpid()}"):
        (place.store / name).symlink_to(place.precious)
    store(place)
    assert place.precious.read_text() == "mine"
    assert not (place.store / "checked.json").is_symlink() and (place.store / "checked.json").is_file()


def test_a_whole_file_replaces_a_link_and_leaves_where_it_led(place):
    (place.outputs / "x").symlink_to(place.precious)
    files.write_whole(place.outputs / "x", lambda p: p.write_text("new"))
    assert place.precious.read_text() == "mine" and (place.outputs / "x").read_text() == "new"


@pytest.mark.parametrize(
    "data", ["a/b/texts", "~/texts", "My texts (1)", "Tom's", "world:converging", "données", "../x"]
)
def test_names_that_mean_no_harm_pass(data):
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


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.text = [], []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def rendered(*outputs) -> Tags:
    """The tags of the page of a notebook with these displayed."""
    bundles = [{"text/html": o.to_html()} if hasattr(o, "to_html") else {"text/markdown": o.data} for o in outputs]
    shown = [nbformat.v4.new_output("display_data", data=b) for b in bundles]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("show()", outputs=shown)])
    tags = Tags()
    tags.feed(page.page(notebook))
    return tags


def test_a_rendered_page_shows_markup_from_data_and_does_not_take_it(tmp_path):
    from IPython.display import Markdown

    named = V.open_store(V.write_store(made(name=MARKUP, titles=[f"{MARKUP} {i}" for i in range(3)]), tmp_path / "s"))
    frame = pd.DataFrame({MARKUP: named.articles["title"], "number": 1.0})
    hostile = rendered(
        plots.table(frame, caption=MARKUP, formats={"number": "{:.1f}"}),
        Markdown(f"**{named.name}**, {readout.escape(named.articles['title'].iloc[0])}"),
        plots.table(pd.DataFrame({"a": [readout.escape(MARKUP)]}), caption=named.name, escaped=True),
        plots.alarms_table([Alarm(1, 1, "broken", MARKUP, MARKUP)]),
    )
    plain = rendered(plots.table(pd.DataFrame({"a": ["b"]})), Markdown("**a**, b"))
    scripts = [[t for t, _ in p.found].count("script") for p in (hostile, plain)]
    assert scripts[0] == scripts[1]
    assert not [
        t for t, a in hostile.found if t == "img" or "onerror" in a or a.get("href", "").startswith("javascript")
    ]
    assert "<script>bad()</script>" in "".join(hostile.text)  # told letter by letter
    # A formula opens and closes within neighbouring texts: here an element stands between them.
    assert not [text for text in hostile.text if "javascript:bad" in text and "$" in text]
    assert "".join(hostile.text).count("$\\href{javascript:bad}") >= 4


def test_words_of_a_report_are_no_markup(place):
    label = "<script>bad()</script>"
    assert V.plain_name(label) != label and all(V.plain_name(word) == word for word in (*readout.QUANTILES.values(),))

    assert all(V.plain_name(word) == word for word in LABELS)


# ------------------------------------------------------------------------------------------------------------- sources

FORBIDDEN = {"eval", "exec", "compile", "__import__"}
UNSAFE = {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "jsonpickle", "cPickle"}


def faults(tree: ast.AST) -> list[str]:
    """What the sources may not do, by their syntax."""
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


def sources() -> dict[str, str]:
    found = {
        p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8")
        for d in ("lvmlib", "workflow")
        for p in (ROOT / d).rglob("*.py")
    }
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        found[path.name] = "\n".join(c.source for c in cells if c.cell_type == "code")
    return found


# npz.py takes opcodes and a class of pickle's, and overrides all of it that looks a name up; untrusted.py gives
# yaml.load a loader that derives from the safe one.
ALLOWED = {"lvmlib/npz.py": ["imports pickle"], "lvmlib/untrusted.py": ["yaml.load"]}


@pytest.mark.parametrize("name", sorted(sources()))
def test_no_source_opens_a_pickle_or_runs_text(name):
    assert faults(ast.parse(sources()[name])) == ALLOWED.get(name, [])


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
