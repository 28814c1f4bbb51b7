"""Weights on the GPU: in panels, as on the CPU, decoded to float32, or copied in bfloat16.

Threads of the host pack weights while packed ones are uploaded.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from engine.backends.base import Array
from engine.backends.cuda.args import ARGS
from engine.backends.cuda.device import Device, Grid, Memory
from engine.backends.cuda.kernels import BATCH, K_BLOCK, KERNELS, PANEL, threads
from engine.backends.native.library import Library
from engine.backends.native.panels import PanelWeights
from engine.backends.native.signatures import is_quantized
from engine.backends.native.views import BF16, write_view
from engine.formats.quants import WEIGHT_TYPES
from engine.graph import Dim, Tensor
from engine.threads import n_cores

# Packed weights that may wait for their upload.
_AHEAD_BYTES = 256 << 20
_MAX_GRID = 65535


class CudaWeights(PanelWeights):
    """Weights in device memory. `bf16`: the copies [out, in] in bfloat16."""

    def __init__(self, device: Device, library: Library) -> None:
        super().__init__(library, n_cores(), _AHEAD_BYTES)
        assert (library.constant("panel_rows"), library.constant("k_block")) == (PANEL, K_BLOCK)
        self._device = device
        self.bf16: dict[Tensor, Memory] = {}

    def copy_bf16(self, tensor: Tensor) -> None:
        """Copy a weight in bfloat16, for products of many rows."""
        memory, args = self._device.allocate(math.prod(tensor.shape) * 2), np.zeros((), ARGS)
        write_view(args["v"][0], memory.address, tensor.shape, (tensor.shape[1], 1), BF16)
        self.write_packed(args["v"][1], tensor)
        self._run("expand", args, expand_grid(tensor))
        self.bf16[tensor.base] = memory

    def write_packed(self, record: Any, tensor: Tensor, first: int = 0) -> None:
        """See PanelWeights; with what kernels need of the layout (kernel.cuh)."""
        super().write_packed(record, tensor, first)
        if is_quantized(tensor):
            batch, k_block = (self.part_bytes(tensor, n * K_BLOCK) for n in (BATCH, 1))
            record["stride"][len(tensor.shape) - 1] = batch
            record["head"] = (BATCH * k_block - batch) // (BATCH - 1)

    def _keep(self, values: Array) -> Memory:
        memory = self._device.allocate(values.nbytes)
        self._device.upload(memory.address, values)
        return memory

    def _rearrange(self, tensor: Tensor) -> None:
        panel, matrix = self.matrix_bytes(tensor)
        n_k_blocks, n_panels = -(-tensor.shape[-1] // K_BLOCK), matrix // panel
        n_matrices = math.prod(tensor.shape[:-2])
        for first in range(0, n_matrices, _MAX_GRID):
            n = min(_MAX_GRID, n_matrices - first)
            args = np.zeros((), ARGS)
            self.write_packed(args["v"][0], tensor, first)
            self._run("repack", args, (n_k_blocks, n_panels, n))

    def _address(self, kept: Memory) -> int:
        return kept.address

    def _run(self, kernel: str, args: Array, grid: Grid) -> None:
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
