"""Pinned memory of the host: what lies there is copied while the host goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Wait = Callable[[Any], None]


@dataclass(frozen=True)
class Turn:
    """A piece of it, and the event to record after its copy."""

    data: NDArray[np.uint8]
    address: int
    event: Any
    held: Any


class PinnedTurns:
    """`n` pieces of `size` bytes, used in turns; made when they are needed.

    cuda: CuPy's module; wait(event): waits for one.
    """

    def __init__(self, cuda: Any, wait: Wait, n: int, size: int) -> None:
        self._cuda, self._wait, self._n, self.size = cuda, wait, n, size
        self._turns: deque[Turn] = deque()

    def next(self) -> Turn:
        """The one that was used longest ago, once its copy is done."""
        if len(self._turns) < self._n:
            held = self._cuda.alloc_pinned_memory(self.size)
            data = np.frombuffer(held, np.uint8, self.size)
            event = self._cuda.Event(disable_timing=True)
            turn = Turn(data, int(held.ptr), event, held)
        else:
            turn = self._turns.popleft()
            self._wait(turn.event)
        self._turns.append(turn)
        return turn


@dataclass(frozen=True)
class PinnedBytes:
    """See Fetched."""

    _turn: Turn
    _n_bytes: int
    _wait: Wait

    def values(self) -> NDArray[np.uint8]:
        """Waits for the copy."""
        self._wait(self._turn.event)
        return self._turn.data[: self._n_bytes].copy()
