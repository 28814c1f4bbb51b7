"""Weights as the CPU's kernels read them: packed panels for products and tables, else float32.

Each type is packed into a layout that keeps its values exactly (engine/ops/cpu/layout.h); types
that have none are rounded to Q8_0 first, which is off by at most 1/226 of the largest of 32
neighbours: half of a step, and what the step loses as a float16.
"""

from __future__ import annotations

import logging
import math
import mmap
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from engine.backends.cpu_library import Library
from engine.backends.lowering import PACKED, tensor_view, view
from engine.graph import Tensor
from engine.planner import WeightSource
from engine.quants import F32, WEIGHT_TYPES, DType, dequantize, quantize_q8_0

Array = NDArray[Any]
_log = logging.getLogger(__name__)
_ROWS = 16
_Q8_0 = WEIGHT_TYPES["Q8_0"]
# What one task packs: enough to be worth a call, and many for every thread.
_TASK_BYTES = 1 << 20
# Of tensors that are begun before the oldest is finished: enough to keep every thread busy.
_AHEAD_BYTES = 64 << 20
_SECONDS_BEFORE_BAR = 1
_MAP_BYTES = 256 << 20


@dataclass(frozen=True)
class Packed:
    """A matrix [out, in], or matrices [X, out, in], in panels of 16 rows."""

    data: Array
    layout: int
    matrix_bytes: int
    panel_bytes: int


class CpuWeights:
    """Packs weights and keeps them, by tensor."""

    def __init__(self, library: Library, n_threads: int) -> None:
        self._lib, self._n_threads = library, n_threads
        self._memory = _Memory()
        self._packed: dict[Tensor, Packed] = {}
        self._plain: dict[Tensor, Array] = {}

    def load(self, packed: Sequence[Tensor], plain: Sequence[Tensor], source: WeightSource) -> None:
        """Read and convert weights; shows progress when it takes long."""
        for tensor in plain:
            if tensor not in self._plain:
                values = dequantize(tensor.dtype, source.raw(tensor.name), tensor.shape)
                self._plain[tensor] = np.ascontiguousarray(values)
        todo = [t for t in packed if t not in self._packed]
        self._warn_of_rounding(todo)
        total = sum(t.nbytes for t in todo)
        with (
            tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", leave=False,
                 disable=None, delay=_SECONDS_BEFORE_BAR) as bar,
            ThreadPoolExecutor(self._n_threads) as pool,
        ):  # fmt: skip
            pending: deque[tuple[int, list[Future[None]]]] = deque()
            for tensor in todo:
                pending.append((tensor.nbytes, self._pack(tensor, source, pool)))
                while pending and (tensor is todo[-1] or sum(n for n, _ in pending) > _AHEAD_BYTES):
                    n_bytes, tasks = pending.popleft()
                    for task in tasks:
                        task.result()
                    bar.update(n_bytes)

    def _pack(
        self, tensor: Tensor, source: WeightSource, pool: ThreadPoolExecutor
    ) -> list[Future[None]]:
        """Find room for a weight and begin to pack it; its bytes' pages are let go piece by piece,
        so that a large one is never in memory twice."""
        *lead, n_out, n_in = tensor.shape
        raw, dtype = source.raw(tensor.name), self._stored_as(tensor.dtype)
        panel, matrix_bytes = self._matrix_bytes(tensor)
        n_panels, n_matrices = matrix_bytes // panel, math.prod(lead)
        data = self._memory.take(n_matrices * matrix_bytes)
        row_bytes = tensor.dtype.row_bytes(n_in)

        def pack(matrix: int, begin: int, end: int) -> None:
            first = (matrix * n_out + begin * _ROWS) * row_bytes
            last = (matrix * n_out + min(end * _ROWS, n_out)) * row_bytes
            rows = raw[first:last]
            if dtype is not tensor.dtype:
                rows = quantize_q8_0(dequantize(tensor.dtype, rows, (-1, n_in)))
            n_rows = min(end * _ROWS, n_out) - begin * _ROWS
            target = data.ctypes.data + matrix * matrix_bytes + begin * panel
            address = rows.ctypes.data
            self._lib.pack(dtype.ggml_id, address, n_rows, n_in, target, 0, end - begin)
            source.release(tensor.name, first, last)

        layout = self._lib.layout_of(dtype.ggml_id)
        self._packed[tensor] = Packed(data, layout, matrix_bytes, panel)
        tasks = _tasks(n_matrices, n_panels, max(1, _TASK_BYTES // panel))
        return [pool.submit(pack, *task) for task in tasks]

    def _matrix_bytes(self, tensor: Tensor) -> tuple[int, int]:
        """Bytes of a panel, and of a whole matrix."""
        layout = self._lib.layout_of(self._stored_as(tensor.dtype).ggml_id)
        panel = self._lib.panel_bytes(layout, tensor.shape[-1])
        return panel, -(-tensor.shape[-2] // _ROWS) * panel

    def packed_bytes(self, tensor: Tensor) -> int:
        """Bytes of a weight when it is packed."""
        return math.prod(tensor.shape[:-2]) * self._matrix_bytes(tensor)[1]

    def _warn_of_rounding(self, tensors: Sequence[Tensor]) -> None:
        for dtype in {t.dtype: None for t in tensors if self._stored_as(t.dtype) is not t.dtype}:
            rounded = [t for t in tensors if t.dtype is dtype]
            stored, kept = sum(t.nbytes for t in rounded), sum(map(self.packed_bytes, rounded))
            _log.warning(
                "%s is kept as Q8_0: %d tensors, %.1f MiB in the file, %.1f MiB in memory",
                dtype.name, len(rounded), stored / 2**20, kept / 2**20,
            )  # fmt: skip

    def _stored_as(self, dtype: DType) -> DType:
        return dtype if self._lib.layout_of(dtype.ggml_id) >= 0 else _Q8_0

    def packed_view(self, tensor: Tensor) -> Array:
        """The view of a packed weight: strides in bytes, of matrices and panels."""
        p = self._packed[tensor]
        strides = [p.panel_bytes] if len(tensor.shape) == 2 else [p.matrix_bytes, p.panel_bytes]
        return view(p.data.ctypes.data, tensor.shape, strides, PACKED, p.layout)

    def plain_view(self, tensor: Tensor) -> Array:
        """The view of a weight decoded to float32, or of a part of one."""
        return tensor_view(tensor, self._plain[tensor.base].ctypes.data, F32)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are kept."""
        packed = sum(p.data.nbytes for p in self._packed.values())
        return packed + sum(a.nbytes for a in self._plain.values())


def _tasks(n_matrices: int, n_panels: int, step: int) -> Iterator[tuple[int, int, int]]:
    for matrix in range(n_matrices):
        for begin in range(0, n_panels, step):
            yield matrix, begin, min(begin + step, n_panels)


class _Memory:
    """Hands out memory of large anonymous maps in huge pages, which the system provides when they
    are first written: with small ones, weights stream through more page tables than a TLB holds."""

    def __init__(self) -> None:
        self._left = np.empty(0, np.uint8)

    def take(self, n_bytes: int) -> Array:
        """An array of bytes whose address is a multiple of 64."""
        size = -(-n_bytes // 64) * 64
        if size > len(self._left):
            pages = mmap.mmap(-1, max(size, _MAP_BYTES))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                pages.madvise(mmap.MADV_HUGEPAGE)
            self._left = np.frombuffer(pages, np.uint8)
        taken, self._left = self._left[:n_bytes], self._left[size:]
        return taken
