"""A CUDA device without a GPU: the kernels run on the host, see runtime.cpp.

Device memory is this process's memory, NaN when it is allocated, with guard zones around each
allocation that are looked at whenever the device is waited for. What a GPU would refuse, or would
do to memory that isn't its own, raises CudaError.
"""

from __future__ import annotations

import ctypes
import functools
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.cuda import nvrtc
from engine.backends.cuda.device import CudaError, Fetched, Gemm, Grid, Replay
from tests.support.cuda_emulator import build

Array = NDArray[Any]
_ALIGNMENT, _GUARD = 256, 256
_POISON, _GUARD_BYTE = 0xFF, 0xFE
_MAX_GRID = (2**31 - 1, 65535, 65535)
_DEFAULT_SHARED = 48 << 10


def missing() -> str:
    """Why kernels can't run here; an empty string if they can."""
    return "" if build.compiler() else "no C++ compiler"


@functools.cache
def _runtime() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(build.runtime()), ctypes.RTLD_GLOBAL)
    lib.emulator_launch.restype = ctypes.c_char_p
    lib.emulator_launch.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_uint * 3),
        ctypes.c_uint,
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_bool,
    ]
    return lib


@functools.cache
def _sources(directory: Path) -> dict[str, Callable[[], Path]]:
    return build.kernels(directory)


@functools.cache
def _library(directory: Path, source: str) -> ctypes.CDLL:
    _runtime()
    return ctypes.CDLL(str(_sources(directory)[source]()))


class EmulatedMemory:
    """An allocation with its guard zones."""

    def __init__(self, device: EmulatedDevice, n_bytes: int) -> None:
        self._device, self.nbytes = device, n_bytes
        self._bytes = np.full(n_bytes + 2 * _GUARD + _ALIGNMENT, _GUARD_BYTE, np.uint8)
        begin = self._bytes.ctypes.data + _GUARD
        self.address = -(-begin // _ALIGNMENT) * _ALIGNMENT
        self._first = self.address - self._bytes.ctypes.data
        self._bytes[self._first : self._first + n_bytes] = _POISON

    def __del__(self) -> None:
        self._device._free(self)

    def bytes(self) -> bytes:
        """A copy of what it holds."""
        return self._bytes.tobytes()

    def check(self) -> None:
        """Raise CudaError if something wrote outside; once for each mistake."""
        end = self._first + self.nbytes
        for zone, begin in ((self._bytes[: self._first], 0), (self._bytes[end:], end)):
            (changed,) = np.nonzero(zone != _GUARD_BYTE)
            if len(changed):
                at = begin + int(changed[0]) - self._first
                zone[:] = _GUARD_BYTE
                raise CudaError(f"emulated: a write at byte {at} of {self.nbytes}")


@dataclass(frozen=True)
class _Function:
    """A kernel and what it may be launched with."""

    name: str
    address: int
    max_threads: int
    max_shared: int


class EmulatedDevice:
    """See Device. `n_bytes`: how much memory it has; `directory`: where its kernels' sources are;
    `seed`: of the order in which blocks and threads run; `rehearsed`: kernels whose rehearsals are
    run by themselves before each launch, and may write nothing."""

    name = "emulated"
    n_multiprocessors = 4
    shared_bytes = 227 << 10

    def __init__(
        self,
        n_bytes: int = 1 << 30,
        capability: tuple[int, int] = (9, 0),
        directory: Path = nvrtc.SOURCES,
        seed: int = 0,
        rehearsed: frozenset[str] = frozenset(),
    ) -> None:
        self.total_bytes = self._n_free = n_bytes
        self.capability, self._seed = capability, seed
        self.detail = "emulated, sm_{}{}".format(*capability)
        self._directory, self._rehearsed = directory, rehearsed
        self._functions: list[_Function] = []
        self._memory: dict[int, weakref.ref[EmulatedMemory]] = {}
        self._damaged: CudaError | None = None
        self._recording: list[Callable[[], None]] | None = None
        self.n_launches = 0

    def free_bytes(self) -> int:
        """What is left of `n_bytes`."""
        return self._n_free

    def allocate(self, n_bytes: int) -> EmulatedMemory:
        """Memory that is NaN in every float type."""
        self._refuse_captured("allocate")
        if n_bytes > self._n_free:
            raise CudaError(f"emulated: expected {n_bytes} bytes, {self._n_free} are free")
        self._n_free -= n_bytes
        memory = EmulatedMemory(self, n_bytes)
        self._memory[memory.address] = weakref.ref(memory)
        return memory

    def allocate_host(self, n_bytes: int) -> EmulatedMemory:
        """All memory is the host's."""
        return self.allocate(n_bytes)

    def _free(self, memory: EmulatedMemory) -> None:
        self._n_free += memory.nbytes
        self._memory.pop(memory.address, None)
        try:
            memory.check()
        except CudaError as error:
            # Shown at the next synchronization: this is called from __del__.
            self._damaged = error

    def upload(self, address: int, values: Array) -> None:
        """Copy to the device."""
        self._refuse_captured("upload")
        values = np.ascontiguousarray(values)
        self._expect_owned(address, values.nbytes)
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def download(self, address: int, values: Array) -> None:
        """Copy from the device."""
        assert values.flags.c_contiguous
        self.synchronize()
        self._expect_owned(address, values.nbytes)
        ctypes.memmove(values.ctypes.data, address, values.nbytes)

    def fetch(self, spans: Sequence[tuple[int, int]]) -> Fetched:
        """Copy from the device."""
        self._refuse_captured("fetch")
        for address, n_bytes in spans:
            self._expect_owned(address, n_bytes)
        values = np.concatenate([_at(address, n_bytes) for address, n_bytes in spans])
        return lambda: values

    def mark(self) -> Callable[[], bool]:
        """Work is done at once."""
        return lambda: True

    def fill(self, address: int, n_bytes: int, byte: int) -> None:
        """Set bytes."""
        self._expect_owned(address, n_bytes)
        self._do(lambda: ctypes.memset(address, byte, n_bytes))

    def copy(self, target: int, source: int, n_bytes: int) -> None:
        """Copy within the device."""
        self._expect_owned(target, n_bytes)
        self._expect_owned(source, n_bytes)
        self._do(lambda: ctypes.memmove(target, source, n_bytes))

    def function(self, source: str, name: str, shared_bytes: int = 0) -> int:
        """A kernel; all sources are compiled at the first call for one of them."""
        library = _library(self._directory, source)
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        assert address is not None
        max_threads = ctypes.c_int32.in_dll(library, f"{name}_threads").value
        if shared_bytes > self.shared_bytes:
            raise CudaError(f"{name}: {shared_bytes} bytes of shared memory")
        max_shared = max(shared_bytes, _DEFAULT_SHARED)
        self._functions.append(_Function(name, address, max_threads, max_shared))
        return len(self._functions)

    def launch(self, function: int, grid: Grid, threads: int, shared: int, params: int) -> None:
        """Run a kernel, or record it with a copy of its parameter, as a GPU's driver would."""
        kernel = self._functions[function - 1]
        sizes_fit = all(1 <= n <= most for n, most in zip(grid, _MAX_GRID, strict=True))
        if not (sizes_fit and 1 <= threads <= kernel.max_threads and shared <= kernel.max_shared):
            raise CudaError(
                f"{kernel.name}: invalid launch: grid {grid}, {threads} threads of "
                f"{kernel.max_threads}, {shared} bytes of shared memory of {kernel.max_shared}"
            )
        copied = ctypes.create_string_buffer(ctypes.string_at(params, _args_bytes()))
        self._do(lambda: self._run(kernel, grid, threads, shared, copied))

    def _run(self, kernel: _Function, grid: Grid, threads: int, shared: int, args: Any) -> None:
        self.n_launches += 1
        self._seed += 1
        sizes = (ctypes.c_uint * 3)(*grid)

        def run(is_rehearsal: bool) -> None:
            launch = _runtime().emulator_launch
            given = kernel.address, ctypes.byref(sizes), threads, shared, args, self._seed
            if error := launch(*given, is_rehearsal):
                raise CudaError(f"{kernel.name}: {error.decode()}")

        if kernel.name in self._rehearsed:
            held = [m for m in (ref() for ref in self._memory.values()) if m]
            before = [m.bytes() for m in held]
            run(True)
            if any(m.bytes() != values for m, values in zip(held, before, strict=True)):
                raise CudaError(f"{kernel.name}: a rehearsal writes")
        run(False)

    def gemm(self, product: Gemm) -> None:
        """A product of bfloat16 values, summed in float32."""
        p = product
        sizes = ((p.a, 2 * p.m * p.k), (p.b, 2 * p.n * p.k), (p.out, 4 * p.m * p.n))
        for address, n_bytes in sizes:
            self._expect_owned(address, n_bytes)
            if address % 16:
                raise CudaError(f"gemm: {address:#x} is not aligned to 16 bytes")

        def multiply() -> None:
            a, b = _bf16(p.a, p.m, p.k), _bf16(p.b, p.n, p.k)
            out = _at(p.out, 4 * p.m * p.n).view(np.float32).reshape(p.m, p.n)
            with np.errstate(all="ignore"):
                values = a @ b.T
            out[:] = values

        self._do(multiply)

    def capture(self, launches: Callable[[], None]) -> Replay:
        """Record launches; memory may not be allocated, nor the device waited for, meanwhile."""
        self._refuse_captured("capture")
        self._recording = []
        try:
            launches()
        finally:
            recorded, self._recording = self._recording, None

        def replay() -> None:
            for work in recorded:
                work()

        return replay

    def _do(self, work: Callable[[], Any]) -> None:
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def enter_thread(self) -> None:
        """Any thread may use it."""

    def prepare(self) -> None:
        """Each source is compiled when it is first used."""

    def timer(self, delay_s: float = 0.0) -> EmulatedTimer:
        """A timer of the host's clock."""
        return EmulatedTimer()

    def synchronize(self) -> None:
        """Work is done when it is asked for; looks at the guard zones."""
        self._refuse_captured("synchronize")
        if self._damaged is not None:
            error, self._damaged = self._damaged, None
            raise error
        for memory in self._held():
            memory.check()

    def _held(self) -> Iterator[EmulatedMemory]:
        for reference in list(self._memory.values()):
            if (memory := reference()) is not None:
                yield memory

    def _refuse_captured(self, what: str) -> None:
        if self._recording is not None:
            raise CudaError(f"{what}: not permitted while launches are captured")

    def _expect_owned(self, address: int, n_bytes: int) -> None:
        """Raise CudaError unless bytes lie within one allocation."""
        starts = sorted(self._memory)
        i = bisect_right(starts, address) - 1
        memory = self._memory[starts[i]]() if i >= 0 else None
        if n_bytes and (memory is None or address + n_bytes > memory.address + memory.nbytes):
            raise CudaError(f"emulated: {n_bytes} bytes at {address:#x}: not the device's memory")


class EmulatedTimer:
    """Marks by the host's clock."""

    def __init__(self) -> None:
        self._marks = [time.perf_counter()]

    def mark(self) -> None:
        """The end of what was launched since the mark before."""
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """The seconds between neighbouring marks."""
        return [b - a for a, b in pairwise(self._marks)]


@functools.cache
def _args_bytes() -> int:
    return ctypes.c_uint64.in_dll(_runtime(), "emulator_args_bytes").value


def _at(address: int, n_bytes: int) -> Array:
    memory: Any = (ctypes.c_uint8 * n_bytes).from_address(address)
    return np.frombuffer(memory, np.uint8)


def _bf16(address: int, *shape: int) -> Array:
    halves = _at(address, 2 * int(np.prod(shape))).view(np.uint16).astype(np.uint32)
    return (halves << 16).view(np.float32).reshape(shape)
