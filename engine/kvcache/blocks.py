"""The KV blocks of one sequence. Sequences share blocks until one of them writes (copy on write).

Block i holds positions i · block_size … (i + 1) · block_size - 1 of every attention layer.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.kvcache.pool import Pool


class BlockTable:
    """The blocks of one sequence's positions, in order."""

    def __init__(self, pool: Pool, block_size: int, blocks: list[int] | None = None) -> None:
        self._pool, self._block_size = pool, block_size
        self.blocks = blocks or []

    def missing(self, n_past: int, n_new: int) -> int:
        """How many blocks `extend` would allocate."""
        n_blocks = self._n_blocks(n_past + n_new)
        return max(0, n_blocks - len(self.blocks)) + self._writes_shared(n_past)

    def extend(self, n_past: int, n_new: int, copy: Callable[[int, int], None]) -> None:
        """Allocate blocks for positions n_past … n_past + n_new - 1.

        Of a partly filled last block that is shared, `copy(source, target)` makes an own one.
        Raises MemoryFullError, with nothing changed.
        """
        self._pool.require(self.missing(n_past, n_new))
        if self._writes_shared(n_past):
            shared, own = self.blocks[n_past // self._block_size], self._pool.allocate()
            copy(shared, own)
            self._pool.free(shared)
            self.blocks[n_past // self._block_size] = own
        while len(self.blocks) < self._n_blocks(n_past + n_new):
            self.blocks.append(self._pool.allocate())

    def _n_blocks(self, n_positions: int) -> int:
        return -(-n_positions // self._block_size)

    def _writes_shared(self, n_past: int) -> bool:
        index = n_past // self._block_size
        return index < len(self.blocks) and self._pool.is_shared(self.blocks[index])

    def truncate(self, n_past: int) -> None:
        n_blocks = self._n_blocks(n_past)
        for block in self.blocks[n_blocks:]:
            self._pool.free(block)
        del self.blocks[n_blocks:]

    def fork(self, n_past: int) -> BlockTable:
        """A table that shares the blocks that hold positions below n_past."""
        shared = [self._pool.share(block) for block in self.blocks[: self._n_blocks(n_past)]]
        return BlockTable(self._pool, self._block_size, shared)
