"""What is kept in the process: found again, never for other windows, weights or ways of measuring, and bounded.

Axes: N windows, T context length, D vector dimension.
"""

import importlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lvmlib import models
from lvmlib.baselines import Linear, Weighted
from lvmlib.data.store import make_store
from lvmlib.judge.cache import Kept, kept, predictor_key, size, windows_key
from lvmlib.windows import windows

module = importlib.import_module("lvmlib.judge.fivecat")  # the package's attribute `fivecat` is the function
T, DIM = 5, 8


def store(seed=0):
    random = np.random.default_rng(seed)
    x = random.standard_normal((60, DIM))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    frame = pd.DataFrame({"title": list("abc"), "split": "val"}, index=pd.Index(range(3), name="article"))
    return make_store("small", x.astype(np.float32), np.repeat(range(3), 20), np.tile(np.arange(20), 3), frame)


def weighted(*weights):
    return Weighted(DIM, torch.tensor(weights))


LAST = (0.0, 0.0, 0.0, 0.0, 1.0)


@pytest.fixture(autouse=True)
def nothing_kept():
    kept.values.clear()
    yield
    kept.values.clear()


@pytest.fixture
def counted(monkeypatch):
    """How often a predictor was truly judged."""
    calls, judged = [], module._judged
    monkeypatch.setattr(module, "_judged", lambda *a: calls.append(a) or judged(*a))
    return calls


def test_a_trivial_predictor_is_judged_once_on_the_same_windows(counted):
    w, again = (windows(store(), "val", 1, T) for _ in range(2))
    first, second = module.judge(weighted(*LAST), w), module.judge(weighted(*LAST), again)
    assert len(counted) == 1
    pd.testing.assert_frame_equal(first[0], second[0])
    assert first[1] == second[1]
    wanted = {column: first[0][column].copy() for column in first[0]}
    first[0]["cosine"], first[1]["norm"] = 3.0, -1.0  # what a caller does to its own is not what the next one gets
    first[1]["weights"].clear()
    third = module.judge(weighted(*LAST), w)
    pd.testing.assert_frame_equal(third[0], pd.DataFrame(wanted))
    assert third[1] == second[1] and len(counted) == 1


def test_what_differs_is_judged_anew_and_differs(counted):
    w = windows(store(), "val", 1, T)
    ways = {
        "the first": (weighted(*LAST), w, {}),
        "weights": (weighted(0.0, 0.0, 0.0, 0.001, 1.0), w, {}),
        "class": (Linear(DIM, torch.randn(T * DIM, DIM, generator=torch.Generator().manual_seed(0))), w, {}),
        "vectors": (weighted(*LAST), windows(store(1), "val", 1, T), {}),
        "horizon": (weighted(*LAST), windows(store(), "val", 2, T), {}),
        "direction": (weighted(*LAST), windows(store(), "val", 1, T, "backward"), {}),
        "selection": (weighted(*LAST), w.at_most(20), {}),
        "another selection of as many": (weighted(*LAST), replace(w, start=w.start[5:25]), {}),
        "seed": (weighted(*LAST), w, {"seed": 1}),
        "precision": (weighted(0.1, 0.2, 0.3, 0.4, 0.5), w, {"precision": "bfloat16"}),
        "not this precision": (weighted(0.1, 0.2, 0.3, 0.4, 0.5), w, {}),
    }
    frames = {name: module.judge(model, cut, **more)[0] for name, (model, cut, more) in ways.items()}
    assert len(counted) == len(ways)
    for name, (model, cut, more) in ways.items():  # and it is what measuring says
        pd.testing.assert_frame_equal(frames[name], module.measure(model, cut, **more), obj=name)
    for i, one in enumerate(frames.values()):
        assert not any(one.equals(other) for other in list(frames.values())[:i])


def test_a_predictor_that_may_hold_more_than_its_weights_is_not_kept(counted):
    class Louder(Weighted):
        gain = 1.0

        def raw(self, context):
            return super().raw(context) * self.gain

    w, model = windows(store(), "val", 1, T), Louder(DIM, torch.tensor(LAST))
    quiet = module.judge(model, w)[1]["norm"]
    model.gain = 2.0
    assert module.judge(model, w)[1]["norm"] == pytest.approx(2 * quiet) and len(counted) == 2
    assert predictor_key(model) is predictor_key(models.build("amn", DIM)) is None


def test_windows_are_told_apart_by_where_they_start():
    w = windows(store(), "val", 1, T)
    assert windows_key(w) == windows_key(windows(store(), "val", 1, T))
    assert windows_key(w) != windows_key(replace(w, start=w.start[::-1]))


def test_the_longest_unused_goes_first_and_what_is_too_large_is_not_kept():
    small, made = Kept(most=100), []

    def value(key, bytes_):
        return small(key, lambda: made.append(key) or np.zeros(bytes_, np.uint8))

    for key in "abac":  # b is the longest unused when c comes
        value(key, 40)
    value("a", 40), value("c", 40)
    assert made == ["a", "b", "c"] and list(small.values) == ["a", "c"]
    value("huge", 101), value("huge", 101)
    assert made[3:] == ["huge", "huge"] and list(small.values) == ["a", "c"]


def test_sizes_are_those_of_the_arrays_within():
    held = [np.zeros(4), {"x": torch.zeros(3)}, (pd.DataFrame({"a": np.zeros(2)}, index=pd.RangeIndex(2)), 1)]
    assert 32 + 12 + 16 <= size(held) <= 32 + 12 + 16 + 200
