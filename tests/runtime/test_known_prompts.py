"""What prompts reuse: texts found first, shared beginnings, retries; reasons; what errors leave.

The reference for an answer is the same tokens as one prompt of another engine, without a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import ChatTemplate, Engine, SamplingParams
from engine.kvcache.policy import Kind
from engine.runtime.completion import GenerationError
from engine.runtime.reuse import Reuse
from engine.text.tokenizer import Tokenizer
from tests.support.chats import CHATML, QWEN35_STYLE
from tests.support.helpers import N_VOCAB, STD, assert_all_free, float64_engine, random_ids
from tests.support.lazy_backend import lazy_engine
from tests.support.talk import (
    CACHE_RAM,
    GREEDY,
    Noting,
    Talk,
    assert_cache_right,
    assert_right,
    forced,
    kept_ends,
    marks,
    processed,
    steps_run,
)
from tools.makevocab import made_vocabulary
from tools.synth import write_model

PLAIN, THINKING = ChatTemplate(CHATML), ChatTemplate(QWEN35_STYLE)
ONE = SamplingParams(temperature=0, max_tokens=1)
SYSTEM = {"role": "system", "content": "You answer in few words. " * 12}
Logits = NDArray[np.float32]
Rng = np.random.Generator


@pytest.fixture(scope="module")
def fresh(tiny: Path) -> Engine:
    """The engine that answers prompts from their start."""
    return float64_engine(tiny, n_ctx=2048, cache_ram=0)


@pytest.fixture(params=[float64_engine, lazy_engine])
def engine(tiny: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """With synchronous decode steps, and with overlapped ones."""
    with request.param(tiny, n_ctx=2048, n_parallel=2, cache_ram=CACHE_RAM) as engine:
        yield engine
        assert_all_free(engine)


def keeps_logits(engine: Engine) -> bool:
    """Whether a prompt's last logits are kept; else a state at most 64 tokens before its end is."""
    return engine.loop.scheduler.keeps_logits


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def odd(engine: Engine, text: str) -> list[int]:
    """The tokens of a text that its tokenizer does not make of it: a token for each byte."""
    tokens = list(text.encode())
    assert engine.tokenizer.decode(tokens) == text
    assert len(engine.tokenizer.encode(text)) < len(tokens)
    return tokens


# Texts first.


@pytest.mark.parametrize("reasoning", [None, False])
def test_an_answer_of_odd_tokens_is_reused_whole(
    engine: Engine, fresh: Engine, reasoning: bool | None
) -> None:
    options: dict[str, Any]
    template, options = (PLAIN, {}) if reasoning is None else (THINKING, {"reasoning": reasoning})
    messages = [user("which animals?")]
    n = len(engine.encode_chat(messages, template=template, **options))
    tokens = odd(engine, "the cat in the hat")
    first = engine.chat(messages, forced(tokens, n), template=template, **options).wait()
    assert (first.text, first.tokens) == ("the cat in the hat", tokens)
    messages += [{"role": "assistant", "content": first.text}, user("more")]
    again = engine.chat(messages, GREEDY, template=template, **options).wait()
    assert_right(again, fresh)
    if template is PLAIN:
        assert again.reuse.n_reused == n + len(tokens) - 1
        assert again.request.ids[n:][: len(tokens)] == tokens
    else:  # It renders the answer otherwise, so the answer is tokenized, once.
        assert again.reuse.n_reused == marks(first, Kind.TURN)[0]


def test_odd_tokens_stay_for_all_turns(engine: Engine, fresh: Engine) -> None:
    talk = Talk(engine, fresh, PLAIN)
    said = list[int]()
    for turn in range(3):
        talk.messages.append(user(f"turn {turn}"))
        n = len(talk.answer(talk.messages).request.ids)
        tokens = odd(engine, f"the cat{turn} in the hat")
        talk.params = forced(tokens, n)
        answer = talk.answer(talk.messages)
        assert answer.request.ids[: len(said)] == said
        said = answer.request.ids + tokens
        talk.messages.append({"role": "assistant", "content": answer.text})
        talk.params = GREEDY
    assert kept_ends(engine)[-1] == len(said) - 1


@pytest.mark.parametrize("template", [PLAIN, THINKING])
def test_the_tokenizer_gets_new_text_alone(
    engine: Engine, fresh: Engine, template: ChatTemplate
) -> None:
    """At turn 20 the host tokenizes what came since the last turn, not the history."""
    talk = Talk(engine, fresh, template, ONE)
    talk.messages = [SYSTEM]
    for turn in range(19):
        talk.messages.append(user(f"{turn}: the cat and the hat"))
        said = engine.chat(talk.messages, ONE, template=template).wait().text
        talk.messages.append({"role": "assistant", "content": said})
    text = template.render([*talk.messages, user("again")])
    before = template.render(talk.messages[:-3], add_generation_prompt=False)
    with tokenized() as texts:
        answer = talk.ask("again")
    assert len(answer.request.ids) > 700
    # The last exchange, the new message, and what is around them.
    assert sum(map(len, texts)) <= len(text) - len(before) < 200


def test_others_pass_those_that_wait_for_a_prompt(tiny: Path, rng: Rng) -> None:
    """Four wait for the state of the long prompt, and there are seats for two: the last one, which
    has nothing to do with it, gets one."""
    with float64_engine(tiny, n_ctx=4096, n_parallel=3, n_ubatch=64, cache_ram=CACHE_RAM) as engine:
        long = random_ids(rng, 960)
        behind = [engine.generate([*long, i], ONE) for i in range(5)]
        other = engine.generate(random_ids(rng, 10), ONE)
        other.wait()
        assert behind[0].progress[0] < 960
        for completion in behind:
            completion.wait()


@contextmanager
def tokenized() -> Iterator[list[str]]:
    """Inside this context, the texts that a tokenizer is given."""
    texts, cut = list[str](), Tokenizer._cut

    def noting(self: Tokenizer, text: str, *rest: Any, **more: Any) -> Any:
        texts.append(text)
        return cut(self, text, *rest, **more)

    with patch.object(Tokenizer, "_cut", noting):
        yield texts


def test_a_text_goes_on_with_an_answer(engine: Engine, fresh: Engine) -> None:
    text, said = "Once upon a time there was", " the cat in the hat"
    n, tokens = len(engine.encode_prompt(text)), odd(engine, said)
    first = engine.generate(text, forced(tokens, n)).wait()
    again = engine.generate(text + said + " and the dog", GREEDY).wait()
    assert_right(again, fresh)
    assert again.request.ids[: n + len(tokens)] == first.request.ids + tokens
    assert again.reuse.n_reused == n + len(tokens) - 1


def test_a_text_that_goes_on_in_the_middle_of_an_answers_word(
    engine: Engine, fresh: Engine
) -> None:
    """There the tokens are those of the word, as from scratch."""
    text, said = "Once upon a time there was", " the cat in th"
    n = len(engine.encode_prompt(text))
    engine.generate(text, forced(odd(engine, said), n)).wait()
    text += said + "e hat"
    again = engine.generate(text, GREEDY).wait()
    assert again.request.ids == engine.encode_prompt(text)
    assert again.reuse.n_reused >= n - 64
    assert_right(again, fresh)


def test_the_tokenizer_gets_what_follows_a_known_text(engine: Engine) -> None:
    text = " the cat and the hat" * 100
    engine.generate(text, ONE).wait()
    with tokenized() as texts:
        again = engine.generate(text + " more", ONE)
    assert again.request.ids == engine.encode_prompt(text + " more")
    assert sum(map(len, texts)) < 400
    again.wait()


def test_a_text_that_goes_on_anywhere_has_the_same_ids(engine: Engine, rng: Rng) -> None:
    words = ["the", "cat", " hat", "\n\n", "12", "é", "😀", "<|im_start|>", "  ", "'s", "aaaaaaaa"]
    # An answer that goes on as the text does would give it its own tokens.
    params = replace(ONE, logit_bias={ord("Z"): 1000.0})
    for _ in range(4):
        text = "".join(rng.choice(words, 60))
        engine.cache.clear()
        for at in sorted(rng.integers(1, len(text), 20).tolist()):
            asked = engine.generate(text[:at], params).wait()
            assert asked.text == "Z"
            assert asked.request.ids == engine.encode_prompt(text[:at])


def test_a_token_that_ends_is_no_word_that_ends(engine: Engine) -> None:
    """'s is one word of two tokens; what follows the first is not tokenized from there."""
    text = "the cat'sthe hat"
    params = replace(ONE, logit_bias={ord("Z"): 1000.0})
    for at in (text.index("s"), len(text)):
        asked = engine.generate(text[:at], params).wait()
        assert asked.request.ids == engine.encode_prompt(text[:at])


@pytest.mark.parametrize("letter", ["a", " ", "="])
def test_words_longer_than_a_window_have_the_same_ids(tmp_path: Path, letter: str) -> None:
    """200 letters are one word, whose tokens have eight: 100 of them are no multiple."""
    engine = Engine.load(repeating_model(tmp_path, letter), n_ctx=512, cache_ram=CACHE_RAM)
    for n in (100, 200):
        asked = engine.generate(letter * n + "!", ONE).wait()
        assert asked.request.ids == engine.encode_prompt(letter * n + "!")
    for n in (100, 200):
        asked = engine.generate(letter * n, ONE).wait()
        assert asked.request.ids == engine.encode_prompt(letter * n)


def repeating_model(directory: Path, letter: str) -> Path:
    """A model with tokens of 2, 4 and 8 equal letters."""
    vocabulary: dict[str, Any] = made_vocabulary()
    letter = letter.replace(" ", "Ġ")
    tokens, merges = vocabulary["tokenizer.ggml.tokens"], vocabulary["tokenizer.ggml.merges"]
    pairs = [letter * n for n in (1, 2, 4)]
    types = np.append(vocabulary["tokenizer.ggml.token_type"], np.ones(3, np.int32))
    overrides = {
        "tokenizer.ggml.tokens": [*tokens, *(2 * pair for pair in pairs)],
        "tokenizer.ggml.merges": [*merges, *(f"{pair} {pair}" for pair in pairs)],
        "tokenizer.ggml.token_type": types.astype(np.int32),
    }
    return write_model(directory / "m.gguf", "tiny", "Q8_0", std=STD, overrides=overrides,
                       vocab_size=len(types))  # fmt: skip


# What begins alike.

TOOLS = [{"name": f"tool{i}", "description": f"It does {i} things, or more."} for i in range(12)]


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_first_message_is_shared(engine: Engine, fresh: Engine, tools: Any) -> None:
    """By conversations that have nothing else in common."""
    for i, text in enumerate(["the cat", "a dog", "twelve hats", "dogs"]):
        answer = engine.chat([SYSTEM, user(text)], GREEDY, template=THINKING, tools=tools).wait()
        assert_right(answer, fresh)
        (n_first,) = marks(answer, Kind.FIRST)
        shared, _, _ = THINKING.render([SYSTEM, user(text)], tools).partition(f"user\n{text}")
        assert n_first == len(engine.tokenizer.encode(shared, parse_special=True))
        assert answer.reuse.n_reused == (n_first if i else 0)


def test_tools_in_another_order(engine: Engine, fresh: Engine) -> None:
    """The second prompt restarts at the nearest state, the third within 64 tokens of where they
    part."""
    n_known = list[int]()
    for last in ([10, 11], [11, 10], [11, 9]):
        tools = [*TOOLS[:9], *(TOOLS[i] for i in last)]
        held = kept_ends(engine)
        answer = engine.chat([SYSTEM, user("a")], GREEDY, template=THINKING, tools=tools).wait()
        assert_right(answer, fresh)
        reuse = answer.reuse
        assert reuse.n_reused == max((n for n in held if n <= reuse.n_known), default=0)
        n_known.append(reuse.n_known)
    assert n_known[1] > 256
    assert 0 <= reuse.n_known - reuse.n_reused < 64
    assert reuse.n_reused >= n_known[1] - 64


def test_the_same_messages_are_cut_at_the_same_places(engine: Engine, fresh: Engine) -> None:
    """Also where the text is known to its end and the state at such a place was given up."""
    messages = [SYSTEM, user("the cat " * 20)]
    first = engine.chat(messages, GREEDY, template=THINKING)
    next(first)
    cache = engine.loop.scheduler.cache
    for node in list(cache._entries):
        if node.kept is not None and node.kept.kind is Kind.TURN:
            cache.forget(node)
    first.wait()
    again = Talk(engine, fresh, THINKING).answer(messages)
    assert again.reuse.n_known == len(again.request.ids)
    assert marks(again, Kind.TURN) == marks(first, Kind.TURN) != []


def test_a_message_is_edited_in_the_middle(engine: Engine, fresh: Engine) -> None:
    talk = Talk(engine, fresh, PLAIN)
    for turn in range(12):
        talk.messages += [user(f"{turn}: the cat and the hat, or the dog and the log")]
        talk.messages += [{"role": "assistant", "content": f"{turn} is a number, and a cat is not"}]
    whole = talk.ask("more")
    n_before = len(engine.encode_chat(talk.messages[:12], template=PLAIN))
    reuses = list[Reuse]()
    for edit in ("an edit", "another", "a third"):
        held = kept_ends(engine)
        asked = [*talk.messages[:12], user(edit), *talk.messages[13:-1]]
        answer = talk.answer(asked)
        reuses.append(answer.reuse)
        nearest = max(n for n in held if n <= answer.reuse.n_known)
        assert answer.reuse.n_reused == nearest
        assert len(processed(answer)) < len(whole.request.ids)
    assert all(n_before - 16 <= reuse.n_known <= n_before + 16 for reuse in reuses)
    assert reuses[0].n_reused >= 256
    assert all(reuse.n_known - reuse.n_reused < 64 for reuse in reuses[1:])
    assert "nearest state at" in str(reuses[0])


def test_several_answers_share_one_prefill(engine: Engine, fresh: Engine, rng: Rng) -> None:
    """The backend's own counter has the prompt once, and for each other answer at most 64 rows."""
    prompt = random_ids(rng, 300)
    params = [replace(ONE, temperature=1.0, seed=seed) for seed in range(5)]
    with steps_run() as steps:
        done = engine.generate_batch([prompt] * 5, params)
    for answer in done:
        assert_right(answer, fresh)
    last = 300 - 256
    # The second starts beside the last chunk of the first.
    expected = [0, 0, 0, last, 300] if keeps_logits(engine) else [last] * 4 + [300]
    assert sorted(len(processed(answer)) for answer in done) == expected
    n_run = sum(live.n_tokens for live in steps)
    assert n_run == sum(a.timings.n_prompt for a in done) == sum(expected)
    counts = engine.cache.counts
    assert (counts.n_prompts, counts.n_tokens) == (5, 1500)
    assert counts.n_tokens - counts.n_reused == n_run


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_retry_processes_64_tokens_at_most(
    engine: Engine, fresh: Engine, is_chat: bool, rng: Rng
) -> None:
    ids, messages = random_ids(rng, 300), [SYSTEM, user("the cat")]
    for i in range(3):
        with steps_run() as steps:
            answer = (
                engine.chat(messages, ONE, template=THINKING)
                if is_chat
                else engine.generate(ids, ONE)
            ).wait()
        assert_right(answer, fresh)
        n_run = sum(live.n_tokens for live in steps)
        assert n_run == answer.timings.n_prompt == len(processed(answer))
        assert n_run == len(answer.request.ids) if not i else n_run <= 64
        assert (n_run > 0) == (not i or not keeps_logits(engine))


def test_prompts_at_once_share_what_they_begin_with(
    engine: Engine, fresh: Engine, rng: Rng
) -> None:
    shared = random_ids(rng, 200)
    prompts = [[*shared, *random_ids(rng, 30)] for _ in range(4)]
    with steps_run() as steps:
        done = engine.generate_batch(prompts, ONE)
    for answer in done:
        assert_right(answer, fresh)
    assert sum(live.n_tokens for live in steps) == 230 + 3 * (230 - 192)


# Without the cache.


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("by_engine", [False, True])
def test_without_the_cache_no_history_changes_a_bit(
    tiny: Path, rng: Rng, backend: str, is_chat: bool, by_engine: bool
) -> None:
    """cache_prompt=False of a request, or of the engine (`--no-cache-prompt`)."""
    ids, messages = random_ids(rng, 300), [SYSTEM, user("the cat")]
    rows = list[list[Logits]]()
    options: dict[str, Any] = {"n_ctx": 1024, "cache_ram": CACHE_RAM}
    with Engine.load(tiny, backend=backend, cache_prompt=not by_engine, **options) as engine:
        for history in range(3):
            noting, off = Noting(), None if by_engine else False
            before = engine.cache.counts
            answer = (
                engine.chat(messages, noting.params, template=THINKING, cache_prompt=off)
                if is_chat
                else engine.generate(ids, noting.params, cache_prompt=off)
            ).wait()
            assert engine.cache.counts == before
            n = len(answer.request.ids)
            assert str(answer.reuse) == f"reused 0 of {n} tokens (cache_prompt is off)"
            assert answer.timings.n_prompt == n
            rows.append(noting.rows)
            # Histories: shorter, the same, and longer; they use the cache.
            prompt = answer.request.ids[: [100, n, n][history]]
            engine.generate(prompt, GREEDY, cache_prompt=True).wait()
            engine.chat(messages, GREEDY, template=THINKING, cache_prompt=True).wait()
        assert engine.cache.n_states > 0
    for other in rows[1:]:
        assert len(other) == 5
        for got, expected in zip(other, rows[0], strict=True):
            assert (got == expected).all()


# Reasons.


def test_what_real_runs_say(engine: Engine, rng: Rng) -> None:
    def said(prompt: Any, **options: Any) -> str:
        return str(engine.generate(prompt, ONE, **options).wait().reuse)

    a = random_ids(rng, 400)
    b = [*a[:300], (a[300] + 1) % N_VOCAB, *a[301:]]
    assert said(a) == "reused 0 of 400 tokens (nothing known begins like it)"
    retried = "reused 400 of 400 tokens"
    if not keeps_logits(engine):
        retried = "reused 384 of 400 tokens (all are known, nearest state at 384)"
    assert said(a) == retried
    assert said(b) == "reused 256 of 400 tokens (diverged at 300, nearest state at 256)"
    # The answer's token is in no state yet.
    assert said([*a, 1, 2]).startswith("reused 400 of 402 tokens (")
    assert said(a[:100]) == "reused 0 of 100 tokens (all are known, no state before)"
    assert said(a, cache_prompt=False) == "reused 0 of 400 tokens (cache_prompt is off)"
    checkpoint = engine.memory.checkpoint(engine.memory.create())
    assert said(a[:9], after=checkpoint) == "reused 0 of 9 tokens (it continues a checkpoint)"
    checkpoint.release()


def test_without_room_it_says_so(tiny: Path) -> None:
    with Engine.load(tiny, n_ctx=64, cache_ram=0) as engine:
        answer = engine.generate([1, 2, 3], ONE).wait()
        assert str(answer.reuse) == "reused 0 of 3 tokens (the cache is off: no cache_ram)"


@pytest.mark.parametrize(
    "source", ["{{ strftime_now('%f') }}" + CHATML, "{{ messages | length }}" + CHATML]
)
def test_a_template_that_renders_another_history_each_time(
    engine: Engine, fresh: Engine, source: str
) -> None:
    """A clock, or a counter, at its start: nothing is reused, and the reason is said."""
    talk = Talk(engine, fresh, ChatTemplate(source))
    why = "the template renders the same messages differently each time"
    for turn in range(3):
        answer = talk.ask("the cat")
        assert answer.reuse.n_reused == 0
        assert (why in str(answer.reuse)) == (turn > 0)


def test_a_template_whose_clock_is_slow(engine: Engine) -> None:
    """It does not move between the renderings of one turn."""
    template = ChatTemplate("{{ strftime_now('%H:%M') }}" + CHATML)
    render, times = template.render, iter(["10:00", "10:01"])
    talk, now = [user("the cat")], list[str]()

    def at_time(*given: Any, **options: Any) -> str:
        return now[-1] + render(*given, **options)[5:]

    with patch.object(template, "render", at_time):
        for time in times:
            now.append(time)
            answer = engine.chat(talk, GREEDY, template=template).wait()
            talk += [{"role": "assistant", "content": answer.text}, user("more")]
    assert "the template renders the same messages differently" in str(answer.reuse)


def test_a_sane_template_is_not_blamed(engine: Engine, fresh: Engine) -> None:
    for template in (PLAIN, THINKING):
        talk = Talk(engine, fresh, template)
        talk.ask("the cat")
        engine.cache.clear()
        assert talk.ask("more").reuse.reason == ""
    # It refuses to say what of a first message will stay.
    refusing = ChatTemplate("{% if messages[1:] %}{{ raise_exception('no') }}{% endif %}" + CHATML)
    for _ in range(2):
        answer = engine.chat([user("the cat")], GREEDY, template=refusing).wait()
        assert answer.reuse.reason == ""
        engine.cache.clear()


# How requests end.


@pytest.mark.parametrize("make", [float64_engine, lazy_engine])
def test_a_prompt_that_is_stopped_leaves_what_it_did(
    tiny: Path, fresh: Engine, rng: Rng, make: Any
) -> None:
    with make(tiny, n_ctx=1024, n_ubatch=64, cache_ram=CACHE_RAM) as engine:
        prompt = random_ids(rng, 400)
        asked = engine.generate(prompt, GREEDY)
        for _ in range(3):
            assert engine.advance()
        asked.cancel()
        assert asked.finish_reason == "cancelled"
        assert asked.timings.n_prompt == 192
        n_kept = max(assert_cache_right(engine, fresh))
        assert n_kept >= 192
        again = engine.generate(prompt, GREEDY).wait()
        assert_right(again, fresh)
        assert again.reuse.n_reused == n_kept
        assert_all_free(engine)


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("is_chat", [False, True])
def test_an_answer_that_ends_by_an_error_leaves_nothing(
    engine: Engine, fresh: Engine, n: int, is_chat: bool
) -> None:
    """Nothing of its own; what others left stays."""

    def failing(before: Sequence[int], logits: Logits) -> Logits:
        if len(before) >= n_prompt + n:
            raise ValueError("no")
        return logits

    messages = [SYSTEM, user("the cat")]
    other = engine.chat([SYSTEM, user("a")], GREEDY, template=PLAIN).wait()
    held = kept_ends(engine)
    n_prompt = len(engine.encode_chat(messages, template=PLAIN))
    params = replace(GREEDY, logits_processors=failing)
    text = PLAIN.render(messages)
    asked = (
        engine.chat(messages, params, template=PLAIN) if is_chat else engine.generate(text, params)
    )
    with pytest.raises(GenerationError, match="no"):
        asked.wait()
    assert len(asked.tokens) == n
    assert kept_ends(engine) == held
    again = engine.chat(messages, GREEDY, template=PLAIN).wait()
    assert again.reuse.n_reused == marks(other, Kind.FIRST)[0]
    assert_right(again, fresh)
