"""Where the time of a step goes, by op and by layer kind, beside the work that it does.

A step is timed instruction by instruction. Instructions that share a node, as the parts of a
product with several weights do, are one entry; an entry that covers several nodes is named after
all their ops. Work is what each op's cost says: operations, and the bytes that must cross the
memory bus, those of a weight being its bytes in the file. What is between two nodes of a fused
instruction is counted too, though it may never leave a register.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from engine.backends.base import Timing
from engine.bench.measure import BenchError, random_tokens
from engine.engine import Engine
from engine.graph import Cost, Live, Node
from engine.runtime.batch import Chunk, Logits


@dataclass(frozen=True)
class Entry:
    """Nodes, the seconds that their instructions took together, and their work."""

    label: str
    backend: str
    nodes: tuple[Node, ...]
    seconds: float
    cost: Cost


@dataclass(frozen=True)
class StepProfile:
    """One step of `live.n_tokens` tokens after `n_past` positions.

    `seconds`: of the step whose entries these are, from outside; `plain_seconds`: the median of
    steps of the same kind that ran without timers.
    """

    entries: list[Entry]
    live: Live
    n_past: int
    seconds: float
    plain_seconds: float


def profile_step(
    engine: Engine, n_tokens: int, n_past: int, repeats: int, rng: np.random.Generator
) -> StepProfile:
    """Profile a step of random tokens; timed and plain ones take turns, the median is shown."""
    if n_past + n_tokens > engine.n_ctx:
        raise BenchError(
            f"{n_tokens} tokens after {n_past}: expected at most the {engine.n_ctx} positions "
            "of the context (-c)"
        )
    seq = engine.memory.create()
    if n_past:
        engine.prefill(seq, random_tokens(engine, n_past, rng), Logits.NONE)
    start = engine.memory.checkpoint(seq)
    timed: list[tuple[float, list[Timing], Live]] = []
    plain: list[float] = []
    try:
        for i in range(repeats + 1):
            chunks = [Chunk(seq, random_tokens(engine, n_tokens, rng))]
            for turn in ("plain", "timed"):
                engine.memory.restore(seq, start)
                began = time.perf_counter()
                if turn == "plain":
                    engine.step(chunks)
                    plain.append(time.perf_counter() - began)
                else:
                    timings, live = engine.run_timed(chunks)
                    timed.append((time.perf_counter() - began, timings, live))
            if i == 0:  # The first warms up.
                timed.clear()
                plain.clear()
    finally:
        start.release()
        engine.memory.free(seq)
    seconds, timings, live = sorted(timed, key=lambda t: t[0])[len(timed) // 2]
    return StepProfile(entries_of(timings, live), live, n_past, seconds, statistics.median(plain))


def entries_of(timings: Iterable[Timing], live: Live) -> list[Entry]:
    """Timings as entries, those of instructions that share nodes joined."""
    joined: list[tuple[str, str, dict[Node, None], float]] = []
    for t in timings:
        label, nodes, seconds = t.instruction.kernel, dict.fromkeys(t.instruction.nodes), t.seconds
        if nodes and joined and joined[-1][2].keys() & nodes.keys():
            _, _, before, s = joined.pop()
            nodes, seconds = before | nodes, s + seconds
        if nodes:
            label = " + ".join(dict.fromkeys(node.op.name for node in nodes))
        joined.append((label, t.backend, nodes, seconds))
    return [
        Entry(label, backend, tuple(nodes), seconds, _cost(nodes, live))
        for label, backend, nodes, seconds in joined
    ]


def _cost(nodes: Iterable[Node], live: Live) -> Cost:
    costs = [node.op.cost(node, live) for node in nodes]
    return Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs))


@dataclass(frozen=True)
class Row:
    """Entries of one kind, added up; `n` counts entries."""

    name: str
    n: int
    seconds: float
    flops: int
    bytes: int


def by_op(profile: StepProfile) -> list[Row]:
    """A row for each op, or fusion of ops, that which took longest first."""
    return _rows({e: e.label for e in profile.entries})


def by_layer_kind(profile: StepProfile, layer_kinds: Mapping[str, str]) -> list[Row]:
    """A row for each kind of layer; what belongs to none comes under its node's name."""
    names = {}
    for e in profile.entries:
        first = e.nodes[0] if e.nodes else None
        kind = layer_kinds.get(first.layer) if first else None
        names[e] = kind or (f"({first.name if first else e.label})")
    return _rows(names)


def _rows(names: Mapping[Entry, str]) -> list[Row]:
    groups: dict[str, list[Entry]] = {}
    for entry, name in names.items():
        groups.setdefault(name, []).append(entry)
    rows = [
        Row(
            name,
            len(entries),
            sum(e.seconds for e in entries),
            sum(e.cost.flops for e in entries),
            sum(e.cost.bytes for e in entries),
        )
        for name, entries in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.seconds)
