"""A split as launches on one stream, in order.

The host chooses the launches of a step by its counts of rows and sequences. Decode steps (one row
for each sequence) are captured once for each bucket of counts and replayed: everything they read,
live counts included, lies in device memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from engine.backends.cuda.args import MAX_ATTRS, MAX_VIEWS
from engine.backends.cuda.device import Device, Grid, Replay
from engine.backends.cuda.kernels import KERNELS
from engine.backends.cuda.weights import CudaWeights
from engine.backends.native.buffers import Scratch, Zeros
from engine.backends.native.program import KernelCall
from engine.formats.quants import I32
from engine.graph import Live

# Sequences of a decode step that is captured: up to each of these numbers.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
# Counters at which the thread blocks of a launch can meet.
MAX_COUNTERS = 4096

Sizes = Callable[[Live], Grid]
Condition = Callable[[Live], bool]
Run = Callable[[Live], None]


def always(live: Live) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Launch(KernelCall):
    """One launch of a kernel. grid, when: functions of a step's live counts; the launch is left out
    where `when` is false. threads, shared: of a thread block, where KERNELS leaves the choice to
    the launch."""

    grid: Sizes
    when: Condition = always
    threads: int = 0
    shared: int = 0

    def __post_init__(self) -> None:
        assert len(self.operands) <= MAX_VIEWS, (self.kernel, len(self.operands))
        assert len(self.attrs) <= MAX_ATTRS, (self.kernel, len(self.attrs))

    @property
    def thread_block(self) -> tuple[int, int]:
        """Threads of a thread block, and its bytes of dynamic shared memory."""
        known = KERNELS[self.kernel]
        return self.threads or known.threads, self.shared or known.shared


@dataclass(frozen=True, kw_only=True)
class Product(KernelCall):
    """out [T, n] f32 = a [T, k] · b [n, k]ᵀ by cuBLAS, a and b bfloat16; operands: out, a, b. b: a
    weight that has a copy in bfloat16, or a buffer."""

    kernel: str = "gemm_bf16"
    when: Condition = always


CudaCall = Launch | Product


class Lowering:
    """Collects the calls of a split, in order; kernels are chosen by `device` and `weights`."""

    def __init__(self, device: Device, weights: CudaWeights, batch_invariant: bool = False) -> None:
        self.device, self.weights, self.batch_invariant = device, weights, batch_invariant
        self.calls: list[CudaCall] = []
        self.counters = Zeros((MAX_COUNTERS,), I32)
        self._shared: dict[Any, list[Scratch]] = {}
        self._conditions: list[Condition] = []

    @contextmanager
    def only(self, when: Condition) -> Iterator[None]:
        """Calls that are added within it run only when this holds, too."""
        self._conditions.append(when)
        yield
        self._conditions.pop()

    def add(self, call: CudaCall) -> None:
        if self._conditions:
            every = (*self._conditions, call.when)
            call = replace(call, when=lambda live: all(condition(live) for condition in every))
        self.calls.append(call)

    def buffers(
        self, key: Any, shapes: Sequence[tuple[Sequence[int], Any]]
    ) -> tuple[list[Scratch], bool]:
        """The buffers (shape, dtype) of a key, for example a conversion that several calls read;
        and whether they are new."""
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
    """Runs steps by `launch`; those of a bucket are captured once, then replayed."""

    def __init__(self, device: Device, launch: Run) -> None:
        self._device, self._launch = device, launch
        self.captured: dict[int, Replay] = {}

    def run(self, live: Live) -> None:
        if (bucket := bucket_of(live)) is None:
            self._launch(live)
            return
        if bucket not in self.captured:
            most = Live(bucket, bucket, bucket)
            self.captured[bucket] = self._device.capture(lambda: self._launch(most))
        self.captured[bucket]()
