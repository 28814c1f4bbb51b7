"""Sampling against a plain definition of every step in Python floats, step by step and together.

At a very high temperature all remaining tokens are equally likely, which shows what the truncations
kept. Evenly spread random numbers show each token's share. A chi-square test compares samples with
the probabilities; its seeds are fixed, so it cannot flake.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.sampling.chain import Sampler
from engine.sampling.params import SamplingError, SamplingParams

DEFAULTS: dict[str, Any] = {
    "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0,
    "repeat_last_n": 64,
}  # fmt: skip
OFF: dict[str, Any] = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0,
    "repeat_last_n": 64,
}  # fmt: skip
FLAT = 1e9


def sampler(recent: Sequence[int] = (), banned: Sequence[int] = (), **params: Any) -> Sampler:
    """A sampler with everything off but `params`, that has seen `recent` tokens."""
    made = Sampler(SamplingParams(**{**OFF, "seed": 1, **params}).resolved({}), banned)
    for token in recent:
        made.accept(token)
    return made


def kept(logits: Any, recent: Sequence[int] = (), **params: Any) -> list[int]:
    """The tokens that the samplers leave: so many samples hit each of them."""
    made = sampler(recent, **{**params, "temperature": FLAT})
    values = np.array(logits, np.float32)
    return sorted({made.sample(values) for _ in range(40 * len(logits))})


def log_of(*probabilities: float) -> list[float]:
    """Logits (one added to them) of these probabilities."""
    return [math.log(p) + 1 for p in probabilities]


# The definition: dicts of token -> logit, in falling order, ties by id.


def softmax(logits: dict[int, float]) -> dict[int, float]:
    weights = {i: math.exp(x - max(logits.values())) for i, x in logits.items()}
    return {i: w / sum(weights.values()) for i, w in weights.items()}


def penalized(logits: list[float], recent: Sequence[int], params: SamplingParams) -> list[float]:
    n, penalty = params.repeat_last_n, params.repeat_penalty
    assert n is not None
    assert penalty is not None
    seen = set(recent if n == -1 else recent[-n:] if n else [])
    return [
        x if i not in seen else x * penalty if x <= 0 else x / penalty for i, x in enumerate(logits)
    ]


def definition(
    logits: list[float], recent: Sequence[int], params: SamplingParams
) -> dict[int, float]:
    """Token -> probability, for temperatures above 0."""
    values = penalized(logits, recent, params)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    if params.top_k and params.top_k > 0:
        order = order[: params.top_k]
    p = softmax({i: values[i] for i in order})
    if params.top_p is not None and params.top_p < 1:
        total, nucleus = 0.0, []
        for i in order:
            nucleus.append(i)
            total += p[i]
            if total >= params.top_p:
                break
        order = nucleus
    p = softmax({i: values[i] for i in order})
    if params.min_p:
        order = [i for i in order if p[i] >= params.min_p * p[order[0]]]
    assert params.temperature is not None
    return softmax({i: values[i] / params.temperature for i in order})


def random_case(rng: np.random.Generator) -> tuple[list[float], list[int], dict[str, Any]]:
    """Logits, recent tokens, and parameters in the middle of their ranges, some of them off."""
    n = int(rng.integers(2, 14))
    logits = np.round(rng.normal(size=n) * 2, 3).astype(np.float32).tolist()
    recent = rng.integers(0, n, rng.integers(0, 8)).tolist()
    choices = {
        "top_k": int(rng.integers(1, n + 3)),
        "top_p": float(rng.uniform(0.1, 1)),
        "min_p": float(rng.uniform(0, 0.6)),
        "repeat_penalty": float(rng.uniform(0.5, 3)),
        "repeat_last_n": int(rng.integers(-1, 6)),
    }
    return logits, recent, {k: v for k, v in choices.items() if rng.random() < 0.7}


@pytest.mark.parametrize("seed", range(60))
def test_truncations_keep_what_the_definition_keeps(seed: int) -> None:
    logits, recent, params = random_case(np.random.default_rng(seed))
    resolved = SamplingParams(**{**OFF, **params})
    assert kept(logits, recent, **params) == sorted(definition(logits, recent, resolved))


def random_draws(seed: int) -> tuple[Sampler, NDArray[np.float32], dict[int, float]]:
    """A sampler at some temperature, logits, and the probabilities of their tokens."""
    rng = np.random.default_rng([seed, 1])
    logits, recent, params = random_case(rng)
    params["temperature"] = float(rng.uniform(0.3, 3))
    expected = definition(logits, recent, SamplingParams(**{**OFF, **params}))
    return sampler(recent, seed=seed, **params), np.array(logits, np.float32), expected


class Even:
    """A generator of n numbers in the middle of as many equal parts."""

    def __init__(self, n: int) -> None:
        self._numbers = iter((np.arange(n) + 0.5) / n)

    def random(self) -> float:
        return float(next(self._numbers))


@pytest.mark.parametrize("seed", range(20))
def test_every_token_gets_its_share(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Evenly spread random numbers give each token its count, to less than one."""
    n = 400
    made, logits, expected = random_draws(seed)
    monkeypatch.setattr(made._context, "rng", Even(n))
    drawn = Counter(made.sample(logits) for _ in range(n))
    assert set(drawn) <= set(expected)
    assert all(abs(drawn[i] - p * n) < 1 + 1e-3 for i, p in expected.items())


@pytest.mark.parametrize("seed", range(4))
def test_draws_follow_the_definition(seed: int) -> None:
    made, logits, expected = random_draws(seed)
    n = 3000
    check_draws(Counter(made.sample(logits) for _ in range(n)), expected, n)


def check_draws(drawn: Counter[int], expected: dict[int, float], n: int) -> None:
    """Chi-square at 1e-5, by Wilson and Hilferty's formula; rare tokens are taken together."""
    assert set(drawn) <= set(expected)
    common = [i for i, p in expected.items() if p * n >= 10]
    cells = [(drawn[i], expected[i] * n) for i in common]
    rare = n - sum(e for _, e in cells)
    if rare >= 10:
        cells.append((n - sum(d for d, _ in cells), rare))
    chi2 = sum((d - e) ** 2 / e for d, e in cells)
    free = max(len(cells) - 1, 1)
    assert chi2 <= free * (1 - 2 / (9 * free) + 4.26 * math.sqrt(2 / (9 * free))) ** 3


def test_the_chi_square_test_can_fail() -> None:
    expected = {0: 0.5, 1: 0.3, 2: 0.2}
    check_draws(Counter({0: 1480, 1: 930, 2: 590}), expected, 3000)
    for wrong in ({0: 1000, 1: 1000, 2: 1000}, {0: 1650, 1: 800, 2: 550}, {3: 3000}):
        with pytest.raises(AssertionError):
            check_draws(Counter(wrong), expected, 3000)


# The order of the steps, each by a case that the other order would answer differently.


def test_penalty_comes_before_top_k() -> None:
    assert kept([2.0, 1.5, 1.0], recent=[0], repeat_penalty=4, top_k=1) == [1]


def test_penalty_comes_before_top_p_and_min_p() -> None:
    logits = [3.0, 1.5, 1.0]
    assert kept(logits, recent=[0], repeat_penalty=6, top_p=0.4) == [1]
    assert kept(logits, recent=[0], repeat_penalty=6, min_p=0.5) == [1, 2]


def test_top_k_comes_before_top_p() -> None:
    # Of all, 0.4 is less than 0.5; of the best two it is more.
    assert kept(log_of(0.4, 0.3, 0.2, 0.1), top_k=2, top_p=0.5) == [0]


def test_top_p_comes_before_min_p() -> None:
    # After min_p, the first alone would have 0.625.
    assert kept(log_of(0.5, 0.3, 0.2), min_p=0.5, top_p=0.6) == [0, 1]


def test_temperature_comes_last() -> None:
    # `kept` draws at a temperature that would give every token the same probability.
    assert kept(log_of(0.95, 0.03, 0.02), top_p=0.9) == [0]
    assert kept(log_of(0.5, 0.3, 0.1, 0.1), min_p=0.5) == [0, 1]


# Single steps and their edges.


@pytest.mark.parametrize("k", [-5, 0, 4, 5, 10**9])
def test_top_k_of_nothing_or_more_than_there_are_is_all(k: int) -> None:
    assert kept([1, 2, 3, 0], top_k=k) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("logits", "k", "expected"),
    [
        ([1, 3, 2], 1, [1]),
        ([1, 3, 2], 2, [1, 2]),
        ([2, 2, 2, 2], 2, [0, 1]),
        ([0, 5, 2, 2, 2], 3, [1, 2, 3]),
        ([-1, -3, -1, -2], 2, [0, 2]),
    ],
)
def test_top_k_takes_the_first_of_equals(logits: list[float], k: int, expected: list[int]) -> None:
    assert kept(logits, top_k=k) == expected


def test_top_k_takes_the_first_of_many_equals() -> None:
    made, logits = sampler(temperature=FLAT, top_k=105), np.tile([0.0, 1.0], 100)
    drawn = {made.sample(logits.astype(np.float32)) for _ in range(2500)}
    assert drawn == {*range(1, 200, 2), 0, 2, 4, 6, 8}


@pytest.mark.parametrize(
    ("p", "n"), [(0, 1), (0.2, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (1, 4)]
)
def test_top_p_takes_the_first_sum_that_reaches_it(p: float, n: int) -> None:
    assert kept(log_of(0.5, 0.25, 0.2, 0.05), top_p=p) == list(range(n))
    assert kept(log_of(0.05, 0.2, 0.25, 0.5), top_p=p) == list(range(4 - n, 4))


def test_top_p_of_one_keeps_what_has_no_probability_to_speak_of() -> None:
    assert kept([100.0, 0.0, 50.0], top_p=1.0) == [0, 1, 2]
    assert kept([100.0, 0.0, 50.0], top_p=0.999999) == [0]


@pytest.mark.parametrize("p", [0, 0.09, 0.11, 0.49, 0.51, 0.99, 1])
def test_min_p_is_relative_to_the_highest(p: float) -> None:
    probabilities = (0.06, 0.6, 0.3, 0.04)
    expected = [i for i, x in enumerate(probabilities) if x >= p * 0.6 * (1 - 1e-6)]
    assert kept(log_of(*probabilities), min_p=p) == expected


@pytest.mark.parametrize(
    ("last_n", "expected"),
    [(-1, [3]), (0, [0, 1, 2, 3]), (1, [0, 1, 3]), (2, [0, 3]), (3, [3]), (64, [3])],
)
def test_the_penalty_looks_back_so_far(last_n: int, expected: list[int]) -> None:
    recent = [0, 1, 2] if last_n != 3 else [3, 0, 1, 2]
    logits = np.ones(4)
    params = {"repeat_penalty": 9.0, "repeat_last_n": last_n, "min_p": 0.9}
    assert kept(logits, recent, **params) == expected


def test_the_default_window_is_64_tokens() -> None:
    params = {"repeat_penalty": 9.0, "repeat_last_n": None, "min_p": 0.9}
    assert kept(np.ones(2), recent=[0, *[1] * 64], **params) == [0]
    assert kept(np.ones(2), recent=[0, *[1] * 63], **params) == [0, 1]


def test_the_penalty_lowers_logits_of_both_signs_once() -> None:
    for logits, n_seen, expected in (
        ([2.0, 1.1], 1, 1),
        ([2.0, 0.9], 5, 0),  # however often it was seen
        ([-1.0, -1.9], 1, 1),
        ([-1.0, -2.1], 5, 0),
        ([0.0, -0.1], 1, 0),
    ):
        made = sampler([0] * n_seen, temperature=0, repeat_penalty=2)
        assert made.sample(np.array(logits, np.float32)) == expected


@pytest.mark.parametrize("temperature", [0, 0.0, -1, -1e30])
def test_greedy_takes_the_first_highest(temperature: float) -> None:
    made = sampler(temperature=temperature, top_k=2, top_p=0.1, min_p=0.9)
    for logits, expected in (([1, 3, 2], 1), ([0, 5, 5], 1), ([-2, -1, -3], 1), ([7], 0)):
        assert {made.sample(np.array(logits, np.float32)) for _ in range(20)} == {expected}


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_what_the_chain_leaves(seed: int) -> None:
    """The greedy shortcut gives the chain's token, also with equal logits and banned tokens."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=500).round(1).astype(np.float32)
    best = np.argsort(-logits, kind="stable")
    params = {"top_k": 40, "top_p": 0.9, "min_p": 0.1, "top_n_sigma": 1.0, "temperature": 0.0}
    chosen: Any = {k: v for k, v in params.items() if k == "temperature" or rng.random() < 0.5}
    banned = best[: rng.integers(0, 3)].tolist()
    made = sampler(banned=banned, **chosen)
    assert made._is_greedy
    short = made.sample(logits)
    made._is_greedy = False
    assert short == made.sample(logits) == best[len(banned)]


@pytest.mark.parametrize(
    "params",
    [
        {"repeat_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"dry_multiplier": 1.0},
        {"xtc_probability": 0.5},
        {"typical_p": 0.5},
        {"mirostat": 2},
        {"dynatemp_range": 0.5},
        {"logit_bias": {3: 1.0}},
        {"samplers": ("top_k",)},
    ],
    ids=str,
)
def test_what_may_take_another_than_the_highest_goes_the_long_way(params: Any) -> None:
    assert not sampler(temperature=0.0, **params)._is_greedy


def test_banned_tokens_are_never_drawn() -> None:
    logits = np.array([9, 1, 8, 0, 0.5], np.float32)
    for params in ({"temperature": 0}, {"temperature": FLAT}, {"temperature": 1, "top_k": 1}, {}):
        made = sampler((), (0, 2), **params)
        drawn = {made.sample(logits) for _ in range(300)}
        assert drawn <= {1, 3, 4}
        assert len(drawn) > 1 or params
    # They don't take the place of others either.
    made = sampler((), (0, 2), temperature=FLAT, top_k=2)
    assert {made.sample(logits) for _ in range(100)} == {1, 4}
    assert logits.tolist() == [9, 1, 8, 0, 0.5]


class Highest:
    """A generator of the largest number below 1."""

    def random(self) -> float:
        return float(np.nextafter(1, 0))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
def test_the_highest_random_number_draws_no_banned_token(
    monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Highest())
    logits = np.append(np.linspace(0, 1, n), [5, 5]).astype(np.float32)
    assert sampler((), (n, n + 1)).sample(logits) < n


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    inf = math.inf
    for params in ({}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": 0.1}, {"temperature": 1e-3}):
        made = sampler(recent=[0, 1], repeat_penalty=1.5, **params)
        drawn = {made.sample(np.array([-inf, 1, -inf, 1.2], np.float32)) for _ in range(300)}
        assert drawn <= {1, 3}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_an_error(value: float, temperature: float) -> None:
    logits = np.array([1, value, 2], np.float32)
    with pytest.raises(SamplingError, match="logits"):
        sampler(temperature=temperature).sample(logits)


@pytest.mark.parametrize("temperature", [0, 1])
def test_nothing_left_to_draw_is_an_error(temperature: float) -> None:
    for logits, banned in (([-math.inf] * 3, ()), ([1, 2, 3], (0, 1, 2))):
        with pytest.raises(SamplingError, match="logits"):
            sampler((), banned, temperature=temperature).sample(np.array(logits, np.float32))


def test_one_candidate() -> None:
    for params in ({}, {"top_k": 1}, {"top_p": 0}, {"min_p": 1}, DEFAULTS):
        assert sampler([0], **params).sample(np.array([-3], np.float32)) == 0


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([3e38, 2e38, -3e38], np.float32)
    for temperature in (0.01, 1, 100):
        assert sampler(temperature=temperature).sample(logits) == 0


def test_sampling_leaves_the_logits_alone() -> None:
    logits = np.linspace(-2, 2, 20).astype(np.float32)
    before = logits.copy()
    made = sampler([1, 19], (3,), **{**DEFAULTS, "repeat_penalty": 2})
    for _ in range(5):
        made.sample(logits)
    assert (logits == before).all()


def run(seed: int | None) -> list[int]:
    made, rng = sampler(**{**DEFAULTS, "seed": seed}), np.random.default_rng(0)
    tokens = []
    for _ in range(40):
        tokens.append(made.sample(rng.normal(size=50).astype(np.float32)))
        made.accept(tokens[-1])
    return tokens


def test_seeds() -> None:
    for seed in (0, 7, 2**64 - 1):
        assert run(seed) == run(seed)
    assert len({tuple(run(seed)) for seed in (0, 1, 2**32, 2**64 - 1, None, None, -1, -1)}) == 8
