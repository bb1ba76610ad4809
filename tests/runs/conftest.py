"""What the tests of runs have in common: the dataset, one thread, short waits for locks, one commit."""

import pytest
import torch
from toys import make_data

from lvmlib.runs import folder as runs


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """A forked child cannot use the threads of its parent; whoever edits meanwhile changes no record."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "WAIT", 0.3)
        patch.setattr(runs, "commit", lambda: "a commit")
        yield
    torch.set_num_threads(count)


@pytest.fixture(scope="session")
def data():
    return make_data()
