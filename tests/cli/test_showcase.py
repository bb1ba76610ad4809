"""workflow/showcase.sh, without its hours: what it would run, and what it does when something fails or ends it."""

import os
import shlex
import signal
import subprocess

import pytest
from toys import alive, until

from lvmlib.cli.execute import check_options
from lvmlib.io.paths import ROOT

SHOWN = ROOT / "outputs" / "showcase"
# Their vectors are not ours to share.
NOT_OURS = {
    "data-english-sentences",
    "compare-english-and-manuals",
    *(f"compare-english-{cut}" for cut in ("random", "again", "topic", "margin")),
    *(f"compare-manuals-{cut}" for cut in ("random", "essays")),
}
PYTHON = """#!/bin/bash
# In place of the environment's Python: says what it was asked, and makes what is copied from a run.
if [ "$1" = -c ]; then exec {python} "$@"; fi
printf '%s\\n' "$(printf '%q ' "${{@:3}}")" >> {log}
echo "$OMP_NUM_THREADS" >> {log}.threads
{then}
"""


@pytest.fixture
def script(tmp_path):
    """A checkout that holds the script alone, and its Python, which runs nothing."""
    (tmp_path / "workflow").mkdir()
    (tmp_path / "workflow" / "showcase.sh").write_bytes((ROOT / "workflow" / "showcase.sh").read_bytes())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "outputs" / "showcase").mkdir(parents=True)

    def start(then="", **environment):
        python = tmp_path / ".venv" / "bin" / "python"
        real = f"env PYTHONPATH={shlex.quote(str(ROOT))} {shlex.quote(os.sys.executable)}"
        python.write_text(PYTHON.format(python=real, log=tmp_path / "log", then=then), encoding="utf-8")
        python.chmod(0o755)
        command = ["bash", str(tmp_path / "workflow" / "showcase.sh")]
        return subprocess.Popen(command, env=os.environ | environment, text=True, stderr=subprocess.PIPE,
                                start_new_session=True)  # fmt: skip

    return start


MADE = """
run=seed0 version= model=
while [ $# -gt 0 ]; do
    case "$1 $2" in
        "-p version") version=$3 ;;
        "-p model") model=$3 ;;
        "-p seed") run=seed$3 ;;
    esac
    shift
done
case "$model" in ""|transformer) ;; *) run=$run-$model ;; esac
mkdir -p "$LVM_OUTPUTS/wikipedia/$version/$run" "$LVM_OUTPUTS/showcase"
touch "$LVM_OUTPUTS/wikipedia/$version/$run/train.ipynb" "$LVM_OUTPUTS"/showcase/versions.{csv,png}
"""


def logged(tmp_path):
    return [shlex.split(line) for line in (tmp_path / "log").read_text(encoding="utf-8").splitlines()]


def test_it_makes_every_committed_notebook_by_parameters_that_there_are(script, tmp_path):
    running = script(MADE, LVM_FAST="1", OMP_NUM_THREADS="7")
    assert running.wait(timeout=300) == 0, running.stderr.read()
    lines = logged(tmp_path)
    runs = [line[1:] for line in lines if line[0] == "train"]
    pages = [line[1:] for line in lines if line[0] == "render"]
    assert len(runs) > 40 and len(set(map(tuple, runs))) == len(runs)
    for run in runs:
        check_options("train", run)
    for notebook, _, *parameters in pages:
        check_options(notebook.removeprefix("notebooks/").removesuffix(".ipynb"), parameters)
    made = {page.split("/")[-1] for _, page, *_ in pages} | {p.name for p in (tmp_path / "outputs/showcase").iterdir()}
    assert made == {p.name for p in SHOWN.iterdir() if p.stem not in NOT_OURS}
    assert lines[-1] == ["table"] and lines[-2][1] == "notebooks/benchmark.ipynb"
    threads = (tmp_path / "log.threads").read_text(encoding="utf-8").splitlines()
    assert "7" not in threads and threads[-4:] == [""] * 4  # what measures has the machine's own number


def test_a_command_that_fails_is_named_stops_no_other_of_its_kind_and_is_tried_again(script, tmp_path):
    running = script('case "$*" in *"v1 -p model amn"*) exit 3 ;; esac' + MADE)
    _, errors = running.communicate(timeout=300)
    before = logged(tmp_path)
    assert running.returncode == 123 and "FAILED: train -p version v1 -p model amn -p seed 0" in errors
    assert any("backward" in line and "v22" in line for line in before)
    assert not any("transformer" in line for line in before)  # nothing that comes after these
    (tmp_path / "log").unlink()
    made = 'if [ "$3" = render ]; then touch "$5"; fi\n' + MADE
    assert script(made).wait(timeout=300) == 0
    after = logged(tmp_path)
    assert [line for line in before if line in after] == [line for line in before if "v1" in line]
    (tmp_path / "log").unlink()
    (tmp_path / "outputs" / "showcase" / "controls.ipynb").unlink()  # a page that is not there is made anew
    assert script(made).wait(timeout=300) == 0
    assert [line[:2] for line in logged(tmp_path)] == [["render", "notebooks/controls.ipynb"], ["table"]]


def test_terminated_it_ends_all_that_it_started(script, tmp_path):
    running = script(f"echo $$ >> {tmp_path}/started; exec sleep 1000")
    until((tmp_path / "started").exists, running, seconds=60)
    os.kill(running.pid, signal.SIGTERM)
    running.wait(timeout=60)
    for pid in map(int, (tmp_path / "started").read_text(encoding="utf-8").split()):
        until(lambda pid=pid: not alive(pid), seconds=60)
