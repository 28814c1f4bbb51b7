"""A model that doesn't fit the machine's memory is refused before its weights are read."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import Engine
from engine.errors import NotEnoughMemoryError
from engine.graph import Kind
from engine.models.weights import Weights
from engine.placement import estimate as memory_estimate
from tests.support.helpers import MAX_REFUSAL_SECONDS, Cli, write_header
from tests.support.presets import WITH_LATENTS

GIB = 2**30
Models = Callable[[str, str], Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """machine(available, **cgroup): what the system says from here on; bytes, or None."""
    monkeypatch.setattr(memory_estimate, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory_estimate, "_CGROUP", tmp_path)

    def say(available: int | None, **cgroup: object) -> None:
        if available is not None:
            text = f"MemTotal: 99 kB\nMemAvailable:   {available // 1024} kB\nBuffers: 1 kB\n"
            (tmp_path / "meminfo").write_text(text)
        for name, value in cgroup.items():
            (tmp_path / f"memory.{name}").write_text(f"{value}\n")

    return say


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def raw(self: Weights, name: str, *part: int) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Weights, "raw", raw)


SIZES = r"\(weights [\d.]+, states [\d.]+, KV cache [\d.]+, activations [\d.]+\)"


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("available", "options", "advice"),
    [
        (2 * GIB, [], "take a file of smaller types"),
        (20 * GIB, ["-c", 262144], "lower -c"),
        (16 * GIB, ["-np", 64, "-c", 4096], "lower -np"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path,
    cli: Cli,
    machine: Callable[..., None],
    available: int,
    options: list[object],
    advice: str,
) -> None:
    path = write_header(tmp_path / "m.gguf", "27b")
    machine(available)
    start = time.process_time()
    line = cli("-m", path, "-p", "a", "-n", 1, *options).refused()
    assert time.process_time() - start < MAX_REFUSAL_SECONDS
    words = rf"not enough memory: expected at most {available / GIB:.1f} GiB \(available\), "
    assert re.fullmatch(words + rf"the model needs [\d.]+ GiB {SIZES}: {advice}", line), line


def kept_bytes(backend: Any) -> int:
    """Bytes of all weights of the CPU backend as they are kept."""
    kept = backend.weights
    return sum(a.nbytes for a in (*kept._packed.values(), *kept._plain.values()))


def test_what_was_estimated_is_what_is_kept(models: Models) -> None:
    """Weights and states to the byte."""
    for preset, dtype in (
        ("tiny", "Q8_0"),
        ("tiny-moe", "F32"),
        *((preset, "F32") for preset in WITH_LATENTS),
    ):
        with Engine.load(models(preset, dtype), n_ctx=256) as engine:
            need = memory_estimate.estimate(engine.plan)
            backend: Any = engine.plan.backends[0]
            states = engine.plan.tensors_of(backend, Kind.STATE)
            assert need.weights == kept_bytes(backend)
            assert need.states + need.kv_cache == sum(t.nbytes for t in states)
            assert need.activations > 0
            assert need.total == need.weights + need.states + need.kv_cache + need.activations


def test_the_lesser_of_machine_and_control_group_counts(machine: Callable[..., None]) -> None:
    assert memory_estimate.available_bytes() is None
    machine(8 * GIB)
    assert memory_estimate.available_bytes() == 8 * GIB
    machine(8 * GIB, max="max", current=GIB, stat="anon 1\nactive_file 2")
    assert memory_estimate.available_bytes() == 8 * GIB
    # The file cache, 2 + 3 GiB of what is in use, is given back when needed.
    stat = f"anon {GIB}\nactive_file {2 * GIB}\ninactive_file {3 * GIB}\nfile_mapped 7"
    machine(8 * GIB, max=7 * GIB, current=6 * GIB, stat=stat)
    assert memory_estimate.available_bytes() == 6 * GIB


def test_a_limit_of_the_process_counts(
    machine: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(8 * GIB)
    (tmp_path / "statm").write_text(f"{GIB // resource.getpagesize()} 5 4 3 0 2 0\n")
    monkeypatch.setattr(memory_estimate, "_STATM", tmp_path / "statm")
    for limit, left in ((3 * GIB, 2 * GIB), (GIB - 1, 0), (resource.RLIM_INFINITY, 8 * GIB)):
        limits = {resource.RLIMIT_AS: (limit, -1)}
        monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
        assert memory_estimate.available_bytes() == left


def test_a_model_that_fits_exactly_runs(tiny: Path, machine: Callable[..., None]) -> None:
    with Engine.load(tiny, n_ctx=256) as engine:
        need = memory_estimate.estimate(engine.plan).total
    machine(need + 1023)
    Engine.load(tiny, n_ctx=256).close()
    machine(need - 1024)
    with pytest.raises(NotEnoughMemoryError, match="MiB"):
        Engine.load(tiny, n_ctx=256)


def test_types_that_are_rounded_are_told_once(
    models: Models, caplog: pytest.LogCaptureFixture
) -> None:
    with Engine.load(models("tiny-untied", "IQ1_M"), n_ctx=256) as engine:
        assert engine.logits([1, 2, 3]).shape[0] == 3
        (backend,) = engine.plan.backends
        assert memory_estimate.estimate(engine.plan).weights == kept_bytes(backend)
    (line,) = [r.getMessage() for r in caplog.records]
    words = r"IQ1_M is kept as Q8_0: \d+ tensors, [\d.]+ MiB in the file, [\d.]+ MiB in memory"
    assert re.fullmatch(words, line), line
