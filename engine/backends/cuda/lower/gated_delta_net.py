"""Attention and the delta rule as launches.

What a sequence's rows are computed by depends on how many of its rows are in the step, never on
other sequences: each kernel passes over the rows that are another's. A launch that would find none
is left out where the host can tell. How many rows of a prompt are in a step may depend on the
batch; where results may not, each row is computed alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.backends.cuda.cupy_device import Device, Grid
from engine.backends.cuda.launches import Condition, Lowering, always
from engine.backends.native.signatures import Ref, Scratch, parts
from engine.formats.quants import F16, F32
from engine.graph import Live, Node, Tensor

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


# --- The delta rule (gated_delta_net*.cu)

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


# --- Attention (attention.cu, attention_rows.cu)

# Sequences with so many rows in a step are taken in tiles, see engine.batch.MIN_BLOCK_ROWS.
_TILE_ROWS = 16
_MAX_CHUNKS, _PARTIALS_BYTES = 64, 64 << 20
_MAX_HEAD = 1024


@dataclass(frozen=True)
class _Shape:
    """Shape in attention_tiles.cuh: heads, 16s of rows, warps for each, positions at a time."""

    name: str
    d_k: int
    d_v: int
    m_tiles: int
    n_warps: int
    positions: int
    latent: bool = False

    @property
    def threads(self) -> int:
        return 32 * self.m_tiles * self.n_warps

    @property
    def rows(self) -> int:
        return 16 * self.m_tiles

    @property
    def shared(self) -> int:
        """Bytes of two stages, of queries where they stay there, and of weights."""
        stage = self.positions * (self.d_k + 8 + (0 if self.latent else self.d_v + 8))
        queries = self.rows * (self.d_k + 8) if self.d_k > 256 else 0
        weights = self.rows * (self.positions + 8) if self.n_warps > 1 else 0
        return 2 * (2 * stage + queries + weights)


# (for loose rows, for tiles of rows), as instantiated in attention.cu.
_SHAPES = {
    (64, 64): (_Shape("64", 64, 64, 1, 4, 32), _Shape("64", 64, 64, 4, 1, 64)),
    (128, 128): (_Shape("128", 128, 128, 1, 4, 32), _Shape("128", 128, 128, 4, 1, 64)),
    (256, 256): (_Shape("256", 256, 256, 1, 4, 32), _Shape("256", 256, 256, 4, 2, 32)),
    (576, 512): (
        _Shape("latent", 576, 512, 1, 4, 32, latent=True),
        _Shape("latent", 576, 512, 2, 4, 32, latent=True),
    ),
}


def _tensor_core_shapes(node: Node, device: Device) -> tuple[_Shape, _Shape] | None:
    """The kernels on tensor cores for a node, if its sizes and caches are theirs."""
    k, v = node.inputs["k_cache"], node.inputs["v_cache"]
    shapes = _SHAPES.get((k.shape[3], v.shape[3]))
    if shapes is None or (k.dtype, v.dtype) != (F16, F16):
        return None
    if not _has_shared(device, shapes[0].shared):
        return None
    is_part = v.base is k.base and v.offset == k.offset and v.strides == k.strides
    block_size = int(k.shape[2])
    aligned = all(n % 8 == 0 for t in (k, v) for n in (t.offset, *t.strides[:-1]))
    fits = aligned and block_size >= 16 and block_size & (block_size - 1) == 0
    fits = fits and k.strides[3] == v.strides[3] == 1
    return shapes if fits and (is_part or not shapes[0].latent) else None


def lower_attention(lowering: Lowering, node: Node) -> None:
    """Tiles of rows, loose rows by chunks of positions, and the join of those; or row by row."""
    ((_, (out, *operands), attrs),) = parts(node)
    device = lowering.device
    shapes = _tensor_core_shapes(node, device)
    if shapes is None:
        _attention_rows(lowering, node, [out, None, *operands], attrs)
        return
    loose, tile = shapes
    n_tokens, n_heads, d_v = node.outputs[0].shape
    n_kv = int(node.inputs["k_cache"].shape[1])
    group = n_heads // n_kv
    per_row = n_kv * _cut(group, loose.rows)
    has_tiles = _has_shared(device, tile.shared) and not lowering.batch_invariant
    n_split = _PARTIALS_BYTES // (n_heads * _MAX_CHUNKS * (d_v + 4) * 4)
    n_split = max(1, min(n_split, 1 << (int(n_tokens) - 1).bit_length()))
    partials = Scratch((n_split, n_heads, _MAX_CHUNKS, d_v + 4), F32)

    def n_loose(live: Live) -> int:
        """At most so many loose rows."""
        if _all_short(live) or not has_tiles:
            return live.n_tokens
        if live.n_seqs == 1 and live.n_tokens >= _TILE_ROWS:
            return 0
        return min(live.n_tokens, live.n_seqs * (_TILE_ROWS - 1))

    def split_grid(live: Live) -> Grid:
        rows = n_loose(live)
        # A few blocks for each multiprocessor; each takes several chunks if there are many rows.
        blocks = _cut(4 * device.n_multiprocessors, max(1, rows * per_row))
        return min(_MAX_CHUNKS, blocks), per_row, rows

    def add_loose(min_rows: float, fits: Condition) -> None:
        """Launches for loose rows where `fits`: chunks that are joined, or all of a row at once."""
        split = lambda live: fits(live) and n_loose(live) <= n_split  # noqa: E731
        whole = lambda live: fits(live) and n_loose(live) > n_split  # noqa: E731
        name, values = f"attention_loose_{loose.name}", [*attrs, min_rows]
        lowering.launch(
            "attention", name, [node], [out, partials, *operands], values,
            threads=loose.threads, grid=split_grid, shared=loose.shared, when=split,
        )  # fmt: skip
        lowering.launch(
            "attention", "attention_join", [node], [out, partials, *operands], values,
            threads=256, grid=lambda live: (n_heads, n_loose(live), 1), when=split,
        )  # fmt: skip
        lowering.launch(
            "attention", name, [node], [out, None, *operands], values,
            threads=loose.threads, grid=lambda live: (1, per_row, n_loose(live)),
            shared=loose.shared, when=whole,
        )  # fmt: skip

    if not has_tiles:
        add_loose(_NO_BLOCKS, always)
        return
    add_loose(_NO_BLOCKS, _all_short)
    add_loose(_TILE_ROWS, lambda live: not _all_short(live))

    def tile_grid(live: Live) -> Grid:
        return _cut(live.n_tokens * group, tile.rows) + live.n_seqs - 1, n_kv, 1

    lowering.launch(
        "attention", f"attention_tiles_{tile.name}", [node], [out, None, *operands],
        [*attrs, _TILE_ROWS], threads=tile.threads, grid=tile_grid, shared=tile.shared,
        when=lambda live: not _all_short(live) and live.n_tokens >= _TILE_ROWS,
    )  # fmt: skip


def _attention_rows(
    lowering: Lowering, node: Node, operands: list[Ref], attrs: list[float]
) -> None:
    sizes = node.inputs["q"].shape[2], node.inputs["v_cache"].shape[3]
    size = next(n for n in (64, 256, 576, 1024) if max(sizes) <= n)
    n_heads = node.outputs[0].shape[1]
    lowering.launch(
        "attention_rows", f"attention_rows_{size}", [node], operands, attrs,
        threads=256, grid=lambda live: (n_heads, live.n_tokens, 1),
    )  # fmt: skip


def _attention_unsupported(node: Node) -> str:
    caches: tuple[Tensor, ...] = node.inputs["k_cache"], node.inputs["v_cache"]
    size = max(t.shape[3] for t in caches)
    return f"head size {size} above {_MAX_HEAD}" if size > _MAX_HEAD else ""


LOWERINGS: dict[str, Callable[[Lowering, Node], None]] = {
    "ATTENTION": lower_attention,
    "GATED_DELTA_NET": lower_gated_delta_net,
}


def unsupported(node: Node, device: Device) -> str:
    """Why a node of LOWERINGS can't be run; an empty string if it can."""
    if node.op.name == "ATTENTION":
        return _attention_unsupported(node)
    return _delta_net_unsupported(node, device)
