"""Operands as kernels see them: records laid out as the structs of engine/ops/cpu/kernel.h."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.formats.quants import F16, F32, I32, DType
from engine.graph import Dim, Tensor

MAX_RANK = 4
# As Dim and DType in kernel.h.
DIMS = ("", "n_tokens", "n_seqs", "n_seqs + 1", "n_outputs")
F32_CODE, F16_CODE, I32_CODE, I8, PACKED, BF16 = range(6)
DTYPES = {F32: F32_CODE, F16: F16_CODE, I32: I32_CODE}
VIEW = np.dtype(
    [
        ("data", "u8"),
        ("shape", "i8", MAX_RANK),
        ("stride", "i8", MAX_RANK),
        ("rank", "i4"),
        ("dtype", "i4"),
        ("dim", "i4"),
        ("layout", "i4"),
    ]
)
INSTRUCTION = np.dtype([("kernel", "u8"), ("views", "u8"), ("attrs", "u8"), ("barrier", "i8")])


def view(
    address: int,
    shape: Iterable[int],
    strides: Iterable[int],
    dtype: int,
    layout: int = 0,
) -> NDArray[Any]:
    """A record of VIEW; strides count elements, or bytes where the dtype is PACKED."""
    record = np.zeros((), VIEW)
    shape, strides = tuple(shape), tuple(strides)
    record["data"], record["rank"] = address, len(shape)
    record["shape"][: len(shape)] = shape
    record["stride"][: len(strides)] = strides
    record["dtype"], record["layout"] = dtype, layout
    first = shape[0] if shape else 0
    record["dim"] = DIMS.index(first.name) if isinstance(first, Dim) and first.name in DIMS else 0
    return record


def tensor_view(tensor: Tensor, base_address: int, dtype: DType | None = None) -> NDArray[Any]:
    """The view of a plain tensor whose base lies at an address."""
    code = DTYPES[dtype or tensor.dtype]
    item = 2 if code == F16_CODE else 4
    return view(base_address + tensor.offset * item, tensor.shape, tensor.strides, code)


def view_key(x: Tensor) -> tuple[Any, ...]:
    """Equal for views of the same part of a tensor."""
    return (x.base, x.offset, x.shape, x.strides)
