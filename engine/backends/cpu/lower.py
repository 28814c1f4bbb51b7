"""A split as a program of the CPU: instructions, where they must wait, and where activations lie.

An instruction waits at a barrier only if it touches what one since the last barrier wrote, or
writes what one read. Between two barriers is a phase; activations whose phases don't overlap share
memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.backends.cpu.fusion import FUSIONS, has_tiles
from engine.backends.native.buffers import Arena, Ref, Scratch, owner_of, place_buffers
from engine.backends.native.fusion import Uses, grouped
from engine.backends.native.signatures import PACKED_OPERANDS, is_quantized, matrices_of, parts
from engine.backends.native.views import BF16, I8, view_key
from engine.formats.quants import F32, I32
from engine.graph import Dim, Node, Tensor

# Columns that share a scale where activations are int8, and those that share a sum.
ACTIVATION_GROUP, SUM_GROUP = 32, 16
PACKED_KERNELS = frozenset({*PACKED_OPERANDS, *(fusion.kernel for fusion in FUSIONS)})
# Columns of a tile; and the most columns of an expert's rows that are gathered (mul_mat_id.cpp).
TILE_SIDE, TILE_DEPTH, MAX_GATHERED = 16, 32, 1 << 14
# Of how many loose rows ATTENTION may take chunks of positions apart, into how many chunks, and the
# elements before a chunk's sums (attention_rows.cpp).
SPLIT_ROWS, MAX_CHUNKS, PARTIAL_HEAD = 16, 32, 16


@dataclass
class Step:
    """One instruction before addresses are known; the first `n_writes` operands are written."""

    kernel: str
    nodes: Sequence[Node]
    operands: Sequence[Ref]
    attrs: Sequence[float]
    n_writes: int
    phase: int = 0


@dataclass
class Lowering:
    """The steps of a split, in order, with their phases.

    With `matrix`, rows of blocks are multiplied as bfloat16 tiles.
    """

    uses: Uses
    matrix: bool = False
    steps: list[Step] = field(default_factory=list)
    _converted: dict[tuple[Any, ...], tuple[Scratch, ...]] = field(default_factory=dict)
    _read: set[Any] = field(default_factory=set)
    _written: set[Any] = field(default_factory=set)
    _phase: int = 0

    def add_all(self, nodes: Sequence[Node], fused: bool = True) -> None:
        """Append the instructions of nodes, `fused` where one kernel computes several."""
        for fusion, group in grouped(nodes, self.uses, FUSIONS if fused else ()):
            if fusion is None:
                self._add(group[0])
            else:
                self._mul_mat_swiglu(group)

    def _add(self, node: Node) -> None:
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

    def _mul_mat(self, node: Node) -> None:
        others = node.inputs.get("gate"), node.inputs.get("add")
        weights = matrices_of(node)
        activation = self._activation(node, weights)
        for out, w in zip(node.outputs, weights, strict=True):
            operands = [*activation, w, *others]
            if not has_tiles(w):
                operands[4] = None
            self._append("MUL_MAT", [node], [out, *operands], [], 1)

    def _mul_mat_swiglu(self, nodes: Sequence[Node]) -> None:
        product, act = nodes
        weights = matrices_of(product)
        activation = self._activation(product, weights)
        (out,) = act.outputs
        tiles = self._tiles_at_once(out) if activation[-1] else None
        self._append("MUL_MAT_SWIGLU", nodes, [out, tiles, *activation, *weights], [], 2)

    def _activation(self, node: Node, weights: Sequence[Tensor]) -> list[Ref]:
        """x as mul_mat.h wants it: as it is, in int8, and as tiles."""
        x = node.inputs["x"]
        tiles = self._round(node, x, weights, tiled=True)
        return [x, *self._quantize(node, x, weights, loose=tiles is not None), tiles]

    def _tiles_at_once(self, out: Tensor) -> Ref:
        """Tiles in place of blocks' rows of an output, if they are all that is read of those."""
        readers = self.uses.readers[out]
        if out in self.uses.kept or out.shape[1] % TILE_DEPTH:
            return None
        for node, name in readers:
            if (node.op.name, name) != ("MUL_MAT", "x"):
                return None
            if not all(map(has_tiles, matrices_of(node))):
                return None
            if node.inputs["x"] is not out:
                return None
        tiles = Scratch((_tile_rows(out), out.shape[1]), BF16)
        self._converted[_key("ROUND_ROWS", True, out)] = (tiles,)
        return tiles

    def _mul_mat_id(self, node: Node) -> None:
        x, ids, gates = (node.inputs.get(name) for name in ("x", "ids", "weights"))
        matrices = matrices_of(node)
        assert x is not None
        assert ids is not None
        plain = [m for m in matrices if not is_quantized(m)]
        packed = self._round(node, x, plain, tiled=False)
        quantized = self._quantize(node, x, matrices, loose=False)
        n_tokens, n_used = ids.shape
        order = Scratch((int(n_tokens) * n_used,), I32)
        starts = Scratch((2 * matrices[0].shape[0] + 1,), I32)
        self._append("SORT_BY_EXPERT", [node], [order, starts, ids], [], 2)
        for out, m in zip(node.outputs, matrices, strict=True):
            shape = (n_tokens, n_used, m.shape[1])
            target: Ref = out if gates is None else Scratch(shape, F32)
            rows = packed if has_tiles(m) and not is_quantized(m) else None
            by_bytes = self.matrix and is_quantized(m) and m.shape[2] <= MAX_GATHERED
            operands = [target, x, *quantized, rows, m, order, starts, ids]
            self._append("MUL_MAT_ID", [node], operands, [float(by_bytes)], 1)
            if gates is not None:
                self._append("SUM_EXPERTS", [node], [out, target, gates], [], 1)

    def _attention(self, node: Node) -> None:
        ((kernel, (out, *operands), attrs),) = parts(node)
        n_tokens, n_heads, size = node.outputs[0].shape
        n_rows, width = min(int(n_tokens), SPLIT_ROWS), PARTIAL_HEAD + -(-size // 16) * 16
        partials = Scratch((n_rows, n_heads, MAX_CHUNKS, width), F32)
        self._append(kernel, [node], [out, partials, *operands], attrs, 2)
        self._append("ATTENTION_JOIN", [node], [out, partials, *operands], [], 1)

    def _quantize(
        self, node: Node, x: Tensor, weights: Sequence[Tensor], loose: bool
    ) -> tuple[Ref, ...]:
        """x as int8 with scales and sums if a weight needs that; `loose`: not its blocks' rows."""
        if not any(map(is_quantized, weights)):
            return (None, None, None)
        *lead, n_in = x.shape
        shapes = (
            ((*lead, n_in), I8),
            ((*lead, n_in // ACTIVATION_GROUP), F32),
            ((*lead, n_in // SUM_GROUP), I32),
        )
        return self._convert("QUANTIZE_ROWS", node, x, shapes, loose)

    def _round(self, node: Node, x: Tensor, weights: Sequence[Tensor], tiled: bool) -> Ref:
        """Rows of x's blocks as bfloat16, in tiles or in place; None if nothing needs that."""
        *lead, n_in = x.shape
        is_step = isinstance(lead[0], Dim) and lead[0].name == "n_tokens"
        fits = n_in % TILE_DEPTH == 0 and (tiled or n_in <= MAX_GATHERED)
        if not (self.matrix and is_step and fits and any(map(has_tiles, weights))):
            return None
        if tiled:
            lead[0] = _tile_rows(x)
        return self._convert("ROUND_ROWS", node, x, (((*lead, n_in), BF16),), tiled)[0]

    def _convert(
        self, kernel: str, node: Node, x: Tensor, shapes: Sequence[Any], choice: bool
    ) -> tuple[Scratch, ...]:
        """What a kernel makes of x in buffers of these shapes and types; once for all nodes."""
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
        n: int,
    ) -> None:
        written = {owner_of(r) for r in operands[:n] if r is not None}
        owners = {owner_of(r) for r in operands}
        written |= {t for node in nodes for t in node.written if t in owners}
        read = {owner_of(r) for r in operands[n:] if r is not None} - written
        if written & (self._read | self._written) or read & self._written:
            self._phase += 1
            self._read, self._written = set(), set()
        self._read |= read
        self._written |= written
        self.steps.append(Step(kernel, nodes, operands, attrs, n, self._phase))

    def place(self, arena: Arena[Any], outside: Iterable[Any]) -> None:
        """Find room for all activations and buffers that are not `outside`, with fixed places."""
        steps = ((step.phase, step.nodes, step.operands) for step in self.steps)
        place_buffers(steps, arena, outside)


def _key(kernel: str, choice: bool, x: Tensor) -> tuple[Any, ...]:
    return (kernel, choice, *view_key(x))


def _tile_rows(x: Tensor) -> int:
    return -(-int(x.shape[0]) // TILE_SIDE) * TILE_SIDE
