"""The original's three tests, against plain loops, and on worlds whose answer is known."""

import numpy as np
import pytest

import lvmlib as lvm
from lvmlib.data.worlds import world
from lvmlib.preflight import retrial
from lvmlib.windows import windows

SIZE = {"articles": 60, "length": 24, "dim": 32}


@pytest.fixture(scope="module")
def tested():
    return {name: retrial.original_tests(store) for name, store in retrial.known_worlds(**SIZE).items()}


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def test_the_tests_are_what_they_say():
    """Each window by hand, read from its beginning and from its end."""
    store = world("rotation", **SIZE)
    table, x = retrial.original_tests(store).set_index("test"), store.vectors.astype(float)
    columns = ["forwards", "reversed", "change"]
    for name, horizon in (("Δ at horizon 1", 1), ("Δ at horizon 2", 2), ("first against last", 1)):
        values = []
        starts = [s for split in ("train", "val", "ood") for s in windows(store, split, horizon).start]
        for start in starts:
            rows = x[[*range(start, start + 5), start + 4 + horizon]]
            both = []
            for first, previous, last, target in (
                rows[[0, 3, 4, 5]],
                x[start + horizon + np.array([4, 1, 0, -horizon])],
            ):
                ahead = cosine(last, target)
                both.append(
                    ahead - cosine(first, target) if name.startswith("first") else ahead - cosine(last, previous)
                )
            values.append(both)
        there, back = np.mean(values, 0)
        row = table.loc[name]
        assert row[columns].to_list() == pytest.approx([there, back, (there - back) / 2], abs=1e-6)
        assert row["change low"] < row["change"] < row["change high"]
        assert row["changes"] == (row["change low"] > 0 or row["change high"] < 0)


def test_the_three_tests_cannot_tell(tested):
    """They answer where the order holds nothing to predict, and agree on a text and its reverse where it does."""
    assert tested["converging"]["changes"].all()
    there, back = tested["announcing"], tested["reversed_announcing"]
    assert np.abs(there["change"]).max() < 0.004
    assert there["forwards"].to_list() == pytest.approx(back["reversed"].to_list())


def test_what_tells_a_known_direction():
    answers = {}
    for name in ("announcing", "reversed_announcing", "exchangeable"):
        store = world(name, articles=120, length=30, dim=48)
        both = [lvm.dataset(store, 1, direction=d) for d in ("forward", "backward")]
        answers[name] = retrial.what_tells(*both, seeds=0).set_index("test")["answer"].to_list()
    assert answers == {
        "announcing": ["order", "forward"],
        "reversed_announcing": ["order", "backward"],
        "exchangeable": ["none", "none"],
    }


def test_what_was_not_measured_is_said(tested):
    store = world("exchangeable", articles=8, length=14, dim=8)
    both = [lvm.dataset(store, 1, direction=d) for d in ("forward", "backward")]
    found = retrial.what_tells(*both, seeds=1, steps=2)
    ridge = found.set_index("test").loc["ridge"]
    assert ridge["answer"].startswith("not measured") and np.isnan(ridge["value"])
    assert len(retrial.conclusion("small", tested["exchangeable"], found, tested)) == 3
