"""Devices that tests of the CUDA backend run on: the emulated one, and the GPU where there is one.

What runs on the GPU is marked `cuda`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from engine import Engine
from engine.backends import missing
from engine.backends.base import Backend, Support
from engine.backends.cpu.backend import CpuBackend
from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.cupy_device import CupyDevice
from engine.backends.cuda.device import Device
from engine.backends.reference import ReferenceBackend
from engine.graph import Node
from tests.support.cuda_emulator.device import EmulatedDevice
from tests.support.cuda_emulator.device import missing as emulator_missing

_NO_EMULATOR, _NO_GPU = emulator_missing(), missing("cuda")


@functools.cache
def _gpu() -> CupyDevice:
    return CupyDevice()


def emulated(seed: int = 0) -> Device:
    """A new emulated device."""
    return EmulatedDevice(seed=seed)


def gpu(seed: int = 0) -> Device:
    """The GPU."""
    return _gpu()


GPU = pytest.param(
    gpu, id="gpu", marks=[pytest.mark.cuda, pytest.mark.skipif(bool(_NO_GPU), reason=_NO_GPU)]
)
DEVICES = [
    pytest.param(
        emulated, id="emulated", marks=pytest.mark.skipif(bool(_NO_EMULATOR), reason=_NO_EMULATOR)
    ),
    GPU,
]
# Parametrizes tests over functions that give a device, from a seed.
ON_DEVICES = pytest.mark.parametrize("make_device", DEVICES)


MakeDevice = Callable[[int], Device]


class PickyCuda(CudaBackend):
    """A CUDA backend that refuses nodes: `refuses(node)` is the reason, or an empty string."""

    def __init__(self, device: Device, refuses: Callable[[Node], str], **options: Any) -> None:
        super().__init__(device, **options)
        self._refuses = refuses

    def supports(self, node: Node) -> Support:
        reason = self._refuses(node)
        return Support(False, reason) if reason else super().supports(node)


@contextmanager
def engine_on(path: Path, backends: Sequence[Backend], **options: Any) -> Iterator[Engine]:
    """An engine that is given these backends; the first is a CUDA backend's."""
    with (
        patch("engine.backends.create", lambda *given: list(backends)),
        Engine.load(path, backend="auto", **options) as engine,
    ):
        yield engine


def cuda_and_others(
    device: Device, refuses: Callable[[Node], str] = lambda node: "", **options: Any
) -> list[Backend]:
    """The backends that --backend cuda has."""
    return [PickyCuda(device, refuses, **options), CpuBackend(2), ReferenceBackend()]
