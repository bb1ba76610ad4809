"""The loop's pieces: the meter, a state that is saved and loaded, a term of one's own as docs/own-loss.md adds it."""

import math
import re

import numpy as np
import pytest
import torch
from toys import make_data, version

import lvmlib as lvm
from lvmlib import controller, loop, losses
from lvmlib.io.paths import ROOT
from lvmlib.ranking import Articles
from lvmlib.runs import checkpoint


@pytest.fixture(scope="module")
def data():
    return make_data()


def task_of(own, data):
    vectors = torch.from_numpy(data.store.vectors)
    return loop.Task(own, data.train, vectors, articles=Articles(data.train, vectors))


def test_the_meter_gives_weighted_means():
    meter = loop.Meter()
    for value, weight in ((1.0, 32), (4.0, 16)):
        meter.add({"x": value}, weight)
        meter.add({"share": value}, weight * (value > 2))
    assert meter.means() == {"x": 2.0, "share": 4.0}
    meter.add({"never": 1.0}, 0)
    assert meter.means()["never"] == 0.0


@pytest.mark.parametrize("name, model", [("pi", "amn"), ("rank", "bilinear")])
def test_a_state_that_was_saved_and_loaded_goes_on_alike(data, tmp_path, name, model):
    own = version(name, model=model)
    task, states = task_of(own, data), [loop.start(own, data.store.dim, torch.device("cpu")) for _ in range(2)]
    means, rows = loop.epoch(states[0], task)
    assert rows[0]["step"] == 1 and means["learning_rate"] == own.optimizer.lr
    states[0].history.append({"epoch": 1})
    checkpoint.save(tmp_path / "state.pt", states[0], "me")
    checkpoint.load(tmp_path / "state.pt", states[1], checkpoint.read(tmp_path / "state.pt", "me", "cpu"))
    assert states[1].memory == states[0].memory and states[1].epoch == 1
    again = [loop.epoch(state, task)[0] for state in states]
    assert again[0] == pytest.approx(again[1], rel=0, abs=0, nan_ok=True) and again[0] != means


def test_a_step_with_a_loss_that_is_not_finite_changes_no_weight(data, monkeypatch):
    own = version()
    state = loop.start(own, data.store.dim, torch.device("cpu"))
    before = [p.detach().clone() for p in state.model.parameters()]
    monkeypatch.setattr(losses, "mse", lambda raw, y: raw.sum() * math.nan)
    now = controller.phase(own.schedule, 1)
    result = loop.step(state, task_of(own, data), np.arange(8), own.control, now)
    assert math.isnan(result.values["loss"])
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    with pytest.raises(loop.StepBroke):
        loop.epoch(state, task_of(own, data))


def test_the_page_on_ones_own_loss_does_what_it_says(data, tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "own-loss.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    space = {}

    def history(**extra):
        run = lvm.train(version(fast=True, overrides={"losses": {"extra": extra}}), data, tmp_path / str(extra))
        assert len(list(run)) == 2
        return lvm.open_run(run.folder)[1]

    exec(code, space)
    try:
        assert space["version"].losses.extra == {"far_from_mean": 0.1}
        plain, none, much = history(), history(far_from_mean=0.0), history(far_from_mean=10.0)
    finally:
        losses.OWN.pop("far_from_mean", None)
    assert (none["far_from_mean"] > 0).all() and (none["pull_far_from_mean"] == 0).all()
    assert (much["pull_far_from_mean"] > 0).all()
    assert much["far_from_mean"].iloc[-1] < none["far_from_mean"].iloc[-1]
    assert "far_from_mean" not in plain and none["train_loss"].tolist() == plain["train_loss"].tolist()
