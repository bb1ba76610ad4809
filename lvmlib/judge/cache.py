"""Results of this process that are asked for again: bounded in bytes, the least recently used is dropped first.

Nothing is written to disk. Values are shared, not copied: a caller that hands them on copies them.
"""

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

MAX_BYTES = 1 << 28
PLAIN = (Constant, Linear, Weighted)  # predictors that consist of their class and their buffers, and nothing else


class Cache:
    """Values by key, at most `max_bytes` of them. A larger value is computed each time."""

    def __init__(self, max_bytes: int = MAX_BYTES):
        self.max_bytes, self.values = max_bytes, OrderedDict()

    def __call__(self, key: Hashable, compute: Callable):
        """The value of `key`; `compute()` where there is none."""
        if key in self.values:
            self.values.move_to_end(key)
            return self.values[key]
        value = compute()
        if size(value) <= self.max_bytes:
            self.values[key] = value
            while sum(map(size, self.values.values())) > self.max_bytes:
                self.values.popitem(last=False)
        return value


cached = Cache()


def size(value) -> int:
    """Bytes of arrays and tensors, also within tuples, lists, mappings and dataclasses; 8 for anything else."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.nbytes
    value = vars(value) if is_dataclass(value) else value
    if isinstance(value, Mapping):
        return sum(map(size, value.values()))
    return sum(map(size, value)) if isinstance(value, tuple | list) else 8


def windows_key(windows: Windows) -> tuple:
    """A key that only equal windows share: the fingerprint of the store, and how and where they are cut."""
    cut = windows.context_length, windows.horizon, windows.step
    start = hashlib.sha256(np.ascontiguousarray(windows.start, np.int64).data).hexdigest()
    return windows.store.fingerprint, type(windows).__name__, windows.split, *cut, start


def predictor_key(model: Predictor) -> tuple | None:
    """A key that only equal baselines share: class, weights, device. None for a predictor that may hold more."""
    if type(model) not in PLAIN:
        return None
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    device = next(iter(model.buffers())).device
    return type(model).__name__, model.dim, model.context_length, str(device), digest.hexdigest()
