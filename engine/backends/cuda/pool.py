"""Device memory from CuPy's pool, and the cap on it that a user may set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.backends.cuda.device import CudaError, Memory

# Bytes that the driver takes of a capped device for the context and the kernels of a process, and
# to round allocations up. It tells no process its own share; an H200's was 796 MiB with libraries.
CONTEXT_BYTES = 704 << 20
_MIB, _ROUND = 1 << 20, 512  # The latter is what CuPy rounds sizes to.


@dataclass
class CupyMemory:
    """Memory of the device or the host that CuPy takes back when nothing refers to it any more."""

    _held: Any
    address: int
    nbytes: int


class DevicePool:
    """Allocates the memory of a device through CuPy's default pool.

    cap_mib: MiB that the process may take, CONTEXT_BYTES and what the pool holds unused included,
    as if the device had no more; None: all. `total_bytes`: the memory in all, or the cap. Raises
    CudaError for a cap that the device does not have, or that leaves nothing beside the context.
    """

    def __init__(self, cupy: Any, name: str, cap_mib: int | None = None) -> None:
        self._cupy, self._name = cupy, name
        self._pool = cupy.get_default_memory_pool()
        _, total = cupy.cuda.runtime.memGetInfo()
        self.total_bytes = int(total)
        self._most: int | None = None
        if cap_mib is not None:
            least = CONTEXT_BYTES // _MIB + 1
            if not least <= cap_mib <= total // _MIB:
                raise CudaError(
                    f"gpu_memory (--gpu-memory): expected {least} to {total // _MIB} MiB "
                    f"({name}), got {cap_mib}"
                )
            self.total_bytes = cap_mib * _MIB
            self._most = self.total_bytes - CONTEXT_BYTES

    def free_bytes(self) -> int:
        """The driver's free memory and what the pool holds unused, but no more than the cap leaves.
        Memory that other users of the pool hold is taken from the cap, too."""
        free, _ = self._cupy.cuda.runtime.memGetInfo()
        left = int(free) + int(self._pool.free_bytes())
        if self._most is None:
            return left
        return max(0, min(left, self._most - int(self._pool.used_bytes())))

    def allocate(self, n_bytes: int) -> Memory:
        """See Device.allocate."""
        if self._most is not None:
            needed = -(-max(n_bytes, 1) // _ROUND) * _ROUND
            if self._pool.used_bytes() + needed > self._most:
                raise self._refusal(n_bytes)
            if self._pool.total_bytes() + needed > self._most:
                self._pool.free_all_blocks()
        try:
            memory = self._cupy.cuda.alloc(max(n_bytes, 1))
        except self._cupy.cuda.memory.OutOfMemoryError:
            raise self._refusal(n_bytes) from None
        return CupyMemory(memory, int(memory.ptr), n_bytes)

    def _refusal(self, n_bytes: int) -> CudaError:
        cap = "" if self._most is None else f" of --gpu-memory {self.total_bytes // _MIB}"
        return CudaError(
            f"{self._name}: expected {n_bytes / _MIB:.0f} MiB of memory, "
            f"{self.free_bytes() / _MIB:.0f} MiB are free{cap}"
        )
