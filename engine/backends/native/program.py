"""What the programs of native backends share: lowering, buffers, and watched runs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from engine.backends.base import Array, Instruction, Split, Watch
from engine.backends.native.backend import NativeBackend
from engine.backends.native.buffers import Arena, Ref, Scratch, owner_of, place_buffers
from engine.backends.native.fusion import Fusion, Readers, match_fusions
from engine.backends.native.panels import PanelWeights
from engine.backends.native.signatures import is_packed
from engine.backends.native.views import DTYPES, ITEM_BYTES, write_view
from engine.formats.quants import F32
from engine.graph import Kind, Live, Node, Tensor


@dataclass(frozen=True, kw_only=True)
class KernelCall:
    """One kernel call before addresses are known. nodes: those that it computes, or has a part in.
    operands: outputs, then inputs; None where one is absent."""

    kernel: str
    nodes: Sequence[Node]
    operands: Sequence[Ref]
    attrs: Sequence[float] = ()


class Lowering(Protocol):
    """Nodes become kernel calls, in order."""

    calls: list[Any]


H = TypeVar("H", bound=NativeBackend)
L = TypeVar("L", bound=Lowering)


class NativeProgram(ABC, Generic[H]):
    """A compiled split. A watched program runs node by node, without fusions: the first watched run
    compiles a second program for that. `outside`: tensors that outlive a run and have memory of
    their own."""

    def __init__(self, backend: H, split: Split, fused: bool = True) -> None:
        self._backend, self._split, self._is_fused = backend, split, fused
        self._unfused: NativeProgram[H] | None = None
        # The calls of each node, or of the first node of a fusion.
        self._spans: dict[Node, range] = {}
        # Of the buffers and activations that are not outside.
        self._addresses: dict[Any, int] = {}
        self.instructions: Sequence[Instruction] = ()
        self._readers = Readers(split.nodes, split.keeps)
        made = {t for node in split.nodes for t in node.outputs}
        used = {t.base for node in split.nodes for t in node.inputs.values()}
        self.outside = {t for t in used if t.kind is Kind.ACTIVATION and t not in made}
        self.outside |= {t for t in used if t.kind is Kind.INPUT} | set(split.keeps)

    def _lower(
        self, lowering: L, fusions: Sequence[Fusion[L]], add: Callable[[L, Node], None]
    ) -> None:
        """Append all nodes' calls to a lowering: a fusion's, or what `add` does for one node."""
        fusions = fusions if self._is_fused else ()
        for fusion, group in match_fusions(self._split.nodes, self._readers, fusions):
            first = len(lowering.calls)
            if fusion is None:
                add(lowering, group[0])
            else:
                fusion.lower(lowering, group)
            self._spans[group[0]] = range(first, len(lowering.calls))
        self.instructions = [Instruction(c.kernel, tuple(c.nodes)) for c in lowering.calls]

    def _arena_of(
        self, calls: Sequence[KernelCall], times: Iterable[int], elsewhere: Iterable[Ref] = ()
    ) -> Arena:
        """The layout of one arena for the buffers and activations that do not lie elsewhere;
        `times`: when each call runs."""
        arena = Arena()
        timed = ((t, c.nodes, c.operands) for t, c in zip(times, calls, strict=True))
        place_buffers(timed, arena, {*self.outside, *elsewhere})
        return arena

    def _place(self, arena: Arena) -> None:
        """Allocate an arena."""
        base = self._allocate(arena.size)
        self._addresses |= {owner: base + offset for owner, offset in arena.offsets.items()}

    def _address(self, ref: Ref) -> int:
        """The address of an operand's owner; 0 for packed weights."""
        owner = owner_of(ref)
        if owner is None or owner in self._addresses:
            return self._addresses.get(owner, 0)
        if owner.kind is Kind.WEIGHT:
            return self._backend.weights.plain_or_zero(owner)
        return self._backend.fixed(owner)

    def run(self, live: Live, watch: Watch | None = None) -> None:
        if watch is not None and self._is_fused:
            self._unfused = self._unfused or type(self)(self._backend, self._split, fused=False)
            self._unfused.run(live, watch)
            return
        self._begin(live)
        if watch is None:
            self._run_all(live)
        else:
            for node, calls in self._spans.items():
                self._run_node(node, calls, live)
                watch(node, [self._output(t, live) for t in node.outputs])

    @abstractmethod
    def _allocate(self, n_bytes: int) -> int:
        """Allocate the arena; its address."""

    @abstractmethod
    def _run_all(self, live: Live) -> None:
        """Run every call."""

    def _begin(self, live: Live) -> None:
        """Bring inputs to where kernels read them."""

    @abstractmethod
    def _run_node(self, node: Node, calls: range, live: Live) -> None:
        """Run one node's calls and wait for them."""

    @abstractmethod
    def _output(self, tensor: Tensor, live: Live) -> Array:
        """The live rows of a node's output right after the node ran."""


def write_operand(
    record: Any, ref: Ref, nodes: Sequence[Node], address: int, weights: PanelWeights
) -> None:
    """Fill a zeroed record of VIEW with a call's operand. nodes: the call's. address: of the
    operand's owner; packed weights know their own."""
    if ref is None:
        return
    if isinstance(ref, Scratch):
        strides = [math.prod(ref.shape[i + 1 :]) for i in range(len(ref.shape))]
        write_view(record, address, ref.shape, strides, ref.code)
    elif ref.kind is Kind.WEIGHT and _is_packed(ref, nodes):
        weights.write_packed(record, ref)
    else:
        dtype = DTYPES[F32 if ref.kind is Kind.WEIGHT else ref.dtype]
        address += ref.offset * ITEM_BYTES[dtype]
        write_view(record, address, ref.shape, ref.strides, dtype)


def _is_packed(weight: Tensor, nodes: Iterable[Node]) -> bool:
    inputs = ((node, name, t) for node in nodes for name, t in node.inputs.items())
    return any(t is weight and is_packed(node, name) for node, name, t in inputs)
