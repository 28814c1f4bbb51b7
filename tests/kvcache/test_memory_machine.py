"""Random ways through the memory of sequences, against whole lists of tokens.

A state machine steps (with per-token states or not), breaks, forks, adds rollback points,
truncates, saves, restores and frees. Every sequence and every checkpoint must read back its own
tokens at all times, `truncate` must reach exactly the nearest kept position, and at the end
everything must be free.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.kvcache.pool import MemoryFullError
from engine.kvcache.sequences import Checkpoint
from engine.runtime.batch import Chunk, begin
from tests.kvcache.test_sequences import Contents


@dataclass
class Model:
    """What a sequence should be: its tokens, and the positions that it can go back to."""

    tokens: list[int] = field(default_factory=list)
    rollback_points: set[int] = field(default_factory=set)
    token_states: set[int] = field(default_factory=set)

    def kept(self) -> Model:
        """What forks, checkpoints and restored sequences share of it."""
        return Model(list(self.tokens), set(self.rollback_points))

    def truncate(self, n: int) -> int:
        """Go back to the nearest kept position."""
        if n >= len(self.tokens):
            return len(self.tokens)
        reached = max((k for k in self.rollback_points | self.token_states if k <= n), default=0)
        self.tokens = self.tokens[:reached]
        self.rollback_points = {k for k in self.rollback_points if k <= reached}
        self.token_states = set()
        return reached


class Sequences(RuleBasedStateMachine):
    """Pools that are small enough to run out now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.contents = Contents(n_blocks=16, n_slots=9)
        self.memory = self.contents.memory
        self.models: dict[int, Model] = {}
        self.saved: list[tuple[Checkpoint, Model]] = []
        self.n_tokens = 0

    def new_tokens(self, n: int) -> list[int]:
        """Never the same twice."""
        self.n_tokens += n
        return list(range(self.n_tokens - n, self.n_tokens))

    def choose(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.models)))

    @precondition(lambda self: len(self.models) < 4)
    @rule()
    def create(self) -> None:
        seq = self.memory.create()
        assert seq not in self.models
        self.models[seq] = Model()

    @precondition(lambda self: self.models and len(self.models) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        seq = self.choose(data)
        self.models[self.memory.fork(seq)] = self.models[seq].kept()

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq = self.choose(data)
        self.memory.free(seq)
        del self.models[seq]

    @precondition(lambda self: self.models)
    @rule(data=st.data(), end=st.sampled_from(["finish", "finish", "finish", "cancel", "reset"]))
    def batch(self, data: st.DataObject, end: str) -> None:
        """A step of several sequences that finds no room, is run, not run, or breaks off."""
        chosen = st.lists(st.sampled_from(sorted(self.models)), min_size=1, unique=True)
        chunks = [
            Chunk(
                seq,
                self.new_tokens(data.draw(st.integers(1, 9))),
                n_snapshots=data.draw(st.sampled_from([0, 0, 1, 3])),
            )
            for seq in data.draw(chosen)
        ]
        free = self.memory.blocks.n_free, self.memory.slots.n_free
        try:
            steps = begin(chunks, self.memory)
        except MemoryFullError:
            # It may have freed per-token states: they are kept until the next step only.
            assert self.memory.blocks.n_free <= free[0]
            assert self.memory.slots.n_free >= free[1]
            for chunk in chunks:
                kept = self.memory._sequences[chunk.seq].token_states.keys()
                self.models[chunk.seq].token_states &= kept
            return
        if end != "cancel":
            for chunk, step in zip(chunks, steps, strict=True):
                self.contents.run(step, list(chunk.tokens))
        for chunk in chunks:
            self.end(chunk, end)

    def end(self, chunk: Chunk, end: str) -> None:
        model = self.models[chunk.seq]
        if end == "finish":
            self.memory.finish(chunk.seq, len(chunk.tokens))
            model.tokens = model.tokens + list(chunk.tokens)
            n, kept = len(model.tokens), min(chunk.n_snapshots, len(chunk.tokens))
            model.token_states = set(range(n - kept + 1, n + 1))
        elif end == "cancel":
            self.memory.cancel(chunk.seq)
            model.token_states = set()
        else:
            self.memory.reset(chunk.seq)
            self.models[chunk.seq] = Model()

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def add_rollback_point(self, data: st.DataObject) -> None:
        seq = self.choose(data)
        model, n_free = self.models[seq], self.memory.slots.n_free
        try:
            self.memory.add_rollback_point(seq)
        except MemoryFullError:
            assert n_free == 0
            return
        model.rollback_points |= {len(model.tokens)} - {0}
        assert self.memory.slots.n_free == n_free

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        seq = self.choose(data)
        n = data.draw(st.integers(0, len(self.models[seq].tokens) + 1))
        assert self.memory.truncate(seq, n) == self.models[seq].truncate(n)

    @precondition(lambda self: self.models and len(self.saved) < 4)
    @rule(data=st.data())
    def checkpoint(self, data: st.DataObject) -> None:
        seq = self.choose(data)
        self.saved.append((self.memory.checkpoint(seq), self.models[seq].kept()))

    @precondition(lambda self: self.models and self.saved)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        seq = self.choose(data)
        checkpoint, model = data.draw(st.sampled_from(self.saved))
        self.memory.restore(seq, checkpoint)
        self.models[seq] = model.kept()

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.saved) - 1))
        self.saved.pop(index)[0].release()

    @invariant()
    def everybody_reads_his_own(self) -> None:
        for seq, model in self.models.items():
            held = self.memory._sequences[seq]
            self.contents.check(held, model.tokens)
            assert set(held.rollback_points) == model.rollback_points
            assert set(held.token_states) == model.token_states
        for checkpoint, model in self.saved:
            assert checkpoint.n_tokens == len(model.tokens)
            self.contents.check(checkpoint.allocation, model.tokens)

    @invariant()
    def kept_states_are_those_of_their_positions(self) -> None:
        allocations = [(self.memory._sequences[seq], model) for seq, model in self.models.items()]
        allocations += [(checkpoint.allocation, model) for checkpoint, model in self.saved]
        for held, model in allocations:
            for n, state in [*held.rollback_points.items(), *held.token_states.items()]:
                assert list(self.contents.slots[state.slot]) == model.tokens[:n]

    @invariant()
    def nothing_is_held_by_nobody(self) -> None:
        allocations = [*self.memory._sequences.values(), *(c.allocation for c, _ in self.saved)]
        blocks = {block for held in allocations for block in held.table.blocks}
        slots = {held.state.slot for held in allocations} - {-1}
        for held in allocations:
            slots |= {s.slot for s in [*held.rollback_points.values(), *held.token_states.values()]}
        assert len(blocks) == self.memory.blocks.size - self.memory.blocks.n_free
        assert len(slots) == self.memory.slots.size - self.memory.slots.n_free

    def teardown(self) -> None:
        for seq in self.models:
            self.memory.free(seq)
        for checkpoint, _ in self.saved:
            checkpoint.release()
        for pool in (self.memory.blocks, self.memory.slots):
            assert pool.n_free == pool.size


TestSequences = Sequences.TestCase
TestSequences.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
