"""Fusion matching: which consecutive nodes of a split one kernel computes together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from engine.graph import Node, Tensor

L = TypeVar("L")


class Readers:
    """The nodes that read each tensor of a split; `kept` tensors are also read after it."""

    def __init__(self, nodes: Iterable[Node], kept: Iterable[Tensor]) -> None:
        self.kept = frozenset(kept)
        self._readers: dict[Tensor, list[tuple[Node, str]]] = defaultdict(list)
        for node in nodes:
            for name, tensor in node.inputs.items():
                self._readers[tensor.base].append((node, name))

    def of(self, tensor: Tensor) -> Sequence[tuple[Node, str]]:
        """(node, operand name) of every reader of a base tensor."""
        return self._readers[tensor]

    def only_by(self, tensor: Tensor, node: Node) -> bool:
        return tensor not in self.kept and all(n is node for n, _ in self._readers[tensor])


@dataclass(frozen=True)
class Fusion(Generic[L]):
    """Consecutive nodes of ops `pattern` that `lower(lowering, nodes)` computes together, where
    `supports(nodes, readers)` says yes."""

    pattern: tuple[str, ...]
    supports: Callable[[Sequence[Node], Readers], bool]
    lower: Callable[[L, Sequence[Node]], None]


def match_fusions(
    nodes: Sequence[Node], readers: Readers, fusions: Sequence[Fusion[L]]
) -> Iterator[tuple[Fusion[L] | None, Sequence[Node]]]:
    """The nodes in order: groups that the first matching fusion takes, and single nodes (None)."""
    i = 0
    while i < len(nodes):
        match: tuple[Fusion[L] | None, Sequence[Node]] = None, nodes[i : i + 1]
        for fusion in fusions:
            group = nodes[i : i + len(fusion.pattern)]
            ops = tuple(node.op.name for node in group)
            if ops == fusion.pattern and fusion.supports(group, readers):
                match = fusion, group
                break
        yield match
        i += len(match[1])
