"""The slot of one sequence's recurrent state, and the slot that its next step writes.

A step never writes a shared slot (a checkpoint may hold it): it reads that and writes another one.
"""

from __future__ import annotations

from engine.kvcache.pool import Pool

NO_SLOT = -1


class StateSlot:
    """One reference to a slot; NO_SLOT stands for a state of zeros."""

    def __init__(self, pool: Pool, slot: int = NO_SLOT) -> None:
        self._pool, self.slot = pool, slot
        self._next = NO_SLOT

    def missing(self) -> int:
        """How many slots `begin` would allocate."""
        return int(self.slot == NO_SLOT or self._pool.is_shared(self.slot))

    @property
    def slots(self) -> list[int]:
        """The state's slot, and the other one that a step in flight writes."""
        return sorted({self.slot, self._next} - {NO_SLOT})

    def begin(self, preserve_state: bool = False) -> tuple[int, int]:
        """(state_src, state_dst) of the coming step, another slot with `preserve_state`."""
        allocates = preserve_state or self.missing()
        self._next = self._pool.allocate() if allocates else self.slot
        return self.slot, self._next

    def finish(self) -> None:
        """Make the slot that the step wrote the state; call it when the step has run."""
        if self._next != self.slot:
            self.free()
            self.slot = self._next
        self._next = NO_SLOT

    def cancel(self) -> None:
        if self._next not in (NO_SLOT, self.slot):
            self._pool.free(self._next)
        self._next = NO_SLOT

    def fork(self) -> StateSlot:
        return StateSlot(self._pool, self.slot if self.slot < 0 else self._pool.share(self.slot))

    def free(self) -> None:
        if self.slot != NO_SLOT:
            self._pool.free(self.slot)
        self.slot = NO_SLOT
