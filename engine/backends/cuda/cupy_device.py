"""A GPU through CuPy: memory, copies, launches, cuBLAS and captured graphs on one stream.

Copies from and to the host go through pinned memory, so that the host can go on meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import re
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from engine import threads
from engine.backends.base import Array
from engine.backends.cuda import nvrtc
from engine.backends.cuda.args import ARGS
from engine.backends.cuda.device import CudaError, Fetched, Gemm, Grid, Memory, Replay, Timer
from engine.backends.cuda.driver import Launcher, find_gpu
from engine.backends.cuda.pool import CupyMemory, DevicePool

MIN_CAPABILITY = (8, 0)


class CupyDevice:
    """A GPU through CuPy; all work is on one stream of its own. memory_mib: see DevicePool."""

    def __init__(self, index: int = 0, memory_mib: int | None = None) -> None:
        self._cupy = cupy = _cupy(index)
        self._runtime = cupy.cuda.runtime
        self._device = cupy.cuda.Device(index)
        self._device.use()
        self.capability = _capability(self._device)
        attributes = self._device.attributes
        self.n_multiprocessors = int(attributes["MultiProcessorCount"])
        self.shared_bytes = int(attributes["MaxSharedMemoryPerBlockOptin"])
        self._allowed: dict[str, int] = {}
        self.name = self._runtime.getDeviceProperties(index)["name"].decode()
        self.detail = f"{self.name}, {self.target}"
        self._pool = DevicePool(cupy, self.name, memory_mib)
        self.total_bytes = self._pool.total_bytes
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._launcher = Launcher(self.stream.ptr, overlap=self.capability >= (9, 0))
        self._errors = (cupy.cuda.driver.CUDADriverError, self._runtime.CUDARuntimeError)
        self._modules: dict[str, Any] = {}
        self._blas: _Blas | None = None
        small, large, back = (8, 256 << 10), (2, 32 << 20), (4, 4 << 10)
        self._small, self._large, self._back = (
            StagingRing(cupy.cuda, self.wait, *sizes) for sizes in (small, large, back)
        )

    @property
    def target(self) -> str:
        """The architecture that kernels are compiled for."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if self.capability == (9, 0) else ''}"

    def free_bytes(self) -> int:
        return self._pool.free_bytes()

    def allocate(self, n_bytes: int) -> Memory:
        return self._pool.allocate(n_bytes)

    def allocate_host(self, n_bytes: int) -> Memory:
        try:
            memory = self._cupy.cuda.alloc_pinned_memory(n_bytes)
        except self._errors as error:
            raise CudaError(f"{n_bytes >> 20} MiB of pinned memory: {error}") from None
        return CupyMemory(memory, int(memory.ptr), n_bytes)

    def upload(self, address: int, values: Array) -> None:
        """Through pinned memory: waits only until `values` are copied there."""
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        pinned = self._small if len(data) <= self._small.size else self._large
        for begin in range(0, len(data), pinned.size):
            part = data[begin : begin + pinned.size]
            buffer = pinned.next()
            buffer.data[: len(part)] = part
            self._copy_async(address + begin, buffer.address, len(part), to_device=True)
            buffer.event.record(self.stream)

    def _copy_async(self, target: int, source: int, n_bytes: int, to_device: bool) -> None:
        runtime = self._runtime
        kind = runtime.memcpyHostToDevice if to_device else runtime.memcpyDeviceToHost
        try:
            runtime.memcpyAsync(target, source, n_bytes, kind, self.stream.ptr)
        except self._errors as error:
            raise CudaError(f"CUDA: {error}") from None

    def download(self, address: int, values: Array) -> None:
        self._copy_async(values.ctypes.data, address, values.nbytes, to_device=False)
        self.synchronize()

    def fetch(self, spans: Sequence[tuple[int, int]]) -> Fetched:
        n_bytes = sum(n for _, n in spans)
        if n_bytes > self._back.size:
            self._back = StagingRing(self._cupy.cuda, self.wait, 4, 1 << (n_bytes - 1).bit_length())
        buffer, at = self._back.next(), 0
        for address, n in spans:
            self._copy_async(buffer.address + at, address, n, to_device=False)
            at += n
        buffer.event.record(self.stream)

        def values() -> Array:
            self.wait(buffer.event)
            return buffer.data[:n_bytes].copy()

        return values

    def mark(self) -> Callable[[], bool]:
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(self.stream)
        return lambda: bool(event.done)

    def fill(self, address: int, n_bytes: int, byte: int) -> None:
        self._runtime.memsetAsync(address, byte, n_bytes, self.stream.ptr)

    def copy(self, target: int, source: int, n_bytes: int) -> None:
        kind = self._runtime.memcpyDeviceToDevice
        self._runtime.memcpyAsync(target, source, n_bytes, kind, self.stream.ptr)

    def function(self, source: str, name: str, shared_bytes: int = 0) -> int:
        if source not in self._modules:
            code = nvrtc.cached(source, self.target) or nvrtc.compile_and_keep(source, self.target)
            self._modules[source] = self._cupy.cuda.function.Module()
            self._modules[source].load(code)
        function = self._modules[source].get_function(name)
        driver = self._cupy.cuda.driver
        # A later launch must not lower the limit.
        if shared_bytes > self._allowed.get(name, 48 << 10):
            limit = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.funcSetAttribute(function.ptr, limit, shared_bytes)
            self._allowed[name] = shared_bytes
        return int(function.ptr)

    def enter_thread(self) -> None:
        self._device.use()

    def prepare(self) -> None:
        missing = [n for n in nvrtc.sources() if nvrtc.cached(n, self.target) is None]
        if not missing:
            return
        n_threads = min(len(missing), os.cpu_count() or 1)
        with threads.pool("threads that compile kernels", n_threads) as pool:
            done = pool.map(lambda n: nvrtc.compile_and_keep(n, self.target), missing)
            title = f"compiling CUDA kernels for {self.target}, once"
            list(tqdm(done, total=len(missing), desc=title, leave=False, disable=None))

    def launch(self, function: int, grid: Grid, threads: int, shared: int, params: int) -> None:
        if reason := self._launcher.launch(function, grid, threads, shared, params):
            raise CudaError(f"CUDA: {reason}")

    def gemm(self, product: Gemm) -> None:
        """cuBLAS, called directly: CuPy's wrapper refuses captured streams."""
        self._blas = self._blas or _Blas(self)
        self._blas.gemm(product)

    def capture(self, launches: Callable[[], None]) -> Replay:
        self._blas = self._blas or _Blas(self)
        self.stream.begin_capture()
        try:
            launches()
        finally:
            graph = self.stream.end_capture()
        graph.upload(self.stream)
        return partial(graph.launch, self.stream)

    def timer(self, delay_s: float = 0.0) -> Timer:
        if delay_s:
            args = np.zeros(1, ARGS)
            args["attr"][0, 0] = delay_s * 1e9
            self.launch(self.function("delay", "delay"), (1, 1, 1), 1, 0, args.ctypes.data)
        return _EventTimer(self)

    def synchronize(self) -> None:
        """Wait for the stream; raises CudaError for work that failed on it."""
        self.wait(self.stream)

    def wait(self, what: Any) -> None:
        """Wait for the stream or an event; raises CudaError for work that failed."""
        try:
            what.synchronize()
        except self._errors as error:
            raise CudaError(
                f"CUDA: {error}, in a launch since the device was last waited for (--check waits "
                "after every node and names it)"
            ) from None


@dataclass(frozen=True)
class StagingBuffer:
    """A buffer of a ring; `event` is recorded after its copy."""

    data: NDArray[np.uint8]
    address: int
    event: Any
    held: Any


class StagingRing:
    """`n` buffers of `size` bytes, allocated at their first use and reused in order. cuda: CuPy's
    module; wait(event): waits for one."""

    def __init__(self, cuda: Any, wait: Callable[[Any], None], n: int, size: int) -> None:
        self._cuda, self._wait, self._n, self.size = cuda, wait, n, size
        self._buffers: deque[StagingBuffer] = deque()

    def next(self) -> StagingBuffer:
        """The least recently used buffer; waits for its copy."""
        if len(self._buffers) < self._n:
            held = self._cuda.alloc_pinned_memory(self.size)
            data = np.frombuffer(held, np.uint8, self.size)
            event = self._cuda.Event(disable_timing=True)
            buffer = StagingBuffer(data, int(held.ptr), event, held)
        else:
            buffer = self._buffers.popleft()
            self._wait(buffer.event)
        self._buffers.append(buffer)
        return buffer


class _EventTimer:
    def __init__(self, device: CupyDevice) -> None:
        self._cupy, self._stream = device._cupy, device.stream
        self._events: list[Any] = []
        self.mark()

    def mark(self) -> None:
        self._events.append(self._cupy.cuda.Event())
        self._events[-1].record(self._stream)

    def seconds(self) -> list[float]:
        self._events[-1].synchronize()
        elapsed = self._cupy.cuda.get_elapsed_time
        return [elapsed(a, b) / 1e3 for a, b in pairwise(self._events)]


class _Blas:
    """A cuBLAS handle with a workspace, which captured products need. CuPy's own handle would
    belong to the device, and the stream, that were created last."""

    # What cuBLAS documents for Hopper.
    _WORKSPACE = 32 << 20
    _BF16, _F32, _COMPUTE_F32, _TRANSPOSE, _PLAIN, _DEFAULT = 14, 0, 68, 1, 0, -1

    def __init__(self, device: CupyDevice) -> None:
        device._cupy.cuda.get_cublas_handle()  # Loads the library.
        self._lib, handle = _cublas(), ctypes.c_void_p()
        _check(self._lib.cublasCreate_v2(ctypes.byref(handle)))
        weakref.finalize(self, self._lib.cublasDestroy_v2, handle).atexit = False
        self._handle, self._workspace = handle, device.allocate(self._WORKSPACE)
        _check(self._lib.cublasSetStream_v2(handle, ctypes.c_void_p(device.stream.ptr)))
        address, size = ctypes.c_void_p(self._workspace.address), ctypes.c_size_t(self._WORKSPACE)
        _check(self._lib.cublasSetWorkspace_v2(handle, address, size))
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)

    def gemm(self, p: Gemm) -> None:
        # By columns, as cuBLAS counts: outᵀ [n, m] = b [n, k] · aᵀ [k, m].
        pointer, one = ctypes.c_void_p, ctypes.byref(self._one)
        _check(self._lib.cublasGemmEx(
            self._handle, self._TRANSPOSE, self._PLAIN, p.n, p.m, p.k, one,
            pointer(p.b), self._BF16, p.k, pointer(p.a), self._BF16, p.k, ctypes.byref(self._zero),
            pointer(p.out), self._F32, p.n, self._COMPUTE_F32, self._DEFAULT,
        ))  # fmt: skip


def _check(status: int) -> None:
    if status:
        raise CudaError(f"cuBLAS: status {status}")


def _cublas() -> ctypes.CDLL:
    """The library that CuPy has loaded."""
    with open("/proc/self/maps") as maps:
        loaded = re.findall(r"(/\S*libcublas\.so\S*)", maps.read())
    for name in (*dict.fromkeys(loaded), "libcublas.so.13", "libcublas.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError("cuBLAS: expected libcublas.so beside CuPy, found none")


def _cupy(index: int) -> Any:
    """CuPy; raises CudaError where it, or a GPU, is missing, or does not work with the driver."""
    _, why = find_gpu()
    if why:
        raise CudaError(f"backend cuda: expected an NVIDIA GPU, got: {why}")
    try:
        import cupy
    except ImportError as error:
        raise CudaError(
            f"backend cuda: expected CuPy, got: {error}; pip install '.[cuda13]', or cuda12 for a "
            "driver of CUDA 12"
        ) from None
    runtime = cupy.cuda.runtime
    try:
        n_devices = int(runtime.getDeviceCount())
    except runtime.CUDARuntimeError as error:
        raise CudaError(f"backend cuda: expected a GPU, got: {_reason(error, runtime)}") from None
    if index >= n_devices:
        raise CudaError(f"backend cuda: expected GPU {index}, found {n_devices}")
    return cupy


def _reason(error: Exception, runtime: Any) -> str:
    """CUDA's message; for a driver that is too old, with both versions."""
    text = str(error).split(": ", 1)[-1]
    if "insufficient" not in text:
        return text
    versions = (runtime.driverGetVersion(), runtime.runtimeGetVersion())
    driver, built = (f"{v // 1000}.{v % 1000 // 10}" for v in versions)
    return f"a driver for CUDA {driver}, where CuPy needs {built}: update it, or take cuda12"


def _capability(device: Any) -> tuple[int, int]:
    digits = str(device.compute_capability)
    major, minor = int(digits[:-1]), int(digits[-1])
    if (major, minor) < MIN_CAPABILITY:
        least = "{}.{}".format(*MIN_CAPABILITY)
        raise CudaError(f"backend cuda: expected compute capability {least}, got {major}.{minor}")
    return major, minor


def missing() -> str:
    """Why no GPU can be used, in one line; an empty string if one can. Asks the driver first:
    importing CuPy takes a second."""
    _, why = find_gpu()
    if why:
        return why
    try:
        _capability(_cupy(0).cuda.Device(0))
    except CudaError as error:
        return str(error).removeprefix("backend cuda: ")
    return ""
