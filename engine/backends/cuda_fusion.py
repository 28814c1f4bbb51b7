"""Which consecutive nodes one launch computes together in decode steps: the rows of FUSIONS.

Steps of other kinds launch each node's own kernels. The graph stays as it is: programs that are
watched node by node, and those whose bits must not depend on the batch, do without fusions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.backends.cuda_kernels import add_small
from engine.backends.cuda_products import lower_swiglu_mul_mat, reads_swiglu
from engine.backends.cuda_program import Lowering
from engine.backends.lowering import SIGNATURES, Ref
from engine.backends.uses import Uses
from engine.graph import Live, Node

# As in fused/delta_net_inputs.cu.
_CHANNELS = 128


@dataclass(frozen=True)
class Fusion:
    """Consecutive nodes of ops `pattern`, where `supports(nodes, uses)` says yes."""

    pattern: tuple[str, ...]
    supports: Callable[[Sequence[Node], Uses], bool]
    lower: Callable[[Lowering, Sequence[Node]], None]


def _are_delta_net_inputs(nodes: Sequence[Node], uses: Uses) -> bool:
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


_INPUTS = ("SSM_CONV", "L2_NORM", "GDN_GATE")
FUSIONS = (
    Fusion(_INPUTS, _are_delta_net_inputs, _lower_delta_net_inputs),
    Fusion(_INPUTS[:2], _are_delta_net_inputs, _lower_delta_net_inputs),
    Fusion(("SWIGLU", "MUL_MAT"), reads_swiglu, lower_swiglu_mul_mat),
)
