"""Fixtures of a store on disk, and of its full checks."""

import pytest
from stores import age, random_store

from lvmlib.data import checks as C
from lvmlib.data import store as V


@pytest.fixture
def folder(tmp_path):
    return V.write_store(random_store(11, gaps=False), tmp_path / "s")


@pytest.fixture
def checks(monkeypatch):
    """The full checks that are done from now on."""
    done, check = [], C.check_vectors
    monkeypatch.setattr(V, "check_vectors", lambda *args: (done.append(args[1]), check(*args)))
    return done


@pytest.fixture
def known(folder, checks):
    """A store folder whose check is remembered."""
    age(folder)
    V.open_store(folder)
    assert (folder / V.CHECKED).is_file()
    checks.clear()
    return folder
