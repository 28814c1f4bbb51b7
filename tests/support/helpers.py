"""Shared by tests of the engine: a float64 engine, random tokens, comparisons, broken nodes.

For tests of the command line: the result of a run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import Engine
from engine.backends.cpu.backend import CpuProgram
from engine.backends.native import library as cpu_library
from engine.backends.reference import ReferenceBackend
from engine.graph import Live
from engine.kvcache.prefix import PrefixTree
from engine.sampling.params import SamplingParams
from engine.sampling.recent import Breakers
from engine.sampling.steps import SAMPLERS, Candidates, Context
from tools import model_table
from tools.presets import PRESETS

# The line that says what a run uses.
SUMMARY = re.compile(
    r"^.+: .+; context \d+.*; .+ [MG]iB \(weights .+\)( on the device)?; prefix cache .+\n", re.M
)
# Weights this large make logits of order one, so that a wrong state moves them visibly.
STD = 0.1
N_VOCAB = 320
HEADER_VOCAB = 512
# Two float64 engines differ by the rounding of logits to float32: 1e-15. Another token at the start
# of a prompt changes logits by 1e-3 a hundred tokens later.
MAX_NMSE = 1e-12
MAX_REFUSAL_SECONDS = 2


def float64_engine(path: Path, **options: Any) -> Engine:
    """An engine that computes and keeps its states in float64.

    Random models amplify rounding: where q·k happens to be almost 0, the norm of the delta net's
    output turns float32 noise into 1e-9 and more of the logits, and comparisons could only be lax.
    """
    return engine_on(ReferenceBackend(np.float64), path, **options)


def engine_on(backend: ReferenceBackend, path: Path, **options: Any) -> Engine:
    """An engine on a numpy backend, which keeps its states in float64."""
    with patch("engine.backends.create", lambda *options: [backend]):
        engine = Engine.load(path, **options)
    store: Any = engine.plan.backends[0].states
    arrays = store.arrays
    for tensor, array in arrays.items():
        # Not `astype`: that would write, and so take, all the memory that a cache may ever fill.
        arrays[tensor] = np.zeros(array.shape)
    return engine


# Options of the CPU backend with which a row is computed the same way wherever it is in a batch:
# all rows are rounded to int8, and no row tiles to bfloat16 by matrix units.
ROW_BY_ROW: dict[str, Any] = {
    "cpu_isa": next(isa for isa in cpu_library.usable() if isa != "amx"), "activations": 8,
}  # fmt: skip
# Backends whose logits are the same however tokens are cut and mixed: to 1e-15, and exactly.
EXACT = ("float64", "cpu")


def exact_engine(backend: str, path: Path, **options: Any) -> Engine:
    """An engine on a backend of EXACT."""
    if backend == "float64":
        return float64_engine(path, **options)
    return Engine.load(path, backend=backend, strict_backend=True, **ROW_BY_ROW, **options)


def random_ids(rng: np.random.Generator, n: int) -> list[int]:
    return rng.integers(0, N_VOCAB, n).tolist()


def nmse(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """‖got − expected‖² / ‖expected‖²; NaN if either has one."""
    assert got.shape == expected.shape
    expected = expected.astype(np.float64)
    return float(np.sum((got - expected) ** 2) / np.sum(expected**2))


def assert_same(got: NDArray[Any], expected: NDArray[Any]) -> None:
    error = nmse(got, expected)
    # Not `error > …`: NaN must fail.
    assert error <= MAX_NMSE, f"NMSE {error:.1e}, at most {MAX_NMSE:g} expected"


def assert_cache_adds_up(engine: Engine) -> None:
    """What the prefix cache counts is what it holds, and no more than it may."""
    n_states, n_bytes = engine.cache.n_states, engine.cache.n_bytes  # Ends what was forgotten.
    cache: Any = engine.cache._cache
    nodes = list(cache._entries)
    entries = [node.kept for node in nodes]
    assert {entry.seq for entry in entries} == cache._nodes.keys()
    assert len(entries) == n_states
    held = [entry for entry in entries if entry.seq in cache._seqs]
    assert len(held) == len(cache._seqs)
    assert all(entry.seq in cache._seqs or entry.stored for entry in entries)
    tables = [cache.memory.allocation(entry.seq).table for entry in held]
    blocks = Counter(block for table in tables for block in table.blocks)
    assert blocks == cache._blocks
    logits = [entry.logits for entry in entries if entry.logits is not None]
    assert sum(map(len, logits)) == cache._n_logits
    for node, entry in zip(nodes, entries, strict=True):
        assert node.end == len(node.path) // 4
        if entry in held:
            assert cache.memory.n_tokens(entry.seq) == node.end
        assert all(text.kept.node is node for text in entry.texts)
    texts = [text for entry in entries for text in entry.texts]
    assert sorted(map(id, texts)) == sorted(map(id, cache._texts))
    sizes = sum(map(edge_bytes, (cache._entries, cache._texts)))
    room = cache.room
    kept = len(held) * room.state_bytes + len(blocks) * room.block_bytes
    kept = kept if cache.tier is None else cache.tier.n_bytes
    assert kept + 4 * cache._n_logits + sizes == n_bytes <= engine.cache.budget


def edge_bytes(tree: PrefixTree[Any]) -> int:
    """Bytes of all edges of a tree."""
    edges, left = 0, [tree._root]
    while left:
        node = left.pop()
        edges += len(node.edge)
        left += node.children.values()
    return edges


def assert_all_free(engine: Engine) -> None:
    """Nothing holds memory but the prefix cache, which adds up, and is emptied."""
    assert_cache_adds_up(engine)
    engine.cache.clear()
    assert engine.cache.n_bytes == 0
    for pool in (engine.memory.blocks, engine.memory.slots):
        assert pool.n_free == pool.size, f"{pool.n_free} of {pool.size} are free"


def apply_sampler(
    name: str,
    c: Candidates,
    *,
    recent: Sequence[int] = (),
    breakers: Breakers | None = None,
    rng: Any = None,
    **params: Any,
) -> Candidates:
    """What a sampler of a chain leaves of candidates: all of them if `params` switch it off."""
    resolved = SamplingParams(**params).resolved({})
    context = Context(rng, breakers or {}, list(recent))
    sampler = SAMPLERS[name]
    return c if sampler.is_off(resolved) else sampler.apply(c, resolved, context)


@contextmanager
def replaced_op(engine: Engine, node_name: str, reference: Callable[..., Any]) -> Iterator[None]:
    """Inside this context, a node of the reference backend computes `reference` instead."""
    node = next(node for node in engine.plan.graph.nodes if node.name == node_name)
    op = node.op
    object.__setattr__(node, "op", replace(op, reference=reference))
    try:
        yield
    finally:
        object.__setattr__(node, "op", op)


@contextmanager
def failing_at(engine: Engine, node_name: str, error: type[BaseException]) -> Iterator[None]:
    """Inside this context, steps raise `error` at a node, after the nodes before it ran."""

    def broken(**operands: Any) -> Any:
        raise error

    def broken_program(program: CpuProgram, live: Live, watch: Any = None) -> None:
        (begin,) = (at.start for node, at in program._spans.items() if node.name == node_name)
        program._backend.run(program._program[:begin], live)
        raise error

    if engine.config.backend == "cpu":
        with patch.object(CpuProgram, "run", broken_program):
            yield
    else:
        with replaced_op(engine, node_name, broken):
            yield


def write_header(path: Path, preset: str) -> Path:
    """A GGUF of a preset's shapes in Q4_0, without weights; see tools/model_table.py."""
    return model_table.write_header(path, replace(PRESETS[preset], n_vocab=HEADER_VOCAB), "Q4_0")


def without_summary(err: str) -> str:
    """A command's standard error without the lines of engine/commands/summary.py."""
    return SUMMARY.sub("", err)


class Result(NamedTuple):
    """The result of a command; `err`: its standard error without the summary."""

    status: int
    out: str
    err: str

    @classmethod
    def of(
        cls,
        main: Callable[[list[str]], Any],
        argv: Sequence[object],
        capsys: pytest.CaptureFixture[str],
    ) -> Result:
        """Call a command's `main` in this process."""
        try:
            status = main([str(arg) for arg in argv])
        except SystemExit as stopped:
            status = stopped.code
        out, err = capsys.readouterr()
        return cls(status, out, without_summary(err))

    def refused(self) -> str:
        """The error message; asserts status 1 and one line on standard error, nothing else."""
        assert (self.status, self.out) == (1, ""), self
        assert self.err.startswith("error: "), self
        assert self.err.endswith("\n"), self
        line = self.err.removeprefix("error: ").removesuffix("\n")
        # Other separators that a terminal takes for a line's end are not printable either.
        assert line.isprintable(), self
        return line


Cli = Callable[..., Result]
Refused = Callable[..., str]
