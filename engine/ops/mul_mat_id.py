"""MUL_MAT_ID: each token times the matrices of the experts that its router chose.

    y_i[t, u] = w_i[ids[t, u]] · x[t]            x [T, in]: the token's row for all its experts
    y_i[t, u] = w_i[ids[t, u]] · x[t, u]         x [T, U, in]: a row for each
    y[t] = Σ_u weights[t, u] · (…)               with `weights`: summed in the router's order

The routing is known only when the node runs: every expert may get every row.
"""

import math

import numpy as np

from engine.formats.quants import F32, I32
from engine.graph import Attrs, Cost, Graph, Inputs, Live, Node, Op, Out, Tensor, match_shapes
from engine.ops.base import Array, expect, live_bytes, require_contiguous_rows, with_stem


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    x = "T in" if len(inputs["x"].shape) == 2 else "T U in"
    dims = match_shapes(inputs, x=x, ids="T U", weights="T U")
    sizes = []
    for name in with_stem(inputs, "matrix"):
        matrix = match_shapes(inputs, dims, **{name: "X out in"})
        dims["X"] = matrix.X
        sizes.append(matrix.out)
    require_contiguous_rows(inputs, "x", "ids", "weights")
    expect(inputs["ids"].dtype is I32, "operand ids", "I32", inputs["ids"].dtype)
    rows = (dims.T,) if "weights" in inputs else (dims.T, dims.U)
    return [((*rows, n_out), F32) for n_out in sizes]


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
    """Reads as many experts as the rows can choose, and at most all."""
    n_rows = live.n_tokens * node.inputs["ids"].shape[1]
    matrices = with_stem(node.inputs, "matrix").values()
    flops = sum(2 * n_rows * math.prod(m.shape[1:]) for m in matrices)
    nbytes = sum(min(m.shape[0], n_rows) * m.nbytes // m.shape[0] for m in matrices)
    others = [t for t in node.inputs.values() if t not in matrices]
    return Cost(flops, nbytes + sum(live_bytes(t, live) for t in (*others, *node.outputs)))


MUL_MAT_ID = Op(
    "MUL_MAT_ID",
    ("x", "ids", "weights", "matrix"),
    _infer,
    _reference,
    _cost,
    optional=("weights",),
    repeated=("matrix",),
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
