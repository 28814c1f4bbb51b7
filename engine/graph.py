"""The compute graph: tensors, nodes, and the contract that every op fulfils.

A graph is built once, at a capacity: dimensions that vary from batch to batch are `Dim`s, whose
live counts come with each batch. Append order is execution order. Views (slice, unflatten, …) are
metadata on tensors, never nodes. State is updated in place, by nodes that name it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from engine.errors import EngineError
from engine.formats.quants import F32, I32, DType


class ShapeError(EngineError):
    """Operands don't fit together; the message names op, node, operand, expected and given."""


class Dim(int):
    """A dimension whose live count varies: an int (the capacity) with the name of that count."""

    name: str

    def __new__(cls, capacity: int, name: str) -> Dim:
        dim = super().__new__(cls, capacity)
        dim.name = name
        return dim

    def __repr__(self) -> str:
        return f"{self.name}≤{int(self)}"


Shape = tuple[int, ...]


class Kind(Enum):
    """The origin of a tensor's contents: the file, the batch, earlier steps, or a node."""

    WEIGHT = "weight"
    INPUT = "input"
    STATE = "state"
    ACTIVATION = "activation"


def _contiguous_strides(shape: Shape) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@dataclass(frozen=True, eq=False)
class Tensor:
    """A row-major array, its own `base`, or a view of one with `strides` and `offset` in elements.

    Tensors are compared by identity.
    """

    name: str
    shape: Shape
    dtype: DType
    kind: Kind
    strides: tuple[int, ...] = ()
    offset: int = 0
    view_of: Tensor | None = None

    def __post_init__(self) -> None:
        if self.view_of is None:
            object.__setattr__(self, "strides", _contiguous_strides(self.shape))

    @property
    def base(self) -> Tensor:
        """The tensor that owns the memory."""
        return self if self.view_of is None else self.view_of

    @property
    def nbytes(self) -> int:
        """Bytes at full capacity, as stored."""
        return self.dtype.nbytes(self.shape)

    def is_contiguous(self, from_axis: int = 0) -> bool:
        """Whether the axes from `from_axis` on lie without gaps."""
        inner = self.shape[from_axis:]
        return self.strides[from_axis:] == _contiguous_strides(inner)

    def _view(self, shape: Shape, strides: tuple[int, ...], offset: int) -> Tensor:
        return Tensor(self.name, shape, self.dtype, self.kind, strides, offset, self.base)

    def slice(self, axis: int, start: int, stop: int) -> Tensor:
        assert 0 <= start <= stop <= self.shape[axis], (self, axis, start, stop)
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        return self._view(shape, self.strides, self.offset + start * self.strides[axis])

    def select(self, axis: int, index: int) -> Tensor:
        """One index of an axis, which disappears."""
        part = self.slice(axis, index, index + 1)
        return self._view(
            part.shape[:axis] + part.shape[axis + 1 :],
            part.strides[:axis] + part.strides[axis + 1 :],
            part.offset,
        )

    def unflatten(self, axis: int, *sizes: int) -> Tensor:
        assert math.prod(sizes) == self.shape[axis], (self, axis, sizes)
        inner = tuple(s * self.strides[axis] for s in _contiguous_strides(sizes))
        return self._view(
            (*self.shape[:axis], *sizes, *self.shape[axis + 1 :]),
            (*self.strides[:axis], *inner, *self.strides[axis + 1 :]),
            self.offset,
        )

    def flatten(self, axis: int) -> Tensor:
        """All axes from `axis` on as one; they must lie without gaps."""
        assert self.is_contiguous(axis), self
        shape = (*self.shape[:axis], math.prod(self.shape[axis:]))
        return self._view(shape, (*self.strides[:axis], 1), self.offset)

    def permute(self, *axes: int) -> Tensor:
        return self._view(
            tuple(self.shape[a] for a in axes), tuple(self.strides[a] for a in axes), self.offset
        )

    def expand(self, axis: int, size: int = 1) -> Tensor:
        """A new axis of `size` equal entries (stride 0)."""
        return self._view(
            (*self.shape[:axis], size, *self.shape[axis:]),
            (*self.strides[:axis], 0, *self.strides[axis:]),
            self.offset,
        )

    def __repr__(self) -> str:
        return f"{self.name}[{', '.join(map(repr, self.shape))}]:{self.dtype.name}"


@dataclass(frozen=True)
class Live:
    """The live counts of one batch; `kv_rows`: cached positions summed over sequences, `kv_pairs`:
    over tokens. `chunks`: (cached positions, rows) of each sequence, in the order of rows."""

    n_tokens: int
    n_seqs: int
    n_outputs: int
    kv_rows: int = 0
    kv_pairs: int = 0
    chunks: tuple[tuple[int, int], ...] = ()

    def dim(self, name: str) -> int | None:
        """The live count of a `Dim`, or None if it always has its capacity (slots, blocks)."""
        counts = {"n_tokens": self.n_tokens, "n_seqs": self.n_seqs, "n_outputs": self.n_outputs}
        return self.n_seqs + 1 if name == "n_seqs + 1" else counts.get(name)

    def shape(self, shape: Shape) -> Shape:
        """`shape` with every varying dimension at its live count."""
        counts = (self.dim(d.name) if isinstance(d, Dim) else None for d in shape)
        return tuple(d if n is None else n for d, n in zip(shape, counts, strict=True))


@dataclass(frozen=True)
class Cost:
    """Work of a node: floating point operations, and bytes that must cross the memory bus."""

    flops: int
    bytes: int


Inputs = Mapping[str, Tensor]
Attrs = Mapping[str, Any]
# One output of a node: its shape and element type.
Out = tuple[Shape, DType]


@dataclass(frozen=True, eq=False)
class Op:
    """The contract of an op.

    `operands`: names of the inputs. A kernel's views are the `n_outputs` outputs, then these, in
        this order. `optional` ones may be absent: their views are null. `repeated` ones may come
        several times, numbered (`gate`, `gate1`, …), with an output each. The op writes those in
        `writes`.
    `infer(inputs, attrs)` checks shapes and returns the outputs; it raises ShapeError.
    `reference(**arrays, **attrs)` is the definition in numpy, of the live rows only. It returns a
        tuple of arrays and writes state in place.
    `attrs`: names of the attributes, in the kernels' order. `choices`: the values of those that are
        words; kernels get the index.
    """

    name: str
    operands: tuple[str, ...]
    infer: Callable[[Inputs, Attrs], Sequence[Out]]
    reference: Callable[..., tuple[np.ndarray[Any, Any], ...]]
    cost: Callable[[Node, Live], Cost]
    n_outputs: int = 1
    attrs: tuple[str, ...] = ()
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    def check_names(self, inputs: Inputs, attrs: Attrs) -> None:
        plain = {name for name in inputs if name.rstrip("0123456789") not in self.repeated}
        required = {*self.operands} - {*self.optional, *self.repeated}
        assert required <= plain <= {*self.operands}, f"{self.name}: operands {list(inputs)}"
        assert attrs.keys() == {*self.attrs}, f"{self.name}: attributes {list(attrs)}"
        for name, values in self.choices.items():
            assert attrs[name] in values, f"{self.name}: {name} is {attrs[name]}"


@dataclass(frozen=True, eq=False)
class Node:
    """One operation of the graph; `inputs` by operand name, in the op's order."""

    op: Op
    name: str
    inputs: Inputs
    outputs: tuple[Tensor, ...]
    attrs: Attrs

    @property
    def written(self) -> list[Tensor]:
        """The STATE tensors that this node writes."""
        return [self.inputs[operand].base for operand in self.op.writes]

    @property
    def layer(self) -> str:
        """The start of the name that all nodes of its layer share, such as `blk.3`."""
        return ".".join(self.name.split(".")[:2])

    def __repr__(self) -> str:
        return f"{self.op.name} {self.name}"


@dataclass(frozen=True)
class Capacity:
    """The sizes that a graph is built for: the most of one batch, and all slots and blocks."""

    n_tokens: int
    n_seqs: int = 1
    n_outputs: int = 1
    n_slots: int = 1
    n_blocks: int = 1
    n_snapshots: int = 0
    block_size: int = 64


@dataclass
class Graph:
    """Nodes in execution order, and the tensors that come from outside them, by name. `kept`:
    tensors that can be read after a step, beside the outputs."""

    capacity: Capacity
    nodes: list[Node] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    layer_kinds: dict[str, str] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)

    def input(self, name: str, shape: Shape) -> Tensor:
        return self._declare(self.inputs, Tensor(name, shape, I32, Kind.INPUT))

    def weight(self, name: str, shape: Shape, dtype: DType) -> Tensor:
        """A WEIGHT tensor; the second call with the same name gives the same tensor."""
        if (known := self.weights.get(name)) is not None:
            assert (known.shape, known.dtype) == (shape, dtype), known
            return known
        return self._declare(self.weights, Tensor(name, shape, dtype, Kind.WEIGHT))

    def state(self, name: str, shape: Shape, dtype: DType = F32) -> Tensor:
        """Declare a STATE tensor; its first dimension is the `Dim` of slots or of blocks."""
        return self._declare(self.states, Tensor(name, shape, dtype, Kind.STATE))

    @staticmethod
    def _declare(group: dict[str, Tensor], tensor: Tensor) -> Tensor:
        assert tensor.name not in group, tensor.name
        group[tensor.name] = tensor
        return tensor

    def add(
        self, op: Op, name: str, operands: Mapping[str, Tensor | None], **attrs: Any
    ) -> tuple[Tensor, ...]:
        """Append a node and return its outputs, or raise ShapeError; None is an absent operand."""
        inputs = {operand: t for operand, t in operands.items() if t is not None}
        op.check_names(inputs, attrs)
        try:
            outs = op.infer(inputs, attrs)
        except ShapeError as error:
            raise ShapeError(f"{op.name} {name}: {error}") from None
        for operand in op.writes:
            assert inputs[operand].kind is Kind.STATE, (op.name, name, operand)
        outputs = tuple(
            Tensor(name if i == 0 else f"{name}.{i}", shape, dtype, Kind.ACTIVATION)
            for i, (shape, dtype) in enumerate(outs)
        )
        self.nodes.append(Node(op, name, inputs, outputs, attrs))
        return outputs

    def state_bytes(self) -> tuple[int, int]:
        """Bytes of the recurrent states and of the KV cache, at capacity."""
        kv = sum(t.nbytes for t in self.states.values() if dim_name(t) == "n_blocks")
        return sum(t.nbytes for t in self.states.values()) - kv, kv


def dim_name(tensor: Tensor) -> str:
    """The name of a tensor's first dimension if it varies, else an empty string."""
    return getattr(tensor.shape[0], "name", "")


class Dims(dict[str, int]):
    """Sizes by letter: `dims.T`, or `dims["in"]`."""

    def __getattr__(self, name: str) -> int:
        return self[name]


def match_shapes(inputs: Inputs, dims: Mapping[str, int] | None = None, /, **patterns: str) -> Dims:
    """Check operands' shapes against patterns such as `q="T Hk Dk"`; returns the letters' sizes.

    Numbers are literal; letters in `dims` are bound already; absent operands are skipped. Raises
    ShapeError for the first operand that disagrees.
    """
    bound = Dims(dims or {})
    for operand, pattern in patterns.items():
        if operand not in inputs:
            continue
        shape, names = inputs[operand].shape, pattern.split()
        expected = [int(n) if n.isdigit() else bound.get(n) for n in names]
        fits = len(shape) == len(names) and all(
            e is None or e == s for e, s in zip(expected, shape, strict=True)
        )
        if not fits:
            want = ", ".join(
                n if e is None or n.isdigit() else f"{n}={int(e)}"
                for n, e in zip(names, expected, strict=True)
            )
            raise ShapeError(f"operand {operand}: expected [{want}], got {list(map(int, shape))}")
        bound |= {n: size for n, size in zip(names, shape, strict=True) if n not in bound}
    return bound
