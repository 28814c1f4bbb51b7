"""A split as a program of the CPU: instructions, where they must wait, and where activations lie.

An instruction waits at a barrier only if it touches what one since the last barrier wrote, or
writes what one read. Between two barriers is a phase; activations whose phases don't overlap share
memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.arena import Arena
from engine.backends.cpu_lowering import I8, parts
from engine.graph import Kind, Node, Tensor
from engine.quants import F32, I32, DType

Array = NDArray[Any]
# Columns that share a scale where activations are int8, and those that share a sum.
ACTIVATION_GROUP, SUM_GROUP = 32, 16
# Ops that read weights in panels, and how their operands' names begin.
_PACKED_OPERANDS = {"MUL_MAT": "weight", "MUL_MAT_ID": "matrix", "GET_ROWS": "table"}
PACKED_KERNELS = frozenset(_PACKED_OPERANDS)
_ITEM = {F32: 4, I32: 4, I8: 1}


@dataclass(frozen=True, eq=False)
class Scratch:
    """A buffer of a program's own; `dtype`: F32, I32 or the code I8."""

    shape: tuple[int, ...]
    dtype: DType | int

    @property
    def nbytes(self) -> int:
        """Bytes at full capacity."""
        return int(np.prod(self.shape)) * _ITEM[self.dtype]


Ref = Tensor | Scratch | None


@dataclass
class Step:
    """One instruction before addresses are known; the first `n_writes` operands are written."""

    kernel: str
    node: Node
    operands: Sequence[Ref]
    attrs: Sequence[float]
    n_writes: int
    phase: int = 0


@dataclass
class Lowering:
    """The steps of a split, in order, with their phases."""

    steps: list[Step] = field(default_factory=list)
    _quantized: dict[tuple[Any, ...], tuple[Scratch, ...]] = field(default_factory=dict)
    _read: set[Any] = field(default_factory=set)
    _written: set[Any] = field(default_factory=set)
    _phase: int = 0

    def add(self, node: Node) -> None:
        """Append a node's instructions."""
        match node.op.name:
            case "MUL_MAT":
                self._mul_mat(node)
            case "MUL_MAT_ID":
                self._mul_mat_id(node)
            case _:
                for kernel, tensors, attrs in parts(node):
                    n_outputs = 1 if kernel == "SWIGLU" else len(node.outputs)
                    self._append(kernel, node, tensors, attrs, n_outputs)

    def _mul_mat(self, node: Node) -> None:
        x, others = node.inputs["x"], (node.inputs.get("gate"), node.inputs.get("add"))
        weights = [t for name, t in node.inputs.items() if name.startswith("weight")]
        quantized = self._quantize(node, x, weights)
        for out, w in zip(node.outputs, weights, strict=True):
            self._append("MUL_MAT", node, [out, x, *quantized, w, *others], [], 1)

    def _mul_mat_id(self, node: Node) -> None:
        x, ids, gates = (node.inputs.get(name) for name in ("x", "ids", "weights"))
        matrices = [t for name, t in node.inputs.items() if name.startswith("matrix")]
        assert x is not None
        assert ids is not None
        quantized = self._quantize(node, x, matrices)
        n_tokens, n_used = ids.shape
        order = Scratch((int(n_tokens) * n_used,), I32)
        starts = Scratch((matrices[0].shape[0] + 1,), I32)
        self._append("SORT_BY_EXPERT", node, [order, starts, ids], [], 2)
        for out, m in zip(node.outputs, matrices, strict=True):
            shape = (n_tokens, n_used, m.shape[1])
            target: Ref = out if gates is None else Scratch(shape, F32)
            operands = [target, x, *quantized, m, order, starts, ids]
            self._append("MUL_MAT_ID", node, operands, [], 1)
            if gates is not None:
                self._append("SUM_EXPERTS", node, [out, target, gates], [], 1)

    def _quantize(self, node: Node, x: Tensor, weights: Sequence[Tensor]) -> tuple[Ref, ...]:
        """x as int8 with scales and sums if a weight needs that; made once for all nodes."""
        if not any(w.dtype.block_elems > 1 for w in weights):
            return (None, None, None)
        key = (x.base, x.offset, x.shape, x.strides)
        if key not in self._quantized:
            *lead, n_in = x.shape
            buffers = (
                Scratch((*lead, n_in), I8),
                Scratch((*lead, n_in // ACTIVATION_GROUP), F32),
                Scratch((*lead, n_in // SUM_GROUP), I32),
            )
            self._append("QUANTIZE_ROWS", node, [*buffers, x], [], 3)
            self._quantized[key] = buffers
        return self._quantized[key]

    def _append(
        self, kernel: str, node: Node, operands: Sequence[Ref], attrs: Sequence[float], n: int
    ) -> None:
        written = {_owner(r) for r in operands[:n] if r is not None}
        written |= {t for t in node.written if t in {_owner(r) for r in operands}}
        read = {_owner(r) for r in operands[n:] if r is not None} - written
        if written & (self._read | self._written) or read & self._written:
            self._phase += 1
            self._read, self._written = set(), set()
        self._read |= read
        self._written |= written
        self.steps.append(Step(kernel, node, operands, attrs, n, self._phase))

    def place(self, arena: Arena[Any], outside: Iterable[Any]) -> None:
        """Find room for all activations and buffers that are not `outside`, with fixed places."""
        elsewhere = set(outside)
        lives: dict[Any, tuple[int, int]] = {}
        for step in self.steps:
            # A node's outputs are looked at when its last step has run, also those nobody reads.
            for ref in (*step.operands, *(t for t in step.node.outputs if t in lives)):
                owner = _owner(ref)
                if owner is None or owner in elsewhere:
                    continue
                if isinstance(owner, Scratch) or owner.kind is Kind.ACTIVATION:
                    first, _ = lives.get(owner, (step.phase, 0))
                    lives[owner] = (first, step.phase)
        arena.plan([(owner, owner.nbytes, *life) for owner, life in lives.items()])


def _owner(ref: Ref) -> Any:
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
    prefix = _PACKED_OPERANDS.get(node.op.name)
    return prefix is not None and operand.startswith(prefix)
