"""What products over panels of packed weights share: for which rows they are launched, and how
warps and blocks share a panel's columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.backends.cuda.device import Device
from engine.backends.cuda.launches import MAX_COUNTERS, Lowering
from engine.backends.cuda.weights import PANEL
from engine.backends.native.buffers import Ref, Scratch
from engine.backends.native.signatures import is_quantized
from engine.formats.quants import F32
from engine.graph import Live, Tensor

MAX_WEIGHTS = 6  # Of a product, as in product.cuh.
# Warps of a block share the columns of a panel, 256 each at a time (of plain weights 128).
MAX_WARPS, WARP_COLUMNS, PLAIN_WARP_COLUMNS = 8, 256, 128
# Where a node has few panels, blocks share their columns, of which each has at least so many: up to
# SPLIT_BLOCKS blocks for each multiprocessor.
SPLIT_BLOCKS, SPLIT_COLUMNS = 4, 2048


@dataclass(frozen=True)
class Between:
    """Whether a tensor has more live rows than one number, and at most another."""

    tensor: Tensor
    more_than: int
    most: int | None

    def __call__(self, live: Live) -> bool:
        n = rows_of(self.tensor, live)
        return n > self.more_than and (self.most is None or n <= self.most)


def rows_of(t: Tensor, live: Live) -> int:
    """Live rows of a tensor."""
    return live.shape(t.shape[:1])[0]


def blocks_of(weights: Sequence[Tensor], panels: int = 1) -> int:
    """Blocks that have so many panels of a weight each, of plain weights half a panel."""
    counts = ((-(-w.shape[0] // PANEL), is_quantized(w)) for w in weights)
    return sum(-(-n // panels) if quantized else 2 * n for n, quantized in counts)


def warps_of(n_in: int, plain: bool) -> int:
    """Warps that share a panel's columns, so many that all have as much to do; whatever the rows,
    as sums depend on it."""
    parts = -(-n_in // (PLAIN_WARP_COLUMNS if plain else WARP_COLUMNS))
    rounds = -(-parts // MAX_WARPS)
    return -(-parts // rounds)


def splits_of(device: Device, blocks: int, n_in: int) -> int:
    """Blocks that share a panel's columns."""
    most = SPLIT_BLOCKS * device.n_multiprocessors // blocks
    return max(1, min(most, n_in // SPLIT_COLUMNS)) if blocks <= MAX_COUNTERS else 1


def shared_sums(lowering: Lowering, blocks: int, splits: int, n: int) -> Sequence[Ref]:
    """Room for what `splits` blocks have of n sums each, and counters."""
    if splits == 1:
        return (None, None)
    return (Scratch((blocks * splits, n), F32), lowering.counters)


# Above any number of rows: as the fewest that make a block, all rows are loose.
_NO_BLOCKS = float(1 << 24)
_NO_END = 1 << 24
# Bytes of shared memory that kernels have beside what a launch gives them, at most.
_STATIC_SHARED = 2048


def _cut(n: int, size: int) -> int:
    return -(-n // size)


def _has_shared(device: Device, n_bytes: int) -> bool:
    return n_bytes + _STATIC_SHARED <= device.shared_bytes


def _all_short(live: Live) -> bool:
    """A row for each sequence: a decode step."""
    return live.n_tokens <= live.n_seqs
