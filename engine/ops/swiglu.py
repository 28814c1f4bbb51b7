"""SWIGLU: silu(gate) · up, the activation of the feed-forward layers.

A node may take several pairs (the routed experts' and the shared expert's), one output each.
"""

from engine.formats.quants import F32
from engine.graph import Attrs, Graph, Inputs, Op, Out, Tensor
from engine.ops.base import Array, elementwise_cost, expect, require_contiguous_rows, silu


def _pairs(n_operands: int) -> list[tuple[str, str]]:
    """Operand names: gate, up, then gate1, up1, …"""
    return [(f"gate{i or ''}", f"up{i or ''}") for i in range(n_operands // 2)]


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    outs: list[Out] = []
    for gate, up in _pairs(len(inputs)):
        shape, other = inputs[gate].shape, inputs[up].shape
        n_tokens = inputs["gate"].shape[0]
        wanted, came = (list(map(int, s)) for s in (shape, other))
        is_rows = len(shape) > 1 and shape[0] == n_tokens
        expect(is_rows, f"operand {gate}", f"[T={int(n_tokens)}, …, F]", wanted)
        expect(other == shape, f"operand {up}", str(wanted), came)
        require_contiguous_rows(inputs, gate, up, from_axis=len(shape) - 1)
        outs.append((shape, F32))
    return outs


def _reference(**operands: Array) -> tuple[Array, ...]:
    return tuple(silu(operands[gate]) * operands[up] for gate, up in _pairs(len(operands)))


_PAIR = ("gate", "up")
SWIGLU = Op("SWIGLU", _PAIR, _infer, _reference, elementwise_cost(5), repeated=_PAIR)


def swiglu(graph: Graph, name: str, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Pairs (gate, up) of equal shapes [T, …, F] (only F must be without gaps) -> as many."""
    names = (name for pair in _pairs(2 * len(pairs)) for name in pair)
    tensors = (t for pair in pairs for t in pair)
    return graph.add(SWIGLU, name, dict(zip(names, tensors, strict=True)))
