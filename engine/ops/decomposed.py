"""The delta rule as a graph of primitive ops, as engines without the fused op have it.

A graph with a capacity of one token has the recurrence itself. Others have the chunked form, with
delta-rule chunks of 64 tokens (KDA: 16) unrolled one after another. Sequences are padded with zeros
to whole chunks: beta = 0 and g = 0 leave the state as it is. Operands and result are those of the
fused node, without per-token states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.graph import Graph, Tensor
from engine.ops.gated_delta_net import CHUNK_GDA, CHUNK_KDA, key_heads
from engine.ops.primitives import (
    ADD,
    CONCAT,
    CUMSUM,
    EXP,
    GET_STATE,
    MAT_MUL,
    MUL,
    PAD_SEQUENCES,
    REPEAT_HEADS,
    SCALE,
    SET_STATE,
    SOLVE_TRI,
    SUB,
    SUM_ROWS,
    TRI,
    UNPAD_SEQUENCES,
    Composer,
)


def delta_net_decomposed(
    graph: Graph, name: str, operands: Mapping[str, Tensor], *, head_map: str
) -> Tensor:
    """Operands and result of engine.ops.gated_delta_net.gated_delta_net."""
    assert operands["snapshot_dst"].shape[1] == 0, "the decomposed form keeps no per-token states"
    add = Composer(graph, name)
    q, k, v, g, beta = (operands[n] for n in ("q", "k", "v", "g", "beta"))
    state = operands["state"]
    if q.shape[1] != v.shape[1]:
        heads = tuple(key_heads(q.shape[1], v.shape[1], head_map).tolist())
        q, k = (add(REPEAT_HEADS, x, heads=heads) for x in (q, k))
    q = add(SCALE, q, factor=q.shape[-1] ** -0.5)
    initial = add(GET_STATE, state, operands["state_src"], v)
    if graph.capacity.n_tokens == 1:
        out, final = _autoregressive(add, initial, q, k, v, g, beta)
    else:
        out, final = _chunked(add, initial, operands["seq_starts"], (q, k, v, g, beta))
    add.append(SET_STATE, final, state, operands["state_dst"])
    return out


def _autoregressive(
    add: Composer, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: the state is [T, H, Dv, Dk], so per-key vectors broadcast over axis 2."""
    decay = add(EXP, g)
    decay = decay.expand(2) if len(g.shape) == 3 else decay.expand(2).expand(3)
    state = add(MUL, state, decay)
    predicted = add(SUM_ROWS, add(MUL, state, k.expand(2)))
    delta = add(MUL, add(SUB, v, predicted), beta.expand(2))
    state = add(ADD, state, add(MUL, delta.expand(3), k.expand(2)))
    return add(SUM_ROWS, add(MUL, state, q.expand(2))), state


@dataclass(frozen=True)
class _Chunks:
    """What of N chunks doesn't depend on the state, [S, H, N, …]."""

    query: Tensor  # q ⊙ exp G
    key: Tensor  # k ⊙ exp(G_last - G)
    solved_v: Tensor  # (I + A)⁻¹ (beta v)
    solved_k: Tensor  # (I + A)⁻¹ (beta k ⊙ exp G)
    scores: Tensor  # q kᵀ, decayed, lower triangle
    decay: Tensor  # exp G_last, broadcast to the state


def _chunked(
    add: Composer, state: Tensor, seq_starts: Tensor, rows: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """All tokens of a batch; `rows`: q, k, v, g and beta, [T, H, …]."""
    q, _, v, g, _ = rows
    size = CHUNK_KDA if len(g.shape) == 3 else CHUNK_GDA
    sizes = {"n_seqs": state.shape[0], "n_chunks": math.ceil(q.shape[0] / size), "size": size}
    # [S, N, C, H, …] -> [S, H, N, C, …]
    padded = []
    for x in rows:
        x = add(PAD_SEQUENCES, x, seq_starts, **sizes)
        padded.append(x.permute(0, 3, 1, 2, *range(4, len(x.shape))))
    chunks = _prepare(add, *padded)
    state, outs = state.permute(0, 1, 3, 2), []  # [S, H, Dk, Dv]
    for n in range(sizes["n_chunks"]):
        query, key, solved_v, solved_k, scores, decay = (
            getattr(chunks, field).select(2, n) for field in _Chunks.__dataclass_fields__
        )
        delta = add(SUB, solved_v, add(MAT_MUL, solved_k, state))
        inter, intra = add(MAT_MUL, query, state), add(MAT_MUL, scores, delta)
        outs.append(add(ADD, inter, intra))
        update = add(MAT_MUL, key.permute(0, 1, 3, 2), delta)
        state = add(ADD, add(MUL, state, decay), update)
    stacked = add(CONCAT, *outs)  # [S, N, H, C, Dv]
    out = add(UNPAD_SEQUENCES, stacked.permute(0, 1, 3, 2, 4), seq_starts, v)
    return out, state.permute(0, 1, 3, 2)


def _prepare(add: Composer, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> _Chunks:
    """q, k, v [S, H, N, C, D], g [S, H, N, C(, Dk)], beta [S, H, N, C]."""
    per_row = len(g.shape) == 5
    # Cumulated along the chunk: [S, H, N, (Dk or 1), C], which broadcasts over pairs.
    cumulated = add(CUMSUM, g.permute(0, 1, 2, 4, 3) if per_row else g.expand(3))
    exponent = add(SUB, cumulated.expand(5), cumulated.expand(4))
    masked = add(TRI, exponent, diagonal=0, fill=-math.inf)
    pair_decay = add(EXP, masked)  # [S, H, N, (Dk or 1), C, C]
    keys = k.permute(0, 1, 2, 4, 3)

    def pairs(x: Tensor) -> Tensor:
        if not per_row:
            return add(MUL, add(MAT_MUL, x, keys), pair_decay.select(3, 0))
        product = add(MUL, x.permute(0, 1, 2, 4, 3).expand(5), keys.expand(4))
        decayed = add(MUL, product, pair_decay)
        return add(SUM_ROWS, decayed.permute(0, 1, 2, 4, 5, 3))

    step = beta.expand(4)
    beta_k, beta_v = add(MUL, k, step), add(MUL, v, step)
    system = add(TRI, pairs(beta_k), diagonal=1, fill=0.0)
    grown = add(EXP, cumulated).permute(0, 1, 2, 4, 3)  # [S, H, N, C, (Dk or 1)]
    last = cumulated.slice(4, cumulated.shape[4] - 1, cumulated.shape[4])
    left = add(EXP, add(SUB, last, cumulated)).permute(0, 1, 2, 4, 3)
    return _Chunks(
        query=add(MUL, q, grown),
        key=add(MUL, k, left),
        solved_v=add(SOLVE_TRI, system, beta_v),
        solved_k=add(SOLVE_TRI, system, add(MUL, beta_k, grown)),
        scores=pairs(q),
        decay=add(EXP, last),
    )
