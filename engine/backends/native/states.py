"""State tensors as numpy arrays of their stored type, for the backends that run in this memory."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from engine.backends.base import Array
from engine.formats.quants import numpy_dtype
from engine.graph import Tensor, dim_name

_DONTNEED = mmap.MADV_DONTNEED


class ArrayStates:
    """State tensors as numpy arrays; see StateStore."""

    def __init__(self) -> None:
        self.arrays: dict[Tensor, Array] = {}

    def allocate(self, states: Sequence[Tensor], extra: Mapping[str, int]) -> None:
        """Zeros; the system provides their memory when it is first written."""
        for t in states:
            n_rows = t.shape[0] + extra.get(dim_name(t), 0)
            self.arrays[t] = np.zeros((n_rows, *t.shape[1:]), numpy_dtype(t.dtype))

    def _of(self, dim: str) -> Iterator[Array]:
        return (a for t, a in self.arrays.items() if dim_name(t) == dim)

    def zero(self, dim: str, index: int) -> None:
        for array in self._of(dim):
            array[index] = 0

    def copy(self, dim: str, source: int, target: int) -> None:
        for array in self._of(dim):
            array[target] = array[source]

    def give_back(self, dim: str, indices: Sequence[int]) -> None:
        for array in self._of(dim):
            for first, last in _runs(indices):
                _give_back(array[first : last + 1])


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of the runs of consecutive numbers in rising ones."""
    for _, run in itertools.groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        numbers = [n for _, n in run]
        yield numbers[0], numbers[-1]


def _give_back(array: Array) -> None:
    """Have the system take the whole pages of an array's memory, which are zeros then."""
    begin = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)
