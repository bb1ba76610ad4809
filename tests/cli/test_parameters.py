"""The names that papermill injects: it only warns of an unknown one, and a mistyped name would do nothing."""

import pytest

from lvmlib.cli.parameters import check_injected
from lvmlib.errors import LVMError

PARAMETERS = 'version = "v22"  # a version\nepochs = None\nseed = 0\noverrides = {}\n'


@pytest.mark.parametrize("cells", [
    [], ["import lvmlib"], ['# Parameters\nversion = "v21"\noverrides = {"optimizer": {"lr": 0.1}}\n', "x = 1"]
])  # fmt: skip
def test_known_injected_names_pass(cells):
    check_injected(["", PARAMETERS, *cells])


@pytest.mark.parametrize("injected, name, near", [
    ('version = "v21"\nverison = "v21"', "verison", "version"),
    ("bogus_name_xyz = 3", "bogus_name_xyz", None),
    ("result = 3", "result", None),  # assigned later, but no parameter
])  # fmt: skip
def test_an_unknown_injected_name_is_refused(injected, name, near):
    with pytest.raises(LVMError) as caught:
        check_injected(["", PARAMETERS, f"# Parameters\n{injected}\n", "result = 1"])
    message = str(caught.value)
    assert all(word in message for word in (repr(name), "epochs", "overrides", "seed", "version"))
    assert (f"did you mean {near!r}" in message) is bool(near)
