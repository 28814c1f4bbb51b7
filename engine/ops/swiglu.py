"""SWIGLU: silu(gate) · up, the activation of the feed-forward layers.

A node may take several pairs (the routed experts' and the shared expert's), one output each.
"""

from __future__ import annotations

from engine.formats.quants import F32
from engine.graph import Attrs, Graph, Inputs, Op, Out, ShapeError, Tensor
from engine.ops.base import Array, elementwise_cost, require_contiguous_rows, silu


def _pairs(n_operands: int) -> list[tuple[str, str]]:
    """Operand names: gate, up, then gate1, up1, …"""
    return [(f"gate{i or ''}", f"up{i or ''}") for i in range(n_operands // 2)]


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    outs: list[Out] = []
    for gate, up in _pairs(len(inputs)):
        shape, other = inputs[gate].shape, inputs[up].shape
        if len(shape) < 2 or shape[0] != inputs["gate"].shape[0]:
            n_tokens, came = int(inputs["gate"].shape[0]), list(map(int, shape))
            raise ShapeError(f"operand {gate}: expected [T={n_tokens}, …, F], got {came}")
        if other != shape:
            raise ShapeError(
                f"operand {up}: expected {list(map(int, shape))}, got {list(map(int, other))}"
            )
        require_contiguous_rows(inputs, gate, up, from_axis=len(shape) - 1)
        outs.append((shape, F32))
    return outs


def _reference(**operands: Array) -> tuple[Array, ...]:
    return tuple(silu(operands[gate]) * operands[up] for gate, up in _pairs(len(operands)))


_PAIR = ("gate", "up")
SWIGLU = Op("SWIGLU", _PAIR, _infer, _reference, elementwise_cost(5), repeated=_PAIR)


def swiglu(graph: Graph, name: str, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Pairs (gate, up) of equal shapes [T, …, F] (only F must be without gaps) -> as many."""
    inputs: dict[str, Tensor] = {}
    for names, pair in zip(_pairs(2 * len(pairs)), pairs, strict=True):
        inputs |= zip(names, pair, strict=True)
    return graph.add(SWIGLU, name, inputs)
