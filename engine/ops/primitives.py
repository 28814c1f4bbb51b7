"""Primitive ops: what the decomposed delta rule is made of. Reference backend only.

They exist to cross-check GATED_DELTA_NET and to show, in `graph`, what one fused node replaces.
Arrays here have any number of axes; binary ops broadcast as numpy does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from engine.formats.quants import F32
from engine.graph import Attrs, Cost, Graph, Inputs, Live, Node, Op, Out, Tensor
from engine.ops.base import Array, bytes_moved, elementwise_cost, initial_state, spans
from engine.ops.cases import Case


def _no_cases() -> Iterable[Case]:
    """Primitives run on the reference backend only, which is their definition."""
    return ()


def _unary(name: str, function: Callable[..., Array], shape: Callable[..., Any], flops: int) -> Op:
    return Op(
        name,
        lambda inputs, attrs: [(shape(inputs["x"].shape, attrs), F32)],
        lambda x, **attrs: (function(x, **attrs),),
        elementwise_cost(flops),
        _no_cases,
    )


def _broadcast(inputs: Inputs, attrs: Attrs) -> list[Out]:
    a, b = inputs["a"].shape, inputs["b"].shape
    assert len(a) == len(b), (a, b)
    assert all(x == y or 1 in (x, y) for x, y in zip(a, b, strict=True)), (a, b)
    return [(tuple(x if y == 1 else y for x, y in zip(a, b, strict=True)), F32)]


def _binary(name: str, function: Callable[[Array, Array], Array]) -> Op:
    return Op(name, _broadcast, lambda a, b: (function(a, b),), elementwise_cost(1), _no_cases)


def _same(shape: tuple[int, ...], attrs: Attrs) -> tuple[int, ...]:
    return shape


def _tri(x: Array, diagonal: int, fill: float) -> Array:
    kept = np.tri(x.shape[-1], k=-diagonal, dtype=bool)
    return np.where(kept, x, np.asarray(fill, x.dtype))


def _repeat_heads(x: Array, heads: tuple[int, ...]) -> Array:
    return np.asarray(x[:, list(heads)])


EXP = _unary("EXP", np.exp, _same, 1)
SCALE = _unary("SCALE", lambda x, factor: x * factor, _same, 1)
CUMSUM = _unary("CUMSUM", lambda x: np.cumsum(x, axis=-1), _same, 1)
SUM_ROWS = _unary("SUM_ROWS", lambda x: np.sum(x, axis=-1), lambda s, _: s[:-1], 1)
# Keeps the entries with row - column >= diagonal of the last two axes.
TRI = _unary(
    "TRI",
    _tri,
    _same,
    0,
)
REPEAT_HEADS = _unary(
    "REPEAT_HEADS",
    _repeat_heads,
    lambda s, attrs: (s[0], len(attrs["heads"]), *s[2:]),
    0,
)
ADD = _binary("ADD", np.add)
SUB = _binary("SUB", np.subtract)
MUL = _binary("MUL", np.multiply)


def _product_shape(inputs: Inputs, attrs: Attrs) -> list[Out]:
    a, b = inputs["a"].shape, inputs["b"].shape
    assert (a[:-2], a[-1]) == (b[:-2], b[-2]), (a, b)
    return [((*a[:-1], b[-1]), F32)]


def _product_cost(node: Node, live: Live) -> Cost:
    inner = node.inputs["a"].shape[-1]
    return Cost(2 * inner * math.prod(live.shape(node.outputs[0].shape)), bytes_moved(node, live))


MAT_MUL = Op("MAT_MUL", _product_shape, lambda a, b: (a @ b,), _product_cost, _no_cases)
# (I + a) x = b for a strictly lower triangular a.
SOLVE_TRI = Op(
    "SOLVE_TRI",
    _product_shape,
    lambda a, b: (np.linalg.solve(np.eye(a.shape[-1], dtype=a.dtype) + a, b),),
    _product_cost,
    _no_cases,
)


def _concat(**parts: Array) -> tuple[Array]:
    return (np.stack(list(parts.values()), axis=1),)


def _concat_shape(inputs: Inputs, attrs: Attrs) -> list[Out]:
    first = inputs["part0"].shape
    return [((first[0], len(inputs), *first[1:]), F32)]


# Equal parts [S, …], stacked as [S, n, …].
CONCAT = Op("CONCAT", _concat_shape, _concat, elementwise_cost(0), _no_cases)


def _get_state(state: Array, slots: Array, like: Array) -> tuple[Array]:
    return (np.stack([initial_state(state, slot, like.dtype) for slot in slots]),)


def _set_state(x: Array, state: Array, slots: Array) -> tuple[()]:
    for row, slot in zip(x, slots, strict=True):
        if slot >= 0:
            state[slot] = row
    return ()


GET_STATE = Op(
    "GET_STATE",
    lambda inputs, _: [((inputs["slots"].shape[0], *inputs["state"].shape[1:]), F32)],
    _get_state,
    elementwise_cost(0),
    _no_cases,
)
SET_STATE = Op(
    "SET_STATE", lambda inputs, _: [], _set_state, elementwise_cost(0), _no_cases, ("state",)
)


def _pad(x: Array, seq_starts: Array, *, n_chunks: int, size: int) -> tuple[Array]:
    out = np.zeros((len(seq_starts) - 1, n_chunks * size, *x.shape[1:]), x.dtype)
    for s, rows in spans(seq_starts):
        out[s, : rows.stop - rows.start] = x[rows]
    return (out.reshape(len(out), n_chunks, size, *x.shape[1:]),)


def _unpad(x: Array, seq_starts: Array, like: Array) -> tuple[Array]:
    out = np.empty((len(like), *x.shape[3:]), x.dtype)
    for s, rows in spans(seq_starts):
        out[rows] = x[s].reshape(-1, *x.shape[3:])[: rows.stop - rows.start]
    return (out,)


# Rows of each sequence, padded with zeros to whole chunks: [T, …] -> [S, n_chunks, size, …].
PAD_SEQUENCES = Op(
    "PAD_SEQUENCES",
    lambda i, a: [((a["n_seqs"], a["n_chunks"], a["size"], *i["x"].shape[1:]), F32)],
    lambda x, seq_starts, n_seqs, **sizes: _pad(x, seq_starts, **sizes),
    elementwise_cost(0),
    _no_cases,
)
UNPAD_SEQUENCES = Op(
    "UNPAD_SEQUENCES",
    lambda i, _: [((i["like"].shape[0], *i["x"].shape[3:]), F32)],
    _unpad,
    elementwise_cost(0),
    _no_cases,
)


class Composer:
    """Appends primitive nodes under one name prefix."""

    def __init__(self, graph: Graph, prefix: str) -> None:
        self.graph, self.prefix, self.count = graph, prefix, 0

    def _name(self, op: Op) -> str:
        self.count += 1
        return f"{self.prefix}.{self.count}.{op.name.lower()}"

    def __call__(self, op: Op, **inputs: Tensor) -> Tensor:
        return self.graph.add(op, self._name(op), inputs)[0]

    def unary(self, op: Op, x: Tensor, **attrs: Any) -> Tensor:
        """A node with one operand and attributes."""
        return self.graph.add(op, self._name(op), {"x": x}, **attrs)[0]

    def pad(self, x: Tensor, seq_starts: Tensor, **attrs: Any) -> Tensor:
        """PAD_SEQUENCES of x."""
        inputs = {"x": x, "seq_starts": seq_starts}
        return self.graph.add(PAD_SEQUENCES, self._name(PAD_SEQUENCES), inputs, **attrs)[0]

    def store(self, x: Tensor, state: Tensor, slots: Tensor) -> None:
        """SET_STATE of x into slots."""
        self.graph.add(SET_STATE, self._name(SET_STATE), {"x": x, "state": state, "slots": slots})
