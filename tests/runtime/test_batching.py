"""Completions in a batch: each equals its prompt run alone, whichever others join, leave or fail.

The standard is an engine that runs one completion at a time, in float64 like those under test, so
that the logits of every step can be compared closely. Random schedules start, read, cancel, close
and drop completions; after all of them, all memory is free.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import Engine, SamplingError, SamplingParams
from engine.runtime.completion import Completion
from engine.runtime.owner import Signal
from engine.runtime.request import Request
from tests.support.helpers import assert_all_free, float64_engine, nmse, random_ids

Rng = np.random.Generator
Logged = dict[Request, list[NDArray[np.float32]]]
MAX_NMSE = 1e-10
N_CTX = 2048
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
# Flat: if logits or random numbers differ, some token almost certainly differs.
WILD: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch) -> Logged:
    """The logits that every request was given."""
    seen: Logged = defaultdict(list)
    accept_logits = Request.accept_logits

    def recording(self: Request, logits: NDArray[np.float32]) -> None:
        seen[self].append(logits.copy())
        accept_logits(self, logits)

    monkeypatch.setattr(Request, "accept_logits", recording)
    return seen


@pytest.fixture(scope="module")
def alone(models: Callable[[str, str], Path]) -> Engine:
    return float64_engine(models("tiny", "F32"), n_ctx=N_CTX, cache_ram=0)


@pytest.fixture
def load(models: Callable[[str, str], Path]) -> Callable[..., Engine]:
    def load(**options: Any) -> Engine:
        return float64_engine(models("tiny", "F32"), **{"n_ctx": N_CTX, **options})

    return load


def request_of(completion: Completion) -> Request:
    return completion.request


def finished(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> Request:
    """A prompt run to its end, alone in the engine."""
    (completion,) = engine.generate_batch([prompt], [params])
    return request_of(completion)


def assert_same_run(got: Request, expected: Request, logged: Logged) -> None:
    """Compare all of a run; of a cancelled one, all that it had."""
    n = len(logged[got])
    for ours, theirs in zip(logged[got], logged[expected][:n], strict=True):
        assert nmse(ours, theirs) <= MAX_NMSE
    if got.finish_reason == "cancelled":
        assert got.tokens == expected.tokens[: len(got.tokens)]
        # Its last token may end within a character.
        assert expected.text.startswith(got.text.rstrip("\ufffd"))
    else:
        assert (got.tokens, got.text) == (expected.tokens, expected.text)
        assert (got.finish_reason, got.detail) == (expected.finish_reason, expected.detail)
        assert n == len(logged[expected])


def random_params(rng: Rng) -> SamplingParams:
    """Random parameters with a seed, so that the run can be repeated."""
    choices: list[dict[str, Any]] = [
        {"temperature": 0},
        WILD,
        {"temperature": 1.0, "repeat_penalty": 1.3},
        {"mirostat": 2, "dry_multiplier": 0.5},
        {**WILD, "stop": ("e", " t")},
    ]
    chosen = choices[rng.integers(len(choices))]
    n, seed = int(rng.integers(1, 14)), int(rng.integers(2**32))
    return SamplingParams(**chosen, seed=seed, max_tokens=n, ignore_eos=bool(rng.integers(2)))


@pytest.mark.parametrize("n_parallel", [1, 3, 8])
@pytest.mark.parametrize("n_same", [1, 4, 16])
def test_identical_prompts_among_others_are_one_output(
    load: Callable[..., Engine], alone: Engine, rng: Rng, logged: Logged, n_same: int,
    n_parallel: int,
) -> None:  # fmt: skip
    target = random_ids(rng, int(rng.integers(1, 200)))
    work: list[tuple[Sequence[int], SamplingParams]] = [(target, GREEDY)] * n_same
    work += [(random_ids(rng, int(rng.integers(1, 301))), random_params(rng)) for _ in range(6)]
    order = rng.permutation(len(work)).tolist()
    with load(n_parallel=n_parallel) as engine:
        done = engine.generate_batch([work[i][0] for i in order], [work[i][1] for i in order])
        assert_all_free(engine)
    expected = finished(alone, target, GREEDY)
    assert len(expected.tokens) == 10
    for i, completion in zip(order, done, strict=True):
        if i < n_same:
            assert_same_run(request_of(completion), expected, logged)
        else:
            assert_same_run(request_of(completion), finished(alone, *work[i]), logged)


class Schedule:
    """Completions that come and go at random."""

    def __init__(self, engine: Engine, rng: Rng) -> None:
        self.engine, self.rng = engine, rng
        self.active: list[Completion] = []
        self.started: list[tuple[Request, list[int], SamplingParams]] = []

    def start(self) -> None:
        n = int(self.rng.choice([1, 5, 63, 64, 65, int(self.rng.integers(1, 301))]))
        prompt, params = random_ids(self.rng, n), random_params(self.rng)
        completion = self.engine.generate(prompt, params)
        self.active.append(completion)
        self.started.append((request_of(completion), prompt, params))

    def leave(self) -> None:
        """End one: cancel it, close it, or drop the last reference."""
        completion = self.active.pop(self.rng.integers(len(self.active)))
        way = self.rng.integers(3)
        if way == 0:
            completion.cancel()
            completion.cancel()
        elif way == 1:
            completion.close()
        # Otherwise it is forgotten.

    def pull(self) -> None:
        """Read the next token of one."""
        next(self.active[self.rng.integers(len(self.active))], None)

    def act(self) -> None:
        chance = self.rng.random()
        if chance < 0.25 or not self.active:
            self.start()
        elif chance < 0.35:
            self.leave()
        elif chance < 0.7:
            self.pull()
        else:
            self.engine.advance()


@pytest.mark.parametrize(
    ("n_parallel", "n_ubatch"), [(1, 64), (3, 7), (3, 64), (3, 512), (8, 64), (8, 100)]
)
def test_whoever_joins_or_leaves_the_others_go_on(
    load: Callable[..., Engine], alone: Engine, rng: Rng, logged: Logged, n_parallel: int,
    n_ubatch: int,
) -> None:  # fmt: skip
    with load(n_parallel=n_parallel, n_ubatch=n_ubatch) as engine:
        schedule = Schedule(engine, rng)
        for _ in range(70):
            schedule.act()
        for completion in schedule.active:
            for _ in completion:
                pass
        assert_all_free(engine)
        assert not engine.advance()
    for request, prompt, params in schedule.started:
        assert request.finish_reason
        assert_same_run(request, finished(alone, prompt, params), logged)


@pytest.mark.parametrize("n_ubatch", [1, 10, 63, 64, 65, 100, 127, 128, 200, 512])
def test_prompts_cut_anywhere_give_the_same_logits(
    load: Callable[..., Engine], alone: Engine, rng: Rng, logged: Logged, n_ubatch: int
) -> None:
    """Through `logits`, and as two completions that share every step."""
    ids, other = random_ids(rng, 210), random_ids(rng, 70)
    one = SamplingParams(temperature=0, max_tokens=1)
    with load(n_ubatch=n_ubatch, n_parallel=2) as engine:
        assert nmse(engine.logits(ids), alone.logits(ids)) <= MAX_NMSE
        done = engine.generate_batch([ids, other], one)
        for completion, prompt in zip(done, (ids, other), strict=True):
            (row,) = logged[request_of(completion)]
            assert nmse(row, alone.logits(prompt)[-1]) <= MAX_NMSE
        assert_all_free(engine)


def test_the_same_seed_draws_the_same_in_any_company(
    load: Callable[..., Engine], alone: Engine, rng: Rng
) -> None:
    prompt = random_ids(rng, 20)
    each = [SamplingParams(**WILD, seed=seed, max_tokens=25) for seed in (1, 2, 1, 3, 2, 1)]
    with load(n_parallel=4) as engine:
        done = engine.generate_batch([prompt] * len(each), each)
    for completion, params in zip(done, each, strict=True):
        assert completion.tokens == finished(alone, prompt, params).tokens
    assert len({tuple(c.tokens) for c in done}) == 3


def test_without_a_seed_each_draws_its_own(load: Callable[..., Engine], rng: Rng) -> None:
    params = SamplingParams(**WILD, max_tokens=25, ignore_eos=True)
    with load(n_parallel=4) as engine:
        done = engine.generate_batch([random_ids(rng, 20)] * 4, params)
    assert len({tuple(c.tokens) for c in done}) == 4


def test_prompts_that_cannot_be_run_do_not_disturb_the_others(
    load: Callable[..., Engine], alone: Engine, rng: Rng, logged: Logged
) -> None:
    good = [random_ids(rng, 30), random_ids(rng, 5)]
    bad_bias = SamplingParams(logit_bias={320: 1.0})
    work: list[tuple[str | list[int], SamplingParams, str]] = [
        ("", GREEDY, "the prompt is empty"),
        (good[0], GREEDY, ""),
        ([1] * (N_CTX + 1), GREEDY, f"the prompt has {N_CTX + 1} tokens, the context {N_CTX}"),
        ([3, 320], GREEDY, "token id 320: expected 0 to 319"),
        ([], GREEDY, "the prompt is empty"),
        ([5], bad_bias, "logit_bias: token id 320: expected 0 to 319"),
        ([-1], GREEDY, "token id -1"),
        (good[1], SamplingParams(**WILD, seed=7, max_tokens=9), ""),
        ("a\ud800", GREEDY, "text cannot be encoded"),
    ]
    ended: list[int] = []
    with load(n_parallel=2) as engine:
        prompts, params, words = zip(*work, strict=True)
        done = engine.generate_batch(prompts, params, lambda i, _: ended.append(i))
        assert_all_free(engine)
    assert sorted(ended) == list(range(len(work)))
    for completion, prompt, own, message in zip(done, prompts, params, words, strict=True):
        if message:
            assert (completion.finish_reason, completion.tokens) == ("error", [])
            assert message in completion.detail
        else:
            assert_same_run(request_of(completion), finished(alone, prompt, own), logged)


def test_a_wrong_number_of_parameters_starts_nothing(load: Callable[..., Engine]) -> None:
    with load() as engine:
        with pytest.raises(SamplingError, match="params: expected 2, one a prompt, got 1"):
            engine.generate_batch([[1], [2]], [GREEDY])
        gc.collect()
        assert not engine.advance()
        assert_all_free(engine)


def test_an_error_of_the_callback_frees_what_was_running(load: Callable[..., Engine]) -> None:
    def fail(index: int, completion: Completion) -> None:
        raise KeyError(index)

    short, long = SamplingParams(max_tokens=1), SamplingParams(max_tokens=50, ignore_eos=True)
    with load(n_parallel=2) as engine:
        with pytest.raises(KeyError):
            engine.generate_batch([[1], [2], [3]], [short, long, long], fail)
        assert_all_free(engine)
        assert not engine.advance()


def test_no_prompts_are_no_completions(load: Callable[..., Engine]) -> None:
    with load() as engine:
        assert engine.generate_batch([]) == []


@pytest.mark.parametrize("n", [1, 3])
def test_a_step_notifies_a_shared_signal_once(tiny: Path, n: int) -> None:
    """Who waits for many requests wakes up once for all of them; what came before is told, too."""

    class Counting(Signal):
        n_notified = 0

        def notify(self) -> None:
            self.n_notified += 1
            super().notify()

    with Engine.load(tiny, n_parallel=n, n_ctx=N_CTX) as engine:
        asked = [engine.generate([5, 6, 7], GREEDY, cache_prompt=False) for _ in range(n)]
        engine.advance()
        signal = Counting()
        for completion in asked:
            assert completion.has_news
            completion.tell(signal)
        assert signal.n_notified == n
        assert [len(completion.take_ready()) for completion in asked] == [1] * n
        assert not any(completion.has_news for completion in asked)
        for steps in range(1, 4):
            engine.advance()
            assert signal.n_notified == n + steps
        assert [len(completion.take_ready()) for completion in asked] == [3] * n
        assert [completion.tokens for completion in asked] == [asked[0].tokens] * n
