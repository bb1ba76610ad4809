"""`python -m lvmlib`: the commands behind the Makefile."""

from .cli.commands import run

if __name__ == "__main__":
    run()
