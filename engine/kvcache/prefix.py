"""A radix tree of sequences of 32-bit numbers: of token ids, and of a text's characters.

Some of its nodes keep something, such as a checkpoint. Nodes that keep nothing and have no two
children are merged away, so that the tree is as large as what it keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

ID_BYTES = 4  # Of a number; side by side in bytes they compare at the speed of memory.
K = TypeVar("K")


def packed(ids: Sequence[int]) -> bytes:
    """Token ids as the tree has them."""
    return np.fromiter(ids, np.int32, len(ids)).tobytes()


def unpacked(ids: bytes) -> list[int]:
    return list(map(int, np.frombuffer(ids, np.int32)))


def characters(text: str) -> bytes:
    """A text as a tree has it."""
    return text.encode("utf-32-le", "surrogatepass")


def n_common(a: bytes, b: bytes, at: int = 0) -> int:
    """How many numbers `a` and what follows number `at` in `b` begin with that are the same."""
    begin, low, high = ID_BYTES * at, 0, min(len(a), len(b) - ID_BYTES * at)
    if a[:high] == b[begin : begin + high]:
        return high // ID_BYTES
    while high - low > ID_BYTES:  # The first that differs is among low … high - 1.
        middle = (low + high) // (2 * ID_BYTES) * ID_BYTES
        if a[low:middle] == b[begin + low : begin + middle]:
            low = middle
        else:
            high = middle
    return low // ID_BYTES


@dataclass(eq=False)
class Node(Generic[K]):
    """The position after the numbers of its ancestors' edges and its own; `end`: how many."""

    edge: bytes
    end: int
    parent: Node[K] | None = None
    children: dict[bytes, Node[K]] = field(default_factory=dict)
    kept: K | None = None

    @property
    def ancestors(self) -> Iterator[Node[K]]:
        """Those above it, nearest first."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent

    @property
    def subtree(self) -> Iterator[Node[K]]:
        """It, and all that follow it."""
        stack = [self]
        while stack:
            node = stack.pop()
            stack += node.children.values()
            yield node

    @property
    def path(self) -> bytes:
        """The numbers from the root to here."""
        return b"".join([self.edge, *(node.edge for node in self.ancestors)][::-1])

    @property
    def kept_above(self) -> int:
        """The end of the nearest ancestor that keeps something; 0 if none does."""
        return next((node.end for node in self.ancestors if node.kept is not None), 0)


@dataclass(frozen=True)
class Match(Generic[K]):
    """What a tree has of some numbers: the first `n_known` are on a path of it, and `node` is the
    deepest one on their way that keeps something (None: there is none)."""

    n_known: int
    node: Node[K] | None


class PrefixTree(Generic[K]):
    """The tree. `n_bytes`: of its edges."""

    def __init__(self) -> None:
        self._root: Node[K] = Node(b"", 0)
        self.n_bytes = 0

    def match(self, numbers: bytes, longest: int | None = None) -> Match[K]:
        """What the tree has of `numbers`; the node ends within the first `longest` of them."""
        node, at, found = self._root, 0, None
        while True:
            if node.kept is not None and (longest is None or node.end <= longest):
                found = node
            child = node.children.get(numbers[ID_BYTES * at : ID_BYTES * (at + 1)])
            if child is None:
                return Match(at, found)
            at += n_common(child.edge, numbers, at)
            if at < child.end:
                return Match(at, found)
            node = child

    def put(self, numbers: bytes, kept: K) -> Node[K]:
        """Keep something after `numbers`, in place of what may be there."""
        node, at = self._root, 0
        while ID_BYTES * at < len(numbers):
            key = numbers[ID_BYTES * at : ID_BYTES * (at + 1)]
            child = node.children.get(key)
            if child is None:
                edge = numbers[ID_BYTES * at :]
                child = Node(edge, len(numbers) // ID_BYTES, node)
                node.children[key] = child
                self.n_bytes += len(edge)
            at += n_common(child.edge, numbers, at)
            node = child if at == child.end else _split(child, at)
        node.kept = kept
        return node

    def remove(self, node: Node[K]) -> None:
        """Keep nothing at a node any more."""
        node.kept = None
        while (parent := node.parent) is not None and node.kept is None:
            if len(node.children) > 1:
                return
            if node.children:
                (child,) = node.children.values()
                child.edge, child.parent = node.edge + child.edge, parent
                parent.children[node.edge[:ID_BYTES]] = child
                return
            del parent.children[node.edge[:ID_BYTES]]
            self.n_bytes -= len(node.edge)
            node = parent

    def __iter__(self) -> Iterator[Node[K]]:
        """All nodes that keep something."""
        return (node for node in self._root.subtree if node.kept is not None)


def _split(node: Node[K], end: int) -> Node[K]:
    """A new node above one, at a position within its edge."""
    assert node.parent is not None
    cut = ID_BYTES * (end - node.parent.end)
    above = Node(node.edge[:cut], end, node.parent)
    node.parent.children[node.edge[:ID_BYTES]] = above
    node.edge, node.parent = node.edge[cut:], above
    above.children[node.edge[:ID_BYTES]] = node
    return above
