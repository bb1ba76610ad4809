# ruff: noqa: E501  (a row is a line)
"""The lock of all packages, and the audit of what it lists."""

import os
import re
from pathlib import Path

import lock
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lvmlib.io.paths import ROOT

LINES = [line for line in lock.LOCK.read_text().splitlines() if not line.startswith("#")]
LOCKED = dict(line.partition(";")[0].strip().split("==") for line in LINES)


def test_the_lock_names_no_host_no_path_and_not_torch():
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; python_version [\w.<>=\" ]+)?", line) for line in LINES)
    assert list(LOCKED) == sorted(LOCKED) and not LOCKED.keys() & set(lock.FREE)


def test_the_lock_holds_all_that_is_asked_for_and_installed():
    found, missing = lock.reached()
    assert (found.keys() | missing) - set(lock.FREE) <= LOCKED.keys()
    for requirement in lock.asked():
        name = canonicalize_name(requirement.name)
        assert name in lock.FREE or requirement.specifier.contains(LOCKED[name]), requirement
    other = {n: d.version for n, d in found.items() if n not in lock.FREE and d.version != LOCKED[n]}
    assert not (other and os.environ.get("LVM_LOCKED")), other  # as `make test` says where it installed by the lock
    if other:
        pytest.skip(f"this environment was not made by make, or before the lock: {other}")


def test_every_install_of_the_makefile_uses_the_lock():
    text = (ROOT / "Makefile").read_text()
    assert "LVM_LOCKED=$(if $(LOCK),1)" in text
    assert text.count("pip install") == 1 and "LOCK ?= --constraint constraints.txt" in text
    assert "pip install --quiet $(LOCK) --editable" in text and text.count("$(INSTALL)") >= 5


@pytest.mark.parametrize(
    "answer, code, words",
    [
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', 0, "audited: 1 packages, 0 advisories"),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]}]}', 1, "a 1: X-1, mended in 2"),
        ('{"dependencies": [{"name": "a", "skip_reason": "not found"}]}', 0, "NOT AUDITED: .*not found"),
        ("", 0, "NOT AUDITED: .*no network"),
        (None, 0, "NOT AUDITED: .*no answer"),
    ],
)  # fmt: skip
def test_the_audit_fails_on_advisories_and_says_where_it_was_not_made(answer, code, words, monkeypatch, capsys):
    def run(command, **options):
        if answer is None:
            raise lock.subprocess.TimeoutExpired(command, 1)
        assert "torch==" in Path(command[-1]).read_text()
        return lock.subprocess.CompletedProcess(command, 0, answer, "no network")

    monkeypatch.setattr(lock.subprocess, "run", run)
    assert lock.audit() == code
    said = capsys.readouterr()
    assert re.search(words, said.out + said.err)


def test_a_version_that_not_every_python_takes_gets_a_marker():
    class Distribution:
        version, metadata = "2", {"Requires-Python": ">=3.12"}

    marked = Requirement(lock.line("a", Distribution))
    assert marked.marker.evaluate({"python_version": "3.13"}) and not marked.marker.evaluate({"python_version": "3.11"})
