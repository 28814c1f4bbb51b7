"""SWIGLU: silu(gate) · up, the activation of the feed-forward layers."""

from __future__ import annotations

from collections.abc import Iterable

from engine.graph import Attrs, Graph, Inputs, Op, Out, Tensor, match_shapes
from engine.ops.cases import Case, Operand, Rng, activation, case
from engine.ops.common import Array, elementwise_cost, require_contiguous_rows, silu
from engine.quants import F32


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_shapes(inputs, gate="T F", up="T F")
    require_contiguous_rows(inputs, "gate", "up")
    return [((dims.T, dims.F), F32)]


def _reference(gate: Array, up: Array) -> tuple[Array]:
    return (silu(gate) * up,)


def _cases() -> Iterable[Case]:
    def make(rng: Rng, n_ff: int) -> dict[str, Operand]:
        gate, up = rng.normal(size=(2, 4, n_ff))
        return {"gate": activation(gate * 20), "up": activation(up)}

    for n_ff in (4, 67, 3584):
        yield case(make, {}, n_ff=n_ff)


SWIGLU = Op("SWIGLU", _infer, _reference, elementwise_cost(5), _cases)


def swiglu(graph: Graph, name: str, gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [T, F] -> [T, F]."""
    return graph.add(SWIGLU, name, {"gate": gate, "up": up})[0]
