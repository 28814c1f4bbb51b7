"""MUL_MAT: one activation times several weights, y_i = x · w_iᵀ.

Weights may differ in type. A node of one weight may gate its product per token and add to it:

    y = add + sigmoid(gate) · (x · wᵀ)
"""

import math

from engine.formats.quants import F32
from engine.graph import Attrs, Cost, Graph, Inputs, Live, Node, Op, Out, Tensor, match_shapes
from engine.ops.base import Array, bytes_moved, expect, require_contiguous_rows, sigmoid, with_stem


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_shapes(inputs, x="T in", gate="T 1")
    weights = with_stem(inputs, "weight")
    fits = len(weights) == 1 or not inputs.keys() & {"gate", "add"}
    expect(fits, "operands gate, add", "one weight", len(weights))
    sizes = [match_shapes(inputs, dims, **{name: "out in"}).out for name in weights]
    match_shapes(inputs, dims | {"out": sizes[0]}, add="T out")
    require_contiguous_rows(inputs, "x", "gate", "add")
    return [((dims.T, n_out), F32) for n_out in sizes]


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
    elems = sum(math.prod(t.shape) for t in with_stem(node.inputs, "weight").values())
    return Cost(2 * n_rows * elems, bytes_moved(node, live) if n_rows else 0)


MUL_MAT = Op(
    "MUL_MAT",
    ("x", "weight", "gate", "add"),
    _infer,
    _reference,
    _cost,
    optional=("gate", "add"),
    repeated=("weight",),
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
