"""A trained model as a folder that others can open, and as a repository of the Hugging Face hub.

    model.safetensors   the best checkpoint's weights, float32: names, shapes and numbers, no code
    config.json         the fields of `Config`
    README.md           the model card (see `card`)

A folder may come from a stranger. No pickle is read, nothing in config.json is used as a path, and the weights must
have the names, type and shapes that config.json implies before any memory is allocated for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import stat
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import AfterValidator, Field, TypeAdapter
from torch import Tensor

from .. import models
from ..data.store import writing
from ..device import pick_device
from ..errors import LVMError, format_error, require
from ..io.limits import read_json
from ..io.strict import Count, Group, Text, Whole, group, validate
from ..judge.fivecat import Report
from ..judge.rating import reading, verdict
from ..report.summary import read_report
from ..runs.run import Run
from ..windows import DIRECTIONS
from .card import card, one_line

WEIGHTS, CONFIG, CARD = FILES = ("model.safetensors", "config.json", "README.md")
HUB = "hub:"  # before OWNER/NAME: without it, a mistyped folder would ask the network
LARGEST_DIM = 65_536
CONFIG_BYTES = 65_536
NOT_IN_NAMES = set('/\\*?"<>|`[]$')
ADVICE = "export the model again, or restore the file"
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError)  # what it raises


def _check_text(text: str) -> str:
    if not text.isprintable():
        raise ValueError("is not one line of printable characters")
    return text


def _check_name(name: str) -> str:
    """Names are shown, and somebody may make a path of them."""
    if not name or name.startswith(".") or set(name) & NOT_IN_NAMES:
        raise ValueError("is not a plain name")
    return name


Line = Annotated[Text, Field(max_length=500), AfterValidator(_check_text)]
Name = Annotated[Line, AfterValidator(_check_name)]


@group
class Config(Group):
    """The content of config.json: how to build the model, what it reads, where it comes from."""

    model: Literal[*models.ARCHITECTURES]
    dim: Annotated[Count, Field(le=LARGEST_DIM)]  # of the vectors
    context_length: Annotated[Count, Field(le=1024)]
    horizon: Annotated[Count, Field(le=1_000_000)]  # the target chunk is this many after the context
    direction: Literal[*DIRECTIONS]
    dataset: Name
    fingerprint: Line  # of the dataset's store
    encoder: Line  # of the vectors; empty if the datasheet names none
    version: Name
    seed: Annotated[Whole, Field(ge=0)]
    precision: Literal["float32", "bfloat16"]  # of the training; the weights are float32
    lvmlib: Line  # the version that exported it


def export(run: Run, folder: str | os.PathLike, report: Report | None = None) -> Path:
    """Write the best checkpoint of a finished run as a folder, whole or not at all. Returns its path.

    `report`: the calibrated 5CAT of this model for the card; default: the run's fivecat.json, if there is one. Raises
    LVMError if `folder` exists, and if the run or the report is unfinished, damaged, or of another model.
    """
    if not run.finished:
        raise LVMError(f"{run.folder}: this run is not finished; finish its training, then export it")
    model, store, version = run.best, run.data.store, run.version
    name = "".join("-" if c in NOT_IN_NAMES else c for c in one_line(store.name)).lstrip(".")
    config = Config(
        dim=model.dim,
        dataset=name or "dataset",
        fingerprint=store.fingerprint,
        encoder=one_line(store.datasheet.get("encoder", "")),
        version=version.name,
        precision=run.record["computed"]["precision"],
        lvmlib=metadata.version("lvmlib"),
        **{key: getattr(version, key) for key in ("model", "context_length", "horizon", "direction", "seed")},
    )
    with _naming(run.folder / "fivecat.json", "run train.ipynb again, or give `report`"):
        text = card(config, run.record["dataset"]["windows"], _report_content(run, report), version.fast)
    with writing(folder) as partial:
        weights = {key: tensor.cpu().contiguous() for key, tensor in model.state_dict().items()}
        safetensors.torch.save_file(weights, partial / WEIGHTS)
        (partial / WEIGHTS).chmod(0o644)  # safetensors makes it readable by its owner only
        content = json.dumps(dataclasses.asdict(config), indent=1, ensure_ascii=False)
        (partial / CONFIG).write_text(content + "\n", encoding="utf-8")
        (partial / CARD).write_text(text, encoding="utf-8")
        _open(partial)  # finds now what would be wrong for whoever opens it
    return Path(folder)


def load(where: str | os.PathLike, device: str = "auto", revision: str | None = None) -> models.Predictor:
    """Return the model of an exported folder, or of `hub:OWNER/NAME` (`revision`: its branch, tag or commit).

    A Predictor in eval mode, float32, on `device`: `raw, unit = model(context)` for a context (B, T, D) of unit
    vectors, oldest first; `model.config` has the rest. Raises LVMError, with the file's name, for what is missing,
    damaged or hostile.
    """
    device = pick_device(device)
    name = os.fspath(where)
    if name.startswith(HUB):
        with _hub(name.removeprefix(HUB)) as hub:
            files = hub.snapshot_download(name.removeprefix(HUB), revision=revision, allow_patterns=list(FILES))
        # CACHE/models--OWNER--NAME/snapshots/COMMIT/ has links to files elsewhere in the cache, and no farther
        return _open(Path(files), inside=Path(files).parents[2]).to(device)
    if not Path(where).is_dir():
        hint = f" (a model of the hub is {HUB}{name})" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
        raise LVMError(f"{name}: no such folder{hint}; `export` makes one from a run")
    return _open(Path(where)).to(device)


def push(folder: str | os.PathLike, name: str, private: bool = True) -> str:
    """Upload an exported folder to the hub as OWNER/NAME, which is created if new. Returns the commit's address.

    Sign in with `hf auth login` before. Only the folder's three files are sent, after all checks of `load`. Raises
    LVMError for a folder that cannot be opened, and with the hub's words if it refuses or cannot be reached.
    """
    folder = Path(folder)
    with _hub(name) as hub:
        config = _open(folder).config
        hub.ModelCard.load(_regular(folder / CARD, folder))  # raises if the hub could not read the card's head
        hub.HfApi().create_repo(name, private=private, exist_ok=True)
        message = f"{config.version}, {config.model}, seed {config.seed}"
        files = {"folder_path": folder, "allow_patterns": list(FILES)}
        return hub.HfApi().upload_folder(repo_id=name, commit_message=message, **files).commit_url


@contextlib.contextmanager
def _hub(name: str) -> Iterator[Any]:
    """Give the hub's client for OWNER/NAME; its errors become LVMErrors.

    The name has to be plain: it becomes part of an address, and of a path in the hub's cache.
    """
    plain = re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name, re.ASCII)
    if not plain or ".." in name:
        raise LVMError(f"{HUB}{name}: not the name of a model of the hub; write {HUB}OWNER/NAME")
    with _naming(f"{HUB}{name}", "sign in, or check name and network", Exception):
        yield require("huggingface_hub", "export")


@contextlib.contextmanager
def _naming(where: Any, advice: str = ADVICE, errors: Any = DAMAGE) -> Iterator[None]:
    """Turn these errors into an LVMError that names the file; an LVMError passes."""
    try:
        yield
    except LVMError:
        raise
    except errors as e:
        why = str(e) if type(e) is ValueError else format_error(e)
        raise LVMError(f"{where}: {why}; {advice}") from e


def _open(folder: Path, inside: Path | None = None) -> models.Predictor:
    """Return the model of a folder. Its files, links followed, must be in `inside` (default: the folder itself)."""
    path = _regular(folder / CONFIG, inside or folder)
    with _naming(path):
        config = validate(TypeAdapter(Config), read_json(path, CONFIG_BYTES), str(path))
    weights = _read_weights(_regular(folder / WEIGHTS, inside or folder), config)  # checked before any allocation
    model = models.build(config.model, config.dim, config.context_length)
    model.load_state_dict(weights)
    model.config = config
    return model.eval()


def _regular(path: Path, inside: Path) -> Path:
    """Return the file, links followed. Raises LVMError if it is missing, outside of `inside`, or no regular file."""
    with _naming(path, "export the model again, or fetch the whole folder", (OSError, RuntimeError)):  # a loop of links
        real = path.resolve(strict=True)
    if not real.is_relative_to(inside.resolve()):
        raise LVMError(f"{path}: is a link out of the folder; replace it by the file itself")
    if not stat.S_ISREG(real.stat().st_mode):  # a pipe would block
        raise LVMError(f"{path}: is not a plain file; replace it by the file itself")
    return real


def _read_weights(path: Path, config: Config) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file: float32, finite, of the names and shapes that the config implies."""
    with torch.device("meta"):  # without memory for them
        model = models.build(config.model, config.dim, config.context_length)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with _naming(path), safetensors.safe_open(path, "pt", device="cpu") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
        for name in sorted(shapes.keys() | wanted.keys()):
            if shapes.get(name) != wanted.get(name):
                found, implied = (shape.get(name, "nothing") for shape in (shapes, wanted))
                raise ValueError(f"{one_line(name)[:80]} is {found}, config.json implies {implied}")
            if parts[name].get_dtype() != "F32":
                raise ValueError(f"{name} is {parts[name].get_dtype()}, not F32")
        tensors = {name: file.get_tensor(name) for name in wanted}
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinite values")
    return tensors


def _report_content(run: Run, report: Report | None) -> dict | None:
    """Return what the card shows of a report, as in the run's fivecat.json; without either None.

    Raises LVMError if the report is of another model.
    """
    if report is None:
        path = run.folder / "fivecat.json"
        return read_report(path) if path.exists() else None
    known = (report.profile, report.horizon, report.context_length)
    wanted = ("calibrated", run.version.horizon, run.version.context_length)
    if known != wanted:
        raise LVMError(f"report: profile, horizon, context_length are {known}, not {wanted}; measure this model")
    words = {"reading": {"text": reading(report).text}}
    if {"val", "ood"} <= set(report.splits):
        words["verdict"] = {"text": verdict(run.version, run.history, report).text}
    rows = report.table.astype(object).where(report.table.notna(), None).to_dict("records")
    return words | {"calibrated": {"table": rows, "gates": {split: report.gates(split) for split in report.splits}}}
