"""What samplers keep of the tokens so far, so that a token's cost doesn't grow with their number.

Both classes are given all tokens each time, and look at those that are new.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
# DRY's sequence breakers: head token -> the tails that complete one; () if the token is one alone.
Breakers = Mapping[int, Collection[tuple[int, ...]]]


class Window:
    """How often each token is among the last `n`; all of them if n is negative."""

    def __init__(self, n: int) -> None:
        self._n, self._n_seen = n, 0
        self._counts = np.zeros(0, np.int64)

    def counts(self, tokens: Sequence[int], n_vocab: int) -> Ints:
        """[at least n_vocab], of the last n of `tokens`."""
        size = max(n_vocab, 1 + max(tokens[self._n_seen :], default=0))
        if size > len(self._counts):
            self._counts = np.pad(self._counts, (0, size - len(self._counts)))
        for i in range(self._n_seen, len(tokens)):
            self._counts[tokens[i]] += 1
            if 0 <= self._n <= i:
                self._counts[tokens[i - self._n]] -= 1
        self._n_seen = len(tokens)
        return self._counts


class Repeats:
    """Earlier runs of tokens that are the same as the run that ends the tokens so far.

    `ends`: where such runs end, rising; `lengths`: how long they are. A further token keeps the
    runs that go on with it and begins those that it is alone, so only its own places are looked at.
    """

    def __init__(self, breakers: Breakers) -> None:
        self._breakers, self._tokens = breakers, array("q")
        self._max_tail = max((len(t) for tails in breakers.values() for t in tails), default=0)
        self._places: dict[int, Ints] = {}
        self._ends = self._lengths = np.zeros(0, np.int64)
        # The last breaker: where its head is, and the length of its tail.
        self._head, self._tail = -1, 0

    def follow(self, tokens: Sequence[int]) -> None:
        """Take in the tokens that are new."""
        n = len(self._tokens)
        if len(tokens) > n + 1:
            self._begin(tokens)
        elif len(tokens) > n:
            self._add(tokens[n])
        self._find_breaker(n)

    def _begin(self, tokens: Sequence[int]) -> None:
        self._tokens = array("q", tokens)
        lengths = np.array(_suffix_matches(tokens), np.int64)
        self._ends = np.flatnonzero(lengths)
        self._lengths = lengths[self._ends]
        ids = np.array(tokens)
        order = np.argsort(ids, kind="stable")
        values, starts = np.unique(ids[order], return_index=True)
        self._places = dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True))

    def _add(self, token: int) -> None:
        places = self._places.get(token, np.zeros(0, np.int64))
        lengths = np.ones(len(places), np.int64)
        if len(self._ends):
            at = np.searchsorted(self._ends, places - 1).clip(max=len(self._ends) - 1)
            lengths += np.where(self._ends[at] == places - 1, self._lengths[at], 0)
        self._ends, self._lengths = places, lengths
        self._places[token] = np.append(places, len(self._tokens))
        self._tokens.append(token)

    def _find_breaker(self, first: int) -> None:
        """Find the last breaker; the one known is the last of the first tokens."""
        tokens = self._tokens
        lowest = max(self._head, first - self._max_tail, 0)
        for head in range(len(tokens) - 1, lowest - 1, -1):
            tails = self._breakers.get(tokens[head], ())
            found = [len(t) for t in tails if tuple(tokens[head + 1 : head + 1 + len(t)]) == t]
            if found:
                self._head, self._tail = head, max(found)
                return

    def longest(self, allowed: int, n_window: int) -> tuple[Ints, Ints]:
        """The tokens that would prolong runs of at least `allowed` tokens within the last
        `n_window` (negative: all) and after the last breaker; for each its longest run."""
        n = len(self._tokens)
        start = max(0, n - n_window) if n_window >= 0 else 0
        limit = n - 1 - self._head - self._tail if self._head >= start else n - start
        if n - start <= allowed or limit < allowed:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        ends, lengths = self._ends, self._lengths
        if allowed <= 0:  # Even runs of no tokens.
            ends, lengths = np.arange(start, n - 1), np.zeros(n - 1 - start, np.int64)
            known = self._ends >= start
            lengths[self._ends[known] - start] = self._lengths[known]
        lengths = np.minimum(np.minimum(lengths, limit), ends - start + 1)
        kept = (lengths >= allowed) & (ends >= start)
        following: Any = np.frombuffer(self._tokens, np.int64)[ends[kept] + 1]
        best = np.full(int(following.max(initial=-1)) + 1, -1)
        np.maximum.at(best, following, lengths[kept])
        tokens = np.flatnonzero(best >= 0)
        return tokens, best[tokens]


def _suffix_matches(tokens: Sequence[int]) -> list[int]:
    """For each position but the last: the length of the run ending there that ends `tokens` too."""
    # The Z algorithm on the reversed sequence; linear time.
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
