"""The oracle of tools/reuse_trace.py: a prefix cache that knows all requests to come.

It keeps states exactly where later prompts leave a sequence. Over its budget it gives up the state
whose next use saves the fewest tokens for each byte: of its state, and of the keys and values that
nothing else keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.kvcache.prefix import ID_BYTES, Node, PrefixTree, n_common


@dataclass(frozen=True)
class Known:
    """A request to the oracle: the ids of its prompt, and all ids that its last state has read."""

    prompt: bytes
    read: bytes


def common_lengths(requests: Sequence[Known]) -> NDArray[np.int32]:
    """[n, n]: how many ids of prompt j > i are those that request i read."""
    common = np.zeros((len(requests), len(requests)), np.int32)
    for i, earlier in enumerate(requests):
        for j in range(i + 1, len(requests)):
            prompt = requests[j].prompt
            if prompt[:ID_BYTES] == earlier.read[:ID_BYTES]:
                common[i, j] = n_common(earlier.read, prompt)
    return common


@dataclass(eq=False)
class _Uses:
    """The later requests whose prompts begin like a state's sequence, in order."""

    of: list[int]

    def next(self, now: int) -> int | None:
        while self.of and self.of[0] <= now:
            del self.of[0]
        return self.of[0] if self.of else None


class Oracle:
    """Its requests run in order. kv_bytes: of a token's keys and values."""

    def __init__(self, budget: int, state_bytes: int, kv_bytes: float) -> None:
        self._budget, self._state_bytes, self._kv_bytes = budget, state_bytes, kv_bytes
        self._tree: PrefixTree[_Uses] = PrefixTree()
        self._n_states = 0

    def run(self, requests: Sequence[Known], common: NDArray[np.int32]) -> int:
        """Tokens of the prompts that it processes. common: `common_lengths` of them."""
        n_processed = 0
        for i, request in enumerate(requests):
            node = self._tree.match(request.prompt).node
            n_processed += len(request.prompt) // ID_BYTES - (node.end if node else 0)
            self._keep(request.read, i, common[i, i + 1 :])
            self._shrink(i)
        return n_processed

    def _keep(self, read: bytes, i: int, common: NDArray[np.int32]) -> None:
        """Keep a state wherever a later prompt leaves what request i has read."""
        for end in sorted({int(n) for n in common if n}):
            ids = read[: ID_BYTES * end]
            node = self._tree.match(ids).node
            if node is None or node.end < end:
                uses = (np.flatnonzero(common >= end) + i + 1).tolist()
                self._tree.put(ids, _Uses(uses))
                self._n_states += 1

    def _shrink(self, now: int) -> None:
        for node in [n for n in self._tree if n.kept and n.kept.next(now) is None]:
            self._remove(node)
        while self._n_bytes > self._budget:
            self._remove(min(self._tree, key=lambda n: self._worth(n, now)))

    @property
    def _n_bytes(self) -> float:
        n_tokens = self._tree.n_bytes / ID_BYTES
        return self._n_states * self._state_bytes + n_tokens * self._kv_bytes

    def _remove(self, node: Node[_Uses]) -> None:
        self._tree.remove(node)
        self._n_states -= 1

    def _worth(self, node: Node[_Uses], now: int) -> float:
        """Tokens saved per byte by its next use, for each request until then."""
        assert node.kept is not None
        at = node.kept.next(now)
        assert at is not None
        n_own = 0 if node.children else len(node.edge) / ID_BYTES
        n_bytes = self._state_bytes + n_own * self._kv_bytes
        return (node.end - node.kept_above) / n_bytes / (at - now)
