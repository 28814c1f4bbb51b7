"""What this machine can do at best: a short probe of its bandwidth and its multiplication rate.

Both are what numpy reaches: reads of memory far larger than any cache, spread over threads, and a
float32 matrix product of the BLAS it was built with.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

_READ_BYTES = 256 << 20
_MATRIX = 2048
_REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """Bytes read and floating point operations done per second."""

    bytes_per_s: float
    flops_per_s: float


def measure_limits(n_threads: int) -> Limits:
    """The best of a few tries, about half a second in all."""
    part = np.ones(_READ_BYTES // n_threads, np.uint8)
    parts = [part, *(part.copy() for _ in range(n_threads - 1))]
    with ThreadPoolExecutor(n_threads) as pool:
        read_s = _fastest(lambda: list(pool.map(np.max, parts)))
    a = np.ones((_MATRIX, _MATRIX), np.float32)
    product = np.empty_like(a)
    multiply_s = _fastest(lambda: np.matmul(a, a, out=product))
    return Limits(len(parts) * part.nbytes / read_s, 2 * _MATRIX**3 / multiply_s)


def _fastest(action: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)
