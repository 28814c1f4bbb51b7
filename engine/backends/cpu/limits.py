"""Peaks of the CPU, by kernels of its own: reads of memory, and arithmetic in registers.

Memory is far larger than caches of one processor; where a server's cache is as large, reads from it
count, as they do in a step.
"""

from __future__ import annotations

import os
import timeit
from collections.abc import Callable
from functools import partial

import numpy as np

from engine.backends.base import Array, Limits

_READ_BYTES, _READ_ROW = 256 << 20, 64 << 10
_REPEATS = 5
# Arithmetic units, as PEAK_PROBE numbers them. All kernels compute in float32 beside them.
UNITS = ("float32", "int8 dot", "bfloat16 dot", "int8 tiles", "bfloat16 tiles")
_PRODUCTS = ("MUL_MAT", "MUL_MAT_ID")
# The fastest unit of an op's kernels, if it is not float32.
_UNIT_OF = {
    "amx": dict.fromkeys(("MUL_MAT", "ATTENTION", "GATED_DELTA_NET"), "bfloat16 tiles")
    | {"MUL_MAT_ID": "int8 tiles"},
    "avx512": dict.fromkeys(_PRODUCTS, "int8 dot"),
    "avx2": dict.fromkeys(_PRODUCTS, "int8 dot"),
    "portable": {},
}
_LEAST_SECONDS = 8e-3  # Of a try, so that starting the threads is nothing beside it.


def measure(
    isa: str, read: Callable[[Array], object], operate: Callable[[int, int], tuple[float, float]]
) -> Limits:
    """The best of a few tries of the kernels of `isa`. `read` reads float32 rows once with all
    threads. `operate(unit, turns)` returns the operations that all threads did, 0 if there is no
    such unit, and the seconds."""
    rows = np.ones((_READ_BYTES // _READ_ROW, _READ_ROW // 4), np.float32)
    read_s = min(timeit.repeat(lambda: read(rows), number=1, repeat=_REPEATS))
    rates = {unit: _rate(partial(operate, i)) for i, unit in enumerate(UNITS)}
    there = {unit: rate for unit, rate in rates.items() if rate}
    return Limits(rows.nbytes / read_s, there, "read", _UNIT_OF[isa], _cache_bytes())


def _cache_bytes() -> int | None:
    """Bytes of the third-level cache, or of the second where the system names no third."""
    names = ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE")
    sizes = (os.sysconf(name) for name in names if name in os.sysconf_names)
    return next((size for size in sizes if size > 0), None)


def _rate(operate: Callable[[int], tuple[float, float]]) -> float:
    """Operations per second, the best of a few tries of the same length."""
    turns, seconds = 1024, 0.0
    while seconds < _LEAST_SECONDS:
        turns *= 4
        # One try alone could be long because its threads were held up.
        n, seconds = min((operate(turns) for _ in range(3)), key=lambda tried: tried[1])
        if not n:
            return 0.0
    return max(n / s for n, s in (operate(turns) for _ in range(_REPEATS)))
