"""Paged KV cache of one sequence: a table of blocks, shared until one of the holders writes.

Block i holds positions i · block_size … (i + 1) · block_size - 1 of every attention layer.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.kvcache.pool import Pool


class BlockTable:
    """The blocks of one sequence's positions, in order."""

    def __init__(self, pool: Pool, block_size: int) -> None:
        self._pool, self._block_size = pool, block_size
        self.blocks: list[int] = []

    def missing(self, n_past: int, n_new: int) -> int:
        """How many blocks `extend` would take from the pool."""
        n_blocks = -(-(n_past + n_new) // self._block_size)
        return max(0, n_blocks - len(self.blocks)) + self._writes_shared(n_past)

    def extend(self, n_past: int, n_new: int, copy: Callable[[int, int], None]) -> None:
        """Make room for positions n_past … n_past + n_new - 1.

        A partly filled last block that somebody else holds too is copied first: copy on write.
        Raises MemoryFullError, with nothing changed, if the pool has too few blocks.
        """
        self._pool.require(self.missing(n_past, n_new))
        if self._writes_shared(n_past):
            shared = self.blocks[n_past // self._block_size]
            own = self._pool.acquire()
            copy(shared, own)
            self._pool.release(shared)
            self.blocks[n_past // self._block_size] = own
        while len(self.blocks) * self._block_size < n_past + n_new:
            self.blocks.append(self._pool.acquire())

    def _writes_shared(self, n_past: int) -> bool:
        index = n_past // self._block_size
        return index < len(self.blocks) and self._pool.is_shared(self.blocks[index])

    def truncate(self, n_past: int) -> None:
        """Give back the blocks that hold no position below n_past."""
        keep = -(-n_past // self._block_size)
        for block in self.blocks[keep:]:
            self._pool.release(block)
        del self.blocks[keep:]

    def fork(self, n_past: int) -> BlockTable:
        """A table of the same blocks, as far as they hold positions below n_past."""
        table = BlockTable(self._pool, self._block_size)
        held = self.blocks[: -(-n_past // self._block_size)]
        table.blocks = [self._pool.share(block) for block in held]
        return table
