"""What samplers keep of the tokens: the same token by token as from all at once, at a flat cost."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.chain import Sampler
from engine.sampling.params import SamplingParams
from engine.sampling.recent import Breakers
from engine.sampling.steps import SAMPLERS, Candidates, Context
from tests.support.helpers import apply_sampler
from tests.support.timing import judge

N = 5
TOKENS = st.lists(st.integers(0, N - 1), max_size=60)
TAILS = st.lists(st.lists(st.integers(0, N - 1), max_size=3).map(tuple), max_size=2)


@settings(max_examples=300)
@given(
    first=TOKENS, rest=TOKENS, breakers=st.dictionaries(st.integers(0, N - 1), TAILS, max_size=2),
    window=st.integers(-1, 12), allowed=st.integers(0, 4), pieces=st.integers(1, 3),
)  # fmt: skip
def test_token_by_token_is_as_all_at_once(
    first: list[int], rest: list[int], breakers: Breakers, window: int, allowed: int, pieces: int
) -> None:
    """A prompt, then one token at a time, or a few."""
    options: dict[str, Any] = {
        "dry": {"dry_multiplier": 1.0, "dry_penalty_last_n": window, "dry_allowed_length": allowed},
        "penalties": {"repeat_last_n": window, "repeat_penalty": 1.3, "frequency_penalty": 0.5,
                      "presence_penalty": 0.25},
    }  # fmt: skip
    for name, params in options.items():
        kept = Context(np.random.default_rng(0), breakers, list(first))
        resolved = SamplingParams(**params).resolved({})
        for i in range(0, len(rest) + 1, pieces):
            kept.recent[len(first) :] = rest[:i]
            c = Candidates(np.arange(N), np.linspace(-1, 1, N))
            got = SAMPLERS[name].apply(c, resolved, kept)
            want = apply_sampler(name, c, recent=kept.recent, breakers=breakers, **params)
            assert np.array_equal(got.logits, want.logits), (name, i)


@pytest.mark.timing
@pytest.mark.parametrize("name", ["dry", "penalties"])
def test_a_token_costs_the_same_after_many(name: str, rng: np.random.Generator) -> None:
    """In text, where some words come often: how often a token came is what DRY's cost depends on,
    and how many different ones that of penalties, at most the vocabulary."""
    params = SamplingParams(
        dry_multiplier=float(name == "dry"),
        repeat_penalty=1.1 if name == "penalties" else 1.0,
        repeat_last_n=-1, temperature=0.8,
    ).resolved({})  # fmt: skip
    logits = rng.normal(size=32_000).astype(np.float32)
    share = 1 / np.arange(1, 32_001)
    text = rng.choice(32_000, 32_768, p=share / share.sum()).tolist()

    def seconds(n: int) -> float:
        sampler = Sampler(params, (), {})
        sampler.accept(*text[:n])
        sampler.sample(logits)
        start = time.perf_counter()
        for token in text[-200:]:
            sampler.accept(token)
            sampler.sample(logits)
        return time.perf_counter() - start

    judge(
        f"{name}: a token after 1,000 to one after 32,000",
        lambda: seconds(1000) / seconds(32_000),
        0.5,
        10,
    )
