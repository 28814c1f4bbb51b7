"""A split as launches of the GPU, in order on one stream, and where activations lie.

Launches are chosen by what the host knows of a batch: its counts of rows and sequences. Decode
steps (a row for each sequence) are captured once for each bucket of counts and replayed; what they
work on, live counts included, is the contents of device memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.arena import Arena
from engine.backends.cuda_args import MAX_ATTRS, MAX_VIEWS
from engine.backends.cuda_device import Device, Grid
from engine.backends.cuda_weights import CudaWeights
from engine.backends.lowering import DIMS, DTYPES, Ref, Scratch, is_packed, owner_of
from engine.graph import Dim, Kind, Live, Node, Tensor
from engine.quants import F32

Array = NDArray[Any]
# Sequences of a decode step that is captured: up to each of these numbers.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)

Sizes = Callable[[Live], Grid]
Condition = Callable[[Live], bool]


@dataclass(frozen=True)
class Kernel:
    """One launch before addresses are known; the first `n_writes` operands are written."""

    source: str
    name: str
    nodes: Sequence[Node]
    operands: Sequence[Ref]
    attrs: Sequence[float]
    n_writes: int
    threads: int
    grid: Sizes
    shared: int | Callable[[Live], int] = 0
    when: Condition | None = None


@dataclass(frozen=True)
class Product:
    """out = a · bᵀ by cuBLAS: a [T, k] and b [n, k] bfloat16; b is a weight's copy or a buffer."""

    nodes: Sequence[Node]
    out: Ref
    a: Ref
    b: Tensor | Scratch
    when: Condition | None = None
    accumulate: bool = False

    @property
    def name(self) -> str:
        """As kernels are called."""
        return "gemm_bf16"

    @property
    def operands(self) -> Sequence[Ref]:
        """Buffers in use."""
        return [self.out, self.a, self.b if isinstance(self.b, Scratch) else None]


Step = Kernel | Product


class Lowering:
    """The steps of a split, in order. `device` and `weights` are there for choices."""

    def __init__(self, device: Device, weights: CudaWeights, batch_invariant: bool = False) -> None:
        self.device, self.weights, self.batch_invariant = device, weights, batch_invariant
        self.steps: list[Step] = []
        self._shared: dict[Any, Scratch] = {}
        self._conditions: list[Condition] = []

    @contextmanager
    def only(self, when: Condition) -> Iterator[None]:
        """What is appended within it is launched only when this holds, too."""
        self._conditions.append(when)
        yield
        self._conditions.pop()

    def _when(self, when: Condition | None) -> Condition | None:
        every = [*self._conditions, *([when] if when else [])]
        return (lambda live: all(c(live) for c in every)) if every else None

    def launch(
        self,
        source: str,
        name: str,
        nodes: Sequence[Node],
        operands: Sequence[Ref],
        attrs: Sequence[float] = (),
        *,
        n_writes: int,
        threads: int,
        grid: Sizes,
        shared: int | Callable[[Live], int] = 0,
        when: Condition | None = None,
    ) -> None:
        """Append a launch of a kernel of `source`.

        operands: outputs, then what is read; None where one is absent. `grid` and `shared` (bytes
        of dynamic shared memory) are functions of a batch's counts, and so is `when`: whether it is
        launched at all.
        """
        assert len(operands) <= MAX_VIEWS, (name, len(operands))
        assert len(attrs) <= MAX_ATTRS, (name, len(attrs))
        self.steps.append(
            Kernel(
                source, name, nodes, operands, attrs, n_writes, threads, grid, shared,
                self._when(when),
            )
        )  # fmt: skip

    def gemm(
        self,
        nodes: Sequence[Node],
        out: Ref,
        a: Ref,
        b: Tensor | Scratch,
        *,
        when: Condition | None = None,
        accumulate: bool = False,
    ) -> None:
        """Append a matrix product by cuBLAS: out [T, n] f32 = a [T, k] · b [n, k]ᵀ."""
        self.steps.append(Product(nodes, out, a, b, self._when(when), accumulate))

    def has_buffer(self, key: Any) -> bool:
        """Whether `buffer` has made one for a key."""
        return key in self._shared

    def buffer(self, key: Any, shape: Sequence[int], dtype: Any) -> Scratch:
        """A buffer that is made once for each key, such as a conversion that several steps read."""
        if key not in self._shared:
            self._shared[key] = Scratch(tuple(shape), dtype)
        return self._shared[key]

    def place(self, arena: Arena[Any], outside: Iterable[Any]) -> None:
        """Find room for all activations and buffers that are not `outside`, with fixed places."""
        elsewhere = set(outside)
        lives: dict[Any, tuple[int, int]] = {}
        for i, step in enumerate(self.steps):
            made = (t for node in step.nodes for t in node.outputs if t in lives)
            for ref in (*step.operands, *made):
                owner = owner_of(ref)
                if owner is None or owner in elsewhere:
                    continue
                if isinstance(owner, Scratch) or owner.kind is Kind.ACTIVATION:
                    lives[owner] = (lives.get(owner, (i, 0))[0], i)
        arena.plan([(owner, owner.nbytes, *life) for owner, life in lives.items()])


def bucket_of(live: Live) -> int | None:
    """The bucket of a decode step that is captured; None for other steps."""
    if not live.n_tokens == live.n_seqs == live.n_outputs:
        return None
    return next((b for b in BUCKETS if live.n_tokens <= b), None)


def fill_view(record: Array, ref: Ref, step: Step, address: int, weights: CudaWeights) -> None:
    """Write an operand's record of VIEW; `address` is that of its base, but of weights."""
    if ref is None:
        return
    shape: Sequence[int] = ref.shape
    if isinstance(ref, Scratch):
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
        dtype, layout = ref.dtype if isinstance(ref.dtype, int) else DTYPES[ref.dtype], 0
    elif ref.kind is Kind.WEIGHT and _is_packed(ref, step):
        address, strides, dtype, layout = weights.packed_strides(ref)
    else:
        dtype = DTYPES[F32 if ref.kind is Kind.WEIGHT else ref.dtype]
        strides, layout = list(ref.strides), 0
        address += ref.offset * (2 if ref.dtype.name == "F16" and dtype != DTYPES[F32] else 4)
    record["data"], record["rank"] = address, len(shape)
    record["shape"][: len(shape)] = shape
    record["stride"][: len(strides)] = strides
    record["dtype"], record["layout"] = dtype, layout
    first = shape[0] if shape else 0
    if isinstance(first, Dim) and first.name in DIMS:
        record["dim"] = DIMS.index(first.name)


def _is_packed(weight: Tensor, step: Step) -> bool:
    return any(
        t is weight and is_packed(node, name)
        for node in step.nodes
        for name, t in node.inputs.items()
    )
