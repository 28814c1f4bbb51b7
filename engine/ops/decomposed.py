"""The delta rule as a graph of primitive ops, as engines without the fused op have it.

A graph with a capacity of one token has the recurrence itself, others the chunked form with its
chunks unrolled. Sequences are padded to whole chunks: beta = 0 and g = 0 leave the state as it is.
"""

import math
from collections.abc import Mapping

from engine.graph import Graph, Tensor
from engine.ops import primitives as p
from engine.ops.gated_delta_net import CHUNK_GDA, CHUNK_KDA, key_heads


def delta_net_decomposed(
    graph: Graph, name: str, operands: Mapping[str, Tensor], *, head_map: str, scale: float
) -> Tensor:
    """Operands, attributes and result of GATED_DELTA_NET; node names start with `name`."""
    assert operands["snapshot_dst"].shape[1] == 0, "the decomposed form keeps no per-token states"
    add = p.Composer(graph, name)
    q, k, v, g, beta = (operands[n] for n in ("q", "k", "v", "g", "beta"))
    state = operands["state"]
    if q.shape[1] != v.shape[1]:
        heads = tuple(key_heads(q.shape[1], v.shape[1], head_map).tolist())
        q, k = (add(p.REPEAT_HEADS, x, heads=heads) for x in (q, k))
    q = add(p.SCALE, q, factor=scale)
    initial = add(p.GET_STATE, state, operands["state_src"], v)
    if graph.capacity.n_tokens == 1:
        out, final = _autoregressive(add, initial, q, k, v, g, beta)
    else:
        out, final = _chunked(add, initial, operands["seq_starts"], (q, k, v, g, beta))
    add.append(p.SET_STATE, final, state, operands["state_dst"])
    return out


def _autoregressive(
    add: p.Composer, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: the state is [T, H, Dv, Dk], so per-key vectors broadcast over axis 2."""
    decay = add(p.EXP, g)
    decay = decay.expand(2) if len(g.shape) == 3 else decay.expand(2).expand(3)
    state = add(p.MUL, state, decay)
    predicted = add(p.SUM_ROWS, add(p.MUL, state, k.expand(2)))
    delta = add(p.MUL, add(p.SUB, v, predicted), beta.expand(2))
    state = add(p.ADD, state, add(p.MUL, delta.expand(3), k.expand(2)))
    return add(p.SUM_ROWS, add(p.MUL, state, q.expand(2))), state


def _chunked(
    add: p.Composer, state: Tensor, seq_starts: Tensor, rows: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """All tokens of a batch; `rows`: q, k, v, g and beta, [T, H, …]."""
    q, _, v, g, _ = rows
    size = CHUNK_KDA if len(g.shape) == 3 else CHUNK_GDA
    sizes = {"n_seqs": state.shape[0], "n_chunks": math.ceil(q.shape[0] / size), "size": size}
    # [S, N, C, H, …] -> [S, H, N, C, …]
    padded = []
    for x in rows:
        x = add(p.PAD_SEQUENCES, x, seq_starts, **sizes)
        padded.append(x.permute(0, 3, 1, 2, *range(4, len(x.shape))))
    chunks = _prepare(add, *padded)
    state, outs = state.permute(0, 1, 3, 2), []  # [S, H, Dk, Dv]
    for n in range(sizes["n_chunks"]):
        query, key, solved_v, solved_k, scores, decay = (x.select(2, n) for x in chunks)
        delta = add(p.SUB, solved_v, add(p.MAT_MUL, solved_k, state))
        inter, intra = add(p.MAT_MUL, query, state), add(p.MAT_MUL, scores, delta)
        outs.append(add(p.ADD, inter, intra))
        update = add(p.MAT_MUL, key.permute(0, 1, 3, 2), delta)
        state = add(p.ADD, add(p.MUL, state, decay), update)
    stacked = add(p.CONCAT, *outs)  # [S, N, H, C, Dv]
    out = add(p.UNPAD_SEQUENCES, stacked.permute(0, 1, 3, 2, 4), seq_starts, v)
    return out, state.permute(0, 1, 3, 2)


def _prepare(
    add: p.Composer, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, ...]:
    """What of N chunks doesn't depend on the state, [S, H, N, …].

    q, k, v [S, H, N, C, D], g [S, H, N, C(, Dk)], beta [S, H, N, C].
    """
    per_row = len(g.shape) == 5
    # Cumulated along the chunk: [S, H, N, (Dk or 1), C], which broadcasts over pairs.
    cumulated = add(p.CUMSUM, g.permute(0, 1, 2, 4, 3) if per_row else g.expand(3))
    exponent = add(p.SUB, cumulated.expand(5), cumulated.expand(4))
    masked = add(p.TRI, exponent, diagonal=0, fill=-math.inf)
    pair_decay = add(p.EXP, masked)  # [S, H, N, (Dk or 1), C, C]
    keys = k.permute(0, 1, 2, 4, 3)

    def pairs(x: Tensor) -> Tensor:
        if not per_row:
            return add(p.MUL, add(p.MAT_MUL, x, keys), pair_decay.select(3, 0))
        product = add(p.MUL, x.permute(0, 1, 2, 4, 3).expand(5), keys.expand(4))
        decayed = add(p.MUL, product, pair_decay)
        return add(p.SUM_ROWS, decayed.permute(0, 1, 2, 4, 5, 3))

    step = beta.expand(4)
    beta_k, beta_v = add(p.MUL, k, step), add(p.MUL, v, step)
    system = add(p.TRI, pairs(beta_k), diagonal=1, fill=0.0)
    grown = add(p.EXP, cumulated).permute(0, 1, 2, 4, 3)  # [S, H, N, C, (Dk or 1)]
    last = cumulated.slice(4, cumulated.shape[4] - 1, cumulated.shape[4])
    left = add(p.EXP, add(p.SUB, last, cumulated)).permute(0, 1, 2, 4, 3)
    return (
        add(p.MUL, q, grown),
        add(p.MUL, k, left),
        add(p.SOLVE_TRI, system, beta_v),
        add(p.SOLVE_TRI, system, add(p.MUL, beta_k, grown)),
        pairs(q),  # q kᵀ, decayed, lower triangle
        add(p.EXP, last),
    )
