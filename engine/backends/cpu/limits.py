"""Peaks of the CPU: reads of memory far larger than any cache, and numpy's float32 products."""

from __future__ import annotations

import timeit
from collections.abc import Callable

import numpy as np

from engine.backends.base import Array, Limits

_READ_BYTES, _READ_ROW = 256 << 20, 64 << 10
_MATRIX = 2048
_REPEATS = 5


def measure(read: Callable[[Array], object]) -> Limits:
    """The best of a few tries. `read` reads float32 rows once with all threads."""
    rows = np.ones((_READ_BYTES // _READ_ROW, _READ_ROW // 4), np.float32)
    read_s = min(timeit.repeat(lambda: read(rows), number=1, repeat=_REPEATS))
    a = np.ones((_MATRIX, _MATRIX), np.float32)
    product = np.empty_like(a)
    multiplied = timeit.repeat(lambda: np.matmul(a, a, out=product), number=1, repeat=_REPEATS)
    flops = 2 * _MATRIX**3 / min(multiplied)
    return Limits(rows.nbytes / read_s, flops, "read; float32 products, numpy")
