"""Memory of sequences against a naive model: what is written stays readable, and all comes back.

Blocks and slots hold simulated contents: a block its tokens by position, a slot all tokens that its
state has seen. A state machine steps, breaks, forks and frees sequences at random; every sequence
and every checkpoint must read back its own tokens at all times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.batch import Piece, begin
from engine.kvcache.attention import BlockTable
from engine.kvcache.memory import Checkpoint, SequenceMemory, Span, Step
from engine.kvcache.pool import MemoryFullError, Pool
from engine.kvcache.recurrent import NO_SLOT, StateSlot

BLOCK = 4


# Pools.


def test_a_pool_hands_out_every_index_once() -> None:
    pool = Pool(3, "things")
    assert sorted(pool.acquire() for _ in range(3)) == [0, 1, 2]
    assert pool.n_free == 0
    with pytest.raises(MemoryFullError, match="out of things: 1 needed, 0 of 3 are free"):
        pool.acquire()
    pool.release(1)
    assert pool.acquire() == 1


def test_an_index_is_free_when_its_last_reference_goes() -> None:
    pool = Pool(2, "things")
    index = pool.acquire()
    assert not pool.is_shared(index)
    assert pool.share(index) == index
    assert pool.is_shared(index)
    pool.release(index)
    assert (pool.n_free, pool.is_shared(index)) == (1, False)
    pool.release(index)
    assert pool.n_free == 2


def test_a_pool_notices_what_nobody_holds() -> None:
    pool = Pool(2, "things")
    index = pool.acquire()
    pool.release(index)
    for wrong in (pool.release, pool.share):
        with pytest.raises(AssertionError):
            wrong(index)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_require(n: int) -> None:
    pool = Pool(2, "things")
    pool.require(n)
    assert pool.n_free == 2
    with pytest.raises(MemoryFullError, match=f"out of things: {n + 3} needed, 2 of 2 are free"):
        pool.require(n + 3)


# Block tables.


def no_copy(source: int, target: int) -> None:
    raise AssertionError("nothing is to be copied")


@pytest.mark.parametrize(
    ("n_past", "n_new", "n_blocks"), [(0, 1, 1), (0, 4, 1), (0, 5, 2), (0, 8, 2), (3, 1, 1)]
)
def test_a_table_has_room_for_its_positions(n_past: int, n_new: int, n_blocks: int) -> None:
    pool = Pool(9, "blocks")
    table = BlockTable(pool, BLOCK)
    table.extend(0, n_past, no_copy)
    before = pool.n_free
    missing = table.missing(n_past, n_new)
    table.extend(n_past, n_new, no_copy)
    assert len(set(table.blocks)) == n_blocks
    assert before - pool.n_free == missing


def test_a_full_block_is_shared_without_a_copy() -> None:
    pool = Pool(9, "blocks")
    table = BlockTable(pool, BLOCK)
    table.extend(0, 4, no_copy)
    fork = table.fork(4)
    table.extend(4, 1, no_copy)
    fork.extend(4, 1, no_copy)
    assert table.blocks[0] == fork.blocks[0]
    assert table.blocks[1] != fork.blocks[1]
    assert pool.n_free == 6


def test_the_first_to_write_a_partial_block_copies_it() -> None:
    pool, copies = Pool(9, "blocks"), []
    table = BlockTable(pool, BLOCK)
    table.extend(0, 6, no_copy)
    shared, fork = table.blocks[1], table.fork(6)
    assert table.missing(6, 1) == 1
    assert table.missing(6, 3) == 2
    table.extend(6, 3, lambda *blocks: copies.append(blocks))
    assert copies == [(shared, table.blocks[1])]
    assert fork.blocks == [table.blocks[0], shared]
    # The last holder writes in place.
    fork.extend(6, 1, no_copy)
    table.truncate(0)
    fork.truncate(0)
    assert pool.n_free == 9


def test_a_table_that_finds_no_room_changes_nothing() -> None:
    pool = Pool(3, "blocks")
    table = BlockTable(pool, BLOCK)
    table.extend(0, 6, no_copy)
    fork, blocks = table.fork(6), list(table.blocks)
    with pytest.raises(MemoryFullError, match="2 needed, 1 of 3"):
        table.extend(6, 3, no_copy)
    assert (table.blocks, fork.blocks, pool.n_free) == (blocks, blocks, 1)


@pytest.mark.parametrize(("n", "kept"), [(9, 3), (8, 2), (5, 2), (4, 1), (1, 1), (0, 0)])
def test_truncate_and_fork_keep_blocks_with_positions(n: int, kept: int) -> None:
    pool = Pool(3, "blocks")
    table = BlockTable(pool, BLOCK)
    table.extend(0, 9, no_copy)
    blocks = list(table.blocks)
    fork = table.fork(n)
    assert fork.blocks == blocks[:kept]
    fork.truncate(0)
    table.truncate(n)
    assert (table.blocks, pool.n_free) == (blocks[:kept], 3 - kept)


# Slots.


def test_a_slot_starts_from_zeros_and_is_written_in_place() -> None:
    pool = Pool(2, "slots")
    state = StateSlot(pool)
    source, slot = state.begin()
    assert source == NO_SLOT
    state.finish()
    assert state.slot == slot
    assert state.begin() == (slot, slot)
    state.finish()
    assert pool.n_free == 1
    state.release()
    assert (state.slot, pool.n_free) == (NO_SLOT, 2)


def test_a_shared_slot_is_only_read() -> None:
    pool = Pool(2, "slots")
    state = StateSlot(pool)
    state.begin()
    state.finish()
    fork, slot = state.fork(), state.slot
    assert state.missing() == fork.missing() == 1
    source, target = state.begin()
    assert source == slot != target
    with pytest.raises(MemoryFullError):
        fork.begin()
    state.finish()
    # Now the fork is alone with it.
    assert fork.begin() == (slot, slot)


def test_a_cancelled_step_leaves_the_slot() -> None:
    pool = Pool(2, "slots")
    state = StateSlot(pool)
    state.begin()
    state.cancel()
    assert (state.slot, pool.n_free) == (NO_SLOT, 2)
    state.begin()
    state.finish()
    fork, slot = state.fork(), state.slot
    for held in (state, fork):
        held.begin()
        held.cancel()
        assert (held.slot, pool.n_free) == (slot, 1)
    state.cancel()
    assert pool.n_free == 1


# Sequences.


class Contents:
    """What blocks and slots would hold, and how sequences and checkpoints read it."""

    def __init__(self, n_blocks: int, n_slots: int) -> None:
        self.blocks: list[list[Any]] = [["dirty"] * BLOCK for _ in range(n_blocks)]
        self.slots: list[Any] = ["dirty"] * n_slots
        self.memory = SequenceMemory(n_blocks, n_slots, BLOCK, self.copy_block)

    def copy_block(self, source: int, target: int) -> None:
        self.blocks[target] = list(self.blocks[source])

    def run(self, step: Step, tokens: list[int]) -> None:
        """What the graph does: read the state, write keys and the state after the tokens."""
        before = () if step.state_src == NO_SLOT else self.slots[step.state_src]
        self.slots[step.state_dst] = (*before, *tokens)
        for position, token in enumerate(tokens, step.n_past):
            self.blocks[step.blocks[position // BLOCK]][position % BLOCK] = token

    def read(self, span: Span) -> tuple[list[Any], list[Any]]:
        """The tokens according to the blocks, and according to the slot."""
        cells = [cell for block in span.table.blocks for cell in self.blocks[block]]
        slot = span.state.slot
        return cells[: span.n_tokens], [] if slot == NO_SLOT else list(self.slots[slot])

    def check(self, span: Span, tokens: list[int]) -> None:
        assert span.n_tokens == len(tokens)
        assert self.read(span) == (tokens, tokens)
        assert len(span.table.blocks) == -(-len(tokens) // BLOCK)


class Sequences(RuleBasedStateMachine):
    """Pools that are small enough to run out now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.contents = Contents(n_blocks=12, n_slots=5)
        self.memory = self.contents.memory
        self.tokens: dict[int, list[int]] = {}
        self.saved: list[tuple[Checkpoint, list[int]]] = []
        self.n_tokens = 0

    def new_tokens(self, n: int) -> list[int]:
        """Never the same twice."""
        self.n_tokens += n
        return list(range(self.n_tokens - n, self.n_tokens))

    def choose(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.tokens)))

    @precondition(lambda self: len(self.tokens) < 4)
    @rule()
    def create(self) -> None:
        seq = self.memory.create()
        assert seq not in self.tokens
        self.tokens[seq] = []

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq = self.choose(data)
        self.memory.free(seq)
        del self.tokens[seq]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), end=st.sampled_from(["finish", "finish", "finish", "cancel", "reset"]))
    def batch(self, data: st.DataObject, end: str) -> None:
        """A step of several sequences that finds no room, is run, not run, or breaks off."""
        chosen = st.lists(st.sampled_from(sorted(self.tokens)), min_size=1, unique=True)
        lengths = {seq: data.draw(st.integers(1, 9)) for seq in data.draw(chosen)}
        pieces = [Piece(seq, self.new_tokens(n)) for seq, n in lengths.items()]
        try:
            steps = begin(pieces, self.memory)
        except MemoryFullError:
            return
        if end != "cancel":
            for piece, step in zip(pieces, steps, strict=True):
                self.contents.run(step, list(piece.tokens))
        for piece in pieces:
            if end == "finish":
                self.memory.finish(piece.seq, len(piece.tokens))
                self.tokens[piece.seq] = self.tokens[piece.seq] + list(piece.tokens)
            elif end == "cancel":
                self.memory.cancel(piece.seq)
            else:
                self.memory.reset(piece.seq)
                self.tokens[piece.seq] = []

    @precondition(lambda self: self.tokens and len(self.saved) < 4)
    @rule(data=st.data())
    def checkpoint(self, data: st.DataObject) -> None:
        seq = self.choose(data)
        self.saved.append((self.memory.checkpoint(seq), self.tokens[seq]))

    @precondition(lambda self: self.tokens and self.saved)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        seq = self.choose(data)
        checkpoint, tokens = data.draw(st.sampled_from(self.saved))
        self.memory.restore(seq, checkpoint)
        self.tokens[seq] = tokens

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.saved) - 1))
        self.saved.pop(index)[0].release()

    @invariant()
    def everybody_reads_his_own(self) -> None:
        for seq, tokens in self.tokens.items():
            assert self.memory.n_tokens(seq) == len(tokens)
            look = self.memory.checkpoint(seq)
            self.contents.check(look.span, tokens)
            look.release()
        for checkpoint, tokens in self.saved:
            assert checkpoint.n_tokens == len(tokens)
            self.contents.check(checkpoint.span, tokens)

    def teardown(self) -> None:
        for seq in self.tokens:
            self.memory.free(seq)
        for checkpoint, _ in self.saved:
            checkpoint.release()
        for pool in (self.memory.blocks, self.memory.slots):
            assert pool.n_free == pool.size


TestSequences = Sequences.TestCase
TestSequences.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def stepped(contents: Contents, seq: int, tokens: list[int]) -> Step:
    step = contents.memory.begin(seq, len(tokens))
    contents.run(step, tokens)
    contents.memory.finish(seq, len(tokens))
    return step


def test_a_new_sequence_holds_nothing_before_its_first_step() -> None:
    memory = Contents(4, 2).memory
    seq = memory.create()
    memory.checkpoint(seq).release()
    assert (memory.n_tokens(seq), memory.blocks.n_free, memory.slots.n_free) == (0, 4, 2)
    step = memory.begin(seq, 5)
    assert (step.n_past, len(step.blocks), step.state_src) == (0, 2, NO_SLOT)


def test_a_step_goes_on_where_the_last_one_ended() -> None:
    contents = Contents(4, 2)
    seq = contents.memory.create()
    first = stepped(contents, seq, [1, 2, 3])
    second = stepped(contents, seq, [4, 5])
    assert second.n_past == 3
    assert second.state_src == second.state_dst == first.state_dst


@pytest.mark.parametrize("use", [lambda c, m, s: m.restore(s, c), lambda c, m, s: c.n_tokens])
def test_a_released_checkpoint_cannot_be_used(use: Callable[..., object]) -> None:
    memory = Contents(4, 2).memory
    seq = memory.create()
    checkpoint = memory.checkpoint(seq)
    checkpoint.release()
    for action in (lambda: use(checkpoint, memory, seq), checkpoint.release):
        with pytest.raises(AssertionError, match="released"):
            action()


def test_holders_of_one_state_need_no_slots_until_they_step() -> None:
    contents = Contents(8, 2)
    memory, a = contents.memory, contents.memory.create()
    stepped(contents, a, [1, 2])
    saved = memory.checkpoint(a)
    others = [memory.create() for _ in range(5)]
    for seq in others:
        memory.restore(seq, saved)
    assert (memory.blocks.n_free, memory.slots.n_free) == (7, 1)
    stepped(contents, others[0], [3])
    assert (memory.blocks.n_free, memory.slots.n_free) == (6, 0)
    with pytest.raises(MemoryFullError, match="out of state slots: 1 needed, 0 of 2 are free"):
        memory.begin(others[1], 1)
    assert (memory.blocks.n_free, memory.slots.n_free) == (6, 0)
    contents.check(saved.span, [1, 2])


@pytest.mark.parametrize("n_blocks", [1, 2, 3])
def test_a_batch_without_room_for_its_last_sequence_begins_none(n_blocks: int) -> None:
    contents = Contents(n_blocks, 3)
    sequences = [contents.memory.create() for _ in range(n_blocks + 1)]
    with pytest.raises(MemoryFullError):
        begin([Piece(seq, [1]) for seq in sequences], contents.memory)
    assert (contents.memory.blocks.n_free, contents.memory.slots.n_free) == (n_blocks, 3)
