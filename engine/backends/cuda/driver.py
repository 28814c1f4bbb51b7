"""The driver without CuPy: the GPU that it finds, and its launch call with attributes.

From compute capability 9.0 on, a kernel may start while the kernel before it still runs
(programmatic dependent launch); kernels themselves wait for their inputs (primitives.cuh).
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_uint, c_void_p
from typing import Any

# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION of cuda.h, and the first version of the
# driver whose captured graphs keep it.
_PROGRAMMATIC, _LEAST_DRIVER = 6, 12030

_NO_DEVICE = 100


def find_gpu() -> tuple[str, str]:
    """The first GPU with the driver's version, and an empty text; or two texts, what there is
    instead, if anything, and why it is no GPU that can be used."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "", "no NVIDIA driver"
    count, device, name = c_int(), c_int(), ctypes.create_string_buffer(128)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status not in (0, _NO_DEVICE):
        return "an NVIDIA driver", f"it finds no GPU: {_error(driver, status)}"
    if status or not count.value:
        return "", "no GPU"
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, len(name), device)
    version = driver_version(driver)
    return f"{name.value.decode()} (driver of CUDA {version // 1000}.{version % 1000 // 10})", ""


def driver_version(driver: Any) -> int:
    """The latest CUDA that the driver can run: 12040 is 12.4."""
    version = c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _error(driver: Any, status: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(status, ctypes.byref(text))
    return (text.value or f"error {status}".encode()).decode()


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: a value of 64 bytes, aligned to 8."""

    _fields_ = [("id", c_int), ("padding", c_int), ("value", c_int), ("rest", c_int * 15)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("n_attributes", c_uint),
    ]


class Launcher:
    """Launches kernels of one parameter on a stream; `overlap`: let them start early."""

    def __init__(self, stream: int, overlap: bool) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._attribute = _Attribute(_PROGRAMMATIC, 0, 1)
        self._config = _Config()
        self._config.stream = stream
        self._config.block[1] = self._config.block[2] = 1
        if overlap and driver_version(self._driver) >= _LEAST_DRIVER:
            self._config.attributes = ctypes.addressof(self._attribute)
            self._config.n_attributes = 1
        self._parameters = (c_void_p * 1)()
        self._launch = self._driver.cuLaunchKernelEx
        self._launch.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p]
        self._where = (ctypes.addressof(self._config), ctypes.addressof(self._parameters))

    def launch(
        self, function: int, grid: tuple[int, int, int], threads: int, shared: int, params: int
    ) -> str:
        """Launch a kernel; returns the driver's error, or an empty string."""
        config = self._config
        config.grid[:] = grid
        config.block[0], config.shared = threads, shared
        self._parameters[0] = params
        status = self._launch(self._where[0], function, self._where[1], None)
        return _error(self._driver, status) if status else ""


assert ctypes.sizeof(_Attribute) == 72
assert ctypes.sizeof(_Config) == 56
