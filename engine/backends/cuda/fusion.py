"""Which consecutive nodes one launch computes together in decode steps: the rows of FUSIONS.

Steps of other kinds launch each node's own kernels. The graph stays as it is: programs that are
watched node by node, and those whose bits must not depend on the batch, do without fusions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from engine.backends.cuda.launches import Lowering
from engine.backends.cuda.lower import gemv as cuda_row
from engine.backends.cuda.lower.common import Between
from engine.backends.cuda.lower.mul_mat import lower_mul_mat
from engine.backends.cuda.lower.simple import add_small
from engine.backends.native.buffers import Ref
from engine.backends.native.fusion import Fusion, Readers
from engine.backends.native.signatures import SIGNATURES, is_quantized, matrices_of
from engine.graph import Live, Node

# As in fused/delta_net_inputs.cu.
_CHANNELS = 128


def _are_delta_net_inputs(nodes: Sequence[Node], readers: Readers) -> bool:
    """A convolution whose first channels are heads, each within 128 of them, that are scaled."""
    conv, norm = nodes[:2]
    x, (out,) = norm.inputs["x"], conv.outputs
    return x.base is out and x.offset == 0 and _CHANNELS % x.shape[2] == 0


def _lower_delta_net_inputs(lowering: Lowering, nodes: Sequence[Node]) -> None:
    conv, norm, *gates = nodes
    (out,), operands = conv.outputs, SIGNATURES["SSM_CONV"].operands
    views: list[Ref] = [out, *(conv.inputs.get(name) for name in operands)]
    views += [norm.outputs[0], norm.inputs["x"]]
    n_gates = 0
    for gate in gates:
        views += [*gate.outputs, *(gate.inputs[n] for n in SIGNATURES["GDN_GATE"].operands)]
        n_gates = -(-gate.outputs[0].nbytes // int(out.shape[0]) // 4 // _CHANNELS)
    n_blocks = -(-out.shape[1] // _CHANNELS) + n_gates

    def decodes(live: Live) -> bool:
        return live.n_tokens == live.n_seqs

    with lowering.only(lambda live: not decodes(live)):
        for node in nodes:
            add_small(lowering, node)
    lowering.launch(
        "fused/delta_net_inputs",
        "delta_net_inputs",
        nodes,
        views,
        [norm.attrs["eps"]],
        threads=_CHANNELS,
        grid=lambda live: (n_blocks, live.n_tokens, 1),
        when=decodes,
    )


def _lower_row_of(
    make: Callable[[Sequence[Node]], cuda_row.Row], lowering: Lowering, nodes: Sequence[Node]
) -> None:
    """An op and the product that alone reads it: of one row in one launch."""
    before, product = nodes
    is_row = Between(product.inputs["x"], 0, 1)
    with lowering.only(lambda live: not is_row(live)):
        add_small(lowering, before)
    lower_mul_mat(lowering, product, more_than=1)
    outs = dict(zip(matrices_of(product), product.outputs, strict=True))
    cuda_row.lower_row(lowering, product, outs, make(nodes))


def _is_read_alone(nodes: Sequence[Node], readers: Readers) -> bool:
    """Whether nothing but a product reads what comes before it, and all of that."""
    before, product = nodes
    out, x = before.outputs[0], product.inputs["x"]
    is_whole = x.base is out and math.prod(x.shape) == math.prod(out.shape)
    return is_whole and readers.only_by(out, product)


def _reads_swiglu(nodes: Sequence[Node], readers: Readers) -> bool:
    act, product = nodes
    is_row = len(act.outputs) == 1 and len(act.outputs[0].shape) == 2
    return is_row and _is_quantized(product) and _is_read_alone(nodes, readers)


def _reads_gated(nodes: Sequence[Node], readers: Readers) -> bool:
    """Heads without gaps, of which a warp's columns have whole ones."""
    norm, product = nodes
    head = norm.inputs["x"].shape[2]
    dense = all(norm.inputs[name].strides[1] == head for name in ("x", "gate"))
    whole = head in (8, 16, 32, 64, 128, 256)
    return dense and whole and _is_quantized(product) and _is_read_alone(nodes, readers)


def _reads_norm(nodes: Sequence[Node], readers: Readers) -> bool:
    return cuda_row.is_worth_a_norm(matrices_of(nodes[1])) and _is_read_alone(nodes, readers)


def _is_quantized(product: Node) -> bool:
    return all(map(is_quantized, matrices_of(product)))


_INPUTS = ("SSM_CONV", "L2_NORM", "GDN_GATE")
FUSIONS = (
    Fusion(_INPUTS, _are_delta_net_inputs, _lower_delta_net_inputs),
    Fusion(_INPUTS[:2], _are_delta_net_inputs, _lower_delta_net_inputs),
    Fusion(("SWIGLU", "MUL_MAT"), _reads_swiglu, partial(_lower_row_of, cuda_row.swiglu_row)),
    Fusion(("ADD_RMS_NORM", "MUL_MAT"), _reads_norm, partial(_lower_row_of, cuda_row.norm_row)),
    Fusion(("RMS_NORM_GATED", "MUL_MAT"), _reads_gated, partial(_lower_row_of, cuda_row.gated_row)),
)
