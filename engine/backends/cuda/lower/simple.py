"""Ops whose kernels need nothing but their operands: where they are, and how they are launched."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from engine.backends.cuda.device import Grid
from engine.backends.cuda.launches import Condition, Lowering, always
from engine.backends.native.signatures import numbers, parts
from engine.graph import Live, Node, Tensor

# A batch of up to so many rows is a launch for few rows, where there is one.
FEW_ROWS = 64
# Blocks of a convolution that keep a GPU busy.
CONV_BLOCKS = 4096
# As in the sources.
_MAX_EXPERTS, _MAX_USED, _MAX_TAPS, _MAX_ROT = 512, 32, 16, 512
_HEAD_CHUNK, _HEAD_FEW, _HEAD_ROWS, _HEAD_OUT = 32, 8, 128, 64


def _by_signature(node: Node) -> list[float]:
    return numbers(node)


def _takes_all(node: Node) -> str:
    return ""


@dataclass(frozen=True)
class Small:
    """A kernel; `shared` is bytes of dynamic shared memory, `attrs` its attributes.

    when: launched only for such batches; refuses: why it can't take a node, or "".
    """

    source: str
    kernel: str
    threads: int
    grid: Callable[[Node, Live], Grid]
    shared: Callable[[Node], int] = lambda node: 0
    attrs: Callable[[Node], Sequence[float]] = _by_signature
    when: Condition = always
    refuses: Callable[[Node], str] = _takes_all


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


def _rows(node: Node, live: Live) -> int:
    """Live rows of the first operand, or of the output of a table's rows."""
    tensor = node.outputs[0] if node.op.name == "GET_ROWS" else next(iter(node.inputs.values()))
    return live.shape(tensor.shape)[0]


def _row_each(node: Node, live: Live) -> Grid:
    return _rows(node, live), 1, 1


def _head_each(node: Node, live: Live) -> Grid:
    """A warp of 8 for each head of a row."""
    return _blocks(_rows(node, live) * node.inputs["x"].shape[1], 8), 1, 1


def _gate_grid(node: Node, live: Live) -> Grid:
    per_row = math.prod(node.inputs["alpha"].shape[1:])
    return _blocks(_rows(node, live) * per_row, 256), 1, 1


def _table_grid(node: Node, live: Live) -> Grid:
    return _rows(node, live), _blocks(node.outputs[0].shape[1], 1024), 1


def _swiglu_grid(tensor: Tensor, live: Live) -> Grid:
    n_rows, *between, n = live.shape(tensor.shape)
    return _blocks(n_rows * _blocks(n, 4), 256), math.prod(between), 1


def _rope_grid(node: Node, live: Live) -> Grid:
    heads = node.inputs["q"].shape[1] + node.inputs["k"].shape[1]
    return _rows(node, live), _blocks(heads, 8), 1


def _rope_attrs(node: Node) -> list[float]:
    """eps, n_rot, and base^(-2 / n_rot) in two floats: one has too few digits for far positions."""
    n_rot = node.attrs["n_rot"]
    ratio = float(node.attrs["rope_base"]) ** (-2 / max(n_rot, 1))
    high = float(np.float32(ratio))
    return [node.attrs["eps"], n_rot, high, ratio - high]


def _conv_grid(node: Node, live: Live) -> Grid:
    """Runs of as many rows as still leave enough blocks: each reads the rows before it again."""
    n_blocks, n = _blocks(node.inputs["state"].shape[2], 128), live.n_tokens
    length = min(max(n * n_blocks // CONV_BLOCKS, 1), 32)
    return n_blocks, _blocks(n, length), 1


def _heads_few(node: Node, live: Live) -> Grid:
    heads, rows = node.inputs["x"].shape[1], _rows(node, live)
    return _blocks(_heads_out(node), 32), heads, _blocks(rows, _HEAD_FEW)


def _heads_many(node: Node, live: Live) -> Grid:
    heads, rows = node.inputs["x"].shape[1], _rows(node, live)
    return _blocks(rows, _HEAD_ROWS), heads, _blocks(_heads_out(node), _HEAD_OUT)


def _heads_shared(node: Node) -> int:
    return _blocks(node.inputs["x"].shape[2], _HEAD_CHUNK) * _HEAD_FEW * 32 * 4


def _heads_out(node: Node) -> int:
    return node.inputs["weight"].shape[2 if node.attrs["transposed"] else 1]


def _few(live: Live) -> bool:
    return live.n_tokens <= FEW_ROWS


def _many(live: Live) -> bool:
    return not _few(live)


def _refuse_rope(node: Node) -> str:
    return _beyond(node.attrs["n_rot"], _MAX_ROT, "rotated entries")


def _refuse_conv(node: Node) -> str:
    return _beyond(node.inputs["weight"].shape[1], _MAX_TAPS, "taps")


def _refuse_router(node: Node) -> str:
    experts = _beyond(node.inputs["logits"].shape[1], _MAX_EXPERTS, "experts")
    return experts or _beyond(node.attrs["n_used"], _MAX_USED, "used experts")


def _beyond(n: int, most: int, what: str) -> str:
    return f"{n} {what}, more than {most}" if n > most else ""


SMALL: dict[str, tuple[Small, ...]] = {
    "ADD_RMS_NORM": (Small("add_rms_norm", "add_rms_norm", 256, _row_each),),
    "GDN_GATE": (Small("gdn_gate", "gdn_gate", 256, _gate_grid),),
    "L2_NORM": (Small("head_norms", "l2_norm", 256, _head_each),),
    "MLA_CACHE": (Small("mla_cache", "mla_cache", 128, _row_each),),
    "MUL_MAT_HEADS": (
        Small("mul_mat_heads", "mul_mat_heads_rows", 128, _heads_few, _heads_shared, when=_few),
        Small("mul_mat_heads", "mul_mat_heads_tiles", 256, _heads_many, when=_many),
    ),
    "QK_NORM_ROPE": (
        Small(
            "qk_norm_rope", "qk_norm_rope", 256, _rope_grid,
            attrs=_rope_attrs, refuses=_refuse_rope,
        ),
    ),
    "RMS_NORM_GATED": (Small("head_norms", "rms_norm_gated", 256, _head_each),),
    "ROUTER": (Small("router", "router", 32, _row_each, refuses=_refuse_router),),
    "SSM_CONV": (Small("ssm_conv", "ssm_conv", 128, _conv_grid, refuses=_refuse_conv),),
}  # fmt: skip
# A table of activations; one of weights is packed.
GET_ROWS = Small("get_rows", "get_rows", 256, _table_grid)


def add_small(lowering: Lowering, node: Node) -> None:
    """Append the launches of a node whose op is in SMALL, or of a SWIGLU."""
    if node.op.name == "SWIGLU":
        for (_, operands, attrs), out in zip(parts(node), node.outputs, strict=True):
            grid = partial(_swiglu_grid, out)
            lowering.launch("swiglu", "swiglu", [node], operands, attrs, threads=256, grid=grid)
        return
    for small in SMALL[node.op.name]:
        add_launch(lowering, node, small)


def add_launch(lowering: Lowering, node: Node, small: Small) -> None:
    """Append one launch on a node's operands."""
    ((_, operands, _),) = parts(node)
    lowering.launch(
        small.source,
        small.kernel,
        [node],
        operands,
        small.attrs(node),
        threads=small.threads,
        grid=partial(small.grid, node),
        shared=small.shared(node),
        when=small.when,
    )


def unsupported(node: Node) -> str:
    """Why a node of these ops can't be run; an empty string if it can."""
    return next(filter(None, (small.refuses(node) for small in SMALL.get(node.op.name, ()))), "")
