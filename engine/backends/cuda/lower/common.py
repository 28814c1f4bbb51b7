"""What several lowerings share: ranges of rows, work splits over columns, sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from engine.backends.cuda.device import Device
from engine.backends.cuda.kernels import BATCH, K_BLOCK, MAX_WEIGHTS, PANEL, PLAIN_COLUMNS, threads
from engine.backends.cuda.launches import Lowering
from engine.backends.native.buffers import Ref, Scratch
from engine.backends.native.signatures import is_quantized
from engine.formats.quants import F32
from engine.graph import Live, Tensor

# Columns of a quantized weight that a warp takes at a time.
WARP_COLUMNS = BATCH * K_BLOCK
# Warps of a thread block that multiplies rows by plain panels.
PLAIN_WARPS = threads("mul_mat_floats_2") // 32
# More rows than any step has, and more thread blocks than a product of weights.
NO_END = MAX_BLOCKS = 1 << 24
# Static shared memory of any kernel at most, in bytes.
STATIC_SHARED = 2048


@dataclass(frozen=True)
class RowRange:
    """The condition that a tensor has more than `more_than` live rows, and at most `most`."""

    tensor: Tensor
    more_than: int
    most: int | None

    def __call__(self, live: Live) -> bool:
        n = rows_of(self.tensor, live)
        return n > self.more_than and (self.most is None or n <= self.most)


def walk(
    table: Iterable[tuple[int | None, str, bool]], tensor: Tensor, more_than: int, end: int | None
) -> Iterator[tuple[str, RowRange]]:
    """Choose kernels by rows of a tensor, from `more_than` + 1 up to `end` (None: any number).
    table: (rows up to which a kernel is chosen, kernel, whether it fits), rows ascending. The last
    kernel that fits takes all rows up to the end. Yields kernels with their rows, ascending, but
    none for more rows than the tensor can have."""
    fitting = [(most, kernel) for most, kernel, fits in table if fits]
    for i, (most, kernel) in enumerate(fitting):
        last = end if i == len(fitting) - 1 else most
        if more_than >= int(tensor.shape[0]):
            return
        if last is None or last > more_than:
            yield kernel, RowRange(tensor, more_than, last)
            more_than = last or 0


def rows_of(t: Tensor, live: Live) -> int:
    return live.shape(t.shape[:1])[0]


def first_blocks(weights: Sequence[Tensor], panels: int = 1, groups: int = 1) -> list[int]:
    """The first thread blocks of all weights but the first, and of those that are absent."""
    counts = [blocks_of(weights[:i], panels, groups) for i in range(1, len(weights))]
    return counts + [MAX_BLOCKS] * (MAX_WEIGHTS - len(weights))


def blocks_of(weights: Sequence[Tensor], panels: int = 1, groups: int = 1) -> int:
    """Thread blocks for `panels` panels of a weight each; for half a panel of a plain weight, with
    one of so many groups of rows."""
    counts = ((cut(w.shape[0], PANEL), is_quantized(w)) for w in weights)
    return sum(cut(n, panels) if quantized else 2 * n * groups for n, quantized in counts)


def plain_warps(n_in: int) -> int:
    """Warps that share a plain panel's columns evenly. Sums depend on their number, so it is the
    same for any number of rows."""
    parts = cut(n_in, PLAIN_COLUMNS)
    return cut(parts, cut(parts, PLAIN_WARPS))


def split_buffers(lowering: Lowering, blocks: int, splits: int, n: int) -> Sequence[Ref]:
    """The buffer of partial sums, n of each thread block, and the counters; None without splits."""
    if splits == 1:
        return (None, None)
    return (Scratch((blocks * splits, n), F32), lowering.counters)


def cut(n: int, size: int) -> int:
    """Parts of `size` that cover n."""
    return -(-n // size)


def fitting(device: Device, n_bytes: int) -> int:
    """Thread blocks of so much dynamic shared memory that a multiprocessor has room for."""
    return device.shared_bytes // (n_bytes + STATIC_SHARED)


def has_shared(device: Device, n_bytes: int) -> bool:
    """Whether a thread block can have so much dynamic shared memory."""
    return fitting(device, n_bytes) > 0


def is_decode(live: Live) -> bool:
    """Whether no sequence has more than one row."""
    return live.n_tokens <= live.n_seqs
