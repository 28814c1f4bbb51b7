"""QK_NORM_ROPE: RMS norm and rotary embedding of queries and keys; keys and values go to the cache.

q [T, H, D] (its heads may be strided), k, v [T, Hkv, D], q_norm, k_norm [D], k_cache, v_cache
[n_blocks, Hkv, block_size, D], PAGED -> the rotated q.

Rotation in NeoX halves: for i < n_rot / 2 the pair (i, i + n_rot / 2) turns by
position · base^(-2i / n_rot), scaled as RopeScaling says; the rest of the head passes through. Text
has the same position on every axis of Qwen3.5's interleaved M-RoPE, which is therefore this (as
transformers computes it).
"""

import math

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
    patterns = {"q": "T H D", "k": "T Hkv D", "v": "T Hkv D", "q_norm": "D", "k_norm": "D"}
    patterns |= {"k_cache": "N Hkv B D", "v_cache": "N Hkv B D"}
    dims = match_placed(inputs, PAGED, **patterns)
    require_contiguous_rows(inputs, "k", "v")
    require_contiguous_rows(inputs, "q", from_axis=2)
    n_rot, wanted = attrs["n_rot"], f"an even number up to {dims.D}"
    expect(n_rot % 2 == 0 and 0 <= n_rot <= dims.D, "attribute n_rot", wanted, n_rot)
    return [((dims.T, dims.H, dims.D), F32)]


def rotate(x: Array, positions: Array, n_rot: int, base: float, scaling: RopeScaling) -> Array:
    """Rotary embedding of x [T, H, D] at positions [T]."""
    (cos, sin), half = turns(positions, n_rot, base, scaling, x.dtype), n_rot // 2
    first, second = x[..., :half], x[..., half:n_rot]
    turned = [first * cos - second * sin, second * cos + first * sin, x[..., n_rot:]]
    return np.concatenate(turned, axis=-1)


def _reference(
    *, eps: float, n_rot: int, rope_base: float, rope_scaling: RopeScaling, **operands: Array
) -> tuple[Array]:
    positions, made = operands["positions"], []
    for name in ("q", "k"):
        normed = rms_norm(operands[name], eps) * operands[f"{name}_norm"]
        made.append(rotate(normed, positions, n_rot, rope_base, rope_scaling))
    q, k = made
    write_rows(operands["k_cache"], k, operands)
    write_rows(operands["v_cache"], operands["v"], operands)
    return (q,)


def _cost(node: Node, live: Live) -> Cost:
    elems = sum(math.prod(live.shape(node.inputs[x].shape)) for x in ("q", "k"))
    written = 2 * written_bytes(node.inputs["k_cache"], live)
    return Cost(10 * elems, bytes_moved(node, live) + written)


QK_NORM_ROPE = Op(
    "QK_NORM_ROPE",
    ("q", "k", "v", "q_norm", "k_norm", "k_cache", "v_cache", *PAGED),
    _infer,
    _reference,
    _cost,
    attrs=("eps", "n_rot", "rope_base", "rope_scaling"),
    writes=("k_cache", "v_cache"),
)
