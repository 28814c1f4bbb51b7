"""The judge of timing tests, with clocks and counters that are given."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest

from tests.support.timing import (
    ENOUGH_BAD,
    MAX_ROUNDS,
    WORK_REPEATS,
    Counters,
    Yardstick,
    judge,
    read_counters,
)

Failed, Skipped = pytest.fail.Exception, pytest.skip.Exception


@dataclass
class Machine:
    """A made-up machine of two cores.

    Work takes a millisecond, and `extra` more in one of ten runs; others have a share of the cores.
    """

    others: float = 0.0
    extra: float = 0.0
    now: float = 0.0
    n_runs: int = 0
    waiting: float = 0.0
    switches: int = 0
    n_measured: int = field(default=0)

    def yardstick(self) -> Yardstick:
        return Yardstick(
            lambda: self.now, self._counters, self._work, load=lambda: "1.5", n_cores=2
        )

    def measure(self, *ratios: float) -> Callable[[], float]:
        """The next of some ratios, the last one again and again; each takes 20 ms."""

        def run() -> float:
            self.now += 0.02
            self.n_measured += 1
            return ratios[min(self.n_measured, len(ratios)) - 1]

        return run

    def _work(self) -> None:
        self.n_runs += 1
        self.now += 1e-3 + (self.extra if self.n_runs % 10 == 0 else 0)

    def _counters(self) -> Counters:
        return Counters(self.now * (1 + 2 * self.others), self.now, self.waiting, self.switches)


def verdict(machine: Machine, *ratios: float) -> str:
    """What the judge says, as "passes" or as its words."""
    try:
        judge("a ratio", machine.measure(*ratios), 0.5, 2, machine.yardstick())
    except Failed as failed:
        return f"fails: {failed}"
    except Skipped as skipped:
        return f"skips: {skipped}"
    return "passes"


@pytest.mark.parametrize("machine", [Machine(), Machine(others=0.6), Machine(extra=0.02)], ids=str)
def test_a_good_round_passes(machine: Machine) -> None:
    assert verdict(machine, 1) == "passes"
    assert (machine.n_measured, machine.n_runs) == (1, 0)


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_limits_are_good(ratio: float) -> None:
    assert verdict(Machine(), ratio) == "passes"


def test_one_good_round_is_enough() -> None:
    assert verdict(Machine(), 3, 3, 1) == "passes"
    late = Machine(others=0.6)
    assert verdict(late, *[3] * (MAX_ROUNDS - 1), 1) == "passes"
    assert late.n_measured == MAX_ROUNDS


@pytest.mark.parametrize("ratio", [0.4, 2.1, math.nan, math.inf])
def test_bad_rounds_of_a_fit_machine_fail(ratio: float) -> None:
    machine = Machine()
    words = verdict(machine, ratio)
    assert words.startswith(f"fails: a ratio: expected 0.5 to 2 in a round, got {ratio:.4g} fit (")
    assert words.count("spread 0%, others 0%, waiting 0%, 0 switches, load 1.5") == ENOUGH_BAD
    assert machine.n_measured == ENOUGH_BAD


@pytest.mark.parametrize(
    ("machine", "evidence"),
    [
        (Machine(others=0.6), "spread 0%, others 60%"),
        (Machine(extra=0.02), "spread 200%, others 0%"),
        (Machine(others=0.11), "spread 0%, others 11%"),
        (Machine(extra=0.0011), "spread 11%, others 0%"),
    ],
    ids=str,
)
def test_bad_rounds_of_an_unfit_machine_are_reported(machine: Machine, evidence: str) -> None:
    words = verdict(machine, 0.25)
    assert words.startswith(f"skips: the machine was not fit to measure in {MAX_ROUNDS} rounds: ")
    assert words.count(f"0.25 unfit ({evidence}") == MAX_ROUNDS
    assert machine.n_measured == MAX_ROUNDS


@pytest.mark.parametrize("machine", [Machine(others=0.09), Machine(extra=0.0009)], ids=str)
def test_a_little_noise_excuses_nothing(machine: Machine) -> None:
    assert verdict(machine, 0.25).startswith("fails: ")


def test_a_few_fit_rounds_prove_nothing_yet() -> None:
    """One less than enough, then others come."""
    machine = Machine()
    measure = machine.measure(0.25)

    def run() -> float:
        machine.others = 0.0 if machine.n_measured < ENOUGH_BAD - 1 else 0.6
        return measure()

    # What others have had changes with the rounds, so it is counted here.
    counters = count_others(machine)
    with pytest.raises(Skipped) as skipped:
        judge("a ratio", run, 0.5, 2, replace(machine.yardstick(), counters=counters))
    assert str(skipped.value).count("0.25 fit (") == ENOUGH_BAD - 1
    assert machine.n_measured == MAX_ROUNDS


def count_others(machine: Machine) -> Callable[[], Counters]:
    def reads() -> Iterator[Counters]:
        busy = seen = 0.0
        while True:
            busy += (machine.now - seen) * (1 + 2 * machine.others)
            seen = machine.now
            yield Counters(busy, machine.now, 0.0, 0)

    return reads().__next__


def test_own_waiting_and_switches_are_evidence_only() -> None:
    """A program that starts too many threads must not excuse itself."""
    machine = Machine()
    measure = machine.measure(0.25)

    def run() -> float:
        machine.waiting += 0.012
        machine.switches += 7
        return measure()

    with pytest.raises(Failed, match=r"waiting 10%, 7 switches"):
        judge("a ratio", run, 0.5, 2, machine.yardstick())


def test_a_round_is_work_and_measurement() -> None:
    machine = Machine()
    assert verdict(machine, 0.25).startswith("fails: ")
    assert machine.n_runs == ENOUGH_BAD * WORK_REPEATS


def test_counters_of_this_machine_grow() -> None:
    before, end = read_counters(), time.process_time() + 0.05
    while time.process_time() < end:
        pass
    after = read_counters()
    # The system counts in steps of a hundredth.
    assert after.own - before.own >= 0.03
    assert after.busy > before.busy
    assert after.waiting >= before.waiting
    assert after.switches >= before.switches
