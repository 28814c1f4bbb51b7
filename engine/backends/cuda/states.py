"""State tensors in device memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from engine.backends.base import Array
from engine.backends.cuda.device import Device, Memory
from engine.formats.quants import numpy_dtype
from engine.graph import Tensor, dim_name


class DeviceStates:
    """State tensors in device memory; see StateStore."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: dict[Tensor, Memory] = {}

    def allocate(self, states: Sequence[Tensor]) -> None:
        """Allocate states, as zeros."""
        for t in states:
            self._memory[t] = self._device.allocate(t.nbytes)
            self._device.fill(self._memory[t].address, t.nbytes, 0)

    def address(self, tensor: Tensor) -> int:
        """The address of a state."""
        return self._memory[tensor].address

    def _of(self, dim: str) -> list[tuple[Tensor, int, int]]:
        """(state, its address, bytes of one slot or block)."""
        states = self._memory.items()
        return [
            (t, m.address, t.nbytes // int(t.shape[0])) for t, m in states if dim_name(t) == dim
        ]

    def zero(self, dim: str, index: int) -> None:
        for _, address, n in self._of(dim):
            self._device.fill(address + index * n, n, 0)

    def copy(self, dim: str, source: int, target: int) -> None:
        for _, address, n in self._of(dim):
            self._device.copy(address + target * n, address + source * n, n)

    def save(self, dim: str, index: int) -> dict[str, Array]:
        saved = {}
        for t, address, n in self._of(dim):
            saved[t.name] = np.empty(t.shape[1:], numpy_dtype(t.dtype))
            self._device.download(address + index * n, saved[t.name])
        return saved

    def load(self, dim: str, index: int, contents: Mapping[str, Array]) -> None:
        for t, address, n in self._of(dim):
            values = np.ascontiguousarray(contents[t.name], numpy_dtype(t.dtype))
            assert values.nbytes == n == math.prod(t.shape[1:]) * values.itemsize, t
            self._device.upload(address + index * n, values)
