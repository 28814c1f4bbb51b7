"""Products of several rows with quantized weights, from rows that a launch before has staged.

STAGE_ROWS rounds rows to integers of 15 bits, and may compute them from an op's inputs. Products
split columns as a single row's do (gemv.py), and a row has the same bits in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from engine.backends.cuda import kernels
from engine.backends.cuda.device import Device, Grid
from engine.backends.cuda.kernels import K_BLOCK, PANEL, threads
from engine.backends.cuda.launches import Launch, Lowering
from engine.backends.cuda.lower import common
from engine.backends.cuda.lower.common import (
    NO_END,
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
# Warps of a multiprocessor from which on more of them save no time; and what a thread block takes
# to begin and end, in batches of a panel.
BUSY_WARPS, BEGIN_BATCHES = 16, 24
# Warps of a thread block that stages a row; of a norm that is stored, at most.
STAGE_WARPS, NORM_WARPS = 4, 16
_SUM_BYTES = 8 * PANEL * 4
_HEAD_FLOATS = kernels.BATCH_HEAD_BYTES // 4
# Bytes of shared memory of a thread block that has so many teams and panels.
Shared = Callable[[int, int], int]


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
            attrs=[made.source, made.eps, made.head, n_k_blocks], threads=32 * n_warps,
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
    staged: StagedRows | None = None,
) -> None:  # fmt: skip
    """Products of 2 to `most` rows (None: any number): one launch for all weights. staged: the
    rows, if a launch before has made them."""
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
        block = shape_of(
            lowering.device, split, blocks_of(weights) * splits, threads(kernel) // 32,
            partial(_shared_bytes, split, n_rows, splits < split.splits),
        )  # fmt: skip
        blocks = blocks_of(weights, block.panels)
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
                split.splits, split.slot_bytes,
                *first_blocks(weights, block.panels),
            ],
            threads=32 * split.warps * block.teams, shared=block.shared, when=when,
            grid=partial(_grid, x, blocks, n_rows, splits),
        ))  # fmt: skip


def _passes(
    device: Device, rows: RowRange, split: WorkSplit
) -> Iterator[tuple[int, int, RowRange]]:
    """(rows of a pass, thread blocks that share a panel's columns, rows of the step)."""
    table: list[tuple[int, int | None, int, int]] = [(1, 8, 8, split.splits)]
    if fitting(device, _shared_bytes(split, 16, True, 1, 1)):
        table += [(8, 16, 16, split.splits), (16, None, 16, 1)]
    else:
        table += [(8, None, 8, 1)]
    for more_than, most, n_rows, n_splits in table:
        last = most if rows.most is None else min(rows.most, NO_END if most is None else most)
        if last is None or last > more_than:
            yield n_rows, n_splits, RowRange(rows.tensor, more_than, last)


@dataclass(frozen=True)
class BlockShape:
    """A thread block's teams of warps, and the panels of all of them."""

    teams: int
    panels: int
    shared: int


def shape_of(
    device: Device, split: WorkSplit, n_panels: int, most_warps: int, shared: Shared,
    most_teams: int = MAX_TEAMS,
) -> BlockShape:  # fmt: skip
    """The thread blocks that should take the least time with so many panels. most_warps: of a
    multiprocessor. shared: bytes of a thread block's shared memory, by its teams and panels."""
    best: tuple[float, BlockShape] | None = None
    for teams in range(1, most_teams + 1):
        for panels in range(teams, STAGED_PANELS + 1):
            n_bytes, warps = shared(teams, panels), teams * split.warps
            resident = min(fitting(device, n_bytes), most_warps // warps)
            if resident == 0 and (best or teams * panels > 1):
                continue
            resident = max(resident, 1)
            waves = cut(cut(n_panels, panels), resident * device.n_multiprocessors)
            batches = resident * cut(panels, teams) * teams * split.warps * split.rounds
            busy = min(resident * warps, BUSY_WARPS) / BUSY_WARPS
            time = waves * (BEGIN_BATCHES + batches) / busy
            if best is None or time < best[0]:
                best = time, BlockShape(teams, panels, n_bytes)
    assert best is not None
    return best[1]


def _shared_bytes(split: WorkSplit, n_rows: int, totals: bool, teams: int, panels: int) -> int:
    """Shared memory of a thread block: batches of rows, slots, and sums; with `totals` sums of
    all."""
    n_groups = n_rows // 8
    sums = panels * n_groups * _SUM_BYTES
    rows = split.warps * (n_groups * kernels.BATCH_ROWS_BYTES + sums)
    return rows + teams * split.warps * split.slot_bytes + totals * sums


def _grid(x: Tensor, blocks: int, n_rows: int, splits: int, live: Live) -> Grid:
    return blocks, cut(rows_of(x, live), n_rows), splits
