"""The feed-forward of experts for few tokens, from its norm to the shared expert's product.

Six or seven launches: the norm, which stages its rows; router and shared expert's projections;
ROUTER, which sorts pairs by expert; experts' gate, up and SWIGLU; their product down; the shared
expert's SWIGLU (several rows); its product, which adds up the experts' results.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from engine.backends.cuda import kernels
from engine.backends.cuda.kernels import K_BLOCK, PANEL, threads
from engine.backends.cuda.launches import Launch, Lowering
from engine.backends.cuda.lower import mul_mat_id
from engine.backends.cuda.lower.common import RowRange, cut, rows_of
from engine.backends.cuda.lower.gemv import MadeRows, lower_gemv, swiglu_row
from engine.backends.cuda.lower.mul_mat_id import PanelWork, pair_rows
from engine.backends.cuda.lower.staged import StagedRows, lower_staged, stage_norm
from engine.backends.native.buffers import Scratch
from engine.backends.native.fusion import Readers
from engine.backends.native.signatures import is_quantized, matrices_of, numbers
from engine.graph import Node, Tensor

PATTERN = (
    "ADD_RMS_NORM", "MUL_MAT", "ROUTER", "MUL_MAT_ID", "SWIGLU", "MUL_MAT_ID", "MUL_MAT"
)  # fmt: skip


def fits(nodes: Sequence[Node], readers: Readers) -> bool:
    """Whether the nodes are a feed-forward that these kernels compute."""
    norm, ffn_in, router, gate_up, act, down, last = nodes
    h, matrices = norm.outputs[0], matrices_of(gate_up)
    hidden = [act.inputs[name] for name in ("gate", "up")]
    if len(act.outputs) != 2 or any(act.attrs["limits"]) or h in readers.kept:
        return False
    wired = (
        {node for node, _ in readers.of(h)} <= {ffn_in, gate_up}
        and ffn_in.inputs["x"] is h
        and gate_up.inputs["x"] is h
        and router.inputs["logits"].base in ffn_in.outputs
        and gate_up.inputs["ids"] is router.outputs[0] is down.inputs["ids"]
        and all(t.base in gate_up.outputs and readers.only_by(t.base, act) for t in hidden)
        and down.inputs["x"] is act.outputs[0]
        and readers.only_by(act.outputs[0], down)
        and down.inputs.get("weights") is router.outputs[1]
        and last.inputs.get("add") is down.outputs[0]
        and readers.only_by(down.outputs[0], last)
        and last.inputs["x"] is act.outputs[1]
        and readers.only_by(act.outputs[1], last)
    )
    quantized = all(map(is_quantized, (*matrices, *matrices_of(down), *matrices_of(last))))
    is_mixed = any(map(is_quantized, matrices_of(ffn_in)))
    alike = len({(m.shape, m.dtype) for m in matrices}) == 1 and 2 * hidden[0].shape[2] == sum(
        m.shape[1] for m in matrices
    )
    whole = all(n % K_BLOCK == 0 for n in (h.shape[1], hidden[0].shape[2], act.outputs[1].shape[1]))
    return wired and quantized and is_mixed and alike and whole


def lower_experts(lowering: Lowering, nodes: Sequence[Node]) -> None:
    """Launches for up to PANEL_TOKENS tokens (batch-invariant: any number)."""
    norm, ffn_in, router, gate_up, act, down, last = nodes
    most, ids = None if lowering.batch_invariant else mul_mat_id.PANEL_TOKENS, router.outputs[0]
    rows = RowRange(norm.inputs["x"], 0, most)
    staged = stage_norm(lowering, norm, ffn_in, most)
    h, none = MadeRows([], norm.outputs[0]), (None, None)
    lower_gemv(lowering, ffn_in, h, none)
    lower_staged(lowering, ffn_in, h, none, most, staged)
    pairs = _route(lowering, router, matrices_of(gate_up)[0], rows)
    hidden = _lower_hidden(lowering, (gate_up, act), staged, pairs, rows)
    results = pair_rows(ids, down.outputs[0].shape[1], rows)
    mul_mat_id.lower_panels(lowering, down, hidden, [results], pairs, rows)
    shared, added = swiglu_row(act, "1"), (results, router.outputs[1])
    lower_gemv(lowering, last, shared, added)
    lower_staged(lowering, last, shared, added, most, rehearses=True)


def _route(lowering: Lowering, router: Node, matrix: Tensor, rows: RowRange) -> Sequence[Scratch]:
    """ROUTER, which also sorts pairs by expert."""
    ids, shares = router.outputs
    pairs, _ = mul_mat_id.pair_buffers(lowering, ids, matrix, kernels.EXPERT_TILE_ROWS, rows)
    logits, bias = router.inputs["logits"], router.inputs.get("bias")
    per_block = threads("router") // 32
    lowering.add(Launch(
        kernel="router", nodes=[router],
        operands=[ids, shares, logits, bias, *pairs, lowering.counters], attrs=numbers(router),
        grid=lambda live: (cut(rows_of(ids, live), per_block), 1, 1), when=rows,
    ))  # fmt: skip
    return pairs


def _lower_hidden(
    lowering: Lowering, nodes: Sequence[Node], x: StagedRows, pairs: Sequence[Scratch],
    rows: RowRange,
) -> Scratch:  # fmt: skip
    """Experts' gate and up projections with their SWIGLU [T, U, n]."""
    gate_up, act = nodes
    ids, matrices = gate_up.inputs["ids"], matrices_of(gate_up)
    n_ff = act.inputs["gate"].shape[2]
    hidden = pair_rows(ids, n_ff, rows)
    up_panel = n_ff // PANEL if len(matrices) == 1 else 0
    for work in PanelWork.of(lowering, gate_up, rows, "experts_hidden", together=2):
        blocks = cut(n_ff // PANEL, work.panels)
        lowering.add(Launch(
            kernel="experts_hidden", nodes=list(nodes),
            operands=[
                hidden, gate_up.inputs["x"], x.q, x.heads, matrices[0], matrices[-1], *pairs,
            ],
            attrs=[*work.attrs, up_panel], threads=32 * work.warps, shared=work.shared,
            grid=partial(mul_mat_id.panel_grid, ids, matrices[0], blocks), when=work.rows,
        ))  # fmt: skip
    return hidden
