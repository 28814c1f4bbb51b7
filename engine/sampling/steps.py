"""The steps between logits and a token, one function each, as llama.cpp defines them.

A step takes `Candidates` and gives those that remain, with their logits changed where it does that.
They come in any order; steps that need falling logits sort them, equal ones by their place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# DRY's sequence breakers: head token -> the tails that complete one; () if the token is one alone.
Breakers = Mapping[int, Sequence[tuple[int, ...]]]
# Logits in a group of which only the highest is looked at first, where few of many are wanted.
_GROUP = 64
_FLOAT32_MAX_LOG = 88.7228391


@dataclass(frozen=True)
class Candidates:
    """Token ids and their logits, equally long and never empty."""

    ids: NDArray[np.intp]
    logits: Floats

    def take(self, index: Any) -> Candidates:
        """The candidates at an index, slice or mask."""
        return Candidates(self.ids[index], self.logits[index])

    def probabilities(self) -> Floats:
        """Softmax of the logits."""
        weights = np.exp(self.logits - self.logits.max())
        return np.asarray(weights / weights.sum())

    def falling(self) -> Candidates:
        """In order of falling logits."""
        if np.all(self.logits[:-1] >= self.logits[1:]):
            return self
        return self.take(np.argsort(-self.logits, kind="stable"))

    def lowered(self, amounts: Mapping[int, float]) -> Candidates:
        """With amounts subtracted from the logits of tokens."""
        logits = self.logits.copy()
        for i in np.flatnonzero(np.isin(self.ids, list(amounts))):
            logits[i] -= amounts[int(self.ids[i])]
        return Candidates(self.ids, logits)


def penalties(
    c: Candidates, recent: Sequence[int], repeat: float, frequency: float, presence: float
) -> Candidates:
    """Lower the logits of recent tokens: by a factor, then by count and by mere presence."""
    if (repeat, frequency, presence) == (1, 0, 0) or not recent:
        return c
    counts = Counter(recent)
    seen = np.isin(c.ids, list(counts))
    factor = np.where(c.logits <= 0, repeat, 1 / repeat)
    scaled = Candidates(c.ids, np.where(seen, c.logits * factor, c.logits))
    return scaled.lowered({t: n * frequency + presence for t, n in counts.items()})


def dry(
    c: Candidates,
    recent: Sequence[int],
    multiplier: float,
    base: float,
    allowed_length: int,
    breakers: Breakers,
) -> Candidates:
    """Lower the logits of tokens that would continue a repetition ("don't repeat yourself").

    A token that would prolong a repeated run of n tokens loses multiplier · base^(n - allowed).
    A run never reaches back over a breaker.
    """
    if multiplier == 0 or len(recent) <= allowed_length:
        return c
    limit = _repetition_limit(recent, breakers)
    if limit < allowed_length:
        return c
    longest: Counter[int] = Counter()
    for end, length in enumerate(_suffix_matches(recent)):
        length = min(length, limit)
        if length >= allowed_length:
            following = recent[end + 1]
            longest[following] = max(longest[following], length)
    top = _max_exponent(base)
    return c.lowered(
        {
            token: multiplier * base ** min(length - allowed_length, top)
            for token, length in longest.items()
            if () not in breakers.get(token, ())
        }
    )


def _max_exponent(base: float) -> float:
    """Where base^n would leave float32's range."""
    return _FLOAT32_MAX_LOG // math.log(base) if base > 1.000001 else math.inf


def _repetition_limit(recent: Sequence[int], breakers: Breakers) -> int:
    """How many tokens at the end lie behind the last breaker."""
    n = len(recent)
    for back in range(n):
        head = n - 1 - back
        tails = breakers.get(recent[head], ())
        matching = [len(t) for t in tails if tuple(recent[head + 1 : head + 1 + len(t)]) == t]
        if matching:
            return back - max(matching)
    return n


def _suffix_matches(tokens: Sequence[int]) -> list[int]:
    """For each position but the last: how long a run ending there equals the end of `tokens`.

    The Z algorithm on the reversed sequence; linear time.
    """
    reverse = list(tokens)[::-1]
    n, z = len(reverse), [0] * len(reverse)
    left = right = 0
    for i in range(1, n):
        if i < right:
            z[i] = min(right - i, z[i - left])
        while i + z[i] < n and reverse[z[i]] == reverse[i + z[i]]:
            z[i] += 1
        if i + z[i] > right:
            left, right = i, i + z[i]
    return z[:0:-1]


def top_n_sigma(c: Candidates, n: float) -> Candidates:
    """Without chance: those more than n standard deviations of all logits below the highest."""
    if n <= 0:
        return c
    floor = c.logits.max() - n * c.logits[np.isfinite(c.logits)].std()
    return Candidates(c.ids, np.where(c.logits < floor, -np.inf, c.logits))


def top_k(c: Candidates, k: int) -> Candidates:
    """The k likeliest, falling; all if k is not positive."""
    n_columns = len(c.ids) // _GROUP
    if 0 < k < n_columns:
        # Of disjoint groups' maxima, k are at least the k-th largest maximum: what is less is out.
        maxima = c.logits[: n_columns * _GROUP].reshape(_GROUP, n_columns).max(axis=0)
        c = c.take(np.flatnonzero(c.logits >= np.partition(maxima, n_columns - k)[-k]))
    if 0 < k < len(c.ids):
        floor = np.partition(c.logits, len(c.ids) - k)[-k]
        c = c.take(c.logits >= floor)
    return c.falling().take(slice(k)) if k > 0 else c


def typical(c: Candidates, p: float) -> Candidates:
    """Those whose surprise is nearest to the expected one, until their probability exceeds p."""
    if p >= 1:
        return c
    probabilities = c.probabilities()
    kept = probabilities > 0
    c, probabilities = c.take(kept), probabilities[kept]
    surprise = -np.log(probabilities)
    entropy = (probabilities * surprise).sum()
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    n = int(np.searchsorted(np.cumsum(probabilities[order]), p, side="right")) + 1
    return c.take(order[:n])


def top_p(c: Candidates, p: float) -> Candidates:
    """The likeliest until their probability reaches p; at least one."""
    if p >= 1:
        return c
    c = c.falling()
    return c.take(slice(int(np.searchsorted(np.cumsum(c.probabilities()), p)) + 1))


def min_p(c: Candidates, p: float) -> Candidates:
    """Those with at least p times the highest probability."""
    return c.take(c.logits >= c.logits.max() + math.log(p)) if p > 0 else c


def xtc(
    c: Candidates, probability: float, threshold: float, rng: np.random.Generator
) -> Candidates:
    """With a probability, leave out all but the least likely of those above the threshold."""
    if probability <= 0 or threshold > 0.5 or len(c.ids) < 2 or rng.random() > probability:
        return c
    c = c.falling()
    n_above = int(np.count_nonzero(c.probabilities() >= threshold))
    return c.take(slice(n_above - 1, None)) if n_above > 1 else c


def temperature(c: Candidates, t: float, spread: float = 0, exponent: float = 1) -> Candidates:
    """Divide the logits by the temperature; at most 0 leaves only the likeliest.

    With a `spread`, the temperature goes from t - spread to t + spread with the entropy.
    """
    if spread > 0:
        low, high = max(0.0, t - spread), t + spread
        probabilities = c.probabilities()
        positive = probabilities[probabilities > 0]
        entropy = float(-(positive * np.log(positive)).sum())
        share = entropy / math.log(len(c.ids)) if len(c.ids) > 1 else 0.0
        t = low + (high - low) * share**exponent
    if t <= 0:
        return c.take([int(np.argmax(c.logits))])
    return Candidates(c.ids, c.logits / t)


def mirostat(c: Candidates, mu: float) -> Candidates:
    """Those whose surprise is at most mu bits; at least one (mirostat 2)."""
    c = c.falling()
    with np.errstate(divide="ignore"):
        surprise = -np.log2(c.probabilities())
    return c.take(slice(max(1, int(np.count_nonzero(surprise <= mu)))))


def sample(c: Candidates, uniform: float) -> int:
    """The index of a candidate, sampled by probability with a random number of [0, 1)."""
    cumulated = np.cumsum(c.probabilities())
    # The product is below the total however it is rounded: the index is one with a probability.
    return int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))
