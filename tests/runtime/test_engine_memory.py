"""The engine's memory: all of it is freed, whatever fails in between, and none is shared.

A step that fails leaves half-written states; a step that doesn't fit changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from engine import Engine, SamplingParams
from engine.config import ConfigError
from engine.kvcache.pool import MemoryFullError
from engine.kvcache.sequences import SequenceError
from engine.runtime.batch import BatchError, Chunk
from engine.runtime.completion import GenerationError
from tests.support.helpers import (
    EXACT,
    assert_all_free,
    assert_same,
    exact_engine,
    failing_at,
    random_ids,
)

Rng = np.random.Generator
Load = Callable[..., Engine]
# The second layer's: the first layer's states are written when it runs.
NODE = "blk.1.gated_delta_net"


@pytest.fixture(scope="module", params=EXACT)
def load(request: pytest.FixtureRequest) -> Load:
    """load(path, **options): an engine on each of the backends."""
    return partial(exact_engine, request.param)


@pytest.fixture
def engine(tiny: Path, load: Load) -> Iterator[Engine]:
    with load(tiny, n_ctx=256, n_parallel=2) as engine:
        yield engine
        assert_all_free(engine)


@pytest.fixture(scope="module")
def alone(tiny: Path, load: Load) -> Engine:
    return load(tiny, n_ctx=256)


def test_logits_give_everything_back(engine: Engine) -> None:
    engine.logits([1, 2, 3])


def test_generate_gives_everything_back(engine: Engine) -> None:
    completion = engine.generate([1, 2, 3], SamplingParams(max_tokens=5))
    for _ in completion:
        if completion.finish_reason:
            break
        assert engine.memory.slots.n_free < engine.memory.slots.size
        assert engine.memory.blocks.n_free < engine.memory.blocks.size


def test_a_closed_generation_gives_everything_back(engine: Engine) -> None:
    tokens = engine.generate([1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True))
    next(tokens)
    tokens.close()


def test_a_dropped_generation_gives_everything_back(engine: Engine) -> None:
    tokens = engine.generate([1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True))
    next(tokens)
    del tokens


def test_a_generation_that_never_started_holds_nothing(engine: Engine) -> None:
    tokens = engine.generate([1, 2, 3])
    assert_all_free(engine)
    tokens.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_an_error_in_logits_gives_everything_back(
    engine: Engine, error: type[BaseException]
) -> None:
    with failing_at(engine, NODE, error), pytest.raises(error):
        engine.logits([1, 2, 3])


def test_an_error_in_a_generation_gives_everything_back(engine: Engine) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    with failing_at(engine, NODE, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        next(engine.generate([1, 2, 3], params))
    tokens = engine.generate([1, 2, 3], params)
    next(tokens)
    with failing_at(engine, NODE, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        next(tokens)


def test_two_generations_at_once_do_not_meet(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts = ([1, 2, 3], [9] * 70)
    single = [[t.token for t in engine.generate(prompt, params)] for prompt in prompts]
    pairs = zip(*(engine.generate(prompt, params) for prompt in prompts), strict=True)
    together = [[a.token, b.token] for a, b in pairs]
    assert [list(column) for column in zip(*together, strict=True)] == single


@pytest.mark.parametrize("node", ["token_embd", NODE, "blk.3.attention", "output"])
def test_a_broken_step_empties_its_sequence_and_no_other(
    engine: Engine, alone: Engine, rng: Rng, node: str
) -> None:
    memory, prompts = engine.memory, [random_ids(rng, n) for n in (70, 30)]
    a, b = memory.create(), memory.create()
    engine.step([Chunk(a, prompts[0]), Chunk(b, prompts[1])])
    with failing_at(engine, node, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        engine.step([Chunk(b, [1, 2])])
    assert (memory.n_tokens(a), memory.n_tokens(b)) == (70, 0)
    rows = engine.step([Chunk(a, [3]), Chunk(b, [4, 5])])
    assert_same(rows[:1], alone.logits([*prompts[0], 3])[-1:])
    assert_same(rows[1:], alone.logits([4, 5])[-1:])
    with failing_at(engine, node, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        engine.step([Chunk(b, [1]), Chunk(a, [2])])
    assert memory.n_tokens(a) == memory.n_tokens(b) == 0
    assert_all_free(engine)


def test_a_checkpoint_survives_a_broken_step(engine: Engine, alone: Engine, rng: Rng) -> None:
    ids, memory = random_ids(rng, 70), engine.memory
    seq = memory.create()
    engine.step([Chunk(seq, ids)])
    checkpoint = memory.checkpoint(seq)
    with failing_at(engine, "output", KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        engine.step([Chunk(seq, [1, 2])])
    assert memory.n_tokens(seq) == 0
    memory.restore(seq, checkpoint)
    assert_same(engine.step([Chunk(seq, [3])]), alone.logits([*ids, 3])[-1:])
    checkpoint.release()
    memory.free(seq)


def counts(engine: Engine) -> tuple[int, int]:
    return engine.memory.blocks.n_free, engine.memory.slots.n_free


def test_no_free_slot_leaves_everything(tiny: Path, load: Load, alone: Engine, rng: Rng) -> None:
    ids = random_ids(rng, 10)
    with load(tiny, n_ctx=256, n_parallel=1, n_checkpoints=1, cache_ram=0) as engine:
        a, b, c = (engine.memory.create() for _ in range(3))
        engine.step([Chunk(a, ids)])
        engine.step([Chunk(b, ids[:5])])
        before = counts(engine)
        with pytest.raises(MemoryFullError, match=r"out of state slots: 1 needed, 0 of 2 are free"):
            engine.step([Chunk(c, [1])])
        assert counts(engine) == before
        assert engine.memory.n_tokens(c) == 0
        assert_same(engine.step([Chunk(a, [1])]), alone.logits([*ids, 1])[-1:])
        assert_same(engine.step([Chunk(b, [2])]), alone.logits([*ids[:5], 2])[-1:])


def test_no_free_block_leaves_everything(tiny: Path, load: Load, alone: Engine, rng: Rng) -> None:
    ids = random_ids(rng, 64)
    with load(tiny, n_ctx=64, n_parallel=2, n_checkpoints=0, cache_ram=0) as engine:
        a, b = engine.memory.create(), engine.memory.create()
        engine.step([Chunk(a, ids), Chunk(b, ids[:5])])
        before = counts(engine)
        with pytest.raises(MemoryFullError, match="out of KV cache blocks: 2 needed, 1 of 3"):
            engine.step([Chunk(a, [1] * 65)])
        assert counts(engine) == before
        # The first chunk fits, the second doesn't: both sequences are as they were.
        with pytest.raises(MemoryFullError, match="out of KV cache blocks: 1 needed, 0 of 3"):
            engine.step([Chunk(a, [1]), Chunk(b, ids)])
        assert counts(engine) == before
        assert (engine.memory.n_tokens(a), engine.memory.n_tokens(b)) == (64, 5)
        assert_same(engine.step([Chunk(b, [2])]), alone.logits([*ids[:5], 2])[-1:])
        assert_same(engine.step([Chunk(a, [1])]), alone.logits([*ids, 1])[-1:])


def test_no_free_block_leaves_what_a_checkpoint_shares(
    tiny: Path, load: Load, alone: Engine, rng: Rng
) -> None:
    ids = random_ids(rng, 70)
    with load(tiny, n_ctx=64, n_parallel=2, n_checkpoints=1, cache_ram=0) as engine:
        memory = engine.memory
        a, b = memory.create(), memory.create()
        engine.step([Chunk(a, ids), Chunk(b, ids[:5])])
        checkpoint = memory.checkpoint(a)
        with pytest.raises(MemoryFullError):
            engine.step([Chunk(a, [1]), Chunk(b, ids)])
        assert_same(engine.step([Chunk(a, [1])]), alone.logits([*ids, 1])[-1:])
        assert_same(engine.step([Chunk(b, [2])]), alone.logits([*ids[:5], 2])[-1:])
        memory.restore(a, checkpoint)
        checkpoint.release()
        assert_same(engine.step([Chunk(a, [3])]), alone.logits([*ids, 3])[-1:])
        memory.free(a)
        memory.free(b)
        assert_all_free(engine)


@pytest.mark.parametrize("n_tokens", [10, 200])
def test_a_users_steps_take_what_the_cache_holds(
    tiny: Path, load: Load, alone: Engine, rng: Rng, n_tokens: int
) -> None:
    """Nothing is free but what it gives up; after that the step is refused, as without a cache."""
    prompt, one = random_ids(rng, n_tokens), SamplingParams(max_tokens=1)
    with load(tiny, n_ctx=256, cache_ram=1) as engine:
        memory = engine.memory
        answers = [engine.generate([i] * 200, one).wait() for i in (1, 2)]
        assert engine.cache.n_states == len(answers)
        seqs = list[int]()
        for _ in range(min(memory.slots.size, memory.blocks.size // -(-n_tokens // 64))):
            seqs.append(memory.create())
            engine.step([Chunk(seqs[-1], prompt)])
        seqs.append(memory.create())
        with pytest.raises(MemoryFullError, match="out of "):
            engine.step([Chunk(seqs[-1], prompt)])
        assert engine.cache.n_states == 0
        for seq in seqs[:2]:
            got = engine.step([Chunk(seq, [3])])
            assert_same(got, alone.logits([*prompt, 3])[-1:])
        for seq in seqs:
            memory.free(seq)
        assert_all_free(engine)


def test_a_closed_engine_says_so_and_holds_nothing(tiny: Path, load: Load) -> None:
    engine = load(tiny)
    engine.close()
    with pytest.raises(ConfigError, match="the engine is closed"):
        engine.logits([1])
    assert_all_free(engine)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [5], [3, 2]])
def test_a_batch_beyond_the_capacity_holds_nothing(
    tiny: Path, load: Load, lengths: list[int]
) -> None:
    with load(tiny, n_ctx=256, n_parallel=2, n_ubatch=4) as engine:
        chunks = [Chunk(engine.memory.create(), [1] * n) for n in lengths]
        with pytest.raises(BatchError, match="expected at"):
            engine.step(chunks)
        assert_all_free(engine)


def test_a_sequence_that_is_not_there_is_refused(tiny: Path, load: Load) -> None:
    """And nothing else is: what was there is as it was."""
    with load(tiny, n_ctx=256, n_parallel=2) as engine:
        seq, gone = engine.memory.create(), engine.memory.create()
        engine.memory.free(gone)
        first = engine.step([Chunk(seq, [1, 2])])
        for bad in (gone, 99, -1):
            with pytest.raises(SequenceError, match=f"sequence {bad} is not there"):
                engine.step([Chunk(seq, [3]), Chunk(bad, [3])])
        with pytest.raises(SequenceError, match="sequence 99 is not there"):
            engine.memory.n_tokens(99)
        assert engine.memory.n_tokens(seq) == 2
        again = engine.memory.create()
        assert np.array_equal(engine.step([Chunk(again, [1, 2])]), first)
        engine.memory.free(seq)
        engine.memory.free(again)
        assert_all_free(engine)


def test_a_checkpoint_that_goes_before_its_request_begins(tiny: Path, load: Load) -> None:
    """As another thread may release it between the check and the next step."""
    with load(tiny, n_ctx=256) as engine:
        seq = engine.memory.create()
        engine.step([Chunk(seq, [1, 2])])
        kept = engine.memory.checkpoint(seq)
        completion = engine.generate([3], after=kept)
        engine.memory._memory.free(kept.seq)
        with pytest.raises(GenerationError, match="its checkpoint was released meanwhile"):
            next(completion)
        (other,) = engine.generate_batch([[1]], SamplingParams(max_tokens=2, ignore_eos=True))
        assert len(other.tokens) == 2
        engine.memory.free(seq)
        assert_all_free(engine)
