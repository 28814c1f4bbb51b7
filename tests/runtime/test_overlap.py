"""Overlapped decode steps give what synchronous steps give, and leave memory as those leave it.

The standard is an engine with the same arithmetic that samples its tokens on the host.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine, SamplingParams
from engine.config import ConfigError
from engine.kvcache.pool import MemoryFullError
from engine.runtime.batch import Chunk, begin
from engine.runtime.completion import Completion, GenerationError
from engine.text.template import BUILT_IN, ChatTemplate
from tests.support.helpers import (
    assert_all_free,
    failing_at,
    float64_engine,
    nmse,
    random_ids,
    replaced_op,
)
from tests.support.lazy_backend import LazyHandle, decoder_of, lazy_engine
from tests.support.states import save
from tests.support.timing import judge

Rng = np.random.Generator
Load = Callable[..., Engine]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=1.5, top_p=0.99, min_p=0.01, seed=3)
# Sampled on the host: a device has no such sampler.
HOST = replace(DRAWN, repeat_penalty=1.3)
NODE = "blk.1.gated_delta_net"


@pytest.fixture(scope="module")
def alone(models: Callable[[str, str], Path]) -> Engine:
    """One step after the other, one completion after the other, each from its start."""
    return float64_engine(models("tiny", "F32"), n_ctx=512, cache_ram=0)


@pytest.fixture
def load(models: Callable[[str, str], Path]) -> Iterator[Load]:
    engines: list[Engine] = []

    def load(**options: Any) -> Engine:
        engines.append(lazy_engine(models("tiny", "F32"), **{"n_ctx": 512, **options}))
        return engines[-1]

    yield load
    for engine in engines:
        assert_all_free(engine)
        with contextlib.suppress(ConfigError):  # One test closes it.
            assert not engine.advance()


def outcome(completion: Completion) -> tuple[Any, ...]:
    t = completion.timings
    counts = t.n_prompt, t.n_eval
    return completion.tokens, completion.text, completion.finish_reason, completion.detail, counts


def expected(alone: Engine, prompt: Sequence[int], params: SamplingParams) -> tuple[Any, ...]:
    (completion,) = alone.generate_batch([prompt], params)
    return outcome(completion)


def n_ahead(engine: Engine) -> int:
    """The number of launched steps that read tokens from the step before on the device."""
    return sum(max(feed, default=-1) >= 0 for feed in decoder_of(engine).feeds)


@pytest.mark.parametrize("params", [GREEDY, DRAWN, replace(DRAWN, top_k=1), HOST])
def test_the_tokens_are_those_of_steps_one_by_one(
    load: Load, alone: Engine, rng: Rng, params: SamplingParams
) -> None:
    engine, prompt = load(), random_ids(rng, 70)
    (completion,) = engine.generate_batch([prompt], params)
    assert outcome(completion) == expected(alone, prompt, params)
    # All but the prompt's steps are launched ahead; alone, a request of the host's has none ahead.
    assert n_ahead(engine) == (0 if params is HOST else 11)
    # The prompt is cut at 64, where its state is kept.
    assert len(decoder_of(engine).feeds) == 13


def test_the_next_step_is_launched_before_the_tokens_are_waited_for(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, launched = load(n_parallel=2), list[int]()
    wait = LazyHandle.wait

    def waiting(self: LazyHandle) -> Any:
        launched.append(len(decoder_of(engine).feeds))
        return wait(self)

    monkeypatch.setattr(LazyHandle, "wait", waiting)
    engine.generate_batch([[1], [2]], replace(GREEDY, max_tokens=5))
    assert launched == [2, 3, 4, 5, 5]


@pytest.mark.parametrize("n", range(1, 6))
def test_it_ends_at_any_token(load: Load, alone: Engine, n: int) -> None:
    """No step runs past a known limit; one step runs past a stop text."""
    engine = load()
    tokens = expected(alone, [5, 6], GREEDY)[0]
    (short,) = engine.generate_batch([[5, 6]], replace(GREEDY, max_tokens=n))
    assert short.tokens == tokens[:n]
    assert len(decoder_of(engine).feeds) == n
    stop = replace(GREEDY, stop=(engine.tokenizer.decode(tokens[n - 1 : n]),))
    (stopped,) = engine.generate_batch([[5, 6]], stop)
    assert outcome(stopped) == expected(alone, [5, 6], stop)


def test_it_ends_by_itself(load: Load, alone: Engine) -> None:
    params = replace(DRAWN, temperature=100.0, top_k=128, top_p=1, min_p=0, ignore_eos=False)
    engine, reasons = load(n_parallel=3), set()
    each = [replace(params, seed=seed, max_tokens=70) for seed in range(6)]
    for done, own in zip(engine.generate_batch([[7]] * 6, each), each, strict=True):
        assert outcome(done) == expected(alone, [7], own)
        reasons.add(done.finish_reason)
    assert "stop" in reasons


@pytest.mark.parametrize("n_prompt", [1, 63, 64, 126, 127, 128])
def test_it_ends_at_a_full_context(load: Load, n_prompt: int) -> None:
    engine = load(n_ctx=128)
    (done,) = engine.generate_batch([[5] * n_prompt], replace(GREEDY, max_tokens=-1))
    assert len(done.tokens) == 128 - n_prompt + 1
    assert done.timings.n_prompt + done.timings.n_eval == 128
    # A long prompt is cut at 64, where its state is kept.
    assert len(decoder_of(engine).feeds) == 128 - n_prompt + 1 + (n_prompt > 64)


def test_a_request_of_the_hosts_stops_nobody(load: Load, alone: Engine) -> None:
    """It is in every second step; each step of the others is launched ahead."""
    engine, each = load(n_parallel=4), [GREEDY, DRAWN, HOST, replace(DRAWN, seed=8)]
    done = engine.generate_batch([[i] for i in range(4)], each)
    for i, (completion, params) in enumerate(zip(done, each, strict=True)):
        assert outcome(completion) == expected(alone, [i], params)
    n_rows = [len(feed) for feed in decoder_of(engine).feeds]
    assert n_rows == [4, 3] * 6 + [1] * 6
    assert [max(feed) >= 0 for feed in decoder_of(engine).feeds] == [False] + [True] * 11 + [
        False
    ] * 6


def test_a_long_prompt_stops_nobody(load: Load, alone: Engine) -> None:
    """Steps that have its chunks are launched ahead, too."""
    engine = load(n_parallel=2, n_ubatch=128)
    first = engine.generate([1], GREEDY)
    next(first)
    second = engine.generate([7] * 400, GREEDY)
    assert [t.token for t in second] == expected(alone, [7] * 400, GREEDY)[0]
    assert first.wait().tokens == expected(alone, [1], GREEDY)[0]
    # All but the two prompts' own tokens.
    assert sum(feed.count(-1) for feed in decoder_of(engine).feeds) == 2


def random_params(rng: Rng) -> SamplingParams:
    """Mostly parameters that a device can sample with."""
    chosen = [GREEDY, DRAWN, replace(DRAWN, stop=("e", " t"), top_k=100), HOST]
    params = chosen[rng.choice(4, p=[0.3, 0.4, 0.2, 0.1])]
    n, seed = int(rng.integers(1, 25)), int(rng.integers(2**32))
    return replace(params, seed=seed, max_tokens=n, ignore_eos=bool(rng.integers(2)))


@pytest.mark.parametrize(("n_parallel", "n_ubatch"), [(1, 64), (3, 7), (3, 512), (8, 64)])
def test_whoever_joins_or_leaves_the_others_go_on(
    load: Load, alone: Engine, rng: Rng, n_parallel: int, n_ubatch: int
) -> None:
    engine = load(n_parallel=n_parallel, n_ubatch=n_ubatch)
    active: list[Completion] = []
    started: list[tuple[Any, list[int], SamplingParams]] = []
    for _ in range(90):
        chance = rng.random()
        if chance < 0.12 or not active:
            prompt, params = random_ids(rng, int(rng.choice([1, 5, 64, 150]))), random_params(rng)
            active.append(engine.generate(prompt, params))
            started.append((active[-1].request, prompt, params))
        elif chance < 0.18:
            active.pop(rng.integers(len(active))).cancel()
        elif chance < 0.22:
            # A user's own step comes between.
            nmse(engine.logits([1, 2, 3]), alone.logits([1, 2, 3]))
        else:
            next(active[rng.integers(len(active))], None)
    for completion in active:
        for _ in completion:
            pass
    for request, prompt, params in started:
        tokens, text, reason, detail, _ = expected(alone, prompt, params)
        if request.finish_reason == "cancelled":
            assert request.tokens == tokens[: len(request.tokens)]
        else:
            got = request.tokens, request.text, request.finish_reason, request.detail
            assert got == (tokens, text, reason, detail)
    assert n_ahead(engine)


# Memory between steps.


def state_of(engine: Engine, seq: int) -> dict[str, Any]:
    """Contents of a sequence's slot, through a checkpoint."""
    checkpoint = engine.memory.checkpoint(seq)
    saved = save(engine.plan.backends[0].states, "n_slots", checkpoint.allocation.state.slot)
    checkpoint.release()
    return saved


@pytest.mark.parametrize("params", [GREEDY, DRAWN])
@pytest.mark.parametrize("n_prompt", [3, 60])
def test_memory_is_as_if_nothing_ran_ahead(
    load: Load, alone: Engine, n_prompt: int, params: SamplingParams
) -> None:
    """At every token, compare positions, state, and the tokens after a checkpoint."""
    engine, prompt = load(n_parallel=2, n_checkpoints=12), [9] * n_prompt
    ours, theirs = engine.generate(prompt, params), alone.generate(prompt, params)
    kept = []
    for _ in range(11):
        assert next(ours).token == next(theirs).token
        seqs = ours.request.seq, theirs.request.seq
        assert engine.memory.n_tokens(seqs[0]) == alone.memory.n_tokens(seqs[1])
        got, want = state_of(engine, seqs[0]), state_of(alone, seqs[1])
        assert max(nmse(got[name], want[name]) for name in want) < 1e-20
        kept.append((engine.memory.checkpoint(seqs[0]), ours.tokens[-1]))
    forked = engine.memory.fork(seqs[0])
    row = engine.step([Chunk(forked, ours.tokens[-1:])])
    engine.memory.free(forked)
    assert nmse(row, alone.logits([*prompt, *ours.tokens])[-1:]) < 1e-12
    assert len(list(ours)) == len(list(theirs)) == 1
    for i, (checkpoint, last) in enumerate(kept):
        after = replace(GREEDY, max_tokens=4)
        (want_after, *_) = expected(alone, [*prompt, *ours.tokens[: i + 1]], after)
        assert [t.token for t in engine.generate([last], after, checkpoint)] == want_after
        checkpoint.release()


def test_a_checkpoint_of_what_ends_beside_others(load: Load, alone: Engine) -> None:
    """The next request gets its blocks and slots while a step with its row is in flight."""
    engine = load(n_parallel=2, n_ctx=128, n_checkpoints=0)
    each = [replace(GREEDY, max_tokens=n) for n in (40, 9, 4, 17, 30, 2)]
    prompts = [[i] * 40 for i in range(6)]
    for _ in range(2):
        done = engine.generate_batch(prompts, each)
        for completion, prompt, params in zip(done, prompts, each, strict=True):
            assert outcome(completion) == expected(alone, prompt, params)


def test_without_slots_to_spare_nothing_runs_ahead(load: Load, alone: Engine) -> None:
    engine = load(n_parallel=2, n_checkpoints=0, cache_ram=0)
    held = hold_slots(engine, 2)
    done = engine.generate_batch([[1], [2]], GREEDY)
    assert [c.tokens for c in done] == [expected(alone, [i], GREEDY)[0] for i in (1, 2)]
    assert n_ahead(engine) == 0
    assert len(decoder_of(engine).feeds) == 12
    for seq in held:
        engine.memory.free(seq)


def hold_slots(engine: Engine, n: int) -> list[int]:
    """Sequences of a user that hold a slot each."""
    held = [engine.memory.create() for _ in range(n)]
    for seq in held:
        engine.step([Chunk(seq, [1])])
    return held


def test_what_runs_ahead_takes_the_slots_of_the_cache(load: Load, alone: Engine) -> None:
    """Four are left, of which the cache has some."""
    engine = load(n_ctx=8192, n_parallel=2, n_checkpoints=0, cache_ram=1)
    held = hold_slots(engine, engine.memory.slots.size - 4)
    for prompts in ([[1], [2]], [[3], [4]], [[5], [6]]):
        engine.generate_batch(prompts, GREEDY)
    n_kept, n_before = engine.cache.n_states, n_ahead(engine)
    assert n_kept > 0
    done = engine.generate_batch([[7], [8]], GREEDY)
    assert [c.tokens for c in done] == [expected(alone, [i], GREEDY)[0] for i in (7, 8)]
    assert n_ahead(engine) == n_before + 11
    for seq in held:
        engine.memory.free(seq)


def test_what_runs_ahead_takes_no_room_from_others(load: Load, alone: Engine) -> None:
    """A user's sequence takes the last slot while a step is in flight."""
    engine = load(n_parallel=1, n_checkpoints=0, cache_ram=0)
    completion = engine.generate([1], GREEDY)
    for _ in range(3):
        next(completion)
    assert engine.memory.slots.n_free == 0
    seq = engine.memory.create()
    engine.step([Chunk(seq, [3])])
    assert engine.memory.slots.n_free == 0
    for _ in completion:
        pass
    assert completion.tokens == expected(alone, [1], GREEDY)[0]
    engine.memory.free(seq)


# Chats (test_chats.py runs on both kinds of steps).

CHATML = ChatTemplate(BUILT_IN["chatml"])


def test_turns_run_ahead_and_go_on_from_each_other(load: Load, alone: Engine) -> None:
    engine, messages, n_held = load(), list[dict[str, str]](), 0
    for turn in range(4):
        messages.append({"role": "user", "content": f"turn {turn}"})
        answer = engine.chat(messages, GREEDY, template=CHATML)
        list(answer)
        # All but the last token of the answer before.
        assert answer.reuse.n_known == answer.reuse.n_reused == n_held
        n_held = answer.reuse.n_prompt + len(answer.tokens) - 1
        assert answer.tokens == expected(alone, answer.request.ids, GREEDY)[0]
        messages.append({"role": "assistant", "content": answer.text})
        assert n_ahead(engine) == 11 * (turn + 1)


def test_turns_beside_completions(load: Load, alone: Engine) -> None:
    """States are kept, a turn ends, another begins, with others' rows in flight."""
    engine, messages = load(n_parallel=3, n_ubatch=16), list[dict[str, str]]()
    others = [engine.generate([i], replace(GREEDY, max_tokens=90)) for i in (1, 2)]
    for turn in range(4):
        messages.append({"role": "user", "content": f"turn {turn} " * 5})
        answer = engine.chat(messages, replace(DRAWN, seed=turn), template=CHATML)
        for i, _ in enumerate(answer):
            next(others[turn % 2])
            if i == turn:
                answer.stop()
        want = expected(alone, answer.request.ids, replace(DRAWN, seed=turn))
        assert answer.tokens == want[0][: turn + 1]
        assert (answer.reuse.n_reused > 0) == (turn > 0)
        assert answer.timings.n_prompt == answer.reuse.n_prompt - answer.reuse.n_reused
        messages.append({"role": "assistant", "content": answer.text})
    for i, other in zip((1, 2), others, strict=True):
        list(other)
        assert other.tokens == expected(alone, [i], replace(GREEDY, max_tokens=90))[0]
    assert n_ahead(engine)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_turn_whose_step_breaks_off_keeps_nothing(
    load: Load, alone: Engine, error: type[BaseException]
) -> None:
    """Its state may be half written; what the cache has from before the turn stays."""
    engine = load()
    messages = [{"role": "user", "content": "one"}]
    first = engine.chat(messages, GREEDY, template=CHATML)
    list(first)
    n_held, n_states = first.reuse.n_prompt + len(first.tokens) - 1, engine.cache.n_states
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "two"}]
    broken = engine.chat(messages, GREEDY, template=CHATML)
    for _ in range(4):
        next(broken)
    raised = KeyboardInterrupt if error is KeyboardInterrupt else GenerationError
    with failing_at(engine, NODE, error), pytest.raises(raised):
        list(broken)
    engine.plan.backends[0].queue.clear()  # type: ignore[attr-defined]
    assert engine.cache.n_states == n_states
    again = engine.chat(messages, GREEDY, template=CHATML)
    list(again)
    assert again.reuse.n_reused == n_held
    assert again.tokens == expected(alone, again.request.ids, GREEDY)[0]


# What goes wrong.


@pytest.mark.parametrize("params", [GREEDY, DRAWN])
def test_an_interrupt_in_a_step_ends_its_completions(
    load: Load, alone: Engine, params: SamplingParams
) -> None:
    engine = load(n_parallel=2)
    both = [engine.generate([i], params) for i in (1, 2)]
    for _ in range(4):
        next(both[0])
    with failing_at(engine, NODE, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        next(both[0])
    assert [c.finish_reason for c in both] == ["error"] * 2
    assert {c.detail for c in both} == {"its step broke off: KeyboardInterrupt()"}
    assert len(both[0].tokens) == 4
    engine.plan.backends[0].queue.clear()  # type: ignore[attr-defined]
    assert [t.token for t in engine.generate([1], params)] == expected(alone, [1], params)[0]


def test_an_interrupt_between_steps_changes_nothing(load: Load, alone: Engine) -> None:
    engine = load()
    completion = engine.generate([1], DRAWN)

    def interrupted() -> None:
        for _ in completion:
            if len(completion.tokens) == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for _ in completion:
        pass
    assert completion.tokens == expected(alone, [1], DRAWN)[0]


def test_an_error_in_a_launch_ends_them(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load()
    completion = engine.generate([1], GREEDY)
    for _ in range(3):
        next(completion)
    with monkeypatch.context() as patch:

        def broken(*args: Any) -> None:
            raise RuntimeError("no device")

        patch.setattr("tests.support.lazy_backend.LazySampler.launch", broken)
        with pytest.raises(GenerationError) as raised:
            next(completion)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert completion.finish_reason == "error"
    assert "its step broke off: RuntimeError('no device')" in completion.detail


@pytest.mark.parametrize("params", [GREEDY, DRAWN])
def test_a_row_that_is_not_finite_ends_alone(
    load: Load, alone: Engine, params: SamplingParams
) -> None:
    """The next step ran with its NaN too; no NaN is left in the memory it freed."""
    engine = load(n_parallel=2, n_checkpoints=0)
    good, bad = engine.generate([1], params), engine.generate([2], params)
    for _ in range(3):
        next(good)
    assert len(engine.memory.owned(bad.request.seq)[0]) == 2
    node = next(n for n in engine.plan.graph.nodes if n.name == NODE)
    reference, written = node.op.reference, 0

    def poisoned(**operands: Any) -> Any:
        nonlocal written
        outputs = reference(**operands)
        outputs[0][1] = np.nan
        operands["state"][operands["state_dst"][1]] = np.nan
        written += 1
        return outputs

    with replaced_op(engine, NODE, poisoned), pytest.raises(GenerationError):
        for _ in bad:
            pass
    assert bad.finish_reason == "error"
    n = len(bad.tokens)
    assert bad.detail == f"non-finite values in the logits, sequence 1, position {n}"
    # The step in flight has run too.
    assert written == 2
    states: Any = engine.plan.backends[0].states
    assert all(np.isfinite(array).all() for array in states.arrays.values())
    for _ in good:
        pass
    assert good.tokens == expected(alone, [1], params)[0]


def test_whoever_is_forgotten_leaves_nothing(load: Load) -> None:
    engine = load(n_parallel=2)
    for _ in range(3):
        completion = engine.generate([1], GREEDY)
        for _ in range(3):
            next(completion)
        del completion
        gc.collect()
        assert_all_free(engine)


def test_closing_drops_what_runs_ahead(load: Load) -> None:
    engine = load()
    completion = engine.generate([1], GREEDY)
    for _ in range(3):
        next(completion)
    assert engine.memory.slots.n_free == engine.memory.slots.size - 2
    engine.close()
    assert_all_free(engine)
    assert completion.finish_reason == "error"
    with pytest.raises(GenerationError, match="the engine is closed"):
        next(completion)


def test_checked_steps_are_not_ahead(load: Load, alone: Engine) -> None:
    engine = load(check=True)
    (done,) = engine.generate_batch([[1]], GREEDY)
    assert outcome(done) == expected(alone, [1], GREEDY)
    assert not engine.loop.runner.overlaps


def test_seconds_are_those_between_tokens(load: Load) -> None:
    """The host's time counts as part of the step's, and only once."""
    engine = load()

    def share() -> float:
        completion = engine.generate([1], replace(GREEDY, max_tokens=40))
        next(completion)
        start = time.perf_counter()
        for _ in completion:
            pass
        return completion.timings.eval_s / (time.perf_counter() - start)

    # Something else may run between a token's time and the clock here.
    judge("seconds between tokens to seconds around them", share, 0.9, 1)


def test_a_full_pool_is_no_reason_to_end(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """If blocks run out for the step ahead only, the step itself still runs."""
    engine = load()

    def full(chunks: Any, memory: Any, preserve_state: bool) -> Any:
        if preserve_state:
            raise MemoryFullError("out of blocks")
        return begin(chunks, memory, preserve_state)

    monkeypatch.setattr("engine.runtime.loop.begin", full)
    (done,) = engine.generate_batch([[1]], GREEDY)
    assert len(done.tokens) == 12
    assert n_ahead(engine) == 0
