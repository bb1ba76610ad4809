"""Latent Vector Models: training the P6b family and judging it by 5CAT. The notebooks are the program."""

from .attempts import p7, p8  # noqa: F401  (registers them)
from .baselines import baselines
from .cli.parameters import check_injected
from .config import changes, known_versions, version, watched
from .data.open import dataset
from .errors import LVMError
from .evaluate import validate
from .judge.arrow import arrow
from .judge.fivecat import fivecat
from .judge.rating import checklist, comparison, reading, verdict
from .runs.folder import open_run, run_folder
from .runs.run import train
from .share.export import export, load

__all__ = [
    "LVMError", "arrow", "baselines", "changes", "check_injected", "checklist", "comparison", "dataset",
    "export", "fivecat", "known_versions", "load", "open_run", "reading", "run_folder", "train", "validate",
    "verdict", "version", "watched",
]  # fmt: skip
