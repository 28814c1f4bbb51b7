"""Sampling parameters, checked once."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine.errors import EngineError


class SamplingError(EngineError):
    """A sampling parameter out of its range."""


SAMPLERS = (
    "penalties",
    "dry",
    "top_n_sigma",
    "top_k",
    "typ_p",
    "top_p",
    "min_p",
    "xtc",
    "temperature",
)


@dataclass(frozen=True)
class SamplingParams:
    """How to sample, and when to stop. None means: what the model's file says, else the default.

    temperature: at most 0 is greedy; dynatemp_range makes it follow the entropy. top_k: at most 0
    is all. repeat_last_n: window of the penalties, 0 none, -1 all (so with dry_penalty_last_n).
    mirostat: 0 or 2. logit_bias: token -> what to add, -inf to ban. samplers: their order.
    seed: None or -1 for a random one. max_tokens: -1 for until the context is full. stop: texts
    that end the output. ignore_eos: end-of-generation tokens are never drawn.
    Raises SamplingError for values out of range.
    """

    temperature: float | None = None
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    samplers: tuple[str, ...] = SAMPLERS
    seed: int | None = None
    max_tokens: int = -1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and (name in _DEFAULTS or name == "seed"):
                continue
            whole = name in _WHOLE
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                kind = "an integer" if whole else "a number"
                raise SamplingError(f"{name}: expected {kind}, got {value!r}")
            if not low <= value <= high or (not whole and abs(value) > _MAX_FLOAT):
                raise SamplingError(f"{name}: expected {_range(low, high)}, got {value}")
        if self.repeat_penalty == 0:
            raise SamplingError("repeat_penalty: expected more than 0, got 0")
        if self.mirostat not in (None, 0, 2):
            raise SamplingError(f"mirostat: expected 0 or 2, got {self.mirostat}")
        for name in self.samplers:
            if name not in SAMPLERS:
                raise SamplingError(f"samplers: expected any of {', '.join(SAMPLERS)}, got {name}")
        for name in ("stop", "dry_sequence_breakers"):
            if "" in getattr(self, name):
                raise SamplingError(f"{name}: expected texts that are not empty")
        for bias in self.logit_bias.values():
            if math.isnan(bias) or bias == _INF:
                raise SamplingError(f"logit_bias: expected numbers or -inf, got {bias}")
        if not isinstance(self.ignore_eos, bool):
            raise SamplingError(f"ignore_eos: expected true or false, got {self.ignore_eos!r}")

    def resolved(self, metadata: Mapping[str, Any]) -> SamplingParams:
        """These parameters with every None replaced, by `general.sampling.*` or by the default."""
        values: dict[str, Any] = {}
        for name, (key, default) in _DEFAULTS.items():
            if getattr(self, name) is None:
                value = metadata.get(f"general.sampling.{key}", default)
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if not number or not math.isfinite(value):
                    came = repr(value) if isinstance(value, int | float) else type(value).__name__
                    raise SamplingError(f"general.sampling.{key}: expected a number, got {came}")
                values[name] = type(default)(value)
        try:
            return replace(self, **values)
        except SamplingError as error:
            raise SamplingError(f"metadata general.sampling: {error}") from None


# Field -> (its key in the file's metadata, default).
_DEFAULTS: dict[str, tuple[str, float]] = {
    "temperature": ("temp", 0.8),
    "top_k": ("top_k", 40),
    "top_p": ("top_p", 0.95),
    "min_p": ("min_p", 0.05),
    "xtc_probability": ("xtc_probability", 0.0),
    "xtc_threshold": ("xtc_threshold", 0.1),
    "repeat_penalty": ("penalty_repeat", 1.0),
    "repeat_last_n": ("penalty_last_n", 64),
    "mirostat": ("mirostat", 0),
    "mirostat_tau": ("mirostat_tau", 5.0),
    "mirostat_eta": ("mirostat_eta", 0.1),
}
_INF, _MAX_FLOAT = math.inf, sys.float_info.max
_MAX_WINDOW = 2**31 - 1
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (-_INF, _INF),
    "dynatemp_range": (0, _INF),
    "dynatemp_exponent": (0, _INF),
    "top_k": (-_INF, _INF),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "top_n_sigma": (-_INF, _INF),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "repeat_penalty": (0, _INF),
    "repeat_last_n": (-1, _MAX_WINDOW),
    "presence_penalty": (-_INF, _INF),
    "frequency_penalty": (-_INF, _INF),
    "dry_multiplier": (0, _INF),
    "dry_base": (1, _INF),
    "dry_allowed_length": (0, _INF),
    "dry_penalty_last_n": (-1, _MAX_WINDOW),
    "mirostat": (0, 2),
    "mirostat_tau": (0, _INF),
    "mirostat_eta": (0, _INF),
    "seed": (-1, 2**64 - 1),
    "max_tokens": (-1, _INF),
}
_WHOLE = {
    "top_k",
    "repeat_last_n",
    "dry_allowed_length",
    "dry_penalty_last_n",
    "mirostat",
    "seed",
    "max_tokens",
}


def _range(low: float, high: float) -> str:
    if low == -_INF:
        return "a number"
    return f"at least {low}" if high == _INF else f"{low} to {high}"
