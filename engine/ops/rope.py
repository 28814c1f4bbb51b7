"""Rotary embedding: how far the pairs of a head turn at a position."""

from typing import Any, NamedTuple

import numpy as np

from engine.ops.base import Array


class RopeScaling(NamedTuple):
    """How a model reads positions beyond those of its training; the defaults change nothing.

    The speed of pair i is multiplied by first + (last - first) · clamp((i - low) / span, 0, 1), its
    cos and sin by `magnitude`.
    """

    first: float = 1.0
    last: float = 1.0
    low: float = 0.0
    span: float = 1.0
    magnitude: float = 1.0


def turns(
    positions: Array, n_rot: int, base: float, scaling: RopeScaling, dtype: Any
) -> tuple[Array, Array]:
    """cos and sin [T, 1, n_rot / 2] of the pairs at positions [T]."""
    s, i = scaling, np.arange(n_rot // 2)
    scales = s.first + (s.last - s.first) * np.clip((i - s.low) / s.span, 0, 1)
    speeds = base ** (-2.0 * i / max(n_rot, 1)) * scales
    # Angles in float64: in float32 a position in the thousands already loses half its digits.
    angles = positions[:, np.newaxis] * speeds
    cos, sin = ((f(angles) * s.magnitude)[:, np.newaxis].astype(dtype) for f in (np.cos, np.sin))
    return cos, sin
