"""Parameters of the sampler: llama.cpp's defaults, those of the model's file, and their ranges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from engine.sampling.chain import Sampler
from engine.sampling.params import SamplingError, SamplingParams

DEFAULTS: dict[str, Any] = {
    "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0,
    "repeat_last_n": 64,
}  # fmt: skip


def test_defaults_are_llama_cpps() -> None:
    resolved = vars(SamplingParams().resolved({}))
    assert {name: resolved[name] for name in DEFAULTS} == DEFAULTS
    assert (resolved["max_tokens"], resolved["ignore_eos"]) == (-1, False)


METADATA = {
    "temperature": ("temp", 0.25),
    "top_k": ("top_k", 3),
    "top_p": ("top_p", 0.5),
    "min_p": ("min_p", 0.25),
    "repeat_penalty": ("penalty_repeat", 1.5),
    "repeat_last_n": ("penalty_last_n", 7),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_replaces_a_default_but_not_what_was_asked_for(name: str) -> None:
    key, value = METADATA[name]
    metadata = {f"general.sampling.{key}": value, "general.sampling.xtc_threshold": 0.5}
    resolved = vars(SamplingParams().resolved(metadata))
    assert {k: resolved[k] for k in DEFAULTS} == {**DEFAULTS, name: value}
    given = SamplingParams(**{name: DEFAULTS[name]}).resolved(metadata)
    assert getattr(given, name) == DEFAULTS[name]


def one_line(error: BaseException) -> str:
    assert str(error).isprintable()
    return str(error)


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize(
    "value", ["hot\n", True, math.nan, math.inf, -math.inf, [1], np.arange(3), {}]
)
def test_metadata_that_is_no_number(name: str, value: Any) -> None:
    key = f"general.sampling.{METADATA[name][0]}"
    with pytest.raises(SamplingError) as error:
        SamplingParams().resolved({key: value})
    assert one_line(error.value).startswith(f"{key}: expected a number, got ")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("top_p", 7.0, "top_p: expected 0 to 1, got 7.0"),
        ("min_p", -0.5, "min_p: expected 0 to 1, got -0.5"),
        ("penalty_repeat", 0.0, "repeat_penalty: expected more than 0, got 0"),
        ("penalty_last_n", -7, "repeat_last_n: expected -1 to 2147483647, got -7"),
        ("penalty_last_n", 1e30, "repeat_last_n: expected -1 to 2147483647, got 1"),
    ],
)
def test_metadata_out_of_range(key: str, value: float, words: str) -> None:
    with pytest.raises(SamplingError) as error:
        SamplingParams().resolved({f"general.sampling.{key}": value})
    assert one_line(error.value).startswith(f"metadata general.sampling: {words}")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", math.nan, "a number"),
        ("temperature", math.inf, "a number"),
        ("top_p", -0.01, "0 to 1"),
        ("top_p", 1.01, "0 to 1"),
        ("top_p", math.nan, "0 to 1"),
        ("min_p", -0.01, "0 to 1"),
        ("min_p", 1.01, "0 to 1"),
        ("min_p", math.nan, "0 to 1"),
        ("repeat_penalty", 0, "more than 0"),
        ("repeat_penalty", -1, "at least 0"),
        ("repeat_penalty", math.inf, "at least 0"),
        ("repeat_penalty", math.nan, "at least 0"),
        ("repeat_last_n", -2, "-1 to 2147483647"),
        ("repeat_last_n", 2**31, "-1 to 2147483647"),
        ("seed", -2, "-1 to 18446744073709551615"),
        ("seed", 2**64, "-1 to 18446744073709551615"),
        ("max_tokens", -2, "at least -1"),
    ],
)
def test_parameters_out_of_range(name: str, value: Any, expected: str) -> None:
    with pytest.raises(SamplingError) as error:
        SamplingParams(**{name: value})
    assert one_line(error.value) == f"{name}: expected {expected}, got {value}"


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -3}, {"top_p": 0}, {"top_p": 1}, {"min_p": 0}, {"min_p": 1},
        {"repeat_penalty": 1e-3}, {"repeat_last_n": -1}, {"repeat_last_n": 2**31 - 1},
        {"seed": -1}, {"seed": 2**64 - 1}, {"max_tokens": -1}, {"max_tokens": 10**30},
    ],
)  # fmt: skip
def test_parameters_at_their_limits(params: dict[str, Any]) -> None:
    made = Sampler(SamplingParams(**params).resolved({}))
    made.accept(0)
    assert made.sample(np.array([1, 2, 3], np.float32)) in (0, 1, 2)
