"""The wheel carries params/ and notebooks/ of the checkout inside the package; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithParams(build_py):
    """Copy the folders to lvmlib/shipped, where io/paths.py finds them when there is no checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for folder, kind in (("params", "*.yaml"), ("notebooks", "*.ipynb")):
                target = Path(self.build_lib) / "lvmlib" / "shipped" / folder
                target.mkdir(parents=True, exist_ok=True)
                for path in sorted(Path(__file__).parent.joinpath(folder).glob(kind)):
                    shutil.copyfile(path, target / path.name)


setup(cmdclass={"build_py": BuildWithParams})
