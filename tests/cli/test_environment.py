"""environment.yml, pyproject.toml, README and notebooks say the same."""

import re
import tomllib
from itertools import chain

import nbformat
import pandas as pd
import pytest
import yaml

from lvmlib.config import known_versions
from lvmlib.io.paths import PARAMS, ROOT
from lvmlib.report import summary

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def requirements(*extras):
    project = PYPROJECT["project"]
    listed = chain(project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras))
    return dict(re.fullmatch(r"([\w-]+)(.*)", r).groups() for r in listed)


def test_environment_yml_is_equal_to_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    wanted = {"python": PYPROJECT["project"]["requires-python"], "pip": "", **requirements("test")}
    wanted.pop("torch")  # its pin is in one place
    assert {d.partition(" ")[0]: d.partition(" ")[2] for d in conda} == wanted
    assert pip == ["-e .[encode,export,sweep]"]  # brings torch with its pin, and the optional extras


def test_torch_is_pinned_in_one_place():
    names = ("pyproject.toml", "environment.yml", "Makefile", ".ci/run")
    pins = [name for name in names if re.search(r"torch\s*==", (ROOT / name).read_text(encoding="utf-8"))]
    assert pins == ["pyproject.toml"]


@pytest.mark.parametrize("name", requirements(*PYPROJECT["project"]["optional-dependencies"]))
def test_readme_gives_a_reason_for_every_dependency(name):
    assert re.search(rf"^\| `{name}`.*\|.{{15,}}\|", README, re.MULTILINE)


@pytest.mark.parametrize("name", known_versions())
def test_readme_lists_every_version(name):
    assert f"`{name}`" in README


def test_readme_maps_every_file_of_the_core_package_and_notebook():
    core = [f"lvmlib/{p.name}" for p in (ROOT / "lvmlib").glob("*.py") if not p.name.startswith("__")]
    packages = [f"lvmlib/{p.parent.name}/" for p in (ROOT / "lvmlib").glob("*/__init__.py")]
    places = [*core, *packages, *(p.name for p in NOTEBOOKS), f"{PARAMS.name}/"]
    assert [place for place in places if f"`{place}`" not in README] == []


def test_readme_snippet_runs(tmp_path, monkeypatch):
    """The README's own Python, in fast mode and with a small model."""
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path))
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(snippet.replace('"v22"', '"v22", fast=True, model="amn"'), "README.md", "exec"), names)
    assert len(names["run"].history) == 2 and "model" in set(names["report"].table["predictor"])


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS], ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_page_of_docs_can_be_found_from_the_readme():
    assert [p.name for p in DOCS if f"](docs/{p.name})" not in README] == []


def test_the_tables_of_results_are_those_of_the_runs():
    """The whole table in docs/results.md, and in the README some rows of it, as the showcase's runs gave them."""
    runs = pd.read_csv(ROOT / "outputs" / "showcase" / "versions.csv")
    table = summary.markdown(summary.by_version(runs))
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert table in results
    shown = README.split("\n".join(table.splitlines()[:2]))[1].split("\n\n")[0].strip().splitlines()
    assert len(shown) > 5 and [row for row in shown if row not in results.splitlines()] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_keep_the_house_rules(path):
    notebook = nbformat.read(path, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert notebook.metadata.kernelspec.name == "python3"
    assert re.match(r"# .+\n\n?\*.+\*", notebook.cells[0].source)  # a title and a one-line subtitle
    (parameters,) = [c for c in code if "parameters" in c.metadata.get("tags", [])]
    assert parameters is code[0]
    for line in parameters.source.splitlines():
        assert re.fullmatch(r"\w+ = (\"[^\"]*\"|\d+|True|False|None|\{\})  # [^=]+", line), line
    checked = [c for c in code if c.source.startswith("# NBVAL_CHECK_OUTPUT")]
    assert checked and all(c.outputs and c.execution_count for c in checked)
    assert all(not c.outputs and c.execution_count is None for c in code if c not in checked)
    assert "check_injected(In)" in "".join(c.source for c in code)
    kinds = [c.cell_type for c in notebook.cells]
    assert kinds.count("markdown") >= len(code) / 2


@pytest.mark.parametrize("path", [*NOTEBOOKS, *sorted((ROOT / "outputs" / "showcase").glob("*.ipynb"))], ids=str)
def test_no_machine_path_and_no_error_in_a_committed_notebook(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(root|home|Users|tmp|work)/\w", text)
    outputs = [o for c in nbformat.reads(text, as_version=4).cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error"]
