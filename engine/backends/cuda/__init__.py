"""The CUDA backend. CuPy is imported when a GPU is asked for."""

from __future__ import annotations

from functools import cache

from engine.backends.base import Registration
from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.cupy_device import CupyDevice, missing
from engine.backends.cuda.driver import find_gpu

_missing = cache(missing)


def _describe() -> str:
    return f"no cuda ({why})" if (why := _missing()) else "cuda"


REGISTRATION = Registration(
    "cuda",
    CudaBackend.traits,
    make=lambda options: CudaBackend(
        CupyDevice(memory_mib=options.gpu_memory), options.batch_invariant
    ),
    missing=_missing,
    describe=_describe,
    hardware=lambda: find_gpu()[0],
)
