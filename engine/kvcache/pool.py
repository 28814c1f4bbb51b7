"""Numbered resources with reference counts: KV blocks and state slots."""

from collections.abc import Iterable
from heapq import heappop, heappush

from engine.errors import EngineError


class MemoryFullError(EngineError):
    """No block or slot is free."""


class Pool:
    """Indices 0 … size - 1. An index is free while it has no references."""

    def __init__(self, size: int, what: str) -> None:
        self.size, self._what = size, what
        self._references = [0] * size
        self._stamps = [0] * size
        self._free = list(range(size))  # A heap.
        # Indices that were ever in use, apart from those whose memory was given back.
        self.touched: set[int] = set()

    def __str__(self) -> str:
        return f"{self.n_free} of {self.size} {self._what} free"

    @property
    def n_free(self) -> int:
        return len(self._free)

    def require(self, n: int) -> None:
        """Raise MemoryFullError unless `n` indices are free."""
        if n > len(self._free):
            raise MemoryFullError(
                f"out of {self._what}: {n} needed, {len(self._free)} of {self.size} are free"
            )

    def allocate(self) -> int:
        """The lowest free index, now with one reference; raises MemoryFullError."""
        self.require(1)
        index = heappop(self._free)
        self._references[index] = 1
        self._stamps[index] += 1
        self.touched.add(index)
        return index

    def share(self, index: int) -> int:
        """Add a reference to an index in use; returns the index."""
        assert self._references[index] > 0, (self._what, index)
        self._references[index] += 1
        return index

    def stamp(self, index: int) -> int:
        """A positive number that changes when an index is allocated anew; 0 while it is free."""
        return self._stamps[index] if self._references[index] else 0

    def is_shared(self, index: int) -> bool:
        return self._references[index] > 1

    def recount(self, held: Iterable[int]) -> None:
        """Make `held`, the indices that somebody refers to (each as often), the only references."""
        references = [0] * self.size
        for index in held:
            references[index] += 1
        self._references = references
        self._free = [i for i in range(self.size) if not references[i]]

    def untouch(self) -> list[int]:
        """The free ones among `touched`, in order, which they leave."""
        free = sorted(i for i in self.touched if not self._references[i])
        self.touched.difference_update(free)
        return free

    def free(self, index: int) -> None:
        """Remove a reference; the index is free when it was the last one."""
        assert self._references[index] > 0, (self._what, index)
        self._references[index] -= 1
        if self._references[index] == 0:
            heappush(self._free, index)
