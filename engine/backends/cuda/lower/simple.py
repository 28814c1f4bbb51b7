"""Ops whose node is one launch on the node's own operands: SINGLE_LAUNCH has a row for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from engine.backends.cuda import kernels
from engine.backends.cuda.device import Device, Grid
from engine.backends.cuda.kernels import threads
from engine.backends.cuda.launches import Condition, Launch, Lowering, always
from engine.backends.cuda.lower.common import cut
from engine.backends.native.signatures import numbers, parts
from engine.graph import Live, Node, Tensor

# Up to so many rows are a launch for few rows, where an op has one.
FEW_ROWS = 64
# Thread blocks of a convolution that keep a GPU busy.
CONV_BLOCKS = 4096


@dataclass(frozen=True)
class SingleLaunch:
    """A kernel that computes an op's nodes, or those steps of it where `when` holds. grid, shared,
    attrs: of a node."""

    kernel: str
    grid: Callable[[Node, Live], Grid]
    shared: Callable[[Node], int] = lambda node: 0
    attrs: Callable[[Node], Sequence[float]] = numbers
    when: Condition = always


def _rows(node: Node, live: Live) -> int:
    """Live rows of the first operand."""
    return live.shape(next(iter(node.inputs.values())).shape)[0]


def _row_each(node: Node, live: Live) -> Grid:
    return _rows(node, live), 1, 1


def _head_each(node: Node, live: Live) -> Grid:
    """A warp for each head of a row."""
    n_warps = threads(node.op.name.lower()) // 32
    return cut(_rows(node, live) * node.inputs["x"].shape[1], n_warps), 1, 1


def _router_grid(node: Node, live: Live) -> Grid:
    """A warp for each row."""
    return cut(_rows(node, live), threads("router") // 32), 1, 1


def _gate_grid(node: Node, live: Live) -> Grid:
    per_row = math.prod(node.inputs["alpha"].shape[1:])
    return cut(_rows(node, live) * per_row, threads("gdn_gate")), 1, 1


def _table_grid(node: Node, live: Live) -> Grid:
    n_rows, n = live.shape(node.outputs[0].shape)
    return n_rows, cut(n, 4 * threads("get_rows")), 1


def _swiglu_grid(tensor: Tensor, live: Live) -> Grid:
    n_rows, *between, n = live.shape(tensor.shape)
    return cut(n_rows * cut(n, 4), threads("swiglu")), math.prod(between), 1


def _rope_grid(node: Node, live: Live) -> Grid:
    heads = node.inputs["q"].shape[1] + node.inputs["k"].shape[1]
    return _rows(node, live), cut(heads, threads("qk_norm_rope") // 32), 1


def _rope_attrs(node: Node) -> list[float]:
    """In the kernel's order. What speeds depend on comes in two floats: one has too few digits for
    far positions."""
    n_rot, s = node.attrs["n_rot"], node.attrs["rope_scaling"]
    attrs = [node.attrs["eps"], n_rot, s.low, s.span, s.magnitude]
    for x in (float(node.attrs["rope_base"]) ** (-2 / max(n_rot, 1)), s.first, s.last):
        high = float(np.float32(x))
        attrs += [high, x - high]
    return attrs


def _conv_grid(node: Node, live: Live) -> Grid:
    """Runs of rows, as long as leaves enough thread blocks: each reads the rows before it again."""
    n_blocks, n = cut(node.inputs["state"].shape[2], threads("ssm_conv")), live.n_tokens
    length = min(max(n * n_blocks // CONV_BLOCKS, 1), 32)
    return n_blocks, cut(n, length), 1


def _heads_few(node: Node, live: Live) -> Grid:
    heads, rows = node.inputs["x"].shape[1], _rows(node, live)
    return cut(_heads_out(node), 32), heads, cut(rows, kernels.HEADS_FEW_ROWS)


def _heads_many(node: Node, live: Live) -> Grid:
    heads, rows = node.inputs["x"].shape[1], _rows(node, live)
    n_tiles = cut(rows, kernels.HEADS_TILE_ROWS)
    return n_tiles, heads, cut(_heads_out(node), kernels.HEADS_TILE_OUTPUTS)


def _heads_shared(node: Node) -> int:
    return cut(node.inputs["x"].shape[2], kernels.HEADS_INPUTS) * kernels.HEADS_FEW_ROWS * 32 * 4


def _heads_out(node: Node) -> int:
    return node.inputs["weight"].shape[2 if node.attrs["transposed"] else 1]


def _few(live: Live) -> bool:
    return live.n_tokens <= FEW_ROWS


SINGLE_LAUNCH: dict[str, tuple[SingleLaunch, ...]] = {
    "ADD_RMS_NORM": (SingleLaunch("add_rms_norm", _row_each),),
    "GDN_GATE": (SingleLaunch("gdn_gate", _gate_grid),),
    "L2_NORM": (SingleLaunch("l2_norm", _head_each),),
    "MLA_CACHE": (SingleLaunch("mla_cache", _row_each, attrs=_rope_attrs),),
    "MUL_MAT_HEADS": (
        SingleLaunch("mul_mat_heads_rows", _heads_few, _heads_shared, when=_few),
        SingleLaunch("mul_mat_heads_tiles", _heads_many, when=lambda live: not _few(live)),
    ),
    "QK_NORM_ROPE": (SingleLaunch("qk_norm_rope", _rope_grid, attrs=_rope_attrs),),
    "RMS_NORM_GATED": (SingleLaunch("rms_norm_gated", _head_each),),
    "ROUTER": (SingleLaunch("router", _router_grid),),
    "SSM_CONV": (SingleLaunch("ssm_conv", _conv_grid),),
}
# A table of activations; tables of weights are packed.
GET_ROWS = SingleLaunch("get_rows", _table_grid)


def lower_simple(lowering: Lowering, node: Node) -> None:
    for single in SINGLE_LAUNCH[node.op.name]:
        add_single(lowering, node, single)


def lower_swiglu(lowering: Lowering, node: Node) -> None:
    for (_, operands, attrs), out in zip(parts(node), node.outputs, strict=True):
        lowering.add(Launch(
            kernel="swiglu", nodes=[node], operands=operands, attrs=attrs,
            grid=partial(_swiglu_grid, out),
        ))  # fmt: skip


def add_single(lowering: Lowering, node: Node, single: SingleLaunch) -> None:
    ((_, operands, _),) = parts(node)
    lowering.add(Launch(
        kernel=single.kernel, nodes=[node], operands=operands, attrs=single.attrs(node),
        grid=partial(single.grid, node), shared=single.shared(node), when=single.when,
    ))  # fmt: skip


def unsupported(node: Node, device: Device) -> str:
    limits: list[tuple[int, int, str]] = []
    match node.op.name:
        case "QK_NORM_ROPE" | "MLA_CACHE":
            limits = [(node.attrs["n_rot"], kernels.ROPE_MAX_ROT, "rotated entries")]
        case "ROUTER":
            n_experts = node.inputs["logits"].shape[1]
            limits = [(n_experts, kernels.ROUTER_MAX_EXPERTS, "experts")]
            limits += [(node.attrs["n_used"], kernels.ROUTER_MAX_USED, "used experts")]
        case "SSM_CONV":
            limits = [(node.inputs["weight"].shape[1], kernels.CONV_MAX_TAPS, "taps")]
    return next((f"{n} {what}, more than {most}" for n, most, what in limits if n > most), "")


LOWERINGS = {**dict.fromkeys(SINGLE_LAUNCH, lower_simple), "SWIGLU": lower_swiglu}
