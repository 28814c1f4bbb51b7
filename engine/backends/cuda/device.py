"""What the CUDA backend needs of a device.

Everything above this file deals in addresses, launches and captured graphs, so that tests can put a
device of their own, without a GPU, in place of `CupyDevice`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from engine.backends.base import Array
from engine.errors import EngineError

Grid = tuple[int, int, int]


class CudaError(EngineError):
    """No usable GPU or CuPy, or a call that failed."""


class Memory(Protocol):
    """Bytes of device memory; given back when nothing refers to it any more."""

    @property
    def address(self) -> int:
        """Where it begins."""

    @property
    def nbytes(self) -> int:
        """Its size."""


@dataclass(frozen=True)
class Gemm:
    """out [m, n] f32 = a [m, k] · b [n, k]ᵀ, both bfloat16, row-major without gaps."""

    out: int
    a: int
    b: int
    m: int
    n: int
    k: int
    accumulate: bool = False


class Captured(Protocol):
    """Launches that were recorded; the device keeps what they need."""

    def replay(self) -> None:
        """Run them again, in the device's order of work."""


class Fetched(Protocol):
    """Bytes on their way to the host."""

    def values(self) -> Array:
        """Waits for them, but not for later work; uint8."""


class Timer(Protocol):
    """Marks in the device's order of work."""

    def mark(self) -> None:
        """The end of what was launched since the mark before."""

    def seconds(self) -> list[float]:
        """Waits; the seconds between neighbouring marks."""


class Device(Protocol):
    """One device, whose work is done in the order in which it is asked for."""

    name: str
    detail: str
    capability: tuple[int, int]
    n_multiprocessors: int
    shared_bytes: int

    def free_bytes(self) -> int:
        """Memory that can be allocated."""

    def allocate(self, n_bytes: int) -> Memory:
        """Memory aligned to 256 bytes, of arbitrary contents; raises CudaError if there is none."""

    def upload(self, address: int, values: Array) -> None:
        """Copy to the device; `values` may be changed when this returns."""

    def download(self, address: int, values: Array) -> None:
        """Wait for all work and copy to `values`, which lies without gaps."""

    def fetch(self, address: int, n_bytes: int) -> Fetched:
        """Copy to the host what lies there when the work so far is done, without waiting for it.

        For few bytes; they may be asked for until three more were fetched.
        """

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

    def capture(self, launches: Callable[[], None]) -> Captured:
        """Record what `launches` launches, without running it."""

    def prepare(self) -> None:
        """Compile what isn't compiled yet."""

    def timer(self, delay_s: float = 0.0) -> Timer:
        """A timer whose first mark is now, or comes after a delay in which launches queue up."""

    def synchronize(self) -> None:
        """Wait for all work."""
