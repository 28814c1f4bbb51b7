"""ROUTER: the experts of each token, and their weights.

    p = softmax(logits), or sigmoid(logits);  ids = the n_used highest of p + bias, falling
    weights = p[ids] / (Σ p[ids] + eps) · scale

The bias only takes part in the choice. Ties go to the lower expert. A token's experts don't depend
on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engine.graph import Attrs, Graph, Inputs, Op, Out, ShapeError, Tensor, match_shapes
from engine.ops.cases import Case, Operand, Rng, activation, case, weight
from engine.ops.common import Array, elementwise_cost, require_contiguous_rows, sigmoid
from engine.quants import F32, I32

GATINGS = ("softmax", "sigmoid")


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_shapes(inputs, logits="T X")
    if "bias" in inputs:
        match_shapes(inputs, {"X": dims.X}, bias="X")
    require_contiguous_rows(inputs, "logits")
    n_used = attrs["n_used"]
    if not 1 <= n_used <= dims.X:
        raise ShapeError(f"attribute n_used: expected 1 to {dims.X} experts, got {n_used}")
    assert attrs["gating"] in GATINGS, attrs
    return [((dims.T, n_used), I32), ((dims.T, n_used), F32)]


def _reference(
    logits: Array,
    bias: Array | None = None,
    *,
    n_used: int,
    gating: str,
    scale: float,
    eps: float,
) -> tuple[Array, Array]:
    if gating == "softmax":
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
    else:
        p = sigmoid(logits)
    chosen_by = p if bias is None else p + bias
    ids = np.argsort(-chosen_by, axis=1, kind="stable")[:, :n_used]
    picked = np.take_along_axis(p, ids, axis=1)
    return ids, picked / (picked.sum(axis=1, keepdims=True) + eps) * scale


def _cases() -> Iterable[Case]:
    def make(rng: Rng, n_experts: int, biased: bool) -> dict[str, Operand]:
        operands = {"logits": activation(rng.normal(size=(7, n_experts)) * 3)}
        if biased:
            operands["bias"] = weight(rng.normal(size=n_experts))
        return operands

    for n_experts, n_used, gating, biased in (
        (4, 1, "softmax", False),
        (256, 8, "softmax", False),
        (8, 8, "sigmoid", True),
        (512, 10, "sigmoid", True),
    ):
        attrs = {"n_used": n_used, "gating": gating, "scale": 2.5, "eps": 1e-20}
        yield case(make, attrs, n_experts=n_experts, biased=biased)


ROUTER = Op("ROUTER", _infer, _reference, elementwise_cost(20), _cases)


def router(
    graph: Graph,
    name: str,
    logits: Tensor,
    bias: Tensor | None,
    *,
    n_used: int,
    gating: str,
    scale: float = 1.0,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """logits [T, X], bias [X] or None -> expert ids [T, n_used] i32, weights [T, n_used]."""
    inputs = {"logits": logits} | ({} if bias is None else {"bias": bias})
    attrs = {"n_used": n_used, "gating": gating, "scale": scale, "eps": eps}
    ids, weights = graph.add(ROUTER, name, inputs, **attrs)
    return ids, weights
