"""GATED_DELTA_NET as launches.

The number of a sequence's rows in the step chooses the kernel that computes them, never other
sequences: each kernel skips the sequences of the others. A launch that would find no sequence is
left out where the host can tell. With batch invariance each row is computed alone, because the
number of a prompt's rows in a step depends on the batch. Names are those of kernels.py, which has
the source of each (`delta_net_rows_8`: gated_delta_net.cu).
"""

from __future__ import annotations

from engine.backends.cuda import kernels
from engine.backends.cuda.device import Device
from engine.backends.cuda.kernels import KERNELS, threads
from engine.backends.cuda.launches import Condition, Launch, Lowering
from engine.backends.cuda.lower.common import NO_END, cut, has_shared, is_decode
from engine.backends.native.buffers import Scratch
from engine.backends.native.signatures import parts
from engine.formats.quants import F32
from engine.graph import Live, Node

# From so many rows of a sequence on they are scanned in groups of four tokens, and computed in
# delta-rule chunks.
_GROUPED_FROM, _CHUNKED_FROM = 8, 128
_MAX_KEY = 256


class _DeltaNet:
    """The sizes and kernels of a node."""

    def __init__(self, node: Node, device: Device) -> None:
        (_, self.n_heads, self.d_v), self.d_k = node.outputs[0].shape, node.inputs["q"].shape[2]
        self._prefix = "delta_net_kda_" if len(node.inputs["g"].shape) == 3 else "delta_net_"
        # Lanes that share a value column of the state.
        self.lanes = next(n for n in (4, 8, 16) if self.d_k <= n * kernels.DELTA_LANE_FLOATS)
        # Keys' size, rounded up.
        self.width = self.lanes * kernels.DELTA_LANE_FLOATS
        # Value columns of a thread block: few where there would be too few thread blocks.
        few = self.n_heads * cut(self.d_v, 32) * 4 < device.n_multiprocessors * 3
        self.columns = 32 if few or self.width == 256 else 64
        self.prepare = f"{self._prefix}prepare_{self.width}"
        self.chunks = f"{self._prefix}chunks_{self.width}_{self.columns}"

    def scan(self, kind: str) -> str:
        return f"{self._prefix}{kind}_{self.lanes}"

    def has_chunks(self, device: Device) -> bool:
        return all(has_shared(device, KERNELS[k].shared) for k in (self.prepare, self.chunks))


def lower_gated_delta_net(lowering: Lowering, node: Node) -> None:
    """Token by token (`step`), in groups of four tokens (`rows`), and in chunks; each kernel takes
    the sequences with its numbers of rows."""
    device, algorithm = lowering.device, node.attrs["algorithm"]
    delta = _DeltaNet(node, device)
    chunks = algorithm != "scan" and delta.has_chunks(device)
    chunk_rows = 1 if algorithm == "chunk" else _CHUNKED_FROM if chunks else NO_END
    if lowering.batch_invariant and algorithm != "chunk":
        chunks, chunk_rows = False, NO_END
    group_rows = chunk_rows
    if has_shared(device, KERNELS[delta.scan("rows")].shared) and not lowering.batch_invariant:
        group_rows = min(_GROUPED_FROM, chunk_rows)

    def only_few(live: Live) -> bool:
        return is_decode(live) or live.n_tokens < group_rows

    if chunk_rows > 1:
        # A long sequence beside empty ones has as many rows as sequences, as a decode step has. So
        # `step` takes sequences of any length there.
        _scan(lowering, node, "step", 1, NO_END, only_few)
        _scan(lowering, node, "step", 1, group_rows, lambda x: x.n_seqs > 1 and not only_few(x))
    if group_rows < chunk_rows:
        _scan(
            lowering, node, "rows", group_rows, chunk_rows,
            lambda x: not only_few(x) and (x.n_seqs > 1 or x.n_tokens < chunk_rows),
        )  # fmt: skip
    if chunks:
        _chunks(
            lowering, node, chunk_rows,
            lambda x: x.n_tokens >= chunk_rows and (chunk_rows == 1 or not only_few(x)),
        )  # fmt: skip


def _scan(lowering: Lowering, node: Node, kind: str, first: int, end: int, when: Condition) -> None:
    """Sequences of `first` to end - 1 rows; kind: `step` token by token, or `rows` in fours."""
    ((_, operands, attrs),) = parts(node)
    delta = _DeltaNet(node, lowering.device)
    kernel = delta.scan(kind)
    n_columns = cut(delta.d_v, threads(kernel) // delta.lanes)
    lowering.add(Launch(
        kernel=kernel, nodes=[node], operands=operands, attrs=[*attrs, first, end], when=when,
        grid=lambda live: (n_columns, delta.n_heads, live.n_seqs),
    ))  # fmt: skip


def _chunks(lowering: Lowering, node: Node, first: int, when: Condition) -> None:
    """Sequences of at least `first` rows: all chunks are prepared, then run one after the other."""
    ((_, operands, attrs),) = parts(node)
    delta = _DeltaNet(node, lowering.device)
    n_tokens, n_seqs = int(node.outputs[0].shape[0]), int(node.inputs["state_src"].shape[0])
    # first_slot in gated_delta_net_chunk.cuh gives the chunks of each sequence slots of their own.
    n_slots = cut(n_tokens, kernels.DELTA_CHUNK) + n_seqs
    d_v = cut(delta.d_v, kernels.DELTA_VALUE_TILE) * kernels.DELTA_VALUE_TILE
    n_floats = kernels.DELTA_CHUNK_FLOATS[str(delta.width)] + kernels.DELTA_CHUNK * d_v
    prepared = Scratch((n_slots, delta.n_heads, n_floats), F32)
    n_blocks = cut(delta.d_v, delta.columns)
    for kernel, grid in (
        (delta.prepare, lambda x: (x.n_tokens // kernels.DELTA_CHUNK + x.n_seqs, delta.n_heads, 1)),
        (delta.chunks, lambda x: (n_blocks, delta.n_heads, x.n_seqs)),
    ):
        lowering.add(Launch(
            kernel=kernel, nodes=[node], operands=[*operands, prepared],
            attrs=[*attrs, first, NO_END], when=when, grid=grid,
        ))  # fmt: skip


def unsupported(node: Node, device: Device) -> str:
    d_k = node.inputs["q"].shape[2]
    if d_k > _MAX_KEY:
        return f"head size {d_k} above {_MAX_KEY}"
    if node.attrs["algorithm"] == "chunk" and not _DeltaNet(node, device).has_chunks(device):
        return f"too little shared memory for chunks of heads of {d_k}"
    return ""


LOWERINGS = {"GATED_DELTA_NET": lower_gated_delta_net}
