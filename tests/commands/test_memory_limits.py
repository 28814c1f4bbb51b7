"""Commands that run out of memory while they load: one line and status 1, at every limit.

A forked process gets a limit of its address space (as `ulimit -v` sets) somewhere between what the
imports took and what a run takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.backends.cpu.backend import CpuBackend
from engine.backends.native import library as cpu_library
from tests.commands.test_cli_process import ENV, ROOT
from tests.support.helpers import Cli, without_summary

# Prints [status, standard error] for every limit, in MiB beyond what is taken after the imports.
CHILD = """
import importlib, json, os, re, resource, signal, sys, tempfile
from pathlib import Path
from engine.commands.main import main
for name in ("engine.commands.run", "engine.commands.graph", "tokenizers.models", "gguf"):
    importlib.import_module(name)
taken = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
limits, *argv = sys.argv[1:]
for limit in limits.split(","):
    with tempfile.TemporaryFile() as err:
        if not (child := os.fork()):
            os.dup2(err.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            n = taken + int(float(limit) * 2**20)
            resource.setrlimit(resource.RLIMIT_AS, (n, n))
            signal.alarm(30)
            status = 99
            try:
                status = main(argv)
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        err.seek(0)
        print(json.dumps([status, err.read().decode()]), flush=True)
"""
# More than an engine of the demo model takes; a map for weights has 256 MiB.
ENOUGH = 600


def runs(argv: tuple[object, ...], limits: list[float]) -> list[tuple[int, str]]:
    """(status, standard error) of a command under each limit."""
    given = ",".join(f"{limit:.2f}" for limit in limits)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, given, *map(str, argv)], capture_output=True, text=True,
        cwd=ROOT, env=ENV | {"OPENBLAS_NUM_THREADS": "1"}, timeout=300, check=True,
    )  # fmt: skip
    found = map(json.loads, done.stdout.splitlines())
    return [(status, without_summary(err)) for status, err in found]


@pytest.mark.parametrize(
    ("argv", "most"),
    [
        (("-p", "Question: What is 2 plus 3?", "-n", 2, "-t", 2), 420),
        (("--backend", "reference", "-p", "a", "-n", 1), 45),
        (("graph",), 45),
    ],
)
def test_every_limit_gives_one_line(
    rng: np.random.Generator, argv: tuple[object, ...], most: int
) -> None:
    # Most allocations are small and come first; a few large ones follow.
    limits = [*rng.uniform(0, 45, 16), *rng.uniform(0, most, 8), ENOUGH]
    results = runs(argv, list(limits))
    for limit, (status, err) in zip(limits, results, strict=True):
        if status:
            assert (status, err.count("\n"), err[:7]) == (1, 1, "error: "), (limit, err)
        else:
            assert "error" not in err, (limit, err)
    assert results[-1][0] == 0
    assert any(status for status, _ in results)


def test_threads_that_cannot_be_started(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = cpu_library.load("portable")
    monkeypatch.setattr(library, "team_create", lambda n: None)
    line = cli("-m", tiny, "-p", "a", "--cpu-isa", "portable", "-t", 2).refused()
    assert line == "2 threads could not be started: lower n_threads (-t)"


def test_a_step_that_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CpuBackend(1, "portable")
    monkeypatch.setattr(backend.library, "run", lambda *arguments: -1)
    with pytest.raises(MemoryError):
        backend.read_probe(np.zeros((1, 64), np.float32))
