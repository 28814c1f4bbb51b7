"""State tensors as numpy arrays of their stored type, for the backends that run in this memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.backends.base import Array
from engine.formats.quants import numpy_dtype
from engine.graph import Tensor, dim_name


class ArrayStates:
    """State tensors as numpy arrays; see StateStore."""

    def __init__(self) -> None:
        self.arrays: dict[Tensor, Array] = {}

    def allocate(self, states: Sequence[Tensor]) -> None:
        """Memory that the system provides when it is first written."""
        for t in states:
            self.arrays[t] = np.zeros(t.shape, numpy_dtype(t.dtype))

    def _of(self, dim: str) -> list[tuple[Tensor, Array]]:
        return [(t, a) for t, a in self.arrays.items() if dim_name(t) == dim]

    def zero(self, dim: str, index: int) -> None:
        """Assign zeros to a slot or block of every layer."""
        for _, array in self._of(dim):
            array[index] = 0

    def copy(self, dim: str, source: int, target: int) -> None:
        """Copy a slot or block of every layer."""
        for _, array in self._of(dim):
            array[target] = array[source]

    def save(self, dim: str, index: int) -> dict[str, Array]:
        """Copies of a slot's or block's contents, by state tensor name."""
        return {t.name: array[index].copy() for t, array in self._of(dim)}

    def load(self, dim: str, index: int, contents: Mapping[str, Array]) -> None:
        """The reverse of `save`."""
        for t, array in self._of(dim):
            array[index] = contents[t.name]
