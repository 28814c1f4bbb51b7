"""Memory of activations: tensors that are not alive at the same time share it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.backends.native.views import DTYPES, ITEM_BYTES
from engine.formats.quants import DType
from engine.graph import Kind, Node, Tensor

ALIGNMENT = 64


class Arena:
    """One block of memory for many buffers: `size` bytes, with each buffer's offset."""

    def __init__(self) -> None:
        self.size = 0
        self.offsets: dict[Any, int] = {}

    def plan(self, buffers: Sequence[tuple[Any, int, int, int]]) -> None:
        """Place buffers (key, bytes, first and last instruction), each where no other is alive. The
        largest are placed first, each at the lowest offset that is free for its whole life."""
        # (offset, end) of the placed ones that are alive at each instruction: most live briefly.
        alive: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for key, nbytes, first, last in sorted(buffers, key=lambda b: -b[1]):
            size, offset, life = -(-nbytes // ALIGNMENT) * ALIGNMENT, 0, range(first, last + 1)
            for start, end in sorted({placed for time in life for placed in alive[time]}):
                if start < offset + size and end > offset:
                    offset = end
            for time in life:
                alive[time].append((offset, offset + size))
            self.offsets[key] = offset
            self.size = max(self.size, offset + size)


@dataclass(frozen=True, eq=False)
class Scratch:
    """A dense buffer of a program's own; `dtype`: F32, I32 or the codes I8 and BF16."""

    shape: tuple[int, ...]
    dtype: DType | int

    @property
    def code(self) -> int:
        """The code of its elements' type in views."""
        return self.dtype if isinstance(self.dtype, int) else DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes at full capacity."""
        return math.prod(self.shape) * ITEM_BYTES[self.code]


class Zeros(Scratch):
    """A buffer that shares no memory: zeros at first, and zeroed again by every step."""


Ref = Tensor | Scratch | None


def owner_of(ref: Ref) -> Any:
    """The owner of an operand's memory: a base tensor, or a buffer."""
    return ref.base if isinstance(ref, Tensor) else ref


def place_buffers(
    calls: Iterable[tuple[int, Sequence[Node], Sequence[Ref]]],
    arena: Arena,
    elsewhere: Iterable[Any] = (),
) -> None:
    """Place all activations and buffers in an arena, but those that lie `elsewhere`. calls: when
    each runs (never falling), its nodes, and its operands."""
    others = set(elsewhere)
    lives: dict[Any, tuple[int, int]] = {}
    for time, nodes, operands in calls:
        # A watch reads a node's outputs after the node's last call, even those that no node reads.
        made = (t for node in nodes for t in node.outputs if t in lives)
        for ref in (*operands, *made):
            owner = owner_of(ref)
            if owner is None or owner in others:
                continue
            if isinstance(owner, Scratch) or owner.kind is Kind.ACTIVATION:
                first, _ = lives.get(owner, (time, 0))
                lives[owner] = (first, time)
    arena.plan([(owner, owner.nbytes, *life) for owner, life in lives.items()])
