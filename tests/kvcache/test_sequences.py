"""Memory of sequences against a naive model: what is written stays readable, and all comes back.

Blocks and slots hold simulated contents: a block its tokens by position, a slot all tokens that its
state has seen. Every sequence and every checkpoint must read back its own tokens. Here are pools,
tables and slots alone, and small cases; test_memory_machine.py takes random ways through it all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.kvcache.blocks import BlockTable
from engine.kvcache.pool import MemoryFullError, Pool
from engine.kvcache.sequences import Allocation, CheckpointError, SequenceMemory, Step
from engine.kvcache.slots import NO_SLOT, StateSlot
from engine.runtime.batch import Chunk, begin

BLOCK = 4


# Pools.


def test_a_pool_hands_out_every_index_once() -> None:
    pool = Pool(3, "things")
    assert sorted(pool.allocate() for _ in range(3)) == [0, 1, 2]
    assert pool.n_free == 0
    with pytest.raises(MemoryFullError, match="out of things: 1 needed, 0 of 3 are free"):
        pool.allocate()
    pool.free(1)
    assert pool.allocate() == 1


def test_an_index_is_free_when_its_last_reference_goes() -> None:
    pool = Pool(2, "things")
    index = pool.allocate()
    assert not pool.is_shared(index)
    assert pool.share(index) == index
    assert pool.is_shared(index)
    pool.free(index)
    assert (pool.n_free, pool.is_shared(index)) == (1, False)
    pool.free(index)
    assert pool.n_free == 2


def test_a_pool_notices_what_nobody_holds() -> None:
    pool = Pool(2, "things")
    index = pool.allocate()
    pool.free(index)
    for wrong in (pool.free, pool.share):
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
    state.free()
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
        for back, slot in enumerate(step.snapshot_dst[::-1]):
            self.slots[slot] = (*before, *tokens[: len(tokens) - back])
        self.slots[step.state_dst] = (*before, *tokens)
        for position, token in enumerate(tokens, step.n_past):
            self.blocks[step.blocks[position // BLOCK]][position % BLOCK] = token

    def read(self, held: Allocation) -> tuple[list[Any], list[Any]]:
        """The tokens according to the blocks, and according to the slot."""
        cells = [cell for block in held.table.blocks for cell in self.blocks[block]]
        slot = held.state.slot
        return cells[: held.n_tokens], [] if slot == NO_SLOT else list(self.slots[slot])

    def check(self, held: Allocation, tokens: list[int]) -> None:
        assert held.n_tokens == len(tokens)
        assert self.read(held) == (tokens, tokens)
        assert len(held.table.blocks) == -(-len(tokens) // BLOCK)


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
    with pytest.raises(CheckpointError, match="released"):
        use(checkpoint, memory, seq)
    checkpoint.release()  # a second time is no error


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
    contents.check(saved.allocation, [1, 2])


@pytest.mark.parametrize("n_blocks", [1, 2, 3])
def test_a_batch_without_room_for_its_last_sequence_begins_none(n_blocks: int) -> None:
    contents = Contents(n_blocks, 3)
    sequences = [contents.memory.create() for _ in range(n_blocks + 1)]
    with pytest.raises(MemoryFullError):
        begin([Chunk(seq, [1]) for seq in sequences], contents.memory)
    assert (contents.memory.blocks.n_free, contents.memory.slots.n_free) == (n_blocks, 3)


def snapped(contents: Contents, seq: int, tokens: list[int], n_snapshots: int) -> None:
    step = contents.memory.begin(seq, len(tokens), n_snapshots)
    assert len(step.snapshot_dst) == min(n_snapshots, len(tokens))
    contents.run(step, tokens)
    contents.memory.finish(seq, len(tokens))


@pytest.mark.parametrize(
    ("n", "reached"), [(9, 7), (7, 7), (6, 6), (5, 5), (4, 2), (2, 2), (1, 0), (0, 0)]
)
def test_truncate_reaches_the_nearest_kept_position(n: int, reached: int) -> None:
    """Kept are a rollback point at 2 and the states after 5, 6 and 7 tokens."""
    contents = Contents(8, 8)
    memory, seq = contents.memory, contents.memory.create()
    stepped(contents, seq, [1, 2])
    memory.add_rollback_point(seq)
    snapped(contents, seq, [3, 4, 5, 6, 7], 3)
    assert memory.truncate(seq, n) == memory.n_tokens(seq) == reached
    contents.check(memory.checkpoint(seq).allocation, [1, 2, 3, 4, 5, 6, 7][:reached])
    stepped(contents, seq, [8])
    contents.check(memory.checkpoint(seq).allocation, [*[1, 2, 3, 4, 5, 6, 7][:reached], 8])


def test_per_token_states_are_gone_with_the_next_step_and_rollback_points_stay() -> None:
    contents = Contents(8, 8)
    memory, seq = contents.memory, contents.memory.create()
    snapped(contents, seq, [1, 2, 3, 4], 2)
    memory.add_rollback_point(seq)
    memory.add_rollback_point(seq)
    stepped(contents, seq, [5])
    stepped(contents, seq, [6])
    assert memory.slots.n_free == 6
    assert memory.truncate(seq, 5) == 4
    assert memory.truncate(seq, 3) == 0
    assert (memory.slots.n_free, memory.blocks.n_free) == (8, 8)


def test_rollback_points_behind_a_truncation_are_gone() -> None:
    contents = Contents(8, 8)
    memory, seq = contents.memory, contents.memory.create()
    for n in (1, 2, 3):
        stepped(contents, seq, [n])
        memory.add_rollback_point(seq)
    assert memory.truncate(seq, 1) == 1
    stepped(contents, seq, [4, 5, 6])
    assert memory.truncate(seq, 3) == 1
    contents.check(memory.checkpoint(seq).allocation, [1])


def test_a_fork_has_rollback_points_of_its_own() -> None:
    contents = Contents(8, 8)
    memory, a = contents.memory, contents.memory.create()
    stepped(contents, a, [1, 2, 3])
    memory.add_rollback_point(a)
    stepped(contents, a, [4, 5])
    b = memory.fork(a)
    assert memory.truncate(a, 1) == 0
    assert memory.truncate(b, 4) == 3
    stepped(contents, b, [6])
    contents.check(memory.checkpoint(b).allocation, [1, 2, 3, 6])
    assert memory.n_tokens(a) == 0


def test_a_checkpoint_goes_back_to_its_rollback_points() -> None:
    contents = Contents(8, 8)
    memory, seq = contents.memory, contents.memory.create()
    for n in (1, 2, 3):
        stepped(contents, seq, [n, -n, 0])
        memory.add_rollback_point(seq)
    stepped(contents, seq, [4])
    held = memory.checkpoint(seq)
    memory.free(seq)
    assert held.rollback_points == {3, 6, 9}
    back, again = held.rolled_back(6), held.fork()
    assert back.rollback_points == frozenset({3, 6})
    assert again.rollback_points == frozenset({3, 6, 9})
    contents.check(back.allocation, [1, -1, 0, 2, -2, 0])
    held.release()
    contents.check(again.allocation, [1, -1, 0, 2, -2, 0, 3, -3, 0, 4])
    again.release()
    seq = memory.create()
    memory.restore(seq, back)
    back.release()
    stepped(contents, seq, [7])
    contents.check(memory.checkpoint(seq).allocation, [1, -1, 0, 2, -2, 0, 7])


def test_one_rollback_point_instead_of_others() -> None:
    contents = Contents(8, 8)
    memory, seq = contents.memory, contents.memory.create()
    for n in (1, 2, 3):
        stepped(contents, seq, [n])
        memory.add_rollback_point(seq, replace=True)
    stepped(contents, seq, [4])
    assert memory.slots.n_free == 6
    assert memory.checkpoint(seq).rollback_points == {3}
    assert memory.truncate(seq, 3) == 3


def test_a_rollback_point_needs_a_slot_for_the_next_step() -> None:
    contents = Contents(8, 1)
    seq = contents.memory.create()
    contents.memory.add_rollback_point(seq)
    stepped(contents, seq, [1])
    with pytest.raises(MemoryFullError, match="out of state slots: 1 needed, 0 of 1 are free"):
        contents.memory.add_rollback_point(seq)
    stepped(contents, seq, [2])
    assert contents.memory.truncate(seq, 1) == 0


def test_a_step_without_slots_for_its_per_token_states_changes_nothing() -> None:
    contents = Contents(8, 3)
    seq = contents.memory.create()
    stepped(contents, seq, [1])
    with pytest.raises(MemoryFullError, match="out of state slots: 3 needed, 2 of 3 are free"):
        contents.memory.begin(seq, 5, 3)
    assert (contents.memory.slots.n_free, contents.memory.blocks.n_free) == (2, 7)
    snapped(contents, seq, [2], 3)
    contents.check(contents.memory.checkpoint(seq).allocation, [1, 2])
