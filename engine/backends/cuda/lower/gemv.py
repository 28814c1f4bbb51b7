"""Products of one row as launches, with the op that makes the row computed on the way.

Every block of a launch makes the row for itself (mul_mat.cu), which takes less time than a
launch of its own would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.backends.cuda.launches import MAX_COUNTERS, Lowering
from engine.backends.cuda.lower.common import (
    MAX_WEIGHTS,
    Between,
    blocks_of,
    shared_sums,
    warps_of,
)
from engine.backends.cuda.weights import PANEL, RECORD
from engine.backends.native.buffers import Ref
from engine.backends.native.signatures import is_quantized
from engine.graph import Node, Tensor

# As RowSource in row.cuh.
_AS_IT_IS, _SWIGLU, _NORM, _GATED = 0, 1, 2, {"silu": 3, "sigmoid": 4}
# Warps of a block share the columns of a row, 256 each at a time; of a multiprocessor, with the
# registers that they have (mul_mat_1's bounds).
MAX_WARPS, WARP_COLUMNS, RESIDENT_WARPS = 16, 256, 32
# More columns than a block's warps have at once are shared by blocks, as long as these are no more
# than so many for each multiprocessor.
SPLIT_BLOCKS = 8
# A block has so many panels that all blocks are there at once, but no more than these.
MAX_PANELS = 8
# What a warp keeps of a row (RowBatch), and its sums of a panel.
_BATCH_BYTES, _SUM_BYTES = 8 * (2 * RECORD + 16) + RECORD, 4 * PANEL
# A norm is not worth computing in more blocks than these.
NORM_BLOCKS = 2048


@dataclass(frozen=True)
class Row:
    """What a product's row is: views and attributes of mul_mat.cu."""

    nodes: Sequence[Node]
    x: Tensor
    more: Ref = None
    factor: Ref = None
    total: Ref = None
    attrs: tuple[float, ...] = (_AS_IT_IS, 0.0, 0.0)


def lower_row(
    lowering: Lowering, node: Node, outs: Mapping[Tensor, Tensor], row: Row | None = None
) -> None:
    """One launch for all weights of a product of one row."""
    row, weights = row or Row([], node.inputs["x"]), list(outs)
    share = Share.of(lowering, weights, may_split=row.attrs[0] != _NORM)
    blocks = blocks_of(weights, share.panels)
    padding = [None] * (MAX_WEIGHTS - len(weights))
    lowering.launch(
        "mul_mat", "mul_mat_1", [*row.nodes, node],
        [
            *outs.values(), *padding, row.x, row.more, row.factor, row.total, *weights, *padding,
            node.inputs.get("gate"), node.inputs.get("add"),
            *shared_sums(lowering, blocks, share.splits, share.panels * PANEL),
        ],
        [*row.attrs, share.panels, share.rounds, share.slot_bytes],
        threads=32 * share.warps, shared=share.warps * share.warp_bytes(share.panels),
        grid=lambda live: (blocks, 1, share.splits), when=Between(row.x, 0, 1),
    )  # fmt: skip


@dataclass(frozen=True)
class Share:
    """How a product of one row is shared: by blocks that have so many panels each, `splits` of them
    the columns of each panel, and by a block's warps. Of these each has up to `rounds` batches of
    256 columns, and room for one of weights."""

    splits: int
    panels: int
    warps: int
    rounds: int
    slot_bytes: int

    @classmethod
    def of(cls, lowering: Lowering, weights: Sequence[Tensor], may_split: bool) -> Share:
        """Of a product with some weights, where blocks may share columns or not."""
        device, n_in = lowering.device, weights[0].shape[-1]
        quantized = [w for w in weights if is_quantized(w)]
        if not quantized:
            return cls(1, 1, *cls.of_warps(lowering, weights, n_in))
        n, n_panels = device.n_multiprocessors, blocks_of(quantized)
        most = min(SPLIT_BLOCKS * n, MAX_COUNTERS) // n_panels
        splits = -(-n_in // (MAX_WARPS * WARP_COLUMNS))
        may_split = may_split and len(quantized) == len(weights)
        splits = max(1, min(most, splits)) if may_split else 1
        columns = -(-n_in // splits)
        warps, rounds, slot = cls.of_warps(lowering, quantized, columns)
        resident = n * max(RESIDENT_WARPS // warps, 1)
        panels = max(1, min(MAX_PANELS, -(-n_panels * splits // resident)))
        return cls(splits, panels, warps, rounds, slot)

    @staticmethod
    def of_warps(
        lowering: Lowering, weights: Sequence[Tensor], columns: int
    ) -> tuple[int, int, int]:
        """A block's warps, rounds and bytes of a slot, for so many columns; plain weights have use
        for neither rounds nor slots."""
        quantized = [w for w in weights if is_quantized(w)]
        if not quantized:
            return warps_of(columns, plain=True), 0, 0
        slot = max(lowering.weights.part_bytes(w, WARP_COLUMNS) for w in quantized)
        batches = -(-columns // WARP_COLUMNS)
        room = lowering.device.shared_bytes - (batches + MAX_WARPS) * _BATCH_BYTES
        most = max(1, min(MAX_WARPS, room // (slot + _SUM_BYTES * MAX_PANELS)))
        rounds = -(-batches // most)
        return -(-batches // rounds), rounds, slot

    def warp_bytes(self, panels: int) -> int:
        """Of a warp's shared memory."""
        return self.rounds * _BATCH_BYTES + self.slot_bytes + _SUM_BYTES * panels + 4


def is_worth_a_norm(weights: Sequence[Tensor]) -> bool:
    """Whether a row is cheaper computed in all blocks than by a launch of its own."""
    return blocks_of(weights) <= NORM_BLOCKS


def swiglu_row(nodes: Sequence[Node]) -> Row:
    """Of a SWIGLU."""
    act, _ = nodes
    return Row([act], act.inputs["gate"], act.inputs["up"], attrs=(_SWIGLU, 0.0, 0.0))


def norm_row(nodes: Sequence[Node]) -> Row:
    """Of an ADD_RMS_NORM."""
    norm, _ = nodes
    delta, weight = norm.inputs.get("delta"), norm.inputs["weight"]
    total = norm.outputs[1] if delta is not None else None
    attrs = (_NORM, norm.attrs["eps"], 0.0)
    return Row([norm], norm.inputs["x"], delta, weight, total, attrs)


def gated_row(nodes: Sequence[Node]) -> Row:
    """Of an RMS_NORM_GATED."""
    norm, _ = nodes
    x, eps, act = norm.inputs["x"], norm.attrs["eps"], norm.attrs["act"]
    attrs = (_GATED[act], eps, x.shape[2])
    return Row([norm], x, norm.inputs["gate"], norm.inputs["weight"], attrs=attrs)
