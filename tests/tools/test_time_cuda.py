"""The tools that time CUDA kernels run, on the emulated device with tiny sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cuda_emulator import device as emulated

TOOLS = Path(__file__).resolve().parents[2] / "tools"
pytestmark = pytest.mark.skipif(bool(emulated.missing()), reason=emulated.missing())


def lines_of(tool: str, *arguments: str) -> list[str]:
    command = [sys.executable, str(TOOLS / tool), "--device", "emulated", "--quick", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_ops() -> None:
    device, _, _, *rows = lines_of("time_cuda_ops.py")
    assert device == "emulated, sm_90"
    # The delta rule with either kind of gate by scan, and by chunks where there are several rows.
    assert [row.split(",")[0] for row in rows] == [
        "| scan", "| scan", "| chunk", "| kda scan", "| kda scan", "| kda chunk",
        "| attention", "| attention",
    ]  # fmt: skip
    assert all(float(row.split("|")[2]) > 0 for row in rows)


def test_products() -> None:
    # Blocks of Q4_K have 256 weights, those of Q8_0 32.
    _, _, *lines = lines_of("time_cuda_products.py", "--types", "Q8_0,Q4_K")
    few, many, experts = lines[:2], lines[2:4], lines[4:]
    assert [row.split()[:3] for row in few] == [["Q8_0", "512", "48"], ["Q4_K", "512", "48"]]
    assert all("cuBLAS, copy 20:" in row for row in many)
    kinds = [["Q8_0", "gate"], ["Q8_0", "down"], ["Q4_K", "gate"], ["Q4_K", "down"]]
    assert [row.split()[:2] for row in experts] == kinds


def test_constants_are_set_by_name() -> None:
    lines_of("time_cuda_products.py", "few", "--types", "Q8_0", "--set", "GEMV_WARPS=2")
    with pytest.raises(AssertionError, match=r"expected a constant of .*, got NO_SUCH"):
        lines_of("time_cuda_products.py", "few", "--set", "NO_SUCH=2")
