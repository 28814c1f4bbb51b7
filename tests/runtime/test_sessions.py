"""Sessions: a completion in a file goes on in another engine as if it had never ended.

The reference is the same completion of an engine that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import ChatTemplate, Engine, SamplingParams
from engine.runtime.completion import Completion
from tests.support.chats import CHATML, QWEN35_STYLE
from tests.support.helpers import assert_all_free, exact_engine, float64_engine, nmse, random_ids
from tests.support.lazy_backend import lazy_engine
from tests.support.presets import ONE_OF_EACH
from tests.support.talk import CACHE_RAM, GREEDY, Noting, assert_right, forced, steps_run

Models = Callable[[str, str], Path]
Rng = np.random.Generator
Logits = NDArray[np.float32]
Make = Callable[[Path], Engine]
OPTIONS: dict[str, Any] = {"n_ctx": 1024, "n_parallel": 2, "cache_ram": CACHE_RAM}
LONG = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DRAWN = replace(LONG, temperature=1.5, seed=5, top_k=0, top_p=1.0, min_p=0.0)


def make_float64(path: Path) -> Engine:
    return float64_engine(path, **OPTIONS)


def make_cpu(path: Path) -> Engine:
    return exact_engine("cpu", path, **OPTIONS)


def make_lazy(path: Path) -> Engine:
    """One with overlapped steps, which samples as a device does."""
    return lazy_engine(path, **OPTIONS)


@pytest.fixture(params=[make_float64, make_cpu, make_lazy])
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


def run(completion: Completion, n: int) -> Completion:
    """A completion once it has `n` tokens."""
    while len(completion.tokens) < n and completion.finish_reason is None:
        next(completion, None)
    return completion


def interrupted(make: Make, path: Path, file: Path, start: Callable[[Engine], Completion],
                n: int) -> tuple[list[int], Completion]:  # fmt: skip
    """The first `n` tokens of a completion, which is saved then, and what comes after them in
    another engine; restoring runs no step, and what comes after runs one for a token alone."""
    with make(path) as engine:
        before = run(start(engine), n)
        tokens = list(before.tokens)
        assert engine.save(before, file, {"n": n}) == file.stat().st_size
        before.close()
        assert_all_free(engine)
    with make(path) as engine:
        with steps_run() as steps:
            session = engine.restore(file)
            assert not steps
            assert session.tokens[session.n_prompt :] == tokens
            assert session.data == {"n": n}
            after = engine.resume(session).wait()
        n_left = len(session.tokens) - session.n_kept
        assert n_left == (len(tokens) > 0)
        assert sum(live.n_tokens for live in steps) <= n_left + len(after.tokens)
        assert after.reuse.n_reused == session.n_kept
        assert_all_free(engine)
    return tokens, after


# A completion goes on.


@pytest.mark.parametrize(
    "params",
    [
        LONG,
        DRAWN,
        replace(DRAWN, logprobs=3),
        replace(DRAWN, repeat_penalty=1.3, repeat_last_n=-1, frequency_penalty=0.5),
        replace(DRAWN, presence_penalty=0.7, top_k=20, samplers=("penalties", "top_k")),
        replace(LONG, dry_multiplier=2.0, dry_allowed_length=1, dry_sequence_breakers=("a",)),
        replace(DRAWN, mirostat=2),
        replace(DRAWN, logit_bias={5: -math.inf, 7: 3.5}, xtc_probability=0.5),
    ],
)
def test_it_goes_on_as_if_never_interrupted(
    make: Make, tiny: Path, tmp_path: Path, rng: Rng, params: SamplingParams
) -> None:
    prompt = [*random_ids(rng, 100), *[9, 8, 7] * 3]
    with make(tiny) as engine:
        expected = engine.generate(prompt, params).wait()
    for n in (1, int(rng.integers(2, 11)), 11):
        tokens, after = interrupted(
            make, tiny, tmp_path / "a", lambda engine: engine.generate(prompt, params), n
        )
        assert tokens + after.tokens == expected.tokens
        assert after.logprobs == expected.logprobs[n:]
        assert after.finish_reason == "length"


@pytest.mark.parametrize("preset", ONE_OF_EACH)
@pytest.mark.parametrize("backend", [make_cpu, make_float64])
def test_logits_have_the_same_bits(
    backend: Make, models: Models, tmp_path: Path, rng: Rng, preset: str
) -> None:
    path, prompt = models(preset, "F32"), random_ids(rng, 150)
    noting = Noting()
    with backend(path) as engine:
        completion = engine.generate(prompt, replace(LONG, logits_processors=noting))
        n = len(run(completion, 5).tokens)
        engine.save(completion, tmp_path / "a")
        completion.wait()
    again = Noting()
    with backend(path) as engine:
        session = engine.restore(tmp_path / "a")
        left = replace(session.params, logits_processors=again)
        assert left.max_tokens == 12 - n
        after = engine.resume(session, left).wait()
        assert after.tokens == completion.tokens[n:]
        assert_all_free(engine)
    rows = noting.rows[n:]
    assert len(rows) == len(again.rows) == 12 - n
    for row, expected in zip(again.rows, rows, strict=True):
        assert (row == expected).all(), nmse(row, expected)


def test_after_its_end_as_much_comes_again(
    make: Make, tiny: Path, tmp_path: Path, rng: Rng
) -> None:
    prompt = random_ids(rng, 70)
    with make(tiny) as engine:
        expected = engine.generate(prompt, replace(DRAWN, max_tokens=24)).wait().tokens
    tokens, after = interrupted(
        make, tiny, tmp_path / "a", lambda engine: engine.generate(prompt, DRAWN).wait(), 12
    )
    assert tokens + after.tokens == expected


def test_texts_that_the_save_cuts(make: Make, tiny: Path, tmp_path: Path) -> None:
    """A stop text and a character: what was held back comes when it is known."""
    for said, stop, text in [
        ("so it é. ends", ("é. e",), "so it "),
        ("so it é. ended", ("é. ends",), "so it é. ended"),
        ("€" * 4, (), "€" * 4),
    ]:
        tokens = list(said.encode())
        params = replace(forced(tokens, 3), stop=stop)
        for n in range(1, len(tokens)):
            with make(tiny) as engine:
                before = run(engine.generate([1, 2, 3], params), n)
                if before.finish_reason:
                    break
                shown = before.text
                engine.save(before, tmp_path / "a")
                session = engine.restore(tmp_path / "a")
                rest = replace(session.params, logits_processors=params.logits_processors)
                after = engine.resume(session, rest).wait()
                assert shown + after.text == text, n
                assert after.finish_reason == ("stop" if text == "so it " else "length")


def test_a_prompt_that_ended_at_once(make: Make, tiny: Path, tmp_path: Path, rng: Rng) -> None:
    """No token came but one that ends it: the prompt's state is what is saved."""
    with make(tiny) as engine:
        (end, *_) = engine.tokenizer.eog_ids
        only = SamplingParams(temperature=0, max_tokens=5, logit_bias={end: 1e9})
        prompt = random_ids(rng, 100)
        done = engine.generate(prompt, only).wait()
        assert (done.tokens, done.finish_reason) == ([], "stop")
        engine.save(done, tmp_path / "a")
    with make(tiny) as engine:
        session = engine.restore(tmp_path / "a")
        assert (session.tokens, session.n_kept) == (prompt, 100)
        after = engine.resume(session, LONG).wait()
        expected = engine.generate(prompt, LONG, cache_prompt=False).wait()
        assert after.tokens == expected.tokens
        if engine.loop.scheduler.keeps_logits:
            assert after.reuse.n_reused == 100


def test_an_answer_that_ended_by_its_token(
    make: Make, tiny: Path, tmp_path: Path, rng: Rng
) -> None:
    """It goes on as one that did not end there, and nothing of it is processed again."""
    prompt, n_before = random_ids(rng, 100), 5
    with make(tiny) as engine:
        (end, *_) = engine.tokenizer.eog_ids

        def end_it(tokens: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
            logits[end] = 1e9 if len(tokens) == 100 + n_before else -1e9
            return logits

        ending = SamplingParams(temperature=0, max_tokens=9, logits_processors=[end_it])
        done = engine.generate(prompt, ending).wait()
        assert (len(done.tokens), done.finish_reason) == (n_before, "stop")
        engine.save(done, tmp_path / "a")
        expected = engine.generate(prompt, LONG, cache_prompt=False).wait().tokens
        assert expected[:n_before] == done.tokens
    with make(tiny) as engine:
        session = engine.restore(tmp_path / "a")
        after = engine.resume(session, LONG)
        rest = expected[n_before:]
        assert after.wait().tokens[: len(rest)] == rest
        if engine.loop.scheduler.keeps_logits:
            assert after.timings.n_prompt == 0


def test_a_seed_of_its_own(tiny: Path, tmp_path: Path) -> None:
    """Other parameters go on with the random numbers, unless they name another seed."""
    with make_float64(tiny) as engine:
        expected = engine.generate([1, 2, 3], DRAWN).wait().tokens
        engine.save(run(engine.generate([1, 2, 3], DRAWN), 4), tmp_path / "a")
        session = engine.restore(tmp_path / "a")
        for seed, is_same in ((None, True), (-1, True), (5, True), (6, False)):
            params = replace(session.params, seed=seed)
            assert (engine.resume(session, params).wait().tokens == expected[4:]) == is_same


def test_a_deeper_state_that_was_known(make: Make, tiny: Path, tmp_path: Path, rng: Rng) -> None:
    """Another completion went on from the same tokens. Its state lacks the last one's logits, so
    one token is processed, and no more."""
    prompt = random_ids(rng, 100)
    with make(tiny) as engine:
        expected = engine.generate(prompt, LONG).wait().tokens
        engine.generate([*prompt, *expected[:5]], replace(LONG, max_tokens=1)).wait()
        engine.save(run(engine.generate(prompt, LONG), 5), tmp_path / "a")
    with make(tiny) as engine:
        after = engine.resume(engine.restore(tmp_path / "a")).wait()
        assert after.tokens == expected[5:]
        assert after.reuse.n_reused >= 104


# Chats.


@pytest.mark.parametrize("source", [CHATML, QWEN35_STYLE])
def test_a_chat_goes_on(make: Make, tiny: Path, tmp_path: Path, source: str) -> None:
    """The next turn processes what the same engine would. The answer's tokens are not those that
    the tokenizer makes of its text, and a template drops what was thought."""
    template, said = ChatTemplate(source), "the cat in the hat"
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief. " * 20}]
    n_reused = list[int]()
    fresh = float64_engine(tiny, n_ctx=1024, cache_ram=0)

    def ask(engine: Engine, text: str) -> Completion:
        messages.append({"role": "user", "content": text})
        n = len(engine.chat(messages, replace(LONG, max_tokens=0), template=template).request.ids)
        answer = engine.chat(messages, forced(list(said.encode()), n), template=template).wait()
        messages.append({"role": "assistant", "content": answer.text})
        return answer

    with make(tiny) as engine:
        for text in ("which animals?", "and then?"):
            answer = ask(engine, text)
        engine.save(answer, tmp_path / "a", messages)
        messages.append({"role": "user", "content": "more"})
        expected = engine.chat(messages, GREEDY, template=template).wait()
        n_reused.append(expected.reuse.n_reused)
    with make(tiny) as engine:
        session = engine.restore(tmp_path / "a")
        assert session.data == messages[:-1]
        with steps_run() as steps:
            again = engine.chat(messages, GREEDY, template=template).wait()
        assert again.request.ids == expected.request.ids
        assert again.tokens == expected.tokens
        assert again.reuse.n_reused == n_reused[0] > 100
        n_new = len(again.request.ids) - again.reuse.n_reused
        assert sum(live.n_tokens for live in steps) <= n_new + len(again.tokens)
        if make is not make_cpu:
            assert_right(again, fresh)
        assert_all_free(engine)


def test_nothing_of_other_prompts_is_in_a_file(tiny: Path, tmp_path: Path, rng: Rng) -> None:
    """Where blocks were used before, a file is the one of an engine in which nothing else ran."""
    prompt = random_ids(rng, 100)
    params = SamplingParams(temperature=0, max_tokens=4, seed=1)
    found = []
    for n_before in (0, 3):
        with exact_engine("cpu", tiny, n_ctx=512, cache_ram=4) as engine:
            for _ in range(n_before):
                engine.generate(random_ids(rng, 400), params).wait()
            engine.cache.clear()
            engine.save(engine.generate(prompt, params).wait(), tmp_path / "a")
            found.append((tmp_path / "a").read_bytes())
    assert found[0] == found[1]
