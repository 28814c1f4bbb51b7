"""Tokens per second of prompts and of generation, after nothing or at some depth.

A depth is prefilled once and kept as a checkpoint that every repetition starts from, so that none
of it is timed or computed again. A sample counts only if all its positions were filled.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby

import numpy as np

from engine.bench.measure import BenchError, random_tokens, time_generation, time_prompt
from engine.engine import Engine
from engine.kvcache.sequences import Checkpoint
from engine.runtime.batch import Logits


@dataclass(frozen=True)
class Case:
    """What is measured: `n_prompt` tokens of a prompt or `n_gen` generated ones, after `n_depth`.

    One of `n_prompt` and `n_gen` is 0.
    """

    n_prompt: int
    n_gen: int
    n_depth: int

    @property
    def n_tokens(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt + self.n_gen

    @property
    def name(self) -> str:
        """Its name in llama-bench, such as `pp512 @ d4096`."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name


def cases_of(prompts: Sequence[int], gens: Sequence[int], depths: Sequence[int]) -> list[Case]:
    """Every prompt, then every generation, at each depth; a size of 0 means none."""
    sizes = [(n, 0) for n in prompts if n] + [(0, n) for n in gens if n]
    return [Case(n_prompt, n_gen, n_depth) for n_depth in depths for n_prompt, n_gen in sizes]


@dataclass(frozen=True)
class Measurement:
    """The samples of a case, and when it was measured (ISO 8601, UTC)."""

    case: Case
    test_time: str
    samples_ns: list[int]

    @property
    def samples_ts(self) -> list[float]:
        """Tokens per second of each sample."""
        return [1e9 * self.case.n_tokens / ns for ns in self.samples_ns]


def mean_and_deviation(samples: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which is 0 for a single sample."""
    deviation = statistics.stdev(samples) if len(samples) > 1 else 0.0
    return statistics.fmean(samples), deviation


def measure(
    engine: Engine,
    cases: Sequence[Case],
    repetitions: int,
    rng: np.random.Generator,
    warm_up: bool = True,
    on_run: Callable[[], None] = lambda: None,
) -> Iterator[Measurement]:
    """Measure cases one after another; `on_run` is called after every run, warm-ups included.

    A warm-up is the whole prompt, or one generated token, as in llama-bench. The engine needs
    room for one checkpoint. Raises BenchError if it did not process what it should have.
    """
    for n_depth, group in groupby(cases, key=lambda case: case.n_depth):
        start = _checkpoint_at(engine, n_depth, rng)
        try:
            for case in group:
                if warm_up:
                    _run(engine, Case(case.n_prompt, min(case.n_gen, 1), n_depth), start, rng)
                    on_run()
                test_time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                samples = []
                for _ in range(repetitions):
                    samples.append(round(_run(engine, case, start, rng) * 1e9))
                    on_run()
                yield Measurement(case, test_time, samples)
        finally:
            if start:
                start.release()


def _checkpoint_at(engine: Engine, n_depth: int, rng: np.random.Generator) -> Checkpoint | None:
    if not n_depth:
        return None
    seq = engine.memory.create()
    try:
        engine.prefill(seq, random_tokens(engine, n_depth, rng), Logits.NONE)
        check_position(engine, seq, n_depth)
        return engine.memory.checkpoint(seq)
    finally:
        engine.memory.free(seq)


def _run(engine: Engine, case: Case, start: Checkpoint | None, rng: np.random.Generator) -> float:
    """Seconds that a case takes once."""
    if case.n_gen:
        return time_generation(engine, random_tokens(engine, 1, rng), case.n_gen, [start])
    seq = engine.memory.create()
    try:
        if start:
            engine.memory.restore(seq, start)
        seconds = time_prompt(engine, seq, random_tokens(engine, case.n_prompt, rng))
        check_position(engine, seq, case.n_depth + case.n_prompt)
        return seconds
    finally:
        engine.memory.free(seq)


def check_position(engine: Engine, seq: int, expected: int) -> None:
    """Raise BenchError unless a sequence holds as many positions as were given to it."""
    if (n_tokens := engine.memory.n_tokens(seq)) != expected:
        raise BenchError(f"expected {expected} positions after a prompt, got {n_tokens}")
