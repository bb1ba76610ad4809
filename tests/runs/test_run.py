"""A run's folder: what a run writes, and that it is reused, resumed to the same weights, or refused."""

import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from kill_runs import trained, unlike
from toys import begin, finish, make_data, same, version, weights

import lvmlib as lvm
from lvmlib import evaluate, windows
from lvmlib.data import store as vectors
from lvmlib.errors import LVMError
from lvmlib.judge import health, measure
from lvmlib.judge.cache import cached
from lvmlib.report import summary
from lvmlib.runs import folder as runs
from lvmlib.runs import run as training


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished run, to be read."""
    return finish(lvm.train(version(), data, tmp_path_factory.mktemp("finished") / "run"))


def times(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


# The folder


def test_a_run_leaves_what_the_readme_promises(data, finished):
    names = {str(p.relative_to(finished.folder)) for p in finished.folder.rglob("*") if p.is_file()}
    assert names == {"run.yaml", "steps.csv", "epochs.csv", "best.safetensors", "last/state.pt"}
    record, epochs, steps = lvm.open_run(finished.folder)
    assert record["parameters"] == version().to_dict()
    assert record["dataset"]["fingerprint"] == data.store.fingerprint
    assert record["finished"]["peak_memory_mib"] > 0
    assert record["software"]["torch"] == torch.__version__
    columns = runs.columns()
    assert (list(epochs), list(steps)) == columns and epochs["epoch"].tolist() == [1, 2, 3]
    per_epoch = math.ceil(len(data.train) / 32)
    wanted = sorted({1, 3 * per_epoch, *range(2, 3 * per_epoch + 1, 2)})
    assert steps["step"].tolist() == wanted  # the first, every second, the last
    assert steps["epoch"].tolist() == [(s - 1) // per_epoch + 1 for s in wanted]
    pd.testing.assert_frame_equal(epochs, finished.history, check_exact=True)  # bit for bit through the csv
    text = (finished.folder / "run.yaml").read_text(encoding="utf-8")
    margins = [[1, 0.02], [3, 0.04], [5, 0.06], [9, 0.07]]
    assert "!!" not in text and yaml.safe_load(text)["parameters"]["schedule"]["margin"] == margins


def test_where_runs_live(monkeypatch, tmp_path):
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path))
    for name, parameters, folder in (
        ("v22", {}, "wikipedia/v22/seed0"),
        ("v21", {"seed": 3, "model": "gru"}, "wikipedia/v21/seed3-gru"),
        ("v23_forward", {}, "world-converging/v23_forward/seed0"),
        ("v22", {"fast": True, "direction": "backward"}, "fast/wikipedia/v22/seed0-backward"),
        ("v22", {"data": "some/folder/"}, "folder/v22/seed0"),
    ):
        assert lvm.run_folder(lvm.version(name, **parameters)) == tmp_path / folder


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "a b", 5.5, "x\n", ""])
def test_run_names_stay_inside_outputs(name):
    with pytest.raises(LVMError, match="run_name"):
        lvm.run_folder(version(), name)


# Seeds and directions


def test_vectors_on_demand_train_and_are_judged_alike(data, tmp_path, monkeypatch):
    """As on a GPU that has no room for the store."""
    own = version("margin", model="two_heads", overrides={"losses": {"listwise": {"elsewhere": 7, "candidates": 5}}})
    in_memory = finish(lvm.train(own, data, tmp_path / "in memory"))
    reports, asked = {False: lvm.fivecat(in_memory.best, data)}, []

    def on_device(store, device):
        asked.append(store)
        return windows.OnDemand(torch.from_numpy(store.vectors), torch.device(device))

    for module in (training, health, measure):
        monkeypatch.setattr(module, "on_device", on_device)
    on_demand = finish(lvm.train(own, data, tmp_path / "on demand"))
    cached.values.clear()
    reports[True] = lvm.fivecat(on_demand.best, data)
    assert asked and not unlike(trained(in_memory.folder), trained(on_demand.folder))
    for key, frame in reports[False].frames.items():
        np.testing.assert_equal(vars(reports[True].frames[key]), vars(frame))


def test_a_seed_decides_everything_and_leaves_the_stream_alone(data, finished, tmp_path):
    torch.manual_seed(5)
    finish(lvm.train(version(), data, tmp_path / "same"))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    assert same(weights(tmp_path / "same"), weights(finished.folder))
    finish(lvm.train(version(seed=1), data, tmp_path / "other"))
    assert not same(weights(tmp_path / "other"), weights(finished.folder))


def test_backward_is_forward_on_the_articles_written_backwards(data, tmp_path):
    """The same windows in another order: so the same validation figures of the same weights."""
    store = data.store
    order = np.concatenate([np.flatnonzero(store.article == a)[::-1] for a in dict.fromkeys(store.article.tolist())])
    turned = vectors.make_store("turned", store.vectors[order], store.article[order], store.position, store.articles)
    backward, own = lvm.dataset(store, direction="backward"), version(direction="backward", epochs=1)
    run = finish(lvm.train(own, backward, tmp_path / "run"))
    found, wanted = (evaluate.validate(run.best, d.val) for d in (backward, lvm.dataset(turned)))
    assert found == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(LVMError, match="direction='backward'"):
        lvm.train(own, data, tmp_path / "other")


def test_pairs_of_directions_are_found(data, tmp_path, monkeypatch):
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path))
    backward, own = lvm.dataset(data.store, direction="backward"), version(epochs=1)
    finish(lvm.train(own, data))
    finish(lvm.train(version(seed=1, epochs=1), data))
    best = finish(lvm.train(version(direction="backward", epochs=1), backward)).best
    next(iter(lvm.train(version(direction="backward", seed=1, epochs=2), backward)))  # not finished: no pair
    pairs = summary.directions(own, data, backward)
    assert set(pairs) == {0} and same(pairs[0][1].state_dict(), best.state_dict())


# Reused, resumed, refused


@pytest.mark.parametrize(
    "name, model, precision",
    [
        ("v22", "amn", "bfloat16"),
        ("v22", "lstm", "float32"),  # dropout: its random stream must go on as well
        ("rank", "bilinear", "float32"),  # the temperature and the rivals' stream
        ("committee", "committee", "float32"),  # its learning rate falls with every step
        ("energy", "sampler", "float32"),  # the samples' stream
        ("pi", "amn", "float32"),  # the controller's memory
        ("bounded", "bilinear", "float32"),
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(data, tmp_path, name, model, precision):
    own = version(name, model=model, epochs=2, precision=precision)
    finish(lvm.train(own, data, tmp_path / "whole"))
    resumed = lvm.train(own, data, begin(own, data, tmp_path / "part"))
    assert resumed.status == "interrupted" and len(resumed.history) == 1
    finish(resumed)
    assert not unlike(trained(tmp_path / "whole"), trained(tmp_path / "part"))


def test_a_finished_run_is_reused(data, finished):
    before = times(finished.folder)
    again = lvm.train(version(), data, finished.folder)
    assert again.status == "finished" and again.finished
    assert [r["val_loss"] for r in again] == finished.history["val_loss"].tolist()
    assert times(finished.folder) == before


def test_tables_without_a_state_begin_anew(data, tmp_path):
    (begin(version(), data, tmp_path / "run") / "last" / "state.pt").unlink()
    run = lvm.train(version(), data, tmp_path / "run")
    assert run.status == "new" and [row["epoch"] for row in run] == [1, 2, 3]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"epochs": 5}, "epochs: 3 there, 5 here"),
        ({"overrides": {"losses": {"floor": {"tau": 0.2}}}}, "losses.floor.tau: 0.12 there, 0.2 here"),
        ({"name": "v23"}, "name: 'v22' there, 'v23' here"),
        ({"precision": "bfloat16"}, "computed.precision: 'float32' there, 'bfloat16' here"),
        ({}, "dataset.fingerprint"),
    ],
)
def test_a_run_with_other_parameters_or_data_is_refused(data, finished, change, named):
    before = times(finished.folder)
    with pytest.raises(LVMError, match="run_name") as e:
        lvm.train(version(**change), data if change else make_data(seed=1), finished.folder)
    assert named in str(e.value) and times(finished.folder) == before


def test_fresh_sets_the_old_run_aside_and_deletes_nothing(data, finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    for epochs in (1, 2):
        finish(lvm.train(version(epochs=epochs), data, tmp_path / "run", fresh=True))
    assert same(weights(finished.folder), weights(tmp_path / "run.old-1"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.old-1", "run.old-2"]
