"""The samplers that `--samplers` can name: one row each, in llama.cpp's default order.

To add one: its function in steps.py, a row here, and a line in SamplingParams for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from engine.sampling import steps
from engine.sampling.steps import Breakers, Candidates


@dataclass
class Context:
    """What samplers read besides their parameters: random numbers, DRY's breakers, and the
    `recent` tokens of prompt and output, oldest first."""

    rng: np.random.Generator
    breakers: Breakers
    recent: list[int] = field(default_factory=list)

    def window(self, n: int) -> list[int]:
        """The last n recent tokens; all of them if n is negative."""
        return self.recent if n < 0 else self.recent[-n:] if n else []


class SamplerSpec(NamedTuple):
    """A sampler: `apply(candidates, params, context)`, where params are resolved SamplingParams.

    is_off: the parameters for which it changes nothing. keeps_highest: it never removes the
    highest logit nor lets another one pass it.
    """

    apply: Callable[[Candidates, Any, Context], Candidates]
    is_off: Callable[[Any], bool]
    keeps_highest: bool = False


SAMPLER_TABLE: dict[str, SamplerSpec] = {
    "penalties": SamplerSpec(
        lambda c, p, x: steps.penalties(
            c,
            x.window(p.repeat_last_n),
            p.repeat_penalty,
            p.frequency_penalty,
            p.presence_penalty,
        ),
        lambda p: (p.repeat_penalty, p.frequency_penalty, p.presence_penalty) == (1, 0, 0),
    ),
    "dry": SamplerSpec(
        lambda c, p, x: steps.dry(
            c,
            x.window(p.dry_penalty_last_n),
            p.dry_multiplier,
            p.dry_base,
            p.dry_allowed_length,
            x.breakers,
        ),
        lambda p: p.dry_multiplier == 0,
    ),
    "top_n_sigma": SamplerSpec(
        lambda c, p, x: steps.top_n_sigma(c, p.top_n_sigma),
        lambda p: p.top_n_sigma <= 0,
        keeps_highest=True,
    ),
    "top_k": SamplerSpec(
        lambda c, p, x: steps.top_k(c, p.top_k), lambda p: p.top_k <= 0, keeps_highest=True
    ),
    "typ_p": SamplerSpec(lambda c, p, x: steps.typical(c, p.typical_p), lambda p: p.typical_p >= 1),
    "top_p": SamplerSpec(
        lambda c, p, x: steps.top_p(c, p.top_p), lambda p: p.top_p >= 1, keeps_highest=True
    ),
    "min_p": SamplerSpec(
        lambda c, p, x: steps.min_p(c, p.min_p), lambda p: p.min_p <= 0, keeps_highest=True
    ),
    "xtc": SamplerSpec(
        lambda c, p, x: steps.xtc(c, p.xtc_probability, p.xtc_threshold, x.rng),
        lambda p: p.xtc_probability <= 0 or p.xtc_threshold > 0.5,
    ),
    "temperature": SamplerSpec(
        lambda c, p, x: steps.temperature(c, p.temperature, p.dynatemp_range, p.dynatemp_exponent),
        lambda p: p.temperature == 1 and not p.dynatemp_range,
        keeps_highest=True,
    ),
}
