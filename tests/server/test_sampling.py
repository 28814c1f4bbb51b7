"""Fields of requests as SamplingParams."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import pytest

from engine import SamplingParams
from engine.server.protocol import ChatRequest, read
from engine.server.sampling import params, seeds
from tests.support.scripted import ScriptedEngine

MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine()


def made(engine: ScriptedEngine, more: dict[str, Any], **defaults: Any) -> SamplingParams:
    body = json.dumps({"messages": MESSAGES, **more}).encode()
    return params(read(body, ChatRequest), engine, defaults, None)


def test_fields_of_llama_server_are_those_of_the_engine(engine: ScriptedEngine) -> None:
    given: dict[str, Any] = {
        "temperature": 0.3, "dynatemp_range": 0.1, "dynatemp_exponent": 2, "top_k": 7,
        "top_p": 0.5, "min_p": 0.1, "typical_p": 0.9, "top_n_sigma": 2, "xtc_probability": 0.2,
        "xtc_threshold": 0.3, "repeat_penalty": 1.1, "repeat_last_n": 9, "presence_penalty": 0.4,
        "frequency_penalty": 0.5, "dry_multiplier": 0.6, "dry_base": 2, "dry_allowed_length": 3,
        "dry_penalty_last_n": 10, "dry_sequence_breakers": ["x"], "mirostat": 2,
        "mirostat_tau": 4, "mirostat_eta": 0.2, "seed": 5, "ignore_eos": True, "max_tokens": 11,
        "samplers": ["top_k", "typ-p"], "stop": "s", "logit_bias": {"5": 1.5}, "n_probs": 3,
    }  # fmt: skip
    found, renamed = made(engine, given), {"n_probs": "logprobs"}
    expected = {renamed.get(name, name): value for name, value in given.items()}
    expected |= {"samplers": ("top_k", "typ_p"), "stop": ("s",), "logit_bias": {5: 1.5}}
    expected["dry_sequence_breakers"] = ("x",)
    assert {name: getattr(found, name) for name in expected} == expected
    assert {f.name for f in fields(SamplingParams)} - expected.keys() == {
        "grammar",
        "logits_processors",
        "preserved_tokens",
    }


def test_what_a_request_does_not_say(engine: ScriptedEngine) -> None:
    assert made(engine, {}) == SamplingParams(max_tokens=512)  # 2048 positions for 4 sequences.
    defaults = {"temperature": 0.2, "top_k": 3, "max_tokens": -1}
    found = made(engine, {"top_k": 9}, **defaults)
    assert found == SamplingParams(temperature=0.2, top_k=9, max_tokens=-1)
    assert made(engine, {"max_tokens": 3, "max_completion_tokens": 2}).max_tokens == 2


def test_logit_biases(engine: ScriptedEngine) -> None:
    ids = engine.tokenizer.encode(" the cat")
    assert len(ids) > 1
    for given, expected in (
        ({"5": -100, "7": False}, {5: -100, 7: -math.inf}),
        ([[5, 1], [7, False], [5, 2]], {5: 3, 7: -math.inf}),
        ([[" the cat", -1]], dict.fromkeys(ids, -1)),
        ({" the cat": 2}, dict.fromkeys(ids, 2)),
    ):
        assert made(engine, {"logit_bias": given}).logit_bias == expected


def test_seeds() -> None:
    assert seeds(5, 3) == [5, 6, 7]
    assert seeds(2**64 - 1, 2) == [2**64 - 1, 0]
    assert seeds(None, 2) == [None, None]
    assert seeds(-1, 2) == [-1, -1]
