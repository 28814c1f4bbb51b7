"""The cap on a GPU's memory, on a model of CuPy's pool and of the driver below it."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.backends.cuda.device import CudaError
from engine.backends.cuda.pool import CONTEXT_BYTES, DevicePool

MIB = 1 << 20
CARD = 8192 * MIB


class Exhausted(Exception):
    """CuPy's OutOfMemoryError."""


class Chunk:
    """CuPy's MemoryPointer."""

    ptr = 0x1000


class Cupy:
    """The parts of CuPy that DevicePool uses. Chunks that are freed stay in the pool; one is used
    again, whole, for a size that it fits best. `others`: bytes that other processes hold."""

    def __init__(self, total: int = CARD) -> None:
        self.total, self.others = total, 300 * MIB
        self.cached: list[int] = []
        self.used: list[int] = []
        self.most = 0
        self.cuda = SimpleNamespace(
            alloc=self.alloc, runtime=SimpleNamespace(memGetInfo=self.mem_get_info),
            memory=SimpleNamespace(OutOfMemoryError=Exhausted),
        )  # fmt: skip

    def mem_get_info(self) -> tuple[int, int]:
        return self.total - self.others - self.total_bytes(), self.total

    def get_default_memory_pool(self) -> Cupy:
        return self

    def free_bytes(self) -> int:
        return sum(self.cached)

    def used_bytes(self) -> int:
        return sum(self.used)

    def total_bytes(self) -> int:
        return sum(self.cached) + sum(self.used)

    def free_all_blocks(self) -> None:
        self.cached.clear()

    def alloc(self, n_bytes: int) -> Any:
        size = -(-n_bytes // 512) * 512
        fitting = [n for n in self.cached if size <= n < 2 * size]
        if fitting:
            size = min(fitting)
            self.cached.remove(size)
        elif size > self.mem_get_info()[0]:
            self.cached.clear()
            if size > self.mem_get_info()[0]:
                raise Exhausted
        self.used.append(size)
        self.most = max(self.most, self.total_bytes())
        chunk = Chunk()
        weakref.finalize(chunk, self._free, size)
        return chunk

    def _free(self, size: int) -> None:
        self.used.remove(size)
        self.cached.append(size)


def test_without_a_cap_all_of_the_card_is_there() -> None:
    cupy = Cupy()
    pool = DevicePool(cupy, "card")
    assert pool.total_bytes == CARD
    assert pool.free_bytes() == CARD - 300 * MIB
    memory = pool.allocate(1000 * MIB)
    assert pool.free_bytes() == CARD - 1300 * MIB
    del memory
    assert pool.free_bytes() == CARD - 300 * MIB
    with pytest.raises(CudaError, match=r"^card: expected 9000 MiB of memory, 7892 MiB are free$"):
        pool.allocate(9000 * MIB)


def test_a_cap_counts_what_the_process_has_and_not_what_others_have() -> None:
    cupy = Cupy()
    cap, context = 2048, CONTEXT_BYTES // MIB
    pool = DevicePool(cupy, "card", cap)
    assert pool.total_bytes == cap * MIB
    assert pool.free_bytes() == (cap - context) * MIB
    cupy.others = 3000 * MIB
    first = pool.allocate(500 * MIB)
    assert pool.free_bytes() == (cap - context - 500) * MIB
    cupy.others = CARD - 600 * MIB  # Less is left of the card than of the cap.
    assert pool.free_bytes() == 100 * MIB
    del first
    assert pool.free_bytes() == 600 * MIB
    cupy.others = 0
    line = f"^card: expected 1600 MiB of memory, {cap - context} MiB are free of --gpu-memory 2048$"
    with pytest.raises(CudaError, match=line):
        pool.allocate(1600 * MIB)


def test_no_order_of_allocations_takes_more_than_the_cap(rng: np.random.Generator) -> None:
    """What the pool keeps of freed memory included; and all that is said to be free can be had."""
    cupy, cap = Cupy(), int(rng.integers(900, 4000))
    pool, most = DevicePool(cupy, "card", cap), cap * MIB - CONTEXT_BYTES
    held: list[Any] = []
    n_refused = 0
    for _ in range(500):
        if held and rng.random() < 0.45:
            held.pop(int(rng.integers(len(held))))
        n_bytes = int(rng.integers(1, most // 3))
        rounded = -(-n_bytes // 512) * 512
        if rounded <= most - sum(cupy.used):
            held.append(pool.allocate(n_bytes))
        else:
            n_refused += 1
            with pytest.raises(CudaError, match="are free of --gpu-memory"):
                pool.allocate(n_bytes)
        assert cupy.most <= most
    assert n_refused
    held.clear()
    gc.collect()
    assert pool.free_bytes() == most
    held.append(pool.allocate(most))
    assert pool.free_bytes() == 0


@pytest.mark.parametrize("cap", [1, CONTEXT_BYTES // MIB, CARD // MIB + 1])
def test_a_cap_that_the_card_can_not_have_is_refused(cap: int) -> None:
    least = CONTEXT_BYTES // MIB + 1
    line = rf"^gpu_memory \(--gpu-memory\): expected {least} to 8192 MiB \(card\), got {cap}$"
    with pytest.raises(CudaError, match=line):
        DevicePool(Cupy(), "card", cap)
