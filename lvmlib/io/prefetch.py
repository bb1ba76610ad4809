"""Reading rows of a memory-mapped array ahead of their use."""

from __future__ import annotations

import mmap

import numpy as np


def prefetch(mapped: np.ndarray, rows: np.ndarray, read) -> None:
    """Ask the system to load `rows` (B, R) of a memory-mapped array (M, D), if `read` (a tensor) is that map itself.

    Without it the system reads megabytes around each row, one row after the other.
    """
    area = mapped.base
    is_map = isinstance(mapped, np.memmap) and isinstance(area, mmap.mmap) and mapped.flags.c_contiguous
    # Windows has no madvise.
    if not is_map or not rows.size or read.data_ptr() != mapped.ctypes.data or not hasattr(mmap, "MADV_WILLNEED"):
        return
    offset = mapped.offset % mmap.ALLOCATIONGRANULARITY  # of the first value in the map
    begin = (offset + rows.min(1) * mapped.strides[0]) // mmap.PAGESIZE * mmap.PAGESIZE
    end = offset + (rows.max(1) + 1) * mapped.strides[0]
    for at, length in zip(begin.tolist(), (end - begin).tolist(), strict=True):
        area.madvise(mmap.MADV_WILLNEED, at, length)
