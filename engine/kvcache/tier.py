"""What the prefix cache keeps on the host of a device's memory: states and blocks, copied there
and back in the order of the device's work.

A full block never changes, so it is copied once: `_twins` knows the host's copy of a device's block
while both are what they were when it was made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from engine.errors import EngineError
from engine.graph import Tensor
from engine.kvcache.policy import BLOCK
from engine.kvcache.pool import Pool
from engine.kvcache.sequences import Allocation, SequenceMemory

_log = logging.getLogger(__name__)
_ARENA_BYTES = 64 << 20  # Pinning takes long, and is done as memory is needed.
_MOST_ROWS = 1 << 20


@runtime_checkable
class Mover(Protocol):
    """A backend's part of sequences' memory, as a tier uses it; `dim` is n_slots or n_blocks."""

    def row_bytes(self, dim: str) -> int:
        """Bytes of a slot or block in all layers."""

    def allocate_host(self, n_bytes: int) -> Any:
        """Pinned memory of the host with an `address`, freed with its last reference."""

    def rows(self, dim: str, addresses: Sequence[int]) -> dict[Tensor, Any]:
        """Slots or blocks on the host, of each state: [n, ...], copied when all work is done."""

    def move(self, rows: Sequence[tuple[str, int, int]], to_host: bool) -> None:
        """Copy slots and blocks, each (dim, index, address on the host), behind the work so far,
        without waiting."""


@dataclass(eq=False)
class Stored:
    """What a sequence of `n_tokens` holds, as indices of the tier."""

    n_tokens: int
    slot: int
    blocks: list[int]


class _Rows:
    """Numbered rows on the host, in arenas that are taken as they are needed. A row gets the lowest
    free number, so that the last arenas fall free first."""

    def __init__(self, n_bytes: int, arena_bytes: int, n_arenas: int, what: str) -> None:
        self.n_bytes = n_bytes
        # A model may have no KV cache.
        self.n_per_arena = arena_bytes // n_bytes if n_bytes else _MOST_ROWS
        self.arenas: list[Any] = []
        self.pool = Pool(min(n_arenas * self.n_per_arena, _MOST_ROWS), what)

    @property
    def n_used(self) -> int:
        return self.pool.size - self.pool.n_free

    def n_missing(self, n_new: int) -> int:
        """How many arenas more `n_new` rows need."""
        return max(0, -(-(self.n_used + n_new) // self.n_per_arena) - len(self.arenas))

    def is_last_free(self) -> bool:
        end = len(self.arenas) * self.n_per_arena
        return end > 0 and not any(map(self.pool.stamp, range(end - self.n_per_arena, end)))

    def address(self, index: int, take: Callable[[], Any]) -> int:
        """Of a row; `take` gives an arena."""
        arena, row = divmod(index, self.n_per_arena)
        while arena >= len(self.arenas):
            self.arenas.append(take())
        return int(self.arenas[arena].address) + row * self.n_bytes


class HostTier:
    """The tier; `budget`: bytes of the host's memory."""

    def __init__(self, mover: Mover, memory: SequenceMemory, budget: int) -> None:
        self._mover, self._memory = mover, memory
        dims = ("n_slots", "n_blocks")
        n_bytes = [mover.row_bytes(dim) for dim in dims]
        # All of one size, so that slots' become blocks' when use changes.
        self._arena_bytes = max(*n_bytes, min(_ARENA_BYTES, budget // 8))
        self._n_more = budget // self._arena_bytes  # Arenas that may still be allocated.
        self._spare: list[Any] = []
        self._slots, self._blocks = self._rows = [
            _Rows(n, self._arena_bytes, self._n_more, f"{dim} on the host")
            for n, dim in zip(n_bytes, dims, strict=True)
        ]
        # Block of the device -> (its stamp, the host's block, that one's stamp).
        self._twins: dict[int, tuple[int, int, int]] = {}

    @property
    def n_bytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(rows.n_used * rows.n_bytes for rows in self._rows)

    def has_room(self, own: Allocation) -> bool:
        """Whether a sequence's contents can be stored."""
        for rows in self._rows:
            while rows.is_last_free():
                self._spare.append(rows.arenas.pop())
        n_new = 1, sum(self._twin(block) is None for block in own.table.blocks)
        n_missing = [rows.n_missing(n) for rows, n in zip(self._rows, n_new, strict=True)]
        return sum(n_missing) <= self._n_more + len(self._spare)

    def store(self, own: Allocation) -> Stored | None:
        """Copy a sequence's contents to the host; the device may change them at once. None if the
        host has no memory for them."""
        if not self.has_room(own):
            return None
        stored = Stored(own.n_tokens, self._slots.pool.allocate(), [])
        try:
            self._copy(own, stored)
        except EngineError as error:
            _log.warning("the prefix cache has no more memory of the host: %s", error)
            self._n_more = 0
            self.free(stored)
            return None
        return stored

    def _take(self) -> Any:
        if self._spare:
            return self._spare.pop()
        arena = self._mover.allocate_host(self._arena_bytes)
        self._n_more -= 1
        return arena

    def _copy(self, own: Allocation, stored: Stored) -> None:
        blocks, rows = self._blocks, list[tuple[str, int, int]]()
        rows.append(("n_slots", own.state.slot, self._slots.address(stored.slot, self._take)))
        for block in own.table.blocks:
            twin = self._twin(block)
            if twin is None:
                twin = blocks.pool.allocate()
                stored.blocks.append(twin)
                rows.append(("n_blocks", block, blocks.address(twin, self._take)))
            else:
                stored.blocks.append(blocks.pool.share(twin))
        self._mover.move(rows, to_host=True)
        self._pair(own, stored)

    def load(self, stored: Stored, seq: int) -> None:
        """Give a sequence what was stored. Raises MemoryFullError."""
        own = self._memory.adopt(seq, stored.n_tokens)
        rows = [("n_slots", own.state.slot, self._slots.address(stored.slot, self._take))]
        for block, twin in zip(own.table.blocks, stored.blocks, strict=True):
            rows.append(("n_blocks", block, self._blocks.address(twin, self._take)))
        self._mover.move(rows, to_host=False)
        self._pair(own, stored)

    def read(self, stored: Stored, with_blocks: bool) -> dict[Tensor, Any]:
        """Copies of what was stored: rows of each state."""
        found = self._mover.rows("n_slots", [self._slots.address(stored.slot, self._take)])
        if with_blocks:
            blocks = [self._blocks.address(block, self._take) for block in stored.blocks]
            found |= self._mover.rows("n_blocks", blocks)
        return found

    def free(self, stored: Stored) -> None:
        """Give up what was stored."""
        self._slots.pool.free(stored.slot)
        for block in stored.blocks:
            self._blocks.pool.free(block)

    def clear(self) -> None:
        """Give up all, whatever an exception left."""
        self._twins.clear()
        for rows in self._rows:
            rows.pool.recount(())

    def _twin(self, block: int) -> int | None:
        stamp, twin, twin_stamp = self._twins.get(block, (0, 0, 0))
        is_same = stamp == self._memory.blocks.stamp(block)
        return twin if is_same and twin_stamp == self._blocks.pool.stamp(twin) else None

    def _pair(self, own: Allocation, stored: Stored) -> None:
        """Note the copies of full blocks."""
        n_full = own.n_tokens // BLOCK
        for block, twin in zip(own.table.blocks[:n_full], stored.blocks, strict=False):
            stamps = self._memory.blocks.stamp(block), self._blocks.pool.stamp(twin)
            self._twins[block] = stamps[0], twin, stamps[1]
