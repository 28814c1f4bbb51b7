"""SSM_CONV: causal depthwise convolution over each sequence, then SiLU.

    out[t, c] = silu(Σ_j weight[c, j] · x[t - K + 1 + j, c])

Inputs from before the batch come from the state: the last K - 1 rows, before SiLU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from engine.graph import Attrs, Cost, Graph, Inputs, Live, Node, Op, Out, Tensor, match_shapes
from engine.ops.cases import Case, Operand, Rng, activation, case, recurrent_operands, slots, weight
from engine.ops.common import (
    Array,
    bytes_moved,
    check_recurrent,
    initial_state,
    require_contiguous_rows,
    silu,
    spans,
    state_bytes,
)
from engine.quants import F32


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_shapes(inputs, x="T C", weight="C K")
    match_shapes(inputs, {"C": dims.C, "K1": dims.K - 1}, state="N K1 C")
    check_recurrent(inputs)
    require_contiguous_rows(inputs, "x")
    return [((dims.T, dims.C), F32)]


def _reference(
    x: Array,
    weight: Array,
    state: Array,
    seq_starts: Array,
    state_src: Array,
    state_dst: Array,
    snapshot_dst: Array,
) -> tuple[Array]:
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
    n_channels, n_taps = node.inputs["weight"].shape
    flops = live.n_tokens * n_channels * (2 * n_taps + 4)
    return Cost(flops, bytes_moved(node, live) + state_bytes(node.inputs["state"], live))


def _cases() -> Iterable[Case]:
    def make(
        rng: Rng, n_channels: int, n_taps: int, lengths: list[int], fresh: list[int], k: int
    ) -> dict[str, Operand]:
        return {
            "x": activation(rng.normal(size=(sum(lengths), n_channels))),
            "weight": weight(rng.normal(size=(n_channels, n_taps))),
            "state": slots(rng.normal(size=((2 + k) * len(lengths), n_taps - 1, n_channels))),
            **recurrent_operands(lengths, fresh, k),
        }

    for n_channels, n_taps, lengths, fresh, k in (
        (16, 4, [1], [], 0),
        (32, 4, [1, 5, 2], [1], 0),
        (40, 2, [3, 1], [], 1),
        (64, 4, [7, 1, 70], [0, 2], 3),
    ):
        yield case(
            make, {}, n_channels=n_channels, n_taps=n_taps, lengths=lengths, fresh=fresh, k=k
        )


SSM_CONV = Op("SSM_CONV", _infer, _reference, _cost, _cases, writes=("state",))


def ssm_conv(
    graph: Graph, name: str, x: Tensor, weight: Tensor, state: Tensor, batch: Mapping[str, Tensor]
) -> Tensor:
    """x [T, C], weight [C, K], state [n_slots, K - 1, C] f32 -> [T, C].

    `batch`: seq_starts, state_src, state_dst, snapshot_dst (see engine.ops.common).
    """
    return graph.add(SSM_CONV, name, {"x": x, "weight": weight, "state": state, **batch})[0]
