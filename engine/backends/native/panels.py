"""Packing of weights into panels of 16 rows, as the kernels of all backends read them.

A type's layout keeps its values exactly (engine/ops/layout.h). Types without a layout are rounded
to Q8_0 first. The error is at most 1/226 of the largest of 32 neighbours: half a step, plus the
rounding of the step itself to float16.
"""

from __future__ import annotations

import itertools
import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from engine import threads
from engine.backends.base import Array, WeightSource
from engine.backends.native.library import Library
from engine.backends.native.signatures import used_packed
from engine.backends.native.views import PACKED, write_view
from engine.formats.quants import WEIGHT_TYPES, DType, dequantize, quantize_q8_0
from engine.graph import Node, Tensor

_log = logging.getLogger(__name__)
_Q8_0 = WEIGHT_TYPES["Q8_0"]
# Bytes that one task packs: enough to be worth a call, and small enough to share among threads.
_TASK_BYTES = 1 << 20
# Bytes of weights that repay a further thread, and its 72 MiB of address space.
_THREAD_BYTES = 16 << 20
_SECONDS_BEFORE_BAR = 1


class PanelWeights(ABC):
    """The weights of a backend, by tensor: packed, or decoded to float32. Threads pack the next
    weights, up to `ahead_bytes`, while packed ones are kept."""

    def __init__(self, library: Library, n_threads: int, ahead_bytes: int) -> None:
        self._lib, self._rows = library, library.constant("panel_rows")
        self._n_threads, self._ahead_bytes = n_threads, ahead_bytes
        # What `_keep` returned; packed are the panels of matrices [out, in] or [X, out, in].
        self._packed: dict[Tensor, Any] = {}
        self._plain: dict[Tensor, Any] = {}

    def load(self, nodes: Sequence[Node], source: WeightSource) -> None:
        """Read and convert the weights of some nodes; shows progress when it takes long."""
        packed, plain = used_packed(nodes)
        for tensor in (t for t in plain if t not in self._plain):
            raw, factors = source.raw(tensor.name), source.factors(tensor.name)
            values = dequantize(tensor.dtype, raw, tensor.shape, factors)
            self._plain[tensor] = self._keep(values)
        for tensor, data in self._pack_all([t for t in packed if t not in self._packed], source):
            self._packed[tensor] = self._keep(data)
            self._rearrange(tensor)

    def _allocate(self, n_bytes: int) -> Array:
        """Memory of the host to pack a weight into."""
        return np.empty(n_bytes, np.uint8)

    @abstractmethod
    def _keep(self, values: Array) -> Any:
        """Bring a weight to where kernels read it."""

    def _rearrange(self, tensor: Tensor) -> None:  # noqa: B027
        """Change a packed weight in its place."""

    @abstractmethod
    def _address(self, kept: Any) -> int:
        """The address of a weight that was kept."""

    def _pack_all(
        self, tensors: Sequence[Tensor], source: WeightSource
    ) -> Iterator[tuple[Tensor, Array]]:
        """Pack weights and yield each when it is done."""
        self._warn_of_rounding(tensors)
        n_bytes = sum(t.nbytes for t in tensors)
        n_threads = min(self._n_threads, n_bytes // _THREAD_BYTES + 1)
        with (
            tqdm(total=n_bytes, unit="B", unit_scale=True, leave=False,
                 desc="loading weights", disable=None, delay=_SECONDS_BEFORE_BAR) as bar,
            threads.pool("threads that pack weights", n_threads) as pool,
        ):  # fmt: skip
            pending: deque[tuple[Tensor, Array, list[Future[None]]]] = deque()
            ahead = 0
            for tensor in tensors:
                data = self._allocate(self.packed_bytes(tensor))
                pending.append((tensor, data, self._pack(tensor, source, data, pool)))
                ahead += len(data)
                while pending and (tensor is tensors[-1] or ahead > self._ahead_bytes):
                    ready, data, tasks = pending.popleft()
                    for task in tasks:
                        task.result()
                    yield ready, data
                    ahead -= len(data)
                    bar.update(ready.nbytes)

    def _pack(
        self, tensor: Tensor, source: WeightSource, target: Array, pool: ThreadPoolExecutor
    ) -> list[Future[None]]:
        """Start the tasks that pack a weight into `target`, uint8. Each reads its own rows, so that
        a large weight is never in memory twice."""
        *lead, n_out, n_in = tensor.shape
        dtype = self.stored_as(tensor.dtype)
        panel, matrix_bytes = self.matrix_bytes(tensor)
        n_panels, n_matrices = matrix_bytes // panel, math.prod(lead)
        row_bytes = tensor.dtype.row_bytes(n_in)
        factors = np.broadcast_to(source.factors(tensor.name), n_matrices).tolist()

        def pack(matrix: int, begin: int, end: int) -> None:
            first = (matrix * n_out + begin * self._rows) * row_bytes
            last = (matrix * n_out + min(end * self._rows, n_out)) * row_bytes
            rows = source.raw(tensor.name, first, last)
            if dtype is not tensor.dtype:
                rows = quantize_q8_0(dequantize(tensor.dtype, rows, (-1, n_in)))
            n_rows = min(end * self._rows, n_out) - begin * self._rows
            address = target.ctypes.data + matrix * matrix_bytes + begin * panel
            self._lib.pack(
                dtype.ggml_id, rows.ctypes.data, n_rows, n_in, factors[matrix], address,
                0, end - begin,
            )  # fmt: skip

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

    def packed_bytes(self, tensor: Tensor) -> int:
        return math.prod(tensor.shape[:-2]) * self.matrix_bytes(tensor)[1]

    def part_bytes(self, tensor: Tensor, n_columns: int) -> int:
        return self._lib.panel_bytes(self.layout(tensor.dtype), n_columns)

    def bytes_of(self, nodes: Sequence[Node]) -> int:
        """Bytes of the weights of some nodes, packed or decoded."""
        packed, plain = used_packed(nodes)
        return sum(map(self.packed_bytes, packed)) + sum(4 * math.prod(t.shape) for t in plain)

    def write_packed(self, record: Any, tensor: Tensor, first: int = 0) -> None:
        """Fill a zeroed record of VIEW with a packed weight, from matrix number `first` on."""
        panel, matrix = self.matrix_bytes(tensor)
        strides = [panel] if len(tensor.shape) == 2 else [matrix, panel]
        address = self._address(self._packed[tensor.base]) + first * strides[0]
        layout = self.layout(tensor.dtype)
        write_view(record, address, tensor.shape, strides, PACKED, layout)

    def plain_or_zero(self, tensor: Tensor) -> int:
        """The address of a weight decoded to float32; 0 if it is only packed."""
        return self._address(self._plain[tensor]) if tensor in self._plain else 0

    def _warn_of_rounding(self, tensors: Sequence[Tensor]) -> None:
        for dtype in {t.dtype: None for t in tensors if self.stored_as(t.dtype) is not t.dtype}:
            rounded = [t for t in tensors if t.dtype is dtype]
            stored, kept = sum(t.nbytes for t in rounded), sum(map(self.packed_bytes, rounded))
            _log.warning(
                "%s is kept as Q8_0: %d tensors, %.1f MiB in the file, %.1f MiB in memory",
                dtype.name, len(rounded), stored / 2**20, kept / 2**20,
            )  # fmt: skip
