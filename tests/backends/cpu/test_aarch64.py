"""Every op with the portable kernels on aarch64: cross-built here and run by qemu.

The backend of this process keeps its memory; what a program reads and writes goes to the driver
and back. Debian: apt-get install cmake ninja-build g++-aarch64-linux-gnu qemu-user
"""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from engine.backends.base import Split
from engine.backends.cpu.backend import CpuBackend, CpuProgram
from engine.backends.native.views import DIMS, I8, PACKED, VIEW
from engine.formats.quants import BY_GGML_ID
from engine.graph import Live
from tests.backends.cpu.test_ops import CASES
from tests.support.int8 import check_op
from tests.support.opcase import OpCase, fresh_seed

ROOT = Path(__file__).resolve().parents[3]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in ("cmake", "ninja", COMPILER, EMULATOR) if not shutil.which(tool)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}")
LAYOUT_OF, PANEL_BYTES, KERNEL, PACK, RUN = range(5)
N_THREADS = 2
_ITEM = {0: 4, 1: 2, 2: 4, I8: 1}


def _build() -> Path:
    """The portable library, by the same CMakeLists.txt as ever, and the driver; made by one of
    pytest's workers at a time."""
    build = ROOT / "build" / "aarch64"
    build.mkdir(parents=True, exist_ok=True)
    options = ["-G", "Ninja", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    options += [f"-DCMAKE_CXX_COMPILER={COMPILER}", "-Wno-dev"]
    source = Path(__file__).parent / "aarch64" / "driver.cpp"
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", ROOT, "-B", build, *options],
            ["cmake", "--build", build, "--parallel"],
            [COMPILER, "-std=gnu++17", "-O1", "-Wall", "-Wextra", source, "-o", build / "driver"],
        ):
            done = subprocess.run([*map(str, command)], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return build


class Remote:
    """The library in another process; see cpu_library.Library."""

    isa = "aarch64"

    def __init__(self, build: Path) -> None:
        # Weights are packed while the next one is looked at.
        self.lock = threading.Lock()
        library = build / "libgdn_cpu_portable.so"
        command = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", build / "driver", library]
        self.process = subprocess.Popen(
            [*map(str, command), str(N_THREADS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, *words: int, data: bytes = b"", size: int = 8) -> bytes:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.lock:
            self.process.stdin.write(struct.pack(f"<{len(words)}q", *words) + data)
            self.process.stdin.flush()
            answer = self.process.stdout.read(size)
        assert len(answer) == size, f"the driver ended: {self.process.poll()}"
        return answer

    def number(self, *words: int, data: bytes = b"") -> int:
        return int.from_bytes(self.ask(*words, data=data), "little", signed=True)

    def team_create(self, n_threads: int) -> int:
        return 0

    def layout_of(self, ggml_id: int) -> int:
        return self.number(LAYOUT_OF, ggml_id)

    def panel_bytes(self, layout: int, n_in: int) -> int:
        return self.number(PANEL_BYTES, layout, n_in)

    def kernel_address(self, name: str) -> int:
        return self.number(KERNEL, len(name), data=name.encode())

    def pack(
        self, ggml_id: int, rows: int, n_rows: int, n_in: int, target: int, begin: int, end: int
    ) -> None:
        assert begin == 0
        source = BY_GGML_ID[ggml_id].row_bytes(n_in) * n_rows
        packed = self.panel_bytes(self.layout_of(ggml_id), n_in) * end
        words = (PACK, ggml_id, n_rows, n_in, end, source, packed)
        panels = self.ask(*words, data=ctypes.string_at(rows, source), size=packed)
        ctypes.memmove(target, panels, packed)

    def team_free(self, team: int) -> None:
        pass


class Aarch64Backend(CpuBackend):
    """The CPU backend with its kernels elsewhere."""

    library: Any

    def __init__(self, remote: Remote) -> None:
        with patch("engine.backends.native.library.load", lambda isa: remote):
            super().__init__(n_threads=1)
        self.name = "aarch64"

    def compile(self, split: Split) -> CpuProgram:
        self._compiled = super().compile(split)
        return self._compiled

    def run(self, instructions: Any, live: Live, seconds: Any = None) -> None:
        self._live = live
        views, attrs, program = self._compiled._views, self._compiled._attrs, instructions.copy()
        program["views"] = (program["views"] - views.ctypes.data) // VIEW.itemsize
        program["attrs"] = (program["attrs"] - attrs.ctypes.data) // 8
        regions = _regions(views)
        counts = [live.dim(name) or 0 for name in DIMS]
        data = b"".join(
            struct.pack("<2Q", at, size) + ctypes.string_at(at, size) for at, size in regions
        )
        data += program.tobytes() + views.tobytes() + attrs.tobytes()
        sizes = (len(regions), len(program), len(views), len(attrs))
        n_bytes = sum(size for _, size in regions)
        answer = self.library.ask(RUN, *sizes, *counts, data=data, size=n_bytes)
        start = 0
        for at, size in regions:
            ctypes.memmove(at, answer[start : start + size], size)
            start += size


def _regions(views: Any) -> list[tuple[int, int]]:
    """(address, bytes) of what views cover; those that overlap are one."""
    regions: list[tuple[int, int]] = []
    for at, size in sorted({(int(v["data"]), _extent(v)) for v in views if v["data"]}):
        if regions and at < sum(regions[-1]):
            first, before = regions[-1]
            regions[-1] = (first, max(before, at + size - first))
        else:
            regions.append((at, size))
    return regions


def _extent(view: Any) -> int:
    shape, strides = view["shape"][: view["rank"]], view["stride"][: view["rank"]]
    if view["dtype"] == PACKED:
        n_panels = -(-int(shape[-2]) // 16)
        return int((shape[:-2] - 1) @ strides[: len(shape) - 2]) + n_panels * int(
            strides[len(shape) - 2]
        )
    if not shape.all():
        return 0
    return (int((shape - 1) @ strides) + 1) * _ITEM[int(view["dtype"])]


@pytest.fixture(scope="module")
def remote() -> Iterator[Remote]:
    remote = Remote(_build())
    yield remote
    remote.process.communicate()


@pytest.fixture(scope="module")
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("c", CASES, ids=[str(c) for c in CASES])
def test_op(remote: Remote, c: OpCase, strided: bool, seed: int) -> None:
    check_op(Aarch64Backend(remote), c, strided, seed)
