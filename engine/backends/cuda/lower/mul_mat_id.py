"""MUL_MAT_ID, products with the matrices of chosen experts, as launches.

`_kernels` is the table of what multiplies how many tokens: experts one by one for few; for more,
tiles of rows of one expert, by panels as they are stored or on tensor cores in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from engine.backends.cuda import kernels
from engine.backends.cuda.device import Device, Grid
from engine.backends.cuda.kernels import threads
from engine.backends.cuda.launches import Condition, Launch, Lowering
from engine.backends.cuda.lower.common import RowRange, cut, rows_of, walk, warps_of
from engine.backends.cuda.lower.gemv import GEMV_WARPS, WorkSplit
from engine.backends.cuda.lower.mul_mat import rounded_rows
from engine.backends.cuda.weights import fits_bf16
from engine.backends.native.buffers import Ref, Scratch
from engine.backends.native.signatures import is_quantized, matrices_of
from engine.backends.native.views import view_key
from engine.formats.quants import F32, I32
from engine.graph import Live, Node, Tensor

# A thread of sort_by_expert has one expert.
MAX_EXPERTS = threads("sort_by_expert")
# Tokens whose experts are multiplied one by one, and in tiles of EXPERT_TILE_ROWS rows, at most.
SINGLE_TOKENS, TILE_TOKENS = 4, 64
# Rows of an expert on average from which on its tiles have 64 rows on tensor cores, before 32.
LARGE_FROM = 48
_TILE_ROWS = {"gemm_experts_32": 32, "gemm_experts_64": 64}
_TILE_ROWS["mul_mat_id_rows"] = kernels.EXPERT_TILE_ROWS


def _kernels(lowering: Lowering, node: Node) -> Sequence[tuple[int | None, str, bool]]:
    """What multiplies tokens: tokens up to, kernel, whether it fits."""
    matrices, n_used = matrices_of(node), node.inputs["ids"].shape[1]
    fits = not lowering.batch_invariant and all(map(fits_bf16, matrices))
    return (
        (SINGLE_TOKENS, "mul_mat_id", not lowering.batch_invariant),
        (TILE_TOKENS, "mul_mat_id_rows", True),
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
    """Experts one by one for few tokens, in tiles of rows of one expert for more."""
    for kernel, rows in walk(_kernels(lowering, node), node.inputs["ids"], 0, None):
        if kernel == "mul_mat_id":
            _lower_single(lowering, node, rows)
        else:
            _lower_tiles(lowering, node, kernel, rows)


def _lower_single(lowering: Lowering, node: Node, when: Condition) -> None:
    """A thread block for each panel of each (token, choice), or of each token with their sum."""
    x, ids, gates = (node.inputs.get(name) for name in ("x", "ids", "weights"))
    assert ids is not None
    matrices, n_used = matrices_of(node), ids.shape[1]
    padding = [None] * (kernels.MAX_MATRICES - len(matrices))
    operands = [*node.outputs, *padding, x, *matrices, *padding, ids, gates]
    blocks = sum(cut(m.shape[1], kernels.PANEL) for m in matrices)
    split = WorkSplit.of_warps(lowering, matrices, matrices[0].shape[2])
    n, attrs = split.warps, [split.rounds, split.slot_bytes, split.warps]
    if gates is None:
        lowering.add(Launch(
            kernel="mul_mat_id", nodes=[node], operands=operands, attrs=attrs,
            threads=32 * n, shared=n * split.warp_bytes(1), when=when,
            grid=lambda live: (blocks, n_used, rows_of(ids, live)),
        ))  # fmt: skip
        return
    warps = min(max(GEMV_WARPS // n, 1), n_used) * n
    lowering.add(Launch(
        kernel="mul_mat_id_sum", nodes=[node], operands=operands, attrs=attrs,
        threads=32 * warps, grid=lambda live: (blocks, rows_of(ids, live), 1), when=when,
        shared=warps * split.warp_bytes(0) + n_used * n * kernels.PANEL * 4,
    ))  # fmt: skip


def _lower_tiles(lowering: Lowering, node: Node, kernel: str, when: RowRange) -> None:
    """Tiles of rows of one expert, and the weighted sum over a token's experts."""
    ids, matrices, rows = node.inputs["ids"], matrices_of(node), _TILE_ROWS[kernel]
    x: Ref = node.inputs["x"]
    by_panels = kernel == "mul_mat_id_rows"
    if not by_panels:
        x = rounded_rows(lowering, node, node.inputs["x"])
    order, tiles = _sorted(lowering, node, rows, when)
    n_threads = n_shared = 0
    if by_panels:
        warps = warps_of(matrices[0].shape[2], plain=not is_quantized(matrices[0]))
        n_threads, n_shared = 32 * warps, warps * rows * kernels.PANEL * 4
    grid = _panel_grid if by_panels else _gemm_grid
    gates = node.inputs.get("weights")
    for out, m in zip(node.outputs, matrices, strict=True):
        # An expert's products go to the output, or to a buffer whose rows are summed.
        target = out if gates is None else Scratch((*ids.shape, m.shape[1]), F32)
        lowering.add(Launch(
            kernel=kernel, nodes=[node], operands=[target, x, m, order, tiles],
            threads=n_threads, shared=n_shared, grid=partial(grid, ids, m, rows), when=when,
        ))  # fmt: skip
        if gates is not None:
            lowering.add(Launch(
                kernel="sum_experts", nodes=[node], operands=[out, target, gates], when=when,
                grid=partial(_sum_grid, out),
            ))  # fmt: skip


def _sorted(lowering: Lowering, node: Node, tile_rows: int, when: RowRange) -> Sequence[Scratch]:
    """Pairs (token, choice) by expert, and tiles of them; once for all nodes of one routing."""
    ids, m = node.inputs["ids"], matrices_of(node)[0]
    n_tokens, n_used = ids.shape
    n_tiles = _n_tiles(ids, m, tile_rows, int(n_tokens))
    shapes = (((int(n_tokens) * n_used,), I32), ((1 + n_tiles, 3), I32))
    key = ("sorted", tile_rows, when.more_than, when.most, view_key(ids))
    buffers, is_new = lowering.buffers(key, shapes)
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


def _panel_grid(ids: Tensor, m: Tensor, rows: int, live: Live) -> Grid:
    return cut(m.shape[1], kernels.PANEL), _n_tiles(ids, m, rows, rows_of(ids, live)), 1


def _gemm_grid(ids: Tensor, m: Tensor, rows: int, live: Live) -> Grid:
    return _n_tiles(ids, m, rows, rows_of(ids, live)), cut(m.shape[1], kernels.GEMM_COLUMNS), 1


LOWERINGS = {"MUL_MAT_ID": lower_mul_mat_id}
