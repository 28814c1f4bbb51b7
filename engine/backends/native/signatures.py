"""Nodes as instructions: operands and attributes of each kernel, in its order, for all backends.

Views and instructions are numpy records laid out as the structs of engine/ops/cpu/kernel.h and
engine/backends/cpu/executor.cpp, so that a program is a few arrays which one native call runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.graph import Kind, Node, Tensor
from engine.ops.gated_delta_net import ALGORITHMS, HEAD_MAPS
from engine.ops.router import GATINGS

# Ops that read weights in panels, and how their operands' names begin.
PACKED_OPERANDS = {"MUL_MAT": "weight", "MUL_MAT_ID": "matrix", "GET_ROWS": "table"}
_ENUMS = {
    "algorithm": ALGORITHMS,
    "head_map": HEAD_MAPS,
    "act": ("silu", "sigmoid"),
    "gating": GATINGS,
}
_RECURRENT = ("state", "seq_starts", "state_src", "state_dst", "snapshot_dst")
_PAGED = ("positions", "seq_starts", "block_tables")


@dataclass(frozen=True)
class Signature:
    """A kernel's views are `n_outputs` outputs, then `operands`; absent ones are null."""

    n_outputs: int
    operands: tuple[str, ...]
    attrs: tuple[str, ...] = ()


SIGNATURES = {
    "ADD_RMS_NORM": Signature(2, ("x", "weight", "delta"), ("eps",)),
    "ATTENTION": Signature(1, ("q", "k_cache", "v_cache", "gate", *_PAGED), ("scale",)),
    "GATED_DELTA_NET": Signature(
        1, ("q", "k", "v", "g", "beta", *_RECURRENT), ("head_map", "scale", "algorithm")
    ),
    "GDN_GATE": Signature(2, ("alpha", "beta", "a", "dt")),
    "GET_ROWS": Signature(1, ("table", "ids")),
    "L2_NORM": Signature(1, ("x",), ("eps",)),
    "MLA_CACHE": Signature(0, ("kv", "norm", "k_cache", *_PAGED), ("eps",)),
    "MUL_MAT_HEADS": Signature(1, ("x", "weight", "tail"), ("transposed",)),
    "QK_NORM_ROPE": Signature(
        1,
        ("q", "k", "v", "q_norm", "k_norm", "k_cache", "v_cache", *_PAGED),
        ("eps", "n_rot", "rope_base"),
    ),
    "RMS_NORM_GATED": Signature(1, ("x", "gate", "weight"), ("eps", "act")),
    "ROUTER": Signature(2, ("logits", "bias"), ("n_used", "gating", "scale", "eps", "groups")),
    "SSM_CONV": Signature(1, (*_RECURRENT, "x", "weight", "x1", "weight1", "x2", "weight2"), ()),
    "SWIGLU": Signature(1, ("gate", "up")),
}


def numbers(attrs: Mapping[str, Any], names: Iterable[str]) -> list[float]:
    """Attributes as a kernel reads them: choices by their index, tuples one after another."""
    values: list[float] = []
    for name in names:
        value = attrs[name]
        if name in _ENUMS:
            value = _ENUMS[name].index(value)
        values += map(float, value if isinstance(value, tuple) else (value,))
    return values


def parts(node: Node) -> list[tuple[str, list[Tensor | None], list[float]]]:
    """(kernel, views' tensors, attributes) of the instructions of a node that has a signature.

    A node of several independent parts, as SWIGLU's pairs are, becomes one instruction for each.
    """
    signature = SIGNATURES[node.op.name]
    if node.op.name == "SWIGLU":
        names = [(f"gate{i or ''}", f"up{i or ''}") for i in range(len(node.outputs))]
        pairs = zip(names, node.outputs, strict=True)
        return [("SWIGLU", [out, *(node.inputs[n] for n in pair)], []) for pair, out in pairs]
    outputs: list[Tensor | None] = [*node.outputs]
    outputs += [None] * (signature.n_outputs - len(outputs))
    operands = [node.inputs.get(name) for name in signature.operands]
    return [(node.op.name, outputs + operands, numbers(node.attrs, signature.attrs))]


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
