"""MUL_MAT and GET_ROWS as launches; the products of experts are in mul_mat_id.py.

Few rows are multiplied by panels as they are stored, with int8 activations (product.cuh); many as
bfloat16, by cuBLAS or by gemm.cuh. `_panel_kernels` and `_gemm_kernels` are the tables of what
multiplies how many rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from engine.backends.cuda import kernels
from engine.backends.cuda.device import Device, Grid
from engine.backends.cuda.kernels import threads
from engine.backends.cuda.launches import Launch, Lowering, Product
from engine.backends.cuda.lower import common
from engine.backends.cuda.lower.common import RowRange, blocks_of, cut, rows_of
from engine.backends.cuda.lower.gemv import lower_gemv
from engine.backends.cuda.lower.simple import GET_ROWS, add_single
from engine.backends.cuda.weights import expand_grid, fits_bf16, is_of_step
from engine.backends.native.buffers import Ref, Scratch
from engine.backends.native.signatures import is_quantized, matrices_of
from engine.backends.native.views import BF16, I8, view_key
from engine.formats.quants import F32, I32
from engine.graph import Kind, Live, Node, Tensor

# Rows that each thread block quantizes for itself, at most.
INLINE_ROWS = 4
# The most rows that are multiplied by panels as they are stored: COPIED_ROWS where weights of more
# than MANY_ELEMENTS all have copies in bfloat16, else TILED_ROWS. On an H200 a pass of 16 rows
# takes twice as long as one of 8; with copies a step of 16 rows takes 0.86 of that time with 4B,
# but 1.28 with 0.8B, because of its launches.
COPIED_ROWS, TILED_ROWS, MANY_ELEMENTS = 8, 16, 1 << 23
# Rows up to which gemm.cuh has tiles of 64 rows, then of 128; and from which on a weight without a
# copy is expanded to bfloat16 for one product by cuBLAS.
GEMM_ROWS, EXPANDED_ROWS = 128, 256
_PASS_ROWS = {f"mul_mat_{n}": n for n in (2, 4, 8, 16, 32)}
_GEMM_TILES = {"gemm_64": 64, "gemm_128": 128}


def _panel_kernels(
    lowering: Lowering, weights: Sequence[Tensor]
) -> Sequence[tuple[int, str, bool]]:
    """What multiplies rows by panels: rows up to, kernel, whether it fits the weights."""
    quantized = any(map(is_quantized, weights))
    return (
        (1, "mul_mat_1", not lowering.batch_invariant),  # A GEMV.
        (2, "mul_mat_2", True),
        (4, "mul_mat_4", True),
        (8, "mul_mat_8", True),
        (16, "mul_mat_16", quantized),
        (32, "mul_mat_32", quantized),
    )


def _gemm_kernels(
    lowering: Lowering, w: Tensor, out: Tensor
) -> Sequence[tuple[int | None, str, bool]]:
    """What multiplies more rows by one weight in bfloat16."""
    of_step = is_of_step(out)
    copied = of_step and w.base in lowering.weights.bf16
    return (
        (min(GEMM_ROWS, EXPANDED_ROWS - 1), "gemm_64", not copied),
        (EXPANDED_ROWS - 1, "gemm_128", not copied),
        (None, "expand", of_step and not copied),
        (None, "gemm_bf16", copied),
    )


def unsupported(node: Node, device: Device) -> str:
    if node.op.name == "MUL_MAT" and len(matrices_of(node)) > kernels.MAX_WEIGHTS:
        return f"more than {kernels.MAX_WEIGHTS} weights of one product"
    return ""


def lower_get_rows(lowering: Lowering, node: Node) -> None:
    """Rows of a packed table; of an activation as a single launch."""
    (out,), table = node.outputs, node.inputs["table"]
    if table.kind is not Kind.WEIGHT:
        add_single(lowering, node, GET_ROWS)
        return
    n_blocks = cut(out.shape[1], 8 * threads("get_rows_packed"))
    lowering.add(Launch(
        kernel="get_rows_packed", nodes=[node], operands=[out, table, node.inputs["ids"]],
        grid=lambda live: (n_blocks, rows_of(out, live), 1),
    ))  # fmt: skip


def lower_mul_mat(lowering: Lowering, node: Node, more_than: int = 0) -> None:
    """Products of more than `more_than` rows: of few rows in one launch for all weights, of many in
    one for each weight."""
    outs = dict(zip(matrices_of(node), node.outputs, strict=True))
    tiled = [] if lowering.batch_invariant else [w for w in outs if fits_bf16(w)]
    if not tiled:
        _lower_panels(lowering, node, outs, more_than, None)
        return
    is_large = sum(w.shape[0] * w.shape[1] for w in tiled) > MANY_ELEMENTS
    copied = all(is_of_step(outs[w]) and w.base in lowering.weights.bf16 for w in tiled)
    few = COPIED_ROWS if is_large and copied else TILED_ROWS
    _lower_panels(lowering, node, outs, more_than, few)
    if rest := {w: out for w, out in outs.items() if w not in tiled}:
        _lower_panels(lowering, node, rest, few, None)
    for w in tiled:
        rounded = rounded_rows(lowering, node, node.inputs["x"])
        for kernel, rows in common.walk(_gemm_kernels(lowering, w, outs[w]), outs[w], few, None):
            _lower_gemm(lowering, node, w, rounded, kernel, rows)


def _lower_panels(
    lowering: Lowering, node: Node, outs: Mapping[Tensor, Tensor], more_than: int, most: int | None
) -> None:
    """The products with some weights of more than `more_than` and at most `most` rows."""
    x, weights = node.inputs["x"], list(outs)
    table = [row for row in _panel_kernels(lowering, weights) if most is None or row[0] <= most]
    chosen = list(common.walk(table, x, more_than, most))
    if chosen[0][0] == "mul_mat_1":
        lower_gemv(lowering, node, outs)
        del chosen[0]
    plain, blocks, splits = not all(map(is_quantized, weights)), blocks_of(weights), 1
    if not (plain or lowering.batch_invariant):
        splits = common.splits_of(lowering.device, blocks, x.shape[1])
    warps = common.warps_of(cut(x.shape[1], splits), plain)
    sums = common.split_buffers(lowering, blocks, splits, _PASS_ROWS[chosen[-1][0]] * kernels.PANEL)
    padding = [None] * (kernels.MAX_WEIGHTS - len(weights))
    others = [node.inputs.get("gate"), node.inputs.get("add")]
    absent: Sequence[Ref] = [None] * 3
    converted = _quantized(lowering, node, x) if any(map(is_quantized, weights)) else absent
    for kernel, rows in chosen:
        n = _PASS_ROWS[kernel]
        made = absent if n <= INLINE_ROWS else converted
        lowering.add(Launch(
            kernel=kernel, nodes=[node],
            operands=[*outs.values(), *padding, x, *made, *weights, *padding, *others, *sums],
            threads=32 * warps, shared=warps * n * kernels.PANEL * 4,
            grid=partial(_pass_grid, x, n, blocks, splits), when=rows,
        ))  # fmt: skip


def _lower_gemm(
    lowering: Lowering, node: Node, w: Tensor, rounded: Scratch, kernel: str, rows: RowRange
) -> None:
    """A product of some rows with one weight in bfloat16."""
    out, gate, add = rows.tensor, node.inputs.get("gate"), node.inputs.get("add")
    if n_rows := _GEMM_TILES.get(kernel):
        n_blocks = cut(w.shape[0], kernels.GEMM_COLUMNS)
        lowering.add(Launch(
            kernel=kernel, nodes=[node], operands=[out, rounded, w, gate, add], when=rows,
            grid=lambda live: (cut(rows_of(out, live), n_rows), n_blocks, 1),
        ))  # fmt: skip
        return
    b: Tensor | Scratch = w
    if kernel == "expand":
        b = Scratch(w.shape, BF16)
        lowering.add(Launch(
            kernel="expand", nodes=[node], operands=[b, w], grid=lambda live: expand_grid(w),
            when=rows,
        ))  # fmt: skip
    lowering.add(Product(nodes=[node], operands=[out, rounded, b], when=rows))
    if gate or add:
        n_blocks = cut(out.shape[1], threads("finish_product"))
        lowering.add(Launch(
            kernel="finish_product", nodes=[node], operands=[out, gate, add], when=rows,
            grid=lambda live: (n_blocks, rows_of(out, live), 1),
        ))  # fmt: skip


def _quantized(lowering: Lowering, node: Node, x: Tensor) -> Sequence[Scratch]:
    """x as int8 in fragments of ROW_GROUP rows (quantize.cuh); once for all nodes that read it."""
    most = None if lowering.batch_invariant else TILED_ROWS
    n_groups, n_k_blocks = cut(int(x.shape[0]), kernels.ROW_GROUP), x.shape[1] // kernels.K_BLOCK
    shapes = (
        ((n_groups, n_k_blocks * kernels.ROW_GROUP * kernels.K_BLOCK), I8),
        ((n_groups, n_k_blocks * kernels.ROW_GROUP), F32),
        ((n_groups, n_k_blocks * kernels.ROW_GROUP * 2), I32),
    )
    buffers, is_new = lowering.buffers(("quantized", view_key(x)), shapes)
    if is_new:
        n_blocks = cut(n_k_blocks, threads("quantize_rows") // 32)
        lowering.add(Launch(
            kernel="quantize_rows", nodes=[node], operands=[*buffers, x],
            grid=lambda live: (n_blocks, cut(rows_of(x, live), kernels.ROW_GROUP), 1),
            when=RowRange(x, INLINE_ROWS, most),
        ))  # fmt: skip
    return buffers


def rounded_rows(lowering: Lowering, node: Node, x: Tensor) -> Scratch:
    """x as bfloat16; once for all nodes that read it."""
    (buffer,), is_new = lowering.buffers(("rounded", view_key(x)), ((x.shape, BF16),))
    if is_new:
        n_blocks = cut(x.shape[-1], 8 * threads("round_rows"))
        n_used = x.shape[1] if len(x.shape) == 3 else 1
        lowering.add(Launch(
            kernel="round_rows", nodes=[node], operands=[buffer, x],
            grid=lambda live: (n_blocks, n_used, rows_of(x, live)),
            when=RowRange(x, COPIED_ROWS, None),
        ))  # fmt: skip
    return buffer


def _pass_grid(t: Tensor, rows: int, blocks: int, splits: int, live: Live) -> Grid:
    return blocks, cut(rows_of(t, live), rows), splits


LOWERINGS = {"GET_ROWS": lower_get_rows, "MUL_MAT": lower_mul_mat}
