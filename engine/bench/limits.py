"""What this machine can do at best: a short probe of its bandwidth and its multiplication rate.

Memory far larger than any cache is read by a kernel on the CPU backend's own threads; the rate is
that of a float32 matrix product of the BLAS that numpy was built with.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.backends.cpu import CpuBackend

_READ_BYTES, _READ_ROW = 256 << 20, 64 << 10
_MATRIX = 2048
_REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """Bytes read and floating point operations done per second."""

    bytes_per_s: float
    flops_per_s: float


def measure_limits(n_threads: int) -> Limits:
    """The best of a few tries, about half a second in all."""
    rows = np.ones((_READ_BYTES // _READ_ROW, _READ_ROW // 4), np.float32)
    backend = CpuBackend(n_threads)
    read_s = _fastest(lambda: backend.read_probe(rows))
    a = np.ones((_MATRIX, _MATRIX), np.float32)
    product = np.empty_like(a)
    multiply_s = _fastest(lambda: np.matmul(a, a, out=product))
    return Limits(rows.nbytes / read_s, 2 * _MATRIX**3 / multiply_s)


def _fastest(action: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)
