"""The team of threads: barriers, sleep, and how many threads a step takes.

The C++ headers are compiled into a library. The choice of a size runs on made-up times:
a machine says how long a step of so many threads takes, and its clock is a sum.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_double, c_int, c_void_p
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine import Engine, SamplingParams
from engine.engine import DEMO_MODEL
from engine.threads import n_cores
from tests.support.timing import Counters, Yardstick, judge, read_counters

COMPILER = os.environ.get("CXX", "c++")


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The driver; skips where there is no compiler."""
    if not shutil.which(COMPILER):
        pytest.skip(f"found no compiler {COMPILER}")
    path = tmp_path_factory.mktemp("team") / "driver.so"
    source = Path(__file__).with_name("team_driver.cpp")
    options = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread")
    subprocess.run([COMPILER, *options, str(source), "-o", str(path)], check=True)
    driver = ctypes.CDLL(str(path))
    for name, result, arguments in (
        ("make_team", c_void_p, [c_int]),
        ("free_team", None, [c_void_p]),
        ("count_rounds", c_double, [c_void_p, c_int, c_int, c_double, c_void_p]),
        ("waited", c_double, [c_void_p]),
        ("make_size", c_void_p, [c_int]),
        ("free_size", None, [c_void_p]),
        ("size_of", c_int, [c_void_p]),
        ("add_step", None, [c_void_p, c_double, c_double, c_double]),
        ("limit_of", c_double, [c_void_p]),
        ("gives_up", c_int, [c_void_p, c_double]),
    ):
        function = getattr(driver, name)
        function.restype, function.argtypes = result, arguments
    return driver


# --- Threads ------------------------------------------------------------------------------------


def test_threads_meet_at_barriers(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Teams larger than the machine, parts of them, after breaks in which threads fall asleep."""
    for n in (1, 2, 3, 7):
        team = lib.make_team(n)
        for _ in range(20):
            size, rounds = int(rng.integers(1, n + 1)), int(rng.integers(1, 60))
            counts = np.zeros((n, 16), np.int64)
            lib.count_rounds(team, size, rounds, 0.0, counts.ctypes.data)
            assert list(counts[:, 0]) == [rounds] * size + [0] * (n - size)
            time.sleep(rng.choice([0.0, 0.001, 0.004]))
        lib.free_team(team)


def test_threads_that_wait_sleep(lib: ctypes.CDLL) -> None:
    """At a barrier, and between steps: the process takes hardly any time of a core."""
    team, counts = lib.make_team(3), np.zeros((3, 16), np.int64)
    used = lib.count_rounds(team, 3, 1, 0.3, counts.ctypes.data)
    assert used < 0.1  # Two that look for each other all the time would take 0.6.
    assert 0.4 < lib.waited(team) < 2
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
    lib.free_team(team)


# --- Size ---------------------------------------------------------------------------------------

# The seconds of a step of so many threads at a time, and the share of them that threads waited.
Machine = Callable[[int, float], tuple[float, float]]


class Run:
    """Steps of one kind, whose sizes the engine chooses, on a made-up machine."""

    def __init__(self, lib: ctypes.CDLL, most: int, machine: Machine, noise: float = 0.02) -> None:
        self._lib, self._machine, self._noise = lib, machine, noise
        self._size, self._rng = lib.make_size(most), np.random.default_rng(most)
        self.now, self.n_steps = 0.0, 0

    def until(self, end: float) -> dict[int, float]:
        """Run to a time; the seconds that steps of each size took."""
        spent: dict[int, float] = {}
        while self.now < end:
            n = self._lib.size_of(self._size)
            seconds, share = self._machine(n, self.now)
            seconds *= 1 + self._noise * abs(self._rng.normal())
            if seconds > (limit := self._lib.limit_of(self._size)):
                assert self._lib.gives_up(self._size, limit + 1e-6)
                rest = 1 - limit / seconds  # Of the step, which goes on with other threads.
                seconds = limit + rest * self._machine(self._lib.size_of(self._size), self.now)[0]
            else:
                assert not self._lib.gives_up(self._size, 0.9 * seconds)
                self._lib.add_step(self._size, seconds, share * seconds, 1.0)
            self.now, self.n_steps = self.now + seconds, self.n_steps + 1
            spent[n] = spent.get(n, 0.0) + seconds
        return spent

    def __del__(self) -> None:
        self._lib.free_size(self._size)


STEPS = [0.0003, 0.002, 0.02, 0.5]  # Seconds of a step of one thread.


def idle(step: float) -> Machine:
    return lambda n, now: (step / n, 0.0)


def beside_one(step: float, n_cores: int, slowed: float = 3.0) -> Machine:
    """A neighbour has one of the cores: a team that needs this core waits for its thread."""
    return lambda n, now: (slowed * step / n, 0.5) if n == n_cores else (step / n, 0.0)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("most", [1, 2, 16])
def test_an_idle_machine_has_the_whole_team(lib: ctypes.CDLL, most: int, step: float) -> None:
    spent = Run(lib, most, idle(step)).until(60)
    assert spent[most] > 0.985 * sum(spent.values())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("most", [2, 4, 16])
def test_a_neighbour_costs_the_team_one_thread(lib: ctypes.CDLL, most: int, step: float) -> None:
    run = Run(lib, most, beside_one(step, most))
    run.until(2 + 10 * step)
    begun, n_before = run.now, run.n_steps
    spent = run.until(begun + 60)
    assert spent[most - 1] > 0.9 * sum(spent.values())
    best = step / (most - 1)
    assert (run.n_steps - n_before) * best > 0.93 * (run.now - begun)


@pytest.mark.parametrize("step", STEPS)
def test_neighbours_come_and_go(lib: ctypes.CDLL, step: float) -> None:
    """The size follows within seconds, those of a step included."""
    busy = beside_one(step, 2)

    def machine(n: int, now: float) -> tuple[float, float]:
        return busy(n, now) if 20 <= now < 40 else idle(step)(n, now)

    run, margin = Run(lib, 2, machine), 5 + 20 * step
    run.until(20 + margin)
    assert max(beside := run.until(40), key=lambda n: beside[n]) == 1
    run.until(40 + margin)
    assert max(alone := run.until(100), key=lambda n: alone[n]) == 2


def test_far_fewer_cores_than_threads(lib: ctypes.CDLL) -> None:
    """64 threads with the time of four: each of them waits for others most of the time."""

    def machine(n: int, now: float) -> tuple[float, float]:
        return 0.08 / min(n, 4) * (1 + 0.2 * max(0, n - 4)), 0.8 if n > 4 else 0.0

    run = Run(lib, 64, machine)
    run.until(20)
    spent = run.until(60)
    assert max(spent, key=lambda n: spent[n]) in (3, 4, 5)


def test_chance_decides_nothing(lib: ctypes.CDLL) -> None:
    """Two sizes of the same speed, at times with steps of three times the length: no size is kept
    long that is slower."""
    rng = np.random.default_rng(0)

    def machine(n: int, now: float) -> tuple[float, float]:
        return (0.004 / n) * (3.0 if rng.random() < 0.02 else 1.0), 0.0

    spent = Run(lib, 4, machine).until(120)
    assert spent[4] > 0.95 * sum(spent.values())


# --- The engine ---------------------------------------------------------------------------------


@contextmanager
def neighbour() -> Iterator[subprocess.Popen[bytes]]:
    """A process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def tokens_per_second(engine: Engine, seconds: float) -> float:
    start, n = time.perf_counter(), 0
    params = SamplingParams(max_tokens=3000, temperature=0.0, ignore_eos=True)
    for _ in engine.generate([5, 6, 7], params, cache_prompt=False):
        n += 1
        if time.perf_counter() - start > seconds:
            break
    return n / (time.perf_counter() - start)


@pytest.mark.timing
def test_beside_a_neighbour_a_team_is_as_fast_as_one_thread() -> None:
    """The demo model's steps are so short that each barrier waits for a core."""
    if n_cores() != 2:
        pytest.skip("needs two cores: one neighbour takes one of them")
    taken = [0.0]

    def without_neighbour() -> Counters:
        now = read_counters()
        return replace(now, own=now.own + taken[0])

    with (
        Engine.load(DEMO_MODEL, backend="cpu", n_threads=1) as one,
        Engine.load(DEMO_MODEL, backend="cpu", n_threads=2) as two,
    ):

        def two_to_one() -> float:
            start = time.perf_counter()
            with neighbour():
                tokens_per_second(two, 1.0)
                ratios = [tokens_per_second(two, 2.0) / tokens_per_second(one, 2.0) for _ in "ab"]
            taken[0] += time.perf_counter() - start
            return max(ratios)

        judge("two threads to one, beside a neighbour", two_to_one, 0.85,
              yardstick=Yardstick(counters=without_neighbour))  # fmt: skip
