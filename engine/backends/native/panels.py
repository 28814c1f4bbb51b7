"""Packing of weights into panels of 16 rows, as the kernels of all backends read them.

A type's layout keeps its values exactly (engine/ops/layout.h). Types without a layout are rounded
to Q8_0 first. The error is at most 1/226 of the largest of 32 neighbours: half a step, plus the
rounding of the step itself to float16.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from tqdm import tqdm

from engine.backends.base import Array, WeightSource
from engine.backends.native.library import Library
from engine.formats.quants import WEIGHT_TYPES, DType, dequantize, quantize_q8_0
from engine.graph import Tensor

_log = logging.getLogger(__name__)
_Q8_0 = WEIGHT_TYPES["Q8_0"]
# Bytes that one task packs: enough to be worth a call, and small enough to share among threads.
_TASK_BYTES = 1 << 20
_SECONDS_BEFORE_BAR = 1


class Panels:
    """Sizes of packed weights, and the packing itself."""

    def __init__(self, library: Library) -> None:
        self._lib, self._rows = library, library.constant("panel_rows")

    def pack_all(
        self,
        tensors: Sequence[Tensor],
        source: WeightSource,
        n_threads: int,
        ahead_bytes: int,
        allocate: Callable[[Tensor, int], Array],
    ) -> Iterator[tuple[Tensor, Array]]:
        """Pack weights into what `allocate(tensor, n_bytes)` returns; yield each when it is done.

        Meanwhile the next weights, up to `ahead_bytes`, are packed. Shows progress when slow.
        """
        self._warn_of_rounding(tensors)
        with (
            tqdm(total=sum(t.nbytes for t in tensors), unit="B", unit_scale=True, leave=False,
                 desc="loading weights", disable=None, delay=_SECONDS_BEFORE_BAR) as bar,
            ThreadPoolExecutor(n_threads) as pool,
        ):  # fmt: skip
            pending: deque[tuple[Tensor, Array, list[Future[None]]]] = deque()
            for tensor in tensors:
                data = allocate(tensor, self.packed_bytes(tensor))
                pending.append((tensor, data, self._pack(tensor, source, data, pool)))
                ahead = sum(len(data) for _, data, _ in pending)
                while pending and (tensor is tensors[-1] or ahead > ahead_bytes):
                    ready, data, tasks = pending.popleft()
                    for task in tasks:
                        task.result()
                    yield ready, data
                    ahead -= len(data)
                    bar.update(ready.nbytes)

    def _pack(
        self, tensor: Tensor, source: WeightSource, target: Array, pool: ThreadPoolExecutor
    ) -> list[Future[None]]:
        """Start the tasks that pack a weight into `target`, uint8. Each releases the file's pages
        that it has read, so that a large weight is never in memory twice."""
        *lead, n_out, n_in = tensor.shape
        raw, dtype = source.raw(tensor.name), self.stored_as(tensor.dtype)
        panel, matrix_bytes = self.matrix_bytes(tensor)
        n_panels, n_matrices = matrix_bytes // panel, math.prod(lead)
        row_bytes = tensor.dtype.row_bytes(n_in)

        def pack(matrix: int, begin: int, end: int) -> None:
            first = (matrix * n_out + begin * self._rows) * row_bytes
            last = (matrix * n_out + min(end * self._rows, n_out)) * row_bytes
            rows = raw[first:last]
            if dtype is not tensor.dtype:
                rows = quantize_q8_0(dequantize(tensor.dtype, rows, (-1, n_in)))
            n_rows = min(end * self._rows, n_out) - begin * self._rows
            address = target.ctypes.data + matrix * matrix_bytes + begin * panel
            self._lib.pack(dtype.ggml_id, rows.ctypes.data, n_rows, n_in, address, 0, end - begin)
            source.release(tensor.name, first, last)

        step = max(1, _TASK_BYTES // panel)
        tasks = itertools.product(range(n_matrices), range(0, n_panels, step))
        return [pool.submit(pack, m, i, min(i + step, n_panels)) for m, i in tasks]

    def layout(self, dtype: DType) -> int:
        """The number of the layout that a type is packed into."""
        return self._lib.layout_of(self.stored_as(dtype).ggml_id)

    def stored_as(self, dtype: DType) -> DType:
        """The type in whose layout a type is stored."""
        return dtype if self._lib.layout_of(dtype.ggml_id) >= 0 else _Q8_0

    def matrix_bytes(self, tensor: Tensor) -> tuple[int, int]:
        """Bytes of a panel, and of a whole matrix."""
        panel = self._lib.panel_bytes(self.layout(tensor.dtype), tensor.shape[-1])
        return panel, -(-tensor.shape[-2] // self._rows) * panel

    def strides(self, tensor: Tensor) -> list[int]:
        """Bytes between matrices, if there are several, and between panels."""
        panel, matrix = self.matrix_bytes(tensor)
        return [panel] if len(tensor.shape) == 2 else [matrix, panel]

    def part_bytes(self, tensor: Tensor, n_columns: int) -> int:
        """Bytes of so many columns of a panel."""
        return self._lib.panel_bytes(self.layout(tensor.dtype), n_columns)

    def packed_bytes(self, tensor: Tensor) -> int:
        """Bytes of a weight when it is packed."""
        return math.prod(tensor.shape[:-2]) * self.matrix_bytes(tensor)[1]

    def _warn_of_rounding(self, tensors: Sequence[Tensor]) -> None:
        """Warn of the types that have no layout of their own."""
        for dtype in {t.dtype: None for t in tensors if self.stored_as(t.dtype) is not t.dtype}:
            rounded = [t for t in tensors if t.dtype is dtype]
            stored, kept = sum(t.nbytes for t in rounded), sum(map(self.packed_bytes, rounded))
            _log.warning(
                "%s is kept as Q8_0: %d tensors, %.1f MiB in the file, %.1f MiB in memory",
                dtype.name, len(rounded), stored / 2**20, kept / 2**20,
            )  # fmt: skip
