"""A trained model as a folder that others can open, as a repository of the Hugging Face hub, and as ONNX.

Axes: B batch, T context length, D vector dimension.

The folder:

    model.safetensors   the best checkpoint's weights, float32: names, shapes and numbers, no code
    config.json         the fields of `Config`
    README.md           a model card with the hub's head: what it reads and gives, how it was judged, its limits

What is opened may come from a stranger. No pickle is read, nothing in config.json is taken for a path, and the weights
must have the names, the type and the shapes that config.json implies before any memory is set aside for them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import os
import re
import stat
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import models
from ..data.store import writing
from ..device import pick_device
from ..errors import LVMError, extra, said
from ..io import limits as untrusted
from ..io.disk import write_whole
from ..judge.fivecat import INSTRUMENT, Report
from ..judge.rating import reading, verdict
from ..runs.checkpoint import check_best
from ..runs.folder import open_run
from ..runs.run import Run
from ..windows import DIRECTIONS

WEIGHTS, CONFIG, CARD = FILES = ("model.safetensors", "config.json", "README.md")
HUB = "hub:"  # before OWNER/NAME, as where texts are read from the hub: a mistyped folder asks no network
MOST = {"dim": 65_536, "context_length": 1_024, "horizon": 1_000_000, "seed": 2**63}
PRECISIONS = ("float32", "bfloat16")
UNFIT = set('/\\*?"<>|`[]$')  # characters that no name in config.json has
LONGEST = 500  # characters of a text in config.json
CONFIG_BYTES = 65_536
ONNX_TOLERANCE = 1e-4  # of an output's largest magnitude; float32 kernels sum in another order
SHOWN = (  # what the card shows of the calibrated 5CAT: (gate, measure)
    ("A", "cosine at the target"),
    ("A", "margin against the last"),
    ("A", "novel margin"),
    ("B", "novel MRR"),
    ("B", "1 of 100"),
    ("C", "shuffled, novel MRR"),
    ("D", "mean rollout"),
    ("G", "margin bought"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What config.json holds: how to build the model, what it reads, and where it comes from."""

    model: str  # one of models.ARCHITECTURES
    dim: int  # of the vectors
    context_length: int  # vectors read
    horizon: int  # the chunk foretold is this many after the last one read
    direction: str  # in which the text is read
    dataset: str  # that it was trained on
    fingerprint: str  # of that dataset's store
    encoder: str  # that made the vectors; empty where the run's folder alone was at hand
    version: str  # of the family, a file in params/
    seed: int
    precision: str  # of the training; the weights are float32
    lvmlib: str  # the version that exported it


def export(run: Run | str | os.PathLike, folder: str | os.PathLike, report: Report | None = None) -> Path:
    """Write the best checkpoint of a finished run as a folder, whole or not at all; returns its path.

    `run`: what `train` gave, or a run's folder (the card cannot name the encoder then). `report`: the calibrated 5CAT
    that the card shows, of this very model; by default the run's fivecat.json, if there is one. Raises LVMError if
    `folder` exists, if the run is unfinished or cannot be read, and for a report that another instrument wrote.
    """
    source = run.folder if isinstance(run, Run) else Path(run)
    record, epochs, _ = open_run(source)
    if "finished" not in record:
        raise LVMError(f"{source}: this run is not finished; train it to its end, then export it")
    weights = _tensors(source / "best.safetensors")
    try:
        parameters, dataset = record["parameters"], record["dataset"]
        config = Config(
            model=parameters["model"],
            dim=_dim(parameters["model"], parameters["context_length"], weights, source),
            context_length=parameters["context_length"],
            horizon=parameters["horizon"],
            direction=parameters.get("direction", "forward"),  # runs from before it was a parameter read forwards
            dataset="".join("-" if c in UNFIT else c for c in _line(dataset["name"])).lstrip(".") or "dataset",
            fingerprint=dataset["fingerprint"],
            encoder=_line(run.data.store.datasheet.get("encoder", "")) if isinstance(run, Run) else "",
            version=parameters["name"],
            seed=parameters["seed"],
            precision=record["computed"]["precision"],
            lvmlib=metadata.version("lvmlib"),
        )
        windows = {split: int(n) for split, n in dataset["windows"].items()}
        fast = bool(parameters.get("fast", False))
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise LVMError(f"{source / 'run.yaml'}: lacks what a model needs ({said(e)}); restore the file") from e
    check_best(source, record, epochs)  # after what a reader can say of the file itself
    judged = _judged(source, run, report, config)
    with writing(folder) as partial:
        safetensors.torch.save_file(weights, partial / WEIGHTS)
        (partial / WEIGHTS).chmod(0o644)  # safetensors makes it the owner's alone
        text = json.dumps(dataclasses.asdict(config), indent=1, ensure_ascii=False) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")
        try:
            text = card(config, windows, judged, fast)
        except (KeyError, TypeError, AttributeError) as e:
            raise LVMError(
                f"{source / 'fivecat.json'}: lacks what the card shows ({said(e)}); run train.ipynb for it again, "
                "or give `report`"
            ) from e
        (partial / CARD).write_text(text, encoding="utf-8")
        _opened(partial)  # what is wrong is found now, not by who opens it
    return Path(folder)


def load(where: str | os.PathLike, device: str = "auto", revision: str | None = None) -> models.Predictor:
    """The model of an exported folder, or of `hub:OWNER/NAME` (`revision`: a branch, tag or commit of it).

    A Predictor in eval mode: `raw, unit = model(context)` from a context (B, T, D) of unit vectors, oldest first;
    `model.config` tells the rest. It computes in float32 on `device`, as `train` takes it. Raises LVMError, naming the
    file, for whatever is missing, damaged or hostile: see the module's head.
    """
    device = pick_device(device)
    name = os.fspath(where)
    if name.startswith(HUB):
        snapshot = _fetched(name.removeprefix(HUB), revision)
        # CACHE/models--OWNER--NAME/snapshots/COMMIT/ holds links to files elsewhere in the cache: so far, no farther.
        return _opened(snapshot, inside=snapshot.parents[2]).to(device)
    folder = Path(where)
    if not folder.is_dir():
        hint = f"; for a model of the hub write {HUB}{name}" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
        raise LVMError(f"{folder}: no such folder{hint}; `export` makes one from a run")
    return _opened(folder).to(device)


def push(folder: str | os.PathLike, name: str, private: bool = True) -> str:
    """Send an exported folder to the hub as model OWNER/NAME, made where it is not there; returns the commit's address.

    Who is signed in is huggingface_hub's own matter (`hf auth login`). What stood there stays in the repository's
    history. Only the folder's three files are sent, after they were opened as `load` would. Raises LVMError for a
    folder that cannot be opened, and with the hub's words where it refuses or cannot be reached.
    """
    hub = extra("huggingface_hub", "export")
    name = _repository(name)
    config = _opened(Path(folder)).config
    _regular(Path(folder) / CARD, Path(folder))  # it is sent, too
    try:
        api = hub.HfApi()
        api.create_repo(name, repo_type="model", private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=name,
            repo_type="model",
            folder_path=str(folder),
            allow_patterns=list(FILES),
            commit_message=f"{config.version}, {config.model}, seed {config.seed}",
        )
    except Exception as e:  # no network, no right, a name that is taken: the client has an exception for each
        raise LVMError(
            f"{HUB}{name}: the hub did not take {folder} ({said(e)}); sign in, or look at the network"
        ) from e
    return str(getattr(done, "commit_url", done))


def _repository(name: str) -> str:
    """OWNER/NAME, checked: it becomes part of an address and of a path in the hub's cache."""
    parts = name.split("/")
    if len(parts) != 2 or not all(
        re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}", p, re.ASCII) and ".." not in p for p in parts
    ):
        raise LVMError(f"{HUB}{name}: not the name of a model of the hub; write {HUB}OWNER/NAME")
    return name


def _fetched(name: str, revision: str | None) -> Path:
    hub = extra("huggingface_hub", "export")
    name = _repository(name)
    try:
        return Path(hub.snapshot_download(name, repo_type="model", revision=revision, allow_patterns=list(FILES)))
    except Exception as e:  # as in push
        raise LVMError(
            f"{HUB}{name}: the hub did not give it ({said(e)}); look at the name and the network, or load a folder"
        ) from e


def _opened(folder: Path, inside: Path | None = None) -> models.Predictor:
    """The model of a folder whose files lie under `inside` (default: the folder itself) once links are followed."""
    inside = folder if inside is None else inside
    config = _config(_regular(folder / CONFIG, inside))
    sizes = config.model, config.dim, config.context_length
    weights = _tensors(_regular(folder / WEIGHTS, inside), _shapes(*sizes))  # before the model takes any memory
    model = models.build(*sizes)
    model.load_state_dict(weights)
    model.config = config
    return model.eval()


def _regular(path: Path, inside: Path) -> Path:
    """The file, links followed. Raises LVMError where it is missing, lies outside of `inside`, or is no plain file."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as e:  # RuntimeError: links in a ring
        raise LVMError(f"{path}: is missing; export the model anew, or fetch the whole folder") from e
    if not real.is_relative_to(inside.resolve()):
        raise LVMError(f"{path}: is a link out of the folder; put the file itself in its place")
    if not stat.S_ISREG(real.stat().st_mode):  # a pipe would wait for ever
        raise LVMError(f"{path}: is not a plain file; put the file itself in its place")
    return real


def _config(path: Path) -> Config:
    """config.json, checked. Raises LVMError for anything but a Config of sensible values."""
    advice = "export the model anew, or restore the file"
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise ValueError(f"is larger than {CONFIG_BYTES // 1024} KiB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise LVMError(f"{path}: not a readable configuration ({said(e)}); {advice}") from e
    kinds = {f.name: {"int": int, "str": str}[f.type] for f in dataclasses.fields(Config)}
    if not isinstance(content, dict) or set(content) != set(kinds):
        found = set(content) if isinstance(content, dict) else set()
        lacks, new = (", ".join(sorted(k)[:5]) or "none" for k in (set(kinds) - found, found - set(kinds)))
        raise LVMError(f"{path}: not the keys of an exported model (missing: {lacks}; unknown: {_line(new)}); {advice}")
    for key, kind in kinds.items():
        value, least = content[key], 0 if key == "seed" else 1
        if type(value) is not kind:
            raise LVMError(f"{path}: {key} is {type(value).__name__}, needed is {kind.__name__}; {advice}")
        if kind is int and not least <= value <= MOST[key]:
            raise LVMError(f"{path}: {key} is {str(value)[:40]}, needed is {least} to {MOST[key]:,}; {advice}")
        if kind is str and (len(value) > LONGEST or not value.isprintable()):
            raise LVMError(f"{path}: {key} is not one line of at most {LONGEST} characters; {advice}")
    # Names are shown, and may become part of a path where someone uses them so: never one that leads elsewhere.
    for key in ("version", "dataset"):
        if not content[key] or content[key].startswith(".") or set(content[key]) & UNFIT:
            raise LVMError(f"{path}: {key} {content[key]!r} is not a plain name; {advice}")
    for key, known in {"model": models.ARCHITECTURES, "direction": DIRECTIONS, "precision": PRECISIONS}.items():
        if content[key] not in known:
            raise LVMError(f"{path}: unknown {key} {content[key]!r}; known: {', '.join(known)}; {advice}")
    return Config(**content)


def _shapes(name: str, dim: int, length: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of an architecture's weights, found without memory for them."""
    with torch.device("meta"):
        return {k: tuple(t.shape) for k, t in models.build(name, dim, length).state_dict().items()}


def _dim(name: str, length: int, weights: Mapping[str, Tensor], where: Path) -> int:
    """D of a run's weights: a run's folder does not tell it, but only one D gives these shapes."""
    shapes = {k: tuple(t.shape) for k, t in weights.items()}
    sizes = sorted({size for shape in shapes.values() for size in shape if size <= MOST["dim"]})
    dim = next((d for d in sizes if _shapes(name, d, length) == shapes), None)
    if dim is None:
        raise LVMError(
            f"{where / 'best.safetensors'}: not the weights of model {name!r}; restore the file, or train anew"
        )
    return dim


def _tensors(path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file: float32, finite, of these names and `shapes` where given."""
    advice = "export the model anew, or restore the file"
    try:
        with safetensors.safe_open(path, "pt", device="cpu") as file:
            names = list(file.keys())
            if shapes is not None:
                wrong = [f"{k} is missing" for k in shapes if k not in names]
                wrong += [f"{_line(k)[:80]} is unknown" for k in names if k not in shapes]
                if wrong:
                    raise LVMError(f"{path}: not the weights that config.json names ({wrong[0]}); {advice}")
            for name in names:
                part = file.get_slice(name)
                shape = tuple(part.get_shape())
                if shapes is not None and shape != shapes[name]:
                    raise LVMError(f"{path}: {name} has shape {shape}, config.json implies {shapes[name]}; {advice}")
                if part.get_dtype() != "F32":
                    raise LVMError(f"{path}: {_line(name)[:80]} is {part.get_dtype()}, needed is F32; {advice}")
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, safetensors.SafetensorError) as e:
        with_pickle = _head(path)[:1] == b"\x80" or _head(path) == b"PK"  # as pickle and torch.save begin
        why = "it looks like a pickle, which is never opened" if with_pickle else said(e)
        raise LVMError(f"{path}: not a whole safetensors file ({why}); {advice}") from e
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise LVMError(f"{path}: {_line(name)[:80]} holds NaN or infinite values; {advice}")
    return tensors


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(2)
    except OSError:
        return b""


def _line(text) -> str:
    """Text from outside on one line, without what a terminal or Markdown would act on."""
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable() and c not in "`|<>")[:LONGEST]


def _judged(source: Path, run, report: Report | None, config: Config) -> dict | None:
    """What the card shows of a 5CAT: rows of the calibrated table, gates by split, reading and verdict in words."""
    if report is not None:
        if report.profile != "calibrated":
            raise LVMError(f"the card shows the calibrated 5CAT; this report is of profile {report.profile}")
        if (report.horizon, report.context_length) != (config.horizon, config.context_length):
            raise LVMError(
                f"the report is of context {report.context_length}, horizon {report.horizon}; the run of "
                f"{config.context_length}, {config.horizon}; measure this run's model"
            )
        both = isinstance(run, Run) and {"val", "ood"} <= set(report.splits)
        return {
            "rows": report.table.astype(object).where(report.table.notna(), None).to_dict("records"),
            "gates": {split: report.gates(split) for split in report.splits},
            "reading": reading(report).text,
            "verdict": verdict(run.version, run.history, report).text if both else "",
        }
    path = source / "fivecat.json"
    if not path.exists():
        return None
    try:
        content = untrusted.read_json(path)
        if content["instrument"] != INSTRUMENT:
            raise ValueError(f"written by instrument {content['instrument']}, this is {INSTRUMENT}")
        profile = content["calibrated"]
        found = {"rows": profile["table"], "gates": profile["gates"]}
        return found | {"reading": content["reading"]["text"], "verdict": content["verdict"]["text"]}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise LVMError(
            f"{path}: cannot be read as a 5CAT report ({said(e)}); run train.ipynb for it again, or give `report`"
        ) from e


def card(config: Config, windows: Mapping[str, int], judged: dict | None, fast: bool = False) -> str:
    """The model card in Markdown, with the hub's head in YAML."""
    c = config
    results = []
    if judged:
        for split in judged["gates"]:
            rows = {r["measure"]: r for r in judged["rows"] if r["split"] == split and r["predictor"] == "model"}
            metrics = [
                {"type": kind, "name": name, "value": round(rows[name]["value"], 4)}
                for kind, name in (("cosine", "cosine at the target"), ("mrr", "novel MRR"))
                if rows[name]["value"] is not None
            ]
            data = {"type": c.dataset, "name": c.dataset, "split": split}
            task = {"type": "feature-extraction", "name": "prediction of a later chunk's vector"}
            results.append({"task": task, "dataset": data, "metrics": metrics})
    title = f"{c.version}, {c.model}, seed {c.seed}"
    head = {"library_name": "lvmlib", "tags": ["latent-vector-model", "safetensors", c.version, c.model]}
    if results:
        head["model-index"] = [{"name": title, "results": results}]
    one_size = f"(B, {c.context_length}, {c.dim})"
    order = "oldest first" if c.direction == "forward" else "in reversed reading order: the last of the text first"
    where = "after" if c.direction == "forward" else "before"
    gives = {
        "two_heads": "`model.heads(context)[2]`, of a head of its own, is the unit vector that ranks chunks.",
        "gated": "`model.heads(context)[2]`, of a head of its own, is the unit vector that ranks chunks.",
        "committee": "`model.heads(context)[2]`, the sum of three rankers' unit vectors at length 1, ranks chunks.",
        "sampler": "The point is the mean of 32 samples; `model.samples(context, S)` draws others, (S, B, D).",
    }
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {title}",
        "",
        f"A Latent Vector Model: it reads {c.context_length} consecutive chunk vectors of an article and foretells the "
        f"vector of chunk {c.horizon} {where} them. Version `{c.version}` of lvmlib, trained on `{c.dataset}` "
        f"({', '.join(f'{n:,} {split}' for split, n in windows.items())} windows), in {c.precision}.",
        "",
        "## What it reads and gives",
        "",
        f"- Reads: {one_size} unit vectors, float32, {order}"
        + (f". Encoder: {_line(c.encoder).rstrip('.')}" if c.encoder else ", by the encoder that made the dataset")
        + ".",
        f"- Gives: `raw` (B, {c.dim}), the point, and `unit`, the same at length 1. {gives.get(c.model, '')}".rstrip(),
        "",
        "```python",
        "import torch",
        "import lvmlib as lvm",
        "",
        'model = lvm.load(".")  # this folder, or "hub:OWNER/NAME"',
        f"context = torch.nn.functional.normalize(torch.randn(1, {c.context_length}, {c.dim}), dim=-1)  # your vectors",
        "raw, unit = model(context.to(next(model.parameters()).device))",
        "```",
        "",
        "## How it was judged",
        "",
    ]
    if not judged:
        lines += [
            "It was not judged: no 5CAT of it was at hand when it was exported. Trust nothing of it unmeasured.",
            "",
        ]
    else:
        lines += [
            judged["reading"],
            "",
            "Calibrated 5CAT, 95 % intervals over articles in brackets. Copying the last vector and the mean of the "
            "context need no training; they were measured on the very same windows.",
            "",
        ]
        for split, gates in judged["gates"].items():
            lines += _table(split, judged["rows"], gates)
        if judged["verdict"]:
            lines += [judged["verdict"], ""]
    lines += [
        "## Limits",
        "",
        *(["- A smoke run on a few hundred windows: good for trying the code, for nothing else."] if fast else []),
        "- Vectors of another encoder, of another length than 1 or in another order have no meaning to it.",
        f"- The figures hold for `{c.dataset}` and texts like it; its validation articles chose the checkpoint.",
        "- It foretells a vector, not a text; what lies nearest to it depends on the chunks at hand.",
        "- No licence is stated here: the dataset's datasheet says under which one its texts stand.",
        "",
        f"Fingerprint of the dataset: `{c.fingerprint}`. Exported by lvmlib {c.lvmlib}.",
        "",
    ]
    return "\n".join(lines)


def _table(split: str, rows: list[dict], gates: Mapping[str, str]) -> list[str]:
    """The calibrated figures of one split in Markdown."""

    def shown(predictor: str, gate: str, measure: str) -> str:
        row = found.get((predictor, gate, measure))
        if row is None or row["value"] is None:
            return "–"
        interval = "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
        return f"{row['value']:.3f}{interval}"

    found = {(r["predictor"], r["gate"], r["measure"]): r for r in rows if r["split"] == split}
    some = found["model", "A", "cosine at the target"]
    words = ", ".join(f"{gate} {outcome}" for gate, outcome in gates.items())
    lines = [
        f"**{split}** ({some['articles']:.0f} articles, {some['windows']:.0f} windows); gates: {words}.",
        "",
        "| gate | measure | model | copy last | mean | chance |",
        "|---|---|---|---|---|---|",
    ]
    for gate, measure in SHOWN:
        if ("model", gate, measure) in found:
            chance = found["model", gate, measure]["chance"]
            cells = [shown(p, gate, measure) for p in ("model", "copy last", "mean")]
            lines.append(" | ".join([f"| {gate}", measure, *cells, "–" if chance is None else f"{chance:.3f}"]) + " |")
    return [*lines, ""]


class _Heads(nn.Module):
    """What ONNX computes of a predictor: its point, and the unit vector that ranks chunks."""

    def __init__(self, model: models.Predictor):
        super().__init__()
        self.model = model

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        raw, _, ranker = self.model.heads(context)
        return raw, ranker


class _WithHeads(TorchFunctionMode):
    """Attention without an axis for its heads, as AMN's, computed with one: the converter knows no other."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and args[0].ndim == 3:
            return func(*(a[:, None] for a in args[:3]), *args[3:], **(kwargs or {}))[:, 0]
        return func(*args, **(kwargs or {}))


def to_onnx(model: models.Predictor | str | os.PathLike, path: str | os.PathLike) -> float:
    """Write a model, or that of an exported folder, as one ONNX file; returns its largest difference from torch.

    Input `context` (B, T, D) float32, any B; outputs `point` (B, D), the raw prediction, and `ranker` (B, D), the unit
    vector that ranks chunks: the point at length 1, but for `two_heads`, `gated` and `committee` that of the other
    heads. Of a sampler the point alone is there, the mean of its 32 fixed samples; drawing more needs torch.

    The difference is relative to the largest magnitude of each output, over batches of 1, 3 and 64 random contexts of
    unit vectors, by ONNX Runtime on the CPU. Raises LVMError, and leaves no file, where it is above 1e-4
    (ONNX_TOLERANCE) or the model cannot be converted, and where `path` exists.
    """
    for module in ("onnx", "onnxscript"):  # what torch's exporter imports only when it is well under way
        extra(module, "export")
    runtime = extra("onnxruntime", "export")
    path = Path(path)
    if path.exists():
        raise LVMError(f"{path}: is there already; name a new file, or move the old one aside")
    model = copy.deepcopy(model).cpu().eval() if isinstance(model, models.Predictor) else load(model, "cpu")
    heads, worst = _Heads(model).eval(), 0.0
    noise = torch.Generator().manual_seed(0)
    contexts = [
        F.normalize(torch.randn(size, model.context_length, model.dim, generator=noise), dim=-1) for size in (1, 3, 64)
    ]

    def converted(partial: Path) -> None:
        nonlocal worst
        with _quiet("torch.onnx", "onnxscript", "onnx_ir"), torch.no_grad(), _WithHeads():
            torch.onnx.export(
                heads,
                (contexts[1],),
                partial,
                input_names=["context"],
                output_names=["point", "ranker"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=False,  # one file
                verbose=False,
            )
        session = runtime.InferenceSession(partial, providers=["CPUExecutionProvider"])
        for context in contexts:
            with torch.no_grad():
                wanted = [t.numpy() for t in heads(context)]
            for there, here in zip(session.run(None, {"context": context.numpy()}), wanted, strict=True):
                # NaN is no match: the comparison below is false for it.
                worst = float(np.maximum(worst, np.abs(there - here).max() / np.abs(here).max()))
        if not worst <= ONNX_TOLERANCE:
            raise LVMError(
                f"{path}: ONNX Runtime differs from torch by {worst:.1e} of the largest value, allowed is "
                f"{ONNX_TOLERANCE:g}; use the model with torch"
            )

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(path, converted)
    except LVMError:
        raise
    except Exception as e:  # the converter and the runtime have many
        raise LVMError(f"{path}: this {type(model).__name__} cannot be converted ({said(e)}); use it with torch") from e
    finally:
        path.with_name(path.name + ".partial").unlink(missing_ok=True)
    return worst


@contextlib.contextmanager
def _quiet(*names: str):
    """Inside, these loggers pass errors alone, and warnings are dropped: the converter tells its every step."""
    loggers = [logging.getLogger(n) for n in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
