"""ATTENTION as launches.

Kernels on tensor cores take tiles of a prompt's rows, and remainder rows by chunks of positions;
where none takes the heads, rows are computed one by one.
"""

from __future__ import annotations

from engine.backends.cuda import kernels
from engine.backends.cuda.device import Device, Grid
from engine.backends.cuda.kernels import KERNELS
from engine.backends.cuda.launches import Condition, Launch, Lowering, always
from engine.backends.cuda.lower.common import NO_END, cut, has_shared, is_decode
from engine.backends.native.buffers import Scratch
from engine.backends.native.signatures import parts
from engine.formats.quants import F16, F32
from engine.graph import Live, Node

# Sequences with so many rows in a step are computed in tiles (engine.runtime.batch.MIN_BLOCK_ROWS).
_TILE_ROWS = 16
_PARTIALS_BYTES = 64 << 20
# The sizes of heads that attention_rows.cu is compiled for.
_ROW_SIZES = (64, 256, 576, 1024)
# Suffixes of the kernels on tensor cores, by the sizes of keys and values.
_TENSOR_CORE_KERNELS = {(64, 64): "64", (128, 128): "128", (256, 256): "256", (576, 512): "latent"}


class _Attention:
    """A node that kernels on tensor cores compute, and what its launches share."""

    def __init__(self, node: Node, lowering: Lowering, kind: str) -> None:
        self.node, self.device, self.kind = node, lowering.device, kind
        has_shared_tiles = has_shared(self.device, KERNELS[f"attention_tiles_{kind}"].shared)
        self.has_tiles = has_shared_tiles and not lowering.batch_invariant
        self.n_kv = int(node.inputs["k_cache"].shape[1])
        # Query heads of a key head.
        self.group = int(node.outputs[0].shape[1]) // self.n_kv
        # Thread blocks of a remainder row, for each chunk of its positions.
        self.blocks_per_row = self.n_kv * cut(self.group, kernels.ATTENTION_LOOSE_ROWS)

    def n_loose(self, live: Live) -> int:
        """The most remainder rows that there can be."""
        if is_decode(live) or not self.has_tiles:
            return live.n_tokens
        if live.n_seqs == 1 and live.n_tokens >= _TILE_ROWS:
            return 0
        return min(live.n_tokens, live.n_seqs * (_TILE_ROWS - 1))

    def split_grid(self, live: Live) -> Grid:
        """A few thread blocks for each multiprocessor; of many rows each takes several chunks."""
        rows = self.n_loose(live)
        blocks = cut(4 * self.device.n_multiprocessors, max(1, rows * self.blocks_per_row))
        return min(kernels.MAX_POSITION_CHUNKS, blocks), self.blocks_per_row, rows

    def tile_grid(self, live: Live) -> Grid:
        n_tiles = cut(live.n_tokens * self.group, kernels.ATTENTION_TILE_ROWS[self.kind])
        return n_tiles + live.n_seqs - 1, self.n_kv, 1


def _kind(node: Node, device: Device) -> str:
    """The kernels on tensor cores for a node's sizes and caches; an empty string if none fit."""
    k, v = node.inputs["k_cache"], node.inputs["v_cache"]
    kind = _TENSOR_CORE_KERNELS.get((k.shape[3], v.shape[3]), "")
    if not kind or (k.dtype, v.dtype) != (F16, F16):
        return ""
    is_part = v.base is k.base and v.offset == k.offset and v.strides == k.strides
    block_size = int(k.shape[2])
    aligned = all(n % 8 == 0 for t in (k, v) for n in (t.offset, *t.strides[:-1]))
    fits = aligned and block_size >= 16 and block_size & (block_size - 1) == 0
    fits = fits and k.strides[3] == v.strides[3] == 1 and (is_part or kind != "latent")
    return kind if fits and has_shared(device, KERNELS[f"attention_loose_{kind}"].shared) else ""


def lower_attention(lowering: Lowering, node: Node) -> None:
    """Tiles of rows, remainder rows by chunks of positions, and their join; or row by row."""
    ((_, (out, *operands), attrs),) = parts(node)
    kind = _kind(node, lowering.device)
    if not kind:
        largest = max(node.inputs["q"].shape[2], node.inputs["v_cache"].shape[3])
        size, n_heads = next(n for n in _ROW_SIZES if largest <= n), node.outputs[0].shape[1]
        lowering.add(Launch(
            kernel=f"attention_rows_{size}", nodes=[node], operands=[out, None, *operands],
            attrs=attrs, grid=lambda live: (n_heads, live.n_tokens, 1),
        ))  # fmt: skip
        return
    attention, partials = _Attention(node, lowering, kind), _partials(node)
    if not attention.has_tiles:
        _lower_loose(lowering, attention, partials, NO_END, always)
        return
    _lower_loose(lowering, attention, partials, NO_END, is_decode)
    _lower_loose(lowering, attention, partials, _TILE_ROWS, lambda live: not is_decode(live))
    lowering.add(Launch(
        kernel=f"attention_tiles_{kind}", nodes=[node], operands=[out, None, *operands],
        attrs=[*attrs, _TILE_ROWS], grid=attention.tile_grid,
        when=lambda live: not is_decode(live) and live.n_tokens >= _TILE_ROWS,
    ))  # fmt: skip


def _partials(node: Node) -> Scratch:
    """Results of chunks of positions, for as many remainder rows as have room."""
    n_tokens, n_heads, d_v = node.outputs[0].shape
    row = (n_heads, kernels.MAX_POSITION_CHUNKS, d_v + kernels.PARTIAL_EXTRA)
    n_rows = _PARTIALS_BYTES // (row[0] * row[1] * row[2] * 4)
    return Scratch((max(1, min(n_rows, 1 << (int(n_tokens) - 1).bit_length())), *row), F32)


def _lower_loose(
    lowering: Lowering, attention: _Attention, partials: Scratch, min_rows: int, fits: Condition
) -> None:
    """Remainder rows where `fits`, those of sequences of fewer than `min_rows` rows: by chunks of
    positions that are joined, or all positions of a row at once where there are too many rows."""
    a, node, loose = attention, attention.node, f"attention_loose_{attention.kind}"
    ((_, (out, *operands), attrs),) = parts(node)
    n_split, n_heads = partials.shape[:2]
    split = lambda live: fits(live) and a.n_loose(live) <= n_split  # noqa: E731
    whole = lambda live: fits(live) and a.n_loose(live) > n_split  # noqa: E731
    for kernel, target, when, grid in (
        (loose, partials, split, a.split_grid),
        ("attention_join", partials, split, lambda live: (n_heads, a.n_loose(live), 1)),
        (loose, None, whole, lambda live: (1, a.blocks_per_row, a.n_loose(live))),
    ):
        lowering.add(Launch(
            kernel=kernel, nodes=[node], operands=[out, target, *operands],
            attrs=[*attrs, min_rows], grid=grid, when=when,
        ))  # fmt: skip


def unsupported(node: Node, device: Device) -> str:
    size = max(node.inputs[name].shape[3] for name in ("k_cache", "v_cache"))
    return f"head size {size} above {_ROW_SIZES[-1]}" if size > _ROW_SIZES[-1] else ""


LOWERINGS = {"ATTENTION": lower_attention}
