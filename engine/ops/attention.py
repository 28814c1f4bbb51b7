"""ATTENTION: causal softmax attention of each row over its sequence's cached keys and values.

    out = softmax(q · Kᵀ · scale) V, times sigmoid(gate) where there is a gate

q [T, H, D], k_cache [n_blocks, Hkv, block_size, D], v_cache [… Dv], gate [T, H, Dv] (its heads may
be strided) or [T, H] (a number for each head), PAGED -> [T, H, Dv]. Row t attends to positions
0 … positions[t] of its sequence, which earlier nodes have written to the cache. Query head h reads
key head h div (H / Hkv).
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
    sigmoid,
    spans,
)


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    patterns = {"q": "T H D", "k_cache": "N Hkv B D", "v_cache": "N Hkv B Dv"}
    per_head = "gate" in inputs and len(inputs["gate"].shape) == 2
    patterns["gate"] = "T H" if per_head else "T H Dv"
    dims = match_placed(inputs, PAGED, **patterns)
    require_contiguous_rows(inputs, "gate", from_axis=1 if per_head else 2)
    require_contiguous_rows(inputs, "q")
    expect(dims.H % dims.Hkv == 0, "operand q", f"a multiple of {dims.Hkv} heads", dims.H)
    return [((dims.T, dims.H, dims.Dv), F32)]


def _reference(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    gate: Array | None = None,
    *,
    scale: float,
    **paged: Array,
) -> tuple[Array]:
    positions, seq_starts, block_tables = (paged[name] for name in PAGED)
    n_kv_heads, block_size = k_cache.shape[1:3]
    out = np.empty((*q.shape[:2], v_cache.shape[3]), q.dtype)
    for s, rows in spans(seq_starts):
        cached = np.arange(positions[rows].max() + 1)
        block, row = np.divmod(cached, block_size)
        block = block_tables[s, block]
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
    if gate is not None:
        out *= sigmoid(gate.reshape(*gate.shape[:2], -1))
    return (out,)


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
