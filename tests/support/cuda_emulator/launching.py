"""Launches single kernels on numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.cuda.args import ARGS
from engine.backends.cuda.device import Device, Grid, Memory
from engine.backends.native.views import DTYPES, F32_CODE
from engine.formats.quants import F16, F32, I32

Array = NDArray[Any]
_CODES = {"float32": DTYPES[F32], "float16": DTYPES[F16], "int32": DTYPES[I32]}


def launch(
    device: Device,
    source: str,
    kernel: str,
    arrays: Sequence[Array | None],
    attrs: Sequence[float] = (),
    *,
    threads: int,
    grid: Grid = (1, 1, 1),
    shared: int = 0,
    live: Sequence[int] = (0, 0, 0, 0, 0),
) -> None:
    """Run a kernel on copies of arrays, and copy back what it made of them."""
    args, memory = np.zeros((), ARGS), list[Memory | None]()
    for i, array in enumerate(arrays):
        if array is None:
            memory.append(None)
            continue
        memory.append(held := device.allocate(array.nbytes))
        device.upload(held.address, array)
        view = args["v"][i]
        view["data"], view["rank"] = held.address, array.ndim
        view["shape"][: array.ndim] = array.shape
        view["stride"][: array.ndim] = [s // array.itemsize for s in array.strides]
        view["dtype"] = _CODES.get(array.dtype.name, F32_CODE)
    counts = device.allocate(4 * len(live))
    device.upload(counts.address, np.array(live, np.int32))
    args["attr"][: len(attrs)], args["live"] = attrs, counts.address
    function = device.function(source, kernel, shared)
    device.launch(function, grid, threads, shared, args.ctypes.data)
    device.synchronize()
    for array, copy in zip(arrays, memory, strict=True):
        if array is not None:
            assert copy is not None
            device.download(copy.address, array)
