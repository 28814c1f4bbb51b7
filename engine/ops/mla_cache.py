"""MLA_CACHE: the latent of multi-head latent attention, normalised and written to the cache.

    row = [rms(kv[:R]) · norm, kv[R:]]            R = size of norm

Of one row per token, all R + P numbers are the key that every head shares, the first R its value.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

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
    dims = match_shapes(inputs, kv="T C", norm="R", k_cache="N 1 B C", **PAGED)
    require_contiguous_rows(inputs, "kv")
    check_seq_starts(dims)
    expect(dims.R <= dims.C, "operand norm", f"at most [{dims.C}]", [dims.R])
    return []


def _reference(
    kv: Array,
    norm: Array,
    positions: Array,
    k_cache: Array,
    seq_starts: Array,
    block_tables: Array,
    *,
    eps: float,
) -> tuple[()]:
    rank = len(norm)
    rows = np.concatenate([rms_norm(kv[:, :rank], eps) * norm, kv[:, rank:]], axis=1)
    for s, span in spans(seq_starts):
        block, row = paged_index(block_tables[s], positions[span], k_cache.shape[2])
        k_cache[block, 0, row] = rows[span]
    return ()


def _cost(node: Node, live: Live) -> Cost:
    cache = node.inputs["k_cache"]
    written = live.n_tokens * cache.dtype.row_bytes(cache.shape[3])
    return Cost(4 * live.n_tokens * cache.shape[3], bytes_moved(node, live) + written)


MLA_CACHE = Op(
    "MLA_CACHE",
    ("kv", "norm", "k_cache", *PAGED),
    _infer,
    _reference,
    _cost,
    n_outputs=0,
    attrs=("eps",),
    writes=("k_cache",),
)


def mla_cache(
    graph: Graph,
    name: str,
    kv: Tensor,
    norm: Tensor,
    cache: Tensor,
    batch: Mapping[str, Tensor],
    eps: float,
) -> None:
    """kv [T, R + P], norm [R], cache [n_blocks, 1, block_size, R + P] f32 or f16, written.

    `batch`: positions [T], seq_starts [S + 1], block_tables [S, max_blocks].
    """
    graph.add(MLA_CACHE, name, {"kv": kv, "norm": norm, "k_cache": cache, **batch}, eps=eps)
