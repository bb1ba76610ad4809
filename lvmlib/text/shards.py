"""Encode chunks into shards of vectors: a shard that is there and whole is not made again.

A shard is a file shard-00000.npz: vectors (n, D) float16, their lengths, and a hash of the texts they are of.
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
    """A bar if a person watches; else a line after each shard, and every 30 seconds."""

    def __init__(self, wanted: bool):
        self.watched, self.logged = wanted and watched(), wanted and not watched()
        self.last = time.monotonic()  # when a line was printed

    def log(self, text: str) -> None:
        if self.logged:
            print(text, flush=True)
        self.last = time.monotonic()

    def reading(self, done: int, what: str) -> None:
        if time.monotonic() - self.last > 30:
            self.log(f"{done:,} {what}")

    @contextlib.contextmanager
    def encoding(self, total: int) -> Iterator[None]:
        self.total, self.done, self.new, self.since = total, 0, 0, time.monotonic()
        with self.bar(total=total, unit="chunk", desc="encoding") as self.shown:
            yield

    def bar(self, **options):
        """Return a bar, or a context of None if nobody watches (a killed fork would leave tqdm's lock held)."""
        return tqdm(**options) if self.watched else contextlib.nullcontext()

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
) -> tuple[list[Path], dict[str, np.ndarray]]:
    """Encode M texts into files of `shard` vectors; return the files, and the texts' characters and tokens, (M,) each.

    Raises LVMError, naming the text's row, on a vector that is not unit, and where the device's memory is full.
    """
    parts, lengths = [], {"characters": [], "tokens": []}
    with progress.encoding(len(texts)):
        for number, first in enumerate(range(0, len(texts), shard)):
            path, batch = folder / f"shard-{number:05d}.npz", texts[first : first + shard]
            arrays = _load(path, batch)
            if arrays is None:
                vectors, tokens = _vectors(model, batch, batch_size, progress.add)
                _check(vectors, model, batch, first)
                characters = np.array([len(text) for text in batch], np.int32)
                arrays = {"vectors": vectors.astype(np.float16), "tokens": tokens, "characters": characters}
                write_atomic(path, lambda p, a=arrays, b=batch: _save(p, {**a, "hash": _hash(b)}), RESUMABLE)
                progress.add(0, log=True)
            else:
                progress.skip(len(batch))
            parts.append(path)
            for key, values in lengths.items():
                values.append(arrays[key])
    return parts, {key: np.concatenate(values) for key, values in lengths.items()}


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
    bad = np.flatnonzero(~(np.abs(norms - 1) <= 1e-3))  # negated, so that NaN counts
    if len(bad):
        row = int(bad[0])
        what = "a zero vector" if norms[row] == 0 else "NaN or infinite values"
        advice = "set precision float32, or " if model.precision != "float32" else ""
        raise LVMError(
            f"encoder {model.name!r}: gives {what} for row {first + row} of texts.jsonl, {texts[row][:60]!r}; {advice}"
            "name another encoder, or remove that text"
        )


def _hash(texts: list[str]) -> np.ndarray:
    """Return 16 bytes of a hash: a shard of other texts is not taken for theirs."""
    return np.frombuffer(hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest(), np.uint8)


def _save(path: Path, arrays: dict) -> None:
    with open(path, "wb") as file:  # given a name, numpy would add .npz to it
        np.savez(file, **arrays)


def _load(path: Path, texts: list[str]) -> dict | None:
    """Return the arrays of a shard, or None if it is missing, damaged or of other texts."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("vectors", "tokens", "characters", "hash")}
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
