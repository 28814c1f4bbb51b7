"""Which consecutive nodes one kernel computes together: the rows of FUSIONS.

A fusion's kernel lies in engine/ops/cpu/fused/. The graph stays as it is: programs that are watched
node by node do without fusions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.backends.native.fusion import Uses
from engine.formats.quants import F16, F32
from engine.graph import Kind, Node, Tensor


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
