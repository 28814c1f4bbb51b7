"""Weights as the CPU's kernels read them: packed panels for products and tables, else float32."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np

from engine.backends.base import Array, WeightSource
from engine.backends.native.library import Library
from engine.backends.native.panels import Panels
from engine.backends.native.views import PACKED
from engine.formats.quants import dequantize
from engine.graph import Tensor

# Bytes of weights that are packed ahead of the oldest unfinished one: they keep all threads busy.
_AHEAD_BYTES = 64 << 20
_MAP_BYTES = 256 << 20


class CpuWeights:
    """Packs weights and keeps them, by tensor."""

    def __init__(self, library: Library, n_threads: int) -> None:
        self._panels, self._n_threads = Panels(library), n_threads
        self._memory = _Memory()
        # The panels of matrices [out, in] or [X, out, in].
        self._packed: dict[Tensor, Array] = {}
        self._plain: dict[Tensor, Array] = {}

    def load(self, packed: Sequence[Tensor], plain: Sequence[Tensor], source: WeightSource) -> None:
        """Read and convert weights; shows progress when it takes long."""
        for tensor in (t for t in plain if t not in self._plain):
            values = dequantize(tensor.dtype, source.raw(tensor.name), tensor.shape)
            self._plain[tensor] = np.ascontiguousarray(values)
        todo = [t for t in packed if t not in self._packed]
        ready = self._panels.pack_all(todo, source, self._n_threads, _AHEAD_BYTES, self._allocate)
        for _ in ready:
            pass

    def _allocate(self, tensor: Tensor, n_bytes: int) -> Array:
        self._packed[tensor] = self._memory.take(n_bytes)
        return self._packed[tensor]

    def packed_bytes(self, tensor: Tensor) -> int:
        """Bytes of a weight when it is packed."""
        return self._panels.packed_bytes(tensor)

    def packed_strides(self, tensor: Tensor) -> tuple[int, list[int], int, int]:
        address, layout = self._packed[tensor].ctypes.data, self._panels.layout(tensor.dtype)
        return address, self._panels.strides(tensor), PACKED, layout

    def plain_or_zero(self, tensor: Tensor) -> int:
        return self._plain[tensor].ctypes.data if tensor in self._plain else 0


class _Memory:
    """Cuts arrays out of large anonymous maps in huge pages, which the system provides when
    they are first written: with small pages, weights need more page tables than a TLB holds."""

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
