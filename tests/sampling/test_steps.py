"""The samplers one by one, each against a plain definition, and their edge cases.

The definitions follow llama.cpp's semantics in float64 Python, over dicts of token -> logit. Random
logits, often with ties, with -inf and with one far above the rest; every seed is fixed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from engine.sampling import steps as samplers
from engine.sampling.steps import Candidates
from tests.sampling.test_sampler import check_draws
from tests.support.helpers import apply_sampler as step

Rng = np.random.Generator
Logits = dict[int, float]
INF = math.inf
SEEDS = pytest.mark.parametrize("seed", range(60))


def random_logits(rng: Rng) -> Logits:
    """In shuffled order; with ties, -inf and large gaps now and then."""
    n = int(rng.choice([1, 2, 3, 8, 30]))
    values = rng.normal(size=n) * float(rng.choice([0.1, 2, 30]))
    kind = rng.integers(4)
    if kind == 0:
        values = np.round(values)
    elif kind == 1:
        values[rng.random(n) < 0.3] = -INF
    elif kind == 2:
        values[rng.integers(n)] += 1000
    if not np.isfinite(values).any():
        values[0] = 0.0
    ids = rng.permutation(100)[:n]
    return dict(zip(ids.tolist(), values.tolist(), strict=True))


def candidates(logits: Logits) -> Candidates:
    return Candidates(np.array(list(logits)), np.array(list(logits.values()), np.float64))


def result(c: Candidates) -> Logits:
    assert len(c.ids) == len(c.logits) == len(set(c.ids.tolist())) > 0
    return dict(zip(c.ids.tolist(), c.logits.tolist(), strict=True))


def assert_equal(got: Candidates, expected: Logits, rel: float = 1e-12) -> None:
    found = result(got)
    assert set(found) == set(expected)
    for token, logit in expected.items():
        assert found[token] == pytest.approx(logit, rel=rel, abs=1e-12)


def softmax(logits: Logits) -> Logits:
    top = max(logits.values())
    weights = {t: math.exp(x - top) for t, x in logits.items()}
    total = math.fsum(weights.values())
    return {t: w / total for t, w in weights.items()}


def falling(logits: Logits) -> list[int]:
    """By logit; equal ones as they came."""
    return sorted(logits, key=lambda t: -logits[t])


def only(logits: Logits, tokens: Sequence[int]) -> Logits:
    return {t: logits[t] for t in tokens}


def close(a: float, b: float) -> bool:
    """So near to each other that rounding decides a comparison of the two."""
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


# Definitions.


def top_p(logits: Logits, p: float) -> Logits:
    chances, total, kept = softmax(logits), 0.0, []
    for t in falling(logits):
        kept.append(t)
        total += chances[t]
        assert not close(total, p)
        if total >= p:
            break
    return only(logits, kept)


def typical(logits: Logits, p: float) -> Logits:
    chances = {t: x for t, x in softmax(logits).items() if x > 0}
    entropy = -math.fsum(x * math.log(x) for x in chances.values())
    distance = {t: abs(-math.log(x) - entropy) for t, x in chances.items()}
    total, kept = 0.0, []
    for t in sorted(distance, key=lambda t: distance[t]):
        kept.append(t)
        total += chances[t]
        if total > p:
            break
    return only(logits, kept)


def dynamic(logits: Logits, t: float, spread: float, exponent: float) -> float:
    """The temperature that the entropy gives."""
    entropy = -math.fsum(x * math.log(x) for x in softmax(logits).values() if x > 0)
    share = entropy / math.log(len(logits)) if len(logits) > 1 else 0.0
    low = max(0.0, t - spread)
    return low + (t + spread - low) * max(share, 0.0) ** exponent


def penalized(
    logits: Logits, recent: Sequence[int], repeat: float, freq: float, presence: float
) -> Logits:
    changed = dict(logits)
    for t, n in Counter(recent).items():
        if t in changed:
            x = changed[t]
            x = x * repeat if x <= 0 else x / repeat
            changed[t] = x - n * freq - presence
    return changed


# Each step.


@SEEDS
def test_penalties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng)
    recent = rng.choice([*logits, 200], rng.integers(0, 12)).tolist()
    values = [float(rng.choice([1, 1.3, 0.5])), float(rng.choice([0, 0.7, -0.2])),
              float(rng.choice([0, 1.1, -0.4]))]  # fmt: skip
    got = step(
        "penalties", candidates(logits), recent=recent, repeat_last_n=-1, repeat_penalty=values[0],
        frequency_penalty=values[1], presence_penalty=values[2],
    )  # fmt: skip
    assert_equal(got, penalized(logits, recent, *values))


@SEEDS
def test_top_k(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng)
    for k in (-1, 0, 1, 2, len(logits) - 1, len(logits), 50):
        order = falling(logits)
        got = step("top_k", candidates(logits), top_k=k)
        assert_equal(got, only(logits, order[:k] if k > 0 else order))
        if k > 0:
            assert got.ids.tolist() == order[:k]


@SEEDS
def test_top_k_of_many(seed: int) -> None:
    """Few of a large vocabulary, with many equal logits among the highest."""
    rng = np.random.default_rng(seed)
    for n, k in ((5000, 1), (5000, 40), (12_347, 40), (12_347, 191)):
        logits = rng.normal(size=n).round(1 if seed % 2 else 9)
        want = np.argsort(-logits, kind="stable")[:k]
        got = step("top_k", samplers.Candidates(np.arange(n), logits), top_k=k)
        assert got.ids.tolist() == want.tolist()
        assert np.array_equal(got.logits, logits[want])


@SEEDS
def test_top_p(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng)
    for p in rng.uniform(0.01, 0.99, 4):
        assert_equal(step("top_p", candidates(logits), top_p=float(p)), top_p(logits, float(p)))
    assert_equal(step("top_p", candidates(logits), top_p=0), only(logits, falling(logits)[:1]))
    assert_equal(step("top_p", candidates(logits), top_p=1), logits)


@SEEDS
def test_min_p(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng)
    for p in rng.uniform(0.01, 0.99, 4):
        chances = softmax(logits)
        floor = float(p) * max(chances.values())
        kept = [t for t, x in chances.items() if x >= floor]
        assert_equal(step("min_p", candidates(logits), min_p=float(p)), only(logits, kept))
    best = [t for t, x in logits.items() if x == max(logits.values())]
    assert_equal(step("min_p", candidates(logits), min_p=1), only(logits, best))
    assert_equal(step("min_p", candidates(logits), min_p=0), logits)


@SEEDS
def test_top_n_sigma(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng)
    finite = [x for x in logits.values() if x != -INF]
    mean = math.fsum(finite) / len(finite)
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in finite) / len(finite))
    for n in (0.0, -1.0, *rng.uniform(0.1, 3, 3).tolist()):
        floor = max(finite) - n * sigma
        assert not any(close(x, floor) for x in finite if sigma and n > 0)
        expected = {t: x if n <= 0 or x >= floor else -INF for t, x in logits.items()}
        assert_equal(step("top_n_sigma", candidates(logits), top_n_sigma=n), expected)


@SEEDS
def test_typical(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng)
    if len(set(logits.values())) < len(logits):
        # Of equally typical ones any may be kept; their number is the same.
        for p in (0.2, 0.7):
            got = step("typ_p", candidates(logits), typical_p=p)
            assert len(got.ids) == len(typical(logits, p))
        return
    for p in rng.uniform(0.01, 0.99, 4):
        got = step("typ_p", candidates(logits), typical_p=float(p))
        assert_equal(got, typical(logits, float(p)))
    assert_equal(step("typ_p", candidates(logits), typical_p=1), logits)


@SEEDS
def test_temperature(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng)
    for t in (0.3, 1.0, 4.0):
        got = step("temperature", candidates(logits), temperature=t)
        assert_equal(got, {token: x / t for token, x in logits.items()})
    best = max(logits, key=lambda t: logits[t])
    for t in (0.0, -1.0):
        got = step("temperature", candidates(logits), temperature=t)
        assert result(got) == {best: logits[best]}


@SEEDS
def test_dynamic_temperature(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng)
    for t, spread, exponent in ((1.0, 0.5, 1.0), (0.8, 0.3, 2.0), (0.5, 2.0, 0.5), (1.0, 0.4, 0.0)):
        got = step(
            "temperature", candidates(logits), temperature=t, dynatemp_range=spread,
            dynatemp_exponent=exponent,
        )  # fmt: skip
        chosen = dynamic(logits, t, spread, exponent)
        if chosen < 1e-9:
            assert len(got.ids) == 1 or softmax(result(got)) == pytest.approx(softmax(logits))
            continue
        # An entropy near 0 is a difference of rounded numbers.
        assert_equal(got, {token: x / chosen for token, x in logits.items()}, 1e-6)


class Fixed:
    """A generator of one number, which counts its calls."""

    def __init__(self, number: float) -> None:
        self.number, self.n_asked = number, 0

    def random(self) -> float:
        self.n_asked += 1
        return self.number


@SEEDS
def test_xtc(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng)
    for threshold in (0.0, 0.05, 0.2, 0.5):
        chances, order = softmax(logits), falling(logits)
        above = [t for t in order if chances[t] >= threshold]
        expected = only(logits, order[max(len(above) - 1, 0) :])
        xtc = partial(step, "xtc", candidates(logits), xtc_threshold=threshold)
        assert_equal(xtc(xtc_probability=0.5, rng=Fixed(0.4)), expected)
        for probability, number in ((0.5, 0.6), (0.0, 0.0)):
            assert_equal(xtc(xtc_probability=probability, rng=Fixed(number)), logits)
    off = Fixed(0.0)
    got = step("xtc", candidates(logits), xtc_probability=1.0, xtc_threshold=0.51, rng=off)
    assert_equal(got, logits)
    assert off.n_asked == 0


def test_xtc_leaves_out_with_its_probability() -> None:
    logits = {0: 1.0, 1: 0.9, 2: 0.0}
    params: dict[str, Any] = {
        "xtc_probability": 0.3,
        "xtc_threshold": 0.2,
        "rng": np.random.default_rng(0),
    }
    n = sum(len(step("xtc", candidates(logits), **params).ids) == 2 for _ in range(4000))
    assert 1100 < n < 1300


@SEEDS
def test_mirostat_keeps_what_surprises_little(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng)
    chances, order = softmax(logits), falling(logits)
    for mu in rng.uniform(0, 12, 4).tolist():
        kept = [t for t in order if chances[t] > 0 and -math.log2(chances[t]) <= mu]
        assert_equal(samplers.mirostat(candidates(logits), mu), only(logits, kept or order[:1]))
    assert_equal(samplers.mirostat(candidates(logits), -5.0), only(logits, order[:1]))


@SEEDS
def test_draw(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng)
    c, n = candidates(logits), 2000
    drawn = Counter(int(c.ids[samplers.sample(c, rng.random())]) for _ in range(n))
    check_draws(drawn, {t: p for t, p in softmax(logits).items() if p > 0}, n)


@pytest.mark.parametrize("number", [0.0, 0.5, float(np.nextafter(1, 0))])
def test_draw_never_takes_what_has_no_chance(number: float) -> None:
    for values in ([-INF, 1.0, -INF], [-INF, 0.0, -2000.0, -INF], [0.0, -INF], [-INF, 5.0]):
        rng: Any = Fixed(number)
        index = samplers.sample(Candidates(np.arange(len(values)), np.array(values)), rng.random())
        assert values[index] >= 0


# Steps that change nothing when they are off, and steps on a single candidate.

OFF: dict[str, dict[str, Any]] = {
    "penalties": {"recent": [1, 2], "repeat_penalty": 1},
    "dry": {"recent": [1, 2, 1, 2], "dry_multiplier": 0, "dry_allowed_length": 1},
    "top_n_sigma": {"top_n_sigma": 0},
    "top_k": {"top_k": 0},
    "typ_p": {"typical_p": 1},
    "top_p": {"top_p": 1},
    "min_p": {"min_p": 0},
    "temperature": {"temperature": 1},
}


@pytest.mark.parametrize("name", [*OFF, "penalties of nothing"])
def test_off_is_off(name: str) -> None:
    logits = {5: 1.0, 1: -INF, 2: 3.0, 9: 3.0}
    nothing = {"repeat_penalty": 2, "frequency_penalty": 1, "presence_penalty": 1}
    got = step(name.split()[0], candidates(logits), **OFF.get(name, nothing))
    assert got.logits.tolist() == list(logits.values())


SINGLE: dict[str, dict[str, Any]] = {
    "top_n_sigma": {"top_n_sigma": 0.1},
    "top_k": {"top_k": 1},
    "typ_p": {"typical_p": 0},
    "top_p": {"top_p": 0},
    "min_p": {"min_p": 1},
    "xtc": {"xtc_probability": 1, "xtc_threshold": 0, "rng": np.random.default_rng(0)},
    "temperature": {"temperature": 0.5, "dynatemp_range": 0.5},
    "dry": {"recent": [7] * 4, "dry_multiplier": 1, "dry_base": 2, "dry_allowed_length": 1},
}


def test_a_single_candidate_always_stays() -> None:
    one = {7: -3.0}
    for name, params in SINGLE.items():
        assert step(name, candidates(one), **params).ids.tolist() == [7]
    assert samplers.mirostat(candidates(one), -1).ids.tolist() == [7]


def test_steps_leave_their_operands_alone() -> None:
    rng = np.random.default_rng(1)
    logits = {t: float(x) for t, x in enumerate(rng.normal(size=20))}
    c = candidates(logits)
    penalties: dict[str, Any] = {"repeat_penalty": 2, "frequency_penalty": 1, "presence_penalty": 1}
    step("penalties", c, recent=[1, 2, 3], **penalties)
    step("dry", c, recent=[1, 2, 3, 1, 2], dry_multiplier=1, dry_base=2, dry_allowed_length=1)
    step("top_n_sigma", c, top_n_sigma=0.5)
    step("temperature", c, temperature=0.5, dynatemp_range=0.2)
    samplers.mirostat(step("top_k", c, top_k=5), 2)
    assert result(c) == logits
