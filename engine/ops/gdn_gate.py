"""GDN_GATE: decay and step size of the delta rule from their projections.

    g = a · softplus(alpha + dt)      beta' = sigmoid(beta)
    g = lower_bound · sigmoid(a · (alpha + dt))             where lower_bound is not 0

alpha [T, H(, Dk)], beta [T, H], a [H], dt [H(, Dk)] -> g, beta'. g is a log decay per head (GDA) or
per head and key row (KDA). `a` is -exp(A_log); beside a lower bound, which is negative, exp(A_log).
"""

import numpy as np

from engine.formats.quants import F32
from engine.graph import Attrs, Inputs, Op, Out, match_shapes
from engine.ops.base import (
    Array,
    elementwise_cost,
    expect,
    require_contiguous_rows,
    sigmoid,
    softplus,
)


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    heads = "H D" if len(inputs["alpha"].shape) == 3 else "H"
    dims = match_shapes(inputs, alpha=f"T {heads}", beta="T H", a="H", dt=heads)
    require_contiguous_rows(inputs, "alpha", "beta")
    bound = attrs["lower_bound"]
    expect(bound <= 0, "attribute lower_bound", "0 or less", bound)
    return [(inputs["alpha"].shape, F32), ((dims.T, dims.H), F32)]


def _reference(
    alpha: Array, beta: Array, a: Array, dt: Array, *, lower_bound: float
) -> tuple[Array, Array]:
    a = a[:, np.newaxis] if alpha.ndim == 3 else a
    if lower_bound:
        return lower_bound * sigmoid(a * (alpha + dt)), sigmoid(beta)
    return a * softplus(alpha + dt), sigmoid(beta)


GDN_GATE = Op(
    "GDN_GATE",
    ("alpha", "beta", "a", "dt"),
    _infer,
    _reference,
    elementwise_cost(8),
    n_outputs=2,
    attrs=("lower_bound",),
)
