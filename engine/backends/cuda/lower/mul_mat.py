"""MUL_MAT and GET_ROWS as launches; the products of experts are in mul_mat_id.py.

Few rows are multiplied by panels as they are stored, with activations of 15 bits (gemv.py,
staged.py); many as bfloat16, by cuBLAS or by gemm.cuh. Plain weights and float32 rows have kernels
of their own.
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
from engine.backends.cuda.lower.gemv import MadeRows, lower_gemv
from engine.backends.cuda.lower.simple import GET_ROWS, add_single
from engine.backends.cuda.lower.staged import lower_staged
from engine.backends.cuda.weights import expand_grid, fits_bf16, is_of_step
from engine.backends.native.buffers import Scratch
from engine.backends.native.signatures import is_quantized, matrices_of
from engine.backends.native.views import BF16, view_key
from engine.graph import Kind, Live, Node, Tensor

# The most rows that are multiplied by panels as they are stored.
FEW_ROWS = 16
# Rows up to which gemm.cuh has tiles of 64 rows, then of 128; and from which on a weight without a
# copy is expanded to bfloat16 for one product by cuBLAS.
GEMM_ROWS, EXPANDED_ROWS = 128, 256
_GEMM_TILES = {"gemm_64": 64, "gemm_128": 128}
# Rows of a pass -> the kernel for plain weights.
_PLAIN = {n: f"mul_mat_floats_{n}" for n in (2, 4, 8)}


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


def few_rows(lowering: Lowering, node: Node) -> int | None:
    """The most rows whose op before them a product's launches can compute; None: any number."""
    if not any(map(is_quantized, matrices_of(node))):
        return 0 if lowering.batch_invariant else 1
    return None if lowering.batch_invariant else FEW_ROWS


def lower_mul_mat(lowering: Lowering, node: Node, made: MadeRows | None = None) -> None:
    """Products of few rows in one launch for all weights, of many in one for each weight. made: the
    rows, up to `few_rows`."""
    outs, x = dict(zip(matrices_of(node), node.outputs, strict=True)), node.inputs["x"]
    quantized, invariant = any(map(is_quantized, outs)), lowering.batch_invariant
    made, added = made or MadeRows([], x), (node.inputs.get("add"), None)
    few: int | None = 0
    if quantized or not invariant:
        lower_gemv(lowering, node, made, added)
        few = 1
    if quantized:
        few = few_rows(lowering, node)
        lower_staged(lowering, node, made, added, few)
    if few is None:
        return
    many = [] if invariant else [w for w in outs if fits_bf16(w)]
    if many and not quantized:
        _lower_plain(lowering, node, outs, few, FEW_ROWS)
        few = FEW_ROWS
    if rest := {w: out for w, out in outs.items() if w not in many}:
        _lower_plain(lowering, node, rest, few, None)
    for w in many:
        rounded = rounded_rows(lowering, node, x)
        for kernel, rows in common.walk(_gemm_kernels(lowering, w, outs[w]), outs[w], few, None):
            _lower_gemm(lowering, node, w, rounded, kernel, rows)


def _lower_plain(
    lowering: Lowering, node: Node, outs: Mapping[Tensor, Tensor], more_than: int, most: int | None
) -> None:
    """The products with some plain weights of more than `more_than` and at most `most` rows."""
    x, blocks = node.inputs["x"], blocks_of(list(outs))
    warps = common.plain_warps(x.shape[1])
    padding = [None] * (kernels.MAX_WEIGHTS - len(outs))
    passes = {kernel: n for n, kernel in _PLAIN.items()}
    table = [(n, kernel, True) for n, kernel in _PLAIN.items()]
    for kernel, rows in common.walk(table, x, more_than, most):
        n = passes[kernel]
        lowering.add(Launch(
            kernel=kernel, nodes=[node],
            operands=[
                *outs.values(), *padding, x, *[None] * 3, *outs, *padding,
                node.inputs.get("gate"), node.inputs.get("add"),
            ],
            attrs=common.first_blocks(list(outs)),
            threads=32 * warps, shared=warps * n * (kernels.PLAIN_COLUMNS + kernels.PANEL) * 4,
            grid=partial(_pass_grid, x, n, blocks), when=rows,
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


def rounded_rows(lowering: Lowering, node: Node, x: Tensor) -> Scratch:
    """x as bfloat16; once for all nodes that read it."""
    (buffer,), is_new = lowering.buffers(("rounded", view_key(x)), ((x.shape, BF16),))
    if is_new:
        n_blocks = cut(x.shape[-1], 8 * threads("round_rows"))
        n_used = x.shape[1] if len(x.shape) == 3 else 1
        lowering.add(Launch(
            kernel="round_rows", nodes=[node], operands=[buffer, x],
            grid=lambda live: (n_blocks, n_used, rows_of(x, live)),
            when=RowRange(x, FEW_ROWS, None),
        ))  # fmt: skip
    return buffer


def _pass_grid(t: Tensor, rows: int, blocks: int, live: Live) -> Grid:
    return blocks, cut(rows_of(t, live), rows), 1


LOWERINGS = {"GET_ROWS": lower_get_rows, "MUL_MAT": lower_mul_mat}
