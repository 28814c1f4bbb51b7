"""Memory of sequences: KV blocks and state slots, with checkpoints, forks and rollback points.

A recurrent state cannot be cut short, so a sequence can only go back to a state that was kept. A
checkpoint keeps blocks and state, and outlives its sequence. A rollback point keeps the state at an
earlier position. Per-token states are those after the last tokens of the last step. Keeping moves
no data: it adds references. The next step writes another slot, and a copy of the last block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from engine.kvcache.blocks import BlockTable
from engine.kvcache.pool import Pool
from engine.kvcache.slots import StateSlot


@dataclass
class Allocation:
    """The blocks and slots of `n_tokens` positions of a sequence.

    `rollback_points`, `token_states`: position -> state. A sequence never overwrites its past.
    """

    n_tokens: int
    table: BlockTable
    state: StateSlot
    rollback_points: dict[int, StateSlot] = field(default_factory=dict)
    token_states: dict[int, StateSlot] = field(default_factory=dict)

    def fork(self) -> Allocation:
        return self.at(self.n_tokens, self.state)

    def at(self, n_tokens: int, state: StateSlot) -> Allocation:
        """Further references to the first `n_tokens` positions, of which `state` is the state."""
        points = {n: s.fork() for n, s in self.rollback_points.items() if n <= n_tokens}
        return Allocation(n_tokens, self.table.fork(n_tokens), state.fork(), points)

    def free(self) -> None:
        """Free everything, at once even while a step is in flight."""
        self.state.cancel()
        _free_all(self.token_states)
        _free_all(self.rollback_points)
        self.table.truncate(0)
        self.state.free()
        self.n_tokens = 0


def _free_all(states: dict[int, StateSlot]) -> None:
    for state in states.values():
        state.free()
    states.clear()


@dataclass(frozen=True)
class Step:
    """Where one step of one sequence reads and writes; the contents of its row of the inputs."""

    n_past: int
    blocks: list[int]
    state_src: int
    state_dst: int
    snapshot_dst: tuple[int, ...] = ()


class Checkpoint:
    """References to a sequence's contents at some position. `release` it when it is not needed."""

    def __init__(self, allocation: Allocation) -> None:
        self._allocation: Allocation | None = allocation

    @property
    def n_tokens(self) -> int:
        return self.allocation.n_tokens

    @property
    def allocation(self) -> Allocation:
        assert self._allocation is not None, "this checkpoint was released"
        return self._allocation

    @property
    def rollback_points(self) -> frozenset[int]:
        """The earlier positions that `rolled_back` can go to."""
        return frozenset(self.allocation.rollback_points)

    def rolled_back(self, n_tokens: int) -> Checkpoint:
        """A new checkpoint of the sequence as it was at one of `rollback_points`."""
        state = self.allocation.rollback_points[n_tokens]
        return Checkpoint(self.allocation.at(n_tokens, state))

    def fork(self) -> Checkpoint:
        """A new checkpoint of the same contents, to be released on its own."""
        return Checkpoint(self.allocation.fork())

    def release(self) -> None:
        """Free its references; it can't be used any more."""
        self.allocation.free()
        self._allocation = None


class SequenceMemory:
    """Blocks and slots of all sequences. `copy_block(source, target)` copies a block's contents."""

    def __init__(
        self, n_blocks: int, n_slots: int, block_size: int, copy_block: Callable[[int, int], None]
    ) -> None:
        self.blocks = Pool(n_blocks, "KV cache blocks")
        self.slots = Pool(n_slots, "state slots")
        self._block_size, self._copy_block = block_size, copy_block
        self._sequences: dict[int, Allocation] = {}
        self._ids = count()

    def create(self) -> int:
        """A new, empty sequence. Its first step allocates; this doesn't."""
        table = BlockTable(self.blocks, self._block_size)
        return self._add(Allocation(0, table, StateSlot(self.slots)))

    def _add(self, allocation: Allocation) -> int:
        seq = next(self._ids)
        self._sequences[seq] = allocation
        return seq

    def fork(self, seq: int) -> int:
        """A new sequence with the same contents. From here on the two are independent."""
        return self._add(self._sequences[seq].fork())

    def free(self, seq: int) -> None:
        """Remove a sequence and free its memory; checkpoints of it stay valid."""
        self._sequences.pop(seq).free()

    def n_tokens(self, seq: int) -> int:
        return self._sequences[seq].n_tokens

    def missing_slots(self, seq: int) -> int:
        """How many slots its next step allocates, apart from those of per-token states."""
        return self._sequences[seq].state.missing()

    def owned(self, seq: int) -> tuple[list[int], list[int]]:
        """(state slots, blocks) that only this sequence holds."""
        own = self._sequences[seq]
        slots = [s for state in (own.state, *own.token_states.values()) for s in state.slots]
        return (
            [slot for slot in slots if not self.slots.is_shared(slot)],
            [block for block in own.table.blocks if not self.blocks.is_shared(block)],
        )

    def begin(
        self, seq: int, n_new: int, n_snapshots: int = 0, preserve_state: bool = False
    ) -> Step:
        """Allocate what a step of `n_new` tokens needs; `finish` or `cancel` comes next.

        The states after the last `n_snapshots` tokens are kept until the next step. With
        `preserve_state` the step writes nothing that the sequence holds, so `cancel` is possible
        even after it has run. Raises MemoryFullError; the contents are unchanged then.
        """
        own = self._sequences[seq]
        _free_all(own.token_states)
        n_snapshots = min(n_snapshots, n_new)
        self.slots.require((preserve_state or own.state.missing()) + n_snapshots)
        own.table.extend(own.n_tokens, n_new, self._copy_block)
        source, target = own.state.begin(preserve_state)
        last = own.n_tokens + n_new
        for n in range(last - n_snapshots + 1, last + 1):
            own.token_states[n] = StateSlot(self.slots, self.slots.allocate())
        kept = tuple(state.slot for state in own.token_states.values())
        return Step(own.n_tokens, own.table.blocks, source, target, kept)

    def finish(self, seq: int, n_new: int) -> None:
        """Record that the step has run: the sequence has `n_new` more tokens."""
        own = self._sequences[seq]
        own.state.finish()
        own.n_tokens += n_new

    def cancel(self, seq: int) -> None:
        own = self._sequences[seq]
        _free_all(own.token_states)
        own.state.cancel()
        own.table.truncate(own.n_tokens)

    def reset(self, seq: int) -> None:
        """Make a sequence empty, after a step that failed and left its state half written."""
        self._sequences[seq].free()

    def add_rollback_point(self, seq: int, replace: bool = False) -> None:
        """Keep the state here for `truncate`, or raise MemoryFullError; `replace` frees earlier."""
        own = self._sequences[seq]
        if replace:
            _free_all(own.rollback_points)
        if own.n_tokens and own.n_tokens not in own.rollback_points:
            self.slots.require(1)  # The next step needs a slot of its own.
            own.rollback_points[own.n_tokens] = own.state.fork()

    def truncate(self, seq: int, n_tokens: int) -> int:
        """Go back to `n_tokens` positions, or to the nearest kept state before; returns where."""
        own = self._sequences[seq]
        if n_tokens >= own.n_tokens:
            return own.n_tokens
        kept = own.rollback_points | own.token_states
        reached = max((n for n in kept if n <= n_tokens), default=0)
        state = kept[reached] if reached else StateSlot(self.slots)
        self._replace(seq, own.at(reached, state))
        return reached

    def checkpoint(self, seq: int) -> Checkpoint:
        return Checkpoint(self._sequences[seq].fork())

    def restore(self, seq: int, checkpoint: Checkpoint) -> None:
        """Give the sequence the checkpoint's contents; it can be restored again, also elsewhere."""
        self._replace(seq, checkpoint.allocation.fork())

    def _replace(self, seq: int, allocation: Allocation) -> None:
        self._sequences[seq].free()
        self._sequences[seq] = allocation
