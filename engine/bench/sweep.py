"""Prompt and generation speed at every depth of the context, as ik_llama.cpp's sweep-bench.

A row measures after N_KV positions: first generation, which goes on from a checkpoint in a sequence
of its own, then a prompt, which stays and makes the depth of the next row. So the swept sequence
holds nothing but prompts, and its recurrent state is that of its N_KV tokens exactly.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.bench.measure import random_tokens, time_generation, time_prompt
from engine.engine import Engine

COLUMNS = ("PP", "TG", "N_KV", "T_PP s", "S_PP t/s", "T_TG s", "S_TG t/s")
TABLE_HEAD = (
    "|    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |\n"
    "|-------|--------|--------|----------|----------|----------|----------|"
)
_N_WARM_UP = 4


@dataclass(frozen=True)
class Row:
    """Seconds for a prompt of `pp` tokens, and to generate `tg`, each after `n_kv` positions."""

    pp: int
    tg: int
    n_kv: int
    t_pp: float
    t_tg: float

    @property
    def speed_pp(self) -> float:
        """Prompt tokens per second."""
        return self.pp / self.t_pp

    @property
    def speed_tg(self) -> float:
        """Generated tokens per second."""
        return self.tg / self.t_tg


def table_line(row: Row) -> str:
    """A row of the table that TABLE_HEAD begins."""
    return (
        f"|{row.pp:6d} | {row.tg:6d} | {row.n_kv:6d} | {row.t_pp:8.3f} | {row.speed_pp:8.2f} "
        f"| {row.t_tg:8.3f} | {row.speed_tg:8.2f} |"
    )


def depths(n_kv_max: int, n_prompt: int) -> range:
    """The N_KV of the rows."""
    return range(0, n_kv_max, n_prompt)


def context_needed(n_kv_max: int, n_prompt: int, n_gen: int) -> int:
    """Positions of memory for a sweep: the last row's prompt and generation lie past its N_KV."""
    return depths(n_kv_max, n_prompt)[-1] + n_prompt + n_gen


def measure_row(
    engine: Engine, seq: int, n_prompt: int, n_gen: int, repeats: int, rng: np.random.Generator
) -> Row:
    """Measure where a sequence stands, medians of `repeats`; it is left `n_prompt` tokens longer.

    Needs a state slot and a block beyond those of the sequence, as `n_checkpoints` 1 gives.
    """
    memory, n_kv = engine.memory, engine.memory.n_tokens(seq)
    start = memory.checkpoint(seq)
    try:
        t_tg = [
            time_generation(engine, random_tokens(engine, 1, rng), n_gen, [start])
            for _ in range(repeats)
        ]
        tokens = random_tokens(engine, n_prompt, rng)
        t_pp = []
        for _ in range(repeats):
            memory.restore(seq, start)
            t_pp.append(time_prompt(engine, seq, tokens))
    finally:
        start.release()
    return Row(n_prompt, n_gen, n_kv, statistics.median(t_pp), statistics.median(t_tg))


def sweep(
    engine: Engine,
    seq: int,
    n_kv_max: int,
    n_prompt: int,
    n_gen: int,
    rng: np.random.Generator,
    repeats: int = 1,
) -> Iterator[Row]:
    """Measure rows one by one on an empty sequence, which grows by `n_prompt` with each.

    The engine needs the positions of `context_needed`.
    """
    assert engine.memory.n_tokens(seq) == 0, seq
    for _ in depths(n_kv_max, n_prompt):
        yield measure_row(engine, seq, n_prompt, n_gen, repeats, rng)


def warm_up(engine: Engine, n_prompt: int, n_gen: int, rng: np.random.Generator) -> None:
    """A prompt and a few generated tokens, on a sequence that is thrown away."""
    seq = engine.memory.create()
    try:
        measure_row(engine, seq, n_prompt, min(n_gen, _N_WARM_UP), 1, rng)
    finally:
        engine.memory.free(seq)


def sequence_bytes(engine: Engine, n_tokens: int) -> tuple[int, int]:
    """Bytes of recurrent state and of KV cache that a sequence of `n_tokens` fills."""
    state, kv = engine.plan.graph.state_bytes()
    capacity = engine.capacity
    per_position = kv // (capacity.n_blocks * capacity.block_size)
    return state // capacity.n_slots, per_position * n_tokens
