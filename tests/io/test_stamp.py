"""A rendered notebook names its commit, and is stale as soon as the files behind its numbers differ from it."""

import copy
import json
import subprocess

import pytest

from lvmlib.io import stamp


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout with a file of each kind, and `x.ipynb`, which was executed and stamped there."""
    for name in ("lvmlib/models.py", "lvmlib/cli/commands.py", "params/v22.yaml", "notebooks/train.ipynb",
                 "notebooks/data.ipynb", "README.md"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(stamp, "CHECKOUT", tmp_path)
    monkeypatch.setattr(stamp, "NOTEBOOKS", tmp_path / "notebooks")
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    stamp.write(tmp_path / "x.ipynb", {"cells": [], "metadata": {}})
    assert stamp.stamp(tmp_path / "x.ipynb", "train", stamp.commit("train"))
    return tmp_path


def git(folder, *arguments):
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments], cwd=folder, check=True)


def commit(folder):
    git(folder, "add", "lvmlib", "params", "notebooks", "README.md")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "x")


def read(folder):
    return json.loads((folder / "x.ipynb").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name, kind", [
    ("lvmlib/models.py", "stale"), ("params/v22.yaml", "stale"), ("notebooks/train.ipynb", "stale"),
    ("notebooks/data.ipynb", "current"), ("lvmlib/cli/commands.py", "current"), ("README.md", "current"),
])  # fmt: skip
def test_only_files_behind_the_numbers_make_it_stale(checkout, name, kind):
    assert stamp.state(read(checkout)).kind == "current"
    (checkout / name).write_text("2")
    for _ in ("uncommitted", "committed"):
        found = stamp.state(read(checkout))
        assert found.kind == kind and (name in found.why) is (kind == "stale")
        assert stamp.commit("train").endswith("+") is (kind == "stale" and _ == "uncommitted")
        commit(checkout)


def test_uncommitted_files_are_no_commit(checkout):
    before = stamp.commit("train")
    (checkout / "lvmlib" / "new.py").write_text("untracked")
    assert not stamp.stamp(checkout / "x.ipynb", "train", before)  # changed while it ran
    assert read(checkout)["metadata"]["lvmlib"] == {"commit": f"{before}+", "notebook": "train"}
    (checkout / "lvmlib" / "new.py").unlink()
    assert stamp.state(read(checkout)).kind == "stale"


@pytest.mark.parametrize("own", [
    {}, [], {"commit": "0" * 12, "notebook": "train"}, {"commit": "--output=x", "notebook": "train"}, {"commit": 1},
    {"notebook": "../x"}, {"sources": {}},
])  # fmt: skip
def test_a_stamp_that_names_no_commit_here_is_stale(checkout, own):
    content = read(checkout)
    whole = copy.deepcopy(content["metadata"]["lvmlib"])
    content["metadata"]["lvmlib"] = whole | own if isinstance(own, dict) and set(own) == {"notebook"} else own
    assert stamp.state(content).kind == "stale" and not (checkout / "x").exists()


def test_nothing_is_said_outside_a_checkout(checkout, monkeypatch):
    content = read(checkout)
    monkeypatch.setattr(stamp, "CHECKOUT", None)
    assert stamp.commit() == "" and stamp.state(content).kind == "unknown"


def test_a_notebook_is_executed_if_each_code_cell_was(checkout):
    cells = [{"cell_type": "code", "source": "1", "execution_count": 1}, {"cell_type": "code", "source": ""},
             {"cell_type": "markdown", "source": "text"}]  # fmt: skip
    assert stamp.is_executed({"cells": cells})
    cells[0]["execution_count"] = None
    assert not stamp.is_executed({"cells": cells})
