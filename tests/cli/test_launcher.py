"""`python -m lvmlib train`, and papermill from the root and from notebooks/: the same run in the same place."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
from toys import until

from lvmlib.cli import commands as launcher
from lvmlib.cli import execute as runner
from lvmlib.errors import LVMError
from lvmlib.io.paths import ROOT
from lvmlib.report import summary
from lvmlib.share import gallery

ARGUMENTS = ["-p", "model", "amn", "-p", "fast", "True", "-p", "precision", "float32"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


def call(outputs, *command, cwd=ROOT):
    environment = {**os.environ, "LVM_OUTPUTS": str(outputs)}
    return subprocess.run([sys.executable, "-m", *map(str, command)], check=False, capture_output=True, text=True,
                          env=environment, cwd=cwd)  # fmt: skip


@pytest.fixture(scope="module")
def folder(outputs):
    return outputs / "fast" / "wikipedia" / "v21" / "seed0-amn"


@pytest.fixture(scope="module")
def trained(outputs):
    """What `make train` calls, once; the tests below look at what it left."""
    done = call(outputs, "lvmlib", "train", "-p", "version", "v21", *ARGUMENTS)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_make_train_leaves_notebook_html_and_verdict(outputs, folder, trained):
    done = trained
    lines = done.stdout.strip().splitlines()[-4:]
    assert lines[0].split() == ["notebook", str(folder / "train.ipynb")]
    assert lines[1].split() == ["HTML", str(folder / "train.html")]
    report = json.loads((folder / "fivecat.json").read_text(encoding="utf-8"))
    assert lines[2].removeprefix("verdict").strip() == report["verdict"]["text"]
    assert lines[3].removeprefix("reading").strip() == report["reading"]["text"]
    assert "epoch  2/2" in done.stdout + done.stderr  # one line an epoch in the log
    page = (folder / "train.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml;base64") >= 4
    notebook = json.loads((folder / "train.ipynb").read_text(encoding="utf-8"))
    assert not [o for c in notebook["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert not list(outputs.glob("*.ipynb"))


def test_papermill_from_notebooks_finds_the_same_run(outputs, trained, tmp_path):
    done = call(outputs, "papermill", "train.ipynb", tmp_path / "out.ipynb", "-p", "version", "v21", *ARGUMENTS,
                cwd=ROOT / "notebooks")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "out.ipynb").read_text(encoding="utf-8")
    assert "A finished run of the same parameters and data, reused" in text


def test_papermill_refuses_an_unknown_parameter(outputs, tmp_path):
    done = call(outputs, "papermill", "notebooks/train.ipynb", tmp_path / "out.ipynb", "-p", "verison", "v21")
    assert done.returncode and "LVMError" in done.stderr and "did you mean 'version'?" in done.stderr


def test_a_refused_run_leaves_the_notebook_of_the_earlier_one(outputs, folder, trained, monkeypatch, capfd):
    monkeypatch.setenv("LVM_OUTPUTS", str(outputs))
    before = (folder / "train.ipynb").read_bytes()
    assert launcher.main(["train", "-p", "version", "v21", *ARGUMENTS, "-p", "epochs", "1"]) == 1
    errors = capfd.readouterr().err.strip()
    assert errors.startswith("LVMError: ") and len(errors.splitlines()) == 1 and "epochs: 2 there, 1 here" in errors
    assert (folder / "train.ipynb").read_bytes() == before
    assert not list(outputs.glob("*.ipynb"))  # the failed notebook says no more than the error


@pytest.mark.parametrize("option, words", [("--help", "Usage: "), ("--prepare-only", "Prepared, not executed: ")])
def test_what_executes_nothing_leaves_the_run_as_it_is(outputs, folder, trained, monkeypatch, capfd, option, words):
    monkeypatch.setenv("LVM_OUTPUTS", str(outputs))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert launcher.main(["train", "-p", "version", "v21", *ARGUMENTS, option]) == 0
    shown = capfd.readouterr()
    assert not shown.err and words in shown.out
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    for left in outputs.glob("train.*.ipynb"):
        assert "lvmlib" not in json.loads(left.read_text(encoding="utf-8"))["metadata"]
        left.unlink()


def test_terminated_it_ends_with_all_that_it_started(outputs):
    """As `timeout` and schedulers do: SIGTERM to the process that was called, and to no other."""
    command = [sys.executable, "-m", "lvmlib", "train", *ARGUMENTS, "-p", "version", "p6"]
    called = psutil.Popen(command, env={**os.environ, "LVM_OUTPUTS": str(outputs)}, cwd=ROOT, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    run = outputs / "fast" / "wikipedia" / "p6" / "seed0-amn" / "run.yaml"
    until(run.exists, called)
    started = called.children(recursive=True)
    assert len(started) >= 2  # papermill and a kernel
    called.terminate()
    _, errors = called.communicate(timeout=60)
    assert (called.returncode, errors.count("the same command goes on from there")) == (143, 1)
    assert psutil.wait_procs(started, timeout=60)[1] == []
    assert not list(outputs.glob("train.*.ipynb")) and not run.with_name("train.ipynb").exists()


def test_the_preflight_says_its_verdict_in_the_terminal(outputs, monkeypatch, capfd):
    monkeypatch.setenv("LVM_OUTPUTS", str(outputs))
    assert launcher.main(["data", "-p", "fast", "True", "-p", "steps", "0", "-p", "horizon", "1"]) == 0
    lines = capfd.readouterr().out.strip().splitlines()[-3:]
    folder = outputs / "fast" / "wikipedia"
    assert lines[0].split() == ["notebook", str(folder / "data-horizon1.ipynb")]  # horizons do not overwrite each other
    assert lines[2].startswith("verdict   ") and "best baseline" in lines[2] and "A fast run" in lines[2]


def test_usage(capsys):
    assert launcher.main([]) == launcher.main(["render", "data", "out.html"]) == 2
    shown = capsys.readouterr()
    assert "usage" in (shown.out + shown.err).lower() and "out.html" in shown.err


def test_the_runs_are_drawn_together(outputs, folder, trained):
    frame = summary.runs("fast/wikipedia", outputs)
    run = frame[frame["version"] == "v21"].iloc[0]
    report = json.loads((folder / "fivecat.json").read_text(encoding="utf-8"))
    keys = ("split", "predictor", "measure")
    (margin,) = [r["value"] for r in report["original"]["table"] if [r[k] for k in keys] == ["val", "model", "margin"]]
    assert (run["predictor"], run["seed"], run["epochs"], run["margin"]) == ("amn", 0, 2, margin)
    others = {"constant", "copy last", "mean", "weighted mean", "ridge"}
    assert set(frame.loc[frame["version"] == "", "predictor"]) == others
    text = summary.markdown(summary.by_version(frame))
    assert f"| `v21` | amn, float32 | 1 | {run['val_cos']:.3f} | {run['ood_cos']:.3f} | {margin:+.3f} |" in text


def test_seeds_are_drawn_together_with_their_half_range():
    row = {"version": "v22", "predictor": "transformer", "epochs": 12.0, "precision": "float32", "direction": "forward"}
    rows = [{**row, "seed": s, **dict.fromkeys(summary.MEASURES, x)} for s, x in enumerate((0.1, 0.2, 0.6))]
    (found,) = summary.by_version(pd.DataFrame(rows)).to_dict("records")
    assert found["seeds"] == 3 and found["margin"] == pytest.approx(0.3) and found["margin_half"] == pytest.approx(0.25)
    assert "+0.300 ± 0.250" in summary.markdown(pd.DataFrame([found]))


@pytest.mark.parametrize("content", ["{", "{}", '{"calibrated": {"table": [{"predictor": "model"}]}}'])
def test_a_damaged_report_is_named(folder, trained, tmp_path, content):
    shutil.copytree(folder, place := tmp_path / "wikipedia" / "v21" / "seed0-amn")
    (place / "fivecat.json").write_text(content)
    with pytest.raises(LVMError, match=r"fivecat\.json: cannot be read as a 5CAT report"):
        summary.runs(root=tmp_path)


def test_without_a_run_there_is_no_table(tmp_path):
    with pytest.raises(LVMError, match="no finished run"):
        summary.runs(root=tmp_path)


def test_the_benchmark_goes_the_way_of_all_commands(tmp_path):
    """Through the checks of parameters, into the folder that LVM_OUTPUTS names, and stamped."""
    done = subprocess.run(["make", "--dry-run", "benchmark", "ARGS=-p seed 1"], check=True, capture_output=True,
                          text=True, cwd=ROOT)  # fmt: skip
    (line,) = [x for x in done.stdout.splitlines() if "notebooks/benchmark.ipynb" in x]
    assert line.split("python ")[1] == (
        '-m lvmlib render notebooks/benchmark.ipynb "${LVM_OUTPUTS:-outputs}/benchmark.ipynb" -p seed 1'
    )
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text('"seed = print(1); other": 1\n', encoding="utf-8")
    with pytest.raises(LVMError, match="is not one of this notebook's"):
        launcher.main(["render", "notebooks/benchmark.ipynb", str(tmp_path / "out.ipynb"), "-f", str(theirs)])


@pytest.mark.parametrize("given", ["my/compare.ipynb", "compare.ipynb", "nonesuch", ".."])
def test_render_refuses_what_is_none_of_its_notebooks(tmp_path, monkeypatch, given):
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "compare.ipynb").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LVMError, match=r"not one of notebooks/ here \(benchmark, compare, "):
        launcher.main(["render", given, "out.ipynb"])
    assert not (tmp_path / "out.ipynb").exists()


@pytest.mark.parametrize("given", ["compare", "notebooks/compare.ipynb", str(ROOT / "notebooks" / "compare.ipynb")])
def test_render_knows_its_notebooks_by_name_and_by_path(monkeypatch, given):
    monkeypatch.chdir(ROOT)
    assert runner.find_notebook(given) == "compare"


def executed(path: Path, *parameters: str) -> Path:
    """A notebook as papermill leaves one: a parameters cell, and one that papermill has put after it."""
    cells = [nbformat.v4.new_code_cell(source, execution_count=i + 1) for i, source in enumerate(parameters)]
    for cell, tag in zip(cells, ("parameters", "injected-parameters"), strict=False):
        cell["metadata"]["tags"] = [tag]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def publish(path: Path, place: Path):
    return launcher._publish(path, runner.parameters(json.loads(path.read_text("utf-8"))), place)


def test_an_executed_notebook_is_copied_to_its_place_and_flushed(tmp_path, monkeypatch, capsys):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_ino))
    ours, place = executed(tmp_path / "ours.ipynb", "fast = False"), tmp_path / "wikipedia" / "data.ipynb"
    publish(ours, place)
    assert place.read_bytes() == ours.read_bytes() and place.with_suffix(".html").exists()
    assert place.stat().st_ino in flushed
    assert "notebook  " in capsys.readouterr().out


@pytest.fixture
def started(monkeypatch):
    """In place of papermill's process: `started.does(path)` writes the executed notebook, or returns its error; the
    other attributes hold how it was called."""

    def run(command, *, cwd, env=None, real=subprocess.run, **options):
        if command[0] == "git":
            return real(command, cwd=cwd, env=env, **options)
        calls.path, calls.environment = Path(next(x for x in command if "/lvm-" in x)), env
        error = calls.does(calls.path) or ""
        return subprocess.CompletedProcess(command, calls.code if error else 0, stderr=error)

    calls = types.SimpleNamespace(does=execute_all, code=1)
    monkeypatch.setattr(runner.subprocess, "run", run)
    monkeypatch.setattr(runner, "check_options", lambda name, options: None)
    return calls


def execute_all(path, error=""):
    """Write what papermill leaves of data.ipynb, and return `error`."""
    content = nbformat.read(ROOT / "notebooks" / "data.ipynb", as_version=4)
    for cell in content.cells:
        if cell.cell_type == "code":
            cell["execution_count"] = 1
    path.write_text(nbformat.writes(content), encoding="utf-8")
    return error


def test_outputs_may_be_named_from_any_folder_and_the_notebook_names_no_machine(tmp_path, monkeypatch, started):
    """papermill and the kernel start from the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LVM_OUTPUTS", "mine")
    assert launcher.main(["render", "data", "out.ipynb"]) == 0
    assert started.environment["LVM_OUTPUTS"] == str(tmp_path / "mine") and not list(Path("mine").iterdir())
    paths = json.loads(Path("out.ipynb").read_text(encoding="utf-8"))["metadata"]["papermill"]
    assert paths == {"input_path": "notebooks/data.ipynb", "output_path": "data.ipynb"}
    assert not started.path.parent.exists()


KILLED, REFUSED = "Traceback\nDeadKernelError: Kernel died", "Input Notebook\nLVMError: x: cannot be written: full"


@pytest.mark.parametrize("code, error, words, lines", [
    (1, "Traceback\nZeroDivisionError: division", "ZeroDivisionError", 3),  # papermill's own error is shown whole
    (runner.KILLED_CODE, KILLED, "LVMError: the kernel was killed, perhaps for want of memory", 2),
    (1, REFUSED, "LVMError: x: cannot be written", 2),
])  # fmt: skip
def test_a_failed_notebook_is_in_sight_but_in_no_gallery(
    tmp_path, monkeypatch, capsys, started, code, error, words, lines
):
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path))
    started.does, started.code = lambda path: execute_all(path, error), code
    assert launcher.main(["data"]) == code
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("data.") and left.name.endswith(".partial.ipynb")
    *shown, place = capsys.readouterr().err.strip().splitlines()
    assert words in "\n".join(shown) and len(shown) + 1 == lines
    assert place == f"Failed; the notebook as far as it came: {left}"
    assert gallery._collect(tmp_path, False, False) == []


def test_a_disk_that_takes_nothing_is_named(tmp_path, monkeypatch, started):
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path / "file" / "outputs"))
    (tmp_path / "file").write_text("")
    with pytest.raises(LVMError, match="a file is where a folder should be"):
        launcher.main(["data"])
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path / "outputs"))
    with pytest.raises(LVMError, match="a file is where a folder should be"):
        launcher.main(["render", "data", str(tmp_path / "file" / "out.ipynb")])
    (left,) = (tmp_path / "outputs").iterdir()
    assert left.name.startswith("data.")  # what was executed is not lost
    monkeypatch.setattr(runner.stamp, "stamp", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(LVMError, match="disk is full"):
        launcher.main(["data"])


def test_papermills_kernel_has_sockets_and_a_history_of_its_own(tmp_path):
    """By no port: Jupyter's choice of ports can be taken by the kernel of a command beside this. Here it is killed."""
    cells = ["import os\nfrom ipykernel.connect import get_connection_info\n"
             "print(get_connection_info(unpack=True)['transport'], os.environ['IPYTHONDIR'])",
             "os.kill(os.getpid(), 9)"]  # fmt: skip
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, tmp_path / "small.ipynb")
    paths = [str(tmp_path / name) for name in ("small.ipynb", "out.ipynb")]
    (tmp_path / "place").mkdir()
    done = runner._papermill([*paths, "-k", "python3"], str(tmp_path / "place"))
    assert done.returncode == runner.KILLED_CODE, done.stderr
    transport, history = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[0].outputs[0]["text"].split()
    assert (transport, history) == ("ipc", str(tmp_path / "place"))
    (tmp_path / "full.ipynb").symlink_to("/dev/full")
    done = runner._papermill([paths[0], str(tmp_path / "full.ipynb"), "-k", "python3"], str(tmp_path / "place"))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("LVMError: ") and "cannot be written: the disk is full" in last


def prepare(path: Path, injected: str) -> Path:
    """Write a notebook with the parameters of the one of notebooks/ with this name, and those injected."""
    source = ROOT / "notebooks" / path.name.removeprefix("new-")
    known = runner.parameters(json.loads(source.read_text(encoding="utf-8")))
    return executed(path, "\n".join(f"{key} = {value!r}" for key, value in known.items()), injected)


@pytest.mark.parametrize("name, new, earlier, same", [
    ("train.ipynb", "", 'version = "v22"\nmodel = "transformer"\nseed = 0', True),
    ("train.ipynb", "", 'data = "wikipedia"\nprecision = "float32"', True),  # no other precision would have run
    ("train.ipynb", "devices = 2", "epochs = 12", True),
    ("data.ipynb", "", "data = 'wikipedia'", True),
    ("train.ipynb", "", "seed = 1", False),
    ("train.ipynb", "", "overrides = {'optimizer': {'lr': 1.0e-3}}", False),
    ("data.ipynb", "", "steps = 0", False),
    ("train.ipynb", "", "version = 'nonesuch'", False),
    ("train.ipynb", "", "x.y = 1", False),
    ("train.ipynb", "", None, False),
])  # fmt: skip
def test_a_notebook_of_another_run_and_a_damaged_one_are_set_aside(tmp_path, capsys, name, new, earlier, same):
    place = tmp_path / name
    if earlier is None:
        place.write_bytes(b"[" * 100_000)
    else:
        prepare(place, earlier)
    before = place.read_bytes()
    assert bool(publish(prepare(tmp_path / f"new-{name}", new), place)) is same
    old = place.with_suffix(".old-1.ipynb")
    assert old.exists() is not same and (old.name in capsys.readouterr().out) is not same
    assert same or old.read_bytes() == before


def test_a_run_that_is_only_opened_is_as_old_as_it_was(outputs, folder, trained, monkeypatch, capsys, started):
    """By hand after a sweep, or the other way round: what a sweep made of the run stays newer than the run."""
    monkeypatch.setenv("LVM_OUTPUTS", str(outputs))
    notebook = folder / "train.ipynb"
    before, content = notebook.stat(), notebook.read_bytes()
    started.does = lambda path: path.write_bytes(content + b"\n") and None
    assert launcher.main(["train"]) == 0 and "set aside" not in capsys.readouterr().out
    assert notebook.stat().st_mtime_ns == before.st_mtime_ns and notebook.stat().st_ino != before.st_ino
    assert not list(notebook.parent.glob("*.old-*"))
