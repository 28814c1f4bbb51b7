"""Products with the matrices of chosen experts as launches.

The experts of few tokens are multiplied one by one; those of more in tiles of rows of one expert,
by the panels as they are stored, or on tensor cores in bfloat16. Each step says for which numbers
of tokens it is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from engine.backends.cuda.device import Device, Grid
from engine.backends.cuda.launches import Condition, Lowering
from engine.backends.cuda.lower.common import Between, rows_of, warps_of
from engine.backends.cuda.lower.gemv import MAX_WARPS, Share
from engine.backends.cuda.lower.mul_mat import TILE_COLUMNS, gemm_shared, has_tiles, rounded_rows
from engine.backends.cuda.weights import PANEL
from engine.backends.native.buffers import Ref, Scratch
from engine.backends.native.signatures import is_quantized, matrices_of
from engine.backends.native.views import view_key
from engine.formats.quants import F32, I32
from engine.graph import Live, Node, Tensor

MAX_MATRICES, MAX_EXPERTS = 4, 1024  # As in mul_mat_id.cu.
# Tokens whose experts are multiplied one by one, and in tiles of 8 rows, at most.
SINGLE_TOKENS, TILE_TOKENS = 4, 64
# Rows of an expert's tiles, and how many an expert has on average from which on they are large.
TILE_ROWS, SMALL_TILE, LARGE_TILE, LARGE_FROM = 8, 32, 64, 48


def unsupported(node: Node, device: Device) -> str:
    """Why a MUL_MAT_ID can't be run; an empty string if it can."""
    matrices = matrices_of(node)
    if len(matrices) > MAX_MATRICES:
        return f"more than {MAX_MATRICES} matrices of experts in one product"
    if matrices[0].shape[0] > MAX_EXPERTS:
        return f"more than {MAX_EXPERTS} experts"
    return ""


def lower_mul_mat_id(lowering: Lowering, node: Node) -> None:
    """Experts one by one for few tokens, in tiles of rows of one expert for more."""
    matrices, ids = matrices_of(node), node.inputs["ids"]
    tiled = not lowering.batch_invariant and all(map(has_tiles, matrices))
    n_single = 0 if lowering.batch_invariant else SINGLE_TOKENS
    if n_single:
        _lower_single(lowering, node, Between(ids, 0, n_single))
    _lower_tiles(lowering, node, Between(ids, n_single, TILE_TOKENS if tiled else None))
    if tiled:
        _lower_expert_gemm(lowering, node)


def _lower_single(lowering: Lowering, node: Node, when: Condition) -> None:
    """A block for each panel of each (token, choice), or of each token with their sum."""
    x, ids, gates = (node.inputs.get(name) for name in ("x", "ids", "weights"))
    assert ids is not None
    matrices, n_used = matrices_of(node), ids.shape[1]
    padding = [None] * (MAX_MATRICES - len(matrices))
    operands = [*node.outputs, *padding, x, *matrices, *padding, ids, gates]
    blocks = sum(-(-m.shape[1] // PANEL) for m in matrices)
    share = Share(1, 1, *Share.of_warps(lowering, matrices, matrices[0].shape[2]))
    n, attrs = share.warps, [float(v) for v in (share.rounds, share.slot_bytes, share.warps)]
    if gates is None:
        lowering.launch(
            "mul_mat_id", "mul_mat_id", [node], operands, attrs,
            threads=32 * n, shared=n * share.warp_bytes(1), when=when,
            grid=lambda live: (blocks, n_used, rows_of(ids, live)),
        )  # fmt: skip
        return
    warps = min(max(MAX_WARPS // n, 1), n_used) * n
    lowering.launch(
        "mul_mat_id", "mul_mat_id_sum", [node], operands, attrs,
        threads=32 * warps, shared=warps * share.warp_bytes(0) + n_used * n * PANEL * 4, when=when,
        grid=lambda live: (blocks, rows_of(ids, live), 1),
    )  # fmt: skip


def _lower_tiles(lowering: Lowering, node: Node, when: Between) -> None:
    """Tiles of up to 8 rows of an expert times the panels as they are stored."""
    ids = node.inputs["ids"]
    order, tiles = _sorted(lowering, node, TILE_ROWS, when)
    share = _share(node)
    for out, m in zip(node.outputs, matrices_of(node), strict=True):
        target = _per_choice(node, out, m)
        lowering.launch(
            "mul_mat_id_rows", "mul_mat_id_rows", [node],
            [target, node.inputs["x"], m, order, tiles],
            threads=32 * share, shared=share * TILE_ROWS * PANEL * 4, when=when,
            grid=partial(_tile_grid, ids, m),
        )  # fmt: skip
        _lower_sum(lowering, node, out, target, when)


def _lower_expert_gemm(lowering: Lowering, node: Node) -> None:
    """Tiles of an expert's rows on tensor cores, rounded to bfloat16."""
    ids, matrices = node.inputs["ids"], matrices_of(node)
    n_used, n_experts = ids.shape[1], matrices[0].shape[0]
    from_tokens = -(-LARGE_FROM * n_experts // n_used)
    rounded = rounded_rows(lowering, node, node.inputs["x"])
    for rows, when in (
        (SMALL_TILE, Between(ids, TILE_TOKENS, max(TILE_TOKENS, from_tokens))),
        (LARGE_TILE, Between(ids, max(TILE_TOKENS, from_tokens), None)),
    ):
        order, tiles = _sorted(lowering, node, rows, when)
        for out, m in zip(node.outputs, matrices, strict=True):
            target = _per_choice(node, out, m)
            lowering.launch(
                "gemm_experts", f"gemm_experts_{rows}", [node], [target, rounded, m, order, tiles],
                threads=256, shared=gemm_shared(rows), when=when,
                grid=partial(_expert_grid, ids, m, rows),
            )  # fmt: skip
            _lower_sum(lowering, node, out, target, when)


def _lower_sum(lowering: Lowering, node: Node, out: Tensor, target: Ref, when: Condition) -> None:
    if (gates := node.inputs.get("weights")) is not None:
        lowering.launch(
            "sum_experts", "sum_experts", [node], [out, target, gates], threads=256,
            grid=lambda live: (-(-out.shape[1] // 256), rows_of(out, live), 1), when=when,
        )  # fmt: skip


def _sorted(lowering: Lowering, node: Node, tile_rows: int, when: Between) -> Sequence[Scratch]:
    """Pairs by expert, and tiles of them; once for all nodes of the same routing."""
    ids, m = node.inputs["ids"], matrices_of(node)[0]
    n_tokens, n_used = ids.shape
    n_tiles = _n_tiles(ids, m, tile_rows, int(n_tokens))
    shapes = (((int(n_tokens) * n_used,), I32), ((1 + n_tiles, 3), I32))
    key = ("sorted", tile_rows, when.more_than, when.most, view_key(ids))
    buffers, is_new = lowering.buffers(key, shapes)
    if is_new:
        lowering.launch(
            "sort_by_expert", "sort_by_expert", [node], [*buffers, ids],
            [float(m.shape[0]), float(tile_rows)], threads=1024,
            grid=lambda live: (1, 1, 1), when=when,
        )  # fmt: skip
    return buffers


def _per_choice(node: Node, out: Tensor, m: Tensor) -> Ref:
    """Where an expert's products go: the output, or what will be summed up."""
    if "weights" not in node.inputs:
        return out
    return Scratch((*node.inputs["ids"].shape, m.shape[1]), F32)


def _n_tiles(ids: Tensor, m: Tensor, rows: int, n_tokens: int) -> int:
    """The most tiles that some tokens can have."""
    n_pairs = n_tokens * int(ids.shape[1])
    return min(n_pairs, n_pairs // rows + int(m.shape[0]))


def _share(node: Node) -> int:
    """Warps that share the columns of an expert's panel."""
    m = matrices_of(node)[0]
    return warps_of(m.shape[2], plain=not is_quantized(m))


def _tile_grid(ids: Tensor, m: Tensor, live: Live) -> Grid:
    return -(-m.shape[1] // PANEL), _n_tiles(ids, m, TILE_ROWS, rows_of(ids, live)), 1


def _expert_grid(ids: Tensor, m: Tensor, rows: int, live: Live) -> Grid:
    return _n_tiles(ids, m, rows, rows_of(ids, live)), -(-m.shape[1] // TILE_COLUMNS), 1


LOWERINGS: dict[str, Callable[[Lowering, Node], None]] = {"MUL_MAT_ID": lower_mul_mat_id}
