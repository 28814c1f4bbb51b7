"""Many sequences at once: B prompts in shared steps, then B generations in step with each other.

Prompts are packed into full steps, one after another, in chunks that end at multiples of 64
positions. A shared prompt is processed once: every sequence goes on from its checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.bench.measure import random_tokens, time_generation
from engine.bench.throughput import check_position
from engine.engine import Engine
from engine.runtime.batch import Chunk, Logits
from engine.runtime.scheduler import CHUNK_MULTIPLE, cut

_WARM_UP = 16


@dataclass(frozen=True)
class BatchedCase:
    """`n_seqs` sequences: `n_prompt` tokens each, or `is_shared` by all, then `n_gen` each."""

    n_prompt: int
    n_gen: int
    n_seqs: int
    is_shared: bool = False

    @property
    def n_prompts(self) -> int:
        """Prompts that are processed."""
        return 1 if self.is_shared else self.n_seqs

    @property
    def n_kv(self) -> int:
        """Positions that all of it fills."""
        return self.n_prompts * self.n_prompt + self.n_seqs * self.n_gen

    def warm_up(self) -> BatchedCase:
        """A short one with as many sequences."""
        return replace(self, n_prompt=min(self.n_prompt, _WARM_UP), n_gen=1)


@dataclass(frozen=True)
class BatchedMeasurement:
    """Seconds of both phases of a case."""

    case: BatchedCase
    prompt_s: float
    gen_s: float

    @property
    def prompt_ts(self) -> float:
        """Tokens of prompts per second."""
        return self.case.n_prompts * self.case.n_prompt / self.prompt_s

    @property
    def gen_ts(self) -> float:
        """Tokens generated per second, of all sequences together."""
        return self.case.n_seqs * self.case.n_gen / self.gen_s

    @property
    def seconds(self) -> float:
        """Of both phases."""
        return self.prompt_s + self.gen_s

    @property
    def ts(self) -> float:
        """Tokens of both phases per second."""
        return self.case.n_kv / self.seconds


def measure_batched(
    engine: Engine, case: BatchedCase, rng: np.random.Generator, warm_up: bool = True
) -> BatchedMeasurement:
    """Measure a case once, after a short warm-up.

    The engine needs `n_seqs` sequences and as many checkpoints. Raises BenchError if it did not
    process what it should have.
    """
    if warm_up:
        _measure(engine, case.warm_up(), rng)
    return _measure(engine, case, rng)


def _measure(engine: Engine, case: BatchedCase, rng: np.random.Generator) -> BatchedMeasurement:
    prompts = [random_tokens(engine, case.n_prompt, rng) for _ in range(case.n_prompts)]
    first = random_tokens(engine, case.n_seqs, rng)
    seqs = [engine.memory.create() for _ in prompts]
    held = []
    try:
        start = time.perf_counter()
        _prefill(engine, seqs, prompts)
        held = [engine.memory.checkpoint(seq) for seq in seqs]
        prompt_s = time.perf_counter() - start
        for seq in seqs:
            check_position(engine, seq, case.n_prompt)
        while seqs:
            engine.memory.free(seqs.pop())
        after = held * (case.n_seqs // len(held))
        return BatchedMeasurement(case, prompt_s, time_generation(engine, first, case.n_gen, after))
    finally:
        for seq in seqs:
            engine.memory.free(seq)
        for checkpoint in held:
            checkpoint.release()


def _prefill(engine: Engine, seqs: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
    done = [0] * len(seqs)
    while any(n < len(prompt) for n, prompt in zip(done, prompts, strict=True)):
        chunks = []
        budget = engine.capacity.n_tokens
        for i, prompt in enumerate(prompts):
            part = _next_part(done[i], len(prompt), budget, engine.capacity.n_tokens)
            if part:
                done[i] += part
                budget -= part
                wanted = Logits.LAST if done[i] == len(prompt) else Logits.NONE
                chunks.append(Chunk(seqs[i], prompt[done[i] - part : done[i]], wanted))
        engine.step(chunks)


def _next_part(done: int, n: int, budget: int, n_ubatch: int) -> int:
    """How many of a prompt's `n` tokens come next, of which `done` were; 0 if none fit."""
    smallest = CHUNK_MULTIPLE if n_ubatch >= CHUNK_MULTIPLE else 1
    if budget < min(n - done, smallest):
        return 0
    part = next(cut(done, n - done, budget), slice(0, 0))
    return part.stop - part.start
