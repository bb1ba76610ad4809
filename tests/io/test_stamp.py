"""A rendered notebook names its commit, and is stale as soon as the files behind its numbers differ from it."""

import json
import subprocess

import pytest

from lvmlib.io import stamp

FILES = ("lvmlib/models.py", "lvmlib/cli/commands.py", "params/v22.yaml", "notebooks/train.ipynb",
         "notebooks/data.ipynb", "README.md")  # fmt: skip
BEHIND = ("lvmlib/models.py", "params/v22.yaml", "notebooks/train.ipynb")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout with a file of each kind, and `x.ipynb`, which was executed and stamped there."""
    for name in FILES:
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
    git(folder, "add", *FILES)
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "x")


def read(folder):
    return json.loads((folder / "x.ipynb").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FILES)
def test_only_files_behind_the_numbers_make_it_stale(checkout, name):
    assert stamp.state(read(checkout))[0] == "current"
    (checkout / name).write_text("2")
    for committed in (False, True):
        kind, why = stamp.state(read(checkout))
        assert kind == ("stale" if name in BEHIND else "current") and (name in why) is (name in BEHIND)
        assert stamp.commit("train").endswith("+") is (name in BEHIND and not committed)
        commit(checkout)


def test_uncommitted_files_are_no_commit(checkout):
    before = stamp.commit("train")
    (checkout / "lvmlib" / "new.py").write_text("untracked")
    assert not stamp.stamp(checkout / "x.ipynb", "train", before)  # changed while it ran
    assert read(checkout)["metadata"]["lvmlib"] == {"commit": f"{before}+", "notebook": "train"}
    (checkout / "lvmlib" / "new.py").unlink()
    assert stamp.state(read(checkout))[0] == "stale"


@pytest.mark.parametrize("own", [
    {}, [], {"commit": "0" * 12, "notebook": "train"}, {"commit": "--output=x", "notebook": "train"}, {"commit": 1},
    {"notebook": "../x"}, {"notebook": ["train"]}, {"sources": {}},
])  # fmt: skip
def test_a_stamp_that_names_no_commit_here_is_stale(checkout, own):
    content = read(checkout)
    if isinstance(own, dict) and set(own) == {"notebook"}:
        own = content["metadata"]["lvmlib"] | own
    content["metadata"]["lvmlib"] = own
    assert stamp.state(content)[0] == "stale" and not (checkout / "x").exists()


def test_outside_a_checkout_nothing_is_known(checkout, monkeypatch):
    monkeypatch.setattr(stamp, "CHECKOUT", None)
    assert stamp.commit() == "" and stamp.state(read(checkout))[0] == "unknown"
