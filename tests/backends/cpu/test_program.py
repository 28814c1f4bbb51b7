"""Programs of the CPU backend: where buffers lie, and which instructions wait for which.

For random splits and for those of models: what is alive at the same time doesn't overlap, and
instructions between two barriers neither read nor write what another of them writes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import Engine
from engine.backends.cpu.backend import CpuBackend
from engine.backends.cpu.fusion import FUSIONS
from engine.backends.cpu.lower import CpuCall, Lowering
from engine.backends.native import library as cpu_library
from engine.backends.native.buffers import ALIGNMENT, Arena, Scratch, place_buffers
from engine.backends.native.fusion import Readers, match_fusions
from engine.formats.quants import F32, WEIGHT_TYPES
from engine.graph import Capacity, Dim, Graph, Kind, Live, Node, Tensor
from engine.ops.add_rms_norm import add_rms_norm
from engine.ops.mul_mat import mul_mat
from engine.ops.swiglu import swiglu
from engine.placement.place import Plan, place
from engine.runtime.executor import Executable
from tests.support.opcase import RawWeights
from tests.support.presets import TINY
from tools.randblocks import TYPES, generator, random_blocks

Buffers = list[tuple[Hashable, int, int, int]]
WIDTH = 64

buffers = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 40), st.integers(0, 12)), max_size=40
).map(lambda drawn: [(i, n, first, first + life) for i, (n, first, life) in enumerate(drawn)])


@given(buffers)
@settings(max_examples=200, deadline=None)
def test_buffers_alive_together_do_not_overlap(wanted: Buffers) -> None:
    arena = Arena()
    arena.plan(wanted)
    assert arena.offsets.keys() == {key for key, *_ in wanted}
    for key, n, _, _ in wanted:
        assert arena.offsets[key] % ALIGNMENT == 0
        assert arena.offsets[key] + n <= arena.size
    for (a, n_a, first_a, last_a), (b, n_b, first_b, last_b) in combinations(wanted, 2):
        if first_a <= last_b and first_b <= last_a:
            at_a, at_b = arena.offsets[a], arena.offsets[b]
            assert at_a + n_a <= at_b or at_b + n_b <= at_a, (a, b)
    # No more than if nothing was shared.
    assert arena.size <= sum(-(-n // ALIGNMENT) * ALIGNMENT for _, n, _, _ in wanted)


@given(buffers)
@settings(max_examples=200, deadline=None)
def test_buffers_lie_at_the_lowest_offset_that_is_free(wanted: Buffers) -> None:
    """The definition, tried offset by offset: the largest first, those of one size in order."""
    arena, placed = Arena(), dict[Hashable, tuple[int, int]]()
    arena.plan(wanted)
    for key, n, first, last in sorted(wanted, key=lambda b: b[1], reverse=True):
        size = -(-n // ALIGNMENT) * ALIGNMENT
        others = [placed[k] for k, _, f, u in wanted if k in placed and f <= last and first <= u]
        offset = 0
        while any(offset < end and begin < offset + size for begin, end in others):
            offset += ALIGNMENT
        placed[key] = offset, offset + size
        assert arena.offsets[key] == offset


def test_buffers_that_follow_each_other_share_memory() -> None:
    arena = Arena()
    arena.plan([("a", 100, 0, 1), ("b", 128, 2, 3), ("c", 64, 1, 2), ("d", 10, 4, 4)])
    assert arena.offsets == {"a": 0, "b": 0, "c": 128, "d": 0}
    assert arena.size == 192


def lowered(graph: Graph, matrix: bool = False) -> Lowering:
    readers = Readers(graph.nodes, graph.outputs.values())
    lowering = Lowering(cpu_library.load(), readers, matrix)
    for fusion, nodes in match_fusions(graph.nodes, readers, FUSIONS):
        if fusion:
            fusion.lower(lowering, nodes)
        else:
            lowering.add(nodes[0])
    return lowering


def touched(call: CpuCall) -> tuple[set[Any], set[Any]]:
    """Memory that an instruction reads and writes, by whom it belongs to."""
    owners = [r.base if isinstance(r, Tensor) else r for r in call.operands]
    states = {t for node in call.nodes for t in node.written} & set(owners)
    written = {o for o in owners[: call.n_writes] if o is not None} | states
    return {o for o in owners[call.n_writes :] if o is not None} | states, written


def check_barriers(calls: list[CpuCall]) -> None:
    """Of two instructions of a phase, neither touches what the other writes."""
    phases = [call.phase for call in calls]
    assert phases == sorted(phases)
    assert set(phases) == set(range(len(set(phases))))
    for a, b in combinations(calls, 2):
        if a.phase == b.phase:
            (read_a, written_a), (read_b, written_b) = touched(a), touched(b)
            shared = written_a & (read_b | written_b) | written_b & read_a
            assert not shared, (a.kernel, a.nodes, b.kernel, b.nodes)


def check_arena(lowering: Lowering) -> None:
    """Every activation is somewhere, and nothing else is there in any phase in which it is."""
    arena = Arena()
    place_buffers(((c.phase, c.nodes, c.operands) for c in lowering.calls), arena)
    phases: dict[Any, list[int]] = {}
    for call in lowering.calls:
        for ref in call.operands:
            owner = ref.base if isinstance(ref, Tensor) else ref
            if isinstance(owner, Scratch) or (owner and owner.kind is Kind.ACTIVATION):
                phases.setdefault(owner, []).append(call.phase)
    assert arena.offsets.keys() == phases.keys()
    for a, b in combinations(phases, 2):
        if min(phases[a]) <= max(phases[b]) and min(phases[b]) <= max(phases[a]):
            at_a, at_b = arena.offsets[a], arena.offsets[b]
            assert at_a + a.nbytes <= at_b or at_b + b.nbytes <= at_a, (a, b)


def random_graph(rng: np.random.Generator, n_nodes: int) -> tuple[Graph, Tensor]:
    """Nodes that read random activations made before them, some through views."""
    graph = Graph(Capacity(8))
    first = Tensor("x", (Dim(8, "n_tokens"), WIDTH), F32, Kind.ACTIVATION)
    made = [first]
    norm = graph.weight("norm", (WIDTH,), F32)

    def drawn() -> Tensor:
        return made[rng.integers(max(0, len(made) - 6), len(made))]

    for i in range(n_nodes):
        match rng.integers(4):
            case 0:
                made += add_rms_norm(graph, f"n{i}", drawn(), drawn(), norm, 1e-6)
            case 1:
                dtype = WEIGHT_TYPES[str(rng.choice(["Q8_0", "F32"]))]
                w = graph.weight(f"w{i}.{dtype}", (2 * WIDTH, WIDTH), dtype)
                (wide,) = mul_mat(graph, f"n{i}", drawn(), w)
                made += [wide.slice(1, 0, WIDTH), wide.slice(1, WIDTH, 2 * WIDTH)]
            case 2:
                sizes = [graph.weight(f"w{i}.{j}", (WIDTH, WIDTH), F32) for j in range(2)]
                made += mul_mat(graph, f"n{i}", drawn(), *sizes)
            case _:
                made += swiglu(graph, f"n{i}", (drawn(), drawn()), (drawn(), drawn()))
    graph.outputs = {"last": graph.nodes[-1].outputs[0]}
    return graph, first


@pytest.mark.parametrize("n_nodes", [1, 5, 20, 60])
def test_random_splits(rng: np.random.Generator, n_nodes: int) -> None:
    for _ in range(10):
        graph, _ = random_graph(rng, n_nodes)
        lowering = lowered(graph)
        check_barriers(lowering.calls)
        check_arena(lowering)


@pytest.mark.parametrize("preset", TINY)
def test_splits_of_models(models: Callable[[str, str], Path], preset: str) -> None:
    with Engine.load(models(preset, "Q8_0"), backend="reference", n_ubatch=64) as engine:
        lowering = lowered(engine.plan.graph)
    check_barriers(lowering.calls)
    check_arena(lowering)
    # Independent products and halves of the same node don't wait for each other.
    assert lowering.calls[-1].phase < len(lowering.calls) - 1


def test_an_activation_is_made_int8_once_for_all_products(tiny: Path) -> None:
    with Engine.load(tiny, backend="reference") as engine:
        calls = lowered(engine.plan.graph).calls
    made = [c.operands[3] for c in calls if c.kernel == "QUANTIZE_ROWS"]
    keys = {(t.base, t.offset, t.shape, t.strides) for t in made if isinstance(t, Tensor)}
    assert len(keys) == len(made) > 0


def weights_of(graph: Graph, seed: int) -> dict[str, Any]:
    """Random bytes of a graph's weights."""
    raw = {}
    for i, (name, t) in enumerate(graph.weights.items()):
        n_blocks = t.nbytes // t.dtype.block_bytes
        raw[name] = random_blocks(TYPES[t.dtype.name], n_blocks, 0.1, generator(seed, i))
    return raw


def plan_of(graph: Graph, n_threads: int) -> tuple[Plan, CpuBackend]:
    backend = CpuBackend(n_threads)
    return place(graph, [backend], strict=True), backend


@pytest.mark.parametrize("n_threads", [1, 3])
def test_watched_nodes_are_those_that_ran(rng: np.random.Generator, n_threads: int) -> None:
    """Node by node, every output is there when its node ran, and computes the same in the end."""
    graph, first = random_graph(rng, 40)
    seed, live, x = int(rng.integers(1000)), Live(5, 1, 1), rng.normal(size=(5, WIDTH))
    plan, backend = plan_of(graph, n_threads)
    executable = Executable(plan, RawWeights(weights_of(graph, seed)))
    seen: dict[Node, list[Any]] = {}

    def watch(node: Node, outputs: Any) -> None:
        assert [o.shape for o in outputs] == [live.shape(t.shape) for t in node.outputs]
        seen[node] = [o.copy() for o in outputs]

    backend.write(first, x)
    want = executable.run({}, live)["last"]
    got = executable.run({}, live, watch)["last"]
    assert got.tobytes() == want.tobytes()
    assert list(seen) == graph.nodes
    assert seen[graph.nodes[-1]][0].tobytes() == want.tobytes()
    # Where every tensor is kept, none is overwritten: what was seen is what was computed.
    plan, backend = plan_of(graph, 1)
    plan.splits[0].keeps[:] = [t for node in graph.nodes for t in node.outputs]
    keeping = Executable(plan, RawWeights(weights_of(graph, seed)))
    backend.write(first, x)
    keeping.run({}, live)
    for node, outputs in seen.items():
        for tensor, values in zip(node.outputs, outputs, strict=True):
            assert backend.read(tensor).tobytes() == values.tobytes(), node


def test_timings_are_of_every_instruction_and_change_nothing(rng: np.random.Generator) -> None:
    graph, first = random_graph(rng, 30)
    live, x = Live(8, 1, 1), rng.normal(size=(8, WIDTH))
    plan, backend = plan_of(graph, 2)
    executable = Executable(plan, RawWeights(weights_of(graph, 1)))
    backend.write(first, x)
    want = executable.run({}, live)["last"]
    timings = [t for t in executable.run_timed({}, live) if t.backend]
    assert len(timings) == len(lowered(graph, backend.matrix).calls)
    assert all(t.seconds >= 0 for t in timings)
    assert backend.read(graph.outputs["last"]).tobytes() == want.tobytes()
