"""QK_NORM_ROPE: RMS norm and rotary embedding of queries and keys; keys and values go to the cache.

Rotation in NeoX halves: for i < n_rot / 2 the pair (i, i + n_rot / 2) turns by
position · base^(-2i / n_rot); the rest of the head passes through. Text has the same position on
every axis of Qwen3.5's interleaved M-RoPE, which is therefore this (as transformers computes it).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from engine.formats.quants import F16, F32, DType
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
from engine.ops.base import (
    Array,
    bytes_moved,
    check_seq_starts,
    paged_index,
    require_contiguous_rows,
    rms_norm,
    spans,
)
from engine.ops.cases import Case, Operand, Rng, activation, blocks, case, paged_operands, weight


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_shapes(
        inputs,
        q="T H D",
        k="T Hkv D",
        v="T Hkv D",
        q_norm="D",
        k_norm="D",
        positions="T",
        k_cache="N Hkv B D",
        v_cache="N Hkv B D",
        seq_starts="S1",
        block_tables="S M",
    )
    require_contiguous_rows(inputs, "k", "v")
    require_contiguous_rows(inputs, "q", from_axis=2)
    check_seq_starts(dims)
    n_rot = attrs["n_rot"]
    if n_rot % 2 or not 0 <= n_rot <= dims.D:
        raise ShapeError(f"attribute n_rot: expected an even number up to {dims.D}, got {n_rot}")
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


def _cases() -> Iterable[Case]:
    def make(
        rng: Rng, heads: tuple[int, int], size: int, lengths: list[int], types: tuple[DType, DType]
    ) -> dict[str, Operand]:
        (n_q, n_kv), n = heads, sum(lengths)
        pasts = rng.integers(0, 100, len(lengths)).tolist()
        paged, n_blocks = paged_operands(rng, pasts, lengths, 16)
        caches = rng.normal(size=(2, n_blocks, n_kv, 16, size))
        return {
            "q": activation(rng.normal(size=(n, n_q, size))),
            "k": activation(rng.normal(size=(n, n_kv, size))),
            "v": activation(rng.normal(size=(n, n_kv, size))),
            "q_norm": weight(rng.normal(size=size)),
            "k_norm": weight(rng.normal(size=size)),
            "k_cache": blocks(caches[0], types[0]),
            "v_cache": blocks(caches[1], types[1]),
            **paged,
        }

    for heads, size, lengths, types, n_rot in (
        ((2, 1), 16, [1], (F32, F32), 8),
        ((4, 2), 64, [3, 1, 40], (F16, F16), 64),
        ((8, 2), 256, [5], (F32, F16), 64),
        ((3, 3), 24, [2, 2], (F16, F32), 0),
    ):
        attrs = {"eps": 1e-6, "n_rot": n_rot, "rope_base": 1e6}
        yield case(make, attrs, heads=heads, size=size, lengths=lengths, types=types)


QK_NORM_ROPE = Op("QK_NORM_ROPE", _infer, _reference, _cost, _cases, writes=("k_cache", "v_cache"))


def qk_norm_rope(
    graph: Graph,
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    caches: tuple[Tensor, Tensor],
    batch: Mapping[str, Tensor],
    *,
    eps: float,
    n_rot: int,
    rope_base: float,
) -> Tensor:
    """q [T, H, D] (heads may be strided), k, v [T, Hkv, D], norms [D] -> rotated q [T, H, D].

    `caches`: k and v, [n_blocks, Hkv, block_size, D], f32 or f16, are written.
    `batch`: positions [T], seq_starts [S + 1], block_tables [S, max_blocks].
    """
    inputs = {"q": q, "k": k, "v": v, "q_norm": q_norm, "k_norm": k_norm}
    inputs |= {"k_cache": caches[0], "v_cache": caches[1], **batch}
    return graph.add(QK_NORM_ROPE, name, inputs, eps=eps, n_rot=n_rot, rope_base=rope_base)[0]
