"""Cache of results in this process. Values are shared, not copied: a caller that hands them on copies them."""

from __future__ import annotations

import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np

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
            size = len(pickle.dumps(value))
            if size > self.max_bytes:
                return value
            while size + sum(other for _, other in self.values.values()) > self.max_bytes:
                self.values.popitem(last=False)
            self.values[key] = value, size
        self.values.move_to_end(key)
        return self.values[key][0]


cached = Cache()


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
