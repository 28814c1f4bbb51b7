"""Completions that follow a grammar: with samplers and limits, beside others, and resumed."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine import Completion, Engine, GenerationError, Grammar, GrammarError, SamplingParams
from engine.sampling.grammar import Matcher
from tests.support.hash_model import HashStep, hash_engine
from tests.support.helpers import assert_all_free

pytest.importorskip("llguidance")
DIGITS = Grammar.regex("[0-9]{3}-[a-z]{2}")
PATTERN = re.compile("[0-9]{3}-[a-z]{2}")
ANY: Any = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 40}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(n_parallel=4, n_ctx=512) as engine:
        yield engine


def text_of(engine: Engine, **options: Any) -> Completion:
    return engine.generate("Hello", SamplingParams(**{"grammar": DIGITS, **options})).wait()


@pytest.mark.parametrize("options", [
    {"temperature": 0}, ANY, {"mirostat": 2, "temperature": 2.0}, {**ANY, "top_k": 3},
    {**ANY, "xtc_probability": 1.0, "xtc_threshold": 0.0}, {**ANY, "typical_p": 0.5},
    {**ANY, "repeat_penalty": 1.5, "repeat_last_n": -1}, {**ANY, "dry_multiplier": 1.0},
    {**ANY, "top_n_sigma": 1.0}, {**ANY, "samplers": ("top_p", "penalties", "temperature")},
    {**ANY, "dynatemp_range": 1.0}, {**ANY, "logprobs": 5}, {"temperature": 0, "ignore_eos": True},
], ids=lambda o: "-".join(o))  # fmt: skip
def test_all_samplers_stay_within(engine: Engine, options: dict[str, Any]) -> None:
    for seed in range(3):
        done = text_of(engine, **options, seed=seed)
        assert PATTERN.fullmatch(done.text), done.text
        assert (done.finish_reason, done.detail) == ("stop", "its grammar is complete")


def test_bias_chooses_among_what_is_allowed(engine: Engine) -> None:
    seven, letter = engine.tokenizer.encode("7")[0], engine.tokenizer.encode("q")[0]
    several = {i: -math.inf for i in range(4096) if len(engine.tokenizer.token_bytes(i)) > 1}
    done = text_of(engine, logit_bias={**several, seven: 50.0, letter: 50.0})
    assert done.text == "777-qq"


def test_a_ban_on_what_the_grammar_needs_is_an_error_that_names_it(engine: Engine) -> None:
    ban = {i: -math.inf for i in range(4096) if b"-" in engine.tokenizer.token_bytes(i)}
    with pytest.raises(GenerationError) as raised:
        text_of(engine, logit_bias=ban)
    assert str(raised.value).startswith("grammar: expected one that the other parameters allow")
    assert "'-'" in str(raised.value)


def test_processors_come_first(engine: Engine) -> None:
    """Their logits are limited, too; what they see is the model's."""
    seen = []

    def only_a(tokens: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(np.isfinite(logits).all())
        return np.where(np.arange(len(logits)) == 64, 9.0, logits)

    assert PATTERN.fullmatch(text_of(engine, logits_processors=only_a).text)
    assert all(seen)


def test_it_ends_only_where_the_grammar_may(engine: Engine) -> None:
    end = min(engine.tokenizer.eog_ids)
    pushed = {"logit_bias": {end: 1000.0}, "temperature": 0}
    done = text_of(engine, **pushed, grammar=Grammar.regex("ab*c?b*"))
    # One token, which may have more than one letter.
    assert (len(done.tokens), done.finish_reason) == (1, "stop")
    done = text_of(engine, **pushed, grammar=Grammar.regex("(?s:.)*"))
    assert (done.text, done.finish_reason) == ("", "stop")
    done = text_of(engine, max_tokens=3)
    assert done.finish_reason in ("length", "stop")
    assert (done.finish_reason == "stop") == bool(PATTERN.fullmatch(done.text))
    # Complete with the last token that it may have.
    whole = text_of(engine, temperature=0)
    same = text_of(engine, temperature=0, max_tokens=len(whole.tokens))
    assert (same.text, same.finish_reason) == (whole.text, "stop")


def test_stop_texts_still_end_it(engine: Engine) -> None:
    done = text_of(engine, stop="-")
    assert re.fullmatch("[0-9]{3}", done.text)
    assert done.detail == "stop text"
    # What was held back as the beginning of one is not lost.
    done = text_of(engine, stop="zz!", grammar=Grammar.gbnf('root ::= "xzz"'))
    assert done.text == "xzz"


def test_logprobs_are_the_model_s(engine: Engine) -> None:
    done = text_of(engine, temperature=0, logprobs=1)
    logits = engine.logits(engine.encode_prompt("Hello"))[-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert done.logprobs[0].logprob == pytest.approx(expected[done.tokens[0]], abs=1e-4)
    assert done.logprobs[0].top[0][0] == logits.argmax()


def test_same_seed_same_text(engine: Engine) -> None:
    texts = [text_of(engine, **ANY, seed=s).text for s in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_others_are_not_changed(engine: Engine) -> None:
    """Nor is it, by others; in a batch, and where the prompt is reused."""
    prompt = "Question: What is 27 plus 48?\nAnswer:"
    plain, held = SamplingParams(**ANY, seed=5), SamplingParams(**ANY, seed=6, grammar=DIGITS)
    alone = [engine.generate(prompt, p, cache_prompt=False).wait().tokens for p in (plain, held)]
    order = [plain, held, plain, held]
    beside = engine.generate_batch([prompt] * 4, order, cache_prompt=False)
    assert [c.tokens for c in beside] == alone * 2
    engine.generate(prompt, plain).wait()
    again = engine.generate_batch([prompt] * 4, order)
    assert [c.tokens for c in again] == alone * 2
    assert all(c.reuse.n_reused for c in again)


def test_a_grammar_holds_after_the_thinking(engine: Engine) -> None:
    """The prompt's end says whether the model thinks."""
    close = [*engine.tokenizer.encode("Hm.\n</think>\n\n", parse_special=True)]
    say = iter(close)

    def says(tokens: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        logits[next(say, 0)] += 1000
        return logits

    params = SamplingParams(grammar=DIGITS, logits_processors=says, temperature=0, max_tokens=60)
    done = engine.generate("<|im_start|>assistant\n<think>\n", params).wait()
    thought, _, said = done.text.partition("</think>\n\n")
    assert thought == "Hm.\n"
    assert PATTERN.fullmatch(said)
    assert done.request.params.grammar == replace(DIGITS, after="</think>")
    done = engine.generate("<think>\n\n</think>\n\n", replace(params, logits_processors=())).wait()
    assert PATTERN.fullmatch(done.text)


def test_bad_grammars_are_refused_at_the_call(engine: Engine) -> None:
    params = SamplingParams(grammar=Grammar.gbnf("root ::= x"))
    with pytest.raises(GrammarError, match="expected a rule x somewhere"):
        engine.generate("a", params)
    with pytest.raises(GrammarError, match="expected a rule x somewhere"):
        engine.chat([{"role": "user", "content": "a"}], params)
    (done,) = engine.generate_batch(["a"], params)
    assert done.finish_reason == "error"


@pytest.mark.parametrize("n_before", [1, 3, 5])
def test_a_session_goes_on(tmp_path: Path, n_before: int) -> None:
    item = {"type": "integer", "minimum": 0, "maximum": 999}
    grammar = Grammar.json({"type": "array", "items": item, "minItems": 6, "maxItems": 6})
    params = SamplingParams(**{**ANY, "max_tokens": 400}, seed=3, grammar=grammar)
    with Engine.load() as engine:
        expected = engine.generate("Hello", params).wait()
        json.loads(expected.text)
        begun = engine.generate("Hello", params)
        for _ in range(n_before):
            next(begun)
        engine.save(begun, tmp_path / "a")
        begun.close()
        engine.save(expected, tmp_path / "whole")
    with Engine.load() as engine:
        session = engine.restore(tmp_path / "a")
        assert session.params.grammar == grammar
        rest = engine.resume(session).wait()
        assert session.tokens[session.n_prompt :] + rest.tokens == expected.tokens
        other = replace(session.params, grammar=DIGITS)
        with pytest.raises(GrammarError, match="expected a token that it allows, got"):
            engine.resume(session, other)
        over = engine.resume(engine.restore(tmp_path / "whole")).wait()
        assert (over.text, over.finish_reason) == ("", "stop")


class Ready(Matcher):
    """A matcher that is asked only when its mask is there: which are late depends on who else
    runs."""

    @property
    def is_ready(self) -> bool:
        self.wait(60)
        return super().is_ready


@pytest.mark.parametrize("options", [
    {"temperature": 0}, {"temperature": 0, "logit_bias": {40: -math.inf, 50: -math.inf}},
    {"temperature": 1.5, "top_k": 60, "seed": 3}, {"temperature": 2.0, "top_p": 0.7, "seed": 4},
])  # fmt: skip
def test_a_device_samples_with_masks_what_the_host_does(
    tiny: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are launched ahead: tokens that a grammar allows come from the device."""
    masks, sample = list[bool](), HashStep.sample
    monkeypatch.setattr("engine.sampling.grammar.Matcher", Ready)

    def noted(step: HashStep, given: Sequence[Any]) -> None:
        masks.extend(m is not None for m in given)
        sample(step, given)

    monkeypatch.setattr(HashStep, "sample", noted)
    free = SamplingParams(**options, max_tokens=25, ignore_eos=True)
    long = Grammar.regex("([0-9]{2}[a-z]{1,3}-){4,6}")
    each = [free, replace(free, grammar=long), free, replace(free, grammar=DIGITS)]
    found = []
    for overlaps in (False, True):
        with hash_engine(tiny, overlaps, n_parallel=3, n_ctx=512) as engine:
            done = engine.generate_batch([[1, 2, 3], [4, 5], [6], [7, 8]], each)
            found.append([(c.tokens, c.text, c.finish_reason, c.detail) for c in done])
            assert_all_free(engine)
    assert found[0] == found[1]
    assert PATTERN.fullmatch(found[0][3][1])
    assert sum(masks) >= sum(len(found[1][i][0]) for i in (1, 3)) > 20


def test_a_device_names_what_a_ban_leaves_out(tiny: Path) -> None:
    with hash_engine(tiny, True, n_ctx=512) as engine:
        ban = {i: -math.inf for i in range(engine.tokenizer.n_vocab)
               if engine.tokenizer.token_bytes(i) == b"-"}  # fmt: skip
        params = SamplingParams(temperature=0, grammar=DIGITS, logit_bias=ban)
        with pytest.raises(GenerationError, match="got one that needs '-' here, which logit_bias"):
            engine.generate([1, 2], params).wait()


class Late(Matcher):
    """A matcher whose masks come only when `go` is set."""

    go = threading.Event()

    @property
    def is_ready(self) -> bool:
        return self.go.is_set() and super().is_ready

    def wait(self, seconds: float) -> None:
        if not self.go.wait(seconds):
            return
        super().wait(seconds)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> type[Late]:
    Late.go = threading.Event()
    monkeypatch.setattr("engine.sampling.grammar.Matcher", Late)
    return Late


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("is_driven", [False, True])
def test_a_mask_that_is_not_ready_delays_its_own_row(
    tiny: Path, late: type[Late], overlaps: bool, is_driven: bool
) -> None:
    held = SamplingParams(temperature=0, max_tokens=8, grammar=DIGITS)
    free = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with hash_engine(tiny, overlaps, n_parallel=3, n_ctx=512) as engine:
        late.go.set()
        expected = [engine.generate([1, 2, 3], p).wait().tokens for p in (held, free)]
        late.go.clear()
        if is_driven:
            engine.start()
        waits = engine.generate([1, 2, 3], held)
        others = [engine.generate([1, 2, 3], free) for _ in range(3)]
        assert [c.wait().tokens for c in others] == [expected[1]] * 3
        assert (waits.tokens, waits.finish_reason) == ([], None)
        gone = engine.generate([4, 5], held)
        if is_driven:
            time.sleep(0.02)
        else:
            for _ in range(5):
                assert engine.advance()
        gone.cancel()
        assert gone.finish_reason == "cancelled"
        late.go.set()
        assert waits.wait().tokens == expected[0]
        assert_all_free(engine)


def test_a_mask_that_fails_ends_its_own_completion(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise GrammarError("it takes too much")

    free = engine.generate("Hello", SamplingParams(temperature=0, max_tokens=5))
    done = engine.generate("Hello", SamplingParams(grammar=Grammar.regex("[ab]+x")))
    monkeypatch.setattr("engine.sampling.grammar._mask", broken)
    with pytest.raises(GenerationError, match="grammar: it takes too much"):
        done.wait()
    free.wait()


NAMES = st.sampled_from(["answer", "why", "list"])
VALUES = st.sampled_from([
    {"type": "integer", "minimum": 0, "maximum": 10**6}, {"type": "boolean"}, {"enum": ["a", 1]},
    {"type": "string", "maxLength": 12},
    {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "maxItems": 4},
])  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(
    st.dictionaries(NAMES, VALUES, min_size=1),
    st.sampled_from([0, 0.1, 0.8, 2.0]),
    st.integers(0, 99),
)
def test_the_demo_model_s_json_validates(
    engine: Engine, properties: dict[str, Any], temperature: float, seed: int
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = {"type": "object", "properties": properties, "required": list(properties),
              "additionalProperties": False}  # fmt: skip
    params = SamplingParams(
        grammar=Grammar.json(schema), temperature=temperature, seed=seed, max_tokens=150
    )
    done = engine.generate("Question: What is 27 plus 48?\nAnswer:", params).wait()
    if done.finish_reason == "stop":
        jsonschema.validate(json.loads(done.text), schema)
    else:
        assert done.finish_reason == "length"
        assert len(done.tokens) == 150
