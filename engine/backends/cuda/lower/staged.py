"""Products of several rows with quantized weights, from rows that a launch before has staged.

STAGE_ROWS rounds rows to integers of 15 bits, and may compute them from an op's inputs. Products
split columns as a single row's do (gemv.py), and a row has the same bits in both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial

from engine.backends.cuda import kernels
from engine.backends.cuda.device import Device, Grid
from engine.backends.cuda.kernels import K_BLOCK, PANEL, threads
from engine.backends.cuda.launches import Launch, Lowering
from engine.backends.cuda.lower import common
from engine.backends.cuda.lower.common import (
    NO_END,
    STATIC_SHARED,
    RowRange,
    blocks_of,
    cut,
    first_blocks,
    fitting,
    rows_of,
)
from engine.backends.cuda.lower.gemv import Added, MadeRows, WorkSplit, norm_row
from engine.backends.native.buffers import Ref, Scratch
from engine.backends.native.signatures import is_quantized, matrices_of
from engine.backends.native.views import I8, view_key
from engine.formats.quants import F32
from engine.graph import Live, Node, Tensor

# Panels and teams of a thread block, at most.
STAGED_PANELS, MAX_TEAMS = 24, 8
# The time that a thread block takes to begin and end, and a warp for a batch by itself. Of weights
# that are fetched behind the inputs, a batch's to arrive, and a multiprocessor's to get one. Units:
# what a multiprocessor takes to compute a batch.
BEGIN_TIME, BATCH_TIME, ARRIVAL_TIME, MEMORY_TIME = 24, 16, 20, 1.45
# Warps of a thread block that stages a row; of a norm that is stored, at most.
STAGE_WARPS, NORM_WARPS = 4, 16
# Rows whose kernel before is a long one, so that there is time for a rehearsal.
_REHEARSING = kernels.ROW_NORM, kernels.ROW_SWIGLU
_HEAD_FLOATS = kernels.BATCH_HEAD_BYTES // 4


@dataclass(frozen=True)
class StagedRows:
    """Buffers of staged rows: integers, heads of batches, a norm's factors, and rows of floats for
    plain weights where these are not x."""

    q: Scratch
    heads: Scratch
    factors: Ref = None
    floats: Ref = None


def stage(
    lowering: Lowering, node: Node, made: MadeRows, rows: RowRange, warps: int, floats: Ref = None
) -> StagedRows:
    """Stage rows; once for all nodes that read the same x. warps: of a row's thread block, if the
    row is a norm. floats: the buffer of a norm's floats, if they are read, too."""
    x, is_norm = made.x, made.source in (kernels.ROW_NORM, kernels.ROW_NORMED)
    per_token, n_in = made.shape
    n = min(int(x.shape[0]), NO_END if rows.most is None else rows.most) * per_token
    n_k_blocks = n_in // K_BLOCK
    key = ("staged", tuple(made.nodes) or view_key(x), rows.more_than, rows.most)
    n_batches = cut(n_k_blocks, kernels.BATCH)
    shapes = [((n, n_batches * kernels.STAGED_BYTES), I8), ((n, n_batches * _HEAD_FLOATS), F32)]
    shapes += [((n, 1), F32)] * (made.source == kernels.ROW_NORM)
    buffers, is_new = lowering.buffers(key, shapes)
    q, heads, *factors = buffers
    staged = StagedRows(q, heads, factors[0] if factors else None, floats)
    if is_new:
        n_warps = warps if is_norm else STAGE_WARPS
        n_blocks = 1 if is_norm else cut(n_k_blocks, STAGE_WARPS * kernels.BATCH)
        lowering.add(Launch(
            kernel="stage_rows", nodes=[*made.nodes, node],
            operands=[
                q, heads, staged.factors, floats, x, made.more, made.factor, made.total,
            ],
            attrs=[made.source, made.eps, made.head, n_k_blocks, made.source in _REHEARSING],
            threads=32 * n_warps,
            grid=lambda live: (rows_of(x, live) * per_token, n_blocks, 1), when=rows,
        ))  # fmt: skip
    return staged


def stage_norm(lowering: Lowering, norm: Node, reader: Node, most: int | None) -> StagedRows:
    """Stage the rows of a norm, for up to `most` rows, and store them as floats, too."""
    made = norm_row(norm, kernels.ROW_NORMED)
    warps = min(NORM_WARPS, cut(made.shape[1], K_BLOCK * kernels.BATCH))
    return stage(lowering, reader, made, RowRange(made.x, 0, most), warps, norm.outputs[0])


def lower_staged(
    lowering: Lowering, node: Node, made: MadeRows, added: Added, most: int | None,
    staged: StagedRows | None = None, rehearses: bool = False,
) -> None:  # fmt: skip
    """Products of 2 to `most` rows (None: any number): one launch for all weights. staged: the
    rows, if a launch before has made them. rehearses: whether its thread blocks wait long enough
    for a rehearsal."""
    weights, x = matrices_of(node), made.x
    split = WorkSplit.of(lowering, weights, may_split=made.source != kernels.ROW_NORM)
    rows = RowRange(x, 1, most)
    if staged is None:
        is_read = made.source == kernels.ROW_NORM and not all(map(is_quantized, weights))
        n = int(x.shape[0]) if most is None else min(int(x.shape[0]), most)
        floats = Scratch((n, made.shape[1]), F32) if is_read else None
        staged = stage(lowering, node, made, rows, split.warps, floats)
    padding = [None] * (kernels.MAX_WEIGHTS - len(weights))
    for n_rows, splits, when in _passes(lowering.device, rows, split):
        kernel = f"mul_mat_rows_{n_rows}"
        needs = _needs(split, n_rows, splits < split.splits)
        n_panels = blocks_of(weights) * splits
        block = shape_of(lowering.device, needs, n_panels, threads(kernel) // 32)
        groups = n_rows // kernels.PLAIN_ROWS
        blocks = blocks_of(weights, block.panels, groups)
        n_sums = block.panels * PANEL * n_rows
        lowering.add(Launch(
            kernel=kernel, nodes=[*made.nodes, node],
            operands=[
                *node.outputs, *padding, x, staged.q, staged.heads, staged.factors,
                *weights, *padding, node.inputs.get("gate"), added[0],
                *common.split_buffers(lowering, blocks, splits, n_sums), added[1], staged.floats,
            ],
            attrs=[
                block.panels, cut(block.panels, block.teams), block.teams, split.warps,
                split.splits, split.slot_bytes, rehearses,
                *first_blocks(weights, block.panels, groups),
            ],
            threads=32 * split.warps * block.teams, shared=block.shared, when=when,
            grid=partial(_grid, x, blocks, n_rows, splits),
        ))  # fmt: skip


def _passes(
    device: Device, rows: RowRange, split: WorkSplit
) -> Iterator[tuple[int, int, RowRange]]:
    """(rows of a pass, thread blocks that share a panel's columns, rows of the step)."""
    table: list[tuple[int, int | None, int, int]] = [
        (1, 4, 4, split.splits), (4, 8, 8, split.splits)
    ]  # fmt: skip
    if fitting(device, _needs(split, 16, True).shared_bytes(1, 1)):
        table += [(8, 16, 16, split.splits), (16, None, 16, 1)]
    else:
        table += [(8, None, 8, 1)]
    for more_than, most, n_rows, n_splits in table:
        last = most if rows.most is None else min(rows.most, NO_END if most is None else most)
        if last is None or last > more_than:
            yield n_rows, n_splits, RowRange(rows.tensor, more_than, last)


@dataclass(frozen=True)
class BlockNeeds:
    """A thread block's work and shared memory. warps: of a team; batches: of a warp for a panel.
    Bytes: of a warp's rows in all teams, of its sums of a panel, of a slot, and of a panel's totals
    in the thread block. prefetched: whether weights are fetched while thread blocks wait for the
    kernel before; then a ring has one slot, which leaves room for the kernels behind."""

    warps: int
    batches: int
    row_bytes: int
    sum_bytes: int
    slot_bytes: int
    total_bytes: int = 0
    prefetched: bool = True

    def shared_bytes(self, teams: int, panels: int, slots: int = 1) -> int:
        of_warps = self.row_bytes + panels * self.sum_bytes + teams * slots * self.slot_bytes
        return self.warps * of_warps + panels * self.total_bytes


def _needs(split: WorkSplit, n_rows: int, totals: bool) -> BlockNeeds:
    """The needs of a product of so many rows; with `totals` there are sums of all splits."""
    row_bytes, sum_bytes = n_rows * kernels.BATCH_ROW_BYTES, n_rows * PANEL * 4
    return BlockNeeds(
        split.warps, split.rounds, row_bytes, sum_bytes, split.slot_bytes, totals * sum_bytes
    )


@dataclass(frozen=True)
class BlockShape:
    """A thread block's teams of warps, the panels of all of them, slots of a warp's ring."""

    teams: int
    panels: int
    slots: int
    shared: int


def shape_of(
    device: Device, needs: BlockNeeds, n_panels: int, most_warps: int, most_teams: int = MAX_TEAMS
) -> BlockShape:
    """The thread blocks that should take the least time with so many panels. most_warps: of a
    multiprocessor."""
    n, room = device.n_multiprocessors, device.shared_bytes
    return _shape_of(n, room, needs, n_panels, most_warps, most_teams)


@cache
def _shape_of(
    n_multiprocessors: int, room: int, needs: BlockNeeds, n_panels: int, most_warps: int,
    most_teams: int,
) -> BlockShape:  # fmt: skip
    most_slots = 1 if needs.prefetched else kernels.MAX_SLOTS
    shapes = (
        BlockShape(teams, panels, slots, needs.shared_bytes(teams, panels, slots))
        for teams in range(1, most_teams + 1)
        for panels in range(teams, STAGED_PANELS + 1)
        for slots in range(1, most_slots + 1)
        if slots <= cut(panels, teams) * needs.batches
    )

    def time(shape: BlockShape) -> float:
        warps = shape.teams * needs.warps
        resident = min(room // (shape.shared + STATIC_SHARED), most_warps // warps)
        if resident == 0:
            return math.inf
        blocks = cut(cut(n_panels, shape.panels), n_multiprocessors)
        resident = min(resident, blocks)
        alone, shared = BATCH_TIME + ARRIVAL_TIME / shape.slots, MEMORY_TIME
        if needs.prefetched:
            alone, shared = BATCH_TIME, 1.0
        batch = max(resident * warps * shared, alone)
        own = cut(shape.panels, shape.teams) * needs.batches
        return cut(blocks, resident) * (BEGIN_TIME + own * batch)

    return min(shapes, key=time)


def _grid(x: Tensor, blocks: int, n_rows: int, splits: int, live: Live) -> Grid:
    return blocks, cut(rows_of(x, live), n_rows), splits
