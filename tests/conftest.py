"""Fixtures of the engine's tests: tiny models written once a session, and fresh random numbers.

Every run draws other tokens. A failing test shows its seed; `pytest --seed N` repeats it.
"""

from __future__ import annotations

import functools
import io
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Before numpy comes: for matrices this small threads only wait for each other, and on a machine
# that is busy with something else for long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest

from engine.commands.main import main
from tests.sanitize import native
from tests.support.helpers import MAX_REFUSAL_SECONDS, STD, Cli, Refused, Result
from tests.support.presets import TINY
from tools.synth import write_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="seed of the tests that draw fresh random numbers")
    parser.addoption("--peer-python", help="a Python with llama-cpp-python, to compare with it")
    parser.addoption("--native-dir", type=Path, help="a folder of CPU libraries to test instead")


def pytest_configure(config: pytest.Config) -> None:
    # Before tests ask which instruction sets there are.
    if directory := config.getoption("--native-dir"):
        native.use(directory)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator with a new seed, which a failure shows."""
    seed = request.config.getoption("--seed")
    seed = secrets.randbits(32) if seed is None else seed
    request.node.add_report_section("setup", "random numbers", f"repeat with --seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="session", autouse=True)
def share_of_cores() -> Iterator[None]:
    """Each of pytest's workers has its part of the cores, one at least: where a test names no
    number of threads, more would wait for each other. A test may name up to eight."""
    cores = sorted(os.sched_getaffinity(0))
    n_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    share = set(cores[: max(len(cores) // n_workers, 1)])
    most = max(8, len(cores))
    with (
        patch("os.sched_getaffinity", lambda pid: share),
        patch("engine.backends.n_cores", lambda: most),
    ):
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """models(preset, type): a file that tests may read but not change."""
    directory = tmp_path_factory.mktemp("models")

    @functools.cache
    def model(preset: str, dtype: str) -> Path:
        return write_model(directory / f"{preset}-{dtype}.gguf", preset, dtype, std=STD)

    return model


@pytest.fixture(
    scope="session",
    params=[*((preset, "F32") for preset in TINY), ("tiny", "Q8_0"), ("tiny-untied", "Q8_0")],
    ids="-".join,
)
def path(request: pytest.FixtureRequest, models: Callable[[str, str], Path]) -> Path:
    """Each of the tiny models."""
    return models(*request.param)


@pytest.fixture(scope="session")
def tiny(models: Callable[[str, str], Path]) -> Path:
    """One tiny model."""
    return models("tiny", "Q8_0")


@pytest.fixture
def refused(tmp_path: Path, cli: Cli) -> Refused:
    """refused(overrides, arrays): the one line that both commands have for such a file."""

    def run(
        overrides: dict[str, Any] | None = None,
        arrays: dict[str, Any] | None = None,
        preset: Any = "tiny",
    ) -> str:
        path = tmp_path / "m.gguf"
        write_model(path, preset, "Q8_0", std=STD, overrides=overrides, arrays=arrays)
        # The process's own time: neighbours do not count.
        start = time.process_time()
        line = cli("-m", path, "-p", "a", "-n", 1).refused()
        assert cli("graph", "-m", path).refused() == line
        assert time.process_time() - start < MAX_REFUSAL_SECONDS
        assert line.startswith(f"{path}: ")
        return line.removeprefix(f"{path}: ")

    return run


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """cli(*argv, stdin=b""): runs a command line in this process; stdin None is a terminal."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def run(*argv: object, stdin: bytes | None = b"") -> Result:
        given = Terminal() if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
        monkeypatch.setattr("sys.stdin", given)
        monkeypatch.setattr("sys.argv", ["cli.py"])
        return Result.of(main, argv, capsys)

    return run
