"""GATED_DELTA_NET: the gated delta rule, a linear-attention layer's recurrence as one node.

Per sequence and value head, for each token, with a state S [Dk, Dv]:

    S <- diag(exp(g)) S;  d <- beta (v - Sᵀk);  S <- S + k dᵀ;  o <- Sᵀq · scale

q, k [T, Hk, Dk] (L2-normalised), v [T, Hv, Dv], g [T, Hv(, Dk)], beta [T, Hv], state [n_slots, Hv,
Dv, Dk] f32, RECURRENT -> o [T, Hv, Dv]. `head_map`: value head h reads key head h mod Hk ("tiled")
or h div (Hv / Hk) ("grouped").

Two algorithms give the same result: `scan` goes token by token and is the definition; `chunk` turns
delta-rule chunks of 64 tokens (KDA: 16) into matrix products (Yang et al., "Gated Delta Networks",
arXiv:2412.06464; its per-row form is Kimi Delta Attention, arXiv:2510.26692). Exponents are
differences of cumulated decays and never positive, so strong gates underflow to exact zeros.
"""

import math

import numpy as np

from engine.formats.quants import F32
from engine.graph import Attrs, Cost, Inputs, Live, Node, Op, Out
from engine.ops.base import (
    RECURRENT,
    Array,
    bytes_moved,
    expect,
    initial_state,
    match_placed,
    require_contiguous_rows,
    spans,
    state_bytes,
)

ALGORITHMS = ("auto", "scan", "chunk")
HEAD_MAPS = ("tiled", "grouped")
# Tokens of a delta-rule chunk. KDA has a decay per key row, so Dk times as many pairwise terms.
CHUNK_GDA, CHUNK_KDA = 64, 16
# Rows of a sequence from which chunks are faster than the scan in numpy.
_AUTO_CHUNK_FROM = 16


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    gates = {"g": "T Hv Dk" if len(inputs["g"].shape) == 3 else "T Hv", "beta": "T Hv"}
    patterns = {"q": "T Hk Dk", "k": "T Hk Dk", "v": "T Hv Dv", **gates, "state": "N Hv Dv Dk"}
    dims = match_placed(inputs, RECURRENT, **patterns)
    require_contiguous_rows(inputs, "q", "k", "v", "g", "beta")
    expect(dims.Hv % dims.Hk == 0, "operand v", f"a multiple of {dims.Hk} heads", dims.Hv)
    return [((dims.T, dims.Hv, dims.Dv), F32)]


def key_heads(n_k_heads: int, n_v_heads: int, head_map: str) -> Array:
    heads = np.arange(n_v_heads)
    return heads % n_k_heads if head_map == "tiled" else heads // (n_v_heads // n_k_heads)


def _reference(
    state: Array, *, head_map: str, scale: float, algorithm: str, **others: Array
) -> tuple[Array]:
    q, k, v, g, beta = (others[name] for name in ("q", "k", "v", "g", "beta"))
    seq_starts, state_src, state_dst, snapshot_dst = (others[name] for name in RECURRENT)
    heads = key_heads(q.shape[1], v.shape[1], head_map)
    out, n_snapshots = np.empty_like(v), snapshot_dst.shape[1]
    for s, rows in spans(seq_starts):
        n = rows.stop - rows.start
        # Head-major operands of this sequence: [Hv, n, …].
        operands = [np.moveaxis(x[rows], 1, 0) for x in (q[:, heads], k[:, heads], v, g, beta)]
        carried = initial_state(state, state_src[s], v.dtype)  # [Hv, Dv, Dk]
        scans = algorithm == "scan" or (algorithm == "auto" and n < _AUTO_CHUNK_FROM)
        run = _scan if scans else _chunk
        # A chunk has no per-token states, so the tokens whose states are kept are scanned.
        first = max(0, n - n_snapshots)
        result = np.empty((v.shape[1], n, v.shape[2]), v.dtype)
        carried = run(carried, [x[:, :first] for x in operands], result[:, :first])
        for t in range(first, n):
            token = slice(t, t + 1)
            carried = _scan(carried, [x[:, token] for x in operands], result[:, token])
            if (slot := snapshot_dst[s, t - n + n_snapshots]) >= 0:
                state[slot] = carried
        if state_dst[s] >= 0:
            state[state_dst[s]] = carried
        out[rows] = np.moveaxis(result, 0, 1) * scale
    return (out,)


def _scan(state: Array, operands: list[Array], out: Array) -> Array:
    """Token by token: q, k [H, n, Dk], v [H, n, Dv], g [H, n(, Dk)], state [H, Dv, Dk]."""
    q, k, v, g, beta = operands
    for t in range(q.shape[1]):
        decay = np.exp(g[:, t])
        state = state * (decay[:, np.newaxis] if g.ndim == 3 else decay[:, np.newaxis, np.newaxis])
        predicted = np.einsum("hvk,hk->hv", state, k[:, t])
        delta = beta[:, t, np.newaxis] * (v[:, t] - predicted)
        state = state + delta[:, :, np.newaxis] * k[:, t, np.newaxis]
        out[:, t] = np.einsum("hvk,hk->hv", state, q[:, t])
    return state


def _chunk(state: Array, operands: list[Array], out: Array) -> Array:
    """Chunk by chunk; a chunk's updates are the solution D of a unit lower triangular system.

    (I + tril(beta k kᵀ ⊙ decay, -1)) D = beta (v - (k ⊙ exp G) S)
    """
    q, k, v, g, beta = operands
    size = CHUNK_KDA if g.ndim == 3 else CHUNK_GDA
    for start in range(0, q.shape[1], size):
        part = slice(start, start + size)
        qc, kc, vc, bc = q[:, part], k[:, part], v[:, part], beta[:, part, np.newaxis]
        # In float64: differences of float32 sums lose the weak decays behind a strong one.
        cumulated = np.cumsum(g[:, part], axis=1, dtype=np.float64)
        kk, qk = _decayed_products(qc, kc, cumulated)
        if g.ndim == 2:
            cumulated = cumulated[..., np.newaxis]
        grown = np.exp(cumulated).astype(v.dtype)
        transposed = np.swapaxes(state, 1, 2)  # [H, Dk, Dv]
        rhs = bc * (vc - (kc * grown) @ transposed)
        system = np.eye(kc.shape[1], dtype=v.dtype) + np.tril(bc * kk, -1)
        delta = np.linalg.solve(system, rhs)
        out[:, part] = (qc * grown) @ transposed + qk @ delta
        last = cumulated[:, -1:]
        left = np.exp(last - cumulated).astype(v.dtype)
        state = state * grown[:, -1:] + np.swapaxes(delta, 1, 2) @ (kc * left)
    return state


def _decayed_products(q: Array, k: Array, cumulated: Array) -> tuple[Array, Array]:
    """k kᵀ and q kᵀ of a chunk, [H, C, C]: pair (i, j) decayed from j to i, zeros for j > i."""
    exponent = cumulated[:, :, np.newaxis] - cumulated[:, np.newaxis]  # [H, C, C(, Dk)]
    lower = np.tri(k.shape[1], dtype=bool)
    if cumulated.ndim == 3:
        lower = lower[..., np.newaxis]
    decay = np.exp(np.where(lower, exponent, -np.inf)).astype(k.dtype)
    if cumulated.ndim == 2:
        keys = np.swapaxes(k, 1, 2)
        return k @ keys * decay, q @ keys * decay
    kk, qk = (np.einsum("hid,hijd,hjd->hij", x, decay, k, optimize=True) for x in (k, q))
    return kk, qk


def _cost(node: Node, live: Live) -> Cost:
    state = node.inputs["state"]
    flops = live.n_tokens * 7 * math.prod(state.shape[1:])
    return Cost(flops, bytes_moved(node, live) + state_bytes(state, live))


GATED_DELTA_NET = Op(
    "GATED_DELTA_NET",
    ("q", "k", "v", "g", "beta", "state", *RECURRENT),
    _infer,
    _reference,
    _cost,
    attrs=("head_map", "scale", "algorithm"),
    choices={"head_map": HEAD_MAPS, "algorithm": ALGORITHMS},
    writes=("state",),
)
