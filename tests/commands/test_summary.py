"""The line that says what a run uses, and warnings of options that have no effect."""

from __future__ import annotations

import ctypes
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from gguf import LlamaFileType

from engine import Engine, backends, planning
from engine.backends.cuda import cupy_device
from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.driver import find_gpu
from engine.bench.facts import FILE_TYPES
from engine.commands import summary
from engine.commands.main import main
from engine.config import EngineConfig
from engine.formats.gguf import GGUFFile
from engine.models import load_model
from engine.placement.estimate import device_memory
from tests.support.cuda_devices import emulated, engine_on
from tests.support.cuda_emulator.device import EmulatedDevice
from tests.support.cuda_emulator.device import missing as emulator_missing
from tests.support.helpers import STD
from tools.synth import write_model

SIZES = (
    r"([\d.]+) ([MG])iB \(weights ([\d.]+), states ([\d.]+), KV cache ([\d.]+), buffers ([\d.]+)\)"
)
COMMANDS = (
    ("-p", "a", "-n", 1),
    ("-cnv", "-p", "a", "-n", 1, "--chat-template", "chatml"),
    ("perplexity", "-c", 16, "-f", __file__),
    ("sweep-bench", "-c", 8, "-ub", 4, "-n", 1),
    ("bench", "-p", 4, "-n", 0, "-r", 1),
    ("batched-bench", "-npp", 4, "-ntg", 1, "-npl", 2),
    ("profile", "-n", 1),
)


@pytest.fixture
def lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """lines(*argv): what a command writes to standard error, with the summary."""

    def run(*argv: object) -> list[str]:
        monkeypatch.setattr("sys.stdin", None)
        assert main([str(word) for word in argv]) == 0
        return capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: str(argv[0]))
def test_every_command_that_loads_a_model_says_what_it_uses(
    lines: Callable[..., list[str]], tiny: Path, argv: tuple[object, ...]
) -> None:
    line, *rest = lines(*argv, "-m", tiny, "-t", 2, "--cpu-isa", "portable")
    size = r"up to \d+ MiB, 16 states in a prompt" if argv[0] in ("-p", "-cnv") else "off"
    expected = (
        r"tiny-Q8_0\.gguf: qwen35 Q8_0, 0\.3M parameters; cpu \(portable kernels, 2 threads\)"
    )
    context = r"context \d+( for 2 sequences)?"
    assert re.fullmatch(rf"{expected}; {context}; {SIZES}; prefix cache {size}", line)
    assert not [other for other in rest if "; context " in other]


def test_a_command_that_loads_no_model_says_nothing(
    lines: Callable[..., list[str]], tiny: Path
) -> None:
    for command in ("graph", "tokenize"):
        assert lines(command, "-m", tiny, *(["-p", "a"] if command == "tokenize" else [])) == []


def test_the_sizes_are_those_of_the_arrays(lines: Callable[..., list[str]], tiny: Path) -> None:
    line = lines("-m", tiny, "-p", "a", "-n", 1, "-c", 4096, "-np", 3)[0]
    assert "; context 4096 for 3 sequences; " in line
    total, unit, weights, states, cache, buffers = re.search(SIZES, line).groups()  # type: ignore
    # The prefix cache has a size of its own in the line.
    with Engine.load(tiny, n_ctx=4096, n_parallel=3, cache_ram=0) as engine:
        (backend,) = engine.plan.backends
        store: Any = backend.states
        held: Any = backend
        bytes_of = {"n_blocks": 0, "n_slots": 0}
        for tensor, array in store.arrays.items():
            bytes_of[tensor.shape[0].name] += array.nbytes
        kept = [*held.weights._packed.values(), *held.weights._plain.values()]
        n_weights = sum(array.nbytes for array in kept)
    assert unit == "M"
    for shown, n_bytes in (
        (weights, n_weights), (states, bytes_of["n_slots"]), (cache, bytes_of["n_blocks"]),
    ):  # fmt: skip
        assert float(shown) == pytest.approx(n_bytes / 2**20, abs=0.051)
    parts = map(float, (weights, states, cache, buffers))
    assert float(total) == pytest.approx(sum(parts), abs=0.21)


def test_a_name_and_a_size_label(lines: Callable[..., list[str]], tmp_path: Path) -> None:
    path = tmp_path / "two\nlines.gguf"
    write_model(path, "tiny", "F32", std=STD, overrides={"general.size_label": "8x7B"})
    line = lines("-m", path, "-p", "a", "-n", 1, "--backend", "reference")[0]
    assert line.startswith("two lines.gguf: qwen35 8x7B F32; reference (numpy, float32); context ")


@pytest.mark.skipif(bool(emulator_missing()), reason=emulator_missing())
def test_a_device(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = emulated()
    with engine_on(tiny, [CudaBackend(device)], n_ctx=64) as engine:
        summary.show(engine)
        taken = engine.device_bytes()
    line = capsys.readouterr().err
    sizes = SIZES.replace(", buffers", r", copies ([\d.]+), prefix cache ([\d.]+), buffers")
    about = rf"; cuda \((.*)\); context 64; {sizes} of the 1\.0 GiB on the device; prefix .*\n$"
    found = re.search(about, line)
    assert found
    assert found[1] == device.detail
    assert float(found[2]) == pytest.approx(taken / 2**20, abs=0.051)
    assert sum(map(float, found.groups()[3:])) == pytest.approx(taken / 2**20, abs=0.36)


def table_of(text: str) -> dict[str, float]:
    """The rows of a table of memory."""
    _, rows = text.split("memory of cuda (emulated, sm_90), MiB\n")
    found = re.findall(r"^  (\S.*?) +([\d.]+)(?:  (.*))?$", rows, re.M)
    return {name: float(size) for name, size, _ in found}


@pytest.mark.skipif(bool(emulator_missing()), reason=emulator_missing())
def test_the_memory_of_a_device_by_use(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every byte is in one row; and what is planned is what is taken."""
    device = EmulatedDevice(200 << 20)
    backend = CudaBackend(device)
    with engine_on(tiny, [backend], n_ctx=64, cache_ram=0) as engine:
        summary.show(engine, verbose=True)
        text = capsys.readouterr().err
        shown = table_of(text)
        held = backend.weights
        kept = [*held._packed.values(), *held._plain.values()]
        left = device.free_bytes()
        states = sum(t.nbytes for t in engine.plan.graph.states.values())
        n_copied, made = len(held.bf16), backend.copies(engine.plan.splits)
    fresh = CudaBackend(EmulatedDevice(200 << 20))
    with patch("engine.backends.create", lambda *given: [fresh]):
        _, plan = planning.planned(load_model(GGUFFile(tiny)), EngineConfig(), 64)
    (planned,) = device_memory(plan).values()
    expected = {
        "weights in panels": sum(memory.nbytes for memory in kept),
        "copies in bfloat16": sum(memory.nbytes for memory in held.bf16.values()),
        "in all": 200 << 20, "left": left - (128 << 20),
    }  # fmt: skip
    for name, n_bytes in expected.items():
        assert shown[name] == pytest.approx(n_bytes / 2**20, abs=0.051), name
    assert shown["states"] + shown["KV cache"] == pytest.approx(states / 2**20, abs=0.11)
    assert sum(shown.values()) - shown["in all"] == pytest.approx(shown["in all"], abs=0.5)
    assert "prefix cache" not in shown
    assert f" {n_copied} of {n_copied} weights\n" in text
    assert n_copied
    assert planned.copies == made
    assert planned.left / 2**20 == pytest.approx(shown["left"], abs=1)


@pytest.mark.skipif(bool(emulator_missing()), reason=emulator_missing())
def test_the_planned_memory_of_a_device(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`graph` shows it, before anything is loaded, and allocates nothing."""
    device = EmulatedDevice(200 << 20)
    with patch("engine.backends.create", lambda *given: [CudaBackend(device)]):
        assert main(["graph", "-m", str(tiny), "--bs", "64"]) == 0
        text = capsys.readouterr().out
        assert main(["graph", "-m", str(tiny), "--bs", "64", "--json"]) == 0
    shown, found = table_of(text), json.loads(capsys.readouterr().out)["device_memory"]["cuda"]
    n_copies = found.pop("copied_weights")
    assert f" {n_copies} of {n_copies} weights\n" in text
    assert found.pop("total") == sum(found.values()) == 200 << 20
    assert sum(shown.values()) == pytest.approx(400, abs=0.5)
    assert shown["left"] == pytest.approx(found["left"] / 2**20, abs=0.051)
    assert device.free_bytes() == 200 << 20


@pytest.mark.skipif(bool(emulator_missing()), reason=emulator_missing())
def test_a_cap_on_the_memory_of_a_device(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line to the device, and back to what the plan has room for."""

    def device(memory_mib: int | None) -> EmulatedDevice:
        return EmulatedDevice((4096 if memory_mib is None else memory_mib) << 20)

    monkeypatch.setattr("engine.backends.cuda.CupyDevice", device)
    argv = ("graph", "-m", str(tiny), "--backend", "cuda", "--bs", "64")
    for more, size in (((), 4096), (("--gpu-memory", "300"), 300)):
        assert main([*argv, *more]) == 0
        shown = table_of(capsys.readouterr().out)
        assert shown["in all"] == size
        assert shown["copies in bfloat16"] > 0
    # Beside the 128 MiB of libraries, for the weights and the KV cache of some layers.
    assert main([*argv, "--gpu-memory", "129"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^cpu +\d+  ", text, re.M)
    for value, why in (("x", "invalid integer value: 'x'"), ("0", "expected at least 1, got 0")):
        with pytest.raises(SystemExit, match="2"):
            main([*argv, "--gpu-memory", value])
        (line,) = capsys.readouterr().err.splitlines()
        assert f"argument --gpu-memory: {why} " in line


def test_names_of_file_types_are_those_of_the_package() -> None:
    for known in LlamaFileType:
        if known is not LlamaFileType.GUESSED and known.value < len(FILE_TYPES):
            name = known.name.removeprefix("MOSTLY_").removeprefix("ALL_")
            assert FILE_TYPES[known.value] == name


class Driver:
    """libcuda with a GPU, or one that fails."""

    def __init__(self, status: int = 0, n_devices: int = 1) -> None:
        self._status, self._n_devices = status, n_devices

    def cuInit(self, flags: int) -> int:
        return self._status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._n_devices
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        return index

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"NVIDIA Test"
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 12040
        return 0

    def cuGetErrorString(self, status: int, text: Any) -> int:
        text._obj.value = b"system has unsupported display driver"
        return 0


@pytest.mark.parametrize(
    ("driver", "found", "why"),
    [
        (None, "", "no NVIDIA driver"),
        (Driver(status=100), "", "no GPU"),
        (Driver(n_devices=0), "", "no GPU"),
        (Driver(status=803), "an NVIDIA driver",
         "it finds no GPU: system has unsupported display driver"),
        (Driver(), "NVIDIA Test (driver of CUDA 12.4)", "expected CuPy, got: "),
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_be_used(
    lines: Callable[..., list[str]], tiny: Path, monkeypatch: pytest.MonkeyPatch,
    driver: Driver | None, found: str, why: str,
) -> None:  # fmt: skip
    def load(name: str) -> Driver:
        assert name == "libcuda.so.1"
        if driver is None:
            raise OSError(name)
        return driver

    with monkeypatch.context() as patched:
        patched.setattr(ctypes, "CDLL", load)
        patched.setitem(sys.modules, "cupy", None)  # As if it were not installed.
        assert find_gpu()[0] == found
        reason = cupy_device.missing()
        assert reason.startswith(why)
        patched.setattr(backends, "missing", lambda name: reason)
        told = backends.unusable()
        assert told == ([f"{found} is here but not used: {reason}"] if found else [])
        monkeypatch.setattr(backends, "unusable", lambda: told)
    assert lines("-m", tiny, "-p", "a", "-n", 1)[1:][: len(told)] == told
    # Who chooses a backend knows.
    assert not any("is here" in line for line in lines("-m", tiny, "-p", "a", "--backend", "cpu"))


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"n_gpu_layers": 3}, "-ngl is ignored: no GPU is used"),
        ({"n_cpu_moe": 1}, "-ncmoe or -cmoe is ignored: the model has no experts"),
        ({"gpu_memory": 1000}, "gpu_memory (--gpu-memory) is ignored: no GPU is used"),
        ({"n_gpu_layers": 0}, ""),
        ({}, ""),
    ],
)
def test_placement_without_effect(
    tiny: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], warning: str
) -> None:
    with caplog.at_level(logging.WARNING):
        Engine.load(tiny, backend="cpu", **options).close()
    assert caplog.messages == [warning] * bool(warning)


def test_experts_on_the_cpu_are_no_reason_to_warn(
    models: Callable[[str, str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        Engine.load(models("tiny-moe", "F32"), backend="cpu", n_cpu_moe=9).close()
    assert caplog.messages == []
