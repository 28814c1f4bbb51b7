"""What reads the tensors of a split, and which consecutive nodes are computed together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from engine.graph import Node, Tensor


@dataclass
class Uses:
    """What reads each tensor of a split (by its base), and what is needed outside."""

    readers: dict[Tensor, list[tuple[Node, str]]] = field(default_factory=lambda: defaultdict(list))
    kept: frozenset[Tensor] = frozenset()

    @classmethod
    def of(cls, nodes: Iterable[Node], kept: Iterable[Tensor]) -> Uses:
        """Those of some nodes, whose outputs `kept` are read later."""
        uses = cls(kept=frozenset(kept))
        for node in nodes:
            for name, tensor in node.inputs.items():
                uses.readers[tensor.base].append((node, name))
        return uses

    def only_by(self, tensor: Tensor, node: Node) -> bool:
        """Whether nothing but a node reads a tensor."""
        return tensor not in self.kept and all(n is node for n, _ in self.readers[tensor])


class Pattern(Protocol):
    """A fusion: consecutive nodes of ops `pattern`, where `supports(nodes, uses)` says yes."""

    @property
    def pattern(self) -> tuple[str, ...]:
        """Their ops."""

    @property
    def supports(self) -> Callable[[Sequence[Node], Uses], bool]:
        """Whether they can be computed together."""


P = TypeVar("P", bound=Pattern)


def grouped(
    nodes: Sequence[Node], uses: Uses, fusions: Sequence[P]
) -> Iterator[tuple[P | None, Sequence[Node]]]:
    """The nodes in order, with the first fusion of those that are computed together."""
    i = 0
    while i < len(nodes):
        fusion, group = None, nodes[i : i + 1]
        for candidate in fusions:
            some = nodes[i : i + len(candidate.pattern)]
            ops = tuple(node.op.name for node in some)
            if ops == candidate.pattern and candidate.supports(some, uses):
                fusion, group = candidate, some
                break
        yield fusion, group
        i += len(group)
