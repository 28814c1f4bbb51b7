"""From logits to a token: penalties, truncations, temperature, draw.

Order and defaults are llama.cpp's: repeat penalty over the last 64 tokens, top-k 40, top-p 0.95,
min-p 0.05, temperature 0.8. Each step takes and gives candidates in order of falling logits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError

Floats = NDArray[np.float64]
Ids = NDArray[np.intp]


class SamplingError(EngineError):
    """A sampling parameter out of its range."""


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. None means: what the model's file says, else llama.cpp's default.

    temperature: at most 0 is greedy. top_k: at most 0 is all. repeat_last_n: window of the repeat
    penalty, 0 none, -1 the whole context. seed: None or -1 for a random one. max_tokens: -1 for
    until the context is full. ignore_eos: end-of-generation tokens are never drawn.
    Raises SamplingError for values out of range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    seed: int | None = None
    max_tokens: int = -1
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", -math.inf, math.inf),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repeat_penalty", 0, math.inf),
            ("repeat_last_n", -1, 2**31 - 1),
            ("seed", -1, 2**64 - 1),
            ("max_tokens", -1, math.inf),
        ):
            value = getattr(self, name)
            if value is not None and (not low <= value <= high or abs(value) == math.inf):
                raise SamplingError(f"{name}: expected {_range(low, high)}, got {value}")
        if self.repeat_penalty == 0:
            raise SamplingError("repeat_penalty: expected more than 0, got 0")

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
    "repeat_penalty": ("penalty_repeat", 1.0),
    "repeat_last_n": ("penalty_last_n", 64),
}


def _range(low: float, high: float) -> str:
    if low == -math.inf:
        return "a number"
    return f"at least {low}" if high == math.inf else f"{low} to {high}"


class Sampler:
    """Draws the tokens of one sequence. `params` must be resolved."""

    def __init__(self, params: SamplingParams, banned: Iterable[int] = ()) -> None:
        self._params = params
        self._banned = np.fromiter(banned, np.intp)
        seed = params.seed if params.seed not in (None, -1) else None
        self._rng = np.random.default_rng(seed)
        window = params.repeat_last_n
        self._recent: deque[int] = deque(maxlen=None if window == -1 else window)

    def accept(self, token: int) -> None:
        """Count a token of the prompt or of the output for the penalties."""
        self._recent.append(token)

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Draw a token from logits [n_vocab]; SamplingError if they are not numbers."""
        p = self._params
        values = logits.astype(np.float64)
        values[self._banned] = -np.inf
        assert p.repeat_penalty is not None
        values = repeat_penalty(values, np.unique(list(self._recent)), p.repeat_penalty)
        if not math.isfinite(highest := values.max()):
            raise SamplingError(f"logits: expected a finite number as the highest, got {highest}")
        assert p.temperature is not None
        if p.temperature <= 0:
            return int(np.argmax(values))
        assert p.top_k is not None
        assert p.top_p is not None
        assert p.min_p is not None
        ids = top_k(values, p.top_k)
        ids = ids[: top_p(values[ids], p.top_p)]
        ids = ids[: min_p(values[ids], p.min_p)]
        return int(ids[draw(softmax(values[ids] / p.temperature), self._rng)])


def softmax(values: Floats) -> Floats:
    """Probabilities of logits."""
    weights = np.exp(values - values.max())
    return np.asarray(weights / weights.sum())


def repeat_penalty(values: Floats, seen: NDArray[Any], penalty: float) -> Floats:
    """Logits with those of `seen` tokens divided by the penalty, or multiplied if not positive."""
    if penalty == 1 or not len(seen):
        return values
    out, seen = values.copy(), seen.astype(np.intp)
    out[seen] = np.where(out[seen] <= 0, out[seen] * penalty, out[seen] / penalty)
    return out


def top_k(values: Floats, k: int) -> Ids:
    """Indices of the k highest logits, falling; equal ones by index."""
    if 0 < k < len(values):
        floor = np.partition(values, len(values) - k)[-k]
        ids = np.flatnonzero(values >= floor)
    else:
        ids, k = np.arange(len(values)), len(values)
    return np.asarray(ids[np.argsort(-values[ids], kind="stable")][:k])


def top_p(values: Floats, p: float) -> int:
    """How many of the falling logits it takes to reach a probability of p; at least one."""
    if p >= 1:
        return len(values)
    return int(np.searchsorted(np.cumsum(softmax(values)), p)) + 1


def min_p(values: Floats, p: float) -> int:
    """How many of the falling logits have at least p times the highest probability."""
    if p <= 0:
        return len(values)
    return max(1, int(np.count_nonzero(values >= values[0] + math.log(p))))


def draw(probabilities: Floats, rng: np.random.Generator) -> int:
    """An index drawn from a distribution."""
    cumulated = np.cumsum(probabilities)
    index = np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right")
    # Rounding may lead past the end, where the last probabilities may be zeros.
    return int(min(index, np.searchsorted(cumulated, cumulated[-1])))
