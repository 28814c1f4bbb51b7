"""MUL_MAT: one activation times several weights, y_i = x · w_iᵀ.

Weights may differ in type; the activation is the same for all, so a backend prepares it once. With
one weight, the product may be gated per token and added to something:

    y = add + sigmoid(gate) · (x · wᵀ)
"""

from __future__ import annotations

import math

from engine.formats.quants import F32
from engine.graph import Attrs, Cost, Graph, Inputs, Live, Node, Op, Out, ShapeError, Tensor
from engine.ops.base import Array, bytes_moved, require_contiguous_rows, sigmoid


def _weights(inputs: Inputs) -> list[tuple[str, Tensor]]:
    return [(name, t) for name, t in inputs.items() if name.startswith("weight")]


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    x = inputs["x"]
    if len(x.shape) != 2:
        raise ShapeError(f"operand x: expected [T, in], got {list(x.shape)}")
    require_contiguous_rows(inputs, "x")
    weights = _weights(inputs)
    if len(weights) > 1 and inputs.keys() & {"gate", "add"}:
        raise ShapeError(f"operands gate, add: expected one weight, got {len(weights)}")
    for operand, width in (("gate", 1), ("add", weights[0][1].shape[0])):
        if operand in inputs and inputs[operand].shape != (x.shape[0], width):
            came = list(map(int, inputs[operand].shape))
            raise ShapeError(f"operand {operand}: expected [T, {width}], got {came}")
        if operand in inputs:
            require_contiguous_rows(inputs, operand)
    for name, w in weights:
        if len(w.shape) != 2 or w.shape[1] != x.shape[1]:
            raise ShapeError(f"operand {name}: expected [out, {x.shape[1]}], got {list(w.shape)}")
    return [((x.shape[0], w.shape[0]), F32) for _, w in weights]


def _reference(
    x: Array, gate: Array | None = None, add: Array | None = None, **weights: Array
) -> tuple[Array, ...]:
    products = [x @ w.T for w in weights.values()]
    if gate is not None:
        products = [sigmoid(gate) * y for y in products]
    if add is not None:
        products = [add + y for y in products]
    return tuple(products)


def _cost(node: Node, live: Live) -> Cost:
    n_rows = live.shape(node.outputs[0].shape)[0]
    elems = sum(math.prod(t.shape) for _, t in _weights(node.inputs))
    return Cost(2 * n_rows * elems, bytes_moved(node, live) if n_rows else 0)


MUL_MAT = Op(
    "MUL_MAT", ("x", "weight", "gate", "add"), _infer, _reference, _cost, repeated=("weight",)
)


def mul_mat(
    graph: Graph,
    name: str,
    x: Tensor,
    *weights: Tensor,
    gate: Tensor | None = None,
    add: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """x [T, in] f32, weights [out_i, in] of any stored type -> y_i [T, out_i] f32.

    gate [T, 1], before its sigmoid, and add [T, out]: with one weight only.
    """
    numbered = {f"weight{i}": w for i, w in enumerate(weights)}
    return graph.add(MUL_MAT, name, {"x": x, **numbered, "gate": gate, "add": add})
