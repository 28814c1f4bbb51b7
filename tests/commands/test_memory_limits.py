"""Commands that run out of memory or threads: one line and status 1, at every limit.

A forked process gets a limit of its address space (as `ulimit -v` sets) somewhere between what the
imports took and what a run takes; or so many threads as a library lets it start, since the system's
own limit (`ulimit -u`) counts a user's other processes, and nothing of root's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping

import numpy as np
import pytest

from engine import Engine, SamplingParams
from engine.backends.cpu.backend import CpuBackend
from engine.errors import NotEnoughMemoryError
from tests.commands.test_cli_process import ENV, ROOT
from tests.support.cuda_emulator.build import compiler
from tests.support.helpers import Cli, without_summary

# Prints [status, standard error] for every limit: in MiB beyond what is taken after the imports,
# or of threads if the library of LIMITED_THREADS is there.
CHILD = """
import ctypes, importlib, json, os, re, resource, signal, sys, tempfile
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
            if "LD_PRELOAD" in os.environ:
                ctypes.CDLL(None).allow_threads(int(float(limit)))
            else:
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
# Prints the statuses (-14: it hangs) of starting threads at limits 8 KiB apart.
THREADS = """
import os, re, resource, signal
from pathlib import Path
from engine.errors import NotEnoughMemoryError
from engine.threads import pool
taken = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
for limit in range(8 << 20, 13 << 20, 8 << 10):
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_AS, (taken + limit, taken + limit))
        signal.alarm(5)
        try:
            with pool("a thread", 1) as threads:
                assert threads.submit(int, "1").result() == 1
        except NotEnoughMemoryError:
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
LIMITED_THREADS = """
#include <cerrno>
#include <dlfcn.h>
#include <pthread.h>

static int n_left = 1000;
extern "C" void allow_threads(int n) { n_left = n; }
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes,
                              void* (*run)(void*), void* argument) noexcept {
    static const auto create = (decltype(&pthread_create))dlsym(RTLD_NEXT, "pthread_create");
    return n_left-- > 0 ? create(thread, attributes, run, argument) : EAGAIN;
}
"""
# MiB. The demo model's own part is 24; the interpreter, its packages and stacks take the rest.
ENOUGH = 90


def runs(
    argv: tuple[object, ...], limits: list[float], env: Mapping[str, str] = ENV
) -> list[tuple[int, str]]:
    """(status, standard error) of a command under each limit."""
    given = ",".join(f"{limit:.2f}" for limit in limits)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, given, *map(str, argv)], capture_output=True, text=True,
        cwd=ROOT, env={**env, "OPENBLAS_NUM_THREADS": "1"}, timeout=300, check=True,
    )  # fmt: skip
    found = map(json.loads, done.stdout.splitlines())
    return [(status, without_summary(err)) for status, err in found]


@pytest.mark.parametrize(
    ("argv", "most"),
    [
        (("-p", "Question: What is 2 plus 3?", "-n", 2, "-t", 2), 60),
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
    assert results[-1][0] == 0, results[-1]
    assert any(status for status, _ in results)


def test_a_thread_without_memory_for_its_first_calls() -> None:
    """`Thread.start` waits for ever for one."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENV,
        check=True,
    )
    statuses = list(map(int, done.stdout.split()))
    assert (statuses[0], statuses[-1]) == (1, 0)
    assert statuses == sorted(statuses, reverse=True)


@pytest.fixture(scope="module")
def few_threads(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of a process that starts only so many threads as it allows itself."""
    path = tmp_path_factory.mktemp("threads") / "libthreads.so"
    command = [compiler() or "", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path), "-ldl"]
    subprocess.run(command, input=LIMITED_THREADS, text=True, check=True)
    return ENV | {"LD_PRELOAD": str(path)}


@pytest.mark.parametrize(
    "argv", [("-p", "a", "-n", 1, "-t", 2), ("bench", "-p", 8, "-n", 1, "-t", 2)]
)
def test_each_thread_that_is_refused_gives_one_line(
    few_threads: Mapping[str, str], argv: tuple[object, ...]
) -> None:
    # The first is one of the team, the second packs weights.
    none, one, enough = runs(argv, [0, 1, 2], few_threads)
    line = (
        "error: expected {}, and the system refused one ({}): lower -t (n_threads), or raise "
        "ulimit -u or -v\n"
    )
    assert none == (1, line.format("2 threads", "Resource temporarily unavailable"))
    assert one == (1, line.format("threads that pack weights", "can't start new thread"))
    assert enough[0] == 0, enough


def test_a_thread_that_runs_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Engine.load() as engine:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(NotEnoughMemoryError, match="expected a thread that runs the steps"):
                engine.start()
        assert len(engine.generate("a", SamplingParams(max_tokens=1)).wait().tokens) == 1


def test_any_error_without_memory(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    """CPython's compiler was seen to raise a ValueError."""

    def fail(*arguments: object) -> None:
        raise ValueError("field 'target' is required for NamedExpr")

    monkeypatch.setattr("engine.commands.tokenize.run", fail)
    with pytest.raises(ValueError, match="NamedExpr"):
        cli("tokenize", "-p", "a")
    monkeypatch.setattr("engine.commands.main._SPARE_BYTES", 1 << 60)
    line = cli("tokenize", "-p", "a").refused()
    assert line.startswith("out of memory: field 'target' is required for NamedExpr; lower")


def test_a_step_that_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CpuBackend(1, "portable")
    monkeypatch.setattr(backend.library, "run", lambda *arguments: -1)
    with pytest.raises(MemoryError):
        backend.read_probe(np.zeros((1, 64), np.float32))
