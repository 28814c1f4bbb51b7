"""Which consecutive nodes one kernel computes together: the rows of FUSIONS.

A fusion's kernel lies in engine/ops/cpu/fused/. The graph stays as it is: programs that are watched
node by node do without fusions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.graph import Kind, Node, Tensor
from engine.quants import F16, F32


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


@dataclass(frozen=True)
class Fusion:
    """A kernel for consecutive nodes of ops `pattern`, where `supports(nodes, uses)` says yes."""

    kernel: str
    pattern: tuple[str, ...]
    supports: Callable[[Sequence[Node], Uses], bool]


def has_tiles(weight: Tensor) -> bool:
    """Whether a weight may be rounded to bfloat16: float32 and float16 would lose digits."""
    return weight.dtype not in (F32, F16)


def _gated_pair(nodes: Sequence[Node], uses: Uses) -> bool:
    """Two products of one activation that are nothing but SWIGLU's gate and up."""
    product, act = nodes
    if len(product.outputs) != 2 or len(act.outputs) != 1:
        return False
    if product.inputs.keys() & {"gate", "add"}:
        return False
    if len({has_tiles(t) for t in product.inputs.values() if t.kind is Kind.WEIGHT}) != 1:
        return False
    gate, up = product.outputs
    is_pair = (act.inputs["gate"], act.inputs["up"]) == (gate, up)
    return is_pair and uses.only_by(gate, act) and uses.only_by(up, act)


FUSIONS = (Fusion("MUL_MAT_SWIGLU", ("MUL_MAT", "SWIGLU"), _gated_pair),)


def grouped(nodes: Sequence[Node], uses: Uses) -> Iterator[tuple[Fusion | None, Sequence[Node]]]:
    """The nodes in order, with the fusion of those that are computed together."""
    i = 0
    while i < len(nodes):
        fusion, group = None, nodes[i : i + 1]
        for candidate in FUSIONS:
            some = nodes[i : i + len(candidate.pattern)]
            ops = tuple(node.op.name for node in some)
            if ops == candidate.pattern and candidate.supports(some, uses):
                fusion, group = candidate, some
                break
        yield fusion, group
        i += len(group)
