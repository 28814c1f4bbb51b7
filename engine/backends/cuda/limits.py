"""Peaks of a GPU: a copy within its memory, read and written, and a bfloat16 product by cuBLAS."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engine.backends.base import Limits
from engine.backends.cuda.device import Device, Gemm

_COPY_BYTES, _MATRIX = 1 << 30, 8192
_REPEATS = 5


def measure(device: Device) -> Limits:
    """The best of a few tries."""
    size, n = _COPY_BYTES, _MATRIX
    memory, target = device.allocate(size), device.allocate(size)
    # Random bfloat16 numbers below 1: products of zeros take less power.
    values = np.random.default_rng(0).integers(0x3C00, 0x3F80, n * n, np.uint16)
    device.upload(memory.address, values)
    product = Gemm(target.address, memory.address, memory.address, n, n, n)
    copy_s = min(timed(device, lambda: device.copy(target.address, memory.address, size)))
    multiply_s = min(timed(device, lambda: device.gemm(product)))
    peaks = {"bfloat16 products, cuBLAS": 2 * n**3 / multiply_s}
    return Limits(2 * size / copy_s, peaks, "copied")


def timed(device: Device, action: Callable[[], object], n_times: int = _REPEATS) -> Sequence[float]:
    """The seconds of each of several calls, after one that does not count."""
    action()
    timer = device.timer()
    for _ in range(n_times):
        action()
        timer.mark()
    return timer.seconds()
