"""Weights on the GPU: in panels, as on the CPU, or decoded to float32.

Threads pack on the host while what is ready travels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.backends.base import Array, WeightSource
from engine.backends.cuda.args import ARGS, VIEW
from engine.backends.cuda.device import Device, Grid, Memory
from engine.backends.native.library import Library, n_cores
from engine.backends.native.panels import Panels
from engine.backends.native.views import BF16, PACKED, write_view
from engine.formats.quants import dequantize
from engine.graph import Tensor

# Of packed weights that wait for their turn on the bus.
_AHEAD_BYTES = 256 << 20
# Rows of a panel and columns of a k-block, as in engine/ops/layout.h; the library confirms them.
PANEL, RECORD = 16, 32
_MAX_GRID = 65535


@dataclass(frozen=True)
class Packed:
    """A matrix [out, in], or matrices [X, out, in], in panels of 16 rows on the device."""

    memory: Memory
    layout: int
    matrix_bytes: int
    panel_bytes: int


class CudaWeights:
    """Packs weights, uploads and keeps them, by tensor.

    bf16_bytes: what copies in bfloat16 may take; by default half of the memory that is free when
    the first one is asked for.
    """

    def __init__(self, device: Device, library: Library, bf16_bytes: int | None = None) -> None:
        self._device, self._panels = device, Panels(library)
        assert (library.constant("panel_rows"), library.constant("k_block")) == (PANEL, RECORD)
        self._packed: dict[Tensor, Packed] = {}
        self._plain: dict[Tensor, Memory] = {}
        self._bf16: dict[Tensor, Memory] = {}
        self._bf16_left = bf16_bytes

    def load(self, packed: Sequence[Tensor], plain: Sequence[Tensor], source: WeightSource) -> None:
        """Read, convert and upload weights; shows progress when it takes long."""
        for tensor in (t for t in plain if t not in self._plain):
            values = dequantize(tensor.dtype, source.raw(tensor.name), tensor.shape)
            self._plain[tensor] = self._upload(values)
        todo = [t for t in packed if t not in self._packed]
        for tensor, data in self._panels.pack_all(todo, source, n_cores(), _AHEAD_BYTES, _room):
            self._keep(tensor, self._upload(data))

    def _keep(self, tensor: Tensor, memory: Memory) -> None:
        panel, matrix = self._panels.matrix_bytes(tensor)
        self._packed[tensor] = Packed(memory, self._panels.layout(tensor.dtype), matrix, panel)
        n_records, n_panels = -(-tensor.shape[-1] // RECORD), matrix // panel
        n_matrices = math.prod(tensor.shape[:-2])
        for first in range(0, n_matrices, _MAX_GRID):
            n = min(_MAX_GRID, n_matrices - first)
            self._run("repack", [self._view(tensor, first)], (n_records, n_panels, n), 128)

    def _upload(self, values: Array) -> Memory:
        memory = self._device.allocate(values.nbytes)
        self._device.upload(memory.address, values)
        return memory

    def packed_bytes(self, tensor: Tensor) -> int:
        """Bytes of a weight when it is packed."""
        return self._panels.packed_bytes(tensor)

    def part_bytes(self, tensor: Tensor, n_columns: int) -> int:
        """Bytes of so many columns of a panel of a weight."""
        return self._panels.part_bytes(tensor, n_columns)

    def plain_bytes(self, tensor: Tensor) -> int:
        """Bytes of a weight when it is decoded to float32."""
        return math.prod(tensor.shape) * 4

    def packed_strides(self, tensor: Tensor) -> tuple[int, list[int], int, int]:
        """A packed weight's address, strides in bytes (of matrices and panels), dtype, layout."""
        p = self._packed[tensor.base]
        strides = [p.panel_bytes] if len(tensor.shape) == 2 else [p.matrix_bytes, p.panel_bytes]
        return p.memory.address, strides, PACKED, p.layout

    def plain_or_zero(self, tensor: Tensor) -> int:
        """The address of a weight decoded to float32; 0 if it is only packed."""
        return self._plain[tensor.base].address if tensor.base in self._plain else 0

    def keep_bf16(self, tensor: Tensor) -> bool:
        """Make a weight's copy in bfloat16, which `bf16` gives, if there is room."""
        if tensor.base in self._bf16:
            return True
        if self._bf16_left is None:
            self._bf16_left = self._device.free_bytes() // 2
        n_bytes = math.prod(tensor.shape) * 2
        if n_bytes > self._bf16_left:
            return False
        memory = self._device.allocate(n_bytes)
        copy = np.zeros((), VIEW)
        write_view(copy, memory.address, tensor.shape, (tensor.shape[1], 1), BF16)
        self._run("expand", [copy, self._view(tensor)], expand_grid(tensor), 256)
        self._bf16_left -= n_bytes
        self._bf16[tensor.base] = memory
        return True

    def bf16(self, tensor: Tensor) -> int:
        """The address of a weight's copy [out, in] in bfloat16."""
        return self._bf16[tensor.base].address

    def _view(self, tensor: Tensor, first: int = 0) -> Array:
        """A packed weight as kernels see it, from matrix number `first` on."""
        address, strides, dtype, layout = self.packed_strides(tensor)
        record = np.zeros((), VIEW)
        write_view(record, address + first * strides[0], tensor.shape, strides, dtype, layout)
        return record

    def _run(self, name: str, views: Sequence[Array], grid: Grid, threads: int) -> None:
        """Launch a kernel that has a source of its own name."""
        args = np.zeros((), ARGS)
        for i, view in enumerate(views):
            args["v"][i] = view
        function = self._device.function(name, name)
        self._device.launch(function, grid, threads, 0, args.ctypes.data)


def expand_grid(w: Tensor) -> Grid:
    """Of the kernel that expands a weight [out, in] to bfloat16."""
    return (-(-w.shape[1] // (8 * RECORD)), -(-w.shape[0] // PANEL), 1)


def _room(tensor: Tensor, n_bytes: int) -> Array:
    return np.empty(n_bytes, np.uint8)
