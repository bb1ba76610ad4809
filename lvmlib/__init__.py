"""Latent Vector Models: training the P6b family and judging it by 5CAT. The notebooks are the program."""

from .arrow import arrow
from .errors import LVMError
from .export import export, load
from .fivecat import fivecat
from .models import baselines
from .params import changes, check_injected, known_versions, version, watched
from .runs import open_run, run_folder
from .training import train, validate
from .vectors import dataset
from .verdict import checklist, comparison, reading, verdict

__all__ = [
    "LVMError",
    "arrow",
    "baselines",
    "changes",
    "check_injected",
    "checklist",
    "comparison",
    "dataset",
    "export",
    "fivecat",
    "known_versions",
    "load",
    "open_run",
    "reading",
    "run_folder",
    "train",
    "validate",
    "verdict",
    "version",
    "watched",
]
