"""DRY's sequence breakers: which tokens of a vocabulary spell them.

The bytes of all tokens are searched at once, in one text: token by token in Python, a vocabulary of
248,320 takes a second for each breaker.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np

from engine import checks
from engine.sampling.params import SamplingError
from engine.sampling.recent import Breakers, Ints
from engine.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
# As in llama.cpp: breakers are cut to so many bytes, their tails to so many tokens.
_MAX_BYTES, _MAX_TAIL = 40, 20
# More of them could take a second.
_MAX_BREAKERS = 128
# Behind each token. No UTF-8 has this byte, so no breaker is found across tokens.
_END = b"\xff"
Tail = tuple[int, ...]
Trie = dict[int, Any]  # A node: byte -> the next node.


class BreakerSearch:
    """Finds breakers in the tokens of one vocabulary, and keeps the bytes of these."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _pieces(self) -> tuple[bytes, Ints]:
        """The bytes of all tokens, each with _END; where each token begins, and where all end."""
        ids = range(self._tokenizer.n_vocab)
        pieces = [self._tokenizer.token_bytes(i, special=True) + _END for i in ids]
        return b"".join(pieces), np.cumsum([0, *map(len, pieces)])

    def find(self, texts: Sequence[str]) -> Breakers:
        """The tokens that spell one of `texts`: head -> tails; () if it holds all of one.
        Raises SamplingError for too many texts, and for what is not Unicode."""
        if len(texts) > _MAX_BREAKERS:
            expected = f"expected at most {_MAX_BREAKERS} texts"
            raise SamplingError(f"dry_sequence_breakers: {expected}, got {len(texts)}")
        holding = {data: self._holding(data) for data in map(_bytes_of, texts)}
        found: dict[int, tuple[Tail, ...]] = dict.fromkeys(set().union(*holding.values()), ((),))

        @cache
        def rests(end: bytes) -> list[tuple[bytes, Tail]]:
            """The breakers that begin with an end of `end`, each with its tail."""
            cuts = ((b, n) for b in holding for n in range(1, len(b)) if end.endswith(b[:n]))
            return [(b, self._tail(b[n:])) for b, n in cuts]

        @cache
        def tails(end: bytes) -> tuple[Tail, ...]:
            return tuple({tail for _, tail in rests(end)})

        for token, end in self._ending(holding):
            if token in found:
                more = (tail for b, tail in rests(end) if token not in holding[b])
                found[token] = ((), *more)
            else:
                found[token] = tails(end)
        return found

    def _tail(self, rest: bytes) -> Tail:
        return tuple(self._tokenizer.encode(rest.decode("utf-8", "replace"))[:_MAX_TAIL])

    def _holding(self, data: bytes) -> set[int]:
        """The tokens that have `data` in them."""
        (pieces, _), hits, at = self._pieces, list[int](), -1
        while (at := pieces.find(data, at + 1)) >= 0:
            hits.append(at)
        return set(self._tokens_at(hits).tolist())

    def _ending(self, breakers: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        """The tokens that end with the beginning of a breaker, each with the longest such end."""
        trie: Trie = {}
        for data in breakers:
            node = trie
            for byte in data[:-1]:
                node = node.setdefault(byte, {})
        if not trie:
            return
        pieces, starts = self._pieces
        matches = re.finditer(_spelled(trie).removesuffix(b"?") + b"(?=%b)" % _END, pieces)
        spans = [match.span() for match in matches]
        tokens = self._tokens_at([begin for begin, _ in spans])
        # A token that is no UTF-8 may have _END inside.
        for token, (begin, end), stop in zip(
            tokens.tolist(), spans, starts[tokens + 1].tolist(), strict=True
        ):
            if end + 1 == stop:
                yield token, pieces[begin:end]

    def _tokens_at(self, places: Sequence[int]) -> Ints:
        return np.searchsorted(self._pieces[1], np.array(places, np.int64), "right") - 1


def _spelled(trie: Trie) -> bytes:
    """A regex of the longest path of bytes that the text goes on with, if any."""
    paths = [b"\\x%02x" % byte + _spelled(node) for byte, node in trie.items()]
    return b"(?:" + b"|".join(paths) + b")?" if paths else b""


def _bytes_of(text: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        shown = checks.shown(text)
        raise SamplingError(f"dry_sequence_breakers: {shown} cannot be encoded") from None
    if len(data) > _MAX_BYTES:
        shown = checks.shown(text)
        _log.warning("dry_sequence_breakers: %s is cut to %d bytes", shown, _MAX_BYTES)
    return data[:_MAX_BYTES].decode("utf-8", "ignore").encode()
