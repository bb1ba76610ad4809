"""Encode chunks into shards of vectors: a shard that is there and whole is not made again.

A shard is a file shard-00000.npz: vectors (n, D) float16, tokens (n,) of their texts, and a hash of these texts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..config import watched
from ..errors import LVMError, format_error
from ..io.disk import write_atomic
from . import encoders

RESUMABLE = "finished work is kept: call again to continue"


class Progress:
    """Lines every 30 seconds; while encoding a bar if a person watches, else a line after each shard, too."""

    def __init__(self, wanted: bool):
        self.wanted, self.shown = wanted, None
        self.last = time.monotonic()  # when a line was printed

    def log(self, text: str) -> None:
        if self.wanted and self.shown is None:
            print(text, flush=True)
        self.last = time.monotonic()

    def reading(self, done: int, what: str) -> None:
        if time.monotonic() - self.last > 30:
            self.log(f"{done:,} {what}")

    @contextlib.contextmanager
    def encoding(self, total: int) -> Iterator[None]:
        self.total, self.done, self.new, self.since = total, 0, 0, time.monotonic()
        bar = {"total": total, "unit": "chunk", "desc": "encoding"}
        # Without a bar, no tqdm at all: a killed fork would leave its lock held.
        with tqdm(**bar) if self.wanted and watched() else contextlib.nullcontext() as self.shown:
            yield

    def skip(self, count: int) -> None:
        """Count chunks that an earlier call encoded: they say nothing of the speed."""
        self.done += count
        if self.shown is not None:
            self.shown.initial += count
            self.shown.update(count)

    def add(self, count: int, log: bool = False) -> None:
        self.done, self.new = self.done + count, self.new + count
        if self.shown is not None:
            self.shown.update(count)
        if log or time.monotonic() - self.last > 30:
            rate = self.new / max(time.monotonic() - self.since, 1e-9)
            minutes = (self.total - self.done) / max(rate, 1e-9) / 60
            self.log(f"{self.done:,} of {self.total:,} chunks, {rate:,.1f} a second, {minutes:,.1f} min left")


def encode_shards(
    model: encoders.Encoder, texts: Sequence[str], folder: Path, shard: int, batch_size: int, progress: Progress
) -> tuple[list[Path], np.ndarray]:
    """Encode M texts into files of `shard` vectors; return the files, and the tokens of each text (M,).

    Raises LVMError, naming the text's row, on a vector that is not unit, and where the device's memory is full.
    """
    parts, tokens = [], []
    with progress.encoding(len(texts)):
        for first in range(0, len(texts), shard):
            path, batch = folder / f"shard-{len(parts):05d}.npz", texts[first : first + shard]
            arrays = _load(path, batch)
            if arrays is None:
                vectors, counted = _vectors(model, batch, batch_size, progress.add)
                _check(vectors, model, batch, first)
                arrays = {"vectors": vectors.astype(np.float16), "tokens": counted, "hash": _hash(batch)}
                write_atomic(path, lambda partial, arrays=arrays: _save(partial, arrays), RESUMABLE)
                progress.add(0, log=True)
            else:
                progress.skip(len(batch))
            parts.append(path)
            tokens.append(arrays["tokens"])
    return parts, np.concatenate(tokens)


def _vectors(
    model: encoders.Encoder, texts: list[str], batch_size: int, add: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors (n, D) of a shard's texts, and the tokens of each (n,), 0 where they are not known."""
    try:
        if model.ahead:
            return encoders.by_tokens(model, texts, batch_size * encoders.PER_CHUNK, add)
        vectors = encoders.plain(model, texts, batch_size)
        add(len(texts))
        return vectors, np.zeros(len(texts), np.int32)
    except torch.OutOfMemoryError as e:
        raise LVMError(
            f"device {model.device}: its memory is full ({format_error(e)}); lower batch_size from {batch_size}; "
            f"{RESUMABLE}"
        ) from e


def _check(vectors: np.ndarray, model: encoders.Encoder, texts: list[str], first: int) -> None:
    norms = np.linalg.norm(vectors, axis=1)
    unit = np.abs(norms - 1) <= 1e-3  # False for NaN
    if not unit.all():
        row = int(unit.argmin())
        what = "a zero vector" if norms[row] == 0 else "NaN or infinite values"
        advice = "set precision float32, or " if model.precision != "float32" else ""
        raise LVMError(
            f"encoder {model.name!r}: gives {what} for row {first + row} of texts.jsonl, {texts[row][:60]!r}; {advice}"
            "name another encoder, or remove that text"
        )


def _hash(texts: list[str]) -> np.ndarray:
    """Return 16 bytes that tell whether a shard is of these texts."""
    return np.frombuffer(hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest(), np.uint8)


def _save(path: Path, arrays: dict) -> None:
    with open(path, "wb") as file:  # given a name, numpy would add .npz to it
        np.savez(file, **arrays)


def _load(path: Path, texts: list[str]) -> dict | None:
    """Return the arrays of a shard, or None if it is missing, damaged or of other texts."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("vectors", "tokens", "hash")}
    except Exception:  # a damaged file raises many kinds out of zipfile and numpy
        return None
    return arrays if np.array_equal(arrays["hash"], _hash(texts)) and len(arrays["vectors"]) == len(texts) else None


def join_shards(parts: Sequence[Path], count: int, path: Path) -> None:
    """Write the vectors of all shards, (count, D), into one .npy file, a shard in memory at a time."""
    with open(path, "wb") as file:
        for number, part in enumerate(parts):
            with np.load(part, allow_pickle=False) as arrays:
                vectors = arrays["vectors"]
            if number == 0:
                shape = (count, vectors.shape[1])
                header = {"descr": np.lib.format.dtype_to_descr(vectors.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(vectors.tobytes())
