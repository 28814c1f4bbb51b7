"""Why completions end, each beside others that continue; and requests that don't fit at first.

A request that has to wait runs when memory is free; one that never fits is refused with the sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine, SamplingParams
from engine.kvcache.sequences import Checkpoint
from engine.runtime.completion import Completion, GenerationError
from tests.support.helpers import assert_all_free

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture
def load(models: Callable[[str, str], Path]) -> Callable[..., Engine]:
    def load(**options: Any) -> Engine:
        return Engine.load(models("tiny", "F32"), **{"n_ctx": 2048, **options})

    return load


def tokens_alone(engine: Engine, prompt: Sequence[int]) -> list[int]:
    (completion,) = engine.generate_batch([prompt], [GREEDY])
    return completion.tokens


# Why a completion ends.


def ended(engine: Engine, **params: Any) -> Completion:
    """[1, 2, 3], completed greedily beside two others."""
    chosen = SamplingParams(**{"temperature": 0, "ignore_eos": True, "max_tokens": 6, **params})
    return engine.generate_batch([[9] * 70, [1, 2, 3], [4]], [GREEDY, chosen, GREEDY])[1]


@pytest.fixture(scope="module")
def three(models: Callable[[str, str], Path]) -> Engine:
    return Engine.load(models("tiny", "F32"), n_ctx=300, n_parallel=3)


@pytest.fixture
def company(three: Engine) -> Iterator[Engine]:
    """An engine for three sequences; every test leaves its memory free."""
    yield three
    assert_all_free(three)
    assert not three.advance()


def test_ends_by_itself(company: Engine) -> None:
    (end, *_) = company.tokenizer.eog_ids
    done = ended(company, ignore_eos=False, logit_bias={end: 1e9})
    assert (done.finish_reason, done.detail) == ("stop", f"end-of-generation token {end}")
    assert (done.tokens, done.text) == ([], "")


def test_ends_at_a_stop_text(company: Engine) -> None:
    whole = ended(company).text
    stop = whole[len(whole) // 2 :][:2]
    done = ended(company, stop=("\0never", stop))
    assert (done.finish_reason, done.detail) == ("stop", "stop text")
    assert done.text == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("max_tokens", "n", "detail"),
    [
        (0, 0, "0 tokens were asked for"),
        (1, 1, "1 tokens were asked for"),
        (6, 6, "6 tokens were asked for"),
        # A third of 300 positions, of which the prompt has 3; the last token needs none.
        (-1, 98, "the context of 100 positions is full"),
        (400, 298, "the context of 300 positions is full"),
    ],
)
def test_ends_at_a_limit(company: Engine, max_tokens: int, n: int, detail: str) -> None:
    done = ended(company, max_tokens=max_tokens)
    assert (done.finish_reason, done.detail) == ("length", detail)
    assert len(done.tokens) == n


@pytest.mark.parametrize(("n_prompt", "n"), [(99, 2), (100, 1), (101, 1), (300, 1)])
def test_a_prompt_longer_than_its_share_still_gets_a_token(
    company: Engine, n_prompt: int, n: int
) -> None:
    params = SamplingParams(temperature=0, ignore_eos=True)
    others = [company.generate([1], GREEDY), company.generate([2], GREEDY)]
    (done,) = company.generate_batch([[5] * n_prompt], params)
    assert (done.finish_reason, len(done.tokens)) == ("length", n)
    del others


def test_ends_when_its_user_says_so(company: Engine) -> None:
    completion, other = company.generate([1], GREEDY), company.generate([2], GREEDY)
    first = next(completion)
    completion.cancel()
    assert (completion.finish_reason, completion.detail) == ("cancelled", "by its user")
    assert list(completion) == []
    assert completion.tokens == [first.token]
    assert [t.token for t in other] == tokens_alone(company, [2])
    # A completion that had ended before keeps its reason.
    other.cancel()
    assert other.finish_reason == "length"


@pytest.mark.parametrize(
    "params",
    [{"logits_processors": lambda tokens, logits: logits[5:]},
     {"temperature": 1e308, "dynatemp_range": 1e308, "top_k": 1},
     {"dry_multiplier": 1e308, "dry_base": 1e308}],
)  # fmt: skip
def test_what_its_own_code_raises_ends_it_alone(company: Engine, params: dict[str, Any]) -> None:
    """The others were one token off after it, with the reason `length`."""
    done, other = company.generate_batch([[1] * 5, [2]], [replace(GREEDY, **params), GREEDY])
    assert done.finish_reason in ("error", "length")
    assert (done.finish_reason == "error") == ("dry_base" not in params)
    assert other.tokens == tokens_alone(company, [2])
    with pytest.raises(GenerationError) if done.finish_reason == "error" else nullcontext():
        list(done)
    # Nor does it stop anybody when it is cancelled before its first token.
    company.generate([1], replace(GREEDY, **params)).stop()
    assert company.generate([2], GREEDY).wait().tokens == other.tokens


def test_an_end_from_without_shows_what_was_held_back(company: Engine) -> None:
    """Text that may begin a stop text is that of the last tokens if nothing follows."""
    whole = company.generate([2], GREEDY).wait()
    hold = replace(GREEDY, stop=whole.text[:-1] + "\x00")

    def broken(tokens: Sequence[int], logits: Any) -> Any:
        return logits if len(tokens) < 4 else 1 / 0

    cancelled = company.generate([2], hold)
    for _ in range(3):
        next(cancelled)
    cancelled.cancel()
    failed = company.generate([2], replace(hold, logits_processors=broken))
    with pytest.raises(GenerationError):
        failed.wait()
    closed = company.generate([2], hold)
    next(closed)
    company.loop.fail(RuntimeError("stopped"))
    for completion in (cancelled, failed, closed):
        n = len(completion.tokens)
        assert n in (1, 3)
        assert completion.tokens == whole.tokens[:n]
        decoder = company.tokenizer.stream(at_start=False)
        spelled = "".join(map(decoder.push, completion.tokens)) + decoder.finish()
        assert completion.text == spelled


def test_ends_with_an_error_of_its_own(company: Engine) -> None:
    """A request that bans every token fails; the one beside it is not affected."""
    nothing = SamplingParams(logit_bias=dict.fromkeys(range(320), -np.inf))
    done, other = company.generate_batch([[1], [2]], [nothing, GREEDY])
    assert done.finish_reason == "error"
    assert "logits: expected a finite number" in done.detail
    assert other.tokens == tokens_alone(company, [2])
    with pytest.raises(GenerationError, match="logits: expected a finite number"):
        next(company.generate([1], nothing))


# Requests that don't fit.


def test_more_than_fit_wait_their_turn(load: Callable[..., Engine]) -> None:
    with load(n_parallel=2) as engine:
        all_five = [engine.generate([i], GREEDY) for i in range(5)]
        for expected in ([1, 1, 0, 0, 0], [2, 2, 0, 0, 0]):
            engine.advance()
            assert [len(c.tokens) for c in all_five] == expected
        # A waiting request can be cancelled, and the last one can be read first.
        all_five.pop(2).cancel()
        assert len(list(all_five[-1])) == 10
        assert [c.finish_reason for c in all_five] == ["length"] * 4
        del all_five
        assert_all_free(engine)


def held_by_a_checkpoint(engine: Engine, n: int) -> Checkpoint:
    seq = engine.memory.create()
    engine.prefill(seq, [1] * n)
    checkpoint = engine.memory.checkpoint(seq)
    engine.memory.free(seq)
    return checkpoint


def test_what_a_checkpoint_holds_is_waited_for(load: Callable[..., Engine]) -> None:
    """There are 4 + 2 + 1 blocks of 64; the checkpoint holds 4, the first request may take 2."""
    whole = SamplingParams(temperature=0, max_tokens=186, ignore_eos=True)
    with load(n_ctx=256, n_parallel=2, n_checkpoints=1, cache_ram=0) as engine:
        checkpoint = held_by_a_checkpoint(engine, 200)
        first = engine.generate([1], replace(whole, max_tokens=100))
        second = engine.generate([2] * 70, whole)
        for _ in range(5):
            engine.advance()
        assert (len(first.tokens), second.tokens) == (5, [])
        checkpoint.release()
        engine.advance()
        assert len(second.tokens) == 1
        first.cancel()
        assert len(list(second)) == 186
        assert second.finish_reason == "length"
        assert_all_free(engine)


def test_what_can_never_fit_is_refused_with_the_sizes(load: Callable[..., Engine]) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with load(n_ctx=256, n_parallel=2, n_checkpoints=1, cache_ram=0) as engine:
        checkpoint = held_by_a_checkpoint(engine, 200)
        small, large = engine.generate_batch([[1], [2] * 200], params)
        assert small.finish_reason == "length"
        assert large.finish_reason == "error"
        assert large.detail == (
            "it needs 256 positions and a state slot: 192 positions and 2 slots are free, "
            "others are held (by checkpoints, say)"
        )
        checkpoint.release()
        assert_all_free(engine)


@pytest.mark.parametrize("n_held", [1, 2, 3])
def test_slots_that_checkpoints_hold_are_promised_to_nobody(
    load: Callable[..., Engine], n_held: int
) -> None:
    """With more checkpoints than n_checkpoints, fewer requests run at once, and none fails."""
    with load(n_parallel=3, n_checkpoints=0, cache_ram=0) as engine:
        held = [held_by_a_checkpoint(engine, 5) for _ in range(n_held)]
        done = engine.generate_batch([[1], [2], [3], [4]], GREEDY)
        reasons = {c.finish_reason for c in done}
        assert reasons == ({"length"} if n_held < 3 else {"error"})
        for checkpoint in held:
            checkpoint.release()
        assert_all_free(engine)


def fill_cache(engine: Engine, rng: np.random.Generator) -> None:
    """Let it keep states until it has to give some up."""
    while not engine.cache.counts.n_evicted:
        prompt = rng.integers(0, 320, 100).tolist()
        engine.generate(prompt, replace(GREEDY, max_tokens=1)).wait()
    assert engine.cache.n_states > 10


def test_what_the_cache_holds_is_not_waited_for(
    load: Callable[..., Engine], rng: np.random.Generator
) -> None:
    """As if nothing had run: checkpoints hold all but the cache's slots and blocks."""
    whole = SamplingParams(temperature=0, max_tokens=186, ignore_eos=True)
    with load(n_ctx=256, n_parallel=2, n_checkpoints=1, cache_ram=1) as engine:
        held = [held_by_a_checkpoint(engine, 5) for _ in range(4)]
        fill_cache(engine, rng)
        prompts = [rng.integers(0, 320, 70).tolist() for _ in range(2)]
        both = [engine.generate(prompt, whole) for prompt in prompts]
        engine.advance()
        assert [len(c.tokens) for c in both] == [1, 1]
        for completion in both:
            assert len(list(completion)) == 186
        del both
        for checkpoint in held:
            checkpoint.release()
        assert_all_free(engine)


def test_what_the_cache_holds_is_no_reason_to_refuse(
    load: Callable[..., Engine], rng: np.random.Generator
) -> None:
    """What checkpoints hold is one: they first hold all that the cache doesn't, then all."""
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with load(n_ctx=256, n_checkpoints=0, cache_ram=1) as engine:
        fill_cache(engine, rng)
        memory, held = engine.memory, list[Checkpoint]()
        while memory.slots.n_free and memory.blocks.n_free:
            held.append(held_by_a_checkpoint(engine, 1))
        done = engine.generate(rng.integers(0, 320, 190).tolist(), params).wait()
        assert done.finish_reason == "length"
        while memory.slots.n_free or engine.cache.n_states:
            held.append(held_by_a_checkpoint(engine, 1))
        (refused,) = engine.generate_batch([[2]], params)
        assert refused.finish_reason == "error"
        assert "0 slots are free, others are held (by checkpoints, say)" in refused.detail
        for checkpoint in held:
            checkpoint.release()
        assert_all_free(engine)
