"""tools/walk.py: the way from the command line to a kernel stays short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.cuda_devices import DEVICES, MakeDevice, cuda_and_others
from tools.walk import ROOT, kernels, walk

OP = "GATED_DELTA_NET"
# The most files that one has to open, kernel sources included.
MAX_FILES = {"cpu": 14, "cuda": 17}


def names(create: Callable[..., Any] | None, folder: str, ending: str) -> list[str]:
    found = walk(OP, create)
    assert set(found.deepest) == {"compile", "run"}
    files = [*found.files, *kernels(OP, folder, ending)]
    assert len(files) <= MAX_FILES[folder]
    return [Path(name).relative_to(ROOT).as_posix() for name in files]


def test_the_cpu_kernel_is_reached() -> None:
    files = names(None, "cpu", ".cpp")
    assert files[0] == "cli.py"
    assert "engine/backends/cpu/backend.py" in files
    assert "engine/backends/native/program.py" in files
    assert files[-2:] == ["engine/backends/cpu/executor.cpp", "engine/ops/cpu/gated_delta_net.cpp"]


@pytest.mark.parametrize("make_device", DEVICES[:1])
def test_the_cuda_kernel_is_reached(make_device: MakeDevice) -> None:
    devices = cuda_and_others(make_device(0))
    files = names(lambda *given: devices, "cuda", ".cu")
    assert files[0] == "cli.py"
    assert "engine/backends/cuda/lower/gated_delta_net.py" in files
    assert "engine/backends/cuda/program.py" in files
    # Nothing of other ops.
    assert "engine/backends/cuda/lower/mul_mat.py" not in files
    assert files[-1] == "engine/ops/cuda/gated_delta_net.cu"
