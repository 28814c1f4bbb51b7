"""State tensors as numpy arrays of their stored type, for the backends that run in this memory."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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

    def read(self, tensor: Tensor, indices: Sequence[int], buffer: Array) -> Array:
        array = self.arrays[tensor]
        rows = rows_in(buffer, len(indices), array.shape[1:], array.dtype)
        # Other modes have a buffer of their own.
        np.take(array, np.array(indices, np.intp), 0, rows, mode="clip")
        return rows

    def write(self, tensor: Tensor, indices: Sequence[int], values: Array) -> None:
        self.arrays[tensor][list(indices)] = values

    def give_back(self, dim: str, indices: Sequence[int]) -> None:
        for array in self._of(dim):
            for first, last in runs(indices):
                _give_back(array[first : last + 1])


def runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of the runs of consecutive numbers, in order."""
    for _, run in itertools.groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        numbers = [n for _, n in run]
        yield numbers[0], numbers[-1]


def _give_back(array: Array) -> None:
    """Have the system take the whole pages of an array's memory, which are zeros then."""
    begin = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)


def rows_in(buffer: Array, n: int, shape: Sequence[int], dtype: Any) -> Array:
    """The beginning of a buffer of uint8 as [n, *shape]."""
    n_bytes = n * math.prod(shape) * np.dtype(dtype).itemsize
    rows: Array = buffer[:n_bytes].view(dtype)
    return rows.reshape(n, *shape)
