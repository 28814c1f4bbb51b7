"""Recurrent state of one sequence: the slot that holds it, and where the next step writes.

A slot that somebody else holds too (a checkpoint, say) is only read: the step starts from it and
writes another one, so that restoring and forking neither clear nor copy anything.
"""

from __future__ import annotations

from engine.kvcache.pool import Pool

NO_SLOT = -1


class StateSlot:
    """One sequence's slot; NO_SLOT means zeros."""

    def __init__(self, pool: Pool, slot: int = NO_SLOT) -> None:
        self._pool, self.slot = pool, slot
        self._next = NO_SLOT

    def missing(self) -> int:
        """How many slots `begin` would take from the pool."""
        return int(self.slot == NO_SLOT or self._pool.is_shared(self.slot))

    @property
    def slots(self) -> list[int]:
        """The slots in use: that of the state, and another one that a pending step writes."""
        return sorted({self.slot, self._next} - {NO_SLOT})

    def begin(self, keep: bool = False) -> tuple[int, int]:
        """(state_src, state_dst) of the coming step; raises MemoryFullError.

        With `keep`, the step leaves the state as it is until `finish`.
        """
        self._next = self._pool.acquire() if keep or self.missing() else self.slot
        return self.slot, self._next

    def finish(self) -> None:
        """The step was run: its destination is the state now."""
        if self._next != self.slot:
            self.release()
            self.slot = self._next
        self._next = NO_SLOT

    def cancel(self) -> None:
        """The step was not run."""
        if self._next not in (NO_SLOT, self.slot):
            self._pool.release(self._next)
        self._next = NO_SLOT

    def fork(self) -> StateSlot:
        """Another holder of the same state."""
        return StateSlot(self._pool, self.slot if self.slot < 0 else self._pool.share(self.slot))

    def release(self) -> None:
        """Back to zeros."""
        if self.slot != NO_SLOT:
            self._pool.release(self.slot)
        self.slot = NO_SLOT
