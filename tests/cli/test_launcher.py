"""`python -m lvmlib train`, and papermill from the root and from notebooks/: the same run in the same place."""

import contextlib
import errno
import fcntl
import json
import os
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
def trained(outputs):
    """What `make train` calls, once; the tests below look at what it left."""
    done = call(outputs, "lvmlib", "train", "-p", "version", "v21", *ARGUMENTS)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_make_train_leaves_notebook_html_and_verdict(outputs, trained):
    done = trained
    folder = outputs / "fast" / "wikipedia" / "v21" / "seed0-amn"
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


@pytest.mark.parametrize("place, path", [(".", "notebooks/train.ipynb"), ("notebooks", "train.ipynb")])
def test_papermill_from_root_and_from_notebooks_meet_in_one_run(outputs, trained, tmp_path, place, path):
    """After the run above: both find it finished and reuse it."""
    done = call(
        outputs, "papermill", path, tmp_path / "out.ipynb", "-p", "version", "v21", *ARGUMENTS, cwd=ROOT / place
    )
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "out.ipynb").read_text(encoding="utf-8")
    assert "A finished run of the same parameters and data, reused" in text


@pytest.mark.parametrize("arguments, words", [
    (["-p", "version", "v24"], "unknown version 'v24'"),
    (["-p", "verison", "v21"], "'verison' is not one of this notebook's (did you mean 'version'?)"),
    (["-p", "run_name", "../../elsewhere"], "run_name"),
])  # fmt: skip
def test_bad_parameters_fail_with_one_clear_error(outputs, tmp_path, arguments, words):
    done = call(outputs, "papermill", "notebooks/train.ipynb", tmp_path / "out.ipynb", "-p", "fast", "True", *arguments)
    assert done.returncode != 0 and words in done.stderr and "LVMError" in done.stderr


def test_a_refused_run_leaves_the_notebook_that_stands_there(outputs, trained):
    folder = outputs / "fast" / "wikipedia" / "v21" / "seed0-amn"
    before = (folder / "train.ipynb").read_bytes()
    done = call(outputs, "lvmlib", "train", "-p", "version", "v21", *ARGUMENTS, "-p", "epochs", "1")
    assert done.returncode != 0 and done.stderr.strip().startswith("LVMError: ")
    assert len(done.stderr.strip().splitlines()) == 1 and "epochs: 2 there, 1 here" in done.stderr
    assert (folder / "train.ipynb").read_bytes() == before
    assert not list(outputs.glob("*.ipynb"))  # nothing is left of what says no more than the error


def test_what_breaks_unforeseen_is_shown_whole(outputs, trained):
    done = call(outputs, "lvmlib", "train", "-p", "version", "v21", *ARGUMENTS, "-k", "nokernel")
    assert done.returncode != 0 and "No such kernel named nokernel" in done.stderr


@pytest.mark.parametrize("option, words", [("--help", "Usage: "), ("--prepare-only", "Prepared, not executed: ")])
def test_what_executes_nothing_leaves_the_run_as_it_is(outputs, trained, option, words):
    folder = outputs / "fast" / "wikipedia" / "v21" / "seed0-amn"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    done = call(outputs, "lvmlib", "train", "-p", "version", "v21", *ARGUMENTS, option)
    assert done.returncode == 0 and not done.stderr and words in done.stdout
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
    _, said = called.communicate(timeout=60)
    assert (called.returncode, said.count("the same command goes on from there")) == (143, 1)
    assert psutil.wait_procs(started, timeout=60)[1] == []
    assert not list(outputs.glob("train.*.ipynb")) and not run.with_name("train.ipynb").exists()


def test_a_backward_run_has_a_folder_of_its_own(outputs, trained):
    folder = outputs / "fast" / "wikipedia" / "v21"
    before = (folder / "seed0-amn" / "train.ipynb").read_bytes()
    done = call(outputs, "lvmlib", "train", "-p", "version", "v21", *ARGUMENTS, "-p", "direction", "backward")
    assert done.returncode == 0, done.stderr
    assert "read backward" in (folder / "seed0-amn-backward" / "train.ipynb").read_text(encoding="utf-8")
    assert "\nreading   " in done.stdout and (folder / "seed0-amn" / "train.ipynb").read_bytes() == before


def test_the_preflight_says_its_verdict_in_the_terminal(outputs):
    done = call(outputs, "lvmlib", "data", "-p", "fast", "True", "-p", "steps", "0", "-p", "horizon", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()[-3:]
    folder = outputs / "fast" / "wikipedia"
    assert lines[0].split() == ["notebook", str(folder / "data-horizon1.ipynb")]  # horizons do not overwrite each other
    assert lines[2].startswith("verdict   ") and "best baseline" in lines[2] and "A fast run" in lines[2]


def test_usage(outputs):
    done = call(outputs, "lvmlib")
    assert done.returncode == 2 and "usage" in (done.stdout + done.stderr).lower()
    done = call(outputs, "lvmlib", "render", "data", "out.html")
    assert done.returncode == 2 and "out.html" in done.stderr


def test_the_runs_are_drawn_together(outputs, trained):
    frame = summary.runs("fast/wikipedia", outputs)
    run = frame[frame["version"] == "v21"].iloc[0]
    report = json.loads((outputs / "fast/wikipedia/v21/seed0-amn/fivecat.json").read_text(encoding="utf-8"))
    keys = ("split", "predictor", "measure")
    (margin,) = [r["value"] for r in report["original"]["table"] if [r[k] for k in keys] == ["val", "model", "margin"]]
    assert (run["predictor"], run["seed"], run["epochs"], run["margin"]) == ("amn", 0, 2, margin)
    others = {"constant", "copy last", "mean", "weighted mean", "ridge"}
    assert set(frame.loc[frame["version"] == "", "predictor"]) == others
    text = summary.markdown(summary.by_version(frame))
    assert f"| `v21` | amn, float32 | 1 | {run['val_cos']:.3f} | {run['ood_cos']:.3f} | {margin:+.3f} |" in text


def test_seeds_are_drawn_together_with_their_half_range():
    row = {"version": "v22", "predictor": "transformer", "epochs": 12.0, "precision": "float32", "direction": "forward"}
    frame = pd.DataFrame(
        [{**row, "seed": s, **dict.fromkeys(summary.MEASURES, x)} for s, x in enumerate((0.1, 0.2, 0.6))]
    )
    (found,) = summary.by_version(frame).to_dict("records")
    assert found["seeds"] == 3 and found["margin"] == pytest.approx(0.3) and found["margin_half"] == pytest.approx(0.25)
    assert "+0.300 ± 0.250" in summary.markdown(pd.DataFrame([found]))


@pytest.mark.parametrize("content", ["{", "{}", '{"calibrated": {"table": [{"predictor": "model"}]}}'])
def test_a_damaged_report_is_named(outputs, trained, tmp_path, content):
    source = outputs / "fast" / "wikipedia" / "v21" / "seed0-amn"
    folder = tmp_path / "wikipedia" / "v21" / "seed0-amn"
    folder.mkdir(parents=True)
    for name in ("run.yaml", "epochs.csv", "steps.csv"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "fivecat.json").write_text(content)
    with pytest.raises(LVMError, match=r"fivecat\.json: cannot be read as a 5CAT report"):
        summary.runs(root=tmp_path)


def test_no_run_is_said_so(tmp_path):
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
    told = {"papermill": {"parameters": {"given": list(parameters[1:])}}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=told), path)
    return path


def keep(path: Path, place: Path):
    return launcher._keep(runner.Executed(path, runner.parameters(json.loads(path.read_text("utf-8")))), place)


def test_an_executed_notebook_moves_to_another_disk(tmp_path, monkeypatch, capsys):
    """As where outputs/wikipedia is a link: a rename between folders fails there."""

    def rename(source, target, real=os.replace):
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        real(source, target)

    flushed = []
    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_ino))
    ours = executed(tmp_path / "ours.ipynb", "fast = False")
    wanted, place = ours.read_bytes(), tmp_path / "wikipedia" / "data.ipynb"
    keep(ours, place)
    assert place.read_bytes() == wanted and place.with_suffix(".html").exists() and not ours.exists()
    assert place.stat().st_ino in flushed
    assert "notebook  " in capsys.readouterr().out


@pytest.fixture
def started(monkeypatch):
    """In place of papermill's process: `started.does(path)` writes the executed notebook, or fails; `started` says how
    it was called."""

    def run(command, *, cwd, env=None, real=subprocess.run, **options):
        if command[0] == "git":
            return real(command, cwd=cwd, env=env, **options)
        calls.path = Path(cwd) / next(x for x in command if x.endswith(".partial.ipynb"))
        calls.command, calls.environment = command, env
        said = calls.does(calls.path) or ""
        return subprocess.CompletedProcess(command, 1 if said else 0, stderr=said)

    calls = types.SimpleNamespace(does=lambda path: whole(path))
    monkeypatch.setattr(runner.subprocess, "run", run)
    monkeypatch.setattr(runner, "check_options", lambda name, options: None)
    return calls


def whole(path):
    """What papermill leaves of data.ipynb where nothing goes wrong."""
    content = nbformat.read(ROOT / "notebooks" / "data.ipynb", as_version=4)
    for cell in content.cells:
        if cell.cell_type == "code":
            cell["execution_count"] = 1
    path.write_text(nbformat.writes(content), encoding="utf-8")


def test_outputs_may_be_named_from_where_one_stands(tmp_path, monkeypatch, started):
    """papermill and the kernel start from the checkout."""
    monkeypatch.setenv("LVM_OUTPUTS", "mine")
    monkeypatch.chdir(tmp_path)
    assert launcher.main(["render", "data", "out.ipynb"]) == 0
    assert started.environment["LVM_OUTPUTS"] == str(tmp_path / "mine") and started.path.parent == tmp_path / "mine"
    assert Path("out.ipynb").exists() and not list(Path("mine").iterdir())


def test_a_notebook_made_in_the_checkout_names_no_machine(tmp_path, monkeypatch, started):
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for place, named in ((tmp_path, "outputs"), (tmp_path / "elsewhere", str(tmp_path / "outputs"))):
        monkeypatch.chdir(place)
        monkeypatch.setenv("LVM_OUTPUTS", named)
        assert launcher.main(["render", "data", "out.ipynb"]) == 0
        (given,) = [x for x in started.command if x.endswith(".partial.ipynb")]
        assert given.startswith("outputs/.data.")


def test_what_runs_is_hidden_and_held_and_what_a_killed_one_left_goes(tmp_path, monkeypatch, started):
    """Two containers on one folder have the same process ids: no name and no age says whose a notebook is."""
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path))
    killed, running, read = (tmp_path / f".{x}.partial.ipynb" for x in ("train.0123abcd", "data.4567cdef", "mine"))
    failed = tmp_path / "train.89abcdef.partial.ipynb"
    for path in (killed, running, read, failed):
        path.write_text("{}")
    with open(running) as held, contextlib.ExitStack() as stack:
        fcntl.flock(held, fcntl.LOCK_EX)
        there = [stack.enter_context(runner.execute("data", [])).path for _ in range(2)]
        for path in there:
            assert path.name.startswith(".data.") and gallery._shown(path, tmp_path) is False
        assert len(set(there)) == 2 and all(path.exists() for path in (*there, running, read, failed))
    assert not killed.exists() and not any(path.exists() for path in there)


def test_a_failed_notebook_is_in_sight_but_in_no_gallery(tmp_path, monkeypatch, capsys, started):
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path))
    started.does = lambda path: [whole(path), "ZeroDivisionError: division by zero"][1]
    assert launcher.main(["data"]) == 1
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("data.") and left.name.endswith(".partial.ipynb")
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said and f"as far as it came: {left}" in said
    assert gallery._collect(tmp_path, False, False) == []


DEAD = "Traceback\n  File x\nnbclient.exceptions.DeadKernelError: Kernel died\n"
FULL = "Traceback\n  File x\nOSError: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("said, words", [(DEAD, "the kernel was killed, perhaps for want of memory"),
                                         (FULL, "cannot be written: the disk is full. To do: free some room"),
                                         (FULL[:-1] + ": '{}'\n", "cannot be written: the disk is full")])  # fmt: skip
def test_what_ends_papermill_is_told_in_a_line(tmp_path, monkeypatch, capsys, started, said, words):
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path))
    started.does = lambda path: [whole(path), said.format(path)][1]
    assert launcher.main(["data"]) == 1
    told, partial = capsys.readouterr().err.strip().splitlines()
    assert told.startswith("LVMError: ") and words in told and "the same command goes on" in told
    assert partial == f"Failed; the notebook as far as it came: {next(tmp_path.iterdir())}"


def test_a_disk_that_takes_nothing_is_told(tmp_path, monkeypatch, started):
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path / "file" / "outputs"))
    (tmp_path / "file").write_text("")
    with pytest.raises(LVMError, match="a file stands where a folder should"):
        launcher.main(["data"])
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path / "outputs"))
    with pytest.raises(LVMError, match="a file stands where a folder should"):
        launcher.main(["render", "data", str(tmp_path / "file" / "out.ipynb")])
    (left,) = (tmp_path / "outputs").iterdir()
    assert left.name.startswith("data.")  # what was executed is not lost
    monkeypatch.setattr(runner.stamp, "stamp", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(LVMError, match="disk is full"):
        launcher.main(["data"])


def test_papermills_kernel_has_sockets_and_a_history_of_its_own(tmp_path):
    """By no port: Jupyter's choice of ports can be taken by the kernel of a command beside this."""
    cell = nbformat.v4.new_code_cell(
        "import os\nfrom ipykernel.connect import get_connection_info\n"
        "print(get_connection_info(unpack=True)['transport'], os.environ['IPYTHONDIR'])"
    )
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "small.ipynb")
    paths = [str(tmp_path / name) for name in ("small.ipynb", "out.ipynb")]
    done = runner._papermill([*paths, "-k", "python3"])
    assert done.returncode == 0, done.stderr
    said = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[0].outputs[0]["text"].split()
    assert said[0] == "ipc" and said[1] != os.environ.get("IPYTHONDIR") and not Path(said[1]).exists()


def lies_there(folder: Path, name: str, *injected: str) -> tuple[Path, Path]:
    """A notebook with the parameters of notebooks/NAME, and those injected; and its place."""
    known = runner.parameters(json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8")))
    defaults = "\n".join(f"{key} = {value!r}" for key, value in known.items())
    return executed(folder / f"{len(injected[0])}{name}", defaults, *injected), folder / name


@pytest.mark.parametrize("name, by_hand, by_sweep", [
    ("train.ipynb", "", 'version = "v22"\nmodel = "transformer"\nseed = 0'),
    ("train.ipynb", "", 'data = "wikipedia"\nprecision = "float32"'),  # another precision would have been refused
    ("train.ipynb", "devices = 2", "epochs = 12"),
    ("data.ipynb", "", "data = 'wikipedia'"),
])  # fmt: skip
def test_a_notebook_of_the_same_run_is_not_set_aside(tmp_path, name, by_hand, by_sweep):
    earlier, place = lies_there(tmp_path, name, by_sweep)
    earlier.rename(place)
    assert keep(lies_there(tmp_path, name, by_hand)[0], place)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".html", ".ipynb"]


@pytest.mark.parametrize("name, there", [
    ("train.ipynb", "seed = 1"), ("train.ipynb", "overrides = {'optimizer': {'lr': 1.0e-3}}"),
    ("data.ipynb", "steps = 0"), ("train.ipynb", "version = 'nonesuch'"), ("train.ipynb", "x.y = 1"),
    ("train.ipynb", None),
])  # fmt: skip
def test_a_notebook_of_another_run_and_a_damaged_one_are_set_aside(tmp_path, capsys, name, there):
    earlier, place = lies_there(tmp_path, name, there or "")
    earlier.rename(place)
    if there is None:
        place.write_bytes(b"[" * 100_000)
    before = place.read_bytes()
    assert keep(lies_there(tmp_path, name, "")[0], place) is None
    assert place.with_suffix(".old-1.ipynb").read_bytes() == before and "set aside  " in capsys.readouterr().out


def test_a_run_that_is_only_opened_is_as_old_as_it_was(outputs, trained):
    """By hand after a sweep, or the other way round: what a sweep made of the run stays newer than the run."""
    notebook = outputs / "fast" / "wikipedia" / "v21" / "seed0-amn" / "train.ipynb"
    before, told = notebook.stat(), notebook.read_bytes()
    done = call(outputs, "lvmlib", "train", "-p", "version", "v21", *ARGUMENTS, "-p", "seed", "0")
    assert done.returncode == 0 and "set aside" not in done.stdout, done.stderr
    assert notebook.stat().st_mtime_ns == before.st_mtime_ns and notebook.read_bytes() != told
    assert not list(notebook.parent.glob("*.old-*"))
