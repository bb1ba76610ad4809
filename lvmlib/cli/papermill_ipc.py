"""papermill's own command, with a kernel that speaks through sockets in the folder JUPYTER_RUNTIME_DIR.

Jupyter picks free TCP ports and closes them before the kernel opens them again: the kernel of another command may take
them in between. An error of the disk ends it with one line.
"""

import os
import sys
from pathlib import Path

from papermill.cli import papermill
from papermill.engines import NBClientEngine, papermill_engines
from traitlets.config import Config

from ..errors import LVMError
from ..io.disk import explain_os_errors
from .execute import RESUMABLE


class IPCEngine(NBClientEngine):
    """papermill's engine with the kernel's transport set."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **kwargs):
        place = os.path.join(os.environ["JUPYTER_RUNTIME_DIR"], "kernel.json")
        config = Config(KernelManager={"transport": "ipc", "connection_file": place})
        return super().execute_managed_notebook(nb_man, kernel_name, config=config, **kwargs)


if __name__ == "__main__":
    papermill_engines.register(None, IPCEngine)  # the default engine
    try:
        with explain_os_errors(Path(os.environ["JUPYTER_RUNTIME_DIR"]), RESUMABLE):
            papermill(prog_name="papermill")
    except LVMError as e:
        sys.exit(f"LVMError: {e}")
