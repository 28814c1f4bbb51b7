"""Memory per sequence: KV blocks and a state slot together, with checkpoints, forks and marks.

A recurrent state cannot be cut short, so going back means returning to a state that was kept: by a
checkpoint (which holds blocks too and outlives its sequence), or by a mark or a snapshot of the
sequence's own. Keeping moves no data: it is one more reference to a slot and to blocks; the first
write after it goes to another slot, and to a copy of the block that is partly filled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from engine.kvcache.blocks import BlockTable
from engine.kvcache.pool import Pool
from engine.kvcache.slots import StateSlot


@dataclass
class Span:
    """`n_tokens` positions of a sequence, with the blocks and the slot that hold them.

    `marks`: states at earlier positions; `snapshots`: those of the last step, kept until the next.
    Neither needs blocks of its own, for a sequence never overwrites its past.
    """

    n_tokens: int
    table: BlockTable
    state: StateSlot
    marks: dict[int, StateSlot] = field(default_factory=dict)
    snapshots: dict[int, StateSlot] = field(default_factory=dict)

    def fork(self) -> Span:
        """The same contents, held once more."""
        marks = {n: state.fork() for n, state in self.marks.items()}
        return Span(self.n_tokens, self.table.fork(self.n_tokens), self.state.fork(), marks)

    def release(self) -> None:
        """Give everything back; a step that was begun is not waited for."""
        self.state.cancel()
        self.drop_snapshots()
        self.drop_marks(0)
        self.table.truncate(0)
        self.state.release()
        self.n_tokens = 0

    def drop_snapshots(self) -> None:
        """Give the last step's snapshots back."""
        for state in self.snapshots.values():
            state.release()
        self.snapshots.clear()

    def drop_marks(self, n_tokens: int) -> None:
        """Give back the marks at or after a position."""
        for n in [n for n in self.marks if n >= n_tokens]:
            self.marks.pop(n).release()


@dataclass(frozen=True)
class Step:
    """Where one step of one sequence reads and writes."""

    n_past: int
    blocks: list[int]
    state_src: int
    state_dst: int
    snapshots: tuple[int, ...] = ()


class Checkpoint:
    """A sequence as it was at some position; hold it to be able to go back, then `release` it."""

    def __init__(self, span: Span) -> None:
        self._span: Span | None = span

    @property
    def n_tokens(self) -> int:
        """The position it was taken at."""
        return self.span.n_tokens

    @property
    def span(self) -> Span:
        """What it holds."""
        assert self._span is not None, "this checkpoint was released"
        return self._span

    @property
    def marks(self) -> frozenset[int]:
        """The earlier positions that `back_to` can go to."""
        return frozenset(self.span.marks)

    def back_to(self, n_tokens: int) -> Checkpoint:
        """Another checkpoint, of the sequence as it was at one of `marks`."""
        marks = {n: state.fork() for n, state in self.span.marks.items() if n <= n_tokens}
        table, state = self.span.table.fork(n_tokens), self.span.marks[n_tokens].fork()
        return Checkpoint(Span(n_tokens, table, state, marks))

    def fork(self) -> Checkpoint:
        """Another checkpoint of the same, to be released on its own."""
        return Checkpoint(self.span.fork())

    def release(self) -> None:
        """Give its blocks and its slot back; it can't be restored any more."""
        self.span.release()
        self._span = None


class SequenceMemory:
    """Blocks and slots of all sequences. `copy_block(source, target)` copies a block's contents."""

    def __init__(
        self, n_blocks: int, n_slots: int, block_size: int, copy_block: Callable[[int, int], None]
    ) -> None:
        self.blocks = Pool(n_blocks, "KV cache blocks")
        self.slots = Pool(n_slots, "state slots")
        self._block_size, self._copy_block = block_size, copy_block
        self._sequences: dict[int, Span] = {}
        self._next_id = 0

    def create(self) -> int:
        """A new, empty sequence. Nothing is allocated before its first step."""
        return self._add(Span(0, BlockTable(self.blocks, self._block_size), StateSlot(self.slots)))

    def _add(self, span: Span) -> int:
        seq = self._next_id
        self._next_id += 1
        self._sequences[seq] = span
        return seq

    def fork(self, seq: int) -> int:
        """A new sequence with the same contents; each goes its own way from here."""
        return self._add(self._sequences[seq].fork())

    def free(self, seq: int) -> None:
        """Forget a sequence and give its memory back; checkpoints of it stay valid."""
        self._sequences.pop(seq).release()

    def n_tokens(self, seq: int) -> int:
        """Positions that a sequence holds."""
        return self._sequences[seq].n_tokens

    def missing_slots(self, seq: int) -> int:
        """State slots that its next step takes, snapshots apart."""
        return self._sequences[seq].state.missing()

    def owned(self, seq: int) -> tuple[list[int], list[int]]:
        """(state slots, blocks) that a sequence holds and nobody else does."""
        span = self._sequences[seq]
        slots = [s for state in (span.state, *span.snapshots.values()) for s in state.slots]
        return (
            [slot for slot in slots if not self.slots.is_shared(slot)],
            [block for block in span.table.blocks if not self.blocks.is_shared(block)],
        )

    def begin(self, seq: int, n_new: int, n_snapshots: int = 0, keep: bool = False) -> Step:
        """Make room for `n_new` tokens and say where the step reads and writes.

        The states after each of the last `n_snapshots` of them are kept until the next step. Follow
        with `finish` or `cancel`: with `keep` also after the step was run, as it then writes no
        slot or position that the sequence holds. Raises MemoryFullError with the contents
        unchanged.
        """
        span = self._sequences[seq]
        span.drop_snapshots()
        n_snapshots = min(n_snapshots, n_new)
        self.slots.require((keep or span.state.missing()) + n_snapshots)
        span.table.extend(span.n_tokens, n_new, self._copy_block)
        source, target = span.state.begin(keep)
        last = span.n_tokens + n_new
        for n in range(last - n_snapshots + 1, last + 1):
            span.snapshots[n] = StateSlot(self.slots, self.slots.acquire())
        kept = tuple(state.slot for state in span.snapshots.values())
        return Step(span.n_tokens, span.table.blocks, source, target, kept)

    def finish(self, seq: int, n_new: int) -> None:
        """The step was run: the sequence has `n_new` more tokens."""
        span = self._sequences[seq]
        span.state.finish()
        span.n_tokens += n_new

    def cancel(self, seq: int) -> None:
        """The step was not run: the sequence is as it was before `begin`."""
        span = self._sequences[seq]
        span.drop_snapshots()
        span.state.cancel()
        span.table.truncate(span.n_tokens)

    def reset(self, seq: int) -> None:
        """Make a sequence empty, after a step that broke off and left its state half written."""
        self._sequences[seq].release()

    def mark(self, seq: int, only: bool = False) -> None:
        """Keep the state at this position, so that `truncate` can come back to it.

        With `only`, instead of the marks there are. Raises MemoryFullError if no slot is left.
        """
        span = self._sequences[seq]
        if only:
            span.drop_marks(0)
        if span.n_tokens and span.n_tokens not in span.marks:
            self.slots.require(1)  # The next step needs a slot of its own.
            span.marks[span.n_tokens] = span.state.fork()

    def truncate(self, seq: int, n_tokens: int) -> int:
        """Go back to `n_tokens` positions, or to the nearest kept state before; returns where."""
        span = self._sequences[seq]
        if n_tokens >= span.n_tokens:
            return span.n_tokens
        kept = span.marks | span.snapshots
        reached = max((n for n in kept if n <= n_tokens), default=0)
        state = kept[reached].fork() if reached else StateSlot(self.slots)
        span.state.release()
        span.state = state
        span.drop_snapshots()
        span.drop_marks(reached + 1)
        span.table.truncate(reached)
        span.n_tokens = reached
        return reached

    def checkpoint(self, seq: int) -> Checkpoint:
        """Hold the sequence as it is now."""
        return Checkpoint(self._sequences[seq].fork())

    def restore(self, seq: int, checkpoint: Checkpoint) -> None:
        """Make the sequence what the checkpoint holds; it can be restored again, also elsewhere."""
        span = checkpoint.span.fork()
        self._sequences[seq].release()
        self._sequences[seq] = span
