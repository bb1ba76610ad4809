"""A sweep in small, through snakemake: killed and taken up again, with a run that fails, and what it plans."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest
import yaml
from toys import alive, until

import lvmlib as lvm
from lvmlib.cli import sweep
from lvmlib.cli.execute import parameters
from lvmlib.cli.parameters import check_given
from lvmlib.errors import LVMError
from lvmlib.io.paths import ROOT

SMALL = {"fast": True, "models": ["amn"], "seeds": 1, "versions": ["p6", "v22"], "precision": "float32"}
WORKFLOW = ROOT / "workflow"
CONFIG = yaml.safe_load((WORKFLOW / "sweep.yaml").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("LVM_FAST", raising=False)
    return tmp_path / "outputs"


# What is planned


def test_the_configuration_that_ships_is_the_family_by_three_seeds(outputs):
    planned = sweep.plan(CONFIG)
    names = ["p6", "v1", "v2", "v21", "v22", "v23", "v23_unguarded", "v23_forward", "v23_confident"]
    wanted = {
        str(lvm.run_folder(lvm.version(name, seed=seed))): {"version": name, "model": "transformer", "seed": seed}
        for name in names
        for seed in range(3)
    }
    assert planned.runs == wanted and len(wanted) == 27
    assert set(CONFIG) == {f.name for f in fields(sweep.Settings)}
    pages = {path.removeprefix(str(outputs)): page for path, page in planned.comparisons.items()}
    assert list(pages) == ["/wikipedia/compare-transformer.ipynb", "/world-converging/compare-transformer.ipynb"]
    assert set(pages["/world-converging/compare-transformer.ipynb"].runs.values()) == {"v23_forward"}


def test_datasets_and_models_multiply_and_a_version_with_a_model_of_its_own_keeps_it(outputs):
    models = {"datasets": ["wikipedia", "world:converging"], "models": ["amn", "lstm"]}
    config = {"versions": "p6 rank", "seeds": 2, **models}
    folders = [path.removeprefix(f"{outputs}/") for path in sweep.plan(config).runs]
    assert sorted(folders) == sorted(
        f"{data}/{run}{seed}{model}"
        for data in ("wikipedia", "world-converging")
        for seed in (0, 1)
        for run, model in (("p6/seed", "-amn"), ("p6/seed", "-lstm"), ("rank/seed", "-bilinear"))
    )


def test_every_parameter_is_one_of_the_notebooks():
    overrides = {"optimizer": {"lr": 1.0e-3}}
    planned = sweep.plan(SMALL | {"datasets": ["wikipedia"], "epochs": 3, "overrides": overrides})
    (comparison,) = map(sweep.comparison_parameters, planned.comparisons.values())
    assert comparison["overrides"] == {**overrides, "epochs": 3}  # which the other notebooks have apart
    runs = planned.runs.values()
    for name, given in {"train": runs, "diagnostics": runs, "fivecat": runs, "compare": [comparison]}.items():
        known = parameters(json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")))
        for each in given:
            check_given(json.loads(json.dumps(each)), known)


@pytest.mark.parametrize("change, words", [
    ({"verisons": ["p6"]}, "'versions'"),
    ({"versions": ["p6", "v24"]}, "'v24'"),
    ({"versions": []}, "versions is []"),
    ({"datasets": ["wikipedai"]}, "'wikipedai'"),
    ({"models": ["transfromer"]}, "transfromer"),
    ({"seeds": 0}, "seeds is 0"),
    ({"seeds": "three"}, "seeds is 'three'"),
    ({"fast": "perhaps"}, "fast is 'perhaps'"),
    ({"epochs": 0}, "epochs"),
    ({"overrides": {"optimizer": {"lrr": 1.0e-3}}}, "'optimizer.lrr'"),
])  # fmt: skip
def test_a_bad_configuration_is_refused_before_anything_runs(outputs, change, words):
    with pytest.raises(LVMError) as refused:
        sweep.plan(SMALL | change)
    assert words in str(refused.value) and not outputs.exists()


def test_what_the_command_line_leaves_as_text_is_read_as_yaml():
    text = {"fast": "true", "epochs": "null", "datasets": ["null"], "overrides": {"optimizer": {"lr": "1.0e-3"}}}
    plain = {"fast": True, "epochs": None, "datasets": [None], "overrides": {"optimizer": {"lr": 1.0e-3}}}
    assert sweep.plan(SMALL | text) == sweep.plan(SMALL | plain)
    odd = {"datasets": ["on", "12:30", "007x"], "epochs": "3"}
    assert sweep._typed(odd) == odd | {"epochs": 3}


def test_datasets_of_one_name_are_refused(outputs, tmp_path):
    for place in "ab":
        shutil.copytree(ROOT / "lvmlib" / "data" / "wikipedia", tmp_path / place / "mine")
    config = SMALL | {"versions": ["p6"], "datasets": [str(tmp_path / place / "mine") for place in "ab"]}
    with pytest.raises(LVMError, match=r"would both be .*mine"):
        sweep.plan(config)


def test_a_finished_run_of_other_parameters_or_data_is_not_taken_for_done(outputs):
    own = lvm.version("p6", model="amn", fast=True, epochs=1)
    run = lvm.train(own, lvm.dataset(own.data, fast=True))
    assert len(list(run)) == 1
    config = SMALL | {"precision": None, "versions": ["p6"]}
    sweep.plan(config)  # not a sweep's yet: the job itself refuses it
    (run.folder / "train.ipynb").touch()
    assert list(sweep.plan(config | {"epochs": 1}).runs) == [str(run.folder)]
    with pytest.raises(LVMError, match=r"epochs: 1 there, 2 here"):
        sweep.plan(config)
    other = "bfloat16" if run.precision == "float32" else "float32"
    with pytest.raises(LVMError, match=r"computed\.precision"):
        sweep.plan(config | {"epochs": 1, "precision": other})
    record = (run.folder / "run.yaml").read_text()
    (run.folder / "run.yaml").write_text(record.replace(run.data.store.fingerprint, "0" * 64))
    with pytest.raises(LVMError, match=r"dataset\.fingerprint"):
        sweep.plan(config | {"epochs": 1})


def test_a_comparison_is_of_the_versions_that_have_finished_a_run(outputs):
    planned = sweep.plan(SMALL | {"seeds": 2})
    (page,) = planned.comparisons.values()
    assert sweep.finished_notebooks(page) == [] and len(page.runs) == 4
    for place in ("v22/seed1-amn/train.ipynb", "p6/seed0-amn/train.partial.ipynb"):
        path = outputs / "fast" / "wikipedia" / place
        path.parent.mkdir(parents=True)
        path.touch()
    assert sweep.finished_notebooks(page) == [str(outputs / "fast" / "wikipedia" / "v22" / "seed1-amn" / "train.ipynb")]
    assert sweep.comparison_parameters(page) == {
        "data": "wikipedia", "model": "amn", "seeds": 2, "precision": "float32", "fast": True, "versions": "v22"
    }  # fmt: skip


@pytest.mark.parametrize("change, stays", [
    ({}, True),
    ({"versions": "v22"}, True),  # of the same sweep, before p6 had finished
    ({"seeds": 1}, True),  # the new page shows all that it did, and more
    ({"seeds": 3}, False),
    ({"versions": "p6 v1 v22"}, False),  # of more than has finished
    ({"precision": "bfloat16"}, False),
    ({"overrides": {"optimizer": {"lr": 1.0e-3}}}, False),
    ({"seeds": "3"}, False),  # as papermill's -r leaves it
    ("damaged", False),
    ('{"metadata": {"papermill": {"parameters": [1]}}}', False),
    ("[" * 10**5, False),
])  # fmt: skip
def test_a_comparison_of_another_sweep_is_set_aside_and_not_replaced(outputs, capsys, change, stays):
    planned = sweep.plan(SMALL | {"seeds": 2})
    for folder in planned.runs:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "train.ipynb").touch()
    (page,) = map(Path, planned.comparisons)
    text = change
    if isinstance(change, dict):
        earlier = planned.comparisons[str(page)].parameters | {"versions": "p6 v22"} | change
        text = json.dumps({"metadata": {"papermill": {"parameters": earlier}}})
    page.write_text(text, encoding="utf-8")
    for _ in range(2):
        sweep.set_aside_other_pages(planned)
    old = page.with_suffix(".old-1.ipynb")
    (left,) = page.parent.glob("*.ipynb")
    assert left == (page if stays else old) and left.read_text(encoding="utf-8") == text
    assert (old.name in capsys.readouterr().out) is not stays


@pytest.mark.parametrize("text, words", [
    ("a: [", "restore the file"), ("- p6", "restore the file"),
    ("!!python/object/apply:os.system ['touch canary']", "restore the file"),
    ("""{"__use_yte__": true, "versions": "?open('canary', 'w').write('ran')"}""", "unknown key '__use_yte__'"),
])  # fmt: skip
def test_a_damaged_configuration_and_one_that_asks_for_python_are_refused(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "sweep.yaml"
    file.write_text(text, encoding="utf-8")
    assert "configfile:" not in (WORKFLOW / "Snakefile").read_text(encoding="utf-8")  # snakemake's reader would run it
    with pytest.raises(LVMError, match=words):
        sweep.plan(sweep.read_settings(file, {}))
    assert not (tmp_path / "canary").exists()


def test_what_the_command_line_gives_is_laid_on_the_configuration(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("versions: [p6]\noverrides: {optimizer: {lr: 1.0e-3}}", encoding="utf-8")
    assert sweep.read_settings(file, {"versions": "v22", "overrides": {"epochs": 2}}) == {
        "versions": "v22", "overrides": {"optimizer": {"lr": 1.0e-3}, "epochs": 2}
    }  # fmt: skip


def test_several_gpus_of_a_job_train_its_run():
    for gpus, more in ((0, {}), (1, {}), (3, {"devices": 3})):
        planned = sweep.plan(SMALL | {"gpus": gpus})
        for folder, given in planned.runs.items():
            assert sweep.training_parameters(planned, folder) == given | more and "devices" not in given
    assert "values=training" in (WORKFLOW / "Snakefile").read_text(encoding="utf-8").split("use rule")[0]


def test_a_job_takes_gpus_that_no_other_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.tempfile, "gettempdir", lambda: str(tmp_path))

    def taken(shown, wanted):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        locks = sweep.reserve_gpus(wanted)
        return locks, os.environ["CUDA_VISIBLE_DEVICES"]

    first, seen = taken("4,5,6", 1)
    assert seen == "4"
    second, seen = taken("4,5,6", 2)
    assert seen == "5,6"
    for lock in first:
        lock.release()
    _third, seen = taken("4,5,6", 1)
    assert seen == "4" and len(second) == 2
    assert taken("6", 1) == ([], "6")  # all that a scheduler shows: it is this job's, whoever holds a lock of that name
    assert taken("4,5,6", 0) == ([], "4,5,6")


# What snakemake makes of it


@pytest.fixture
def tree(tmp_path, outputs):
    """The workflow with notebooks of seconds: of train.ipynb the training alone, which waits after an epoch for as long
    as the file `hold` is there; of the others what they were asked, as a line in the file `log`."""
    pytest.importorskip("snakemake", reason='snakemake is missing; run: pip install -e ".[sweep]"')
    tree = tmp_path / "tree"
    for folder in ("lvmlib", "params", "workflow"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "notebooks").mkdir()
    for name in ("train", "diagnostics", "fivecat", "compare"):
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        if name == "train":
            (loop,) = (i for i, c in enumerate(notebook.cells) if "in tqdm(run" in c.source)
            begin = "        if watched:\n            figure"
            assert begin in notebook.cells[loop].source
            waits = f"        while os.path.exists({str(tmp_path / 'hold')!r}):\n            pass\n"
            waits = f"        open({str(tmp_path / 'kernel')!r}, 'w').write(str(os.getpid()))\n" + waits
            notebook.cells[loop].source = notebook.cells[loop].source.replace(begin, waits + begin)
            notebook.cells = notebook.cells[: loop + 1]
        else:
            asked = "versions" if name == "compare" else "version"
            (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
            line = f"with open({str(tmp_path / 'log')!r}, 'a') as f:\n    print('{name}', {asked}, file=f)"
            notebook.cells = [cell, nbformat.v4.new_code_cell(line)]
        nbformat.write(notebook, tree / "notebooks" / f"{name}.ipynb")
    config = yaml.safe_dump(SMALL)
    (tree / "workflow" / "sweep.yaml").write_text(config, encoding="utf-8")
    return tree


def snakemake(tree, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
    return subprocess.Popen(command, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip


def ended(process):
    """Wait for a process; return its exit code and what it printed."""
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed


def test_a_killed_sweep_goes_on_and_a_failed_run_stops_no_other(tmp_path, outputs, tree):
    p6, v22 = (outputs / "fast" / "wikipedia" / name / "seed0-amn" for name in ("p6", "v22"))
    v22.mkdir(parents=True)
    (v22 / "run.yaml").write_text("damaged", encoding="utf-8")
    (tmp_path / "hold").touch()
    log, kernel = tmp_path / "log", tmp_path / "kernel"

    killed = snakemake(tree)
    until(lambda: kernel.exists() and kernel.read_text() and (v22 / "train.partial.ipynb").exists(), killed)
    with pytest.raises(LVMError, match="another sweep is running there"):
        sweep.lock_outputs()
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    # A kernel has a session of its own: it ends when it sees that its parent is gone.
    until(lambda: not alive(int(kernel.read_text())))
    assert not (p6 / "train.ipynb").exists()
    (tmp_path / "hold").unlink()

    code, printed = ended(snakemake(tree))
    assert code == 1 and f"LVMError: {v22}: " in printed
    assert "An interrupted run, going on after epoch 1" in (p6 / "train.ipynb").read_text(encoding="utf-8")
    assert not (p6 / "train.partial.ipynb").exists()
    partial = nbformat.read(v22 / "train.partial.ipynb", as_version=4)
    (error,) = (o for c in partial.cells for o in c.get("outputs", []) if o["output_type"] == "error")
    assert error["ename"] == "LVMError" and len(partial.cells) > 10
    assert [p.name for p in v22.iterdir() if p.suffix == ".ipynb"] == ["train.partial.ipynb"]
    assert sorted(log.read_text().splitlines()) == ["diagnostics p6", "fivecat p6"]

    page = outputs / "fast" / "wikipedia" / "compare-amn.ipynb"
    larger = json.dumps({"metadata": {"papermill": {"parameters": {"versions": "p6 v1 v22", "seeds": 3}}}})
    page.write_text(larger, encoding="utf-8")
    os.utime(page, (1, 1))  # before the runs
    shutil.rmtree(v22)
    planned = snakemake(tree, "--dry-run")  # beside the next: it locks nothing
    code, printed = ended(snakemake(tree, "compare"))
    assert code == 0, printed
    assert log.read_text().splitlines()[-1] == "compare p6"
    assert "compare-amn.old-1.ipynb" in printed and page.exists()
    assert page.with_name("compare-amn.old-1.ipynb").read_text(encoding="utf-8") == larger

    _, printed = ended(planned)
    left = sorted(line.split()[1] for line in printed.splitlines() if line.strip().startswith("output: "))
    assert left == [str(v22 / f"{name}.ipynb") for name in ("diagnostics", "fivecat", "train")]  # nothing of p6's
