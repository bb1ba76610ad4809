"""Alarms: on rows with known values, on runs that fail in each way, on runs that do not; and how they end a run."""

import math

import numpy as np
import pytest
import torch
import yaml
from toys import finish, make_data, version

import lvmlib as lvm
from lvmlib import config as params
from lvmlib import controller, evaluate, loop, losses
from lvmlib.errors import LVMError
from lvmlib.evaluate import Moments
from lvmlib.runs import alarms
from lvmlib.runs import folder as runs

BATCHES = 4


def kinds(run):
    return {a.kind: a for a in run.alarms}


def on(name="v22", trouble="go_on", epochs=3, model="amn", lr=None, batch_size=None, **overrides):
    settings = params.merge({"trouble": trouble} | ({"optimizer": {"lr": lr}} if lr else {}), overrides)
    return version(name, epochs=epochs, model=model, batch_size=batch_size, overrides=settings)


# Rows with known values


def row(epoch, **values):
    """A good epoch, but for `values`."""
    good = dict.fromkeys(runs.columns()[0], 0.0) | {
        "mse": 0.002, "val_cos": 0.5, "margin": -0.2, "novel_mrr": 0.2, "gap": -0.1, "learning_rate": 5e-4,
        "effective_rank": 30.0, "rank_share": 0.3, "variance_share": 0.8, "lambda_eff": 0.01, "rho": 0.2,
    }  # fmt: skip
    return good | {"epoch": epoch} | values


def found(name, rows, steps=(), **overrides):
    own = lvm.version(name, overrides)
    return {a.kind: a for a in alarms.alarms(own, rows, list(steps), BATCHES)}


@pytest.mark.parametrize("name", lvm.known_versions())
def test_good_rows_raise_nothing(name):
    good = {"listwise": 3.0, "energy": 0.6, "lambda_eff": 0.0 if lvm.version(name).control.rule == "none" else 0.01}
    assert found(name, [row(i, **good) for i in range(1, 13)]) == {}


def test_a_loss_diverges_above_twice_its_lowest():
    first = {"step": 1, "mse": 0.004, "listwise": 0.0, "energy": 0.0}
    assert found("p6", [row(1, mse=0.008)], [first]) == {}  # not more than twice
    alarm = found("p6", [row(1, mse=0.0081), row(2, mse=0.003), row(3, mse=0.0061), row(4)], [first])["divergence"]
    assert (alarm.epoch, alarm.step) == (1, BATCHES)
    assert "0.0081, 2.02 times its lowest so far, 0.004;" in alarm.what and "the last is 3" in alarm.what
    # The lowest may have been in an epoch long before; and a term that a version does not have is none of it.
    assert found("p6", [row(1), row(2, mse=0.0039), row(3, mse=0.0041)])["divergence"].epoch == 3
    assert found("rank", [row(1, listwise=3.0), row(2, listwise=3.0, mse=9.0)]) == {}
    assert found("rank", [row(1, listwise=3.0), row(2, listwise=6.1)])["divergence"].epoch == 2


@pytest.mark.parametrize(
    "wrong, fine",
    [
        ({"val_cos": 0.0}, {"val_cos": 1e-9}),
        ({"variance_share": 0.0999}, {"variance_share": 0.1}),
        ({"rank_share": 0.0199}, {"rank_share": 0.02}),
    ],
)
def test_collapse_counts_at_once_after_a_good_epoch_and_from_the_third_without(wrong, fine):
    assert found("v22", [row(i, **fine) for i in range(1, 6)]) == {}
    alarm = found("v22", [row(1), row(2, **wrong), row(3, **wrong), row(4)])["collapse"]
    assert (alarm.epoch, alarm.step) == (2, 2 * BATCHES) and alarm.what.endswith("so in 2 epochs, the last is 3")
    assert "control.lambda_max" in alarm.do and "cosine is +" in alarm.what
    assert found("v22", [row(1, **wrong), row(2, **wrong)]) == {}
    late = found("v22", [row(1, **wrong), row(2, **wrong), row(3, **wrong), row(4, **wrong)])["collapse"]
    assert late.epoch == 3 and "smaller model" in late.do
    assert found("p6", [row(1), row(2, **wrong)])["collapse"].do.startswith("lower optimizer.lr")


ESCAPED = {"escape": 0.26, "margin": -0.1, "val_cos": 0.49}


@pytest.mark.parametrize(
    "change",
    [
        {"escape": 0.25},  # at the bound
        {"margin": -0.2},  # nothing bought
        {"val_cos": 0.51},  # it pays in cosine
        {"novel_mrr": 0.205},  # or in novel MRR
    ],
)
def test_escape_needs_all_of_its_rule(change):
    alarm = found("p6", [row(1, escape=0.1), row(2, **ESCAPED)])["escape"]
    assert alarm.epoch == 2 and "26.0% of the weights are negative, 10.0% were in epoch 1" in alarm.what
    assert "margin -0.200 → -0.100, gap -0.100 → -0.100, val_cos 0.500 → 0.490, novel_mrr 0.200" in alarm.what
    assert found("p6", [row(1, escape=0.1), row(2, **ESCAPED | change)]) == {}


def test_escape_rises_from_below_its_bound():
    assert found("p6", [row(1, escape=0.5), row(2, **ESCAPED | {"escape": 0.6})]) == {}  # knew nothing yet
    assert found("p6", [row(1, escape=0.5), row(2, escape=0.1), row(3, **ESCAPED)])["escape"].epoch == 3
    assert "escape" not in found("share", [row(1), row(2, **ESCAPED)], rewind={"escape": 0.3})  # its own bound
    moved = found("p6", [row(1), row(2, **ESCAPED | {"margin": -0.2, "gap": 0.1})])["escape"].what
    assert "gap -0.100 → +0.100" in moved  # either margin


def test_a_control_that_decides_nothing():
    top, bottom, out = {"at_lambda_max": 1.0}, {"at_lambda_min": 1.0}, {"lambda_eff": 0.0, "skips": 4.0}
    alarm = found("v22", [row(1), row(2, **top), row(3), row(4, **top)])["control"]
    assert alarm.line.startswith("ALARM  epoch 2, step 8: control: λ was at its ceiling")
    assert "so in 2 epochs, the last is 4" in alarm.what and "control.lambda_max" in alarm.do
    assert "lower control.lambda_min" in found("v22", [row(1, **bottom)])["control"].do
    assert found("v22", [row(1, at_lambda_max=0.999, at_lambda_min=0.001)]) == {}
    assert "the sign guard skipped 4 (mean cos" in found("v22", [row(1, **out)])["control"].what
    assert found("v22", [row(1, skips=3.0)]) == {}  # some acted
    shut = found("v23_confident", [row(1, lambda_eff=0.0, pos=0.2)])["control"]
    assert "the confidence gate, which opens above 0.3, was shut" in shut.what and "control.gate.low" in shut.do
    # By design: a λ that is fixed, or has one value to take; a multiplier of 0 keeps its bound.
    assert found("v23_unguarded", [row(1, **top)]) == {} and found("p6", [row(1, lambda_eff=0.0, **bottom)]) == {}
    assert found("v22", [row(1, **top)], control={"lambda_min": 0.03}) == {}
    assert found("bounded", [row(1, lambda_eff=0.0, listwise=3.0)]) == {}
    assert "control.constraint.at_least" in found("bounded", [row(1, listwise=3.0, **top)])["control"].do
    # Even a fixed λ pulls at nothing where every batch is skipped.
    assert "control" in found("v23_unguarded", [row(1, **out)])


# The columns


def test_the_spread_of_the_validation_predictions_is_that_of_health(data, tmp_path):
    run = finish(lvm.train(on(epochs=1), data, tmp_path / "run"))
    measured = run.history.iloc[0]
    x, y = data.val.batch(np.arange(len(data.val)))
    facts = []
    for p in (run.best(x)[1].detach().double().numpy(), y.double().numpy()):
        shares = np.linalg.eigvalsh(np.cov(p.T, bias=True))
        shares = shares[shares > 1e-12] / shares.sum()
        facts.append((math.exp(-(shares * np.log(shares)).sum()), 1 - (p.mean(0) ** 2).sum()))
    (rank, variance), (of, wide) = facts
    assert measured["effective_rank"] == pytest.approx(rank, rel=1e-4)
    assert measured["rank_share"] == pytest.approx((rank - 1) / (of - 1), rel=1e-4)
    assert measured["variance_share"] == pytest.approx(variance / wide, rel=1e-4)
    flat = Moments(4, torch.device("cpu"))
    flat.add(torch.tensor([[1.0, 0, 0, 0]]).expand(9, 4))
    assert flat.facts()["effective rank"] == 1 and flat.facts()["variance"] < 1e-9


@pytest.mark.parametrize(
    "name, bounds, share",
    [
        ("v22", (1e-4, 1e-3), (0.0, 1.0)),
        ("pi", (10.0, 20.0), (1.0, 0.0)),
        ("pi", (1e-4, 1e-3), (0.0, 1.0)),
        ("v22", (1e-4, 10.0), (0.0, 0.0)),
    ],
)
def test_the_share_of_steps_at_a_bound(data, tmp_path, name, bounds, share):
    limits = {"lambda_min": bounds[0], "lambda_max": bounds[1], "guard": "none"}
    run = finish(lvm.train(on(name, epochs=1, control=limits), data, tmp_path / "run"))
    assert tuple(run.history.loc[0, ["at_lambda_min", "at_lambda_max"]]) == share
    assert ("control" in kinds(run)) == (1.0 in share)


def test_a_shut_gate_is_at_no_bound():
    shut = controller.Decision(0.0, 0.0, 0.0, False)
    assert controller.at_bound(shut, 0.03) == controller.at_bound(shut, 1e-4) == 0
    half = controller.Decision(0.015, 0.1, 0.5, False)
    assert controller.at_bound(half, 0.03) == 1 and controller.at_bound(half, 0.015) == 0


# Runs made to fail


def test_a_learning_rate_of_a_million_breaks_at_a_step_that_is_named(data, tmp_path):
    with pytest.raises(LVMError, match=r"epoch 1, step \d+ \(learning rate 1e\+06, mse") as e:
        list(lvm.train(on("p6", lr=1e6, batch_size=8), data, tmp_path / "run"))
    (alarm,) = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["alarms"]
    assert alarm["kind"] == "broken" and alarm["what"] in str(e.value) and alarm["epoch"] == 1
    assert alarm["what"].startswith(("mse is ", "gradient norm is "))


def test_a_learning_rate_of_ten_diverges(data, tmp_path):
    run = finish(lvm.train(on("p6", lr=10.0), data, tmp_path / "run"))
    assert kinds(run)["divergence"].epoch == 1 and "optimizer.lr (now 10)" in kinds(run)["divergence"].do
    assert kinds(run)["collapse"].epoch <= 3  # and what is left of it predicts one vector
    assert len(run) == 3 and "stopped" not in run.record  # `trouble` is go_on


def test_a_pull_without_a_guard_collapses(data, tmp_path):
    """v1's losses, all pull and no guard: the cosine ends below zero or all predictions are one."""
    pull = {"control": {"rule": "fixed", "lambda_max": 30.0, "guard": "none"}, "schedule": {"margin": [[1, 2.0]]}}
    run = finish(lvm.train(on("v1", lr=0.02, model="bilinear", epochs=6, **pull), data, tmp_path / "run"))
    alarm = kinds(run)["collapse"]
    worst = run.history.set_index("epoch").loc[alarm.epoch]
    assert worst["val_cos"] <= 0 and f"{worst['val_cos']:+.3f}" in alarm.what and alarm.step == alarm.epoch * 3


def test_a_constant_high_lambda_escapes(tmp_path):
    """The P6b losses with λ fixed at 0.3, by the model whose weights of the context are its own."""
    pull = {"control": {"lambda_max": 0.3, "guard": "none"}}
    own = on("v23_unguarded", lr=0.02, model="bilinear", epochs=5, **pull)
    store = make_data(articles=30, length=20)
    run = finish(lvm.train(own, store, tmp_path / "run"))
    alarm = kinds(run)["escape"]
    at = run.history.set_index("epoch").loc[alarm.epoch]
    assert at["escape"] > alarms.ESCAPE and f"{at['escape']:.1%} of the weights are negative" in alarm.what
    calm = on("p6", lr=0.02, model="bilinear", epochs=5)
    assert finish(lvm.train(calm, store, tmp_path / "calm")).alarms == []


def breaking(monkeypatch, part, at, broken):
    """Training in which the call `at` of a loss term gives `broken(raw, value)`; an epoch has 3 batches."""
    real, calls = getattr(losses, part), []

    def term(raw, *rest):
        calls.append(1)
        return broken(raw, real(raw, *rest)) if len(calls) == at else real(raw, *rest)

    monkeypatch.setattr(losses, part, term)


def test_a_gradient_that_is_not_finite_is_named_with_its_own_step(data, tmp_path, monkeypatch):
    """The loss is finite and its gradient is not, as that of the square root is at 0."""
    breaking(monkeypatch, "norm", 2, lambda raw, x: x + 0 * (raw - raw.detach()).square().sum().sqrt())
    with pytest.raises(LVMError, match=r"gradient norm is nan at epoch 1, step 2 .*loss 0\.\d"):
        list(lvm.train(on(), data, tmp_path / "run"))


def test_a_weight_that_is_not_finite_is_named(data, tmp_path, monkeypatch):
    real, calls = torch.optim.AdamW.step, []

    def step(self, *arguments, **options):
        real(self, *arguments, **options)
        calls.append(1)
        if len(calls) == 3:  # of the epoch's last batch
            self.param_groups[0]["params"][0].data[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(LVMError, match=r"a weight is not finite at epoch 1, step 3 .*not finite: 1, first "):
        list(lvm.train(on(), data, tmp_path / "run"))


def test_validation_and_the_last_step_are_looked_at(data, tmp_path, monkeypatch):
    real = evaluate.validate
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "validate", lambda *a: real(*a) | {"val_loss": math.inf})
        with pytest.raises(LVMError, match="val_loss is inf at epoch 1, step 3"):
            list(lvm.train(on(), data, tmp_path / "run"))
    clip, factors = loop.clip, iter([1, 1, math.nan])
    monkeypatch.setattr(loop, "clip", lambda *a: clip(*a) * next(factors))
    with pytest.raises(LVMError, match="norm is nan at epoch 1, step 3"):
        list(lvm.train(on(), data, tmp_path / "other"))


# What is done at one


def test_stop_ends_the_run_after_the_epochs_checkpoint(data, tmp_path):
    own = on("p6", lr=10.0, trouble="stop", epochs=5)
    run = finish(lvm.train(own, data, tmp_path / "run"))
    assert len(run) == 1 and run.record["stopped"].startswith("epoch 1: divergence: the loss (mse) is")
    again = lvm.train(own, data, tmp_path / "run")
    assert again.status == "finished" and again.alarms == run.alarms and len(list(again)) == 1 and again.best


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_step_stops_at_the_last_good_checkpoint(data, tmp_path, monkeypatch, value):
    breaking(monkeypatch, "mse", 5, lambda raw, x: x * value)
    own = on("p6", trouble="stop")
    run = finish(lvm.train(own, data, tmp_path / "run"))
    assert len(run) == 1 and run.record["stopped"].startswith(f"mse is {value} at epoch 2, step 5")
    (alarm,) = run.alarms
    assert (alarm.kind, alarm.epoch, alarm.step) == ("broken", 2, 5)
    again = lvm.train(own, data, tmp_path / "run")
    assert again.status == "finished" and again.alarms == run.alarms
    assert np.isfinite(evaluate.validate(again.best, data.val)["val_loss"])


def test_with_no_epoch_to_end_with_a_broken_step_is_an_error(data, tmp_path, monkeypatch):
    breaking(monkeypatch, "mse", 1, lambda raw, x: x * math.nan)
    with pytest.raises(LVMError, match="mse is nan at epoch 1, step 1"):
        list(lvm.train(on(trouble="stop"), data, tmp_path / "run"))
    record = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert len(record["alarms"]) == 1 and "finished" not in record


# In run.yaml, in words


@pytest.mark.parametrize(
    "content",
    [
        "x",
        [1],
        [{"epoch": 1}],
        [{"epoch": "1", "step": 2, "kind": "broken", "what": "", "do": ""}],
        [{"epoch": 1, "step": 2, "kind": "broken", "what": ["x"], "do": ""}],
    ],
)
def test_damaged_alarms_are_named(tmp_path, content):
    record = {key: {} for key in ("parameters", "dataset", "computed", "software")} | {"alarms": content}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(record))
    with pytest.raises(LVMError, match=r"cannot be read as a run \(.*[Aa]larm"):
        runs.open_run(tmp_path)


def test_words_for_none_and_several():
    alarmed = [alarms.Alarm(2, 5, "broken", "w", "d"), alarms.Alarm(3, 12, "collapse", "w", "d")]
    assert alarms.short(alarmed) == "broken at epoch 2, step 5; collapse from epoch 3, step 12 on"
    assert alarms.short([]) == ""
    assert ["control" in alarms.nothing(lvm.version(name)) for name in ("p6", "v22")] == [False, True]
