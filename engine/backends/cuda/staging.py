"""Pinned memory of the host, which is copied from and to while the host goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StagingBuffer:
    """A buffer of a ring; `event` is recorded after its copy."""

    data: NDArray[np.uint8]
    address: int
    event: Any
    held: Any


class StagingRing:
    """`n` buffers of `size` bytes, allocated at their first use and reused in order.

    cuda: CuPy's module; wait(event): waits for one.
    """

    def __init__(self, cuda: Any, wait: Callable[[Any], None], n: int, size: int) -> None:
        self._cuda, self._wait, self._n, self.size = cuda, wait, n, size
        self._buffers: deque[StagingBuffer] = deque()

    def next(self) -> StagingBuffer:
        """The least recently used buffer; waits for its copy."""
        if len(self._buffers) < self._n:
            held = self._cuda.alloc_pinned_memory(self.size)
            data = np.frombuffer(held, np.uint8, self.size)
            event = self._cuda.Event(disable_timing=True)
            buffer = StagingBuffer(data, int(held.ptr), event, held)
        else:
            buffer = self._buffers.popleft()
            self._wait(buffer.event)
        self._buffers.append(buffer)
        return buffer
