"""Primitive ops that the decomposed delta rule is made of. Only the reference backend runs them.

They cross-check GATED_DELTA_NET, and show in `graph` what one fused node replaces.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from engine.formats.quants import F32
from engine.graph import Attrs, Cost, Graph, Inputs, Live, Node, Op, Out, Shape, Tensor
from engine.ops.base import Array, bytes_moved, elementwise_cost, initial_state, spans


def _unary(
    name: str,
    function: Callable[..., Array],
    shape: Callable[[Shape, Attrs], Shape] = lambda shape, attrs: shape,
    *,
    attrs: tuple[str, ...] = (),
    flops: int = 0,
) -> Op:
    return Op(
        name,
        ("x",),
        lambda inputs, attrs: [(shape(inputs["x"].shape, attrs), F32)],
        lambda x, **attrs: (function(x, **attrs),),
        elementwise_cost(flops),
        attrs=attrs,
    )


def _broadcast(inputs: Inputs, attrs: Attrs) -> list[Out]:
    a, b = inputs["a"].shape, inputs["b"].shape
    assert len(a) == len(b), (a, b)
    assert all(x == y or 1 in (x, y) for x, y in zip(a, b, strict=True)), (a, b)
    return [(tuple(x if y == 1 else y for x, y in zip(a, b, strict=True)), F32)]


def _binary(name: str, function: Callable[[Array, Array], Array]) -> Op:
    return Op(name, ("a", "b"), _broadcast, lambda a, b: (function(a, b),), elementwise_cost(1))


def _tri(x: Array, diagonal: int, fill: float) -> Array:
    kept = np.tri(x.shape[-1], k=-diagonal, dtype=bool)
    return np.where(kept, x, np.asarray(fill, x.dtype))


EXP = _unary("EXP", np.exp, flops=1)
SCALE = _unary("SCALE", lambda x, factor: x * factor, attrs=("factor",), flops=1)
CUMSUM = _unary("CUMSUM", lambda x: np.cumsum(x, axis=-1), flops=1)
SUM_ROWS = _unary("SUM_ROWS", lambda x: np.sum(x, axis=-1), lambda s, _: s[:-1], flops=1)
# Keeps the entries with row - column >= diagonal of the last two axes.
TRI = _unary("TRI", _tri, attrs=("diagonal", "fill"))
REPEAT_HEADS = _unary(
    "REPEAT_HEADS",
    lambda x, heads: np.asarray(x[:, list(heads)]),
    lambda s, attrs: (s[0], len(attrs["heads"]), *s[2:]),
    attrs=("heads",),
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


def _solve(a: Array, b: Array) -> tuple[Array]:
    return (np.linalg.solve(np.eye(a.shape[-1], dtype=a.dtype) + a, b),)


MAT_MUL = Op("MAT_MUL", ("a", "b"), _product_shape, lambda a, b: (a @ b,), _product_cost)
# (I + a) x = b for a strictly lower triangular a.
SOLVE_TRI = Op("SOLVE_TRI", ("a", "b"), _product_shape, _solve, _product_cost)


def _concat(**parts: Array) -> tuple[Array]:
    return (np.stack(list(parts.values()), axis=1),)


def _concat_shape(inputs: Inputs, attrs: Attrs) -> list[Out]:
    first = inputs["part"].shape
    return [((first[0], len(inputs), *first[1:]), F32)]


# Equal parts [S, …], stacked as [S, n, …].
CONCAT = Op("CONCAT", ("part",), _concat_shape, _concat, elementwise_cost(0), repeated=("part",))


def _get_state(state: Array, slots: Array, like: Array) -> tuple[Array]:
    return (np.stack([initial_state(state, slot, like.dtype) for slot in slots]),)


def _set_state(x: Array, state: Array, slots: Array) -> tuple[()]:
    for row, slot in zip(x, slots, strict=True):
        if slot >= 0:
            state[slot] = row
    return ()


GET_STATE = Op(
    "GET_STATE",
    ("state", "slots", "like"),
    lambda inputs, _: [((inputs["slots"].shape[0], *inputs["state"].shape[1:]), F32)],
    _get_state,
    elementwise_cost(0),
)
SET_STATE = Op(
    "SET_STATE",
    ("x", "state", "slots"),
    lambda inputs, _: [],
    _set_state,
    elementwise_cost(0),
    n_outputs=0,
    writes=("state",),
)


def _pad(x: Array, seq_starts: Array, *, n_seqs: int, n_chunks: int, size: int) -> tuple[Array]:
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
    ("x", "seq_starts"),
    lambda i, a: [((a["n_seqs"], a["n_chunks"], a["size"], *i["x"].shape[1:]), F32)],
    _pad,
    elementwise_cost(0),
    attrs=("n_seqs", "n_chunks", "size"),
)
UNPAD_SEQUENCES = Op(
    "UNPAD_SEQUENCES",
    ("x", "seq_starts", "like"),
    lambda i, _: [((i["like"].shape[0], *i["x"].shape[3:]), F32)],
    _unpad,
    elementwise_cost(0),
)


class Composer:
    """Appends primitive nodes whose names start with `prefix` and count up."""

    def __init__(self, graph: Graph, prefix: str) -> None:
        self.graph, self.prefix, self.count = graph, prefix, 0

    def __call__(self, op: Op, *operands: Tensor, **attrs: Any) -> Tensor:
        """The output of a node whose operands come in the op's order."""
        return self.append(op, *operands, **attrs)[0]

    def append(self, op: Op, *operands: Tensor, **attrs: Any) -> tuple[Tensor, ...]:
        """All outputs of such a node; SET_STATE has none."""
        self.count += 1
        names = op.operands
        if op.repeated:
            names = tuple(f"{op.repeated[0]}{i or ''}" for i in range(len(operands)))
        inputs = dict(zip(names, operands, strict=True))
        return self.graph.add(op, f"{self.prefix}.{self.count}.{op.name.lower()}", inputs, **attrs)
