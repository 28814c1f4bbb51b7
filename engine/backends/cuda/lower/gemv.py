"""Products of one row, with the op that makes the row in the same launch.

Every thread block of the launch computes the row for itself (mul_mat.cu), which takes less time
than a launch of its own. Products of more rows (staged.py) split columns in the same way, so that a
row has the same bits in both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.backends.cuda import kernels
from engine.backends.cuda.kernels import threads
from engine.backends.cuda.launches import MAX_COUNTERS, Launch, Lowering
from engine.backends.cuda.lower import common
from engine.backends.cuda.lower.common import (
    STATIC_SHARED,
    WARP_COLUMNS,
    RowRange,
    blocks_of,
    cut,
    first_blocks,
)
from engine.backends.native.buffers import Ref
from engine.backends.native.signatures import is_quantized, matrices_of
from engine.graph import Node, Tensor

# Warps of a thread block at most, and of a multiprocessor, by the registers that they have.
GEMV_WARPS, RESIDENT_WARPS = threads("mul_mat_1") // 32, 32
# Rows of more columns than a thread block's warps take at once are split along K, up to so many
# thread blocks for each multiprocessor.
GEMV_SPLIT_BLOCKS = 8
# A thread block has as many panels as let all thread blocks be resident, but no more than these.
MAX_PANELS = 8
_SUM_BYTES = 4 * kernels.PANEL
# Bytes for 8 rows, whose columns are split in the same way: a warp's batch and its sums of two
# panels; shared memory of the whole thread block.
_SEVERAL_BYTES, _OTHER_SHARED = 8 * kernels.BATCH_ROW_BYTES + 16 * _SUM_BYTES, 4096


# What is added to a product: ADD and SHARES of product.cuh.
Added = tuple[Ref, Ref]


@dataclass(frozen=True)
class MadeRows:
    """The rows of a product: the nodes that make them, views and attributes of row.cuh. x has the
    number of live rows."""

    nodes: Sequence[Node]
    x: Tensor
    more: Ref = None
    factor: Ref = None
    total: Ref = None
    source: int = kernels.ROW_AS_IT_IS
    eps: float = 0.0
    head: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of a token, and their columns."""
        if len(self.x.shape) == 2 or self.head:
            return 1, math.prod(self.x.shape[1:])
        return self.x.shape[1], self.x.shape[2]


def lower_gemv(lowering: Lowering, node: Node, row: MadeRows, added: Added) -> None:
    """One launch for all weights of a product of one row."""
    weights = matrices_of(node)
    split = WorkSplit.of(lowering, weights, may_split=row.source != kernels.ROW_NORM)
    blocks = blocks_of(weights, split.panels)
    padding = [None] * (kernels.MAX_WEIGHTS - len(weights))
    lowering.add(Launch(
        kernel="mul_mat_1", nodes=[*row.nodes, node],
        operands=[
            *node.outputs, *padding, row.x, row.more, row.factor, row.total, *weights, *padding,
            node.inputs.get("gate"), added[0],
            *common.split_buffers(lowering, blocks, split.splits, split.panels * kernels.PANEL),
            added[1],
        ],
        attrs=[
            row.source, row.eps, row.head, split.panels, split.rounds, split.slot_bytes,
            split.slots, *first_blocks(weights, split.panels),
        ],
        threads=32 * split.warps, shared=split.shared_bytes,
        grid=lambda live: (blocks, 1, split.splits), when=RowRange(row.x, 0, 1),
    ))  # fmt: skip


@dataclass(frozen=True)
class WorkSplit:
    """Work split of a GEMV. `panels` per thread block, `splits` thread blocks per panel along K,
    `warps` per thread block. A warp keeps up to `rounds` batches of WARP_COLUMNS columns of the row
    in shared memory, and batches of weights in a ring of `slots` slots of `slot_bytes`."""

    splits: int
    panels: int
    warps: int
    rounds: int
    slot_bytes: int
    slots: int = 1

    @classmethod
    def of(cls, lowering: Lowering, weights: Sequence[Tensor], may_split: bool) -> WorkSplit:
        """The split of a product with some weights; may_split: along K, too."""
        device, n_in = lowering.device, weights[0].shape[-1]
        quantized = [w for w in weights if is_quantized(w)]
        if not quantized:
            return cls.of_warps(lowering, weights, n_in)
        n, n_panels = device.n_multiprocessors, blocks_of(quantized)
        splits = 1
        if may_split and len(quantized) == len(weights):
            most = min(GEMV_SPLIT_BLOCKS * n, MAX_COUNTERS) // n_panels
            splits = max(1, min(most, cut(n_in, GEMV_WARPS * WARP_COLUMNS)))
        own = cls.of_warps(lowering, quantized, cut(n_in, splits))
        resident = max(RESIDENT_WARPS // own.warps, 1)
        panels = max(1, min(MAX_PANELS, cut(n_panels * splits, n * resident)))
        split = replace(own, splits=splits, panels=panels)
        # More slots leave room for as many thread blocks.
        resident = min(resident, cut(cut(n_panels * splits, panels), n))
        room = device.shared_bytes // resident - STATIC_SHARED - split.shared_bytes
        slots = 1 + max(room, 0) // (split.warps * split.slot_bytes)
        return replace(split, slots=min(kernels.MAX_SLOTS, panels * split.rounds, slots))

    @classmethod
    def of_warps(cls, lowering: Lowering, weights: Sequence[Tensor], columns: int) -> WorkSplit:
        """The split of one panel's columns among a thread block's warps. Plain weights have neither
        rounds nor slots."""
        quantized = [w for w in weights if is_quantized(w)]
        if not quantized:
            return cls(1, 1, common.plain_warps(columns), 0, 0)
        slot = max(lowering.weights.part_bytes(w, WARP_COLUMNS) for w in quantized)
        slot += kernels.ARRIVALS_BYTES
        batches = cut(columns, WARP_COLUMNS)
        left = lowering.device.shared_bytes - (batches + GEMV_WARPS) * kernels.ROW_BATCH_BYTES
        several = (lowering.device.shared_bytes - _OTHER_SHARED) // (slot + _SEVERAL_BYTES)
        most = max(1, min(GEMV_WARPS, left // (slot + _SUM_BYTES * MAX_PANELS), several))
        rounds = cut(batches, most)
        return cls(1, 1, cut(batches, rounds), rounds, slot)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread block: of each warp batches of the row, the ring, sums, the sum
        of squares."""
        ring, sums = self.slots * self.slot_bytes, _SUM_BYTES * self.panels + 4
        return self.warps * (self.rounds * kernels.ROW_BATCH_BYTES + ring + sums)


def swiglu_row(act: Node, number: str = "") -> MadeRows:
    """The rows of a SWIGLU's pair of that number."""
    gate, up = (act.inputs[name + number] for name in ("gate", "up"))
    return MadeRows([act], gate, up, source=kernels.ROW_SWIGLU)


def norm_row(norm: Node, source: int = kernels.ROW_NORM) -> MadeRows:
    delta, weight = norm.inputs.get("delta"), norm.inputs["weight"]
    total = norm.outputs[1] if delta is not None else None
    x, eps = norm.inputs["x"], norm.attrs["eps"]
    return MadeRows([norm], x, delta, weight, total, source, eps)


def gated_row(norm: Node) -> MadeRows:
    x, gate, weight = (norm.inputs[name] for name in ("x", "gate", "weight"))
    is_silu = norm.attrs["act"] == "silu"
    source = kernels.ROW_GATED_SILU if is_silu else kernels.ROW_GATED_SIGMOID
    return MadeRows([norm], x, gate, weight, None, source, norm.attrs["eps"], x.shape[2])
