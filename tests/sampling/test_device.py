"""Which chains of samplers a device can run, and that it samples what `sample` would."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from engine.sampling.chain import Sampler
from engine.sampling.params import SamplingParams
from engine.sampling.spec import MAX_BANNED, MAX_TOP_K, SampleSpec
from engine.sampling.steps import SAMPLERS
from tests.support.lazy_backend import sampled_token

Rng = np.random.Generator
PLAIN = {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 0.8}


def sampler(banned: Any = (), **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params).resolved({}), banned)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0},
        {"temperature": -1, "top_k": 0, "top_n_sigma": 1.0, "min_p": 1.0},
        {"temperature": 0, "logit_bias": {3: -math.inf}},
        PLAIN,
        {"temperature": 1.0},
        {"top_p": 1.0, "min_p": 0.0, "temperature": 2.0},
        {"top_k": 1},
        {"top_k": MAX_TOP_K, "top_p": 0.0},
        {"samplers": ("top_k", "min_p")},
        {"samplers": ("top_k", "temperature"), "temperature": 1.3},
        {"samplers": ("typ_p", "top_k", "xtc", "dry", "temperature")},
        {"xtc_probability": 0.5, "xtc_threshold": 0.6},
        {"logit_bias": {3: -math.inf, 5: -math.inf}},
        {"repeat_last_n": 64, "repeat_penalty": 1.0, "typical_p": 1.0},
    ],
)
def test_a_device_samples_what_sample_does(rng: Rng, params: dict[str, Any]) -> None:
    """Also some steps ahead, when specs are asked for twice, and with `sample` in between."""
    banned, seed = (1, 2), int(rng.integers(2**32))
    ours, theirs = (sampler(banned, seed=seed, **params) for _ in range(2))
    expected = []
    rows = rng.normal(0, 2, (30, 320)).astype(np.float32)
    for row in rows:
        expected.append(theirs.sample(row))
        theirs.accept(expected[-1])
    got: list[int] = []
    while len(got) < len(rows):
        if rng.random() < 0.2:
            got.append(ours.sample(rows[len(got)]))
            ours.accept(got[-1])
            continue
        n_ahead = int(rng.integers(1, 4))
        specs = [ours.sample_spec(i) for i in range(n_ahead)]
        assert specs == [ours.sample_spec(i) for i in range(n_ahead)]
        for row, spec in zip(rows[len(got) :], specs[: int(rng.integers(n_ahead + 1))]):  # noqa: B905
            assert spec is not None
            got.append(sampled_token(row, spec))
            ours.accept_sampled(got[-1])
    assert got == expected


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 0},
        {"top_k": MAX_TOP_K + 1},
        {"typical_p": 0.9},
        {"top_n_sigma": 1.0},
        {"xtc_probability": 0.1},
        {"repeat_penalty": 1.1},
        {"frequency_penalty": 0.1},
        {"presence_penalty": -0.1},
        {"temperature": 0, "repeat_penalty": 1.1},
        {"dry_multiplier": 0.5},
        {"dynatemp_range": 0.5},
        {"temperature": 0, "dynatemp_range": 0.5},
        {"mirostat": 2},
        {"logit_bias": {3: 1.0}},
        {"temperature": 0, "logit_bias": {3: 1.0}},
        {"logit_bias": dict.fromkeys(range(MAX_BANNED + 1), -math.inf)},
        {"temperature": 1e-4},
        {"temperature": 1e5},
        {"samplers": tuple(SAMPLERS)[::-1]},
        {"samplers": ("temperature",)},
        {"samplers": ("top_p", "top_k", "temperature")},
        {"samplers": ("top_k", "top_k", "temperature")},
        {"samplers": ()},
    ],
)
def test_what_only_the_host_can_sample(params: dict[str, Any]) -> None:
    assert sampler(**params).sample_spec(0) is None


def test_the_numbers_of_a_spec() -> None:
    chain = sampler((7,), seed=1, **PLAIN)
    uniforms = np.random.default_rng(1).random(3)
    specs = [chain.sample_spec(i) for i in (2, 0, 1)]
    assert specs == [SampleSpec((7,), 40, 0.9, 0.05, 0.8, uniforms[i]) for i in (2, 0, 1)]
    chain.accept_sampled(5)
    assert chain.sample_spec(0) == specs[2]
    assert sampler((7,), temperature=0).sample_spec(3) == SampleSpec((7,))
