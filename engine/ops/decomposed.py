"""The delta rule out of primitive ops: what engines without the fused op put into their graphs.

One token a batch takes the recurrence itself; larger batches take the chunked form, blocks of 64
tokens (16 with per-row decays) unrolled one after another. Sequences are padded with zeros to whole
blocks: beta = 0 and g = 0 leave the state as it is. Same signature and result as the fused node,
without snapshots.
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
    REPEAT_HEADS,
    SCALE,
    SOLVE_TRI,
    SUB,
    SUM_ROWS,
    TRI,
    UNPAD_SEQUENCES,
    Composer,
)


def delta_net_decomposed(
    graph: Graph,
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    batch: Mapping[str, Tensor],
    *,
    head_map: str,
) -> Tensor:
    """Operands and result of engine.ops.gated_delta_net.gated_delta_net."""
    assert batch["snapshot_dst"].shape[1] == 0, "the decomposed form makes no snapshots"
    add = Composer(graph, name)
    if q.shape[1] != v.shape[1]:
        heads = tuple(key_heads(q.shape[1], v.shape[1], head_map).tolist())
        q, k = (add.unary(REPEAT_HEADS, x, heads=heads) for x in (q, k))
    q = add.unary(SCALE, q, factor=q.shape[-1] ** -0.5)
    initial = add(GET_STATE, state=state, slots=batch["state_src"], like=v)
    if graph.capacity.n_tokens == 1:
        out, final = _autoregressive(add, initial, q, k, v, g, beta)
    else:
        out, final = _chunked(add, initial, batch["seq_starts"], q, k, v, g, beta)
    add.store(final, state, batch["state_dst"])
    return out


def _autoregressive(
    add: Composer, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: the state is [T, H, Dv, Dk], so per-key vectors broadcast over axis 2."""
    decay = add.unary(EXP, g)
    decay = decay.expand(2) if len(g.shape) == 3 else decay.expand(2).expand(3)
    state = add(MUL, a=state, b=decay)
    predicted = add.unary(SUM_ROWS, add(MUL, a=state, b=k.expand(2)))
    delta = add(MUL, a=add(SUB, a=v, b=predicted), b=beta.expand(2))
    state = add(ADD, a=state, b=add(MUL, a=delta.expand(3), b=k.expand(2)))
    return add.unary(SUM_ROWS, add(MUL, a=state, b=q.expand(2))), state


@dataclass(frozen=True)
class _Blocks:
    """Everything of a block that doesn't need the state, [S, H, N, …] with N blocks."""

    query: Tensor  # q ⊙ exp G
    key: Tensor  # k ⊙ exp(G_last - G)
    solved_v: Tensor  # (I + A)⁻¹ (beta v)
    solved_k: Tensor  # (I + A)⁻¹ (beta k ⊙ exp G)
    scores: Tensor  # q kᵀ, decayed, lower triangle
    decay: Tensor  # exp G_last, broadcast to the state


def _chunked(
    add: Composer,
    state: Tensor,
    seq_starts: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
) -> tuple[Tensor, Tensor]:
    size = CHUNK_KDA if len(g.shape) == 3 else CHUNK_GDA
    sizes = {"n_seqs": state.shape[0], "n_chunks": math.ceil(q.shape[0] / size), "size": size}
    # [S, N, C, H, …] -> [S, H, N, C, …]
    padded = []
    for x in (q, k, v, g, beta):
        x = add.pad(x, seq_starts, **sizes)
        padded.append(x.permute(0, 3, 1, 2, *range(4, len(x.shape))))
    blocks = _prepare(add, *padded)
    state, outs = state.permute(0, 1, 3, 2), []  # [S, H, Dk, Dv]
    for n in range(sizes["n_chunks"]):
        query, key, solved_v, solved_k, scores, decay = (
            getattr(blocks, field).select(2, n) for field in _Blocks.__dataclass_fields__
        )
        delta = add(SUB, a=solved_v, b=add(MAT_MUL, a=solved_k, b=state))
        inter, intra = add(MAT_MUL, a=query, b=state), add(MAT_MUL, a=scores, b=delta)
        outs.append(add(ADD, a=inter, b=intra))
        update = add(MAT_MUL, a=key.permute(0, 1, 3, 2), b=delta)
        state = add(ADD, a=add(MUL, a=state, b=decay), b=update)
    stacked = add(CONCAT, **{f"part{n}": out for n, out in enumerate(outs)})  # [S, N, H, C, Dv]
    rows = stacked.permute(0, 1, 3, 2, 4)
    out = add(UNPAD_SEQUENCES, x=rows, seq_starts=seq_starts, like=v)
    return out, state.permute(0, 1, 3, 2)


def _prepare(add: Composer, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> _Blocks:
    """q, k, v [S, H, N, C, D], g [S, H, N, C(, Dk)], beta [S, H, N, C]."""
    per_row = len(g.shape) == 5
    # Cumulated along the block: [S, H, N, (Dk or 1), C], which broadcasts over pairs.
    cumulated = add.unary(CUMSUM, g.permute(0, 1, 2, 4, 3) if per_row else g.expand(3))
    exponent = add(SUB, a=cumulated.expand(5), b=cumulated.expand(4))
    masked = add.unary(TRI, exponent, diagonal=0, fill=-math.inf)
    pair_decay = add.unary(EXP, masked)  # [S, H, N, (Dk or 1), C, C]
    keys = k.permute(0, 1, 2, 4, 3)

    def pairs(x: Tensor) -> Tensor:
        if not per_row:
            return add(MUL, a=add(MAT_MUL, a=x, b=keys), b=pair_decay.select(3, 0))
        product = add(MUL, a=x.permute(0, 1, 2, 4, 3).expand(5), b=keys.expand(4))
        decayed = add(MUL, a=product, b=pair_decay)
        return add.unary(SUM_ROWS, decayed.permute(0, 1, 2, 4, 5, 3))

    step = beta.expand(4)
    beta_k, beta_v = add(MUL, a=k, b=step), add(MUL, a=v, b=step)
    system = add.unary(TRI, pairs(beta_k), diagonal=1, fill=0.0)
    grown = add.unary(EXP, cumulated).permute(0, 1, 2, 4, 3)  # [S, H, N, C, (Dk or 1)]
    last = cumulated.slice(4, cumulated.shape[4] - 1, cumulated.shape[4])
    left = add.unary(EXP, add(SUB, a=last, b=cumulated)).permute(0, 1, 2, 4, 3)
    return _Blocks(
        query=add(MUL, a=q, b=grown),
        key=add(MUL, a=k, b=left),
        solved_v=add(SOLVE_TRI, a=system, b=beta_v),
        solved_k=add(SOLVE_TRI, a=system, b=add(MUL, a=beta_k, b=grown)),
        scores=pairs(q),
        decay=add.unary(EXP, last),
    )
