"""Sampling parameters: each field has its default, its range and its key in the model's file."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple

from engine.errors import EngineError
from engine.sampling.steps import SAMPLERS

_INF, _MAX_FLOAT = math.inf, sys.float_info.max
_MAX_WINDOW = 2**31 - 1


class SamplingError(EngineError):
    """A sampling parameter out of its range."""


class _Number(NamedTuple):
    """A numeric parameter: what `resolved` takes if nobody set it, its range, its key in the file's
    metadata after `general.sampling.` (empty: none), and whether it is an integer."""

    default: float | None
    low: float = -_INF
    high: float = _INF
    key: str = ""
    is_integer: bool = False

    def field(self) -> Any:
        """Its field of SamplingParams; with a key, None stands for what the model's file says."""
        return field(default=None if self.key else self.default, metadata={"number": self})

    def check(self, name: str, value: Any) -> None:
        accepted: Any = int if self.is_integer else int | float
        if isinstance(value, bool) or not isinstance(value, accepted):
            kind = "an integer" if self.is_integer else "a number"
            raise SamplingError(f"{name}: expected {kind}, got {value!r}")
        is_finite = self.is_integer or abs(value) <= _MAX_FLOAT
        if not (self.low <= value <= self.high and is_finite):
            raise SamplingError(f"{name}: expected {self._range()}, got {value}")

    def _range(self) -> str:
        if self.low == -_INF:
            return "a number"
        return f"at least {self.low}" if self.high == _INF else f"{self.low} to {self.high}"

    def resolve(self, metadata: Mapping[str, Any]) -> float:
        """The value in the file, else the default; SamplingError for a value that is no number."""
        key = f"general.sampling.{self.key}"
        value = metadata.get(key, self.default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            came = repr(value) if isinstance(value, int | float) else type(value).__name__
            raise SamplingError(f"{key}: expected a number, got {came}")
        return int(value) if self.is_integer else float(value)


_Integer = partial(_Number, is_integer=True)


@dataclass(frozen=True)
class SamplingParams:
    """How to sample, and when to stop. None means: what the model's file says, else the default.

    temperature: at most 0 is greedy; dynatemp_range makes it follow the entropy. top_k: at most 0
    is all. repeat_last_n: window of the penalties, 0 none, -1 all (so with dry_penalty_last_n).
    mirostat: 0 or 2. logit_bias: token -> what to add, -inf to ban. samplers: their order.
    seed: None or -1 for a random one. max_tokens: -1 for until the context is full. stop: texts
    that end the output. ignore_eos: end-of-generation tokens are never sampled.
    Raises SamplingError for values out of range.
    """

    temperature: float | None = _Number(0.8, key="temp").field()
    dynatemp_range: float = _Number(0.0, 0).field()
    dynatemp_exponent: float = _Number(1.0, 0).field()
    top_k: int | None = _Integer(40, key="top_k").field()
    top_p: float | None = _Number(0.95, 0, 1, key="top_p").field()
    min_p: float | None = _Number(0.05, 0, 1, key="min_p").field()
    typical_p: float = _Number(1.0, 0, 1).field()
    top_n_sigma: float = _Number(-1.0).field()
    xtc_probability: float | None = _Number(0.0, 0, 1, key="xtc_probability").field()
    xtc_threshold: float | None = _Number(0.1, 0, 1, key="xtc_threshold").field()
    repeat_penalty: float | None = _Number(1.0, 0, key="penalty_repeat").field()
    repeat_last_n: int | None = _Integer(64, -1, _MAX_WINDOW, key="penalty_last_n").field()
    presence_penalty: float = _Number(0.0).field()
    frequency_penalty: float = _Number(0.0).field()
    dry_multiplier: float = _Number(0.0, 0).field()
    dry_base: float = _Number(1.75, 1).field()
    dry_allowed_length: int = _Integer(2, 0).field()
    dry_penalty_last_n: int = _Integer(-1, -1, _MAX_WINDOW).field()
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: int | None = _Integer(0, 0, 2, key="mirostat").field()
    mirostat_tau: float | None = _Number(5.0, 0, key="mirostat_tau").field()
    mirostat_eta: float | None = _Number(0.1, 0, key="mirostat_eta").field()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    samplers: tuple[str, ...] = tuple(SAMPLERS)
    seed: int | None = _Integer(None, -1, 2**64 - 1).field()
    max_tokens: int = _Integer(-1, -1).field()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            # None is allowed where it is the field's default.
            if "number" in f.metadata and not (value is None and f.default is None):
                f.metadata["number"].check(f.name, value)
        if self.repeat_penalty == 0:
            raise SamplingError("repeat_penalty: expected more than 0, got 0")
        if self.mirostat not in (None, 0, 2):
            raise SamplingError(f"mirostat: expected 0 or 2, got {self.mirostat}")
        if not isinstance(self.ignore_eos, bool):
            raise SamplingError(f"ignore_eos: expected true or false, got {self.ignore_eos!r}")
        self._check_collections()

    def _check_collections(self) -> None:
        for name in self.samplers:
            if name not in SAMPLERS:
                raise SamplingError(f"samplers: expected any of {', '.join(SAMPLERS)}, got {name}")
        for name in ("stop", "dry_sequence_breakers"):
            if "" in getattr(self, name):
                raise SamplingError(f"{name}: expected texts that are not empty")
        for bias in self.logit_bias.values():
            if math.isnan(bias) or bias == _INF:
                raise SamplingError(f"logit_bias: expected numbers or -inf, got {bias}")

    def resolved(self, metadata: Mapping[str, Any]) -> SamplingParams:
        """These parameters with every None replaced, by `general.sampling.*` or by the default."""
        values = {
            f.name: f.metadata["number"].resolve(metadata)
            for f in fields(self)
            if getattr(self, f.name) is None and f.metadata["number"].key
        }
        try:
            return replace(self, **values)
        except SamplingError as error:
            raise SamplingError(f"metadata general.sampling: {error}") from None
