"""RMS_NORM_GATED: the delta net's output norm, rms(x) · weight · act(gate) per head.

x, gate [T, H, D], weight [D] -> [T, H, D].
"""

from engine.formats.quants import F32
from engine.graph import Attrs, Inputs, Op, Out, match_shapes
from engine.ops.base import (
    Array,
    elementwise_cost,
    require_contiguous_rows,
    rms_norm,
    sigmoid,
    silu,
)

_ACTIVATIONS = {"silu": silu, "sigmoid": sigmoid}


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_shapes(inputs, x="T H D", gate="T H D", weight="D")
    require_contiguous_rows(inputs, "x", "gate")
    return [((dims.T, dims.H, dims.D), F32)]


def _reference(x: Array, gate: Array, weight: Array, *, eps: float, act: str) -> tuple[Array]:
    return (rms_norm(x, eps) * weight * _ACTIVATIONS[act](gate),)


RMS_NORM_GATED = Op(
    "RMS_NORM_GATED",
    ("x", "gate", "weight"),
    _infer,
    _reference,
    elementwise_cost(9),
    attrs=("eps", "act"),
    choices={"act": tuple(_ACTIVATIONS)},
)
