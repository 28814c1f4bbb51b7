"""State tensors as numpy arrays of their stored type, for the backends that run in this memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from engine.backends.base import Array
from engine.formats.quants import numpy_dtype
from engine.graph import Tensor, dim_name


class ArrayStates:
    """State tensors as numpy arrays; see StateStore."""

    def __init__(self) -> None:
        self.arrays: dict[Tensor, Array] = {}

    def allocate(self, states: Sequence[Tensor]) -> None:
        """Zeros; the system provides their memory when it is first written."""
        self.arrays |= {t: np.zeros(t.shape, numpy_dtype(t.dtype)) for t in states}

    def address(self, tensor: Tensor) -> int:
        return self.arrays[tensor].ctypes.data

    def _of(self, dim: str) -> Iterator[Array]:
        return (a for t, a in self.arrays.items() if dim_name(t) == dim)

    def zero(self, dim: str, index: int) -> None:
        for array in self._of(dim):
            array[index] = 0

    def copy(self, dim: str, source: int, target: int) -> None:
        for array in self._of(dim):
            array[target] = array[source]
