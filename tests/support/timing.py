"""Judges ratios of times on a machine that others use too.

`judge` measures in rounds and passes at the first good one. After each bad round a yardstick says
whether the machine was fit while it ran: only bad rounds of a fit machine fail a test. Where there
were too few of them, the test is skipped, and the reason holds the numbers.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# So many bad rounds of a fit machine fail; so many rounds are run at most.
ENOUGH_BAD, MAX_ROUNDS = 3, 10
# A fixed piece of work, which takes about half a millisecond, is repeated.
WORK_REPEATS = 100
# What a fit machine may show. Beside one busy loop on two cores, others have 0.3 and more.
MAX_SPREAD, MAX_OTHERS = 0.1, 0.1


@dataclass(frozen=True)
class Counters:
    """What the system has counted so far, in seconds of a core, all cores together.

    `busy`: of all processes, and what the host took; `own`: of this process; `waiting`: of its
    threads that wanted a core and got none; `switches`: how often it lost one.
    """

    busy: float
    own: float
    waiting: float
    switches: int


def read_counters() -> Counters:
    """Those of Linux; where it does not tell, others seem to do nothing."""
    times, usage = os.times(), resource.getrusage(resource.RUSAGE_SELF)
    own = times.user + times.system + times.children_user + times.children_system
    return Counters(_busy(own), own, _waiting(), usage.ru_nivcsw)


def _busy(own: float) -> float:
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    except (OSError, ValueError):
        return own
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _waiting() -> float:
    try:
        lines = [p.read_text().split() for p in Path("/proc/self/task").glob("*/schedstat")]
    except OSError:
        return 0.0
    return sum(int(line[1]) for line in lines) / 1e9


@dataclass(frozen=True)
class Fitness:
    """What a round saw of others.

    `spread`: how much longer fixed work took on average than at its best; `others`: the share of
    all cores' time that others had; `waiting`: that of the round in which own threads had no core.
    """

    spread: float
    others: float
    waiting: float
    switches: int
    load: str = ""

    @property
    def is_fit(self) -> bool:
        """Judged by what the measured code can't change; the rest is evidence."""
        return self.spread <= MAX_SPREAD and self.others <= MAX_OTHERS

    def __str__(self) -> str:
        return (
            f"{'fit' if self.is_fit else 'unfit'} (spread {self.spread:.0%}, others "
            f"{self.others:.0%}, waiting {self.waiting:.0%}, {self.switches} switches"
            f"{f', load {self.load}' if self.load else ''})"
        )


def fixed_work() -> int:
    """Arithmetic that touches no memory to speak of."""
    return sum(range(20000))


def load_average() -> str:
    """Of the last minute."""
    try:
        return f"{os.getloadavg()[0]:.1f}"
    except OSError:
        return ""


@dataclass(frozen=True)
class Yardstick:
    """Says what others did between `start` and `end`; all that it reads can be given."""

    clock: Callable[[], float] = time.perf_counter
    counters: Callable[[], Counters] = read_counters
    work: Callable[[], object] = fixed_work
    load: Callable[[], str] = load_average
    n_cores: int = os.cpu_count() or 1

    def start(self) -> tuple[float, Counters]:
        """Where a round begins."""
        return self.clock(), self.counters()

    def end(self, start: tuple[float, Counters]) -> Fitness:
        """Repeat the fixed work, then look at the whole round."""
        times = []
        for _ in range(WORK_REPEATS):
            began = self.clock()
            self.work()
            times.append(self.clock() - began)
        (began, before), after = start, self.counters()
        seconds = self.clock() - began
        others = (after.busy - before.busy) - (after.own - before.own)
        return Fitness(
            spread=sum(times) / len(times) / min(times) - 1,
            others=max(others, 0) / (seconds * self.n_cores),
            waiting=max(after.waiting - before.waiting, 0) / seconds,
            switches=after.switches - before.switches,
            load=self.load(),
        )


def judge(
    what: str,
    measure: Callable[[], float],
    at_least: float = 0.0,
    at_most: float = float("inf"),
    yardstick: Yardstick | None = None,
) -> None:
    """Pass, fail or skip by a ratio, which must be within the limits in one of the rounds."""
    yardstick = yardstick or Yardstick()
    rounds: list[tuple[float, Fitness]] = []
    n_fit = 0
    while n_fit < ENOUGH_BAD and len(rounds) < MAX_ROUNDS:
        start = yardstick.start()
        ratio = measure()
        # NaN is bad.
        if at_least <= ratio <= at_most:
            return
        rounds.append((ratio, yardstick.end(start)))
        n_fit += rounds[-1][1].is_fit
    evidence = "; ".join(f"{ratio:.4g} {fitness}" for ratio, fitness in rounds)
    summary = f"{what}: expected {at_least:g} to {at_most:g} in a round, got {evidence}"
    if n_fit == ENOUGH_BAD:
        pytest.fail(summary)
    pytest.skip(f"the machine was not fit to measure in {len(rounds) - n_fit} rounds: {summary}")
