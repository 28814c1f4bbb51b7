"""Every op as launches: one table of op -> (lowering, why its kernels refuse a node, or "")."""

from __future__ import annotations

from collections.abc import Callable

from engine.backends.cuda.device import Device
from engine.backends.cuda.launches import Lowering
from engine.backends.cuda.lower import attention, gated_delta_net, mul_mat, mul_mat_id, simple
from engine.graph import Node

_MODULES = (attention, gated_delta_net, mul_mat, mul_mat_id, simple)
LOWERINGS: dict[str, tuple[Callable[[Lowering, Node], None], Callable[[Node, Device], str]]] = {
    op: (lower, module.unsupported) for module in _MODULES for op, lower in module.LOWERINGS.items()
}


def lower_node(lowering: Lowering, node: Node) -> None:
    lower, _ = LOWERINGS[node.op.name]
    lower(lowering, node)
