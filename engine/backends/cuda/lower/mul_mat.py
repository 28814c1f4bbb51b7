"""Matrix products and tables of packed weights as launches; those of experts: cuda_experts.py.

Few rows are multiplied by the panels as they are stored, with int8 activations (product.cuh); many
as bfloat16 by cuBLAS, or by gemm.cuh where there is no room for a weight's copy. Each step says for
which numbers of rows it is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

from engine.backends.cuda.device import Device, Grid
from engine.backends.cuda.launches import Condition, Lowering
from engine.backends.cuda.lower.common import (
    MAX_WEIGHTS,
    Between,
    blocks_of,
    rows_of,
    shared_sums,
    splits_of,
    warps_of,
)
from engine.backends.cuda.lower.gemv import lower_row
from engine.backends.cuda.lower.simple import GET_ROWS, add_launch
from engine.backends.cuda.weights import PANEL, RECORD, expand_grid
from engine.backends.native.buffers import Ref, Scratch
from engine.backends.native.signatures import is_quantized, matrices_of
from engine.backends.native.views import BF16, I8, view_key
from engine.formats.quants import F32, I32, WEIGHT_TYPES
from engine.graph import Dim, Kind, Live, Node, Tensor

TILE_COLUMNS = 128
# Rows that blocks quantize for themselves at most, and those of one pass over a weight.
INLINE_ROWS, ROWS_OF_PASS = 4, (1, 2, 4, 8, 16, 32)
PLAIN_ROWS = 8  # Of a pass over plain weights, at most.
_SOURCE_OF_PASS = {2: "mul_mat", 4: "mul_mat_some", 8: "mul_mat_some"}
_SOURCE_OF_PASS |= {16: "mul_mat_rows", 32: "mul_mat_rows"}
# Rows that are multiplied by panels as they are stored, at most: of many elements that there are
# bfloat16 copies of, and else. On an H200 16 rows take twice as long as 8; by copies a step of 16
# takes 0.86 of that with 4B, but 1.28 with 0.8B, for its launches.
COPIED_ROWS, TILED_ROWS, MANY_ELEMENTS = 8, 16, 1 << 23
# Rows from which on a weight is expanded to bfloat16 for a single product.
EXPANDED_ROWS = 256
# Rows up to which tiles of 64 of them are taken, then of 128.
GEMM_ROWS = 128
_STAGES = 3


def unsupported(node: Node, device: Device) -> str:
    """Why a node of LOWERINGS can't be run; an empty string if it can."""
    if node.op.name == "MUL_MAT" and len(matrices_of(node)) > MAX_WEIGHTS:
        return f"more than {MAX_WEIGHTS} weights of one product"
    return ""


def lower_get_rows(lowering: Lowering, node: Node) -> None:
    """Rows of a packed table; of an activation as any small op."""
    (out,), table = node.outputs, node.inputs["table"]
    if table.kind is not Kind.WEIGHT:
        add_launch(lowering, node, GET_ROWS)
        return
    lowering.launch(
        "get_rows_packed", "get_rows_packed", [node], [out, table, node.inputs["ids"]],
        threads=128,
        grid=lambda live: (-(-out.shape[1] // (8 * 128)), rows_of(out, live), 1),
    )  # fmt: skip


def lower_mul_mat(lowering: Lowering, node: Node, more_than: int = 0) -> None:
    """For more rows than so many. Of few, one launch for all weights; of many, a product each."""
    weights = matrices_of(node)
    outs = dict(zip(weights, node.outputs, strict=True))
    tiled = [] if lowering.batch_invariant else [w for w in weights if has_tiles(w)]
    if not tiled:
        _lower_passes(lowering, node, outs, more_than, None)
        return
    copied = {w for w in tiled if _is_of_step(outs[w]) and lowering.weights.keep_bf16(w)}
    is_large = sum(w.shape[0] * w.shape[1] for w in tiled) > MANY_ELEMENTS
    few = COPIED_ROWS if is_large and len(copied) == len(tiled) else TILED_ROWS
    _lower_passes(lowering, node, outs, more_than, few)
    if rest := {w: out for w, out in outs.items() if w not in tiled}:
        _lower_passes(lowering, node, rest, few, None)
    for w in tiled:
        _lower_gemm(lowering, node, outs[w], w, w in copied, few)


def _lower_passes(
    lowering: Lowering, node: Node, outs: Mapping[Tensor, Tensor], more_than: int, most: int | None
) -> None:
    """Passes over the panels for rows between two numbers, for each size of pass a launch."""
    x, weights = node.inputs["x"], list(outs)
    quantized = any(is_quantized(w) for w in weights)
    largest = min(most or ROWS_OF_PASS[-1], ROWS_OF_PASS[-1] if quantized else PLAIN_ROWS)
    sizes = [n for n in ROWS_OF_PASS if n <= largest]
    if lowering.batch_invariant:
        sizes.remove(1)
    elif more_than == 0:
        lower_row(lowering, node, outs)
        more_than = 1
    plain = not all(is_quantized(w) for w in weights)
    blocks = blocks_of(weights)
    may_split = not plain and not lowering.batch_invariant
    splits = splits_of(lowering.device, blocks, x.shape[1]) if may_split else 1
    warps = warps_of(-(-x.shape[1] // splits), plain)
    converted: Sequence[Ref] = (None, None, None)
    if quantized:
        converted = _quantized(lowering, node, x)
    padding = [None] * (MAX_WEIGHTS - len(weights))
    others = [node.inputs.get("gate"), node.inputs.get("add")]
    sums = shared_sums(lowering, blocks, splits, largest * PANEL)
    for fewer, n in pairwise((0, *sizes)):
        if n <= more_than and n != sizes[-1]:
            continue
        operands = [*outs.values(), *padding, x, *([None] * 3 if n <= INLINE_ROWS else converted)]
        lowering.launch(
            _SOURCE_OF_PASS[n], f"mul_mat_{n}", [node],
            [*operands, *weights, *padding, *others, *sums],
            threads=32 * warps, shared=warps * n * PANEL * 4,
            grid=partial(_grid, x, n, blocks, splits),
            when=Between(x, max(fewer, more_than), most if n == sizes[-1] else n),
        )  # fmt: skip


def _lower_gemm(
    lowering: Lowering, node: Node, out: Tensor, w: Tensor, is_copied: bool, more_than: int
) -> None:
    """More rows than so many times one weight: by cuBLAS with the weight's copy in bfloat16, else
    expanded into a buffer if that pays, else decoded on the way."""
    rounded = rounded_rows(lowering, node, node.inputs["x"])
    gate, add = node.inputs.get("gate"), node.inputs.get("add")
    if is_copied:
        when = Between(out, more_than, None)
        lowering.gemm([node], out, rounded, w, when=when)
        _lower_finish(lowering, node, out, when)
        return
    most = None
    if _is_of_step(out):
        most = max(EXPANDED_ROWS, more_than + 1) - 1
        expanded, copy = Between(out, most, None), Scratch(w.shape, BF16)
        lowering.launch(
            "expand", "expand", [node], [copy, w], threads=256,
            grid=lambda live: expand_grid(w), when=expanded,
        )  # fmt: skip
        lowering.gemm([node], out, rounded, copy, when=expanded)
        _lower_finish(lowering, node, out, expanded)
    for rows, name, condition in (
        (64, "gemm_64", Between(out, more_than, min(GEMM_ROWS, most or GEMM_ROWS))),
        (128, "gemm_128", Between(out, GEMM_ROWS, most)),
    ):
        lowering.launch(
            "gemm", name, [node], [out, rounded, w, gate, add], threads=256,
            shared=gemm_shared(rows), when=condition,
            grid=partial(_gemm_grid, out, rows, w.shape[0]),
        )  # fmt: skip


def _lower_finish(lowering: Lowering, node: Node, out: Tensor, when: Condition) -> None:
    """What is left of a product by cuBLAS."""
    others = [node.inputs.get("gate"), node.inputs.get("add")]
    if any(others):
        lowering.launch(
            "finish_product", "finish_product", [node], [out, *others], threads=256,
            grid=lambda live: (-(-out.shape[1] // 256), rows_of(out, live), 1), when=when,
        )  # fmt: skip


def _quantized(lowering: Lowering, node: Node, x: Tensor) -> Sequence[Scratch]:
    """x as int8 in fragments of 8 rows (quantize.cuh); once for all nodes that read it."""
    most = None if lowering.batch_invariant else TILED_ROWS
    n_blocks, n_records = -(-int(x.shape[0]) // 8), x.shape[1] // RECORD
    shapes = (
        ((n_blocks, n_records * 8 * RECORD), I8),
        ((n_blocks, n_records * 8), F32),
        ((n_blocks, n_records * 16), I32),
    )
    buffers, is_new = lowering.buffers(("quantized", view_key(x)), shapes)
    if is_new:
        lowering.launch(
            "quantize_rows", "quantize_rows", [node], [*buffers, x], threads=256,
            grid=lambda live: (-(-n_records // 8), -(-rows_of(x, live) // 8), 1),
            when=Between(x, INLINE_ROWS, most),
        )  # fmt: skip
    return buffers


def rounded_rows(lowering: Lowering, node: Node, x: Tensor) -> Scratch:
    """x as bfloat16; once for all nodes that read it."""
    (buffer,), is_new = lowering.buffers(("rounded", view_key(x)), ((x.shape, BF16),))
    n_used = x.shape[1] if len(x.shape) == 3 else 1
    if is_new:
        lowering.launch(
            "round_rows", "round_rows", [node], [buffer, x], threads=128,
            grid=lambda live: (-(-x.shape[-1] // (8 * 128)), n_used, rows_of(x, live)),
            when=Between(x, COPIED_ROWS, None),
        )  # fmt: skip
    return buffer


def gemm_shared(rows: int) -> int:
    """Shared memory of a tile of that many rows (gemm.cuh)."""
    return (_STAGES * rows + 2 * TILE_COLUMNS) * RECORD * 2


def has_tiles(w: Tensor) -> bool:
    """Whether bfloat16 keeps a weight's digits, as far as quantized ones have them."""
    is_bf16 = w.dtype is WEIGHT_TYPES["BF16"] and w.shape[-1] % RECORD == 0
    return is_quantized(w) or is_bf16


def _is_of_step(t: Tensor) -> bool:
    """Whether it has a row for each token, rather than for each that needs logits."""
    return isinstance(t.shape[0], Dim) and t.shape[0].name == "n_tokens"


def _grid(t: Tensor, rows: int, blocks: int, splits: int, live: Live) -> Grid:
    """Blocks for each group of so many rows of a tensor."""
    return blocks, -(-rows_of(t, live) // rows), splits


def _gemm_grid(out: Tensor, rows: int, n_out: int, live: Live) -> Grid:
    return -(-rows_of(out, live) // rows), -(-n_out // TILE_COLUMNS), 1


LOWERINGS: dict[str, Callable[[Lowering, Node], None]] = {
    "GET_ROWS": lower_get_rows,
    "MUL_MAT": lower_mul_mat,
}
