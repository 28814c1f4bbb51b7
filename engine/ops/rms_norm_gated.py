"""RMS_NORM_GATED: the delta net's output norm, rms(x) · weight · act(gate) per head."""

from __future__ import annotations

from collections.abc import Iterable

from engine.formats.quants import F32
from engine.graph import Attrs, Graph, Inputs, Op, Out, Tensor, match_shapes
from engine.ops.base import (
    Array,
    elementwise_cost,
    require_contiguous_rows,
    rms_norm,
    sigmoid,
    silu,
)
from engine.ops.cases import Case, Operand, Rng, activation, case, weight

_ACTIVATIONS = {"silu": silu, "sigmoid": sigmoid}


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_shapes(inputs, x="T H D", gate="T H D", weight="D")
    require_contiguous_rows(inputs, "x", "gate")
    assert attrs["act"] in _ACTIVATIONS, attrs
    return [((dims.T, dims.H, dims.D), F32)]


def _reference(x: Array, gate: Array, weight: Array, *, eps: float, act: str) -> tuple[Array]:
    return (rms_norm(x, eps) * weight * _ACTIVATIONS[act](gate),)


def _cases() -> Iterable[Case]:
    def make(rng: Rng, shape: tuple[int, ...]) -> dict[str, Operand]:
        x, gate = rng.normal(size=(2, *shape))
        return {
            "x": activation(x),
            "gate": activation(gate * 10),
            "weight": weight(rng.normal(size=shape[-1])),
        }

    for act in _ACTIVATIONS:
        for shape in ((3, 2, 16), (2, 5, 128)):
            yield case(make, {"eps": 1e-6, "act": act}, shape=shape)


RMS_NORM_GATED = Op("RMS_NORM_GATED", _infer, _reference, elementwise_cost(9), _cases)


def rms_norm_gated(
    graph: Graph, name: str, x: Tensor, gate: Tensor, weight: Tensor, eps: float, act: str
) -> Tensor:
    """x, gate [T, H, D], weight [D], act "silu" or "sigmoid" -> [T, H, D]."""
    inputs = {"x": x, "gate": gate, "weight": weight}
    return graph.add(RMS_NORM_GATED, name, inputs, eps=eps, act=act)[0]
