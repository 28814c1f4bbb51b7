"""The weights of which copies in bfloat16 pay, and those that a number of bytes has room for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine.backends.cuda.lower.mul_mat import FEW_ROWS
from engine.backends.cuda.weights import CudaWeights, fits_bf16, is_of_step
from engine.backends.native.signatures import matrices_of
from engine.graph import Node, Tensor

# The part that copies may take of the memory that nothing else of the engine needs. The other half
# is for what comes later: the second program of --check, other programs on the GPU, another engine.
SHARE = 0.5
# Bytes that memory moves in the 2 microseconds of a launch.
_LAUNCH_BYTES = 8 << 20


def copyable(nodes: Sequence[Node], weights: CudaWeights) -> list[Tensor]:
    """The weights that a step may multiply by more rows than panels are for, each once, from the
    one whose copy saves most for its bytes.

    Without a copy, a step that is large enough expands the weight: a launch reads its panels and
    writes the copy anew. That is what a copy saves, however many rows there are. So a weight of
    more bits goes before one of fewer, and a small one, for which the launch counts, before a large
    one.
    """
    found: dict[Tensor, Tensor] = {}
    for node in nodes:
        if node.op.name == "MUL_MAT":
            for w, out in zip(matrices_of(node), node.outputs, strict=True):
                if fits_bf16(w) and is_of_step(out) and int(out.shape[0]) > FEW_ROWS:
                    found.setdefault(w.base, w)

    def saved(w: Tensor) -> float:
        return (weights.packed_bytes(w) + _LAUNCH_BYTES) / copy_bytes(w)

    return sorted(found.values(), key=saved, reverse=True)


def chosen(candidates: Sequence[Tensor], n_bytes: int) -> list[Tensor]:
    """Those that have room in so many bytes, in their order; one that has none is left out."""
    taken = []
    for w in candidates:
        if copy_bytes(w) <= n_bytes:
            n_bytes -= copy_bytes(w)
            taken.append(w)
    return taken


def copy_bytes(w: Tensor) -> int:
    """The bytes of a weight's copy."""
    return 2 * math.prod(w.shape)
