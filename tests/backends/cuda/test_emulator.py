"""The emulated CUDA device: its primitives against numpy, and that it finds what is not allowed."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backends.cuda.device import CudaError, Gemm
from tests.support.cuda_emulator import device as emulated
from tests.support.cuda_emulator.device import EmulatedDevice
from tests.support.cuda_emulator.launching import launch

KERNELS = Path(emulated.__file__).parent / "kernels"
pytestmark = pytest.mark.skipif(bool(emulated.missing()), reason=emulated.missing())


@pytest.fixture
def device() -> EmulatedDevice:
    rehearsed = frozenset({"rehearsal_that_writes"})
    return EmulatedDevice(directory=KERNELS, rehearsed=rehearsed)


def bf16(x: np.ndarray) -> np.ndarray:
    """The high halves of float32 values that have nothing in the low ones."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def test_warp_primitives(device: EmulatedDevice, rng: np.random.Generator) -> None:
    x = rng.normal(size=64).astype(np.float32)
    out = np.zeros((8, 64), np.float32)
    launch(device, "primitives", "warps", [out, x[np.newaxis].copy()], threads=64)
    for w in (slice(0, 32), slice(32, 64)):
        v, lane = x[w], np.arange(32)
        bits = v.view(np.uint32)
        want = [
            v[lane ^ 5],
            v[::-1],
            v[np.where(lane + 3 < 32, lane + 3, lane)],
            v[np.where(lane >= 3, lane - 3, lane)],
            np.full(32, v.sum(dtype=np.float64)),
            np.full(32, v.max()),
            v < 0,
        ]
        np.testing.assert_allclose(out[:7, w], want, rtol=1e-5, atol=1e-6)
        assert (out[7, w].view(np.uint32) == bits.max() - bits.min()).all()


def test_matrix_primitives(device: EmulatedDevice, rng: np.random.Generator) -> None:
    x, y = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (8, 16))
    want = x @ y.T + 1
    out = np.zeros((4, 16, 8), np.float32)
    launch(device, "primitives", "matrices", [out, bf16(x), bf16(y)], threads=32)
    np.testing.assert_array_equal(out[[0, 2]], [want, want])
    halves = [m.astype(np.float16).view(np.uint16) for m in (x, y)]
    launch(device, "primitives", "matrices", [out, *halves], threads=32)
    np.testing.assert_array_equal(out[[1, 3]], [want, want])


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_blocks_and_barriers(
    device: EmulatedDevice, rng: np.random.Generator, threads: int
) -> None:
    x = rng.normal(size=(1, threads)).astype(np.float32)
    out = np.zeros((5, 3, 2, threads), np.float32)
    launch(
        device, "primitives", "blocks", [out, x], threads=threads, grid=(5, 3, 1),
        shared=4 * threads,
    )  # fmt: skip
    assert (out[:, :, 0] == x[0, ::-1]).all()
    np.testing.assert_allclose(out[:, :, 1], x.sum(dtype=np.float64), rtol=1e-4, atol=1e-4)
    assert (out[:, :, 1] == out[0, 0, 1, 0]).all()


def test_conversions(device: EmulatedDevice, rng: np.random.Generator) -> None:
    halves = np.arange(0, 1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore"):
        ties = (halves[:-1] + halves[1:]) / 2
    random = rng.integers(0, 1 << 32, 50000, dtype=np.uint32).view(np.float32)
    large = np.array([65519.99, 65520, 1e38, 3.3895e38], np.float32)
    x = np.concatenate([halves, ties, random, large])
    out, back = np.zeros(len(x), np.uint32), np.zeros((2, len(x)), np.float32)
    grid = (-(-len(x) // 128), 1, 1)
    launch(device, "primitives", "conversions", [out, x, back], threads=128, grid=grid)
    real = ~np.isnan(x)
    with np.errstate(all="ignore"):
        want = x.astype(np.float16)
    assert (out[real] & 0xFFFF == want[real].view(np.uint16)).all()
    assert (out[~real] == 0x7FFF7FFF).all()
    np.testing.assert_array_equal(back[0][real], want[real].astype(np.float32))
    bits = x.view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    assert (out[real] >> 16 == nearest[real]).all()
    assert (back[1][real].view(np.uint32) >> 16 == nearest[real]).all()


def test_bytes_and_copies(device: EmulatedDevice, rng: np.random.Generator) -> None:
    words = rng.integers(-(1 << 31), 1 << 31, (32, 8), dtype=np.int64).astype(np.int32)
    out = np.zeros((32, 4), np.int32)
    launch(device, "primitives", "bytes", [out, words], threads=32)
    x, y = (words[:, i].copy().view(np.int8).reshape(32, 4).astype(int) for i in (0, 1))
    third = words[:, 2].astype(int)
    assert (out[:, 0] == ((x * y).sum(axis=1) + third).astype(np.int32)).all()
    assert (out[:, 1] == (((x & 255) * y).sum(axis=1) + third).astype(np.int32)).all()
    # Before the second group is waited for nothing has come.
    assert (out[:, 2] == -1).all()
    assert (out[:, 3] == np.where(np.arange(32) % 2 == 0, words[:, 4], 0)).all()


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("return_before_barrier", "1 of 64 threads returned, 63 wait at __syncthreads"),
        ("return_before_shuffle", "16 lanes of warp"),
        ("divergent_shuffles", "while other lanes of the warp wait"),
        ("divergent_barriers", "__syncthreads of line"),
        ("barrier_and_shuffle", "16 lanes of warp 0 wait at sync_warp"),
        ("beyond_dynamic", "a write at byte 32 of 32 of shared memory"),
        ("beyond_static", "index 63 is beyond the array"),
        ("beyond_memory", "a write at byte 256 of 256"),
        ("rehearsal_that_writes", "a rehearsal writes"),
        ("misaligned", "misaligned or null"),
        ("misaligned_stream", "is not aligned to 8"),
        ("absent", "misaligned or null|signal"),
        ("wild", "signal"),
        ("matrix_from_global", "is not in shared memory"),
    ],
)
def test_mistakes_are_found(device: EmulatedDevice, kernel: str, expected: str) -> None:
    arrays = [np.zeros((1, 64), np.float32), np.zeros((1, 128), np.float32)]
    threads = 32 if kernel in ("barrier_and_shuffle", "matrix_from_global") else 64
    with pytest.raises(CudaError, match=expected):
        launch(device, "mistakes", kernel, arrays, threads=threads, shared=32)
    # The device goes on.
    x = np.ones((1, 64), np.float32)
    launch(device, "primitives", "warps", [np.zeros((8, 64), np.float32), x], threads=64)


def test_shared_memory_is_nan_at_first(device: EmulatedDevice) -> None:
    out = np.zeros((1, 64), np.float32)
    for value in (1.0, 0.0):
        launch(device, "mistakes", "unwritten", [out], [value], threads=64, shared=256)
        assert np.isnan(out).all()


def test_order_is_shuffled(device: EmulatedDevice) -> None:
    out, counter = np.zeros((8, 64), np.int32), np.zeros(1, np.int32)
    launch(device, "mistakes", "order", [out, counter], threads=64, grid=(8, 1, 1))
    assert sorted(out.ravel()) == list(range(512))
    assert (np.diff(out.min(axis=1)) < 0).any()
    assert (np.diff(out, axis=1) < 0).any()


@pytest.mark.parametrize(
    ("grid", "threads", "shared"),
    [
        ((1, 65536, 1), 64, 0),
        ((0, 1, 1), 64, 0),
        ((1, 1, 1), 65, 0),
        ((1, 1, 1), 64, (48 << 10) + 1),
    ],
)
def test_sizes_of_launches(
    device: EmulatedDevice, grid: tuple[int, int, int], threads: int, shared: int
) -> None:
    function = device.function("primitives", "warps")
    with pytest.raises(CudaError, match="invalid launch"):
        device.launch(function, grid, threads, shared, 0)


def test_memory(device: EmulatedDevice) -> None:
    before = device.free_bytes()
    memory = device.allocate(1000)
    assert memory.address % 256 == 0
    assert device.free_bytes() == before - 1000
    values = np.zeros(250, np.float32)
    device.download(memory.address, values)
    assert np.isnan(values).all()
    device.fill(memory.address, 1000, 0)
    device.upload(memory.address + 400, np.arange(50, dtype=np.float32))
    device.copy(memory.address, memory.address + 400, 200)
    device.download(memory.address, values)
    assert values.sum() == 2 * np.arange(50).sum()
    for address, n in ((memory.address + 1, 1000), (memory.address - 4, 4)):
        with pytest.raises(CudaError, match="not the device's memory"):
            device.fill(address, n, 0)
    with pytest.raises(CudaError, match="are free"):
        device.allocate(before)
    del memory
    gc.collect()
    assert device.free_bytes() == before


def test_products(device: EmulatedDevice, rng: np.random.Generator) -> None:
    a, b = rng.integers(-8, 9, (5, 24)), rng.integers(-8, 9, (7, 24))
    held = [device.allocate(n) for n in (5 * 24 * 2, 7 * 24 * 2, 5 * 7 * 4)]
    device.upload(held[0].address, bf16(a))
    device.upload(held[1].address, bf16(b))
    out = np.empty((5, 7), np.float32)
    device.gemm(Gemm(held[2].address, held[0].address, held[1].address, 5, 7, 24))
    device.download(held[2].address, out)
    assert (out == a @ b.T).all()


def test_captured_launches(device: EmulatedDevice) -> None:
    memory = device.allocate(16)
    device.fill(memory.address, 16, 0)
    values = np.zeros(4, np.float32)
    graph = device.capture(lambda: device.fill(memory.address, 16, 0x40))
    device.download(memory.address, values)
    assert (values == 0).all()
    graph()
    device.download(memory.address, values)
    assert (values == np.float32(3.0039215)).all()
    calls: tuple[Any, ...] = (device.synchronize, lambda: device.allocate(1))
    for forbidden in calls:
        with pytest.raises(CudaError, match="captured"):
            device.capture(forbidden)
