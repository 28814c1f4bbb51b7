"""ROUTER: the experts of each token, and their weights.

    p = softmax(logits), or sigmoid(logits);  ids = the n_used highest of p + bias, falling
    weights = p[ids] / (Σ p[ids] + eps) · scale, or p[ids] · scale if not normalized

logits [T, X], bias [X] or none -> ids [T, n_used] i32, weights [T, n_used].

The bias only takes part in the choice. With groups, only experts of the `n_groups_used` best groups
can be chosen; a group is as good as the sum of its two best experts. Ties go to the lower index. A
token's experts don't depend on the rest of the batch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.formats.quants import F32, I32
from engine.graph import Attrs, Inputs, Op, Out, ShapeError, match_shapes
from engine.ops.base import Array, elementwise_cost, expect, require_contiguous_rows, sigmoid


@dataclass(frozen=True)
class Routing:
    """The op's attributes. `groups`: how many groups of experts there are, and are used."""

    n_used: int
    gating: str = "softmax"
    scale: float = 1.0
    eps: float = 0.0
    groups: tuple[int, int] = (1, 1)
    normalized: bool = True


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_shapes(inputs, logits="T X", bias="X")
    require_contiguous_rows(inputs, "logits")
    n_groups, n_groups_used = attrs["groups"]
    if dims.X % n_groups or not 1 <= n_groups_used <= n_groups or dims.X == n_groups > 1:
        raise ShapeError(f"attribute groups: {n_groups_used} of {n_groups} of {dims.X} experts")
    n_used, n_eligible = attrs["n_used"], dims.X // n_groups * n_groups_used
    expect(1 <= n_used <= n_eligible, "attribute n_used", f"1 to {n_eligible} experts", n_used)
    return [((dims.T, n_used), I32), ((dims.T, n_used), F32)]


def _reference(logits: Array, bias: Array | None = None, **attrs: Any) -> tuple[Array, Array]:
    routing = Routing(**attrs)
    if routing.gating == "softmax":
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
    else:
        p = sigmoid(logits)
    chosen_by = p if bias is None else p + bias
    if routing.groups[0] > 1:
        chosen_by = _in_best_groups(chosen_by, *routing.groups)
    ids = np.argsort(-chosen_by, axis=1, kind="stable")[:, : routing.n_used]
    picked = np.take_along_axis(p, ids, axis=1)
    if routing.normalized:
        picked = picked / (picked.sum(axis=1, keepdims=True) + routing.eps)
    return ids, picked * routing.scale


def _in_best_groups(scores: Array, n_groups: int, n_used: int) -> Array:
    """The scores with those outside of the best groups at -inf."""
    grouped = scores.reshape(len(scores), n_groups, -1)
    best_two = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
    kept = np.argsort(-best_two, axis=1, kind="stable")[:, :n_used]
    mask = np.zeros(best_two.shape, bool)
    np.put_along_axis(mask, kept, True, axis=1)
    return np.where(mask[:, :, np.newaxis], grouped, -np.inf).reshape(scores.shape)


ROUTER = Op(
    "ROUTER",
    ("logits", "bias"),
    _infer,
    _reference,
    elementwise_cost(20),
    n_outputs=2,
    attrs=("n_used", "gating", "scale", "eps", "groups", "normalized"),
    choices={"gating": ("softmax", "sigmoid")},
    optional=("bias",),
)
