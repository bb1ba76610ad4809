"""The names that papermill injects: it only warns of an unknown one, and a mistyped name would do nothing."""

import pytest

from lvmlib.cli.parameters import check_injected
from lvmlib.errors import LVMError

PARAMETERS = 'version = "v22"  # a version\nepochs = None\nseed = 0\noverrides = {}\n'


def test_known_injected_names_pass():
    check_injected(["", PARAMETERS])  # by hand: nothing injected
    check_injected(["", PARAMETERS, "import lvmlib"])
    check_injected(["", PARAMETERS, '# Parameters\nversion = "v21"\noverrides = {"optimizer": {"lr": 0.1}}\n', "x = 1"])


@pytest.mark.parametrize(
    "injected, name, near",
    [
        ('# Parameters\nverison = "v21"\n', "verison", "version"),
        ('# Parameters\nversion = "v21"\nepoch = 3\n', "epoch", "epochs"),
        ("# Parameters\nbogus_name_xyz = 3\n", "bogus_name_xyz", None),
        ("# Parameters\nresult = 3\n", "result", None),  # assigned later, but no parameter
    ],
)
def test_an_unknown_injected_name_is_refused(injected, name, near):
    with pytest.raises(LVMError) as caught:
        check_injected(["", PARAMETERS, injected, "result = 1"])
    message = str(caught.value)
    assert all(word in message for word in (repr(name), "epochs", "overrides", "seed", "version"))
    assert (f"did you mean {near!r}" in message) if near else ("did you mean" not in message)
