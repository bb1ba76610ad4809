"""What was computed in this process and may be asked for again: bounded in bytes, the longest unused goes first.

Nothing is written to disk. Arrays and frames are shared, not copied: whoever hands them on copies them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping

import numpy as np
import pandas as pd
import torch

from ..baselines import Constant, Linear, Weighted
from ..models import Predictor
from ..windows import Windows

MOST = 1 << 28  # bytes
PLAIN = (Constant, Linear, Weighted)  # predictors that are their class and their buffers, and nothing else


class Kept:
    """Values by key; `most` bytes of them. A larger value is made anew each time."""

    def __init__(self, most: int = MOST):
        self.most, self.values = most, OrderedDict()

    def __call__(self, key: Hashable, make: Callable):
        """The value of `key`, made by `make()` where it is not there."""
        if key in self.values:
            self.values.move_to_end(key)
            return self.values[key]
        value = make()
        if size(value) <= self.most:
            self.values[key] = value
            while sum(map(size, self.values.values())) > self.most:
                self.values.popitem(last=False)
        return value


kept = Kept()


def size(value) -> int:
    """Bytes of arrays, tensors and frames, also within tuples, lists and mappings; a word for anything else."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.nbytes
    if isinstance(value, pd.DataFrame):
        return int(value.memory_usage().sum())
    if isinstance(value, Mapping):
        return sum(map(size, value.values()))
    return sum(map(size, value)) if isinstance(value, tuple | list) else 8


def windows_key(windows: Windows) -> tuple:
    """What tells these windows from all others: the store by its fingerprint, and how and where they are cut."""
    cut = windows.context_length, windows.horizon, windows.step
    start = hashlib.sha256(np.ascontiguousarray(windows.start, np.int64).data).hexdigest()
    return windows.store.fingerprint, type(windows).__name__, windows.split, *cut, start


def predictor_key(model: Predictor) -> tuple | None:
    """What tells a trivial predictor from all others: its class, its weights and where they lie; None for a predictor
    that may hold more than that."""
    if type(model) not in PLAIN:
        return None
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    device = next(iter(model.buffers())).device
    return type(model).__name__, model.dim, model.context_length, str(device), digest.hexdigest()
