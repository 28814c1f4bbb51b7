"""ADD_RMS_NORM: the residual sum and its RMS norm in one pass.

s = x + delta;  y = s / sqrt(mean(s²) + eps) · weight
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.formats.quants import F32
from engine.graph import Attrs, Graph, Inputs, Op, Out, Tensor, match_shapes
from engine.ops.base import Array, elementwise_cost, require_contiguous_rows, rms_norm
from engine.ops.cases import Case, Operand, Rng, activation, case, weight


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_shapes(inputs, x="T E", weight="E")
    require_contiguous_rows(inputs, "x")
    if "delta" not in inputs:
        return [((dims.T, dims.E), F32)]
    match_shapes(inputs, {"T": dims.T, "E": dims.E}, delta="T E")
    require_contiguous_rows(inputs, "delta")
    return [((dims.T, dims.E), F32)] * 2


def _reference(
    x: Array, weight: Array, delta: Array | None = None, *, eps: float
) -> tuple[Array, ...]:
    if delta is None:
        return (rms_norm(x, eps) * weight,)
    total = x + delta
    return rms_norm(total, eps) * weight, total


def _cases() -> Iterable[Case]:
    def make(rng: Rng, n_embd: int, residual: bool) -> dict[str, Operand]:
        operands = {
            "x": activation(rng.normal(size=(5, n_embd)) * 3),
            "weight": weight(rng.normal(size=n_embd)),
        }
        if residual:
            operands["delta"] = activation(rng.normal(size=(5, n_embd)))
        return operands

    for n_embd in (8, 130, 1024):
        for residual in (False, True):
            yield case(make, {"eps": 1e-5}, n_embd=n_embd, residual=residual)


ADD_RMS_NORM = Op("ADD_RMS_NORM", _infer, _reference, elementwise_cost(4), _cases)


def add_rms_norm(
    graph: Graph, name: str, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x, delta [T, E], weight [E] -> (norm, sum), both [T, E]; without delta the sum is x."""
    if delta is None:
        return graph.add(ADD_RMS_NORM, name, {"x": x, "weight": weight}, eps=eps)[0], x
    inputs = {"x": x, "weight": weight, "delta": delta}
    norm, total = graph.add(ADD_RMS_NORM, name, inputs, eps=eps)
    return norm, total
