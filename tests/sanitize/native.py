"""Tests with the CPU libraries of another folder: `pytest --native-dir`.

With AddressSanitizer in the process, what the backend cuts out of large pieces of memory, packed
weights and activations, gets bounds that it knows: else a kernel could write from one into another.
"""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from engine.backends.cpu import weights as cpu_weights
from engine.backends.cpu.backend import CpuProgram
from engine.backends.native import library as cpu_library
from engine.backends.native import program as native_program
from engine.backends.native.buffers import ALIGNMENT, Arena

Array = NDArray[Any]
# Numpy keeps freed arrays below this size for others, which would find forbidden bytes in them.
_NUMPY_CACHED = 1024


def use(directory: Path) -> None:
    """Take the libraries of a folder, and of them those that this machine can run."""
    paths = {isa: directory / f"libgdn_cpu_{isa}.so" for isa in cpu_library.ISAS}
    found = {isa: path for isa, path in paths.items() if path.exists()}
    if not found:
        raise ValueError(f"--native-dir {directory}: expected CPU libraries, found none")
    cpu_library.load.cache_clear()
    cpu_library._library.cache_clear()
    patch.object(cpu_library, "built", lambda: found).start()
    if hasattr(ctypes.CDLL(None), "__asan_poison_memory_region"):
        _give_bounds()


class GuardedArena(Arena):
    """Buffers that share nothing, each with a gap behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps: list[tuple[int, int]] = []

    def plan(self, buffers: Any) -> None:
        """Place buffers one after the other."""
        for key, n_bytes, _, _ in buffers:
            end = self.size + n_bytes
            self.offsets[key] = self.size
            self.size = -(-end // ALIGNMENT) * ALIGNMENT + ALIGNMENT
            self.gaps.append((end, self.size))
        self.size += _NUMPY_CACHED


def _give_bounds() -> None:
    libc = ctypes.CDLL(None)
    poison, allocate, free = libc.__asan_poison_memory_region, libc.memalign, libc.free
    poison.argtypes = allocate.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    allocate.restype, free.argtypes = ctypes.c_size_t, [ctypes.c_size_t]
    arenas: list[GuardedArena] = []
    allocate_arena = CpuProgram._allocate

    def make_arena() -> GuardedArena:
        arenas.append(GuardedArena())
        return arenas[-1]

    def allocate_guarded(program: CpuProgram, n_bytes: int) -> int:
        base = allocate_arena(program, n_bytes)
        for begin, end in arenas.pop().gaps:
            poison(base + begin, end - begin)
        return base

    def take(memory: object, n_bytes: int) -> Array:
        address = allocate(ALIGNMENT, n_bytes)
        buffer = (ctypes.c_uint8 * n_bytes).from_address(address)
        weakref.finalize(buffer, free, address)
        return np.ctypeslib.as_array(buffer)

    # They stay as long as the process.
    patch.object(native_program, "Arena", make_arena).start()
    patch.object(CpuProgram, "_allocate", allocate_guarded).start()
    patch.object(cpu_weights._Memory, "take", take).start()
