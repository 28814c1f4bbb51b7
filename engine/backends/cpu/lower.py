"""Lowering for the CPU: nodes become kernel calls, and calls wait for each other in phases.

An instruction waits at a barrier only if it touches what one since the last barrier wrote, or
writes what one read. Between two barriers is a phase; activations whose phases don't overlap share
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.backends.native.buffers import Ref, Scratch, owner_of
from engine.backends.native.fusion import Readers
from engine.backends.native.library import Library
from engine.backends.native.program import KernelCall
from engine.backends.native.signatures import is_quantized, matrices_of, parts
from engine.backends.native.views import BF16, I8, view_key
from engine.formats.quants import F16, F32, I32
from engine.graph import Dim, Node, Tensor

# Up to so many remainder rows, ATTENTION may take a row's position chunks apart, at most so many.
_SPLIT_ROWS, _MAX_CHUNKS = 16, 32


def has_tiles(weight: Tensor) -> bool:
    """Whether a weight may be rounded to bfloat16: float32 and float16 would lose digits."""
    return weight.dtype not in (F32, F16)


@dataclass(frozen=True, kw_only=True)
class CpuCall(KernelCall):
    """One instruction; the first `n_writes` operands are written."""

    n_writes: int
    phase: int


class Lowering:
    """The calls of a split, in order, with their phases. With `matrix`, row tiles are multiplied as
    bfloat16 tiles; with `has_fine`, rows outside them become 15-bit integers."""

    def __init__(
        self, library: Library, readers: Readers, matrix: bool = False, has_fine: bool = False
    ) -> None:
        self._constant, self._readers, self._matrix = library.constant, readers, matrix
        self._n_planes = 2 if has_fine else 1  # Bytes of a column.
        self.calls: list[CpuCall] = []
        # Conversions of activations, which all their readers share.
        self._converted: dict[tuple[Any, ...], tuple[Scratch, ...]] = {}
        # Owners of memory that the current phase reads and writes.
        self._read: set[Any] = set()
        self._written: set[Any] = set()
        self._phase = 0

    def add(self, node: Node) -> None:
        match node.op.name:
            case "MUL_MAT":
                self._mul_mat(node)
            case "MUL_MAT_ID":
                self._mul_mat_id(node)
            case "ATTENTION":
                self._attention(node)
            case _:
                for kernel, tensors, attrs in parts(node):
                    n_outputs = 1 if kernel == "SWIGLU" else len(node.outputs)
                    self._append(kernel, [node], tensors, attrs, n_outputs)

    def mul_mat_swiglu(self, nodes: Sequence[Node]) -> None:
        """Append the instruction of two products and the SWIGLU that alone reads them."""
        product, act = nodes
        weights = matrices_of(product)
        activation = self._activation(product, weights)
        (out,) = act.outputs
        tiles = self._output_tiles(out) if activation[-1] else None
        operands = [out, tiles, *activation, *weights]
        self._append("MUL_MAT_SWIGLU", nodes, operands, self._by_bytes(*weights), 2)

    def _mul_mat(self, node: Node) -> None:
        others = node.inputs.get("gate"), node.inputs.get("add")
        weights = matrices_of(node)
        *rows, tiles = self._activation(node, weights)
        for out, w in zip(node.outputs, weights, strict=True):
            operands = [out, *rows, tiles if has_tiles(w) else None, w, *others]
            self._append("MUL_MAT", [node], operands, self._by_bytes(w), 1)

    def _activation(self, node: Node, weights: Sequence[Tensor]) -> list[Ref]:
        """x as mul_mat.h reads it: float32, integers with scales and sums, and bfloat16 tiles."""
        x = node.inputs["x"]
        tiles = self._round(node, x, weights, tiled=True)
        return [x, *self._quantize(node, x, weights, only_remainder=tiles is not None), tiles]

    def _output_tiles(self, out: Tensor) -> Ref:
        """Tiles for an output's row tiles, where products that take tiles are its only readers."""
        if out in self._readers.kept or out.shape[1] % self._constant("tile_depth"):
            return None
        for node, name in self._readers.of(out):
            if (node.op.name, name) != ("MUL_MAT", "x") or node.inputs["x"] is not out:
                return None
            if not all(map(has_tiles, matrices_of(node))):
                return None
        tiles = Scratch((self._tile_rows(out), out.shape[1]), BF16)
        self._converted[_key("ROUND_ROWS", True, out)] = (tiles,)
        return tiles

    def _mul_mat_id(self, node: Node) -> None:
        x, ids, gates = node.inputs["x"], node.inputs["ids"], node.inputs.get("weights")
        matrices = matrices_of(node)
        plain = [m for m in matrices if not is_quantized(m)]
        rounded = self._round(node, x, plain, tiled=False)
        quantized = self._quantize(node, x, matrices, only_remainder=False)
        n_tokens, n_used = ids.shape
        order = Scratch((int(n_tokens) * n_used,), I32)
        starts = Scratch((2 * matrices[0].shape[0] + 1,), I32)
        self._append("SORT_BY_EXPERT", [node], [order, starts, ids], [], 2)
        for out, m in zip(node.outputs, matrices, strict=True):
            shape = (n_tokens, n_used, m.shape[1])
            target: Ref = out if gates is None else Scratch(shape, F32)
            rows = rounded if has_tiles(m) and not is_quantized(m) else None
            operands = [target, x, *quantized, rows, m, order, starts, ids]
            self._append("MUL_MAT_ID", [node], operands, self._by_bytes(m), 1)
            if gates is not None:
                self._append("SUM_EXPERTS", [node], [out, target, gates], [], 1)

    def _by_bytes(self, weight: Tensor, *others: Tensor) -> list[float]:
        """Attribute: whether rows may go through tiles of int8, which weights of one type share."""
        fits = weight.shape[-1] <= self._constant("max_gathered_columns")
        alike = all(other.dtype == weight.dtype for other in others)
        return [float(self._matrix and is_quantized(weight) and fits and alike)]

    def _attention(self, node: Node) -> None:
        ((kernel, (out, *operands), attrs),) = parts(node)
        n_tokens, n_heads, size = node.outputs[0].shape
        n_rows, width = min(int(n_tokens), _SPLIT_ROWS), -(-size // 16) * 16
        width += self._constant("partial_head")
        partials = Scratch((n_rows, n_heads, _MAX_CHUNKS, width), F32)
        self._append(kernel, [node], [out, partials, *operands], attrs, 2)
        self._append("ATTENTION_JOIN", [node], [out, partials, *operands], [], 1)

    def _quantize(
        self, node: Node, x: Tensor, weights: Sequence[Tensor], only_remainder: bool
    ) -> tuple[Ref, ...]:
        """x as integers with scales and sums, if a weight needs that; of all rows, or the
        remainder."""
        if not any(map(is_quantized, weights)):
            return (None, None, None)
        *lead, n_in = x.shape
        shapes = (
            ((*lead, self._n_planes * n_in), I8),
            ((*lead, n_in // self._constant("k_block")), F32),
            ((*lead, n_in // self._constant("sum_group")), I32),
        )
        return self._convert("QUANTIZE_ROWS", node, x, shapes, only_remainder)

    def _round(self, node: Node, x: Tensor, weights: Sequence[Tensor], tiled: bool) -> Ref:
        """x's row tiles as bfloat16, in tiles or in place; None if nothing needs that."""
        *lead, n_in = x.shape
        is_step = isinstance(lead[0], Dim) and lead[0].name == "n_tokens"
        fits = tiled or n_in <= self._constant("max_gathered_columns")
        fits &= n_in % self._constant("tile_depth") == 0
        if not (self._matrix and is_step and fits and any(map(has_tiles, weights))):
            return None
        if tiled:
            lead[0] = self._tile_rows(x)
        return self._convert("ROUND_ROWS", node, x, (((*lead, n_in), BF16),), tiled)[0]

    def _tile_rows(self, x: Tensor) -> int:
        side = self._constant("tile_side")
        return -(-int(x.shape[0]) // side) * side

    def _convert(
        self, kernel: str, node: Node, x: Tensor, shapes: Sequence[Any], choice: bool
    ) -> tuple[Scratch, ...]:
        """x converted by a kernel into buffers of these shapes and types; once for all readers."""
        key = _key(kernel, choice, x)
        if key not in self._converted:
            buffers = tuple(Scratch(*shape) for shape in shapes)
            self._append(kernel, [node], [*buffers, x], [float(choice)], len(buffers))
            self._converted[key] = buffers
        return self._converted[key]

    def _append(
        self,
        kernel: str,
        nodes: Sequence[Node],
        operands: Sequence[Ref],
        attrs: Sequence[float],
        n_writes: int,
    ) -> None:
        """Append a call, in a new phase if it has to wait for one of the current phase."""
        owners = [owner_of(ref) for ref in operands]
        written = {owner for owner in owners[:n_writes] if owner is not None}
        written |= {t for node in nodes for t in node.written if t in owners}
        read = {owner for owner in owners[n_writes:] if owner is not None} - written
        if written & (self._read | self._written) or read & self._written:
            self._phase += 1
            self._read, self._written = set(), set()
        self._read |= read
        self._written |= written
        self.calls.append(CpuCall(
            kernel=kernel, nodes=nodes, operands=operands, attrs=attrs, n_writes=n_writes,
            phase=self._phase,
        ))  # fmt: skip


def _key(kernel: str, choice: bool, x: Tensor) -> tuple[Any, ...]:
    return (kernel, choice, *view_key(x))
