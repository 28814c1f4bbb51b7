"""Pinned memory in turns: no piece is used again before its copy is done, whatever the sizes."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.backends.cuda.cupy_device import CupyDevice, StagingRing


class Stream:
    """Copies are done when they are waited for, or what was asked for later is."""

    ptr = 0

    def __init__(self) -> None:
        self.work: list[tuple[Any, Any]] = []
        self.n_done = 0

    def synchronize(self) -> None:
        self.until(len(self.work))

    def until(self, n: int) -> None:
        for target, source in self.work[self.n_done : n]:
            target[:] = source
        self.n_done = max(self.n_done, n)


class Event:
    """A place in the stream."""

    def __init__(self, disable_timing: bool) -> None:
        self._stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self._stream, self._at = stream, len(stream.work)

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.until(self._at)


class Held(bytearray):
    """Pinned memory of CuPy."""

    @property
    def ptr(self) -> int:
        return int(np.frombuffer(self, np.uint8).ctypes.data)


class Cuda:
    """The part of CuPy that is used."""

    Event = Event

    @staticmethod
    def alloc_pinned_memory(size: int) -> Held:
        return Held(size)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CupyDevice:
    """A GPU whose memory is the host's, and which is never sooner than it must be."""
    made = object.__new__(CupyDevice)
    stream: Any = Stream()
    made.stream, made._errors = stream, (RuntimeError, RuntimeError)
    made._small, made._large = (StagingRing(Cuda, made.wait, n, s) for n, s in ((3, 64), (2, 256)))
    made._back = StagingRing(Cuda, made.wait, 4, 64)
    cupy: Any = SimpleNamespace(cuda=Cuda)
    made._cupy = cupy

    def copy(target: int, source: int, n_bytes: int, to_device: bool) -> None:
        stream.work.append((_bytes(target, n_bytes), _bytes(source, n_bytes)))

    monkeypatch.setattr(made, "_copy_async", copy)
    return made


def _bytes(address: int, n_bytes: int) -> Any:
    memory: Any = (ctypes.c_uint8 * n_bytes).from_address(address)
    return np.frombuffer(memory, np.uint8)


@pytest.mark.parametrize("sizes", [[1] * 20, [64] * 9, [64, 65, 300, 1, 256, 1000, 3] * 3])
def test_uploads_are_what_was_given(device: CupyDevice, sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    memory = np.zeros(sum(sizes), np.uint8)
    given, at = [], memory.ctypes.data
    for n in sizes:
        values = rng.integers(0, 256, n).astype(np.uint8)
        given.append(values.copy())
        device.upload(at, values)
        # It may be changed now.
        values[:] = 0
        at += n
    got = np.empty_like(memory)
    device.download(memory.ctypes.data, got)
    np.testing.assert_array_equal(got, np.concatenate(given))


def test_arrays_of_any_kind_are_uploaded(device: CupyDevice) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6).T
    memory = np.zeros((6, 4), np.float32)
    device.upload(memory.ctypes.data, values)
    device.upload(memory.ctypes.data, np.empty(0, np.int32))
    device.synchronize()
    np.testing.assert_array_equal(memory, values)


def test_what_is_fetched_is_as_it_was(device: CupyDevice) -> None:
    memory, fetched = np.zeros(4, np.int32), []
    for i in range(9):
        device.upload(memory.ctypes.data, np.full(4, i, np.int32))
        fetched.append(device.fetch([(memory.ctypes.data, 16)]))
        if i >= 1:
            # The one before is waited for while this one is on its way.
            assert fetched[-2]().view(np.int32).tolist() == [i - 1] * 4
            assert device.stream.n_done < len(device.stream.work)


def test_spans_are_fetched_one_after_the_other(device: CupyDevice) -> None:
    """Also more bytes than before, while an earlier fetch is on its way."""
    memory = np.arange(100, dtype=np.int32)
    first = device.fetch([(memory.ctypes.data + 8, 4), (memory.ctypes.data, 8)])
    second = device.fetch([(memory.ctypes.data + 4, 4), (memory.ctypes.data + 80, 320)])
    assert first().view(np.int32).tolist() == [2, 0, 1]
    assert second().view(np.int32).tolist() == [1, *range(20, 100)]
