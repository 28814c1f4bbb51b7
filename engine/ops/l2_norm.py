"""L2_NORM: x / sqrt(Σx² + eps) per head of x [T, H, D]; queries and keys.

The additive form, as transformers and flash-linear-attention have it.
"""

import numpy as np

from engine.formats.quants import F32
from engine.graph import Attrs, Inputs, Op, Out, match_shapes
from engine.ops.base import Array, elementwise_cost, require_contiguous_rows


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_shapes(inputs, x="T H D")
    require_contiguous_rows(inputs, "x")
    return [((dims.T, dims.H, dims.D), F32)]


def _reference(x: Array, *, eps: float) -> tuple[Array]:
    return (x / np.sqrt(np.sum(np.square(x), axis=-1, keepdims=True) + eps),)


L2_NORM = Op("L2_NORM", ("x",), _infer, _reference, elementwise_cost(3), attrs=("eps",))
