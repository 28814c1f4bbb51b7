"""State tensors in device memory."""

from __future__ import annotations

from collections.abc import Sequence

from engine.backends.cuda.device import Device, Memory
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

    def _of(self, dim: str) -> list[tuple[int, int]]:
        """(a state's address, bytes of one slot or block)."""
        states = ((t, m) for t, m in self._memory.items() if dim_name(t) == dim)
        return [(m.address, t.nbytes // int(t.shape[0])) for t, m in states]

    def zero(self, dim: str, index: int) -> None:
        for address, n in self._of(dim):
            self._device.fill(address + index * n, n, 0)

    def copy(self, dim: str, source: int, target: int) -> None:
        for address, n in self._of(dim):
            self._device.copy(address + target * n, address + source * n, n)
