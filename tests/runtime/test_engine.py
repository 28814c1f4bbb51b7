"""The engine's batches: however tokens are cut, mixed or interrupted, the logits are the same.

The standard is one sequence, alone, in one step. Everything is computed in float64, so that the
differences of rounding are far below the effect of a lost or foreign token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import Engine
from engine.graph import dim_name
from engine.kvcache.sequences import Checkpoint
from engine.runtime.batch import Chunk, Logits
from engine.runtime.scheduler import cut
from tests.support.helpers import (
    N_VOCAB,
    assert_all_free,
    assert_same,
    float64_engine,
    nmse,
    random_ids,
)

# Across several blocks and chunks of 64, with a partial one at the end.
N_IDS = 150
Rng = np.random.Generator


def load(path: Path, **options: Any) -> Engine:
    return float64_engine(path, n_ctx=4096, **options)


@pytest.fixture(scope="module")
def alone(path: Path) -> Engine:
    """The standard: it runs every prompt of these tests in a single step."""
    return load(path)


@pytest.mark.parametrize("n_ubatch", [1, 7, 64, 100])
def test_prefill_in_pieces_is_prefill_in_one(
    alone: Engine, path: Path, rng: Rng, n_ubatch: int
) -> None:
    ids = random_ids(rng, N_IDS)
    whole = alone.logits(ids)
    with load(path, n_ubatch=n_ubatch) as engine:
        assert_same(engine.logits(ids), whole)
        # The last row alone, of a prompt in three chunks (two, of 100).
        n, seq = min(2 * n_ubatch + 1, N_IDS), engine.memory.create()
        assert_same(engine.prefill(seq, ids[:n]), whole[n - 1 : n])
        assert engine.memory.n_tokens(seq) == n


def test_batch_size_limits_a_step_too(alone: Engine, path: Path, rng: Rng) -> None:
    ids = random_ids(rng, 40)
    with load(path, n_batch=9) as engine:
        assert engine.capacity.n_tokens == 9
        assert_same(engine.logits(ids), alone.logits(ids))


def test_steps_of_one_token_are_prefill_in_one(alone: Engine, rng: Rng) -> None:
    ids = random_ids(rng, N_IDS)
    seq = alone.memory.create()
    rows = [alone.step([Chunk(seq, [token])]) for token in ids]
    alone.memory.free(seq)
    assert_same(np.concatenate(rows), alone.logits(ids))


def test_a_prompt_continues_a_sequence(alone: Engine, rng: Rng) -> None:
    ids, seq = random_ids(rng, N_IDS), alone.memory.create()
    first = alone.prefill(seq, ids[:37], Logits.ALL)
    rest = alone.prefill(seq, ids[37:], Logits.ALL)
    alone.memory.free(seq)
    assert_same(np.concatenate([first, rest]), alone.logits(ids))


@pytest.mark.parametrize("n_ubatch", [1, 7, 63, 64, 65, 100, 512])
@pytest.mark.parametrize("n_past", [0, 1, 63, 64, 100])
def test_cut_covers_the_prompt_and_ends_at_multiples_of_64(n_ubatch: int, n_past: int) -> None:
    for n_tokens in (1, 63, 64, 65, 300):
        chunks = list(cut(n_past, n_tokens, n_ubatch))
        covered = [i for chunk in chunks for i in range(n_tokens)[chunk]]
        assert covered == list(range(n_tokens))
        assert all(0 < p.stop - p.start <= n_ubatch for p in chunks)
        if n_ubatch >= 64:
            assert all((n_past + p.stop) % 64 == 0 for p in chunks[:-1])


class Walk:
    """Sequences of an engine beside plain lists of their tokens; every step is compared."""

    def __init__(self, engine: Engine, alone: Engine, rng: Rng) -> None:
        self.engine, self.alone, self.rng = engine, alone, rng
        self.tokens: dict[int, list[int]] = {}
        self.saved: list[tuple[Checkpoint, list[int]]] = []

    def create(self) -> int:
        seq = self.engine.memory.create()
        self.tokens[seq] = []
        return seq

    def free(self, seq: int) -> None:
        self.engine.memory.free(seq)
        del self.tokens[seq]

    def step(self, lengths: dict[int, int]) -> None:
        """One batch of `lengths` new tokens by sequence, all of whose logits are compared."""
        chunks = [Chunk(s, random_ids(self.rng, n), Logits.ALL) for s, n in lengths.items()]
        rows = np.split(self.engine.step(chunks), np.cumsum([*lengths.values()])[:-1])
        for chunk, got in zip(chunks, rows, strict=True):
            ids = self.tokens[chunk.seq] = self.tokens[chunk.seq] + list(chunk.tokens)
            assert self.engine.memory.n_tokens(chunk.seq) == len(ids)
            assert_same(got, self.alone.logits(ids)[-len(got) :])

    def save(self, seq: int) -> None:
        self.saved.append((self.engine.memory.checkpoint(seq), self.tokens[seq]))
        assert self.saved[-1][0].n_tokens == len(self.tokens[seq])

    def restore(self, seq: int, index: int) -> None:
        checkpoint, ids = self.saved[index]
        self.engine.memory.restore(seq, checkpoint)
        self.tokens[seq] = ids

    def release(self, index: int) -> None:
        self.saved.pop(index)[0].release()

    def end(self) -> None:
        """Free everything and check that all memory is free."""
        for seq in list(self.tokens):
            self.free(seq)
        while self.saved:
            self.release(0)
        assert_all_free(self.engine)


@pytest.fixture
def walk(alone: Engine, path: Path, rng: Rng) -> Walk:
    return Walk(load(path, n_parallel=3, n_checkpoints=5), alone, rng)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 90), (70, 1, 64), (5, 130, 3)])
def test_ragged_batches_are_each_sequence_alone(walk: Walk, lengths: tuple[int, ...]) -> None:
    sequences = [walk.create() for _ in lengths]
    walk.step(dict(zip(sequences, lengths, strict=True)))
    walk.step(dict(zip(sequences[::-1], lengths, strict=True)))
    walk.step(dict.fromkeys(sequences, 1))
    walk.end()


def test_a_new_sequence_joins_decoding_ones(walk: Walk) -> None:
    a, b = walk.create(), walk.create()
    walk.step({a: 66, b: 3})
    c = walk.create()
    walk.step({b: 1, a: 1, c: 70})
    walk.free(b)
    walk.step({a: 1, c: 1})
    walk.end()


def test_interleaved_sequences_do_not_meet(walk: Walk) -> None:
    sequences = [walk.create() for _ in range(3)]
    for _ in range(8):
        for seq in walk.rng.permutation(sequences).tolist():
            walk.step({seq: int(walk.rng.integers(1, 20))})
    walk.end()


@pytest.mark.parametrize("n_saved", [1, 30, 64, 100, 128])
def test_a_restored_sequence_goes_on_as_if_nothing_had_been(walk: Walk, n_saved: int) -> None:
    seq = walk.create()
    walk.step({seq: n_saved})
    walk.save(seq)
    for n_more in (1, 40, 64):
        walk.step({seq: n_more})
        walk.restore(seq, 0)
        assert walk.engine.memory.n_tokens(seq) == n_saved
    walk.step({seq: 5})
    walk.end()


def test_an_empty_sequence_can_be_saved(walk: Walk) -> None:
    seq = walk.create()
    walk.save(seq)
    walk.step({seq: 9})
    walk.restore(seq, 0)
    walk.step({seq: 9})
    walk.end()


def test_forks_of_one_prompt_part(walk: Walk) -> None:
    a, b = walk.create(), walk.create()
    walk.step({a: 100})
    walk.save(a)
    walk.restore(b, 0)
    # Both share the partial block and the slot with the checkpoint, then only with each other.
    walk.step({a: 1, b: 1})
    walk.restore(a, 0)
    walk.restore(b, 0)
    walk.release(0)
    walk.step({b: 3, a: 2})
    walk.step({a: 30, b: 1})
    walk.end()


def test_a_checkpoint_outlives_its_sequence(walk: Walk) -> None:
    a = walk.create()
    walk.step({a: 70})
    walk.save(a)
    walk.free(a)
    b = walk.create()
    walk.step({b: 80})
    walk.restore(b, 0)
    walk.step({b: 1})
    walk.end()


def test_random_walks_through_steps_and_checkpoints(walk: Walk) -> None:
    rng = walk.rng

    def advance() -> None:
        chosen = rng.permutation(list(walk.tokens))[: rng.integers(1, 4)].tolist()
        chosen = [seq for seq in chosen if len(walk.tokens[seq]) < 300]
        if chosen:
            walk.step({seq: int(rng.choice([1, 1, 3, 64, 70])) for seq in chosen})

    actions: list[tuple[Callable[[], bool], Callable[[], object]]] = [
        (lambda: bool(walk.tokens), advance),
        (lambda: bool(walk.tokens), advance),
        (lambda: len(walk.tokens) < 3, walk.create),
        (lambda: len(walk.tokens) > 1, lambda: walk.free(rng.choice(list(walk.tokens)))),
        (lambda: bool(walk.tokens) and len(walk.saved) < 3,
         lambda: walk.save(rng.choice(list(walk.tokens)))),
        (lambda: bool(walk.tokens and walk.saved),
         lambda: walk.restore(rng.choice(list(walk.tokens)), int(rng.integers(len(walk.saved))))),
        (lambda: len(walk.saved) > 1, lambda: walk.release(int(rng.integers(len(walk.saved))))),
    ]  # fmt: skip
    for _ in range(60):
        possible, act = actions[rng.integers(len(actions))]
        if possible():
            act()
    walk.end()


def test_a_step_answers_the_rows_that_asked(alone: Engine, path: Path, rng: Rng) -> None:
    lengths, wanted = [4, 3, 5], [Logits.LAST, Logits.NONE, Logits.ALL]
    prompts = [random_ids(rng, n) for n in lengths]
    with load(path, n_parallel=3) as engine:
        sequences = [engine.memory.create() for _ in prompts]
        chunks = [Chunk(*args) for args in zip(sequences, prompts, wanted, strict=True)]
        rows = engine.step(chunks)
        assert rows.shape == (6, engine.model.n_vocab)
        assert rows.dtype == np.float32
        assert_same(rows[:1], alone.logits(prompts[0])[-1:])
        assert_same(rows[1:], alone.logits(prompts[2]))
        none = engine.step([Chunk(sequences[0], [1], Logits.NONE)])
        assert none.shape == (0, engine.model.n_vocab)
        # The chunk without logits was run all the same.
        next_row = engine.step([Chunk(sequences[1], [7])])
        assert_same(next_row, alone.logits([*prompts[1], 7])[-1:])


@pytest.mark.parametrize("gdn", ["scan", "chunk", "decomposed"])
def test_every_form_of_the_delta_rule_agrees(alone: Engine, path: Path, rng: Rng, gdn: str) -> None:
    ids = random_ids(rng, N_IDS)
    with load(path, gdn=gdn, n_parallel=2) as engine:
        assert_same(engine.logits(ids), alone.logits(ids))
        a, b = engine.memory.create(), engine.memory.create()
        engine.prefill(a, ids[:70])
        rows = engine.step([Chunk(a, [ids[70]]), Chunk(b, ids[:5])])
        assert_same(rows[:1], alone.logits(ids[:71])[-1:])
        assert_same(rows[1:], alone.logits(ids[:5])[-1:])


def poison(engine: Engine) -> None:
    """NaN in every slot and block of every layer."""
    store: Any = engine.plan.backends[0].states
    arrays: dict[Any, NDArray[Any]] = store.arrays
    assert arrays
    for array in arrays.values():
        array[:] = np.nan


def test_what_memory_held_before_does_not_matter(alone: Engine, path: Path, rng: Rng) -> None:
    engine = load(path, n_parallel=2)
    poison(engine)
    walk = Walk(engine, alone, rng)
    a, b = walk.create(), walk.create()
    walk.step({a: 70, b: 1})
    walk.save(a)
    walk.step({a: 1, b: 66})
    walk.restore(b, 0)
    walk.step({b: 1})
    walk.end()
    poison(engine)
    assert_same(engine.logits(ids := random_ids(rng, 20)), alone.logits(ids))


@pytest.mark.parametrize("types", [("f16", "f32"), ("f32", "f16"), ("f16", "f16")])
def test_a_cache_in_f16_rounds_a_little(path: Path, types: tuple[str, str]) -> None:
    # Always the same, and none where the rounding turns a router's choice around, which one prompt
    # in 25 of these models has.
    ids = random_ids(np.random.default_rng(0), N_IDS)
    with (
        Engine.load(path, backend="reference") as f32,
        Engine.load(path, backend="reference", type_k=types[0], type_v=types[1]) as f16,
    ):
        error, states = nmse(f16.logits(ids), f32.logits(ids)), f16.plan.graph.states.values()
    kinds = {t.name.split(".")[-1]: t.dtype.name for t in states if dim_name(t) == "n_blocks"}
    given = dict(zip(("k_cache", "v_cache"), map(str.upper, types), strict=True))
    # A latent is key and value at once and is kept as keys are.
    assert kinds == {name: given[name] for name in kinds}
    assert "k_cache" in kinds
    assert (0 < error < 1e-7) if "F16" in kinds.values() else error == 0


def test_logits_are_finite_and_differ_by_position_and_past(alone: Engine, rng: Rng) -> None:
    """Guards the comparisons above against a model whose memory doesn't matter."""
    first, *rest = random_ids(rng, 100)
    logits = alone.logits([first, *rest])
    assert np.isfinite(logits).all()
    changed = alone.logits([(first + 1) % N_VOCAB, *rest])
    assert nmse(changed[-1], logits[-1]) > 1e-6
    moved = alone.logits([first, *rest[1:], rest[0]])
    assert nmse(moved[-2], logits[-1]) > 1e-6
