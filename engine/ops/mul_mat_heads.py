"""MUL_MAT_HEADS: each head's row times a matrix of its own; MLA's absorbed projections.

    y[t, h] = w[h] · x[t, h]                      w [H, out, in]
    y[t, h] = w[h]ᵀ · x[t, h]                     with transposed: w [H, in, out]

x [T, H, in], tail [T, H, P] or none (their heads may be strided) -> [T, H, out (+ P)]. The tail is
appended to each row as it is: the part of a query that isn't projected.
"""

import math

import numpy as np

from engine.formats.quants import F32
from engine.graph import Attrs, Cost, Inputs, Live, Node, Op, Out, match_shapes
from engine.ops.base import Array, bytes_moved, require_contiguous_rows


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    weight = "H in out" if attrs["transposed"] else "H out in"
    dims = match_shapes(inputs, x="T H in", weight=weight, tail="T H P")
    require_contiguous_rows(inputs, "x", "tail", from_axis=2)
    return [((dims.T, dims.H, dims.out + dims.get("P", 0)), F32)]


def _reference(
    x: Array, weight: Array, tail: Array | None = None, *, transposed: bool
) -> tuple[Array]:
    pattern = "thi,hio->tho" if transposed else "thi,hoi->tho"
    y = np.einsum(pattern, x, weight, optimize=True)
    return (y if tail is None else np.concatenate([y, tail], axis=2),)


def _cost(node: Node, live: Live) -> Cost:
    flops = 2 * live.n_tokens * math.prod(node.inputs["weight"].shape)
    return Cost(flops, bytes_moved(node, live))


MUL_MAT_HEADS = Op(
    "MUL_MAT_HEADS",
    ("x", "weight", "tail"),
    _infer,
    _reference,
    _cost,
    attrs=("transposed",),
    optional=("tail",),
)
