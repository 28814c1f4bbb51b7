"""MUL_MAT: one activation times several weights, y_i = x · w_iᵀ.

Weights may differ in type; the activation is the same for all, so a backend prepares it once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from engine.graph import Attrs, Cost, Graph, Inputs, Live, Node, Op, Out, ShapeError, Tensor
from engine.ops.cases import Case, Operand, Rng, activation, case, weight
from engine.ops.common import Array, bytes_moved, require_contiguous_rows
from engine.quants import BF16, F16, F32, WEIGHT_TYPES, DType


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    x = inputs["x"]
    if len(x.shape) != 2:
        raise ShapeError(f"operand x: expected [T, in], got {list(x.shape)}")
    require_contiguous_rows(inputs, "x")
    weights = [(name, t) for name, t in inputs.items() if name != "x"]
    for name, w in weights:
        if len(w.shape) != 2 or w.shape[1] != x.shape[1]:
            raise ShapeError(f"operand {name}: expected [out, {x.shape[1]}], got {list(w.shape)}")
    return [((x.shape[0], w.shape[0]), F32) for _, w in weights]


def _reference(x: Array, **weights: Array) -> tuple[Array, ...]:
    return tuple(x @ w.T for w in weights.values())


def _cost(node: Node, live: Live) -> Cost:
    n_rows = live.shape(node.outputs[0].shape)[0]
    elems = sum(math.prod(t.shape) for name, t in node.inputs.items() if name != "x")
    return Cost(2 * n_rows * elems, bytes_moved(node, live) if n_rows else 0)


def _cases() -> Iterable[Case]:
    def make(rng: Rng, n_tokens: int, n_in: int, sizes: dict[int, DType]) -> dict[str, Operand]:
        weights = {
            f"weight{i}": weight(rng.normal(size=(n_out, n_in)) * 0.05, dtype)
            for i, (n_out, dtype) in enumerate(sizes.items())
        }
        return {"x": activation(rng.normal(size=(n_tokens, n_in))), **weights}

    mixed = {48: WEIGHT_TYPES["Q8_0"], 7: F32, 33: WEIGHT_TYPES["Q4_0"], 16: BF16, 5: F16}
    for n_tokens in (1, 2, 17):
        yield case(make, {}, n_tokens=n_tokens, n_in=96, sizes=mixed)
    yield case(make, {}, n_tokens=3, n_in=2048, sizes={130: F32})


MUL_MAT = Op("MUL_MAT", _infer, _reference, _cost, _cases)


def mul_mat(graph: Graph, name: str, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x [T, in] f32, weights [out_i, in] of any stored type -> y_i [T, out_i] f32."""
    operands = {f"weight{i}": w for i, w in enumerate(weights)}
    return graph.add(MUL_MAT, name, {"x": x, **operands})
