"""Memory per sequence: KV blocks and a state slot together, with checkpoints.

A recurrent state cannot be cut short, so going back means restoring a checkpoint: a reference to a
slot and to blocks that nobody writes any more. Taking and restoring one moves no data; the first
write after it goes to another slot, and to a copy of the block that is partly filled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.kvcache.attention import BlockTable
from engine.kvcache.pool import Pool
from engine.kvcache.recurrent import StateSlot


@dataclass
class Span:
    """`n_tokens` positions of a sequence, with the blocks and the slot that hold them."""

    n_tokens: int
    table: BlockTable
    state: StateSlot

    def fork(self) -> Span:
        """The same contents, held once more."""
        return Span(self.n_tokens, self.table.fork(self.n_tokens), self.state.fork())

    def release(self) -> None:
        """Give everything back."""
        self.table.truncate(0)
        self.state.release()


@dataclass(frozen=True)
class Step:
    """Where one step of one sequence reads and writes."""

    n_past: int
    blocks: list[int]
    state_src: int
    state_dst: int


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
        seq = self._next_id
        self._next_id += 1
        span = Span(0, BlockTable(self.blocks, self._block_size), StateSlot(self.slots))
        self._sequences[seq] = span
        return seq

    def free(self, seq: int) -> None:
        """Forget a sequence and give its memory back; checkpoints of it stay valid."""
        self._sequences.pop(seq).release()

    def n_tokens(self, seq: int) -> int:
        """Positions that a sequence holds."""
        return self._sequences[seq].n_tokens

    def begin(self, seq: int, n_new: int) -> Step:
        """Make room for `n_new` tokens and say where the step reads and writes.

        Follow with `finish` or `cancel`. Raises MemoryFullError with nothing changed.
        """
        span = self._sequences[seq]
        self.slots.require(span.state.missing())
        span.table.extend(span.n_tokens, n_new, self._copy_block)
        source, target = span.state.begin()
        return Step(span.n_tokens, span.table.blocks, source, target)

    def finish(self, seq: int, n_new: int) -> None:
        """The step was run: the sequence has `n_new` more tokens."""
        span = self._sequences[seq]
        span.state.finish()
        span.n_tokens += n_new

    def cancel(self, seq: int) -> None:
        """The step was not run: the sequence is as it was before `begin`."""
        span = self._sequences[seq]
        span.state.cancel()
        span.table.truncate(span.n_tokens)

    def reset(self, seq: int) -> None:
        """Make a sequence empty, after a step that broke off and left its state half written."""
        span = self._sequences[seq]
        span.state.cancel()
        span.release()
        span.n_tokens = 0

    def checkpoint(self, seq: int) -> Checkpoint:
        """Hold the sequence as it is now."""
        return Checkpoint(self._sequences[seq].fork())

    def restore(self, seq: int, checkpoint: Checkpoint) -> None:
        """Make the sequence what the checkpoint holds; it can be restored again, also elsewhere."""
        span = checkpoint.span.fork()
        self._sequences[seq].release()
        self._sequences[seq] = span
