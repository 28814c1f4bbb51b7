"""MLA_CACHE: the latent of multi-head latent attention, normalised and written to the cache.

    row = [rms(kv[:R]) · norm, kv[R:]]            R = size of norm

kv [T, R + P], norm [R], k_cache [n_blocks, 1, block_size, R + P], PAGED. Of one row per token, all
R + P numbers are the key that every head shares, the first R its value.
"""

import numpy as np

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


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_placed(inputs, PAGED, kv="T C", norm="R", k_cache="N 1 B C")
    require_contiguous_rows(inputs, "kv")
    expect(dims.R <= dims.C, "operand norm", f"at most [{dims.C}]", [dims.R])
    return []


def _reference(kv: Array, norm: Array, k_cache: Array, *, eps: float, **paged: Array) -> tuple[()]:
    rank = len(norm)
    rows = np.concatenate([rms_norm(kv[:, :rank], eps) * norm, kv[:, rank:]], axis=1)
    write_rows(k_cache, rows[:, np.newaxis], paged)
    return ()


def _cost(node: Node, live: Live) -> Cost:
    cache = node.inputs["k_cache"]
    nbytes = bytes_moved(node, live) + written_bytes(cache, live)
    return Cost(4 * live.n_tokens * cache.shape[3], nbytes)


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
