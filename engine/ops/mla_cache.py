"""MLA_CACHE: the latent of multi-head latent attention, normalised and written to the cache.

    row = [rms(kv[:R]) · norm, turned(kv[R:])]            R = size of norm

kv [T, R + P], norm [R], k_cache [n_blocks, 1, block_size, R + P], PAGED. Of one row per token, all
R + P numbers are the key that every head shares, the first R its value. With q_pe [T, H, P], the
queries' part that meets kv[R:] (its heads may be strided) -> turned(q_pe).

For i < n_rot / 2 the pair (2i, 2i + 1) of these parts turns as a pair of QK_NORM_ROPE does; the
rest of a part passes through. Without rope, n_rot is 0.
"""

import numpy as np

from engine.formats.quants import F32
from engine.graph import Attrs, Cost, Inputs, Live, Node, Op, Out
from engine.ops.base import (
    PAGED,
    Array,
    bytes_moved,
    expect,
    match_placed,
    require_contiguous_rows,
    rms_norm,
    write_rows,
    written_bytes,
)
from engine.ops.rope import RopeScaling, turns


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_placed(inputs, PAGED, kv="T C", norm="R", k_cache="N 1 B C", q_pe="T H P")
    require_contiguous_rows(inputs, "kv")
    require_contiguous_rows(inputs, "q_pe", from_axis=2)
    expect(dims.R <= dims.C, "operand norm", f"at most [{dims.C}]", [dims.R])
    n_rot, d_pe = attrs["n_rot"], dims.C - dims.R
    q_pe = inputs.get("q_pe")
    if q_pe is not None:
        expected, came = (list(map(int, (*q_pe.shape[:2], n))) for n in (d_pe, dims.P))
        expect(d_pe == dims.P, "operand q_pe", str(expected), came)
    wanted = f"an even number up to {d_pe}"
    expect(n_rot in range(0, d_pe + 1, 2), "attribute n_rot", wanted, n_rot)
    return [] if q_pe is None else [(q_pe.shape, F32)]


def rotate_pairs(
    x: Array, positions: Array, n_rot: int, base: float, scaling: RopeScaling
) -> Array:
    """Rotary embedding of x [T, H, P] at positions [T], whose pairs are neighbours."""
    cos, sin = turns(positions, n_rot, base, scaling, x.dtype)
    turned, even, odd = x.copy(), x[..., 0:n_rot:2], x[..., 1:n_rot:2]
    turned[..., 0:n_rot:2] = even * cos - odd * sin
    turned[..., 1:n_rot:2] = odd * cos + even * sin
    return turned


def _reference(
    *, eps: float, n_rot: int, rope_base: float, rope_scaling: RopeScaling, **operands: Array
) -> tuple[Array, ...]:
    kv, norm, rank = operands["kv"][:, np.newaxis], operands["norm"], len(operands["norm"])
    rope = operands["positions"], n_rot, rope_base, rope_scaling
    rows = [rms_norm(kv[..., :rank], eps) * norm, rotate_pairs(kv[..., rank:], *rope)]
    write_rows(operands["k_cache"], np.concatenate(rows, axis=2), operands)
    return (rotate_pairs(operands["q_pe"], *rope),) if "q_pe" in operands else ()


def _cost(node: Node, live: Live) -> Cost:
    cache = node.inputs["k_cache"]
    width = cache.shape[3] + sum(out.shape[1] * out.shape[2] for out in node.outputs)
    nbytes = bytes_moved(node, live) + written_bytes(cache, live)
    return Cost(4 * live.n_tokens * width, nbytes)


MLA_CACHE = Op(
    "MLA_CACHE",
    ("kv", "norm", "k_cache", "q_pe", *PAGED),
    _infer,
    _reference,
    _cost,
    attrs=("eps", "n_rot", "rope_base", "rope_scaling"),
    optional=("q_pe",),
    writes=("k_cache",),
)
