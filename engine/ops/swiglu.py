"""SWIGLU: silu(gate) · up, the activation of the feed-forward layers.

    min(silu(gate), limit) · clip(up, -limit, limit)            where a pair's limit is not 0

A node may take several pairs (the routed experts' and the shared expert's), one output each; the
attribute `limits` has a number for each pair.
"""

from collections.abc import Sequence

import numpy as np

from engine.formats.quants import F32
from engine.graph import Attrs, Graph, Inputs, Op, Out, Tensor
from engine.ops.base import Array, elementwise_cost, expect, numbered, require_contiguous_rows, silu

_PAIR = ("gate", "up")


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    outs: list[Out] = []
    limits, n_pairs = attrs["limits"], len(inputs) // 2
    fits = len(limits) == n_pairs and min(limits) >= 0
    expect(fits, "attribute limits", f"{n_pairs} numbers of at least 0", limits)
    for gate, up in numbered(inputs, *_PAIR):
        shape, other = inputs[gate].shape, inputs[up].shape
        n_tokens = inputs["gate"].shape[0]
        wanted, came = (list(map(int, s)) for s in (shape, other))
        is_rows = len(shape) > 1 and shape[0] == n_tokens
        expect(is_rows, f"operand {gate}", f"[T={int(n_tokens)}, …, F]", wanted)
        expect(other == shape, f"operand {up}", str(wanted), came)
        require_contiguous_rows(inputs, gate, up, from_axis=len(shape) - 1)
        outs.append((shape, F32))
    return outs


def _reference(*, limits: tuple[float, ...], **operands: Array) -> tuple[Array, ...]:
    made = []
    for (gate, up), limit in zip(numbered(operands, *_PAIR), limits, strict=True):
        activated, factor = silu(operands[gate]), operands[up]
        if limit:
            activated, factor = np.minimum(activated, limit), np.clip(factor, -limit, limit)
        made.append(activated * factor)
    return tuple(made)


SWIGLU = Op(
    "SWIGLU", _PAIR, _infer, _reference, elementwise_cost(5), attrs=("limits",), repeated=_PAIR
)


def swiglu(
    graph: Graph, name: str, *pairs: tuple[Tensor, Tensor], limits: Sequence[float] = ()
) -> tuple[Tensor, ...]:
    """Pairs (gate, up) of equal shapes [T, …, F] (only F must be without gaps) -> as many.

    `limits`: of each pair; by default none.
    """
    operands: dict[str, Tensor] = {}
    for i, (gate, up) in enumerate(pairs):
        operands |= {f"gate{i or ''}": gate, f"up{i or ''}": up}
    return graph.add(SWIGLU, name, operands, limits=tuple(limits) or (0.0,) * len(pairs))
