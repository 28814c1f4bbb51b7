"""MUL_MAT_ID, products with the matrices of chosen experts, as launches.

`_kernels` is the table of what multiplies how many tokens: tiles of rows of one expert, by panels
as they are stored or on tensor cores in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from engine.backends.cuda import kernels
from engine.backends.cuda.device import Device, Grid
from engine.backends.cuda.kernels import PANEL, threads
from engine.backends.cuda.launches import Launch, Lowering
from engine.backends.cuda.lower.common import NO_END, RowRange, cut, rows_of, walk
from engine.backends.cuda.lower.gemv import WorkSplit
from engine.backends.cuda.lower.mul_mat import rounded_rows
from engine.backends.cuda.lower.staged import BlockNeeds, BlockShape, shape_of
from engine.backends.cuda.weights import fits_bf16
from engine.backends.native.buffers import Ref, Scratch
from engine.backends.native.signatures import is_quantized, matrices_of
from engine.backends.native.views import view_key
from engine.formats.quants import F32, I32
from engine.graph import Live, Node, Tensor

# A thread of sort_by_expert has one expert.
MAX_EXPERTS = threads("sort_by_expert")
# Tokens whose experts are multiplied by panels, at most.
PANEL_TOKENS = 64
# Tokens up to which thread blocks have a shape of their own.
TOKENS = (1, 4, 16)
# Rows of an expert on average from which on its tiles have 64 rows on tensor cores, before 32.
LARGE_FROM = 48
_GEMM_ROWS = {"gemm_experts_32": 32, "gemm_experts_64": 64}


def _kernels(lowering: Lowering, node: Node) -> Sequence[tuple[int | None, str, bool]]:
    """What multiplies tokens: tokens up to, kernel, whether it fits."""
    matrices, n_used = matrices_of(node), node.inputs["ids"].shape[1]
    fits = not lowering.batch_invariant and all(map(fits_bf16, matrices))
    return (
        (PANEL_TOKENS, "mul_mat_id_rows", True),
        (cut(LARGE_FROM * matrices[0].shape[0], n_used), "gemm_experts_32", fits),
        (None, "gemm_experts_64", fits),
    )


def unsupported(node: Node, device: Device) -> str:
    matrices = matrices_of(node)
    if len(matrices) > kernels.MAX_MATRICES:
        return f"more than {kernels.MAX_MATRICES} matrices of experts in one product"
    if matrices[0].shape[0] > MAX_EXPERTS:
        return f"more than {MAX_EXPERTS} experts"
    return ""


def lower_mul_mat_id(lowering: Lowering, node: Node) -> None:
    """Tiles of rows of one expert, and the weighted sum over a token's experts."""
    ids, gates = node.inputs["ids"], node.inputs.get("weights")
    for kernel, rows in walk(_kernels(lowering, node), ids, 0, None):
        # Experts' products go to the outputs, or to buffers whose rows are summed.
        targets: Sequence[Ref] = node.outputs
        if gates is not None:
            targets = [pair_rows(ids, m.shape[1], rows) for m in matrices_of(node)]
        if kernel == "mul_mat_id_rows":
            pairs = _sorted(lowering, node, kernels.EXPERT_TILE_ROWS, rows)
            lower_panels(lowering, node, node.inputs["x"], targets, pairs, rows)
        else:
            _lower_gemm(lowering, node, kernel, targets, rows)
        if gates is not None:
            for out, target in zip(node.outputs, targets, strict=True):
                lowering.add(Launch(
                    kernel="sum_experts", nodes=[node], operands=[out, target, gates], when=rows,
                    grid=partial(_sum_grid, out),
                ))  # fmt: skip


def pair_rows(ids: Tensor, n: int, rows: RowRange) -> Scratch:
    """A buffer [T, U, n] for a row of each pair of a step of so many tokens."""
    return Scratch((min(int(ids.shape[0]), rows.most or NO_END), ids.shape[1], n), F32)


def lower_panels(
    lowering: Lowering, node: Node, x: Ref, targets: Sequence[Ref], pairs: Sequence[Scratch],
    rows: RowRange,
) -> None:  # fmt: skip
    """The products of tiles with panels as they are stored, to `targets` [T, U, out]. pairs: by
    expert, and tiles of them."""
    matrices = matrices_of(node)
    padding = [None] * (kernels.MAX_MATRICES - len(matrices))
    for work in PanelWork.of(lowering, node, rows, "mul_mat_id_rows"):
        blocks = sum(cut(cut(m.shape[1], PANEL), work.panels) for m in matrices)
        lowering.add(Launch(
            kernel="mul_mat_id_rows", nodes=[node],
            operands=[*targets, *padding, x, *matrices, *padding, *pairs], attrs=work.attrs,
            threads=32 * work.warps, shared=work.shared, when=work.rows,
            grid=partial(panel_grid, node.inputs["ids"], matrices[0], blocks),
        ))  # fmt: skip


@dataclass(frozen=True)
class PanelWork:
    """The thread blocks that multiply experts by panels, for some numbers of tokens."""

    rows: RowRange
    panels: int
    warps: int
    shared: int
    attrs: Sequence[float]

    @classmethod
    def of(
        cls, lowering: Lowering, node: Node, rows: RowRange, kernel: str, together: int = 1
    ) -> Iterator[PanelWork]:
        """For tokens in `rows`. together: panels that a thread block has in two matrices or more,
        of which `panels` counts one."""
        matrices, n_used = matrices_of(node), node.inputs["ids"].shape[1]
        split = WorkSplit.of_warps(lowering, matrices, matrices[0].shape[2])
        n_rows = kernels.EXPERT_TILE_ROWS
        row_bytes = max(split.rounds * kernels.ROW_BATCH_BYTES, n_rows * kernels.BATCH_ROW_BYTES)
        needs = BlockNeeds(
            split.warps, max(split.rounds, 1) * together, row_bytes,
            together * n_rows * PANEL * 4, split.slot_bytes, prefetched=False,
        )  # fmt: skip
        n_panels = sum(cut(m.shape[1], PANEL) for m in matrices) // together
        table = [(most, kernel, True) for most in (*TOKENS, rows.most)]
        for _, when in walk(table, rows.tensor, rows.more_than, rows.most):
            n_tokens = when.most or int(rows.tensor.shape[0])
            n_tiles = min(n_tokens * int(n_used), int(matrices[0].shape[0]))
            block = BlockShape(1, 1, 1, needs.shared_bytes(1, 1))
            if all(map(is_quantized, matrices)):
                n, most_warps = n_panels * n_tiles, threads(kernel) // 32
                block = shape_of(lowering.device, needs, n, most_warps, most_teams=1)
            attrs = [block.panels, split.slot_bytes, block.slots, row_bytes]
            yield cls(when, block.panels, split.warps, block.shared, attrs)


def _lower_gemm(
    lowering: Lowering, node: Node, kernel: str, targets: Sequence[Ref], when: RowRange
) -> None:
    """The products of tiles on tensor cores in bfloat16."""
    ids, rows = node.inputs["ids"], _GEMM_ROWS[kernel]
    x = rounded_rows(lowering, node, node.inputs["x"])
    order, tiles = _sorted(lowering, node, rows, when)
    for target, m in zip(targets, matrices_of(node), strict=True):
        lowering.add(Launch(
            kernel=kernel, nodes=[node], operands=[target, x, m, order, tiles],
            grid=partial(_gemm_grid, ids, m, rows), when=when,
        ))  # fmt: skip


def pair_buffers(
    lowering: Lowering, ids: Tensor, m: Tensor, tile_rows: int, when: RowRange
) -> tuple[Sequence[Scratch], bool]:
    """Buffers for pairs (token, choice) by expert, and for tiles of them; and whether they are new.
    They serve all nodes of one routing."""
    n_tokens = min(int(ids.shape[0]), when.most or NO_END)
    n_tiles = _n_tiles(ids, m, tile_rows, n_tokens)
    shapes = (((n_tokens * ids.shape[1],), I32), ((1 + n_tiles, 3), I32))
    key = ("sorted", tile_rows, when.more_than, when.most, view_key(ids))
    return lowering.buffers(key, shapes)


def _sorted(lowering: Lowering, node: Node, tile_rows: int, when: RowRange) -> Sequence[Scratch]:
    """Pairs by expert, and tiles of them, by a launch of their own."""
    ids, m = node.inputs["ids"], matrices_of(node)[0]
    buffers, is_new = pair_buffers(lowering, ids, m, tile_rows, when)
    if is_new:
        lowering.add(Launch(
            kernel="sort_by_expert", nodes=[node], operands=[*buffers, ids],
            attrs=[m.shape[0], tile_rows], grid=lambda live: (1, 1, 1), when=when,
        ))  # fmt: skip
    return buffers


def _n_tiles(ids: Tensor, m: Tensor, rows: int, n_tokens: int) -> int:
    """The most tiles that some tokens can have."""
    n_pairs = n_tokens * int(ids.shape[1])
    return min(n_pairs, n_pairs // rows + int(m.shape[0]))


def _sum_grid(out: Tensor, live: Live) -> Grid:
    return cut(out.shape[1], threads("sum_experts")), rows_of(out, live), 1


def panel_grid(ids: Tensor, m: Tensor, blocks: int, live: Live) -> Grid:
    return blocks, _n_tiles(ids, m, kernels.EXPERT_TILE_ROWS, rows_of(ids, live)), 1


def _gemm_grid(ids: Tensor, m: Tensor, rows: int, live: Live) -> Grid:
    return _n_tiles(ids, m, rows, rows_of(ids, live)), cut(m.shape[1], kernels.GEMM_COLUMNS), 1


LOWERINGS = {"MUL_MAT_ID": lower_mul_mat_id}
