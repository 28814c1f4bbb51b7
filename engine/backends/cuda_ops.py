"""Every op as launches of the GPU, and what no kernel takes."""

from __future__ import annotations

from engine.backends import cuda_products, cuda_sequences
from engine.backends.cuda_device import Device
from engine.backends.cuda_kernels import SMALL
from engine.backends.cuda_program import Lowering
from engine.backends.lowering import MAX_RANK, parts
from engine.graph import Node

_LOWERINGS = cuda_products.LOWERINGS | cuda_sequences.LOWERINGS


def add_node(lowering: Lowering, node: Node) -> None:
    """Append the launches of a node."""
    if (lower := _LOWERINGS.get(node.op.name)) is not None:
        lower(lowering, node)
        return
    small = SMALL[node.op.name]
    for _, operands, attrs in parts(node):
        n_writes = 1 if node.op.name == "SWIGLU" else len(node.outputs)
        lowering.launch(
            small.source,
            small.kernel,
            [node],
            operands,
            attrs,
            n_writes=n_writes,
            threads=small.threads,
            grid=lambda live: small.grid(node, live),
            shared=small.shared(node),
        )


def unsupported(node: Node, device: Device) -> str:
    """Why a node can't be run on a device; an empty string if it can."""
    name = node.op.name
    if name not in _LOWERINGS and name not in SMALL:
        return f"no kernel for {name}"
    if any(len(t.shape) > MAX_RANK for t in (*node.inputs.values(), *node.outputs)):
        return f"more than {MAX_RANK} dimensions"
    sequences = name in cuda_sequences.LOWERINGS
    where = cuda_sequences if sequences else cuda_products
    return where.unsupported(node, device) if name in _LOWERINGS else ""
