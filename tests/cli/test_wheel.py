"""An installed wheel works from any folder, without the checkout."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from lvmlib.io.paths import ROOT

TRAIN = """
import lvmlib as lvm
own = lvm.version("p6", model="amn", fast=True)
run = lvm.train(own, lvm.dataset(own.data, fast=True))
print(lvm.__file__, len(list(run)), run.folder, run.record["software"]["commit"] == "")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory beside an environment that has the wheel, and the packages of this one without lvmlib's."""
    pytest.importorskip("setuptools", minversion="77")
    top = tmp_path_factory.mktemp("wheel")
    source, environment = top / "source", top / "environment"
    source.mkdir()
    for name in ("lvmlib", "params", "notebooks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(top), str(source)], check=True)
    shutil.rmtree(source)
    venv.create(environment)
    own = environment / "bin" / "python"
    (wheel,) = top.glob("*.whl")
    subprocess.run([*pip, "--python", str(own), "install", "--no-deps", str(wheel)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    paths = [p for p in sys.path if "site-packages" in p or "dist-packages" in p]
    (packages / "borrowed.pth").write_text("\n".join(paths), encoding="utf-8")
    (top / "anywhere").mkdir()
    return top / "anywhere"


def call(place: Path, *command: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LVM_OUTPUTS", "LVM_FAST")}
    environment |= {"JUPYTER_DATA_DIR": str(place / "jupyter")}
    program = place.parent / "environment" / "bin" / command[0]
    done = subprocess.run([program, *command[1:]], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout


def test_it_trains_from_python(place):
    file, epochs, folder, no_commit = call(place, "python", "-c", TRAIN).split()
    assert Path(file).is_relative_to(place.parent / "environment") and (epochs, no_commit) == ("2", "True")
    assert Path(folder).is_relative_to(place / "outputs" / "fast") and (Path(folder) / "best.safetensors").exists()


def test_its_commands_run(place):
    """It opens and judges the run that the test above has trained."""
    call(place, "lvmlib", "train", "-p", "version", "p6", "-p", "fast", "True", "-p", "model", "amn")
    (notebook,) = (place / "outputs").rglob("train.ipynb")
    assert '"input_path": "notebooks/train.ipynb"' in notebook.read_text(encoding="utf-8")
    assert notebook.with_suffix(".html").exists() and notebook.with_name("fivecat.json").exists()
