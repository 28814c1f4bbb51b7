"""Nodes as instructions: operands and attributes of each kernel, in its order, for all backends.

Views and instructions are numpy records laid out as the structs of engine/ops/cpu/kernel.h and
engine/backends/cpu/executor.cpp, so that a program is a few arrays which one native call runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.native.buffers import Arena
from engine.formats.quants import F16, F32, I32, DType
from engine.graph import Dim, Kind, Node, Tensor
from engine.ops.gated_delta_net import ALGORITHMS, HEAD_MAPS
from engine.ops.router import GATINGS

MAX_RANK = 4
# As Dim and DType in kernel.h.
DIMS = ("", "n_tokens", "n_seqs", "n_seqs + 1", "n_outputs")
F32_CODE, F16_CODE, I32_CODE, I8, PACKED, BF16 = range(6)
DTYPES = {F32: F32_CODE, F16: F16_CODE, I32: I32_CODE}
# Ops that read weights in panels, and how their operands' names begin.
PACKED_OPERANDS = {"MUL_MAT": "weight", "MUL_MAT_ID": "matrix", "GET_ROWS": "table"}
_ITEM = {F32: 4, I32: 4, I8: 1, BF16: 2}

VIEW = np.dtype(
    [
        ("data", "u8"),
        ("shape", "i8", MAX_RANK),
        ("stride", "i8", MAX_RANK),
        ("rank", "i4"),
        ("dtype", "i4"),
        ("dim", "i4"),
        ("layout", "i4"),
    ]
)
INSTRUCTION = np.dtype([("kernel", "u8"), ("views", "u8"), ("attrs", "u8"), ("barrier", "i8")])

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


def view(
    address: int,
    shape: Iterable[int],
    strides: Iterable[int],
    dtype: int,
    layout: int = 0,
) -> NDArray[Any]:
    """A record of VIEW; strides count elements, or bytes where the dtype is PACKED."""
    record = np.zeros((), VIEW)
    shape, strides = tuple(shape), tuple(strides)
    record["data"], record["rank"] = address, len(shape)
    record["shape"][: len(shape)] = shape
    record["stride"][: len(strides)] = strides
    record["dtype"], record["layout"] = dtype, layout
    first = shape[0] if shape else 0
    record["dim"] = DIMS.index(first.name) if isinstance(first, Dim) and first.name in DIMS else 0
    return record


def tensor_view(tensor: Tensor, base_address: int, dtype: DType | None = None) -> NDArray[Any]:
    """The view of a plain tensor whose base lies at an address."""
    code = DTYPES[dtype or tensor.dtype]
    item = 2 if code == F16_CODE else 4
    return view(base_address + tensor.offset * item, tensor.shape, tensor.strides, code)


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


@dataclass(frozen=True, eq=False)
class Scratch:
    """A buffer of a program's own; `dtype`: F32, I32 or the codes I8 and BF16."""

    shape: tuple[int, ...]
    dtype: DType | int

    @property
    def nbytes(self) -> int:
        """Bytes at full capacity."""
        return int(np.prod(self.shape)) * _ITEM[self.dtype]


class Zeros(Scratch):
    """One with a place of its own: zeros at first, and again whenever a step is done."""


Ref = Tensor | Scratch | None


def owner_of(ref: Ref) -> Any:
    """What owns an operand's memory: a base tensor, or a buffer."""
    return ref.base if isinstance(ref, Tensor) else ref


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


def view_key(x: Tensor) -> tuple[Any, ...]:
    """Equal for views of the same part of a tensor."""
    return (x.base, x.offset, x.shape, x.strides)


def place_buffers(
    steps: Iterable[tuple[int, Sequence[Node], Sequence[Ref]]],
    arena: Arena[Any],
    outside: Iterable[Any],
) -> None:
    """Find room for all activations and buffers that are not `outside`, with fixed places.

    steps: when each runs, never falling, its nodes, and its operands.
    """
    elsewhere = set(outside)
    lives: dict[Any, tuple[int, int]] = {}
    for time, nodes, operands in steps:
        # A node's outputs are looked at when its last step has run, also those nobody reads.
        made = (t for node in nodes for t in node.outputs if t in lives)
        for ref in (*operands, *made):
            owner = owner_of(ref)
            if owner is None or owner in elsewhere:
                continue
            if isinstance(owner, Scratch) or owner.kind is Kind.ACTIVATION:
                first, _ = lives.get(owner, (time, 0))
                lives[owner] = (first, time)
    arena.plan([(owner, owner.nbytes, *life) for owner, life in lives.items()])
