"""SSM_CONV: causal depthwise convolution over each sequence, then SiLU.

    out[t, c] = silu(Σ_j weight[c, j] · x[t - K + 1 + j, c])

x [T, C], weight [C, K], state [n_slots, K - 1, C] f32, RECURRENT -> [T, C]. Inputs from before the
batch come from the state: the last K - 1 rows, before SiLU. The channels may come in several parts
(x1 and weight1, …); state and output have them side by side.
"""

import numpy as np

from engine.formats.quants import F32
from engine.graph import Attrs, Cost, Inputs, Live, Node, Op, Out, match_shapes
from engine.ops.base import (
    RECURRENT,
    Array,
    bytes_moved,
    initial_state,
    match_placed,
    numbered,
    require_contiguous_rows,
    silu,
    spans,
    state_bytes,
)


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims, n_channels = match_shapes(inputs, x="T C", weight="C K"), 0
    for x, taps in numbered(inputs, "x", "weight"):
        part = match_shapes(inputs, {"T": dims.T, "K": dims.K}, **{x: "T C", taps: "C K"})
        require_contiguous_rows(inputs, x)
        n_channels += part.C
    match_shapes(inputs, {"C": n_channels, "K1": dims.K - 1}, state="N K1 C")
    match_placed(inputs, RECURRENT)
    return [((dims.T, n_channels), F32)]


def _reference(state: Array, **others: Array) -> tuple[Array]:
    seq_starts, state_src, state_dst, snapshot_dst = (others[name] for name in RECURRENT)
    parts = numbered(others, "x", "weight")
    x = np.concatenate([others[name] for name, _ in parts], axis=1)
    weight = np.concatenate([others[name] for _, name in parts])
    out = np.empty_like(x)
    n_taps, n_snapshots = weight.shape[1], snapshot_dst.shape[1]
    for s, rows in spans(seq_starts):
        history = initial_state(state, state_src[s], x.dtype)
        window = np.concatenate([history, x[rows]])  # [K - 1 + n, C]
        n = rows.stop - rows.start
        total = sum(window[j : j + n] * weight[:, j] for j in range(n_taps))
        out[rows] = silu(np.asarray(total))
        for j, slot in enumerate(snapshot_dst[s]):
            end = n - n_snapshots + j + 1
            if slot >= 0 and end > 0:
                state[slot] = window[end : end + n_taps - 1]
        if state_dst[s] >= 0:
            state[state_dst[s]] = window[n:]
    return (out,)


def _cost(node: Node, live: Live) -> Cost:
    _, n_history, n_channels = node.inputs["state"].shape
    flops = live.n_tokens * n_channels * (2 * n_history + 6)
    return Cost(flops, bytes_moved(node, live) + state_bytes(node.inputs["state"], live))


SSM_CONV = Op(
    "SSM_CONV",
    ("state", *RECURRENT, "x", "weight", "x1", "weight1", "x2", "weight2"),
    _infer,
    _reference,
    _cost,
    optional=("x1", "weight1", "x2", "weight2"),
    writes=("state",),
)
