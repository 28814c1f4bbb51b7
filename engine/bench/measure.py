"""The measuring core: cases, their timed runs, and the check that each run did what it says.

A run starts from a checkpoint at the depth of its case, so that the depth is never timed. Tokens
are random. Generation is greedy and goes past every end-of-generation token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby

import numpy as np

from engine.engine import Engine
from engine.errors import EngineError
from engine.kvcache.sequences import Checkpoint
from engine.runtime.batch import BLOCK_POSITIONS, Chunk, Logits
from engine.runtime.scheduler import cut
from engine.sampling.params import SamplingParams

Rng = np.random.Generator


class BenchError(EngineError):
    """A measurement that can't be made, or that did not measure what it says."""


@dataclass(frozen=True)
class Case:
    """`n_seqs` sequences of `n_depth` tokens process a prompt of `n_prompt` tokens each, or with
    `is_shared` all the same one, and then generate `n_gen` each."""

    n_prompt: int = 0
    n_gen: int = 0
    n_depth: int = 0
    n_seqs: int = 1
    is_shared: bool = False

    @property
    def n_prompts(self) -> int:
        return 1 if self.is_shared else self.n_seqs

    @property
    def n_kv(self) -> int:
        """Positions that are filled beyond the depth."""
        return self.n_prompts * self.n_prompt + self.n_seqs * self.n_gen

    @property
    def name(self) -> str:
        """llama-bench's name of it, such as `pp512 @ d4096` or `pp512+tg128`."""
        sizes = {"pp": self.n_prompt, "tg": self.n_gen}
        name = "+".join(f"{kind}{n}" for kind, n in sizes.items() if n)
        return f"{name} @ d{self.n_depth}" if self.n_depth else name


@dataclass(frozen=True)
class Measurement:
    """Seconds of the prompts and of the generation of each run (0 where there is none); `experts`:
    distinct experts of each run, see `distinct_experts`, if they were counted; `test_time`: when
    the runs began, ISO 8601, UTC."""

    case: Case
    prompt_s: list[float]
    gen_s: list[float]
    test_time: str = ""
    experts: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float]:
        """Median seconds, and tokens per second at these, under llama.cpp's keys."""
        t_pp, t_tg = statistics.median(self.prompt_s), statistics.median(self.gen_s)
        case = self.case
        return {
            "t_pp": t_pp, "speed_pp": case.n_prompts * case.n_prompt / t_pp,
            "t_tg": t_tg, "speed_tg": case.n_seqs * case.n_gen / t_tg,
        }  # fmt: skip


def mean_and_deviation(samples: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which is 0 for a single sample."""
    return statistics.fmean(samples), statistics.stdev(samples) if len(samples) > 1 else 0.0


def measure(
    engine: Engine,
    cases: Sequence[Case],
    rng: Rng,
    repeats: int = 1,
    warm_up: Callable[[Case], Case] | None = None,
    on_run: Callable[[], None] = lambda: None,
    count_experts: bool = False,
) -> Iterator[Measurement]:
    """Measure cases; consecutive cases of one depth share its checkpoint. Raises BenchError.

    Before each, the case that `warm_up` makes of it runs untimed. `on_run` is called after every
    run. The engine needs `n_checkpoints` for the sequences of a case. count_experts: count distinct
    experts after each generation, in steps of their own.
    """
    for n_depth, group in groupby(cases, key=lambda case: case.n_depth):
        with processed(engine, [random_tokens(engine, n_depth, rng)]) as (_, (start,)):
            for case in group:
                if warm_up:
                    _run(engine, Measurement(warm_up(case), [], []), start, rng)
                    on_run()
                now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                m = Measurement(case, [], [], now)
                for _ in range(repeats):
                    _run(engine, m, start, rng, count_experts)
                    on_run()
                yield m


def _run(
    engine: Engine, m: Measurement, start: Checkpoint, rng: Rng, count_experts: bool = False
) -> None:
    """Append a run of a measurement's case, which continues from `start`."""
    case = m.case
    prompts = [random_tokens(engine, case.n_prompt, rng) for _ in range(case.n_prompts)]
    first = random_tokens(engine, case.n_seqs, rng)
    with processed(engine, prompts, start) as (prompt_s, ends):
        after = ends * (case.n_seqs // len(ends))
        m.prompt_s.append(prompt_s if case.n_prompt else 0.0)
        m.gen_s.append(time_generation(engine, first, case.n_gen, after) if case.n_gen else 0.0)
        if count_experts:
            m.experts.append(distinct_experts(engine, first, case.n_gen, after))


def measure_and_extend(
    engine: Engine, seq: int, n_prompt: int, n_gen: int, rng: Rng, repeats: int = 1
) -> Measurement:
    """Measure generation and then a prompt where a sequence stands; only the prompt stays in it."""
    case = Case(n_prompt, n_gen, engine.memory.n_tokens(seq))
    with _checkpoints(engine, [seq]) as after:
        gen_s, prompt_s = [], []
        for _ in range(repeats):
            gen_s.append(time_generation(engine, random_tokens(engine, 1, rng), n_gen, after))
        tokens = random_tokens(engine, n_prompt, rng)
        for _ in range(repeats):
            engine.memory.restore(seq, after[0])
            prompt_s.append(time_prompts(engine, [seq], [tokens]))
    return Measurement(case, prompt_s, gen_s)


@contextmanager
def sequences(engine: Engine, n: int, start: Checkpoint | None = None) -> Iterator[list[int]]:
    """`n` sequences, empty or continuing from a checkpoint; freed at the end."""
    seqs = [engine.memory.create() for _ in range(n)]
    try:
        if start:
            for seq in seqs:
                engine.memory.restore(seq, start)
        yield seqs
    finally:
        for seq in seqs:
            engine.memory.drop(seq)


@contextmanager
def _checkpoints(engine: Engine, seqs: Sequence[int]) -> Iterator[list[Checkpoint]]:
    taken = [engine.memory.checkpoint(seq) for seq in seqs]
    try:
        yield taken
    finally:
        for checkpoint in taken:
            checkpoint.release()


@contextmanager
def processed(
    engine: Engine, prompts: Sequence[Sequence[int]], start: Checkpoint | None = None
) -> Iterator[tuple[float, list[Checkpoint]]]:
    """Seconds to process prompts after `start`, and a checkpoint at the end of each."""
    with ExitStack() as held:
        with sequences(engine, len(prompts), start) as seqs:
            seconds = time_prompts(engine, seqs, prompts)
            ends = held.enter_context(_checkpoints(engine, seqs))
        yield seconds, ends


def random_tokens(engine: Engine, n: int, rng: Rng) -> list[int]:
    ids: list[int] = rng.integers(0, engine.model.n_vocab, n).tolist()
    return ids


def time_prompts(engine: Engine, seqs: Sequence[int], prompts: Sequence[Sequence[int]]) -> float:
    """Seconds to append a prompt to each sequence, in shared steps, with its last row's logits."""
    n_past = [engine.memory.n_tokens(seq) for seq in seqs]
    steps = list(_packed(list(zip(seqs, n_past, prompts, strict=True)), engine.capacity.n_tokens))
    start = time.perf_counter()
    for chunks in steps:
        engine.step(chunks)
    seconds = time.perf_counter() - start
    for seq, past, prompt in zip(seqs, n_past, prompts, strict=True):
        expected, n_tokens = past + len(prompt), engine.memory.n_tokens(seq)
        if n_tokens != expected:
            raise BenchError(f"expected {expected} positions after a prompt, got {n_tokens}")
    return seconds


def _packed(waiting: list[tuple[int, int, Sequence[int]]], n_ubatch: int) -> Iterator[list[Chunk]]:
    """The chunks of each step for (sequence, n_past, prompt), cut as the scheduler cuts them."""
    smallest = BLOCK_POSITIONS if n_ubatch >= BLOCK_POSITIONS else 1
    while waiting := [(seq, n_past, tokens) for seq, n_past, tokens in waiting if tokens]:
        chunks, budget = [], n_ubatch
        for i, (seq, n_past, tokens) in enumerate(waiting):
            if budget < min(len(tokens), smallest):
                continue
            n = next(cut(n_past, len(tokens), budget)).stop
            budget -= n
            chunks.append(Chunk(seq, tokens[:n], Logits.LAST if n == len(tokens) else Logits.NONE))
            waiting[i] = seq, n_past + n, tokens[n:]
        yield chunks


def time_generation(
    engine: Engine, first: Sequence[int], n: int, after: Sequence[Checkpoint | None]
) -> float:
    """Seconds to generate `n` tokens in each of several sequences at once.

    Sequence i starts from the token first[i], after checkpoint after[i] (None: from nothing).
    Raises BenchError if it ends early or takes another number of steps than n.
    """
    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    start = time.perf_counter()
    running = [engine.generate([t], params, c) for t, c in zip(first, after, strict=True)]
    while any(c.finish_reason is None for c in running) and engine.advance():
        pass
    seconds = time.perf_counter() - start
    for c in running:
        n_steps = c.timings.n_prompt + c.timings.n_eval
        if (len(c.tokens), n_steps) != (n, n):
            raise BenchError(
                f"expected {n} tokens in {n} steps, got {len(c.tokens)} in {n_steps} ({c.detail})"
            )
    return seconds


def distinct_experts(
    engine: Engine, first: Sequence[int], n: int, after: Sequence[Checkpoint]
) -> float:
    """The distinct experts that the sequences of a step choose in a layer: the mean over the layers
    with experts and `n` greedy steps, which go on as time_generation's do with the same arguments.

    Steps run one by one, and the host reads the chosen experts after each, so they are not for
    timing. The engine is one with `keep_experts`. Of X experts, of which a token uses k by chance,
    n sequences use X (1 - (1 - k / X)^n).
    """
    counts: list[int] = []
    ends = sorted(engine.tokenizer.eog_ids)
    with sequences(engine, len(first)) as seqs:
        for seq, checkpoint in zip(seqs, after, strict=True):
            engine.memory.restore(seq, checkpoint)
        tokens = list(first)
        for _ in range(n):
            logits = engine.step([Chunk(s, [t]) for s, t in zip(seqs, tokens, strict=True)])
            logits[:, ends] = -np.inf  # As ignore_eos.
            tokens = logits.argmax(axis=1).tolist()
            counts += [len(np.unique(ids)) for ids in engine.loop.kept()]
    return statistics.fmean(counts)
