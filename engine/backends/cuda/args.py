"""The argument of every CUDA kernel, laid out as the structs of engine/ops/cuda/kernel.cuh."""

from __future__ import annotations

import numpy as np

from engine.backends.native.views import MAX_RANK

# Operands and attributes of a kernel, at most.
MAX_VIEWS, MAX_ATTRS = 22, 12
VIEW = np.dtype(
    [("data", "u8"), ("shape", "i4", MAX_RANK), ("stride", "i4", MAX_RANK)]
    + [(name, "i1") for name in ("rank", "dtype", "dim", "layout")]
    + [("head", "i4")]
)
ARGS = np.dtype([("v", VIEW, MAX_VIEWS), ("attr", "f4", MAX_ATTRS), ("live", "u8")])
