"""The device that the CUDA backend runs on: memory, launches, captured graphs.

Other files use a GPU through this protocol alone, so tests can replace `CupyDevice` by a device
that needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.backends.base import Array
from engine.errors import EngineError

Grid = tuple[int, int, int]


class CudaError(EngineError):
    """No usable GPU or CuPy, or a call that failed."""


class Memory(Protocol):
    """Bytes of device memory, freed when nothing refers to it any more."""

    address: int
    nbytes: int


@dataclass(frozen=True)
class Gemm:
    """out [m, n] f32 = a [m, k] · b [n, k]ᵀ, both bfloat16, row-major without gaps."""

    out: int
    a: int
    b: int
    m: int
    n: int
    k: int


# Waits for bytes on their way to the host, but not for later work; returns them as uint8.
Fetched = Callable[[], Array]
# Runs recorded launches again, behind the work so far; the device keeps what they need.
Replay = Callable[[], None]


class Timer(Protocol):
    """Times parts of the device's work."""

    def mark(self) -> None:
        """End the part that began at the mark before."""

    def seconds(self) -> list[float]:
        """Wait; the seconds between neighbouring marks."""


class Device(Protocol):
    """One device, which works in the order of the calls. `total_bytes`: its memory in all, or as
    much of it as may be taken."""

    name: str
    detail: str
    capability: tuple[int, int]
    n_multiprocessors: int
    shared_bytes: int
    total_bytes: int

    def free_bytes(self) -> int:
        """Memory that can be allocated."""

    def allocate(self, n_bytes: int) -> Memory:
        """Memory aligned to 256 bytes, of arbitrary contents; raises CudaError if there is none."""

    def allocate_host(self, n_bytes: int) -> Memory:
        """Pinned memory of the host, which kernels can read and write at its address; raises
        CudaError if there is none."""

    def upload(self, address: int, values: Array) -> None:
        """Copy to the device; `values` may be changed when this returns."""

    def download(self, address: int, values: Array) -> None:
        """Wait for all work and copy to `values`, which lies without gaps."""

    def fetch(self, spans: Sequence[tuple[int, int]]) -> Fetched:
        """Copy bytes, spans of (address, number), to the host behind the work so far, without
        waiting. Their values, one span after the other, may be read until three more fetches were
        made."""

    def mark(self) -> Callable[[], bool]:
        """A function that says whether all work so far is done."""

    def fill(self, address: int, n_bytes: int, byte: int) -> None:
        """Set bytes."""

    def copy(self, target: int, source: int, n_bytes: int) -> None:
        """Copy within the device."""

    def function(self, source: str, name: str, shared_bytes: int = 0) -> int:
        """A kernel of a source of ops/cuda, allowed `shared_bytes` of dynamic shared memory."""

    def launch(self, function: int, grid: Grid, threads: int, shared: int, params: int) -> None:
        """Launch a kernel of one parameter, which lies at the host's address `params`."""

    def gemm(self, product: Gemm) -> None:
        """A matrix product on tensor cores, accumulated in float32."""

    def capture(self, launches: Callable[[], None]) -> Replay:
        """Record the launches of a function, without running them."""

    def enter_thread(self) -> None:
        """Make the device the current one of this thread."""

    def prepare(self) -> None:
        """Compile every source that is not yet compiled."""

    def timer(self, delay_s: float = 0.0) -> Timer:
        """A timer whose first mark is now, or behind a delay in which launches can queue up."""

    def synchronize(self) -> None:
        """Wait for all work."""
