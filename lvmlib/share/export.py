"""A trained model as a folder that others can open, and as a repository of the Hugging Face hub.

    model.safetensors   the best checkpoint's weights, float32: names, shapes and numbers, no code
    config.json         the fields of `Config`
    README.md           the model card (see `card`)

A folder may come from a stranger. No pickle is read, nothing in config.json is used as a path, and the weights must
have the names, type and shapes that config.json implies before any memory is allocated for them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import safetensors
import safetensors.torch
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from .. import models
from ..data.store import writing
from ..device import pick_device
from ..errors import LVMError, format_error, require
from ..io.limits import read_bytes
from ..judge.fivecat import Report
from ..judge.rating import reading, verdict
from ..report.summary import read_report
from ..runs.run import Run
from ..windows import DIRECTIONS
from .card import card, one_line
from .original import load_checkpoint

WEIGHTS, CONFIG, CARD = FILES = ("model.safetensors", "config.json", "README.md")
SUFFIXES = (".pt", ".pth")  # of checkpoints
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


Text = Annotated[str, Field(max_length=500), AfterValidator(_check_text)]
Name = Annotated[Text, AfterValidator(_check_name)]


class Config(pydantic.BaseModel, extra="forbid", strict=True, frozen=True):
    """The content of config.json: how to build the model, what it reads, where it comes from."""

    model: Literal[*models.ARCHITECTURES]
    dim: Annotated[int, Field(ge=1, le=LARGEST_DIM)]  # of the vectors
    context_length: Annotated[int, Field(ge=1, le=1024)]
    horizon: Annotated[int, Field(ge=1, le=1_000_000)]  # the target chunk is this many after the context
    direction: Literal[*DIRECTIONS]
    dataset: Name
    fingerprint: Text  # of the dataset's store
    encoder: Text  # of the vectors; empty if the datasheet names none
    version: Name
    seed: Annotated[int, Field(ge=0, le=2**63)]
    precision: Literal["float32", "bfloat16"]  # of the training; the weights are float32
    lvmlib: Text  # the version that exported it


def export(run: Run, folder: str | os.PathLike, report: Report | None = None) -> Path:
    """Write the best checkpoint of a finished run as a folder, whole or not at all. Returns its path.

    `report`: the calibrated 5CAT of this model for the card; default: the run's fivecat.json, if there is one. Raises
    LVMError if `folder` exists, and if the run or the report is unfinished, damaged, or of another model.
    """
    if not isinstance(run, Run):
        raise LVMError(f"export: {str(run)[:200]!r} is not a run; give what `train` returns for this version and data")
    if not run.finished:
        raise LVMError(f"{run.folder}: this run is not finished; finish its training, then export it")
    model, store, version = run.best, run.data.store, run.version
    config = Config(
        dim=model.dim,
        dataset=_plain_name(store.name),
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
        (partial / CONFIG).write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (partial / CARD).write_text(text, encoding="utf-8")
        _open(partial)  # finds now what would be wrong for whoever opens it
    return Path(folder)


def load(
    where: str | os.PathLike, device: str = "auto", revision: str | None = None, horizon: int = 2
) -> models.Predictor:
    """Return the model of an exported folder, of a checkpoint of the original (.pt; it does not say its `horizon`), or
    of `hub:OWNER/NAME` (`revision`: its branch, tag or commit).

    A Predictor in eval mode, float32, on `device`: `raw, unit = model(context)` for a context (B, T, D) of unit
    vectors, oldest first; `model.config` has the rest. Raises LVMError, with the file's name, for what is missing,
    damaged or hostile.
    """
    device = pick_device(device)
    name = os.fspath(where)
    if name.startswith(HUB):
        return _hub_model().from_pretrained(name.removeprefix(HUB), revision=revision).predictor.to(device)
    if Path(where).suffix in SUFFIXES and not Path(where).is_dir():
        return _checkpoint(Path(where), horizon).to(device)
    if not Path(where).is_dir():
        hint = f" (a model of the hub is {HUB}{name})" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
        raise LVMError(f"{name}: no such folder{hint}; `export` makes one from a run")
    return _open(Path(where)).to(device)


def _checkpoint(path: Path, horizon: int) -> models.Predictor:
    """Return the model of a checkpoint of the original, with a Config of what is known of it."""
    model, name, args = load_checkpoint(path)
    seed = args.get("seed", 0)
    config = {"model": name, "dim": model.dim, "context_length": model.context_length, "horizon": horizon}
    config |= {"version": _plain_name(path.stem), "dataset": _plain_name(Path(str(args.get("train_npz", ""))).stem)}
    config |= {"seed": seed if type(seed) is int and seed >= 0 else 0, "lvmlib": metadata.version("lvmlib")}
    with _naming(path):
        model.config = Config(**config, direction="forward", fingerprint="", encoder="", precision="float32")
    return model


def _plain_name(text: Any) -> str:
    """Return a name as config.json holds it; `dataset` for one of which nothing is left."""
    return "".join("-" if c in NOT_IN_NAMES else c for c in one_line(text)).lstrip(".") or "dataset"


def push(folder: str | os.PathLike, name: str, private: bool = True) -> str:
    """Upload an exported folder to the hub as OWNER/NAME, which is created if new. Returns the commit's address.

    Sign in with `hf auth login` before. Only the folder's three files are sent, after all checks of `load`. Raises
    LVMError for a folder that cannot be opened, and with the hub's words if it refuses or cannot be reached.
    """
    model = _hub_model()(Path(folder))
    config, name = model.predictor.config, _check_repository(name)
    message = f"{config.version}, {config.model}, seed {config.seed}"
    with _naming(f"{HUB}{name}", "sign in, or check the network", Exception):
        commit = model.push_to_hub(name, private=private, commit_message=message, allow_patterns=list(FILES))
    return str(getattr(commit, "commit_url", commit))


def _hub_model() -> type:
    """Return the class of models on the hub. Raises LVMError without the extra `export`, which has the mixin."""
    hub = require("huggingface_hub", "export")

    class HubModel(hub.PyTorchModelHubMixin):
        """An exported folder with the mixin's `push_to_hub`; `predictor` is its model."""

        def __init__(self, folder: Path, inside: Path | None = None):
            self.folder, self.predictor = folder, _open(folder, inside)

        def _save_pretrained(self, save_directory: Path) -> None:
            """Copy the files, which then are uploaded. ModelCard raises if the hub could not read the card's head."""
            hub.ModelCard.load(_regular(self.folder / CARD, self.folder))
            for name in FILES:
                shutil.copyfile(self.folder / name, save_directory / name)

        @classmethod
        def from_pretrained(cls, name: str, *, revision: str | None = None) -> HubModel:
            """In place of the mixin's own, which reads config.json of any size and falls back on a pickle."""
            with _naming(f"{HUB}{_check_repository(name)}", "check name and network", Exception):
                snapshot = Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
            # CACHE/models--OWNER--NAME/snapshots/COMMIT/ has links to files elsewhere in the cache, and no farther
            return cls(snapshot, inside=snapshot.parents[2])

    return HubModel


def _check_repository(name: str) -> str:
    """Return OWNER/NAME if it is plain: it becomes part of an address, and of a path in the hub's cache."""
    plain = re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name, re.ASCII)
    if not plain or ".." in name:
        raise LVMError(f"{HUB}{name}: not the name of a model of the hub; write {HUB}OWNER/NAME")
    return name


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
    config = _read_config(_regular(folder / CONFIG, inside or folder))
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


def _read_config(path: Path) -> Config:
    """Return config.json, checked. Raises LVMError for anything else than a Config."""
    with _naming(path):
        try:
            return Config.model_validate_json(read_bytes(path, CONFIG_BYTES))
        except pydantic.ValidationError as e:
            error = e.errors(include_url=False, include_input=False)[0]
            key = one_line(error["loc"][0])[:80] if error["loc"] else "not a configuration"
            raise LVMError(f"{path}: {key}: {one_line(error['msg'])[:300]}; {ADVICE}") from e


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
