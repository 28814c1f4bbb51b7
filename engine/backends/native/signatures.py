"""A node's kernel arguments: views and attributes, in the order that its op declares.

The kernels of all native backends index views and attributes in this order.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.graph import Kind, Node, Tensor
from engine.ops import OPS
from engine.ops.mul_mat import MUL_MAT
from engine.ops.mul_mat_id import MUL_MAT_ID

# Ops that read weights in panels, and how their operands' names begin.
PACKED_OPERANDS = {"MUL_MAT": "weight", "MUL_MAT_ID": "matrix", "GET_ROWS": "table"}
# Ops whose kernels take the operands in the op's own order. Products are lowered by hand.
SIGNATURES = {op.name: op for op in OPS.values() if op not in (MUL_MAT, MUL_MAT_ID)}


def numbers(node: Node) -> list[float]:
    """A node's attributes as its kernel reads them: choices by index, tuples one after another."""
    values: list[float] = []
    for name in node.op.attrs:
        value = node.attrs[name]
        if name in node.op.choices:
            value = node.op.choices[name].index(value)
        values += map(float, value if isinstance(value, tuple) else (value,))
    return values


def parts(node: Node) -> list[tuple[str, list[Tensor | None], list[float]]]:
    """(kernel, views' tensors, attributes) of the instructions of a node in SIGNATURES. A node
    whose operands are repeated, as SWIGLU's pairs are, becomes one instruction for each, which gets
    its own entry of every attribute."""
    op = node.op
    if op.repeated:
        made: list[tuple[str, list[Tensor | None], list[float]]] = []
        for i, out in enumerate(node.outputs):
            pair = (node.inputs[f"{name}{i or ''}"] for name in op.operands)
            attrs = [float(node.attrs[name][i]) for name in op.attrs]
            made.append((op.name, [out, *pair], attrs))
        return made
    absent = [None] * (op.n_outputs - len(node.outputs))
    operands = [node.inputs.get(name) for name in op.operands]
    return [(op.name, [*node.outputs, *absent, *operands], numbers(node))]


def used_packed(nodes: Iterable[Node]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of some nodes that are packed, and those that are decoded to float32."""
    packed: dict[Tensor, None] = {}
    plain: dict[Tensor, None] = {}
    for node in nodes:
        for name, t in node.inputs.items():
            if t.kind is Kind.WEIGHT:
                (packed if is_packed(node, name) else plain)[t.base] = None
    return list(packed), list(plain)


def is_packed(node: Node, operand: str) -> bool:
    """Whether a kernel reads a weight in panels."""
    prefix = PACKED_OPERANDS.get(node.op.name)
    return prefix is not None and operand.startswith(prefix)


def is_quantized(w: Tensor) -> bool:
    """Whether a weight meets int8 activations."""
    return w.dtype.block_elems > 1


def matrices_of(node: Node) -> list[Tensor]:
    """The weights that a product reads in panels."""
    return [t for name, t in node.inputs.items() if is_packed(node, name)]
