"""YAML files that extend one another, and damaged ones."""

import pytest

from lvmlib.errors import LVMError
from lvmlib.io import inherit


@pytest.fixture
def folder(tmp_path):
    """write(NAME=text, …) fills a folder `params`, which has a base."""
    place = tmp_path / "params"
    place.mkdir()

    def write(**files):
        for name, text in ({"base": "# Base.\nepochs: 4\noptimizer: {lr: 1.0, clip: 2.0}"} | files).items():
            (place / f"{name}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return place

    return write


def test_extends_merges_deeply_through_every_level(folder):
    place = folder(a="# A.\nextends: base\noptimizer: {lr: 3.0}", b="# B.\nextends: a\noptimizer: {decay: 0.5}")
    assert inherit.read(place, "b") == ({"epochs": 4, "optimizer": {"lr": 3.0, "clip": 2.0, "decay": 0.5}}, "B.", "a")
    assert inherit.read(place, "a")[1:] == ("A.", "")
    assert inherit.known(place) == ["a", "b"]


def test_a_file_without_extends_extends_base(folder):
    place = folder(a="epochs: 3", empty="")
    assert inherit.read(place, "a") == ({"epochs": 3, "optimizer": {"lr": 1.0, "clip": 2.0}}, "", "")
    assert inherit.read(place, "empty")[0] == inherit.read(place, "base")[0]


NO_YAML = ["a: [1, 2", "a: b: c", "\tepochs: 3", b"\xff\xfe\x00epochs", "seed: 3\nseed: 4", "x: {seed: 3, seed: 4}"]
NO_KEYS = ["- 1\n- 2", "[]", "just text", "3", "0", "false"]
NO_PARENT = ["'other'", "''", "5", "'../base'", "[a]"]


@pytest.mark.parametrize(
    "files, words",
    [
        ({"a": "extends: a"}, "a → a"),
        ({"a": "extends: b", "b": "extends: a"}, "a → b → a"),
        ({"a": "extends: b", "b": "extends: c", "c": "extends: b"}, "b → c → b"),
        ({"a": "extends: base", "base": "extends: a"}, "a → base → a"),
        *(({"a": text}, "params/a.yaml: cannot be read") for text in NO_YAML),
        *(({"a": text}, "params/a.yaml: holds a (list|str|int|bool)") for text in NO_KEYS),
        *(({"a": f"extends: {name}"}, "params/a.yaml: .*unknown version") for name in NO_PARENT),
    ],
)
def test_damaged_files_are_named(folder, files, words):
    with pytest.raises(LVMError, match=words):
        inherit.read(folder(**files), "a")


def test_a_missing_base_is_named(folder):
    place = folder(a="epochs: 3")
    (place / "base.yaml").unlink()
    with pytest.raises(LVMError, match=r"params/base\.yaml"):
        inherit.read(place, "a")


def test_merge_leaves_its_arguments_alone():
    base, over = {"a": {"b": 1, "c": 2}, "d": [1, 2]}, {"a": {"c": 3}, "d": [9]}
    assert inherit.merge(base, over) == {"a": {"b": 1, "c": 3}, "d": [9]}
    assert (base, over) == ({"a": {"b": 1, "c": 2}, "d": [1, 2]}, {"a": {"c": 3}, "d": [9]})
