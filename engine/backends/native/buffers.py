"""Where activations lie: tensors that are not alive at the same time share memory."""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from engine.backends.native.views import BF16, I8
from engine.formats.quants import F32, I32, DType
from engine.graph import Kind, Node, Tensor

ALIGNMENT = 64
Key = TypeVar("Key", bound=Hashable)


class Arena(Generic[Key]):
    """Gives offsets to buffers in the order of their first use; `size` is the bytes needed."""

    def __init__(self) -> None:
        self.size = 0
        self.offsets: dict[Key, int] = {}

    def plan(self, buffers: Sequence[tuple[Key, int, int, int]]) -> None:
        """Place buffers (key, bytes, first and last instruction), each where no other is alive.

        The largest are placed first, each at the lowest offset that is free for its whole life.
        """
        placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last
        for key, nbytes, first, last in sorted(buffers, key=lambda b: -b[1]):
            size, offset = -(-nbytes // ALIGNMENT) * ALIGNMENT, 0
            for start, end, since, until in placed:
                if since <= last and first <= until and start < offset + size and end > offset:
                    offset = end
            insort(placed, (offset, offset + size, first, last))
            self.offsets[key] = offset
            self.size = max(self.size, offset + size)


_ITEM = {F32: 4, I32: 4, I8: 1, BF16: 2}


@dataclass(frozen=True, eq=False)
class Scratch:
    """A buffer of a program's own; `dtype`: F32, I32 or the codes I8 and BF16."""

    shape: tuple[int, ...]
    dtype: DType | int

    @property
    def nbytes(self) -> int:
        """Bytes at full capacity."""
        return int(np.prod(self.shape)) * _ITEM[self.dtype]


class Zeros(Scratch):
    """One with a place of its own: zeros at first, and again whenever a step is done."""


Ref = Tensor | Scratch | None


def owner_of(ref: Ref) -> Any:
    """What owns an operand's memory: a base tensor, or a buffer."""
    return ref.base if isinstance(ref, Tensor) else ref


def place_buffers(
    steps: Iterable[tuple[int, Sequence[Node], Sequence[Ref]]],
    arena: Arena[Any],
    outside: Iterable[Any],
) -> None:
    """Find room for all activations and buffers that are not `outside`, with fixed places.

    steps: when each runs, never falling, its nodes, and its operands.
    """
    elsewhere = set(outside)
    lives: dict[Any, tuple[int, int]] = {}
    for time, nodes, operands in steps:
        # A node's outputs are looked at when its last step has run, also those nobody reads.
        made = (t for node in nodes for t in node.outputs if t in lives)
        for ref in (*operands, *made):
            owner = owner_of(ref)
            if owner is None or owner in elsewhere:
                continue
            if isinstance(owner, Scratch) or owner.kind is Kind.ACTIVATION:
                first, _ = lives.get(owner, (time, 0))
                lives[owner] = (first, time)
    arena.plan([(owner, owner.nbytes, *life) for owner, life in lives.items()])
