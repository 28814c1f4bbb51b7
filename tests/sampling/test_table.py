"""What the rows of the sampler table promise: `is_off` and `keeps_highest`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.sampling.params import SamplingParams
from engine.sampling.steps import SAMPLERS, Candidates
from tests.support.helpers import apply_sampler

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
    c, rng = Candidates(np.arange(len(logits)), logits), np.random.default_rng(0)
    return apply_sampler(name, c, recent=[0, 1, 2, 0, 1], rng=rng, **params)


@pytest.mark.parametrize("name", SAMPLERS)
def test_is_off_is_true_where_nothing_changes(name: str) -> None:
    logits = np.random.default_rng(0).normal(size=20)
    off, on = (SamplingParams(**p).resolved({}) for p in (OFF, OFF | ON[name]))
    assert SAMPLERS[name].is_off(off)
    assert not SAMPLERS[name].is_off(on)
    assert applied(name, logits, **(OFF | ON[name])).logits.tolist() != logits.tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_keeps_highest_is_true(name: str) -> None:
    """Where a row says it, the highest logit stays the highest; where not, a case shows it."""
    rng, kept = np.random.default_rng(1), []
    for _ in range(50):
        logits = rng.normal(size=6)
        c = applied(name, logits, **(OFF | ON[name]))
        kept.append(c.ids[c.logits.argmax()] == logits.argmax())
    assert all(kept) == SAMPLERS[name].keeps_highest
