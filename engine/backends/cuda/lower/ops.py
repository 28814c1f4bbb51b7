"""Every op as launches of the GPU, and what no kernel takes."""

from __future__ import annotations

from engine.backends.cuda.device import Device
from engine.backends.cuda.launches import Lowering
from engine.backends.cuda.lower import gated_delta_net as cuda_sequences
from engine.backends.cuda.lower import mul_mat as cuda_products
from engine.backends.cuda.lower import mul_mat_id as cuda_experts
from engine.backends.cuda.lower import simple as cuda_kernels
from engine.backends.cuda.lower.simple import SMALL, add_small
from engine.backends.native.views import MAX_RANK
from engine.graph import Node

_GROUPS = (cuda_products, cuda_experts, cuda_sequences)
_LOWERINGS = {name: lower for group in _GROUPS for name, lower in group.LOWERINGS.items()}
OPS_WITH_KERNELS = {*_LOWERINGS, *SMALL, "SWIGLU"}


def add_node(lowering: Lowering, node: Node) -> None:
    """Append the launches of a node."""
    if (lower := _LOWERINGS.get(node.op.name)) is not None:
        lower(lowering, node)
        return
    add_small(lowering, node)


def unsupported(node: Node, device: Device) -> str:
    """Why a node can't be run on a device; an empty string if it can."""
    name = node.op.name
    if name not in OPS_WITH_KERNELS:
        return f"no kernel for {name}"
    if any(len(t.shape) > MAX_RANK for t in (*node.inputs.values(), *node.outputs)):
        return f"more than {MAX_RANK} dimensions"
    for group in _GROUPS:
        if name in group.LOWERINGS:
            reason: str = group.unsupported(node, device)
            return reason
    return cuda_kernels.unsupported(node)
