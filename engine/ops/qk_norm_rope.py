"""QK_NORM_ROPE: RMS norm and rotary embedding of queries and keys; keys and values go to the cache.

Rotation in NeoX halves: for i < n_rot / 2 the pair (i, i + n_rot / 2) turns by
position · base^(-2i / n_rot); the rest of the head passes through. Text has the same position on
every axis of Qwen3.5's interleaved M-RoPE, which is therefore this (as transformers computes it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from engine.formats.quants import F32
from engine.graph import Attrs, Cost, Graph, Inputs, Live, Node, Op, Out, Tensor, match_shapes
from engine.ops.base import (
    PAGED,
    Array,
    bytes_moved,
    check_seq_starts,
    expect,
    paged_index,
    require_contiguous_rows,
    rms_norm,
    spans,
)


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_shapes(
        inputs,
        q="T H D",
        k="T Hkv D",
        v="T Hkv D",
        q_norm="D",
        k_norm="D",
        k_cache="N Hkv B D",
        v_cache="N Hkv B D",
        **PAGED,
    )
    require_contiguous_rows(inputs, "k", "v")
    require_contiguous_rows(inputs, "q", from_axis=2)
    check_seq_starts(dims)
    n_rot, wanted = attrs["n_rot"], f"an even number up to {dims.D}"
    expect(n_rot % 2 == 0 and 0 <= n_rot <= dims.D, "attribute n_rot", wanted, n_rot)
    return [((dims.T, dims.H, dims.D), F32)]


def rotate(x: Array, positions: Array, n_rot: int, base: float) -> Array:
    """Rotary embedding of x [T, H, D] at positions [T]."""
    half = n_rot // 2
    # Angles in float64: in float32 a position in the thousands already loses half its digits.
    angles = positions[:, np.newaxis] * base ** (-2.0 * np.arange(half) / max(n_rot, 1))
    cos, sin = (f(angles)[:, np.newaxis].astype(x.dtype) for f in (np.cos, np.sin))
    first, second = x[..., :half], x[..., half:n_rot]
    turned = [first * cos - second * sin, second * cos + first * sin, x[..., n_rot:]]
    return np.concatenate(turned, axis=-1)


def _reference(  # noqa: PLR0913
    q: Array,
    k: Array,
    v: Array,
    q_norm: Array,
    k_norm: Array,
    positions: Array,
    k_cache: Array,
    v_cache: Array,
    seq_starts: Array,
    block_tables: Array,
    *,
    eps: float,
    n_rot: int,
    rope_base: float,
) -> tuple[Array]:
    turned = rotate(rms_norm(k, eps) * k_norm, positions, n_rot, rope_base)
    for s, rows in spans(seq_starts):
        block, row = paged_index(block_tables[s], positions[rows], k_cache.shape[2])
        k_cache[block, :, row] = turned[rows]
        v_cache[block, :, row] = v[rows]
    return (rotate(rms_norm(q, eps) * q_norm, positions, n_rot, rope_base),)


def _cost(node: Node, live: Live) -> Cost:
    elems = sum(math.prod(live.shape(node.inputs[x].shape)) for x in ("q", "k"))
    cache = node.inputs["k_cache"]
    row_bytes = cache.shape[1] * cache.dtype.row_bytes(cache.shape[3])
    return Cost(10 * elems, bytes_moved(node, live) + 2 * live.n_tokens * row_bytes)


QK_NORM_ROPE = Op(
    "QK_NORM_ROPE",
    ("q", "k", "v", "q_norm", "k_norm", "k_cache", "v_cache", *PAGED),
    _infer,
    _reference,
    _cost,
    attrs=("eps", "n_rot", "rope_base"),
    writes=("k_cache", "v_cache"),
)


def qk_norm_rope(
    graph: Graph,
    name: str,
    operands: Mapping[str, Tensor],
    *,
    eps: float,
    n_rot: int,
    rope_base: float,
) -> Tensor:
    """Returns the rotated q [T, H, D]; the rotated k and v go to the caches. Operands:

    q [T, H, D] (heads may be strided), k, v [T, Hkv, D], q_norm, k_norm [D],
    k_cache, v_cache [n_blocks, Hkv, block_size, D] f32 or f16, written,
    positions [T], seq_starts [S + 1], block_tables [S, max_blocks].
    """
    return graph.add(QK_NORM_ROPE, name, operands, eps=eps, n_rot=n_rot, rope_base=rope_base)[0]
