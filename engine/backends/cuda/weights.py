"""Weights on the GPU: in panels, as on the CPU, decoded to float32, or copied in bfloat16.

Threads of the host pack weights while packed ones are uploaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.backends.base import Array, WeightSource
from engine.backends.cuda.args import ARGS, VIEW
from engine.backends.cuda.device import Device, Grid, Memory
from engine.backends.cuda.kernels import K_BLOCK, KERNELS, PANEL, threads
from engine.backends.native.library import Library, n_cores
from engine.backends.native.panels import Panels
from engine.backends.native.signatures import is_quantized, matrices_of, used_packed
from engine.backends.native.views import BF16, PACKED, write_view
from engine.formats.quants import WEIGHT_TYPES, dequantize
from engine.graph import Dim, Node, Tensor

# Packed weights that may wait for their upload.
_AHEAD_BYTES = 256 << 20
_MAX_GRID = 65535


@dataclass(frozen=True)
class Packed:
    """A matrix [out, in], or matrices [X, out, in], in panels on the device."""

    memory: Memory
    layout: int
    matrix_bytes: int
    panel_bytes: int


class CudaWeights:
    """Packs, uploads and holds weights, by tensor.

    bf16_bytes: the budget of copies in bfloat16; by default half of the memory that is free when
    the other weights are loaded.
    """

    def __init__(self, device: Device, library: Library, bf16_bytes: int | None = None) -> None:
        self._device, self._panels = device, Panels(library)
        assert (library.constant("panel_rows"), library.constant("k_block")) == (PANEL, K_BLOCK)
        self._packed: dict[Tensor, Packed] = {}
        self._plain: dict[Tensor, Memory] = {}
        self._bf16: dict[Tensor, Memory] = {}
        self._bf16_left = bf16_bytes

    def load(self, nodes: Sequence[Node], source: WeightSource, copies: bool = True) -> None:
        """Load the weights of some nodes; shows progress when it takes long.

        copies: weights of products also get a copy in bfloat16, in the nodes' order, as long as the
        budget lasts.
        """
        packed, plain = used_packed(nodes)
        for tensor in (t for t in plain if t not in self._plain):
            values = dequantize(tensor.dtype, source.raw(tensor.name), tensor.shape)
            self._plain[tensor] = self._upload(values)
        todo = [t for t in packed if t not in self._packed]
        for tensor, data in self._panels.pack_all(todo, source, n_cores(), _AHEAD_BYTES, _allocate):
            self._keep(tensor, self._upload(data))
        if copies:
            for tensor in _copied_weights(nodes):
                self.keep_bf16(tensor)

    def _keep(self, tensor: Tensor, memory: Memory) -> None:
        panel, matrix = self._panels.matrix_bytes(tensor)
        self._packed[tensor] = Packed(memory, self._panels.layout(tensor.dtype), matrix, panel)
        n_k_blocks, n_panels = -(-tensor.shape[-1] // K_BLOCK), matrix // panel
        n_matrices = math.prod(tensor.shape[:-2])
        for first in range(0, n_matrices, _MAX_GRID):
            n = min(_MAX_GRID, n_matrices - first)
            self._run("repack", [self._view(tensor, first)], (n_k_blocks, n_panels, n))

    def _upload(self, values: Array) -> Memory:
        memory = self._device.allocate(values.nbytes)
        self._device.upload(memory.address, values)
        return memory

    def packed_bytes(self, tensor: Tensor) -> int:
        """Bytes of a weight in panels."""
        return self._panels.packed_bytes(tensor)

    def part_bytes(self, tensor: Tensor, n_columns: int) -> int:
        """Bytes of `n_columns` columns of a panel of a weight."""
        return self._panels.part_bytes(tensor, n_columns)

    def plain_bytes(self, tensor: Tensor) -> int:
        """Bytes of a weight decoded to float32."""
        return math.prod(tensor.shape) * 4

    def packed_strides(self, tensor: Tensor) -> tuple[int, list[int], int, int]:
        """A packed weight's address, strides in bytes (of matrices and panels), dtype, layout."""
        p = self._packed[tensor.base]
        strides = [p.panel_bytes] if len(tensor.shape) == 2 else [p.matrix_bytes, p.panel_bytes]
        return p.memory.address, strides, PACKED, p.layout

    def plain_or_zero(self, tensor: Tensor) -> int:
        """The address of a weight decoded to float32; 0 if it has only been packed."""
        return self._plain[tensor.base].address if tensor.base in self._plain else 0

    def keep_bf16(self, tensor: Tensor) -> None:
        """Copy a weight in bfloat16, unless it has a copy or the budget is spent."""
        if tensor.base in self._bf16:
            return
        if self._bf16_left is None:
            self._bf16_left = self._device.free_bytes() // 2
        n_bytes = math.prod(tensor.shape) * 2
        if n_bytes > self._bf16_left:
            return
        memory = self._device.allocate(n_bytes)
        copy = np.zeros((), VIEW)
        write_view(copy, memory.address, tensor.shape, (tensor.shape[1], 1), BF16)
        self._run("expand", [copy, self._view(tensor)], expand_grid(tensor))
        self._bf16_left -= n_bytes
        self._bf16[tensor.base] = memory

    def has_bf16(self, tensor: Tensor) -> bool:
        """Whether a weight has a copy in bfloat16."""
        return tensor.base in self._bf16

    def bf16(self, tensor: Tensor) -> int:
        """The address of a weight's copy [out, in] in bfloat16."""
        return self._bf16[tensor.base].address

    def _view(self, tensor: Tensor, first: int = 0) -> Array:
        """The view of a packed weight, from matrix number `first` on."""
        address, strides, dtype, layout = self.packed_strides(tensor)
        record = np.zeros((), VIEW)
        write_view(record, address + first * strides[0], tensor.shape, strides, dtype, layout)
        return record

    def _run(self, kernel: str, views: Sequence[Array], grid: Grid) -> None:
        args = np.zeros((), ARGS)
        for i, view in enumerate(views):
            args["v"][i] = view
        function = self._device.function(KERNELS[kernel].source, kernel)
        self._device.launch(function, grid, threads(kernel), 0, args.ctypes.data)


def expand_grid(w: Tensor) -> Grid:
    """The grid of `expand` for a weight [out, in]: a warp expands a k-block of a panel."""
    return -(-w.shape[1] // (threads("expand") // 32 * K_BLOCK)), -(-w.shape[0] // PANEL), 1


def fits_bf16(w: Tensor) -> bool:
    """Whether products of many rows may round a weight to bfloat16: it is quantized, or bfloat16
    itself in whole k-blocks."""
    return is_quantized(w) or (w.dtype is WEIGHT_TYPES["BF16"] and w.shape[-1] % K_BLOCK == 0)


def is_of_step(t: Tensor) -> bool:
    """Whether a tensor has a row for each token, rather than for each that needs logits."""
    return isinstance(t.shape[0], Dim) and t.shape[0].name == "n_tokens"


def _copied_weights(nodes: Sequence[Node]) -> Iterator[Tensor]:
    """The weights whose copies make products of many rows faster."""
    for node in nodes:
        if node.op.name == "MUL_MAT":
            pairs = zip(matrices_of(node), node.outputs, strict=True)
            yield from (w for w, out in pairs if fits_bf16(w) and is_of_step(out))


def _allocate(tensor: Tensor, n_bytes: int) -> Array:
    return np.empty(n_bytes, np.uint8)
