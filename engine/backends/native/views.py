"""Operands as kernels read them: records laid out as the structs of engine/ops/cpu/kernel.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.formats.quants import F16, F32, I32
from engine.graph import Dim, Tensor

MAX_RANK = 4
# As Dim and DType in engine/ops/view.h.
DIMS = ("", "n_tokens", "n_seqs", "n_seqs + 1", "n_outputs")
F32_CODE, F16_CODE, I32_CODE, I8, PACKED, BF16 = range(6)
DTYPES = {F32: F32_CODE, F16: F16_CODE, I32: I32_CODE}
# Bytes of an element, by code.
ITEM_BYTES = {F32_CODE: 4, F16_CODE: 2, I32_CODE: 4, I8: 1, BF16: 2}
VIEW = np.dtype(
    [("data", "u8"), ("shape", "i8", MAX_RANK), ("stride", "i8", MAX_RANK)]
    + [(name, "i4") for name in ("rank", "dtype", "dim", "layout")]
)
INSTRUCTION = np.dtype([("kernel", "u8"), ("views", "u8"), ("attrs", "u8"), ("barrier", "i8")])
# Constants that a loaded library must have with the same values.
CONSTANTS = {
    "sizeof_view": VIEW.itemsize, "sizeof_instruction": INSTRUCTION.itemsize,
    "F32": F32_CODE, "F16": F16_CODE, "I32": I32_CODE, "I8": I8, "PACKED": PACKED, "BF16": BF16,
    **{name.upper().replace(" + ", "_"): i for i, name in enumerate(DIMS) if name},
}  # fmt: skip


def write_view(
    record: Any, data: int, shape: Sequence[int], strides: Sequence[int], code: int, layout: int = 0
) -> None:
    """Fill a zeroed record of VIEW, the CPU's or CUDA's. data: an address. code: of a dtype;
    strides count elements, or bytes if it is PACKED."""
    record["data"], record["rank"] = data, len(shape)
    record["shape"][: len(shape)] = shape
    record["stride"][: len(strides)] = strides
    record["dtype"], record["layout"] = code, layout
    first = shape[0] if shape else 0
    if isinstance(first, Dim) and first.name in DIMS:
        record["dim"] = DIMS.index(first.name)


def view_key(x: Tensor) -> tuple[Any, ...]:
    """Equal for views of the same part of a tensor."""
    return (x.base, x.offset, x.shape, x.strides)
