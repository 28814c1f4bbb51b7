"""ATTENTION: causal softmax attention of each row over its sequence's cached keys and values.

    out = softmax(q · Kᵀ · scale) V, times sigmoid(gate) where there is a gate

Row t attends to positions 0 … positions[t] of its sequence, which are in the cache by now. Query
head h reads key head h div (H / Hkv).
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
    sigmoid,
    spans,
)
from engine.ops.cases import Case, Operand, Rng, activation, blocks, case, paged_operands


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_shapes(
        inputs,
        q="T H D",
        k_cache="N Hkv B D",
        v_cache="N Hkv B Dv",
        positions="T",
        seq_starts="S1",
        block_tables="S M",
    )
    if "gate" in inputs:
        match_shapes(inputs, {name: dims[name] for name in ("T", "H", "Dv")}, gate="T H Dv")
        require_contiguous_rows(inputs, "gate", from_axis=2)
    require_contiguous_rows(inputs, "q")
    check_seq_starts(dims)
    if dims.H % dims.Hkv:
        raise ShapeError(f"operand q: expected a multiple of {dims.Hkv} heads, got {dims.H}")
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


def random_operands(
    rng: Rng,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    pasts: list[int],
    lengths: list[int],
    caches: tuple[DType, DType],
    gated: bool,
) -> dict[str, Operand]:
    """Sequences with a past; with a scale of 1 / sqrt(Dk), scores have a deviation of 3."""
    (n_q, n_kv), (d_k, d_v), n = heads, sizes, sum(lengths)
    paged, n_blocks = paged_operands(rng, pasts, lengths, 16)
    operands = {
        "q": activation(rng.normal(size=(n, n_q, d_k)) * 3),
        "k_cache": blocks(rng.normal(size=(n_blocks, n_kv, 16, d_k)), caches[0]),
        "v_cache": blocks(rng.normal(size=(n_blocks, n_kv, 16, d_v)), caches[1]),
        **paged,
    }
    if gated:
        operands["gate"] = activation(rng.normal(size=(n, n_q, d_v)) * 5)
    return operands


def _cases() -> Iterable[Case]:
    for heads, sizes, pasts, lengths, caches, gated in (
        ((1, 1), (16, 16), [0], [1], (F32, F32), False),
        ((4, 2), (64, 64), [0, 37, 200], [3, 1, 20], (F16, F16), True),
        ((8, 2), (256, 256), [15, 16], [1, 1], (F16, F16), True),
        ((6, 1), (72, 64), [5], [33], (F32, F32), False),
        ((4, 2), (48, 48), [70, 3], [1, 40], (F16, F32), False),
        ((4, 2), (48, 48), [70, 3], [1, 40], (F32, F16), True),
    ):
        params = {"heads": heads, "sizes": sizes, "pasts": pasts, "lengths": lengths}
        attrs = {"scale": 1 / math.sqrt(sizes[0])}
        yield case(random_operands, attrs, **params, caches=caches, gated=gated)


ATTENTION = Op("ATTENTION", _infer, _reference, _cost, _cases)


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
    inputs = {"q": q, "k_cache": caches[0], "v_cache": caches[1], **batch}
    if gate is not None:
        inputs["gate"] = gate
    return graph.add(ATTENTION, name, inputs, scale=scale)[0]
