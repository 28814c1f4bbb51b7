"""The samplers together: order, logit bias, mirostat over time, and wrong parameters.

test_steps.py tests each alone. Here each order is shown by a case that another order would answer
differently.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from engine.sampling.chain import Sampler
from engine.sampling.params import SamplingError, SamplingParams
from engine.sampling.steps import SAMPLERS
from tests.sampling.test_sampler import check_draws, kept, log_of, sampler

INF = math.inf


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max())
    return weights / weights.sum()


# Order.


def test_the_order_is_llama_cpps() -> None:
    assert SamplingParams().samplers == tuple(SAMPLERS)
    assert list(SAMPLERS) == ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p",
                              "min_p", "xtc", "temperature"]  # fmt: skip


def test_samplers_run_in_the_order_given() -> None:
    # Of all, 0.4 is less than 0.5; of the best two it is more.
    logits = log_of(0.4, 0.3, 0.2, 0.1)
    params: Any = {"top_k": 2, "top_p": 0.5}
    assert kept(logits, samplers=("top_k", "top_p", "temperature"), **params) == [0]
    assert kept(logits, samplers=("top_p", "top_k", "temperature"), **params) == [0, 1]
    # The temperature of `kept` makes all equal, so top_p then needs half of them.
    assert kept(logits, samplers=("temperature", "top_p"), **params) == [0, 1]


def test_samplers_that_are_not_named_do_not_run() -> None:
    logits = log_of(0.7, 0.2, 0.1)
    params = {"top_k": 1, "min_p": 0.9, "top_p": 0.1, "repeat_penalty": 5.0}
    assert kept(logits, [0], samplers=("temperature",), **params) == [0, 1, 2]
    # Without the temperature, even greedy draws.
    made = sampler(temperature=0, samplers=())
    drawn = Counter(made.sample(np.array(logits, np.float32)) for _ in range(3000))
    check_draws(drawn, {0: 0.7, 1: 0.2, 2: 0.1}, 3000)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_can_be_named_alone(name: str) -> None:
    made = sampler(recent=[0, 1, 0], samplers=(name,), top_k=2, dry_multiplier=1.0, typical_p=0.5)
    assert made.sample(np.array([1, 2, 3], np.float32)) in (0, 1, 2)


# Each by a case that the other order would answer differently.


def test_dry_and_penalties_come_before_top_n_sigma() -> None:
    recent = [0, 1, 2, 0, 1]
    options = {"dry_multiplier": 50.0, "dry_allowed_length": 1, "top_n_sigma": 0.5}
    assert kept([0.0, 0.0, 9.0, 4.0], recent, **options) == [0, 1, 3]
    assert kept([0.0, 0.0, 9.0, 4.0], recent, **options, samplers=("top_n_sigma", "dry")) == [2]


def test_top_n_sigma_comes_before_top_k() -> None:
    # Its deviation is that of all logits, also of those that top_k would drop.
    logits = [10.0, 9.0, 0.0, 0.0]
    assert kept(logits, top_n_sigma=1.0, top_k=2) == [0, 1]
    assert kept(logits, top_n_sigma=1.0, top_k=2, samplers=("top_k", "top_n_sigma")) == [0]


def test_typical_comes_before_top_p() -> None:
    logits = log_of(0.5, 0.26, 0.24)
    typical = kept(logits, typical_p=0.2)
    assert len(typical) == 1
    assert kept(logits, typical_p=0.2, top_p=0.1) == typical


def test_xtc_comes_after_min_p() -> None:
    # After min_p two are left; of those, the likelier goes.
    logits = log_of(0.6, 0.3, 0.1)
    assert kept(logits, min_p=0.4, xtc_probability=1.0, xtc_threshold=0.1) == [1]


# Logit bias.


def test_a_bias_is_added_before_everything_else() -> None:
    logits = log_of(0.5, 0.3, 0.2)
    assert kept(logits, top_k=1, logit_bias={2: 2.0}) == [2]
    # A penalty multiplies what is below 0 after the bias.
    made = sampler([0], temperature=0, repeat_penalty=3, logit_bias={0: -5.0})
    assert made.sample(np.array([4.0, -2.0], np.float32)) == 1


def test_a_bias_changes_the_distribution() -> None:
    logits = np.array(log_of(0.5, 0.3, 0.2), np.float32)
    made, n = sampler(logit_bias={1: 1.0, 2: -0.5}, seed=3), 4000
    drawn = Counter(made.sample(logits) for _ in range(n))
    expected = softmax(logits.astype(np.float64) + np.array([0, 1, -0.5]))
    check_draws(drawn, dict(enumerate(expected.tolist())), n)


def test_a_bias_of_minus_infinity_bans() -> None:
    for params in ({"temperature": 0}, {"temperature": 1e9}, {"mirostat": 2}):
        made = sampler(logit_bias={0: -INF, 2: -INF}, **params)
        logits = np.array([9, 1, 8, 0], np.float32)
        assert {made.sample(logits) for _ in range(200)} <= {1, 3}


# Mirostat.


def test_mirostat_meets_its_target() -> None:
    """Over 4000 draws from a steep distribution, the mean surprise is tau."""
    values = -1.1 * np.log(np.arange(1, 501))
    for tau in (2.0, 4.0):
        made = sampler(mirostat=2, mirostat_tau=tau, mirostat_eta=0.1, seed=5)
        rng, surprises = np.random.default_rng(9), []
        for step in range(4000):
            # Sharper and flatter, as texts are; mu must follow.
            logits = (values * (1.0 + 0.3 * math.sin(step / 200))).astype(np.float32)
            order = rng.permutation(500)
            shuffled = logits[order]
            mu = made._mu
            token = made.sample(shuffled)
            chances = softmax(shuffled.astype(np.float64))
            left = np.where(-np.log2(chances) <= mu, chances, 0)
            if not left.any():
                left = np.where(chances == chances.max(), chances, 0)
            surprise = -math.log2(left[token] / left.sum())
            surprises.append(surprise)
            assert made._mu == pytest.approx(mu - 0.1 * (surprise - tau), abs=1e-9)
        assert np.mean(surprises[500:]) == pytest.approx(tau, abs=0.1)


def test_mirostat_starts_at_twice_its_target() -> None:
    assert sampler(mirostat=2, mirostat_tau=3.0)._mu == 6.0


def test_mirostat_takes_the_place_of_the_other_samplers() -> None:
    params = {"mirostat": 2, "mirostat_tau": 50.0, "top_k": 1, "top_p": 0.1, "min_p": 0.9}
    assert kept(log_of(0.5, 0.3, 0.2), recent=[0], repeat_penalty=9.0, **params) == [0, 1, 2]
    assert kept([3.0, 2.0, 1.0], mirostat=2, mirostat_tau=0.0) == [0]


def test_mirostat_draws_after_the_temperature() -> None:
    logits = np.array(log_of(0.6, 0.3, 0.1), np.float32)
    made = sampler(mirostat=2, mirostat_tau=40.0, temperature=2.0, seed=2)
    drawn = Counter(made.sample(logits) for _ in range(3000))
    expected = softmax(logits.astype(np.float64) / 2)
    check_draws(drawn, dict(enumerate(expected.tolist())), 3000)


# Wrong parameters.


def refused(**params: Any) -> str:
    with pytest.raises(SamplingError) as error:
        SamplingParams(**params)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("dynatemp_range", -0.1, "at least 0"),
        ("dynatemp_range", math.nan, "at least 0"),
        ("dynatemp_exponent", -1.0, "at least 0"),
        ("typical_p", 1.5, "0 to 1"),
        ("typical_p", math.nan, "0 to 1"),
        ("top_n_sigma", INF, "a number"),
        ("xtc_probability", -0.5, "0 to 1"),
        ("xtc_threshold", 2.0, "0 to 1"),
        ("presence_penalty", INF, "a number"),
        ("frequency_penalty", -INF, "a number"),
        ("dry_multiplier", -1.0, "at least 0"),
        ("dry_base", 0.5, "at least 1"),
        ("dry_allowed_length", -1, "at least 0"),
        ("dry_penalty_last_n", -2, "-1 to 2147483647"),
        ("mirostat", 3, "0 to 2"),
        ("mirostat_tau", -1.0, "at least 0"),
        ("mirostat_eta", math.nan, "at least 0"),
    ],
)
def test_out_of_range(name: str, value: float, expected: str) -> None:
    assert refused(**{name: value}) == f"{name}: expected {expected}, got {value}"


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("temperature", "hot", "a number"),
        ("top_k", 1.5, "an integer"),
        ("max_tokens", 2.0, "an integer"),
        ("seed", "1", "an integer"),
        ("dry_multiplier", True, "a number"),
        ("mirostat", 2.0, "an integer"),
        ("top_p", [0.5], "a number"),
        # These have no default in the file's metadata, so None means nothing.
        ("max_tokens", None, "an integer"),
        ("typical_p", None, "a number"),
        ("dry_base", None, "a number"),
        ("dry_penalty_last_n", None, "an integer"),
        ("presence_penalty", None, "a number"),
    ],
)
def test_not_a_number_of_that_kind(name: str, value: Any, kind: str) -> None:
    assert refused(**{name: value}) == f"{name}: expected {kind}, got {value!r}"


def test_mirostat_1_is_not_there() -> None:
    assert refused(mirostat=1) == "mirostat: expected 0 or 2, got 1"


def test_unknown_samplers() -> None:
    expected = f"samplers: expected one of {', '.join(SAMPLERS)}, got "
    assert refused(samplers=("top_k", "typical")) == expected + "typical"
    assert refused(samplers=("",)) == expected


@pytest.mark.parametrize("name", ["stop", "dry_sequence_breakers"])
def test_empty_texts(name: str) -> None:
    assert refused(**{name: ("a", "")}) == f"{name}: expected texts that are not empty"


def test_ignore_eos_is_yes_or_no() -> None:
    assert refused(ignore_eos="no") == "ignore_eos: expected true or false, got 'no'"


@pytest.mark.parametrize("bias", [math.nan, INF])
def test_a_bias_that_is_no_number(bias: float) -> None:
    expected = f"logit_bias: expected numbers or -inf, got {bias}"
    assert refused(logit_bias={3: 1.0, 4: bias}) == expected


def test_every_field_is_checked_or_has_no_range() -> None:
    """A field added later without a range shows up here."""
    for name, value in vars(SamplingParams().resolved({})).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert refused(**{name: "x"}).startswith(f"{name}: expected "), name


def test_a_sampler_made_of_unresolved_parameters_is_our_mistake() -> None:
    with pytest.raises(TypeError):
        Sampler(SamplingParams())


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-310},
        {"repeat_penalty": 1e-320},
        {"temperature": 1e-3, "logit_bias": {0: 1.7e308}},
        {"repeat_penalty": 1e-320, "min_p": 0.5, "typical_p": 0.5},
        {"presence_penalty": 1e308, "frequency_penalty": 1e308, "logit_bias": {1: -1e308}},
    ],
)
def test_parameters_that_leave_the_range_of_numbers(params: dict[str, Any]) -> None:
    """A SamplingError in one line, or a token; another exception would end every request."""
    made = sampler([0, 0, 1, 2], **params)
    logits, message = np.array([3, 2, 1], np.float32), ""
    try:
        token = made.sample(logits)
    except SamplingError as error:
        token, message = 0, str(error)
    assert token in (0, 1, 2)
    assert message == "" or message.startswith("parameters too extreme for the logits: ")
