"""Consecutive nodes whose launches compute them together in steps of few rows: the rows of FUSIONS.

Other steps launch each node's own kernels; batch-invariant programs have the fusions of products in
every step. The graph stays as it is: programs that are watched node by node have no fusions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from engine.backends.cuda.kernels import K_BLOCK, threads
from engine.backends.cuda.launches import Launch, Lowering
from engine.backends.cuda.lower import experts, gemv, lower_node, mul_mat_id
from engine.backends.cuda.lower.common import RowRange, cut
from engine.backends.cuda.lower.mul_mat import few_rows, lower_mul_mat
from engine.backends.native.fusion import Fusion, Readers
from engine.backends.native.signatures import is_quantized, matrices_of, parts
from engine.graph import Live, Node

# Channels of a thread block.
_CHANNELS = threads("delta_net_inputs")


def _are_delta_net_inputs(nodes: Sequence[Node], readers: Readers) -> bool:
    """Whether the convolution's first channels are the heads that are scaled, each within the
    channels of one thread block."""
    conv, norm = nodes[:2]
    x, (out,) = norm.inputs["x"], conv.outputs
    return x.base is out and x.offset == 0 and _CHANNELS % x.shape[2] == 0


def _lower_delta_net_inputs(lowering: Lowering, nodes: Sequence[Node]) -> None:
    conv, norm, *gates = nodes
    ((_, views, _),) = parts(conv)
    views += [norm.outputs[0], norm.inputs["x"]]
    n_gates, attrs = 0, [norm.attrs["eps"]]
    for gate in gates:
        ((_, operands, gate_attrs),) = parts(gate)
        views += operands
        attrs += gate_attrs
        n_gates = cut(math.prod(gate.outputs[0].shape[1:]), _CHANNELS)
    n_blocks = cut(conv.outputs[0].shape[1], _CHANNELS) + n_gates

    def decodes(live: Live) -> bool:
        return live.n_tokens == live.n_seqs

    with lowering.only(lambda live: not decodes(live)):
        for node in nodes:
            lower_node(lowering, node)
    lowering.add(Launch(
        kernel="delta_net_inputs", nodes=nodes, operands=views, attrs=attrs,
        grid=lambda live: (n_blocks, live.n_tokens, 1), when=decodes,
    ))  # fmt: skip


def _lower_made(
    make: Callable[[Node], gemv.MadeRows], lowering: Lowering, nodes: Sequence[Node]
) -> None:
    """An op and the only product that reads it. Few rows take the product's launches alone, more
    those of both."""
    before, product = nodes
    few = few_rows(lowering, product)
    if few is not None:
        many = RowRange(product.inputs["x"], few, None)
        with lowering.only(many):
            lower_node(lowering, before)
    lower_mul_mat(lowering, product, make(before) if few != 0 else None)


def _is_read_alone(nodes: Sequence[Node], readers: Readers) -> bool:
    """Whether only the product reads the output of the node before it, and the whole of it."""
    before, product = nodes
    out, x = before.outputs[0], product.inputs["x"]
    is_whole = x.base is out and math.prod(x.shape) == math.prod(out.shape)
    return is_whole and readers.only_by(out, product)


def _reads_swiglu(nodes: Sequence[Node], readers: Readers) -> bool:
    act, product = nodes
    is_row = len(act.outputs) == 1 and len(act.outputs[0].shape) == 2
    is_row &= not any(act.attrs["limits"])
    return is_row and _is_quantized(product) and _is_read_alone(nodes, readers)


def _reads_gated(nodes: Sequence[Node], readers: Readers) -> bool:
    """Whether heads lie without gaps, and a warp's columns are whole heads."""
    norm, product = nodes
    head = norm.inputs["x"].shape[2]
    dense = all(norm.inputs[name].strides[1] == head for name in ("x", "gate"))
    whole = head in (8, 16, 32, 64, 128, 256)
    return dense and whole and _is_quantized(product) and _is_read_alone(nodes, readers)


def _reads_norm(nodes: Sequence[Node], readers: Readers) -> bool:
    """Tell whether only the product reads the norm, and its rows are whole k-blocks."""
    return nodes[1].inputs["x"].shape[1] % K_BLOCK == 0 and _is_read_alone(nodes, readers)


def _is_quantized(product: Node) -> bool:
    return all(map(is_quantized, matrices_of(product)))


def _lower_experts(lowering: Lowering, nodes: Sequence[Node]) -> None:
    """The feed-forward of experts; of many tokens each node for itself."""
    if not lowering.batch_invariant:
        with lowering.only(RowRange(nodes[0].inputs["x"], mul_mat_id.PANEL_TOKENS, None)):
            for node in nodes:
                lower_node(lowering, node)
    experts.lower_experts(lowering, nodes)


_INPUTS = ("SSM_CONV", "L2_NORM", "GDN_GATE")
FUSIONS = (
    Fusion(_INPUTS, _are_delta_net_inputs, _lower_delta_net_inputs),
    Fusion(_INPUTS[:2], _are_delta_net_inputs, _lower_delta_net_inputs),
    Fusion(experts.PATTERN, experts.fits, _lower_experts),
    Fusion(("SWIGLU", "MUL_MAT"), _reads_swiglu, partial(_lower_made, gemv.swiglu_row)),
    Fusion(("ADD_RMS_NORM", "MUL_MAT"), _reads_norm, partial(_lower_made, gemv.norm_row)),
    Fusion(("RMS_NORM_GATED", "MUL_MAT"), _reads_gated, partial(_lower_made, gemv.gated_row)),
)
