"""Several processes: the same run as by one, ended together, resumed."""

import contextlib
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from kill_runs import trained, unlike
from parallel_worker import BFLOAT16, CASES, case, data, without_chance
from toys import make_data, version, weights

import lvmlib as lvm
from lvmlib import loop
from lvmlib.data import store as vectors
from lvmlib.errors import LVMError
from lvmlib.io.paths import ROOT
from lvmlib.runs import folder as runs
from lvmlib.runs import launch, worker
from lvmlib.runs.team import ALONE, Processes, join

EXACT = 1e-5
ROUNDED = 0.01  # after five steps in bfloat16, of eight binary digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two processes on the CPU, once: they leave a run of every case."""
    place = tmp_path_factory.mktemp("together")
    vectors.write_store(make_data().store, place / "store")
    with pytest.MonkeyPatch.context() as patch:
        use_worker(patch)
        patch.setattr(launch, "ATTACHED", "--together")
        assert list(launch.launch(place, launch.Group(2, 1))) == []
    return place


def use_worker(patch):
    patch.setattr(launch, "WORKER", "parallel_worker")
    patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


def history(folder):
    record, epochs, steps = lvm.open_run(folder)
    return record, epochs.drop(columns="seconds"), steps


def stand_in(patch, place, code):
    """Start this code in place of the worker."""
    (place / "another.py").write_text(code)
    patch.setattr(launch, "WORKER", "another")
    patch.setenv("PYTHONPATH", str(place))


def train(folder, place, **group):
    return lvm.train(case("v22", data=str(folder / "store")), lvm.dataset(str(folder / "store")), place, **group)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_losses_of_one(name, folder, tmp_path, monkeypatch):
    """Every rule of λ and every kind of loss, over uneven shares and one of nothing: to rounding."""
    without_chance(monkeypatch.setattr)
    list(lvm.train(case(name), data(), tmp_path / "one"))
    (_, one, one_steps), (record, two, two_steps) = history(tmp_path / "one"), history(folder / name)
    assert record["computed"]["processes"] == {1: 2} and len(one_steps) == 5 * len(one)
    near = ROUNDED if name in BFLOAT16 else EXACT
    pd.testing.assert_frame_equal(two, one, rtol=near, atol=near)
    pd.testing.assert_frame_equal(two_steps, one_steps, rtol=10 * near, atol=10 * near)
    mine, theirs = (torch.cat([w.flatten() for w in weights(f).values()]) for f in (tmp_path / "one", folder / name))
    # As a whole: where a gradient is all rounding, Adam's step may have either sign.
    assert (mine - theirs).norm() < (near if name in BFLOAT16 else 10 * near) * mine.norm()
    if name == "v23_unguarded":
        assert one["rewound"].sum() == 1


def process(rank, size):
    return Processes(SimpleNamespace(global_rank=rank, world_size=size, device=torch.device("cpu")))


def test_each_process_has_a_random_stream_of_its_own(monkeypatch):
    """For dropout and samples. All else draws from the common one, which does not notice."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda batch: None)
    drawn = []
    for rank in range(3):
        own = process(rank, 3)
        with loop.seeded(3, 1):
            own.seed(3, 1)
            model = SimpleNamespace(samples=lambda context, count: torch.rand(count, len(context), 100))
            model.heads = lambda context: (torch.rand(len(context), 100),) * 3
            raw, _, ranker = own.heads(model, torch.zeros(6, 5, 24))
            assert raw.shape == ranker.shape == (6, 100)
            drawn += [raw[2 * rank : 2 * rank + 2], own.samples(model, torch.zeros(6, 5, 24), 4)[0, 2 * rank :][:2]]
            common = torch.rand(2, 100)
        with loop.seeded(3, 1):
            assert torch.equal(torch.rand(2, 100), common)
    drawn.append(common)
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.fixture(scope="module")
def stopped(folder, tmp_path_factory):
    """A run of two processes whose second fails in epoch 2: its folder, the error's message, the seconds it took."""
    place = tmp_path_factory.mktemp("stopped") / "run"
    run = train(folder, place, devices=2)
    with pytest.MonkeyPatch.context() as patch:
        use_worker(patch)
        started = time.monotonic()
        with pytest.raises(LVMError) as e:
            list(run)
        return place, str(e.value), time.monotonic() - started


def test_a_process_that_fails_ends_all_with_its_own_message(stopped):
    place, message, seconds = stopped
    assert "process 2 of 2: the second process's own trouble" in message and str(place) in message
    assert len(message.splitlines()) == 2 and seconds < 60  # nobody waits for the collective's time to run out
    record, epochs, _ = lvm.open_run(place)
    assert epochs["epoch"].tolist() == [1] and "finished" not in record


def test_resumed_by_as_many_processes_it_ends_as_an_uninterrupted_run(folder, stopped, tmp_path):
    """Bit for bit; the rows come as they appear, and the run that launched them is as finished as they left it."""
    shutil.copytree(stopped[0], tmp_path / "run")
    run = train(folder, tmp_path / "run", devices=2)
    assert run.status == "interrupted" and len(run.history) == 1
    assert [r["epoch"] for r in run] == [1, 2, 3] and run.finished and run.record["finished"]
    ends = [{**trained(place), "run.yaml": None} for place in (tmp_path / "run", folder / "whole")]
    assert not unlike(*ends)  # run.yaml names who prepared the folder
    assert launch.describe(run.record) == "Trained by 2 processes."
    assert train(folder, tmp_path / "run").status == "finished"  # by any number of processes


def test_resumed_by_one_it_goes_on_and_records_it(folder, stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "run")
    list(train(folder, tmp_path / "run"))
    (_, whole, _), (record, mine, _) = history(folder / "whole"), history(tmp_path / "run")
    pd.testing.assert_frame_equal(mine, whole, rtol=EXACT, atol=EXACT)
    assert record["computed"]["processes"] == {1: 2, 2: 1}
    assert launch.describe(record).startswith("Trained by 2 processes, from epoch 2 on by 1: not bit for bit")


def test_who_stops_looking_ends_the_processes(tmp_path, monkeypatch):
    """Both write their number, and the first reports an epoch."""
    code = (
        "import os, sys, time\n"
        "rank, folder = os.environ['RANK'], sys.argv[1]\n"
        "open(f'{folder}/{rank}', 'w').write(str(os.getpid()))\n"
        "while not all(os.path.exists(f'{folder}/{r}') for r in '01'): time.sleep(0.05)\n"
        f"if rank == '0': print('{launch.EPOCH} 1/9', flush=True)\n"
        "time.sleep(600)\n"
    )
    stand_in(monkeypatch, tmp_path, code)
    rows = launch.launch(tmp_path, launch.Group(2, 1))
    next(rows)
    pids = [int((tmp_path / rank).read_text()) for rank in "01"]
    assert all(map(psutil.pid_exists, pids))
    rows.close()
    assert not any(map(psutil.pid_exists, pids))


def test_a_process_that_is_killed_is_named_by_its_number_and_signal(tmp_path, monkeypatch):
    code = "import os, time\nos.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(600)\n"
    stand_in(monkeypatch, tmp_path, code)
    with pytest.raises(LVMError, match="process 2 of 2: ended without a message, by signal 9"):
        list(launch.launch(tmp_path, launch.Group(2, 1)))


def test_processes_that_end_too_early_are_no_finished_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "launch", lambda *_: iter(()))
    with pytest.raises(LVMError, match="the processes ended early, after 0 epochs"):
        list(train(folder, tmp_path / "run", devices=2))


def test_the_processes_end_with_the_kernel_that_launched_them():
    """A kernel that is killed cannot end them: they see their standard input closed."""
    code = "import threading, time; from lvmlib.runs import worker; worker._end_with_parent(); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=ROOT)
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(60) == 1


def test_many_hosts_get_their_command_and_the_finished_run_is_reused(folder, tmp_path):
    """The prepared folder is trained by whoever is started on it: here by one process."""
    with pytest.raises(LVMError, match=r"prepared, after 0 epochs, for 3 hosts.*--nnodes 3 --nproc-per-node 4") as e:
        list(train(folder, tmp_path / "run", devices=4, nodes=3))
    assert f"-m lvmlib parallel {tmp_path / 'run'}" in str(e.value) and "srun --nodes 3" in str(e.value)
    assert worker.main([str(tmp_path / "run")]) == 0
    run = train(folder, tmp_path / "run", devices=4, nodes=3)
    assert run.status == "finished" and len(list(run)) == 3 and launch.describe(run.record) == ""


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"devices": 0}, "devices is 0"),
        ({"devices": "2"}, "devices is '2'"),
        ({"nodes": True}, "nodes is True"),
        ({"devices": 2, "strategy": "fsdp"}, "strategy is 'fsdp'"),
        ({"devices": 20, "nodes": 2}, "batch_size"),
    ],
)
def test_impossible_groups_are_refused(folder, tmp_path, asked, words):
    with pytest.raises(LVMError, match=words):
        train(folder, tmp_path / "run", **asked)


def test_missing_devices_and_packages_are_named(monkeypatch):
    with pytest.raises(LVMError, match="device 'mps'"):
        launch.group(version(device="mps"), 2, 1, "auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(LVMError, match="devices is 2; this machine has 1"):
        launch.check_devices(launch.Group(2, 1), "cuda")
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(LVMError, match="lightning_fabric is missing"):
        launch.check_devices(launch.Group(2, 1), "cpu")


def test_a_worker_that_fails_prints_one_line(folder, tmp_path, capfd, monkeypatch):
    with pytest.raises(LVMError):
        list(train(folder, tmp_path / "run", nodes=2))
    monkeypatch.setattr(worker, "train", lambda *_, **__: 1 / 0)
    assert worker.main([str(tmp_path / "run")]) == 1
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith(launch.FAILED)]
    assert len(lines) == 1 and "process 1 of 1: ZeroDivisionError: division by zero (test_parallel.py" in lines[0]


@pytest.mark.parametrize("windows", [1, 2, 3, 4, 5, 13, 32])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_shares_are_the_batch_and_their_gradients_its_gradient(windows, size, monkeypatch):
    """By hand, with a sum that has all shares at once: no window twice, none left out, none with another's row."""
    batch, weight = torch.arange(windows * 6.0).reshape(windows, 2, 3), torch.rand(windows, 2, 3)
    teams = [process(rank, size) for rank in range(size)]
    shares = [team.share(batch) for team in teams]
    each = math.ceil(windows / size)
    assert {len(s) for s in shares} == {each}
    gradients = []
    for team, share in zip(teams, shares, strict=True):

        def all_reduce(own, team=team):
            parts = [torch.zeros_like(own) for _ in teams]
            for rank, (part, rows) in enumerate(zip(parts, shares, strict=True)):
                part[rank * each : (rank + 1) * each] = rows[: max(0, windows - rank * each)]
            assert torch.equal(own, parts[team.rank])
            own.copy_(sum(parts))

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        factor = torch.ones((), requires_grad=True)  # a parameter of the model
        gathered = team.gather(share * factor, windows)
        assert torch.equal(gathered, batch)
        ((gathered * weight).sum() ** 2).backward()
        gradients.append(float(factor.grad))
    assert np.isclose(sum(gradients), float(2 * (batch * weight).sum() ** 2), rtol=1e-5)


@pytest.mark.parametrize("factors, agree", [((1, 1), True), ((1.0001, 1), False), ((1, 1.0001), False)])
def test_processes_that_differ_in_loss_or_weights_are_refused(monkeypatch, factors, agree):
    def all_reduce(figures):
        figures[1] = figures[0] * torch.tensor(factors)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with contextlib.nullcontext() if agree else pytest.raises(LVMError, match="the processes differ"):
        process(0, 2).agree(0.5, torch.nn.Linear(3, 2))


def test_records_name_the_number_of_processes():
    record = {"computed": {"device": "cpu"}, "software": {}}
    for done, size, counts, words in (
        (0, 1, None, ""),
        (4, 1, None, ""),
        (4, 3, {1: 1, 5: 3}, "Trained by 1 process, from epoch 5 on by 3:"),
        (6, 3, {1: 1, 5: 3}, "Trained by 1 process, from epoch 5 on by 3:"),
        (0, 2, {1: 2}, "Trained by 2 processes."),
        (0, 1, None, ""),
    ):
        runs.record_resumed(record, {}, size, done)
        assert record["computed"].get("processes") == counts and launch.describe(record).startswith(words)
    assert "continued" not in record


def test_alone_it_is_the_model_itself(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert join("cpu") is ALONE and ALONE.first
    monkeypatch.setenv("SLURM_PROCID", "0")  # a notebook in a job of one task
    assert join("cpu") is ALONE
