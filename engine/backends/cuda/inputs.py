"""The INPUT tensors and live counts of a step: one region of device memory, filled by one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.backends.base import Array
from engine.backends.cuda.device import Device
from engine.backends.native.views import DIMS
from engine.graph import Live, Tensor

_LIVE_BYTES = 256


class InputRegion:
    """Live counts and INPUT tensors side by side on the device, and their image on the host."""

    def __init__(self, device: Device, inputs: Sequence[Tensor] = ()) -> None:
        self._device, offset = device, _LIVE_BYTES
        self._offsets: dict[Tensor, int] = {}
        # The largest last: the copy ends at the last byte that was written.
        for t in sorted(inputs, key=lambda t: t.nbytes):
            self._offsets[t] = offset
            offset += -(-t.nbytes // 64) * 64
        self._image = np.zeros(offset, np.uint8)
        self._memory = device.allocate(offset)
        self.live_address = self._memory.address
        self._end = 0

    def address(self, tensor: Tensor) -> int:
        """The address of an input."""
        return self.live_address + self._offsets[tensor]

    def write(self, tensor: Tensor, values: Array) -> None:
        """Set the live rows of an input."""
        begin = self._offsets[tensor]
        end = begin + values.nbytes
        self._image[begin:end] = np.ravel(values).view(np.uint8)
        self._end = max(self._end, end)

    def flush(self, live: Live) -> None:
        """Upload the inputs that were written, and the live counts."""
        counts = np.array([live.dim(name) or 0 for name in DIMS], np.int32)
        self._image[: counts.nbytes] = counts.view(np.uint8)
        end = max(self._end, counts.nbytes)
        self._device.upload(self.live_address, self._image[:end])
        self._end = 0
