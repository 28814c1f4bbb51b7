"""Attention as launches."""

from __future__ import annotations

from dataclasses import dataclass

from engine.backends.cuda.device import Device, Grid
from engine.backends.cuda.launches import Condition, Lowering, always
from engine.backends.cuda.lower.common import _NO_BLOCKS, _all_short, _cut, _has_shared
from engine.backends.native.buffers import Ref, Scratch
from engine.backends.native.signatures import parts
from engine.formats.quants import F16, F32
from engine.graph import Live, Node, Tensor

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
