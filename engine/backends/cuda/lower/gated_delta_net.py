"""Attention and the delta rule as launches.

What a sequence's rows are computed by depends on how many of its rows are in the step, never on
other sequences: each kernel passes over the rows that are another's. A launch that would find none
is left out where the host can tell. How many rows of a prompt are in a step may depend on the
batch; where results may not, each row is computed alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.backends.cuda.device import Device
from engine.backends.cuda.launches import Condition, Lowering
from engine.backends.cuda.lower.attention import _attention_unsupported, lower_attention
from engine.backends.cuda.lower.common import _NO_END, _all_short, _cut, _has_shared
from engine.backends.native.buffers import Ref, Scratch
from engine.backends.native.signatures import parts
from engine.formats.quants import F32
from engine.graph import Live, Node

# Fewer rows of a sequence are scanned token by token, more of them in tiles of 16; from _CHUNK_ROWS
# on they are computed in chunks of 64.
_SCAN_ROWS, _SCAN_TILE, _SCAN_THREADS = 8, 16, 128
_CHUNK_ROWS, _CHUNK, _CHUNK_THREADS, _VALUE_TILE = 128, 64, 256, 64
_MAX_KEY = 256


@dataclass(frozen=True)
class _DeltaNet:
    """Names and sizes of the kernels for a node."""

    d_k: int
    d_v: int
    n_heads: int
    is_kda: bool

    @staticmethod
    def of(node: Node) -> _DeltaNet:
        d_k, (_, n_heads, d_v) = node.inputs["q"].shape[2], node.outputs[0].shape
        return _DeltaNet(d_k, d_v, n_heads, len(node.inputs["g"].shape) == 3)

    @property
    def lanes(self) -> int:
        """Lanes that share a value column of the state, 16 floats each."""
        return next(n for n in (4, 8, 16) if self.d_k <= 16 * n)

    @property
    def width(self) -> int:
        """Keys' size, rounded up."""
        return 16 * self.lanes

    def name(self, kernel: str) -> str:
        return f"delta_net_{'kda_' if self.is_kda else ''}{kernel}"

    @property
    def scan_shared(self) -> int:
        """Bytes of two tiles, and of a tile's decays, as Tiles in gated_delta_net.cu has them."""
        columns = _SCAN_THREADS // self.lanes
        stage = _SCAN_TILE * (self.width * (3 if self.is_kda else 2) + columns)
        return 4 * (2 * stage + (4 * self.width if self.is_kda else 0))

    @property
    def prepare_shared(self) -> int:
        """Bytes of Memory in gated_delta_net_prepare.cu."""
        halves = 2 * _CHUNK * (self.width + 8) + 2 * _CHUNK * (_CHUNK + 8)
        floats = 2 * _CHUNK * (_CHUNK + 1) + 3 * 16 * 17 + 3 * _CHUNK
        floats += _CHUNK * self.width if self.is_kda else 1
        return 2 * halves + 4 * floats

    def chunk_shared(self, columns: int) -> int:
        """Bytes of Chunks in gated_delta_net_chunk.cu."""
        stages = 2 if self.width < 256 else 1
        stage = _CHUNK * (3 * (self.width + 8) + _CHUNK + 8)
        return 2 * (stages * stage + columns * (self.width + 8) + _CHUNK * (columns + 8))

    def chunk_columns(self, device: Device) -> int:
        """Value columns of a block: few where there would be too few blocks."""
        few = self.n_heads * _cut(self.d_v, 32) * 4 < device.n_multiprocessors * 3
        return 32 if few or self.width == 256 else 64

    @property
    def record(self) -> int:
        """Floats of Record in gated_delta_net_chunk.cuh."""
        halves = _CHUNK * (3 * self.width + _CHUNK)
        return halves // 2 + self.width + _CHUNK * _cut(self.d_v, _VALUE_TILE) * _VALUE_TILE

    def has_chunks(self, device: Device) -> bool:
        needed = max(self.prepare_shared, self.chunk_shared(self.chunk_columns(device)))
        return _has_shared(device, needed)


def lower_gated_delta_net(lowering: Lowering, node: Node) -> None:
    """A scan of few rows, one of more, and chunks of many; each takes its own sequences."""
    delta, device = _DeltaNet.of(node), lowering.device
    algorithm = node.attrs["algorithm"]
    chunks = algorithm != "scan" and delta.has_chunks(device)
    chunk_rows = 1 if algorithm == "chunk" else _CHUNK_ROWS if chunks else _NO_END
    if lowering.batch_invariant and algorithm != "chunk":
        chunks, chunk_rows = False, _NO_END
    scan_rows = chunk_rows
    if _has_shared(device, delta.scan_shared) and not lowering.batch_invariant:
        scan_rows = min(_SCAN_ROWS, chunk_rows)

    def only_few(live: Live) -> bool:
        return _all_short(live) or live.n_tokens < scan_rows

    if chunk_rows > 1:
        # Empty sequences beside long ones would look like a decode step: so it takes all rows then.
        _scan(lowering, node, "step", 1, _NO_END, only_few)
        _scan(lowering, node, "step", 1, scan_rows, lambda x: x.n_seqs > 1 and not only_few(x))
    if scan_rows < chunk_rows:
        _scan(
            lowering, node, "rows", scan_rows, chunk_rows,
            lambda x: not only_few(x) and (x.n_seqs > 1 or x.n_tokens < chunk_rows),
        )  # fmt: skip
    if chunks:
        _chunks(
            lowering, node, chunk_rows,
            lambda x: x.n_tokens >= chunk_rows and (chunk_rows == 1 or not only_few(x)),
        )  # fmt: skip


def _scan(lowering: Lowering, node: Node, kind: str, first: int, end: int, when: Condition) -> None:
    """Sequences of `first` to end - 1 rows: kind `step` token by token, `rows` in tiles."""
    ((_, operands, attrs),) = parts(node)
    delta = _DeltaNet.of(node)
    n_columns = _cut(delta.d_v, _SCAN_THREADS // delta.lanes)
    lowering.launch(
        "gated_delta_net", delta.name(f"{kind}_{delta.lanes}"), [node], operands,
        [*attrs, first, end], threads=_SCAN_THREADS, when=when,
        grid=lambda live: (n_columns, delta.n_heads, live.n_seqs),
        shared=delta.scan_shared if kind == "rows" else 0,
    )  # fmt: skip


def _chunks(lowering: Lowering, node: Node, first: int, when: Condition) -> None:
    ((_, operands, attrs),) = parts(node)
    delta = _DeltaNet.of(node)
    columns = delta.chunk_columns(lowering.device)
    n_tokens, n_seqs = int(node.outputs[0].shape[0]), int(node.inputs["state_src"].shape[0])
    # Where the slots of chunks begin: first_slot in gated_delta_net_chunk.cuh.
    n_slots = _cut(n_tokens, _CHUNK) + n_seqs
    records = Scratch((n_slots, delta.n_heads, delta.record), F32)
    refs: list[Ref] = [*operands, records]
    values = [*attrs, first, _NO_END]
    lowering.launch(
        "gated_delta_net_prepare", delta.name(f"prepare_{delta.width}"), [node], refs, values,
        threads=_CHUNK_THREADS, shared=delta.prepare_shared, when=when,
        grid=lambda live: (live.n_tokens // _CHUNK + live.n_seqs, delta.n_heads, 1),
    )  # fmt: skip
    lowering.launch(
        "gated_delta_net_chunk", delta.name(f"chunks_{delta.width}_{columns}"), [node], refs,
        values, threads=_CHUNK_THREADS, shared=delta.chunk_shared(columns), when=when,
        grid=lambda live: (_cut(delta.d_v, columns), delta.n_heads, live.n_seqs),
    )  # fmt: skip


def _delta_net_unsupported(node: Node, device: Device) -> str:
    delta = _DeltaNet.of(node)
    if delta.d_k > _MAX_KEY:
        return f"head size {delta.d_k} above {_MAX_KEY}"
    if node.attrs["algorithm"] == "chunk" and not delta.has_chunks(device):
        return f"too little shared memory for chunks of heads of {delta.d_k}"
    return ""


LOWERINGS: dict[str, Callable[[Lowering, Node], None]] = {
    "ATTENTION": lower_attention,
    "GATED_DELTA_NET": lower_gated_delta_net,
}


def unsupported(node: Node, device: Device) -> str:
    """Why a node of LOWERINGS can't be run; an empty string if it can."""
    if node.op.name == "ATTENTION":
        return _attention_unsupported(node)
    return _delta_net_unsupported(node, device)
