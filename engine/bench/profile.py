"""Where the time of a step goes, by op and by layer kind, beside the work that it does.

A step is timed instruction by instruction. Consecutive instructions that share a node are one
entry, named after the ops of all its nodes. Work is the ops' own cost: a weight counts with its
bytes in the file, and tensors between two nodes of a fused instruction count too.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from engine.backends.base import Timing
from engine.bench.measure import BenchError, Rng, processed, random_tokens, sequences
from engine.engine import Engine
from engine.graph import Cost, Live, Node
from engine.runtime.batch import Chunk


@dataclass(frozen=True)
class Entry:
    """Nodes, the seconds that their instructions took together, and their work on the live rows;
    `flops`: that of each op, by name."""

    label: str
    backend: str
    nodes: tuple[Node, ...]
    seconds: float
    cost: Cost
    flops: Mapping[str, int]

    @property
    def name(self) -> str:
        return self.nodes[0].name if self.nodes else self.label


@dataclass(frozen=True)
class StepProfile:
    """One step of `live.n_tokens` tokens after `n_past` positions, which took `seconds`;
    `plain_seconds`: the median of such steps without timers."""

    entries: list[Entry]
    live: Live
    n_past: int
    seconds: float
    plain_seconds: float


def profile_step(
    engine: Engine,
    n_tokens: int,
    n_past: int,
    repeats: int,
    rng: Rng,
    on_run: Callable[[], object] = lambda: None,
) -> StepProfile:
    """Profile a step of random tokens: the one of median duration out of `repeats`, after one to
    warm up. `on_run` is called when the `n_past` tokens are there, and after every step."""
    if n_past + n_tokens > engine.n_ctx:
        raise BenchError(
            f"{n_tokens} tokens after {n_past}: expected at most the {engine.n_ctx} positions "
            "of the context (-c)"
        )
    timed: list[tuple[float, list[Timing], Live]] = []
    plain: list[float] = []
    past = [random_tokens(engine, n_past, rng)]
    with processed(engine, past) as (_, (start,)), sequences(engine, 1) as (seq,):
        on_run()
        for _ in range(repeats + 1):
            chunks = [Chunk(seq, random_tokens(engine, n_tokens, rng))]
            engine.memory.restore(seq, start)
            began = time.perf_counter()
            engine.step(chunks)
            plain.append(time.perf_counter() - began)
            on_run()
            engine.memory.restore(seq, start)
            began = time.perf_counter()
            timings, live = engine.run_timed(chunks)
            timed.append((time.perf_counter() - began, timings, live))
            on_run()
    seconds, timings, live = sorted(timed[1:], key=lambda t: t[0])[repeats // 2]
    median = statistics.median(plain[1:])
    return StepProfile(entries_of(timings, live), live, n_past, seconds, median)


def entries_of(timings: Iterable[Timing], live: Live) -> list[Entry]:
    """Timings as entries: those of consecutive instructions that share nodes are joined."""
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
        Entry(label, backend, tuple(nodes), s, *_work(nodes, live))
        for label, backend, nodes, s in joined
    ]


def _work(nodes: Iterable[Node], live: Live) -> tuple[Cost, dict[str, int]]:
    """The cost of some nodes, and the operations of each op."""
    costs = [(node.op.name, node.op.cost(node, live)) for node in nodes]
    return _total([cost for _, cost in costs]), _added((op, c.flops) for op, c in costs)


def _added(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums = Counter[str]()
    for name, n in pairs:
        sums[name] += n
    return dict(sums)


def _total(costs: Sequence[Cost]) -> Cost:
    return Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs))


@dataclass(frozen=True)
class Row:
    """The sums over `n` entries; `flops_of`: those of each op, by name."""

    name: str
    n: int
    seconds: float
    flops: int
    bytes: int
    flops_of: Mapping[str, int]

    @classmethod
    def of(cls, name: str, entries: Sequence[Entry]) -> Row:
        seconds, cost = sum(e.seconds for e in entries), _total([e.cost for e in entries])
        flops_of = _added(pair for e in entries for pair in e.flops.items())
        return cls(name, len(entries), seconds, cost.flops, cost.bytes, flops_of)


def by_op(profile: StepProfile) -> list[Row]:
    return _rows((e.label, e) for e in profile.entries)


def by_layer_kind(profile: StepProfile, layer_kinds: Mapping[str, str]) -> list[Row]:
    """A row for each kind of layer, and for each node outside of layers; the longest first."""
    kinds = [layer_kinds.get(e.nodes[0].layer) if e.nodes else None for e in profile.entries]
    pairs = zip(kinds, profile.entries, strict=True)
    return _rows((kind or f"({e.name})", e) for kind, e in pairs)


def _rows(named: Iterable[tuple[str, Entry]]) -> list[Row]:
    groups: dict[str, list[Entry]] = {}
    for name, entry in named:
        groups.setdefault(name, []).append(entry)
    rows = [Row.of(name, entries) for name, entries in groups.items()]
    return sorted(rows, key=lambda row: -row.seconds)
