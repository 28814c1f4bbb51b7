"""Random operations on sequences of a real model: each continues as its tokens alone would.

The test keeps, for every sequence, the list of its tokens and of the positions that it can go back
to. After every operation a fork of the sequence takes one more token, and its logits are compared
with those of the whole list, run from scratch; so wrong kept states are found.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine
from engine.kvcache.pool import MemoryFullError
from engine.kvcache.sequences import Checkpoint
from engine.runtime.batch import BatchError, Chunk, Logits
from tests.support.helpers import assert_all_free, exact_engine, nmse, random_ids

Rng = np.random.Generator
Load = Callable[..., Engine]
MAX_NMSE = 1e-10
N_SNAPSHOTS = 3
MAX_TOKENS = 220


@pytest.fixture(
    scope="module",
    params=[("tiny", "float64"), ("tiny-untied", "float64"), ("tiny", "cpu")],
    ids="-".join,
)
def load(request: pytest.FixtureRequest, models: Callable[[str, str], Path]) -> Load:
    """load(**options): an engine of each model."""
    preset, backend = request.param
    return partial(exact_engine, backend, models(preset, "F32"))


@pytest.fixture(scope="module")
def alone(load: Load) -> Engine:
    return load(n_ctx=512)


@pytest.fixture(scope="module")
def engine(load: Load) -> Engine:
    options: dict[str, Any] = {"n_parallel": 5, "n_checkpoints": 6, "n_snapshots": N_SNAPSHOTS}
    return load(n_ctx=1024, **options)


class Sequence:
    """What a sequence should be."""

    def __init__(self, ids: list[int], marks: set[int], snapshots: set[int] | None = None) -> None:
        self.ids, self.marks, self.snapshots = ids, marks, snapshots or set()

    def kept(self) -> Sequence:
        return Sequence(list(self.ids), set(self.marks))

    def truncate(self, n: int) -> int:
        if n >= len(self.ids):
            return len(self.ids)
        reached = max((k for k in self.marks | self.snapshots if k <= n), default=0)
        self.ids, self.snapshots = self.ids[:reached], set()
        self.marks = {k for k in self.marks if k <= reached}
        return reached


class Walk:
    """Operations on an engine and on the model of its sequences; each checks what it did."""

    def __init__(self, engine: Engine, alone: Engine, rng: Rng) -> None:
        self.engine, self.alone, self.rng, self.memory = engine, alone, rng, engine.memory
        self.sequences: dict[int, Sequence] = {}
        self.saved: list[tuple[Checkpoint, Sequence]] = []

    def any(self) -> int:
        return int(self.rng.choice(list(self.sequences)))

    def create(self) -> int:
        seq = self.memory.create()
        self.sequences[seq] = Sequence([], set())
        return seq

    def extend(self, lengths: dict[int, int], n_snapshots: int = 0) -> None:
        chunks = [
            Chunk(seq, random_ids(self.rng, n), Logits.ALL, n_snapshots)
            for seq, n in lengths.items()
        ]
        rows = np.split(self.engine.step(chunks), np.cumsum([*lengths.values()])[:-1])
        for chunk, got in zip(chunks, rows, strict=True):
            sequence, n = self.sequences[chunk.seq], len(chunk.tokens)
            sequence.ids = sequence.ids + list(chunk.tokens)
            assert nmse(got, self.alone.logits(sequence.ids)[-n:]) <= MAX_NMSE
            end = len(sequence.ids)
            sequence.snapshots = set(range(end - min(n, n_snapshots) + 1, end + 1))

    def extend_some(self) -> None:
        short = [seq for seq, s in self.sequences.items() if len(s.ids) < MAX_TOKENS - 70]
        chosen = self.rng.permutation(short)[: self.rng.integers(1, 4)].tolist()
        lengths = {seq: int(self.rng.choice([1, 1, 2, 3, 5, 30, 64, 70])) for seq in chosen}
        if lengths:
            self.extend(lengths, int(self.rng.integers(N_SNAPSHOTS + 1)))

    def fork(self) -> None:
        seq = self.any()
        self.sequences[self.memory.fork(seq)] = self.sequences[seq].kept()

    def mark(self) -> None:
        seq = self.any()
        if len(self.sequences[seq].marks) < 2:
            self.memory.add_rollback_point(seq)
            self.sequences[seq].marks |= {len(self.sequences[seq].ids)} - {0}

    def truncate(self, seq: int, n: int) -> None:
        expected = self.sequences[seq].truncate(n)
        assert self.memory.truncate(seq, n) == expected == self.memory.n_tokens(seq)

    def truncate_some(self) -> None:
        seq = self.any()
        n = len(self.sequences[seq].ids)
        # Most of the time near the end, where snapshots are.
        back = self.rng.integers(5) if self.rng.random() < 0.7 else self.rng.integers(n + 1)
        self.truncate(seq, max(0, n - int(back)))

    def save(self) -> None:
        seq = self.any()
        self.saved.append((self.memory.checkpoint(seq), self.sequences[seq].kept()))

    def restore(self) -> None:
        seq, (checkpoint, sequence) = self.any(), self.saved[self.rng.integers(len(self.saved))]
        self.memory.restore(seq, checkpoint)
        self.sequences[seq] = sequence.kept()

    def release(self) -> None:
        self.saved.pop(self.rng.integers(len(self.saved)))[0].release()

    def free(self, seq: int) -> None:
        self.memory.free(seq)
        del self.sequences[seq]

    def probe(self, seq: int) -> None:
        """The logits after one more token, on a fork that is then forgotten."""
        token = random_ids(self.rng, 1)
        assert self.memory.n_tokens(seq) == len(self.sequences[seq].ids)
        fork = self.memory.fork(seq)
        got = self.engine.step([Chunk(fork, token)])
        self.memory.free(fork)
        assert nmse(got, self.alone.logits(self.sequences[seq].ids + token)[-1:]) <= MAX_NMSE

    def act(self) -> None:
        some = bool(self.sequences)
        possible: list[tuple[bool, Callable[[], object]]] = [
            (some, self.extend_some),
            (some, self.extend_some),
            (some, self.truncate_some),
            (some, self.truncate_some),
            (some, self.mark),
            (len(self.sequences) < 4, self.create),
            (some and len(self.sequences) < 4, self.fork),
            (some and len(self.saved) < 3, self.save),
            (some and bool(self.saved), self.restore),
            (bool(self.saved), self.release),
            (len(self.sequences) > 1, lambda: self.free(self.any())),
        ]
        actions = [action for fits, action in possible if fits]
        try:
            actions[self.rng.integers(len(actions))]()
        except MemoryFullError:
            # Contents are as they were; snapshots may have gone.
            for seq, sequence in self.sequences.items():
                sequence.snapshots &= set(self.memory.allocation(seq).token_states)

    def end(self) -> None:
        for seq in list(self.sequences):
            self.free(seq)
        while self.saved:
            self.release()
        assert_all_free(self.engine)


@pytest.fixture
def walk(engine: Engine, alone: Engine, rng: Rng) -> Walk:
    return Walk(engine, alone, rng)


@pytest.mark.parametrize("run", range(2))
def test_every_operation_leaves_the_tokens_it_says(walk: Walk, run: int) -> None:
    for _ in range(50):
        walk.act()
        for seq in walk.sequences:
            assert walk.memory.n_tokens(seq) == len(walk.sequences[seq].ids)
        if walk.sequences:
            try:
                walk.probe(walk.any())
            except MemoryFullError:
                continue
    walk.end()


@pytest.mark.parametrize("n_past", [0, 63])
@pytest.mark.parametrize("n_new", [1, 3, 4, 70])
def test_truncate_reaches_each_of_the_last_tokens(walk: Walk, n_past: int, n_new: int) -> None:
    """The states after the last three tokens, as the recurrent layers wrote them."""
    for back in range(N_SNAPSHOTS + 2):
        seq = walk.create()
        if n_past:
            walk.extend({seq: n_past})
        walk.extend({seq: n_new}, N_SNAPSHOTS)
        walk.truncate(seq, n := max(0, n_past + n_new - back))
        kept = min(N_SNAPSHOTS, n_new)
        # The newest snapshot is the state itself.
        assert walk.memory.n_tokens(seq) == (n if back < kept else 0)
        walk.probe(seq)
        walk.extend({seq: 2})
        walk.free(seq)
    walk.end()


def test_fewer_snapshots_than_the_graph_has_room_for(walk: Walk) -> None:
    """One sequence asks for two, one for none, one for three, in the same step."""
    a, b, c = (walk.create() for _ in range(3))
    chunks = [
        Chunk(a, random_ids(walk.rng, 9), n_snapshots=2),
        Chunk(b, random_ids(walk.rng, 66)),
        Chunk(c, random_ids(walk.rng, 20), n_snapshots=3),
    ]
    walk.engine.step(chunks)
    for chunk, n, reached in zip(chunks, (8, 60, 18), (8, 0, 18), strict=True):
        walk.sequences[chunk.seq].ids = list(chunk.tokens)[:reached]
        assert walk.memory.truncate(chunk.seq, n) == reached
        walk.probe(chunk.seq)
    walk.end()


def test_marks_and_snapshots_are_kept_together(walk: Walk) -> None:
    seq = walk.create()
    walk.extend({seq: 40})
    walk.memory.add_rollback_point(seq)
    walk.sequences[seq].marks = {40}
    walk.extend({seq: 30}, 3)
    fork = walk.memory.fork(seq)
    walk.sequences[fork] = walk.sequences[seq].kept()
    # Snapshots stay with the sequence that made them, marks go with a fork.
    for which, n, reached in ((fork, 69, 40), (seq, 69, 69), (seq, 68, 40), (seq, 39, 0)):
        assert walk.memory.truncate(which, n) == reached
        walk.sequences[which].ids = walk.sequences[which].ids[:reached]
        walk.probe(which)
    walk.end()


def test_more_snapshots_than_the_graph_has_room_for(engine: Engine) -> None:
    seq = engine.memory.create()
    with pytest.raises(BatchError, match="4 snapshots in one step: expected at most 3"):
        engine.step([Chunk(seq, [1] * 9, n_snapshots=4)])
    engine.memory.free(seq)
    assert_all_free(engine)


def test_a_draft_is_taken_back_again_and_again(walk: Walk) -> None:
    """As speculative decoding would: three tokens ahead, some of them kept."""
    seq = walk.create()
    walk.extend({seq: 50})
    for kept in (0, 1, 2, 3, 1, 0):
        n = len(walk.sequences[seq].ids)
        # One token that stays, and three that may not.
        walk.extend({seq: 1 + N_SNAPSHOTS}, N_SNAPSHOTS)
        walk.truncate(seq, n + 1 + kept)
        assert walk.memory.n_tokens(seq) == (n + 1 + kept if kept else 0)
        if not kept:
            walk.extend({seq: 50})
    walk.probe(seq)
    walk.end()
