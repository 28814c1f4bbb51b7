"""Numbered resources with reference counts: KV blocks, state slots."""

from __future__ import annotations

from engine.errors import EngineError


class MemoryFullError(EngineError):
    """No block or slot is left."""


class Pool:
    """Indices 0 … size - 1; an index is free again when its last reference is released."""

    def __init__(self, size: int, what: str) -> None:
        self.size, self._what = size, what
        self._references = [0] * size
        self._free = list(range(size))[::-1]

    @property
    def n_free(self) -> int:
        """How many indices nobody holds."""
        return len(self._free)

    def require(self, n: int) -> None:
        """Raise MemoryFullError unless `n` indices are free."""
        if n > len(self._free):
            raise MemoryFullError(
                f"out of {self._what}: {n} needed, {len(self._free)} of {self.size} are free"
            )

    def acquire(self) -> int:
        """A free index, with one reference."""
        self.require(1)
        index = self._free.pop()
        self._references[index] = 1
        return index

    def share(self, index: int) -> int:
        """One more reference to an index in use."""
        assert self._references[index] > 0, (self._what, index)
        self._references[index] += 1
        return index

    def is_shared(self, index: int) -> bool:
        """Whether somebody else holds the index too."""
        return self._references[index] > 1

    def release(self, index: int) -> None:
        """Give one reference back."""
        assert self._references[index] > 0, (self._what, index)
        self._references[index] -= 1
        if self._references[index] == 0:
            self._free.append(index)
