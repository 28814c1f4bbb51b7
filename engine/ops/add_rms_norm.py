"""ADD_RMS_NORM: the residual sum and its RMS norm in one pass.

s = x + delta;  y = s / sqrt(mean(s²) + eps) · weight
"""

from engine.formats.quants import F32
from engine.graph import Attrs, Graph, Inputs, Op, Out, Tensor, match_shapes
from engine.ops.base import Array, elementwise_cost, require_contiguous_rows, rms_norm


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_shapes(inputs, x="T E", weight="E", delta="T E")
    require_contiguous_rows(inputs, "x", "delta")
    return [((dims.T, dims.E), F32)] * (2 if "delta" in inputs else 1)


def _reference(
    x: Array, weight: Array, delta: Array | None = None, *, eps: float
) -> tuple[Array, ...]:
    if delta is None:
        return (rms_norm(x, eps) * weight,)
    total = x + delta
    return rms_norm(total, eps) * weight, total


ADD_RMS_NORM = Op(
    "ADD_RMS_NORM",
    ("x", "weight", "delta"),
    _infer,
    _reference,
    elementwise_cost(4),
    n_outputs=2,
    attrs=("eps",),
    optional=("delta",),
)


def add_rms_norm(
    graph: Graph, name: str, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x, delta [T, E], weight [E] -> (norm, sum), both [T, E]; without delta the sum is x."""
    operands = {"x": x, "weight": weight, "delta": delta}
    norm, *total = graph.add(ADD_RMS_NORM, name, operands, eps=eps)
    return norm, total[0] if total else x
