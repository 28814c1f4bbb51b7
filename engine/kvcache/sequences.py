"""Memory of sequences: KV blocks and state slots, with checkpoints, forks and rollback points.

A recurrent state cannot be cut short, so a sequence can only go back to a state that was kept. A
checkpoint keeps blocks and state, and outlives its sequence. A rollback point keeps the state at an
earlier position. Per-token states are those after the last tokens of the last step. Keeping moves
no data: it adds references. The next step writes another slot, and a copy of the last block.

Every reference is in an Allocation of `SequenceMemory`, of a sequence or of a checkpoint. An
exception may come between any two statements of an operation, so the pools' counts follow from the
allocations: `recount` makes them right again. An allocation never lists what it may not write.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from engine import checks
from engine.errors import EngineError
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

    @property
    def states(self) -> list[StateSlot]:
        """All states that it refers to."""
        return [self.state, *self.rollback_points.values(), *self.token_states.values()]

    def free(self) -> None:
        """Free everything, at once even while a step is in flight."""
        self.state.cancel()
        _free_all(self.token_states)
        _free_all(self.rollback_points)
        self.table.truncate(0)
        self.state.free()
        self.n_tokens = 0


def _free_all(states: dict[int, StateSlot]) -> None:
    # Taken out first: what is freed must not be found.
    while states:
        states.popitem()[1].free()


@dataclass(frozen=True)
class Step:
    """Where one step of one sequence reads and writes; the contents of its row of the inputs."""

    n_past: int
    blocks: list[int]
    state_src: int
    state_dst: int
    snapshot_dst: tuple[int, ...] = ()


class SequenceError(EngineError):
    """A sequence that is not there."""


class CheckpointError(EngineError):
    """A checkpoint that was released, or that is of another engine."""


class CheckpointMemory(Protocol):
    """The memory of sequences, as checkpoints use it."""

    @property
    def dropped(self) -> deque[int]: ...

    def n_tokens(self, seq: int) -> int: ...

    def allocation(self, seq: int) -> Allocation: ...

    def checkpoint(self, seq: int, n_tokens: int | None = None) -> Checkpoint: ...

    def free(self, seq: int) -> None: ...


class Checkpoint:
    """References to a sequence's contents at some position: a sequence to which no step appends.

    `release` it when it is not needed, or drop it: then the next call of the engine frees it.
    """

    def __init__(self, memory: CheckpointMemory, seq: int) -> None:
        self.memory, self._seq, self._is_released = memory, seq, False

    def __repr__(self) -> str:
        what = "released" if self._is_released else f"of sequence {self._seq}"
        return f"<Checkpoint {what}>"

    def __del__(self) -> None:
        if not self.__dict__.get("_is_released", True):
            self.memory.dropped.append(self._seq)

    @property
    def seq(self) -> int:
        """The sequence that holds the contents. Raises CheckpointError if it was released."""
        if self._is_released:
            raise CheckpointError("this checkpoint was released")
        return self._seq

    @property
    def n_tokens(self) -> int:
        return self.memory.n_tokens(self.seq)

    @property
    def allocation(self) -> Allocation:
        return self.memory.allocation(self.seq)

    @property
    def rollback_points(self) -> frozenset[int]:
        """The earlier positions that `rolled_back` can go to."""
        return frozenset(self.allocation.rollback_points)

    def rolled_back(self, n_tokens: int) -> Checkpoint:
        """A new checkpoint of the sequence as it was at one of `rollback_points`."""
        return self.memory.checkpoint(self.seq, n_tokens)

    def fork(self) -> Checkpoint:
        """A new checkpoint of the same contents, to be released on its own."""
        return self.memory.checkpoint(self.seq)

    def release(self) -> None:
        """Free its references; it can't be used any more."""
        if not self._is_released:
            self.memory.free(self._seq)
            self._is_released = True


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
        # Sequences of checkpoints that nobody has any more: finalizers only note them here.
        self.dropped: deque[int] = deque()

    def reserve(self) -> int:
        """The number of a sequence to be created: who holds it before it is made can't lose it."""
        return next(self._ids)

    def create(self, seq: int | None = None) -> int:
        """A new, empty sequence. Its first step allocates; this doesn't."""
        table = BlockTable(self.blocks, self._block_size)
        return self._add(Allocation(0, table, StateSlot(self.slots)), seq)

    def adopt(self, seq: int, n_tokens: int, beside: int | None = None) -> Allocation:
        """A sequence with blocks and a slot for `n_tokens` positions, which the caller fills; the
        blocks are those of a sequence `beside` it, if there is one. Raises MemoryFullError."""
        own = self.allocation(self.create(seq))
        if beside is None:
            own.table.extend(0, n_tokens, self._copy_block)
        else:
            own.table = self.allocation(beside).table.fork(n_tokens)
        own.state.slot = self.slots.allocate()
        own.n_tokens = n_tokens
        return own

    def _add(self, allocation: Allocation, seq: int | None) -> int:
        """Make an allocation that of a sequence, of a new one if it is None."""
        seq = self.reserve() if seq is None else seq
        before = self._sequences.get(seq)
        self._sequences[seq] = allocation
        if before is not None:
            before.free()
        return seq

    def fork(self, seq: int, into: int | None = None, n_tokens: int | None = None) -> int:
        """A new sequence with the same contents, or those at a rollback point. From here on the two
        are independent."""
        own = self.allocation(seq)
        if n_tokens is None or n_tokens == own.n_tokens:
            return self._add(own.fork(), into)
        if not checks.is_integer(n_tokens) or n_tokens not in own.rollback_points:
            points = ", ".join(map(str, own.rollback_points)) or "none"
            came = checks.shown(n_tokens)
            raise CheckpointError(f"expected a rollback point ({points}), got position {came}")
        return self._add(own.at(n_tokens, own.rollback_points[n_tokens]), into)

    def free(self, seq: int) -> None:
        """Remove a sequence, if it is there, and free its memory; checkpoints of it stay valid."""
        own = self._sequences.pop(seq, None)
        if own is not None:
            own.free()

    def free_dropped(self) -> None:
        """Free the sequences of checkpoints that were dropped."""
        while self.dropped:
            self.free(self.dropped[0])
            self.dropped.popleft()

    def recount(self) -> None:
        """Make the pools' counts those of the allocations, after an interrupted operation."""
        every = list(self._sequences.values())
        self.blocks.recount(block for own in every for block in own.table.blocks)
        self.slots.recount(slot for own in every for state in own.states for slot in state.slots)

    def allocation(self, seq: int) -> Allocation:
        """What a sequence holds. Raises SequenceError for a sequence that is not there."""
        if not checks.is_integer(seq) or seq not in self._sequences:
            came = f"sequence {checks.shown(seq)}"
            raise SequenceError(f"{came} is not there: it was freed, or never created")
        return self._sequences[seq]

    def __contains__(self, seq: int) -> bool:
        return seq in self._sequences

    def n_tokens(self, seq: int) -> int:
        return self.allocation(seq).n_tokens

    def missing_slots(self, seq: int) -> int:
        """How many slots its next step allocates, apart from those of per-token states."""
        return self.allocation(seq).state.missing()

    def owned(self, seq: int) -> tuple[list[int], list[int]]:
        """(state slots, blocks) that only this sequence holds."""
        own = self.allocation(seq)
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
        own = self.allocation(seq)
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
        own = self.allocation(seq)
        own.state.finish()
        own.n_tokens += n_new

    def cancel(self, seq: int) -> None:
        own = self.allocation(seq)
        _free_all(own.token_states)
        own.state.cancel()
        own.table.truncate(own.n_tokens)

    def reset(self, seq: int) -> None:
        """Make a sequence empty, after a step that failed and left its state half written."""
        self.create(seq)

    def add_rollback_point(self, seq: int, replace: bool = False) -> None:
        """Keep the state here for `truncate`, or raise MemoryFullError; `replace` frees earlier."""
        own = self.allocation(seq)
        if replace:
            _free_all(own.rollback_points)
        if own.n_tokens and own.n_tokens not in own.rollback_points:
            self.slots.require(1)  # The next step needs a slot of its own.
            own.rollback_points[own.n_tokens] = own.state.fork()

    def truncate(self, seq: int, n_tokens: int) -> int:
        """Go back to `n_tokens` positions, or to the nearest kept state before; returns where."""
        n_tokens = checks.integer(SequenceError, "n_tokens", n_tokens)
        own = self.allocation(seq)
        if n_tokens >= own.n_tokens:
            return own.n_tokens
        kept = own.rollback_points | own.token_states
        reached = max((n for n in kept if n <= n_tokens), default=0)
        state = kept[reached] if reached else StateSlot(self.slots)
        self._add(own.at(reached, state), seq)
        return reached

    def checkpoint(self, seq: int, n_tokens: int | None = None) -> Checkpoint:
        """A checkpoint of a sequence as it is, or as it was at a rollback point."""
        kept = Checkpoint(self, self.reserve())
        self.fork(seq, kept.seq, n_tokens)
        return kept

    def restore(self, seq: int, checkpoint: Checkpoint) -> None:
        """Give the sequence the checkpoint's contents; it can be restored again, also elsewhere."""
        self.fork(checkpoint.seq, seq)
