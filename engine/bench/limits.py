"""A short probe of this machine's limits: its memory bandwidth and its matrix rate.

On the CPU, a kernel reads memory far larger than any cache on the backend's threads; the matrix
rate is that of a float32 product in numpy's BLAS. On a GPU, the bandwidth is that of a copy within
its memory (bytes read plus bytes written), the rate that of a bfloat16 product by cuBLAS.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.backends.base import Backend
from engine.backends.cpu.backend import CpuBackend
from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.device import Device, Gemm

_READ_BYTES, _READ_ROW = 256 << 20, 64 << 10
_COPY_BYTES = 1 << 30
_MATRIX, _GPU_MATRIX = 2048, 8192
_REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """Bytes moved and floating point operations per second; `what` names the two probes."""

    bytes_per_s: float
    flops_per_s: float
    what: str


def measure_limits(backend: Backend, n_threads: int) -> Limits:
    """The best of a few tries, about half a second in all, of what a backend runs on."""
    if isinstance(backend, CudaBackend):
        return _limits_of_device(backend.device)
    rows = np.ones((_READ_BYTES // _READ_ROW, _READ_ROW // 4), np.float32)
    cpu = CpuBackend(n_threads)
    read_s = _fastest(lambda: cpu.read_probe(rows))
    a = np.ones((_MATRIX, _MATRIX), np.float32)
    product = np.empty_like(a)
    multiply_s = _fastest(lambda: np.matmul(a, a, out=product))
    flops = 2 * _MATRIX**3 / multiply_s
    return Limits(rows.nbytes / read_s, flops, "read; float32 products, numpy")


def _limits_of_device(device: Device) -> Limits:
    size, n = _COPY_BYTES, _GPU_MATRIX
    memory, target = device.allocate(size), device.allocate(size)
    # Random bfloat16 numbers below 1: products of zeros take less power.
    values = np.random.default_rng(0).integers(0x3C00, 0x3F80, n * n, np.uint16)
    device.upload(memory.address, values)
    product = Gemm(target.address, memory.address, memory.address, n, n, n)
    copy_s = _fastest_on(device, lambda: device.copy(target.address, memory.address, size))
    multiply_s = _fastest_on(device, lambda: device.gemm(product))
    return Limits(2 * size / copy_s, 2 * n**3 / multiply_s, "copied; bfloat16 products, cuBLAS")


def _fastest_on(device: Device, action: Callable[[], object]) -> float:
    action()
    timer = device.timer()
    for _ in range(_REPEATS):
        action()
        timer.mark()
    return min(timer.seconds())


def _fastest(action: Callable[[], object]) -> float:
    return min(timeit.repeat(action, number=1, repeat=_REPEATS))
