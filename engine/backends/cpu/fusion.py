"""The consecutive nodes that one kernel computes together: the rows of FUSIONS.

A fusion's kernel lies in engine/ops/cpu/fused/. The graph stays as it is: programs that are watched
node by node do without fusions.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.backends.cpu.lower import Lowering, has_tiles
from engine.backends.native.fusion import Fusion, Readers
from engine.backends.native.signatures import matrices_of
from engine.graph import Node


def _gated_pair(nodes: Sequence[Node], readers: Readers) -> bool:
    """Two products of one activation that only SWIGLU reads, as its gate and up, without limit."""
    product, act = nodes
    if len(product.outputs) != 2 or len(act.outputs) != 1 or any(act.attrs["limits"]):
        return False
    if (
        product.inputs.keys() & {"gate", "add"}
        or len(set(map(has_tiles, matrices_of(product)))) != 1
    ):
        return False
    gate, up = product.outputs
    is_pair = (act.inputs["gate"], act.inputs["up"]) == (gate, up)
    return is_pair and readers.only_by(gate, act) and readers.only_by(up, act)


FUSIONS = (Fusion(("MUL_MAT", "SWIGLU"), _gated_pair, Lowering.mul_mat_swiglu),)
