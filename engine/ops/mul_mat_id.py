"""MUL_MAT_ID: each token times the matrices of the experts that its router chose.

    y_i[t, u] = w_i[ids[t, u]] · x[t]            x [T, in]: the token's row for all its experts
    y_i[t, u] = w_i[ids[t, u]] · x[t, u]         x [T, U, in]: a row for each
    y[t] = Σ_u weights[t, u] · (…)               with `weights`: summed in the router's order

The routing is known when the node runs, not before: shapes don't depend on it, and every expert may
get every row.
"""

from __future__ import annotations

import math

import numpy as np

from engine.formats.quants import F32, I32
from engine.graph import (
    Attrs,
    Cost,
    Graph,
    Inputs,
    Live,
    Node,
    Op,
    Out,
    ShapeError,
    Tensor,
    match_shapes,
)
from engine.ops.base import Array, live_bytes, require_contiguous_rows


def _matrices(inputs: Inputs) -> list[Tensor]:
    return [t for name, t in inputs.items() if name.startswith("matrix")]


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    x, matrices = inputs["x"], _matrices(inputs)
    dims = match_shapes(inputs, x="T in" if len(x.shape) == 2 else "T U in", ids="T U")
    bound = {"in": x.shape[-1]}
    for name in (name for name in inputs if name.startswith("matrix")):
        bound["X"] = match_shapes(inputs, bound, **{name: "X out in"}).X
    require_contiguous_rows(inputs, "x", "ids")
    if inputs["ids"].dtype is not I32:
        raise ShapeError(f"operand ids: expected I32, got {inputs['ids'].dtype.name}")
    if "weights" in inputs:
        match_shapes(inputs, {"T": dims.T, "U": dims.U}, weights="T U")
        require_contiguous_rows(inputs, "weights")
        return [((dims.T, m.shape[1]), F32) for m in matrices]
    return [((dims.T, dims.U, m.shape[1]), F32) for m in matrices]


def _reference(
    x: Array, ids: Array, weights: Array | None = None, **matrices: Array
) -> tuple[Array, ...]:
    rows = np.broadcast_to(x[:, np.newaxis] if x.ndim == 2 else x, (*ids.shape, x.shape[-1]))
    outs = []
    for matrix in matrices.values():
        out = np.empty((*ids.shape, matrix.shape[1]), x.dtype)
        for expert in np.unique(ids):
            chosen = ids == expert
            out[chosen] = rows[chosen] @ matrix[expert].T
        outs.append(out if weights is None else np.einsum("tu,tuo->to", weights, out))
    return tuple(outs)


def _cost(node: Node, live: Live) -> Cost:
    """Bytes of the experts that the rows need at least if they all choose differently."""
    n_used, n_experts = node.inputs["ids"].shape[1], _matrices(node.inputs)[0].shape[0]
    n_rows = live.n_tokens * n_used
    touched = min(n_experts, n_rows)
    flops, nbytes = 0, 0
    for matrix in _matrices(node.inputs):
        flops += 2 * n_rows * math.prod(matrix.shape[1:])
        nbytes += touched * matrix.shape[1] * matrix.dtype.row_bytes(matrix.shape[2])
    others = [t for name, t in node.inputs.items() if not name.startswith("matrix")]
    return Cost(flops, nbytes + sum(live_bytes(t, live) for t in (*others, *node.outputs)))


MUL_MAT_ID = Op(
    "MUL_MAT_ID", ("x", "ids", "weights", "matrix"), _infer, _reference, _cost, repeated=("matrix",)
)


def mul_mat_id(
    graph: Graph,
    name: str,
    x: Tensor,
    ids: Tensor,
    *matrices: Tensor,
    weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """x [T, in] or [T, U, in], ids [T, U] i32, matrices [X, out_i, in] of any stored type
    -> y_i [T, U, out_i]; with weights [T, U] -> their weighted sums [T, out_i]."""
    numbered = {f"matrix{i}": m for i, m in enumerate(matrices)}
    return graph.add(MUL_MAT_ID, name, {"x": x, "ids": ids, "weights": weights, **numbered})
