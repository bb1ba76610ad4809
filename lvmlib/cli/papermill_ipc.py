"""papermill's own command, with a kernel that speaks through sockets in the folder JUPYTER_RUNTIME_DIR.

Jupyter picks free TCP ports and closes them before the kernel opens them again: the kernel of another command may take
them in between. Run as a file, not as a module of lvmlib, whose import takes seconds.
"""

import json
import os
import sys

sys.modules["rfc3987_syntax"] = None  # jsonschema's optional grammar of addresses, which takes seconds to build

from papermill.cli import papermill  # noqa: E402
from papermill.engines import NBClientEngine, papermill_engines  # noqa: E402
from traitlets.config import Config  # noqa: E402

DISK_CODE = 74  # as execute.py has it


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
        papermill(prog_name="papermill")
    except OSError as e:
        print(json.dumps([e.errno, e.strerror or str(e), e.filename]), file=sys.stderr)
        sys.exit(DISK_CODE)
