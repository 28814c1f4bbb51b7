"""A split as launches of the GPU, in order on one stream, and where activations lie.

Launches are chosen by what the host knows of a batch: its counts of rows and sequences. Decode
steps (a row for each sequence) are captured once for each bucket of counts and replayed; what they
work on, live counts included, is the contents of device memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engine.backends.cuda.args import MAX_ATTRS, MAX_VIEWS
from engine.backends.cuda.device import Captured, Device, Grid
from engine.backends.cuda.weights import CudaWeights
from engine.backends.native.buffers import Ref, Scratch, Zeros
from engine.formats.quants import I32
from engine.graph import Live, Node, Tensor

# Sequences of a decode step that is captured: up to each of these numbers.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
# Counters that blocks of a launch may meet at.
MAX_COUNTERS = 4096

Sizes = Callable[[Live], Grid]
Condition = Callable[[Live], bool]


def always(live: Live) -> bool:
    """The condition of what every step launches."""
    return True


@dataclass(frozen=True)
class Kernel:
    """One launch before addresses are known."""

    source: str
    kernel: str
    nodes: Sequence[Node]
    operands: Sequence[Ref]
    attrs: Sequence[float]
    threads: int
    grid: Sizes
    shared: int = 0
    when: Condition = always


@dataclass(frozen=True)
class Product:
    """out = a · bᵀ by cuBLAS: a [T, k] and b [n, k] bfloat16; b is a weight's copy or a buffer."""

    nodes: Sequence[Node]
    out: Ref
    a: Ref
    b: Tensor | Scratch
    when: Condition = always

    @property
    def kernel(self) -> str:
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
        self.counters = Zeros((MAX_COUNTERS,), I32)
        self._shared: dict[Any, list[Scratch]] = {}
        self._conditions: list[Condition] = []

    @contextmanager
    def only(self, when: Condition) -> Iterator[None]:
        """What is appended within it is launched only when this holds, too."""
        self._conditions.append(when)
        yield
        self._conditions.pop()

    def _when(self, when: Condition) -> Condition:
        if not self._conditions:
            return when
        every = (*self._conditions, when)
        return lambda live: all(condition(live) for condition in every)

    def launch(
        self,
        source: str,
        name: str,
        nodes: Sequence[Node],
        operands: Sequence[Ref],
        attrs: Sequence[float] = (),
        *,
        threads: int,
        grid: Sizes,
        shared: int = 0,
        when: Condition = always,
    ) -> None:
        """Append a launch of a kernel of `source`.

        operands: outputs, then what is read; None where one is absent. shared: bytes of dynamic
        shared memory. `grid` is a function of a batch's counts, and so is `when`: whether it is
        launched at all.
        """
        assert len(operands) <= MAX_VIEWS, (name, len(operands))
        assert len(attrs) <= MAX_ATTRS, (name, len(attrs))
        self.steps.append(
            Kernel(
                source, name, nodes, operands, attrs, threads, grid, shared, self._when(when)
            )
        )  # fmt: skip

    def gemm(
        self,
        nodes: Sequence[Node],
        out: Ref,
        a: Ref,
        b: Tensor | Scratch,
        *,
        when: Condition = always,
    ) -> None:
        """Append a matrix product by cuBLAS: out [T, n] f32 = a [T, k] · b [n, k]ᵀ."""
        self.steps.append(Product(nodes, out, a, b, self._when(when)))

    def buffers(
        self, key: Any, shapes: Sequence[tuple[Sequence[int], Any]]
    ) -> tuple[list[Scratch], bool]:
        """Buffers (shape, dtype) that are made once for each key, such as a conversion that several
        steps read; and whether they are new."""
        is_new = key not in self._shared
        if is_new:
            self._shared[key] = [Scratch(tuple(shape), dtype) for shape, dtype in shapes]
        return self._shared[key], is_new


def bucket_of(live: Live) -> int | None:
    """The bucket of a decode step that is captured; None for other steps."""
    if not live.n_tokens == live.n_seqs == live.n_outputs:
        return None
    return next((b for b in BUCKETS if live.n_tokens <= b), None)


class Replays:
    """Steps that `launch` makes: those of a bucket are captured once, then replayed."""

    def __init__(self, device: Device, launch: Callable[[Live], None]) -> None:
        self._device, self._launch = device, launch
        self.captured: dict[int, Captured] = {}

    def run(self, live: Live) -> None:
        """Make one step."""
        if (bucket := bucket_of(live)) is None:
            self._launch(live)
            return
        if bucket not in self.captured:
            most = Live(bucket, bucket, bucket)
            self.captured[bucket] = self._device.capture(lambda: self._launch(most))
        self.captured[bucket].replay()
