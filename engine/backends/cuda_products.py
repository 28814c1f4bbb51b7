"""Matrix products and tables of packed weights as launches; those of experts: cuda_experts.py.

Few rows are multiplied by the panels as they are stored, with int8 activations (product.cuh); many
as bfloat16 by cuBLAS, or by gemm.cuh where there is no room for a weight's copy. Each step says for
which numbers of rows it is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from engine.backends.cuda_device import Device, Grid
from engine.backends.cuda_kernels import GET_ROWS, add_launch, add_small
from engine.backends.cuda_program import MAX_COUNTERS, Condition, Lowering, always
from engine.backends.cuda_weights import PANEL, RECORD, expand_grid
from engine.backends.lowering import (
    BF16,
    I8,
    Ref,
    Scratch,
    is_quantized,
    matrices_of,
    view_key,
)
from engine.backends.uses import Uses
from engine.graph import Dim, Kind, Live, Node, Tensor
from engine.quants import F32, I32, WEIGHT_TYPES

TILE_COLUMNS = 128
MAX_WEIGHTS = 6  # As in product.cuh.
# Warps of a block share the columns of a panel, 256 each at a time (of plain weights 128).
MAX_WARPS, WARP_COLUMNS, PLAIN_WARP_COLUMNS = 8, 256, 128
# Where a node has few panels, blocks share their columns, of which each has at least so many: up to
# SPLIT_BLOCKS blocks for each multiprocessor.
SPLIT_BLOCKS, SPLIT_COLUMNS = 4, 2048
# Rows that blocks quantize for themselves at most; those of one pass over a weight; and the most
# that are multiplied so: more are a product of matrices.
INLINE_ROWS, ROWS_OF_PASS, FEW_ROWS = 4, (1, 2, 4, 8, 16, 32, 64), 64
PLAIN_ROWS = 8  # Of a pass over plain weights, at most.
_SOURCE_OF_PASS = dict.fromkeys(ROWS_OF_PASS, "mul_mat_rows")
_SOURCE_OF_PASS |= {1: "mul_mat", 2: "mul_mat", 4: "mul_mat_some", 8: "mul_mat_some"}
# Warps on a multiprocessor with all the registers that products of one row want. Where all of a
# launch are there at once, a warp's own time counts, else how many there are (H200: 6 % more
# tokens/s of 0.8B Q4_0 with these registers, 7 % more of 4B Q4_K_M without).
ROOMY_WARPS = 20
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


def lower_mul_mat(lowering: Lowering, node: Node) -> None:
    """One launch for all weights of few rows; of many, one product for each."""
    weights = matrices_of(node)
    tiled = [] if lowering.batch_invariant else [w for w in weights if has_tiles(w)]
    outs = dict(zip(weights, node.outputs, strict=True))
    x = node.inputs["x"]

    def many(live: Live) -> bool:
        return rows_of(x, live) > FEW_ROWS

    if tiled:
        _lower_passes(lowering, node, outs, when=lambda live: not many(live))
        rest = {w: out for w, out in outs.items() if w not in tiled}
        if rest:
            _lower_passes(lowering, node, rest, when=many)
        for w in tiled:
            _lower_gemm(lowering, node, outs[w], w, many)
    else:
        _lower_passes(lowering, node, outs, when=always)


def lower_swiglu_mul_mat(lowering: Lowering, nodes: Sequence[Node]) -> None:
    """SWIGLU and the product that alone reads it: of few rows in one launch."""
    act, product = nodes
    pair = act.inputs["gate"], act.inputs["up"]

    def few(live: Live) -> bool:
        return rows_of(product.inputs["x"], live) <= INLINE_ROWS

    with lowering.only(lambda live: not few(live)):
        add_small(lowering, act)
        lower_mul_mat(lowering, product)
    (weight,), (out,) = matrices_of(product), product.outputs
    _lower_passes(lowering, product, {weight: out}, few, (act, *pair))


def reads_swiglu(nodes: Sequence[Node], uses: Uses) -> bool:
    """Whether these can be lowered by `lower_swiglu_mul_mat`."""
    act, product = nodes
    if len(act.outputs) != 1 or product.inputs["x"] is not act.outputs[0]:
        return False
    (out,), weights = act.outputs, matrices_of(product)
    return uses.only_by(out, product) and len(weights) == 1 and is_quantized(weights[0])


def _lower_passes(
    lowering: Lowering,
    node: Node,
    outs: dict[Tensor, Tensor],
    when: Condition,
    swiglu: tuple[Node, Tensor, Tensor] | None = None,
) -> None:
    """Passes of up to 64 rows over the panels, for each size of pass a launch. `swiglu`: a node and
    its operands, which is computed on the way to passes of few rows; there are no others then."""
    x, weights = node.inputs["x"], list(outs)
    quantized = any(is_quantized(w) for w in weights)
    sizes = [n for n in ROWS_OF_PASS if quantized or n <= PLAIN_ROWS]
    nodes, up = [node], None
    if swiglu is not None:
        act, x, up = swiglu
        nodes, sizes = [act, node], [n for n in sizes if n <= INLINE_ROWS]
    plain = not all(is_quantized(w) for w in weights)
    blocks = sum(-(-w.shape[0] // PANEL) * (1 if is_quantized(w) else 2) for w in weights)
    may_split = not plain and not lowering.batch_invariant
    splits = splits_of(lowering.device, blocks, x.shape[1]) if may_split else 1
    warps = warps_of(-(-x.shape[1] // splits), plain)
    is_roomy = blocks * splits <= lowering.device.n_multiprocessors * (ROOMY_WARPS // warps)
    converted: Sequence[Ref] = (None, None, None)
    if quantized and up is None:
        converted = _quantized(
            lowering, node, x, lambda live: when(live) and rows_of(x, live) > INLINE_ROWS
        )
    padding = [None] * (MAX_WEIGHTS - len(weights))
    others = [node.inputs.get("gate"), node.inputs.get("add")]
    for i, n in enumerate(sizes):
        fewer, last = sizes[i - 1] if i else 0, n == sizes[-1]
        inline = n <= INLINE_ROWS
        operands = [*outs.values(), *padding, x, *([None] * 3 if inline else converted)]
        lowering.launch(
            _SOURCE_OF_PASS[n], "mul_mat_1_roomy" if n == 1 and is_roomy else f"mul_mat_{n}", nodes,
            [*operands, *weights, *padding, *others, up, *_shared_sums(lowering, blocks, splits)],
            threads=32 * warps, shared=warps * n * PANEL * 4,
            grid=partial(_grid, x, n, blocks, splits),
            when=Between(x, fewer, None if last else n, when),
        )  # fmt: skip


def splits_of(device: Device, blocks: int, n_in: int) -> int:
    """Blocks that share a panel's columns."""
    most = SPLIT_BLOCKS * device.n_multiprocessors // blocks
    return max(1, min(most, n_in // SPLIT_COLUMNS)) if blocks <= MAX_COUNTERS else 1


def _shared_sums(lowering: Lowering, blocks: int, splits: int) -> Sequence[Ref]:
    """Room for what `splits` blocks have of up to 64 rows of a panel, and counters."""
    if splits == 1:
        return (None, None)
    return (Scratch((blocks * splits, FEW_ROWS * PANEL), F32), lowering.counters)


def _lower_gemm(lowering: Lowering, node: Node, out: Tensor, w: Tensor, when: Condition) -> None:
    """Many rows times one weight: by cuBLAS with the weight's copy in bfloat16, else expanded into
    a buffer if that pays, else decoded on the way."""
    rounded = rounded_rows(lowering, node, node.inputs["x"])
    gate, add = node.inputs.get("gate"), node.inputs.get("add")
    if _is_of_step(out) and lowering.weights.keep_bf16(w):
        lowering.gemm([node], out, rounded, w, when=when)
        _lower_finish(lowering, node, out, when)
        return
    most = None
    if _is_of_step(out):
        most = max(EXPANDED_ROWS, FEW_ROWS + 1) - 1
        expanded, copy = Between(out, most, None, when), Scratch(w.shape, BF16)
        lowering.launch(
            "expand", "expand", [node], [copy, w], threads=256,
            grid=lambda live: expand_grid(w), when=expanded,
        )  # fmt: skip
        lowering.gemm([node], out, rounded, copy, when=expanded)
        _lower_finish(lowering, node, out, expanded)
    for rows, name, condition in (
        (64, "gemm_64", Between(out, 0, min(GEMM_ROWS, most or GEMM_ROWS), when)),
        (128, "gemm_128", Between(out, GEMM_ROWS, most, when)),
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


def _quantized(lowering: Lowering, node: Node, x: Tensor, when: Condition) -> Sequence[Scratch]:
    """x as int8 in fragments of 8 rows (quantize.cuh); once for all nodes that read it."""
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
            grid=lambda live: (-(-n_records // 8), -(-rows_of(x, live) // 8), 1), when=when,
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
            when=Between(x, FEW_ROWS, None),
        )  # fmt: skip
    return buffer


def warps_of(n_in: int, plain: bool) -> int:
    """Warps that share a panel's columns, so many that all have as much to do; whatever the rows,
    as sums depend on it."""
    parts = -(-n_in // (PLAIN_WARP_COLUMNS if plain else WARP_COLUMNS))
    rounds = -(-parts // MAX_WARPS)
    return -(-parts // rounds)


def gemm_shared(rows: int) -> int:
    """Shared memory of a tile of that many rows (gemm.cuh)."""
    return (_STAGES * rows + 2 * TILE_COLUMNS) * RECORD * 2


def has_tiles(w: Tensor) -> bool:
    """Whether bfloat16 keeps a weight's digits, as far as quantized ones have them."""
    is_bf16 = w.dtype is WEIGHT_TYPES["BF16"] and w.shape[-1] % RECORD == 0
    return is_quantized(w) or is_bf16


def rows_of(t: Tensor, live: Live) -> int:
    return live.shape(t.shape)[0]


def _is_of_step(t: Tensor) -> bool:
    """Whether it has a row for each token, rather than for each that needs logits."""
    return isinstance(t.shape[0], Dim) and t.shape[0].name == "n_tokens"


def _grid(t: Tensor, rows: int, blocks: int, splits: int, live: Live) -> Grid:
    """Blocks for each group of so many rows of a tensor."""
    return blocks, -(-rows_of(t, live) // rows), splits


def _gemm_grid(out: Tensor, rows: int, n_out: int, live: Live) -> Grid:
    return -(-rows_of(out, live) // rows), -(-n_out // TILE_COLUMNS), 1


@dataclass(frozen=True)
class Between:
    """Whether a tensor has more live rows than one number, and at most another."""

    tensor: Tensor
    more_than: int
    most: int | None
    also: Condition = always

    def __call__(self, live: Live) -> bool:
        n = rows_of(self.tensor, live)
        return n > self.more_than and (self.most is None or n <= self.most) and self.also(live)


LOWERINGS: dict[str, Callable[[Lowering, Node], None]] = {
    "GET_ROWS": lower_get_rows,
    "MUL_MAT": lower_mul_mat,
}
