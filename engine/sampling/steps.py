"""The samplers: steps between logits and a token, one function each, as llama.cpp defines them.

A sampler takes candidates, resolved SamplingParams and a Context, and returns the candidates that
remain, in any order, with other logits if it changes them. To add one, write a function, a row of
SAMPLERS, and a field of SamplingParams for each parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.sampling.recent import Breakers, Repeats, Window

Floats = NDArray[np.float64]
# top_k looks at the highest logit of each of so many groups first.
_GROUP = 64
_FLOAT32_MAX_LOG = 88.7228391


@dataclass(frozen=True)
class Candidates:
    """Token ids and their logits: arrays of the same length, never empty."""

    ids: NDArray[np.intp]
    logits: Floats

    def take(self, index: Any) -> Candidates:
        return Candidates(self.ids[index], self.logits[index])

    def probabilities(self) -> Floats:
        weights = np.exp(self.logits - self.logits.max())
        return np.asarray(weights / weights.sum())

    def falling(self) -> Candidates:
        """In order of falling logits; equal ones stay in their order."""
        if np.all(self.logits[:-1] >= self.logits[1:]):
            return self
        return self.take(np.argsort(-self.logits, kind="stable"))

    def lowered(self, tokens: NDArray[Any], amounts: NDArray[Any]) -> Candidates:
        """With an amount subtracted from the logit of each token."""
        table = np.zeros(int(max(self.ids.max(), tokens.max(initial=0))) + 1)
        table[tokens] = amounts
        return Candidates(self.ids, self.logits - table[self.ids])


@dataclass
class Context:
    """What samplers read besides parameters: random numbers, DRY's breakers, and the `recent`
    tokens of prompt and output, oldest first, with what samplers keep of them."""

    rng: np.random.Generator
    breakers: Breakers
    recent: list[int] = field(default_factory=list)
    window: Window | None = None
    repeats: Repeats | None = None


def penalties(c: Candidates, p: Any, context: Context) -> Candidates:
    """Lower the logits of recent tokens: by a factor, by their count, and by mere presence."""
    if context.window is None:
        context.window = Window(p.repeat_last_n)
    counts = context.window.counts(context.recent, int(c.ids.max()) + 1)[c.ids]
    seen = np.flatnonzero(counts)
    x, logits = c.logits[seen], c.logits.copy()
    scaled = x * np.where(x <= 0, p.repeat_penalty, 1 / p.repeat_penalty)
    logits[seen] = scaled - (counts[seen] * p.frequency_penalty + p.presence_penalty)
    return Candidates(c.ids, logits)


def dry(c: Candidates, p: Any, context: Context) -> Candidates:
    """Lower the logits of tokens that would continue a repetition ("don't repeat yourself").

    A token that would prolong a repeated run of n tokens loses multiplier · base^(n - allowed).
    A run never reaches back over a breaker.
    """
    if context.repeats is None:
        context.repeats = Repeats(context.breakers)
    context.repeats.follow(context.recent)
    tokens, lengths = context.repeats.longest(p.dry_allowed_length, p.dry_penalty_last_n)
    base, allowed = p.dry_base, p.dry_allowed_length
    # Above this exponent base^n leaves float32's range.
    most = _FLOAT32_MAX_LOG // math.log(base) if base > 1.000001 else math.inf
    amounts = [
        0.0 if () in context.breakers.get(token, ())
        else p.dry_multiplier * base ** min(length - allowed, most)
        for token, length in zip(tokens.tolist(), lengths.tolist(), strict=True)
    ]  # fmt: skip
    return c.lowered(tokens, np.array(amounts)) if amounts else c


def top_n_sigma(c: Candidates, p: Any, context: Context) -> Candidates:
    """Give -inf to logits more than n standard deviations (of all logits) below the highest."""
    floor = c.logits.max() - p.top_n_sigma * c.logits[np.isfinite(c.logits)].std()
    return Candidates(c.ids, np.where(c.logits < floor, -np.inf, c.logits))


def top_k(c: Candidates, p: Any, context: Context) -> Candidates:
    """Keep the k highest logits, falling."""
    k, n_columns = p.top_k, len(c.ids) // _GROUP
    if k < n_columns:
        # The k-th largest of the groups' maxima is a floor: k logits at least reach it.
        maxima = c.logits[: n_columns * _GROUP].reshape(_GROUP, n_columns).max(axis=0)
        c = c.take(np.flatnonzero(c.logits >= np.partition(maxima, n_columns - k)[-k]))
    if k < len(c.ids):
        floor = np.partition(c.logits, len(c.ids) - k)[-k]
        c = c.take(c.logits >= floor)
    return c.falling().take(slice(k))


def typical(c: Candidates, p: Any, context: Context) -> Candidates:
    """Keep those with a surprise nearest to the expected one, until their probability exceeds p."""
    probabilities = c.probabilities()
    kept = probabilities > 0
    c, probabilities = c.take(kept), probabilities[kept]
    surprise = -np.log(probabilities)
    entropy = (probabilities * surprise).sum()
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    n = int(np.searchsorted(np.cumsum(probabilities[order]), p.typical_p, side="right")) + 1
    return c.take(order[:n])


def top_p(c: Candidates, p: Any, context: Context) -> Candidates:
    """Keep the likeliest until their probability reaches p; at least one."""
    c = c.falling()
    return c.take(slice(int(np.searchsorted(np.cumsum(c.probabilities()), p.top_p)) + 1))


def min_p(c: Candidates, p: Any, context: Context) -> Candidates:
    """Keep those with at least p times the highest probability."""
    return c.take(c.logits >= c.logits.max() + math.log(p.min_p))


def xtc(c: Candidates, p: Any, context: Context) -> Candidates:
    """With a probability, remove all but the least likely of those above the threshold."""
    if len(c.ids) < 2 or context.rng.random() > p.xtc_probability:
        return c
    c = c.falling()
    n_above = int(np.count_nonzero(c.probabilities() >= p.xtc_threshold))
    return c.take(slice(n_above - 1, None)) if n_above > 1 else c


def temperature(c: Candidates, p: Any, context: Context) -> Candidates:
    """Divide the logits by the temperature t; at most 0 keeps only the likeliest.

    With dynatemp_range, the temperature goes from t - range to t + range with the entropy.
    """
    t = p.temperature
    if p.dynatemp_range > 0:
        low, high = max(0.0, t - p.dynatemp_range), t + p.dynatemp_range
        probabilities = c.probabilities()
        positive = probabilities[probabilities > 0]
        entropy = float(-(positive * np.log(positive)).sum())
        share = entropy / math.log(len(c.ids)) if len(c.ids) > 1 else 0.0
        t = low + (high - low) * share**p.dynatemp_exponent
    if t <= 0:
        return c.take([int(np.argmax(c.logits))])
    return Candidates(c.ids, c.logits / t)


class SamplerSpec(NamedTuple):
    """A row of the table.

    is_off: whether the sampler changes nothing with these parameters; it must not be called then.
    keeps_highest: it never removes the highest logit nor lets another one pass it.
    """

    apply: Callable[[Candidates, Any, Context], Candidates]
    is_off: Callable[[Any], bool]
    keeps_highest: bool = False


# By the names that `--samplers` takes, in llama.cpp's default order.
SAMPLERS: dict[str, SamplerSpec] = {
    "penalties": SamplerSpec(
        penalties,
        lambda p: (p.repeat_penalty, p.frequency_penalty, p.presence_penalty) == (1, 0, 0),
    ),
    "dry": SamplerSpec(dry, lambda p: p.dry_multiplier == 0),
    "top_n_sigma": SamplerSpec(top_n_sigma, lambda p: p.top_n_sigma <= 0, keeps_highest=True),
    "top_k": SamplerSpec(top_k, lambda p: p.top_k <= 0, keeps_highest=True),
    "typ_p": SamplerSpec(typical, lambda p: p.typical_p >= 1),
    "top_p": SamplerSpec(top_p, lambda p: p.top_p >= 1, keeps_highest=True),
    "min_p": SamplerSpec(min_p, lambda p: p.min_p <= 0, keeps_highest=True),
    "xtc": SamplerSpec(xtc, lambda p: p.xtc_probability <= 0 or p.xtc_threshold > 0.5),
    "temperature": SamplerSpec(
        temperature, lambda p: p.temperature == 1 and not p.dynatemp_range, keeps_highest=True
    ),
}

# Other names that llama.cpp has for them.
SAMPLER_NAMES = {
    "top-k": "top_k", "top-p": "top_p", "nucleus": "top_p", "min-p": "min_p", "temp": "temperature",
    "typ-p": "typ_p", "typ": "typ_p", "typical": "typ_p", "typical-p": "typ_p",
    "typical_p": "typ_p", "top-n-sigma": "top_n_sigma",
}  # fmt: skip


def mirostat(c: Candidates, mu: float) -> Candidates:
    """Keep those with a surprise of at most mu bits; at least one (mirostat 2)."""
    c = c.falling()
    with np.errstate(divide="ignore"):
        surprise = -np.log2(c.probabilities())
    return c.take(slice(max(1, int(np.count_nonzero(surprise <= mu)))))


def sample(c: Candidates, uniform: float) -> int:
    """The index of a candidate, sampled by probability with a random number of [0, 1)."""
    cumulated = np.cumsum(c.probabilities())
    # The product is below the total however it is rounded: the index is one with a probability.
    return int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))
