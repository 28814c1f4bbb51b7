"""ATTENTION: causal softmax attention of each row over its sequence's cached keys and values.

    out = softmax(q · Kᵀ · scale) V, times sigmoid(gate) where there is a gate

Row t attends to positions 0 … positions[t] of its sequence. Earlier nodes of the step have written
them to the cache. Query head h reads key head h div (H / Hkv).
"""

from __future__ import annotations

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
    sigmoid,
    spans,
)


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    patterns = {"q": "T H D", "k_cache": "N Hkv B D", "v_cache": "N Hkv B Dv", "gate": "T H Dv"}
    dims = match_shapes(inputs, **patterns, **PAGED)
    require_contiguous_rows(inputs, "gate", from_axis=2)
    require_contiguous_rows(inputs, "q")
    check_seq_starts(dims)
    expect(dims.H % dims.Hkv == 0, "operand q", f"a multiple of {dims.Hkv} heads", dims.H)
    return [((dims.T, dims.H, dims.Dv), F32)]


def _reference(  # noqa: PLR0913
    q: Array,
    k_cache: Array,
    v_cache: Array,
    positions: Array,
    seq_starts: Array,
    block_tables: Array,
    gate: Array | None = None,
    *,
    scale: float,
) -> tuple[Array]:
    n_kv_heads, block_size = k_cache.shape[1:3]
    out = np.empty((*q.shape[:2], v_cache.shape[3]), q.dtype)
    for s, rows in spans(seq_starts):
        cached = np.arange(positions[rows].max() + 1)
        block, row = paged_index(block_tables[s], cached, block_size)
        keys = k_cache[block, :, row].astype(q.dtype)  # [n_kv, Hkv, D]
        values = v_cache[block, :, row].astype(q.dtype)
        visible = cached <= positions[rows, np.newaxis]
        grouped = q[rows].reshape(-1, n_kv_heads, q.shape[1] // n_kv_heads, q.shape[2])
        scores = np.einsum("tgrd,cgd->grtc", grouped, keys, optimize=True) * scale
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        result = np.einsum("grtc,cgd->tgrd", weights, values, optimize=True)
        out[rows] = result.reshape(len(result), q.shape[1], -1)
    return (out if gate is None else out * sigmoid(gate),)


def _cost(node: Node, live: Live) -> Cost:
    q, k_cache, v_cache = (node.inputs[x] for x in ("q", "k_cache", "v_cache"))
    flops = 2 * live.kv_pairs * q.shape[1] * (q.shape[2] + v_cache.shape[3])
    # Values that are a part of the keys, as MLA's are, come with them.
    caches = [k_cache] if v_cache.base is k_cache.base else [k_cache, v_cache]
    row_bytes = sum(c.shape[1] * c.dtype.row_bytes(c.shape[3]) for c in caches)
    return Cost(flops, bytes_moved(node, live) + live.kv_rows * row_bytes)


ATTENTION = Op(
    "ATTENTION",
    ("q", "k_cache", "v_cache", "gate", *PAGED),
    _infer,
    _reference,
    _cost,
    attrs=("scale",),
    optional=("gate",),
)


def attention(
    graph: Graph,
    name: str,
    q: Tensor,
    caches: tuple[Tensor, Tensor],
    gate: Tensor | None,
    batch: Mapping[str, Tensor],
    *,
    scale: float,
) -> Tensor:
    """q [T, H, D], caches k [n_blocks, Hkv, block_size, D] and v [… Dv] -> [T, H, Dv].

    `gate` [T, H, Dv] before its sigmoid (heads may be strided), or None.
    `batch`: positions [T], seq_starts [S + 1], block_tables [S, max_blocks].
    """
    operands = {"q": q, "k_cache": caches[0], "v_cache": caches[1], **batch, "gate": gate}
    return graph.add(ATTENTION, name, operands, scale=scale)[0]
