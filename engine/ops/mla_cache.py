"""MLA_CACHE: the latent of multi-head latent attention, normalised and written to the cache.

    row = [rms(kv[:R]) · norm, kv[R:]]            R = size of norm

Of one row per token, all R + P numbers are the key that every head shares, the first R its value.
"""

from __future__ import annotations

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
        kv="T C",
        norm="R",
        positions="T",
        k_cache="N 1 B C",
        seq_starts="S1",
        block_tables="S M",
    )
    require_contiguous_rows(inputs, "kv")
    check_seq_starts(dims)
    if dims.R > dims.C:
        raise ShapeError(f"operand norm: expected at most [{dims.C}], got [{dims.R}]")
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


def _cases() -> Iterable[Case]:
    def make(
        rng: Rng, rank: int, n_pe: int, lengths: list[int], cache: DType
    ) -> dict[str, Operand]:
        pasts = rng.integers(0, 100, len(lengths)).tolist()
        paged, n_blocks = paged_operands(rng, pasts, lengths, 16)
        return {
            "kv": activation(rng.normal(size=(sum(lengths), rank + n_pe))),
            "norm": weight(rng.normal(size=rank)),
            "k_cache": blocks(rng.normal(size=(n_blocks, 1, 16, rank + n_pe)), cache),
            **paged,
        }

    for rank, n_pe, lengths, cache in ((16, 8, [1], F32), (512, 64, [3, 1, 20], F16)):
        yield case(make, {"eps": 1e-6}, rank=rank, n_pe=n_pe, lengths=lengths, cache=cache)


MLA_CACHE = Op("MLA_CACHE", _infer, _reference, _cost, _cases, writes=("k_cache",))


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
