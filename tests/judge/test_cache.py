"""The cache of this process: found again, never for other windows, weights or ways of measuring, and bounded.

Axes: N windows, T context length, D vector dimension.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from judge.plain import T, random_linear, store_of, weighted

from lvmlib import models
from lvmlib.baselines import Weighted
from lvmlib.judge import measure as module
from lvmlib.judge.cache import Cache, cached, predictor_key, size
from lvmlib.windows import windows

DIM = 8


def store(seed=0):
    x = np.random.default_rng(seed).standard_normal((3, 20, DIM))
    return store_of({a: ("val", np.arange(20), x[a]) for a in range(3)})


def last():
    return weighted(DIM, 0.0, 0.0, 0.0, 0.0, 1.0)


@pytest.fixture
def counted(monkeypatch):
    """The calls in which a predictor was measured, with an empty cache."""
    monkeypatch.setattr(cached, "values", OrderedDict())
    calls, measured = [], module.measure
    monkeypatch.setattr(module, "measure", lambda *a, **k: calls.append(a) or measured(*a, **k))
    return calls


def test_a_baseline_is_judged_once_on_the_same_windows(counted):
    w, again = (windows(store(), "val", 1, T) for _ in range(2))
    first, second = module.judge(last(), w), module.judge(last(), again)
    assert len(counted) == 1 and first[1] == second[1]
    np.testing.assert_equal(vars(first[0]), vars(second[0]))
    first[0].cosine[:], first[1]["norm"] = 3.0, -1.0  # what a caller does to its own is not what the next one gets
    first[1]["weights"].clear()
    third = module.judge(last(), w)
    np.testing.assert_equal(vars(third[0]), vars(second[0]))
    assert third[1] == second[1] and len(counted) == 1


def test_what_differs_is_judged_anew_and_differs(counted):
    w, even = windows(store(), "val", 1, T), weighted(DIM, 0.1, 0.2, 0.3, 0.4, 0.5)
    ways = {
        "the first": (last(), w, {}),
        "weights": (weighted(DIM, 0.0, 0.0, 0.0, 0.001, 1.0), w, {}),
        "class": (random_linear(DIM), w, {}),
        "vectors": (last(), windows(store(1), "val", 1, T), {}),
        "horizon": (last(), windows(store(), "val", 2, T), {}),
        "direction": (last(), windows(store(), "val", 1, T, "backward"), {}),
        "selection": (last(), w.at_most(20), {}),
        "another selection of as many": (last(), replace(w, start=w.start[5:25]), {}),
        "order": (last(), replace(w, start=w.start[::-1].copy()), {}),
        "precision": (even, w, {"precision": "bfloat16"}),
        "not this precision": (even, w, {}),
    }
    found = {name: module.judge(model, cut, **more)[0] for name, (model, cut, more) in ways.items()}
    assert len(counted) == len(ways)
    for name, (model, cut, more) in ways.items():  # and it is what measuring gives
        np.testing.assert_equal(vars(found[name]), vars(module.measure(model, cut, **more)), err_msg=name)
    for i, one in enumerate(found.values()):
        for other in list(found.values())[:i]:
            with pytest.raises(AssertionError):
                np.testing.assert_equal(vars(one), vars(other))


def test_a_predictor_that_may_hold_more_than_its_weights_is_not_cached(counted):
    class Louder(Weighted):
        gain = 1.0

        def raw(self, context):
            return super().raw(context) * self.gain

    w, model = windows(store(), "val", 1, T), Louder(DIM, last().weights)
    quiet = module.judge(model, w)[1]["norm"]
    model.gain = 2.0
    assert module.judge(model, w)[1]["norm"] == pytest.approx(2 * quiet) and len(counted) == 2
    assert predictor_key(model) is predictor_key(models.build("amn", DIM)) is None


def test_the_least_recently_used_goes_first_and_what_is_too_large_is_not_cached():
    small, made = Cache(max_bytes=100), []

    def value(key, bytes_):
        return small(key, lambda: made.append(key) or np.zeros(bytes_, np.uint8))

    for key in "abac":  # b is the least recently used when c comes
        value(key, 40)
    value("a", 40), value("c", 40)
    assert made == ["a", "b", "c"] and list(small.values) == ["a", "c"]
    value("huge", 101), value("huge", 101)
    assert made[3:] == ["huge", "huge"] and list(small.values) == ["a", "c"]


def test_sizes_are_those_of_the_arrays_within():
    @dataclass
    class Pair:
        one: np.ndarray
        two: dict

    assert size([Pair(np.zeros(4), {"x": torch.zeros(3)}), (np.zeros(2), 1)]) == 32 + 12 + 16 + 8
