"""Cache of results in this process. Values are shared, not copied: a caller that hands them on copies them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import is_dataclass

import numpy as np
import torch

from ..baselines import Constant, Linear, Weighted
from ..models import Predictor
from ..windows import Windows


class Cache:
    """Values by key, together at most `max_bytes`; the least recently used is dropped first."""

    def __init__(self, max_bytes: int = 1 << 28):
        self.max_bytes, self.values = max_bytes, OrderedDict()

    def __call__(self, key: Hashable, compute: Callable):
        """The value of `key`; `compute()` if there is none. A value larger than `max_bytes` is not stored."""
        if key not in self.values:
            value = compute()
            if size(value) > self.max_bytes:
                return value
            self.values[key] = value
            while sum(map(size, self.values.values())) > self.max_bytes:
                self.values.popitem(last=False)
        self.values.move_to_end(key)
        return self.values[key]


cached = Cache()


def size(value) -> int:
    """Bytes of arrays and tensors, also within tuples, lists, mappings and dataclasses; 8 for anything else."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.nbytes
    value = vars(value) if is_dataclass(value) else value
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(size, value)) if isinstance(value, tuple | list) else 8


def windows_key(windows: Windows) -> tuple:
    """A key that only equal windows share."""
    cut = windows.split, windows.context_length, windows.horizon, windows.step
    start = hashlib.sha256(windows.start.astype(np.int64).tobytes()).hexdigest()
    return windows.store.fingerprint, type(windows).__name__, *cut, start


def predictor_key(model: Predictor) -> tuple | None:
    """A key that only equal baselines share; None for a predictor that may hold more than its one buffer."""
    if type(model) not in (Constant, Linear, Weighted):
        return None
    (buffer,) = model.buffers()
    digest = hashlib.sha256(buffer.cpu().numpy().tobytes()).hexdigest()
    return type(model), model.dim, model.context_length, buffer.device, buffer.dtype, digest
