"""The exact texts of answers with calls, by the ids of the calls.

A client sends an answer back as content and calls, of which a template makes another text than the
model wrote: other spaces, another order, no thinking. The text itself is the one that the prefix
cache knows.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Self

from engine.server.calls import Call
from engine.text.template import Sampled

_OVERHEAD = 512  # Bytes of an entry beside its texts, about.


class Replay(Sampled):
    """An answer with what the client got of it: its content and calls."""

    content: str
    calls: Sequence[Call]

    def __new__(
        cls, text: str, n_thinking: int | None = None, tokens: Sequence[str] = (),
        content: str = "", calls: Sequence[Call] = (),
    ) -> Self:  # fmt: skip
        made = super().__new__(cls, text, n_thinking, tokens)
        made.content, made.calls = content, calls
        return made

    @property
    def n_bytes(self) -> int:
        texts = [self, self.content, *(c.arguments for c in self.calls)]
        return sum(map(sys.getsizeof, texts)) + _OVERHEAD


class Replays:
    """Keeps at most `max_bytes` of answers; those that were used least recently go first. What one
    API key has left no other finds. Any thread may call it."""

    def __init__(self, max_bytes: int = 32 << 20) -> None:
        self._max_bytes, self._n_bytes = max_bytes, 0
        self._kept: OrderedDict[tuple[str, str], Replay] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, key: str, ids: Sequence[str], text: Replay) -> None:
        """Keep the text of an answer with calls of these ids."""
        with self._lock:
            for id in ids:
                self._drop((key, id))
                self._kept[key, id] = text
                self._n_bytes += text.n_bytes
            while self._n_bytes > self._max_bytes:
                self._drop(next(iter(self._kept)))

    def find(self, key: str, id: str) -> Replay | None:
        """The text of the last answer with a call of this id."""
        with self._lock:
            if (found := self._kept.get((key, id))) is not None:
                self._kept.move_to_end((key, id))
            return found

    def _drop(self, entry: tuple[str, str]) -> None:
        if (text := self._kept.pop(entry, None)) is not None:
            self._n_bytes -= text.n_bytes
