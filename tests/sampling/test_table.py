"""What the rows of the sampler table promise: `is_off` and `keeps_highest`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.sampling.params import SAMPLERS, SamplingParams
from engine.sampling.steps import Candidates
from engine.sampling.table import SAMPLER_TABLE, Context

# Parameters with which each sampler does something; with OFF, none does.
ON: dict[str, dict[str, Any]] = {
    "penalties": {"repeat_penalty": 2.0},
    "dry": {"dry_multiplier": 2.0, "dry_allowed_length": 1},
    "top_n_sigma": {"top_n_sigma": 0.5},
    "top_k": {"top_k": 3},
    "typ_p": {"typical_p": 0.3},
    "top_p": {"top_p": 0.5},
    "min_p": {"min_p": 0.5},
    "xtc": {"xtc_probability": 1.0, "xtc_threshold": 0.01},
    "temperature": {"temperature": 0.5},
}
OFF: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}


def applied(name: str, logits: np.ndarray, **params: Any) -> Candidates:
    """What a sampler leaves of logits, after the tokens 0 1 2 0 1."""
    context = Context(np.random.default_rng(0), {}, [0, 1, 2, 0, 1])
    c = Candidates(np.arange(len(logits)), logits)
    return SAMPLER_TABLE[name].apply(c, SamplingParams(**params).resolved({}), context)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_that_is_off_changes_nothing(name: str) -> None:
    logits = np.random.default_rng(0).normal(size=20)
    assert SAMPLER_TABLE[name].is_off(SamplingParams(**OFF).resolved({}))
    assert not SAMPLER_TABLE[name].is_off(SamplingParams(**(OFF | ON[name])).resolved({}))
    c = applied(name, logits, **OFF)
    assert (c.ids.tolist(), c.logits.tolist()) == (list(range(20)), logits.tolist())
    changed = applied(name, logits, **(OFF | ON[name]))
    assert changed.logits.tolist() != logits.tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_keeps_highest_is_true(name: str) -> None:
    """Where a row says it, the highest logit stays the highest; where not, a case shows it."""
    rng, kept = np.random.default_rng(1), []
    for _ in range(50):
        logits = rng.normal(size=6)
        c = applied(name, logits, **(OFF | ON[name]))
        kept.append(c.ids[c.logits.argmax()] == logits.argmax())
    assert all(kept) == SAMPLER_TABLE[name].keeps_highest
