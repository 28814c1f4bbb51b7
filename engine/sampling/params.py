"""Sampling parameters: each field has its default, its range and its key in the model's file."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine import checks
from engine.errors import EngineError
from engine.sampling.grammar import Grammar
from engine.sampling.steps import SAMPLERS

_SAMPLERS = tuple(SAMPLERS)
_INF, _MAX_FLOAT = math.inf, sys.float_info.max
_MAX_WINDOW = 2**31 - 1
# (tokens so far, logits [n_vocab]) -> logits [n_vocab]; see SamplingParams.
LogitsProcessor = Callable[[Sequence[int], NDArray[np.float32]], NDArray[Any]]


class SamplingError(EngineError):
    """A sampling parameter out of its range."""


class NoTokenError(SamplingError):
    """Parameters that leave no token of a model's logits to sample."""


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

    def checked(self, name: str, value: Any) -> float:
        """The value, as a number of Python's own."""
        is_fit = checks.is_integer if self.is_integer else checks.is_number
        if not is_fit(value):
            kind = "an integer" if self.is_integer else "a number"
            checks.refuse(SamplingError, name, kind, value)
        value = checks.plain(value)
        is_finite = self.is_integer or abs(value) <= _MAX_FLOAT
        if not (self.low <= value <= self.high and is_finite):
            checks.refuse(SamplingError, name, self._range(), value)
        return value  # type: ignore[no-any-return]

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


# As many as the largest vocabularies have; far more than anyone reads.
_MAX_LOGPROBS = 2**20
_Integer = partial(_Number, is_integer=True)


@dataclass(frozen=True)
class SamplingParams:
    """How to sample, and when to stop.

    None means what the model's file says, else: temperature 0.8, top_k 40, top_p 0.95, min_p 0.05,
    xtc_probability 0, xtc_threshold 0.1, repeat_penalty 1, repeat_last_n 64, mirostat 0,
    mirostat_tau 5, mirostat_eta 0.1, a random seed.

    temperature: at most 0 is greedy; dynatemp_range makes it follow the entropy. top_k: at most 0
    is all. repeat_last_n: window of the penalties, 0 none, -1 all (so with dry_penalty_last_n).
    mirostat: 0 or 2. logit_bias: token -> what to add, -inf to ban. samplers: their order.
    seed: None or -1 for a random one. max_tokens: -1 for until the context is full. stop: a text or
    texts that end the output. ignore_eos: end-of-generation tokens are never sampled.
    preserved_tokens: control tokens, as the file spells them, that are text in the output.

    logprobs: None for none; N: each token comes with its log probability and those of the N
    likeliest (see Logprobs). logits_processors: functions that get all tokens so far, of prompt and
    output, which they must not change, and a copy of the logits, float32 [n_vocab]; each returns
    the logits for the next one, or for the samplers. What one raises ends its completion alone.

    grammar: what the output must be. Of what the processors return only tokens that it allows go on
    to bias, penalties and samplers. The output ends where the grammar may end, or at a limit.

    Raises SamplingError for values of another type or out of range.
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
    dry_sequence_breakers: str | Sequence[str] = ("\n", ":", '"', "*")
    mirostat: int | None = _Integer(0, 0, 2, key="mirostat").field()
    mirostat_tau: float | None = _Number(5.0, 0, key="mirostat_tau").field()
    mirostat_eta: float | None = _Number(0.1, 0, key="mirostat_eta").field()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    samplers: Sequence[str] = _SAMPLERS
    seed: int | None = _Integer(None, -1, 2**64 - 1).field()
    max_tokens: int = _Integer(-1, -1).field()
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    preserved_tokens: str | Sequence[str] = ()
    logprobs: int | None = _Integer(None, 0, _MAX_LOGPROBS).field()
    logits_processors: LogitsProcessor | Sequence[LogitsProcessor] = ()
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            # None is allowed where it is the field's default.
            if "number" in f.metadata and not (value is None and f.default is None):
                number = f.metadata["number"].checked(f.name, value)
                if number is not value:
                    checks.put(self, f.name, number)
        self._check_numbers()
        checks.put(self, "ignore_eos", checks.flag(SamplingError, "ignore_eos", self.ignore_eos))
        self._check_collections()

    def _check_numbers(self) -> None:
        """What a range does not say."""
        if self.repeat_penalty == 0:
            raise SamplingError("repeat_penalty: expected more than 0, got 0")
        if self.mirostat not in (None, 0, 2):
            raise SamplingError(f"mirostat: expected 0 or 2, got {self.mirostat}")

    def _check_collections(self) -> None:
        for name in ("stop", "dry_sequence_breakers", "preserved_tokens"):
            checks.put(self, name, checks.texts(SamplingError, name, getattr(self, name)))
        names = checks.sequence(SamplingError, "samplers", self.samplers, "names")
        for name in names:
            checks.one_of(SamplingError, "samplers", name, _SAMPLERS)
        checks.put(self, "samplers", tuple(names))
        bias = checks.mapping(SamplingError, "logit_bias", self.logit_bias, "token ids and numbers")
        for token, value in zip(bias, map(checks.plain, bias.values()), strict=True):
            if not checks.is_integer(token):
                checks.refuse(SamplingError, "logit_bias", "token ids", token)
            if not checks.is_number(value) or not (value == -_INF or abs(value) <= _MAX_FLOAT):
                checks.refuse(SamplingError, "logit_bias", "numbers or -inf", value)
        checks.put(self, "logit_bias", {int(token): float(v) for token, v in bias.items()})
        given = self.logits_processors
        hooks = (given,) if callable(given) else given
        for hook in checks.sequence(SamplingError, "logits_processors", hooks, "functions"):
            if not callable(hook):
                checks.refuse(SamplingError, "logits_processors", "functions", hook)
        checks.put(self, "logits_processors", tuple(hooks))
        if self.grammar is not None:
            checks.instance(SamplingError, "grammar", self.grammar, Grammar)

    def __repr__(self) -> str:
        """With the fields that are not at their defaults."""
        plain = SamplingParams()
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        said = (f"{k}={v!r}" for k, v in given.items() if v != getattr(plain, k))
        return f"SamplingParams({', '.join(said)})"

    def resolved(self, metadata: Mapping[str, Any]) -> SamplingParams:
        """These parameters with every None replaced, by `general.sampling.*` or by the default."""
        made = copy(self)
        for name, number in _IN_FILES.items():
            if getattr(self, name) is None:
                value = number.resolve(metadata)
                try:
                    checks.put(made, name, number.checked(name, value))
                    made._check_numbers()
                except SamplingError as error:
                    raise SamplingError(f"metadata general.sampling: {error}") from None
        return made


_IN_FILES = {
    f.name: f.metadata["number"]
    for f in fields(SamplingParams)
    if "number" in f.metadata and f.metadata["number"].key
}
