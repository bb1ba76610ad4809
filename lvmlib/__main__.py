"""`python -m lvmlib`: the commands behind the Makefile."""

import sys

sys.modules["rfc3987_syntax"] = None  # jsonschema's optional grammar of addresses, which takes seconds to build

from .cli.commands import run  # noqa: E402

if __name__ == "__main__":
    run()
