"""Where activations lie: tensors that are not alive at the same time share memory."""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

ALIGNMENT = 64
Key = TypeVar("Key", bound=Hashable)


class Arena(Generic[Key]):
    """Gives offsets to buffers in the order of their first use; `size` is the bytes needed."""

    def __init__(self) -> None:
        self.size = 0
        self.offsets: dict[Key, int] = {}

    def plan(self, buffers: Sequence[tuple[Key, int, int, int]]) -> None:
        """Place buffers (key, bytes, first and last instruction), each where no other is alive.

        The largest are placed first, each at the lowest offset that is free for its whole life.
        """
        placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last
        for key, nbytes, first, last in sorted(buffers, key=lambda b: -b[1]):
            size, offset = -(-nbytes // ALIGNMENT) * ALIGNMENT, 0
            for start, end, since, until in placed:
                if since <= last and first <= until and start < offset + size and end > offset:
                    offset = end
            insort(placed, (offset, offset + size, first, last))
            self.offsets[key] = offset
            self.size = max(self.size, offset + size)
