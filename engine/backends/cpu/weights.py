"""Weights as the CPU's kernels read them: packed panels for products and tables, else float32."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np

from engine.backends.base import Array, WeightSource
from engine.backends.native.library import Library
from engine.backends.native.panels import PanelWeights
from engine.errors import NotEnoughMemoryError
from engine.graph import Node

# Bytes of weights that are packed ahead of the oldest unfinished one: they keep all threads busy.
_AHEAD_BYTES = 64 << 20
_MAP_BYTES = 256 << 20


class CpuWeights(PanelWeights):
    """Weights as arrays."""

    def __init__(self, library: Library, n_threads: int) -> None:
        super().__init__(library, n_threads, _AHEAD_BYTES)
        self._memory = _Memory()

    def load(self, nodes: Sequence[Node], source: WeightSource) -> None:
        self._memory.n_expected = self.bytes_of(nodes)
        super().load(nodes, source)

    def _allocate(self, n_bytes: int) -> Array:
        return self._memory.take(n_bytes)

    def _keep(self, values: Array) -> Array:
        return np.ascontiguousarray(values)

    def _address(self, kept: Array) -> int:
        return kept.ctypes.data


class _Memory:
    """Cuts arrays out of large anonymous maps in huge pages, which the system provides when
    they are first written: with small pages, weights need more page tables than a TLB holds."""

    def __init__(self) -> None:
        self._left = np.empty(0, np.uint8)
        self.n_expected = 0  # Bytes that will still be taken.

    def take(self, n_bytes: int) -> Array:
        """An array of bytes whose address is a multiple of 64."""
        size = -(-n_bytes // 64) * 64
        if size > len(self._left):
            n_map = max(size, min(self.n_expected, _MAP_BYTES))
            try:
                # A shared map, as by default, has no huge pages.
                pages = mmap.mmap(-1, n_map, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError:
                raise NotEnoughMemoryError(
                    f"out of memory: the next weights need {n_map / 2**20:.1f} MiB; "
                    "take smaller types"
                ) from None
            if hasattr(mmap, "MADV_HUGEPAGE"):
                pages.madvise(mmap.MADV_HUGEPAGE)
            self._left = np.frombuffer(pages, np.uint8)
        self.n_expected -= size
        taken, self._left = self._left[:n_bytes], self._left[size:]
        return taken
