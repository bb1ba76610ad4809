"""The escape guard: when it finds a fault, what it returns to, how it stops a run."""

import pytest
import torch
from kill_runs import trained, unlike
from toys import finish, guarded, same, version

import lvmlib as lvm
from lvmlib import evaluate
from lvmlib.runs import run as training


@pytest.fixture
def states(data, tmp_path):
    """A function that trains a version: the run, and last/state.pt after each epoch."""

    def train(own):
        run, found = lvm.train(own, data, tmp_path / "run"), {}
        for row in run:
            found[row["epoch"]] = torch.load(run.folder / "last" / "state.pt", weights_only=True)
        return run, found

    return train


def scripted(monkeypatch, figures):
    """Validation with this novel MRR, epoch by epoch."""
    figures, real = iter(figures), evaluate.validate
    monkeypatch.setattr(evaluate, "validate", lambda *a: real(*a) | {"novel_mrr": next(figures)})


def test_a_guard_that_finds_no_fault_changes_nothing(data, tmp_path):
    plain = finish(lvm.train(version(), data, tmp_path / "plain"))
    run = finish(lvm.train(guarded(fall=0.99, escape=1.0, lr=5e-4, epochs=3), data, tmp_path / "run"))
    ends = [trained(r.folder) for r in (plain, run)]
    assert not unlike(*({k: end["state.pt"][k] for k in ("model", "optimizer", "history", "steps")} for end in ends))
    assert (run.history["rewound"] == 0).all() and "stopped" not in run.record
    assert ends[0]["good.pt"] is None and ends[1]["good.pt"] is not None


def test_a_fall_of_the_novel_mrr_goes_back_to_its_best_epoch(states, monkeypatch):
    """0.27 is 10 % below 0.30, which is not more; 0.26 is. Then all is as at the end of epoch 2, but slower."""
    scripted(monkeypatch, [0.20, 0.30, 0.27, 0.26])
    settings = {"control": {"lambda_max": 10.0, "guard": "none"}}
    run, at = states(guarded(fall=0.1, epochs=4, name="pi", overrides=settings))
    assert run.history["rewound"].tolist() == [0, 0, 0, 1]
    assert run.history["novel_mrr"].tolist() == [0.20, 0.30, 0.27, 0.26]  # every epoch's row is kept
    assert same(at[4]["model"], at[2]["model"]) and not same(at[3]["model"], at[2]["model"])
    assert at[4]["controller"] == at[2]["controller"] != at[3]["controller"]
    moments = [at[k]["optimizer"]["state"][0]["exp_avg"] for k in (2, 3, 4)]
    assert torch.equal(moments[0], moments[2]) and not torch.equal(moments[0], moments[1])
    assert at[4]["optimizer"]["param_groups"][0]["lr"] == 0.005 and at[4]["rewinds"] == 1
    assert len(run) == 4 and "stopped" not in run.record


def test_an_escape_share_above_its_bound_goes_back_and_in_the_end_stops_the_run(data, states, monkeypatch):
    """Epoch 1, of an untrained model, may be above; 2 is below, and each above it from there on is a fault.

    λ's ceiling falls with the learning rate. The run goes back to epoch 3, the best of those without a fault.
    """
    shares, real = iter([0.6, 0.2, 0.3, 0.4, 0.31, 0.9]), training.epoch

    def escaping(*arguments):
        means, rows = real(*arguments)
        return means | {"escape": next(shares)}, rows

    monkeypatch.setattr(training, "epoch", escaping)
    scripted(monkeypatch, [0.20, 0.21, 0.25, 0.30, 0.30, 0.30])
    own = guarded(fall=0.9, escape=0.3, name="v23_unguarded", overrides={"control": {"guard": "none"}})
    run, at = states(own)
    assert run.history["learning_rate"].tolist() == [0.01] * 4 + [0.005, 0.0025]
    assert run.history["lambda_eff"].to_numpy() == pytest.approx([0.03] * 4 + [0.015, 0.0075])
    assert run.history["rewound"].tolist() == [0, 0, 0, 1, 1, 0] and run.finished and len(run) == 6
    models = {epoch: state["model"] for epoch, state in at.items()}
    assert same(models[4], models[3]) and same(models[5], models[3]) and not same(models[6], models[3])
    record, epochs, _ = lvm.open_run(run.folder)
    assert record["stopped"] == "epoch 6: the escape share is 0.900, risen above 0.3, after 2 rewinds"
    assert record["finished"]["training_seconds"] > 0 and len(epochs) == 6
    again = lvm.train(own, data, run.folder)
    assert again.status == "finished" and len(list(again)) == len(again) == 6


def test_without_rewinds_the_first_fault_ends_the_run(states, monkeypatch):
    scripted(monkeypatch, [0.30, 0.10])
    run, _ = states(guarded(most=0))
    assert len(run) == 2 and run.history["rewound"].sum() == 0
    assert run.record["stopped"].startswith("epoch 2: the novel MRR is 0.1000, more than 3% below its best, 0.3000")
