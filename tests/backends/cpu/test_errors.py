"""What the CPU backend refuses or warns of, and what it leaves to the reference backend."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import Engine, backends
from engine.backends.native import library as cpu_library
from engine.backends.native.library import ISAS, LibraryError
from engine.commands.graph import text as report_text
from engine.placement.place import PlacementError
from engine.threads import n_cores
from engine.version import __version__
from tests.support.helpers import Cli

# Chunks need matrix units, which the portable kernels never have.
CHUNKED, PORTABLE = "no matrix units", "portable"


@pytest.fixture
def fresh() -> Iterator[None]:
    """Libraries are looked for anew, before and after."""
    for function in (cpu_library.load, cpu_library._library):
        function.cache_clear()
    yield
    for function in (cpu_library.load, cpu_library._library):
        function.cache_clear()


def test_an_unknown_instruction_set(cli: Cli, tiny: Path) -> None:
    line = cli("-m", tiny, "-p", "a", "--cpu-isa", "mmx").refused()
    assert line == "cpu_isa: expected one of amx, avx512, avx2, portable, got mmx"


def test_an_instruction_set_that_the_machine_lacks(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    has = frozenset(ISAS["avx512"]) - {"avx512_vnni", "avx512dq"}
    monkeypatch.setattr(cpu_library, "processor_features", lambda: has)
    line = cli("-m", tiny, "-p", "a", "--cpu-isa", "avx512").refused()
    assert line == f"cpu_isa avx512: this {os.uname().machine} has no avx512_vnni, avx512dq"


def test_an_instruction_set_that_is_not_built(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    portable = {"portable": cpu_library.built()["portable"]}
    monkeypatch.setattr(cpu_library, "built", lambda: portable)
    line = cli("-m", tiny, "-p", "a", "--cpu-isa", "avx2").refused()
    assert line == "cpu_isa: expected one of portable (built), got avx2"
    assert cpu_library.load().isa == "portable"


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_libraries_that_are_not_built(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch, fresh: None, backend: str
) -> None:
    monkeypatch.setattr(cpu_library, "built", dict)
    root = Path(__file__).resolve().parents[3]
    expected = f"the CPU kernels are not built: run `pip install -e {root}`"
    assert cli("-m", tiny, "-p", "a", "--backend", backend).refused() == expected
    assert cli("graph", "-m", tiny, "--backend", backend).refused() == expected
    out = cli("--version").out
    assert out.startswith(f"gdn-engine {__version__}")
    assert out.endswith("no cpu (not built), reference\n")
    assert cli("-m", tiny, "-p", "a", "-n", 2, "--backend", "reference").status == 0


def test_no_library_that_the_machine_can_run(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    path = cpu_library.built()["portable"]
    monkeypatch.setattr(cpu_library, "built", lambda: {"avx512": path, "avx2": path})
    monkeypatch.setattr(cpu_library, "processor_features", lambda: frozenset({"avx2", "f16c"}))
    with pytest.raises(LibraryError, match=r"^cpu_isa avx2: this \S+ has no fma$"):
        cpu_library.load()
    assert cpu_library.usable() == []


def test_an_instruction_set_that_the_system_forbids(
    monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    """A processor may have matrix units that a sandbox's kernel does not give out."""
    monkeypatch.setattr(cpu_library, "processor_features", lambda: frozenset(ISAS["amx"]))
    path = cpu_library.built()["portable"]
    monkeypatch.setattr(cpu_library, "built", lambda: {"amx": path, "portable": path})
    allowed = {"amx": 0, "portable": 1}

    def library(isa: str) -> cpu_library.Library:
        made = cpu_library.Library(isa, path)
        made.allowed = lambda: allowed[isa]
        return made

    monkeypatch.setattr(cpu_library, "_library", functools.cache(library))
    assert cpu_library.usable() == ["portable"]
    assert cpu_library.load().isa == "portable"
    with pytest.raises(LibraryError, match=r"^cpu_isa amx: the operating system does not allow"):
        cpu_library.load("amx")


def test_the_version_names_the_instruction_set_in_use(cli: Cli) -> None:
    result = cli("--version")
    assert result.status == 0
    expected = f"cpu ({cpu_library.usable()[0]}; built: {', '.join(cpu_library.built())})"
    assert expected in " ".join(result.out.split())


@pytest.mark.parametrize("isa", cpu_library.usable())
def test_the_instruction_set_that_was_asked_for(cli: Cli, tiny: Path, isa: str) -> None:
    with Engine.load(tiny, cpu_isa=isa, n_threads=1) as engine:
        (backend,) = engine.plan.backends
        assert (backend.name, backend.detail) == ("cpu", f"{isa} kernels, 1 thread")
    options = ("-n", 4, "--temp", 0, "--cpu-isa", isa, "-t", 1)
    assert cli("-m", tiny, "-p", "a", *options).status == 0


def test_the_graph_is_on_the_cpu(cli: Cli, tiny: Path) -> None:
    for options in ((), ("--backend", "cpu"), ("--backend", "cpu", "--strict-backend")):
        result = cli("graph", "-m", tiny, *options)
        assert (result.status, result.err) == (0, "")
        line = next(line for line in result.out.splitlines() if line.startswith("backend cpu"))
        assert f"{cpu_library.usable()[0]} kernels" in line
        assert "reference" not in result.out


@pytest.mark.parametrize("n_threads", [None, 5000])
def test_more_threads_than_cores(
    cli: Cli,
    tiny: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    n_threads: int | None,
) -> None:
    """One line, and as many threads as cores: thousands would take minutes."""
    monkeypatch.setattr(backends, "n_cores", n_cores)
    most = n_cores()
    n_threads = n_threads or most + 1
    assert cli("-m", tiny, "-p", "a", "-n", 3, "-t", most).status == 0
    assert caplog.messages == []
    result = cli("-m", tiny, "-p", "a", "-n", 3, "-t", n_threads)
    assert result.status == 0
    cores = "1 core" if most == 1 else f"{most} cores"
    line = f"n_threads {n_threads} is more than the {cores} this process may use: {most} run"
    assert caplog.messages == [line]


def test_a_chunked_delta_net_is_left_to_the_reference(tiny: Path) -> None:
    options: dict[str, Any] = {"cpu_isa": PORTABLE, "activations": 8, "gdn": "chunk"}
    with Engine.load(tiny, backend="cpu", **options) as engine:
        moved = {n.op.name: p for n, p in engine.plan.placements.items() if p.backend.name != "cpu"}
        # The convolution has its state to itself and stays; so does everything else.
        assert moved.keys() == {"GATED_DELTA_NET"}
        reason = moved["GATED_DELTA_NET"].reason
        assert reason.startswith("holds its state, reference is first in order after refusals")
        assert CHUNKED in reason
        text = report_text({1: engine.plan})
        assert f"{CHUNKED})" in text
        assert "backend reference    = numpy" in text
        logits = engine.logits([1, 2, 3])
    with Engine.load(tiny, backend="cpu", activations=8) as engine:
        assert abs(logits - engine.logits([1, 2, 3])).max() < 1e-3 * abs(logits).max()


def test_decomposed_delta_nets_say_why_they_moved(cli: Cli, tiny: Path) -> None:
    result = cli("graph", "-m", tiny, "--gdn", "decomposed", "--backend", "cpu")
    assert result.status == 0
    assert "(cpu: no kernel for " in result.out


def test_strict_placement_names_the_node_and_the_reason(cli: Cli, tiny: Path) -> None:
    strict = ("--strict-backend", "--backend", "cpu")
    portable = ("--cpu-isa", PORTABLE)
    line = cli("-m", tiny, "-p", "a", "--gdn", "chunk", *strict, *portable).refused()
    assert line.startswith("GATED_DELTA_NET blk.0.gated_delta_net: expected backend cpu (strict), ")
    assert line.endswith(CHUNKED)
    line = cli("graph", "-m", tiny, "--gdn", "decomposed", *strict).refused()
    assert "expected backend cpu (strict), got reference: cpu: no kernel for " in line
    with pytest.raises(PlacementError, match=CHUNKED):
        Engine.load(tiny, strict_backend=True, cpu_isa=PORTABLE, gdn="chunk")
