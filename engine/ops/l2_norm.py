"""L2_NORM: x / sqrt(Σx² + eps) per head; queries and keys of the delta rule.

The additive form, as transformers and flash-linear-attention have it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engine.formats.quants import F32
from engine.graph import Attrs, Graph, Inputs, Op, Out, Tensor, match_shapes
from engine.ops.base import Array, elementwise_cost, require_contiguous_rows
from engine.ops.cases import Case, Operand, Rng, activation, case


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_shapes(inputs, x="T H D")
    require_contiguous_rows(inputs, "x")
    return [((dims.T, dims.H, dims.D), F32)]


def _reference(x: Array, *, eps: float) -> tuple[Array]:
    return (x / np.sqrt(np.sum(np.square(x), axis=-1, keepdims=True) + eps),)


def _cases() -> Iterable[Case]:
    def make(rng: Rng, shape: tuple[int, ...], scale: float) -> dict[str, Operand]:
        return {"x": activation(rng.normal(size=shape) * scale)}

    for shape in ((3, 2, 16), (5, 3, 128), (1, 1, 40)):
        for scale in (1.0, 1e-3):
            yield case(make, {"eps": 1e-6}, shape=shape, scale=scale)


L2_NORM = Op("L2_NORM", _infer, _reference, elementwise_cost(3), _cases)


def l2_norm(graph: Graph, name: str, x: Tensor, eps: float) -> Tensor:
    """x [T, H, D] -> [T, H, D]."""
    return graph.add(L2_NORM, name, {"x": x}, eps=eps)[0]
