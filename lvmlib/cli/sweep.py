"""Plan and run a sweep: versions × seeds × datasets × models of one configuration, behind workflow/Snakefile.

Runs lie where runs by hand do: a sweep reuses what `make train` has finished, and the other way round.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from pydantic import BeforeValidator, Field, TypeAdapter

from ..config import Version, merge, version
from ..data.open import dataset
from ..errors import LVMError, format_error
from ..io import limits, stamp
from ..io.disk import explain_os_errors, lock, set_aside
from ..io.paths import outputs
from ..io.strict import Count, Flag, Group, Whole, group, validate
from ..runs.folder import dataset_record, differences, open_run, run_folder
from .execute import execute, move

# From the command line it may be names with a space between.
Names = Annotated[
    tuple[Any, ...], BeforeValidator(lambda x: x.split() if isinstance(x, str) else x), Field(min_length=1)
]


@group
class Settings(Group):
    """The keys of workflow/sweep.yaml, which says what each means."""

    versions: Names
    seeds: Count = 1
    datasets: Names = (None,)
    models: Names = ("transformer",)
    epochs: Any = None  # this, precision and overrides are checked as those of a version
    precision: Any = None
    fast: Flag = False
    overrides: Any = None
    threads: Count = 1
    gpus: Annotated[Whole, Field(ge=0)] = 0


class Comparison(NamedTuple):
    """A page of compare.ipynb."""

    parameters: dict[str, Any]  # but `versions`: those of which a run has finished
    runs: dict[str, str]  # the folder of each run, and its version


class Sweep(NamedTuple):
    """What is to be run; paths are absolute."""

    runs: dict[str, dict[str, Any]]  # the folder of each run, and its notebooks' parameters
    comparisons: dict[str, Comparison]  # the path of each executed compare.ipynb
    threads: int  # of a job
    gpus: int  # of a job


def plan(config: Mapping[str, Any]) -> Sweep:
    """Return all runs and comparisons of a configuration, whose keys are those of workflow/sweep.yaml.

    A version that names an architecture of its own keeps it, as in compare.ipynb. Raises LVMError for an unknown key,
    version, dataset or model, for an impossible value, and for a run that is done, but with other parameters.
    """
    c = validate(TypeAdapter(Settings), _typed(config), "sweep")
    given = {key: x for key in ("epochs", "precision", "overrides") if (x := getattr(c, key)) not in (None, {})}
    if c.fast or os.environ.get("LVM_FAST") == "1":
        given["fast"] = True

    runs: dict[str, dict[str, Any]] = {}
    comparisons: dict[str, Comparison] = {}
    for data, model, name in itertools.product(c.datasets, c.models, c.versions):
        # A version that has another model than base.yaml, as p6 has it, has named it.
        named = version(name).model != version("p6").model
        chosen = given | ({} if data is None else {"data": data}) | ({} if named else {"model": model})
        for seed in range(c.seeds):
            own = version(name, seed=seed, **chosen)
            if not seed:
                record = dataset_record(dataset(own.data, own.horizon, own.context_length, own.fast, own.direction))
            folder = run_folder(own).absolute()
            _refuse_another(folder, own, record)
            parameters = {"version": name, "seed": seed, **chosen}
            if runs.setdefault(str(folder), parameters) != parameters:
                raise LVMError(
                    f"sweep: {parameters} and {runs[str(folder)]} would both be {folder}; name datasets apart by "
                    "the last part of their paths"
                )
            page = folder.parents[1] / f"compare-{model}.ipynb"
            about = {"data": own.to_dict()["data"], "model": model, "seeds": c.seeds, **given}
            if "epochs" in about:  # compare.ipynb has no parameter of that name
                about["overrides"] = {**about.get("overrides", {}), "epochs": about.pop("epochs")}
            comparisons.setdefault(str(page), Comparison(about, {})).runs[str(folder)] = name
    return Sweep(runs, comparisons, c.threads, c.gpus)


def training_parameters(planned: Sweep, folder: str) -> dict[str, Any]:
    """Return the parameters of the run's train.ipynb, the only notebook that uses several GPUs."""
    return planned.runs[folder] | ({"devices": planned.gpus} if planned.gpus > 1 else {})


def finished_notebooks(comparison: Comparison) -> list[str]:
    """Return the executed train.ipynb of each of its runs that has finished."""
    paths = (Path(folder) / "train.ipynb" for folder in comparison.runs)
    return [str(path) for path in paths if path.exists()]


def comparison_parameters(comparison: Comparison) -> dict[str, Any]:
    """Return the parameters of compare.ipynb over the runs that have finished."""
    names = dict.fromkeys(comparison.runs[str(Path(path).parent)] for path in finished_notebooks(comparison))
    return comparison.parameters | {"versions": " ".join(names)}


def lock_outputs() -> None:
    """Make this process the one sweep of the outputs folder until it ends. Raises LVMError if another runs there."""
    refused = "{}: another sweep is running there, {}; wait for it, or stop it"
    own = contextlib.ExitStack()
    own.enter_context(lock(outputs() / "sweep.lock", lambda holder: refused.format(outputs(), holder)))
    atexit.register(own.close)


def set_aside_other_pages(planned: Sweep) -> None:
    """Set aside each existing comparison that has versions, seeds or other parameters that the new one will not have.

    Snakemake deletes what it makes anew: a smaller sweep would replace the page of a larger one.
    """
    for path, comparison in planned.comparisons.items():
        page, due = Path(path), comparison_parameters(comparison)
        if not page.exists() or not finished_notebooks(comparison):
            continue
        earlier = stamp.given(page)
        seeds = earlier.get("seeds")
        extends = type(seeds) is int and seeds <= due["seeds"]
        extends &= set(str(earlier.get("versions")).split()) <= set(due["versions"].split())
        if not extends or earlier != {**due, "versions": earlier["versions"], "seeds": seeds}:
            print(f"{page}: of another sweep; set aside as {set_aside(page).name}")


def job(notebook: str, output: Path, values: Mapping[str, Any], gpus: int) -> None:
    """Execute one notebook of the sweep with these parameters into `output`, on that many GPUs (0: any).

    Where it fails, OUTPUT's stem + .partial.ipynb holds what has been executed, with the error.
    """
    partial = output.with_suffix(".partial.ipynb")
    # A sweep that was killed may have left a job alive, on another machine, say: two must not train in one folder.
    with lock(output.with_name(f"{output.name}.lock"), str, wait=math.inf):
        if output.exists():
            print(f"{output}: another job has made it")
            return
        locks = reserve_gpus(gpus)
        text = base64.b64encode(json.dumps(values).encode()).decode()
        with execute(notebook, ["-b", text], partial) as (path, _):
            move(path, output)
        partial.unlink(missing_ok=True)
        for gpu in locks:
            gpu.release()


def reserve_gpus(wanted: int) -> list[FileLock]:
    """Restrict this process to `wanted` GPUs that no other job on this machine uses; wait for them. Returns the locks.

    If a scheduler shows no more than are wanted, they are taken as they are.
    """
    if not wanted:
        return []
    every = ",".join(map(str, range(torch.cuda.device_count())))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    if len(visible) <= wanted:
        return []
    while True:
        locks, refused = {}, []
        for gpu in visible:
            path = Path(tempfile.gettempdir()) / f"lvm-gpu-{gpu}.lock"  # a folder that other users write to as well
            gpu_lock = FileLock(path, timeout=0, mode=0o666, fallback_to_soft=False)
            try:
                with explain_os_errors(path):
                    gpu_lock.acquire()
            except Timeout:  # another job has it
                continue
            except LVMError as e:  # a file of another user
                refused.append(e)
                continue
            locks[gpu] = gpu_lock
            if len(locks) == wanted:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(locks)
                return list(locks.values())
        if len(visible) - len(refused) < wanted:
            raise refused[-1]
        for gpu_lock in locks.values():
            gpu_lock.release()
        time.sleep(1 + os.getpid() % 7)  # not all at the same time


def read_settings(file: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration in `file`, changed by what the command line gave. Raises LVMError.

    Snakemake's own reader would run the Python in a file that asks it to (`__use_yte__`).
    """
    try:
        content = limits.read_yaml(file)
    except (OSError, ValueError) as e:
        raise LVMError(f"{file}: cannot be read ({format_error(e)}); restore the file") from e
    if not isinstance(content, dict):
        raise LVMError(f"{file}: holds no `key: value`; restore the file")
    return merge(content, given)


def _refuse_another(folder: Path, own: Version, data: dict) -> None:
    """Raise LVMError if the folder's train.ipynb is of a run that is not `own`: it would pass for finished."""
    if not (folder / "train.ipynb").exists():
        return
    record = open_run(folder)[0]
    precision = record["computed"].get("precision") if own.precision == "auto" else own.precision
    ours = {"parameters": own.to_dict(), "dataset": data, "computed": {"precision": precision}}
    if differing := differences(ours, record):
        raise LVMError(
            f"sweep: {folder} holds a run with other parameters or data ({'; '.join(differing)}); move that folder "
            "away, or name another for all by LVM_OUTPUTS"
        )


def _typed(value: Any) -> Any:
    """Return a value with its leaves as JSON: `snakemake --config` leaves true, null and nested numbers as text."""
    if isinstance(value, Mapping):
        return {key: _typed(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_typed(x) for x in value]
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
