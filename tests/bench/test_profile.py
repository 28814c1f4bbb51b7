"""profile: times add up to the step, and work agrees with a count by hand."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from engine import Engine
from engine.backends.base import Instruction, Limits, Timing
from engine.backends.cpu.backend import CpuBackend
from engine.backends.native import library as cpu_library
from engine.bench.profile import Row, by_layer_kind, by_op, entries_of, profile_step
from engine.commands.profile import _cells
from engine.graph import Live, Node
from tests.support.helpers import Cli
from tests.support.timing import judge

Rng = np.random.Generator
PEAKS = {"float32": 4e9, "int8": 9e9}
# Products of an instruction of each unit, and instructions of a turn: float32, int8 dot, bfloat16
# dot, int8 tiles, bfloat16 tiles; (0, 0) for those that it lacks.
_DOTS, _NONE = (64, 12), (0, 0)
UNITS_OF = {
    "amx": ((16, 12), _DOTS, (32, 12), (16 * 16 * 64, 4), (16 * 16 * 32, 4)),
    "avx512": ((16, 12), _DOTS, _NONE, _NONE, _NONE),
    "avx2": ((8, 12), (32, 12), _NONE, _NONE, _NONE),
    "portable": ((4, 12), _NONE, _NONE, _NONE, _NONE),
}


@pytest.mark.timing
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("n_tokens", "n_past"), [(1, 0), (1, 100), (150, 70)])
def test_times_add_up_to_the_step(
    path: Path, rng: Rng, n_tokens: int, n_past: int, backend: str
) -> None:
    with Engine.load(path, backend=backend, n_ctx=256, n_ubatch=256) as engine:

        def covered() -> float:
            """The share of a step's time that its entries cover."""
            profile = profile_step(engine, n_tokens, n_past, 5, rng)
            total = sum(e.seconds for e in profile.entries)
            assert total <= profile.seconds
            for rows in (by_op(profile), by_layer_kind(profile, engine.plan.graph.layer_kinds)):
                assert math.isclose(sum(row.seconds for row in rows), total)
                assert [r.seconds for r in rows] == sorted((r.seconds for r in rows), reverse=True)
            # On the reference backend, "everything else" is the Python around the nodes.
            rest = sum(e.seconds for e in profile.entries if e.label == "everything else")
            return (total - (rest if backend == "reference" else 0)) / profile.seconds

        # Another process may run between the last timer and the clock around all timers.
        judge(f"{path.stem}, {n_tokens} tokens, past {n_past}, {backend}: share", covered, 0.95)


@pytest.mark.timing
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_timers_cost_little(tiny: Path, rng: Rng, backend: str) -> None:
    with Engine.load(tiny, backend=backend, n_ctx=512) as engine:

        def timed_to_plain() -> float:
            profile = profile_step(engine, 256, 0, 9, rng)
            return profile.seconds / profile.plain_seconds

        judge(f"{backend}: timed step to plain step", timed_to_plain, 0.5, 2)


def test_every_node_is_in_one_entry(path: Path, rng: Rng) -> None:
    with Engine.load(path, n_ctx=64) as engine:
        profile = profile_step(engine, 3, 0, 1, rng)
        covered = [node for e in profile.entries for node in e.nodes]
        assert covered == engine.plan.graph.nodes


def test_a_profile_frees_its_memory(tiny: Path, rng: Rng) -> None:
    with Engine.load(tiny, n_ctx=64) as engine:
        free = engine.memory.blocks.n_free, engine.memory.slots.n_free
        profile_step(engine, 5, 7, 2, rng)
        assert (engine.memory.blocks.n_free, engine.memory.slots.n_free) == free


def test_bytes_agree_with_a_hand_count(tiny: Path, cli: Cli) -> None:
    """A product and the delta rule of layer 0 of the tiny model, generating one token.

    Its embedding is 128 wide; layer 0 has 2 key heads and 4 value heads of 32.
    """
    status, out, _ = cli("profile", "-m", tiny, "-n", 1, "-o", "json")
    assert status == 0
    document = json.loads(out)
    entries = {e["nodes"][0]: e for e in document["entries"] if e["nodes"]}
    with Engine.load(tiny) as engine:
        nodes = {node.name: node for node in engine.plan.graph.nodes}
        product = next(
            n for n in nodes.values() if n.op.name == "MUL_MAT" and n.name.startswith("blk.0.")
        )
        rule = nodes["blk.0.gated_delta_net"]
    weights = [t for name, t in product.inputs.items() if name.startswith("weight")]
    n_in = product.inputs["x"].shape[1]
    # A block of Q8_0 is 32 weights of a byte and a scale of two.
    stored = {"Q8_0": n_in // 32 * 34, "F32": n_in * 4}
    by_hand = sum(w.shape[0] * (stored[w.dtype.name] + 4) for w in weights) + n_in * 4
    assert entries[product.name]["bytes"] == by_hand

    (_, n_k, d_k), (_, n_v, d_v) = rule.inputs["q"].shape, rule.inputs["v"].shape
    state = n_v * d_v * d_k * 4
    operands = 4 * (2 * n_k * d_k + 2 * n_v * d_v + 2 * n_v)  # q, k; v, out; g, beta
    indices = 4 * (2 + 1 + 1)  # seq_starts, state_src, state_dst; no snapshots
    assert entries[rule.name]["bytes"] == 2 * state + operands + indices


def node_named(engine: Engine, name: str) -> Node:
    return next(node for node in engine.plan.graph.nodes if node.name == name)


def test_parts_of_a_node_and_fused_nodes_are_one_entry(tiny: Path) -> None:
    with Engine.load(tiny) as engine:
        norm, product, conv = engine.plan.graph.nodes[1:4]
    timings = [
        Timing("x", Instruction("q8", (product,)), 1.0),
        Timing("x", Instruction("f32", (product,)), 2.0),
        Timing("x", Instruction("both", (conv, norm)), 4.0),
    ]
    live = Live(n_tokens=2, n_seqs=1, n_outputs=1)
    first, second = entries_of(timings, live)
    assert (first.label, first.seconds, first.nodes) == (product.op.name, 3.0, (product,))
    assert first.cost == product.op.cost(product, live)
    assert second.label == f"{conv.op.name} + {norm.op.name}"
    assert second.cost.flops == sum(n.op.cost(n, live).flops for n in (conv, norm))


def test_limits_are_those_of_a_machine() -> None:
    """Every machine reads between 0.5 GB/s and 10 TB/s from memory."""
    limits = CpuBackend(2).measure_limits()
    assert 0.5e9 < limits.bytes_per_s < 1e13
    assert all(1e8 < rate < 1e16 for rate in limits.ops_per_s.values())
    assert {*limits.unit_of.values()} <= limits.ops_per_s.keys()


@pytest.mark.parametrize(("isa", "units"), UNITS_OF.items())
def test_the_units_of_an_instruction_set(isa: str, units: tuple[tuple[int, int], ...]) -> None:
    """Each counts the operations of its tasks by hand, whatever becomes of their sums."""
    if isa not in cpu_library.usable():
        pytest.skip(f"no {isa} here")
    backend = CpuBackend(1, isa)
    for unit, (width, chains) in enumerate(units):
        operations, seconds = backend.peak_probe(unit, 100)
        assert operations == 8 * 100 * chains * 2 * width
        assert seconds > 0 or not width


def test_rows_are_compared_with_the_peaks_of_their_units(tiny: Path) -> None:
    """Two products at 6e9 a second and their norm at 1e9 take a third of what they took."""
    limits = Limits(1e9, {"float32": 1e9, "int8": 6e9}, "", {"MUL_MAT": "int8"})
    work = {"MUL_MAT": 6_000_000, "ADD_RMS_NORM": 1_000_000}
    assert math.isclose(limits.least_s(work), 2e-3)
    row = Row("NODES", 3, 6e-3, flops=7_000_000, bytes=1_500_000, flops_of=work)
    cells = _cells(row, total_s=12e-3, limits=limits)
    assert cells == ("3", "6.000", "50.0%", "1.50", "0.25", "25.0%", "0.007", "1.2", "33.3%")


def test_what_is_faster_than_memory_was_in_a_cache() -> None:
    limits = Limits(1e9, {"float32": 1e9}, "")
    row = Row("NODE", 1, 1e-6, flops=500, bytes=1001, flops_of={"NODE": 500})
    assert _cells(row, 1.0, limits)[4:6] == ("1.00", "cache")
    at_limit = Row("NODE", 1, 1e-6, flops=500, bytes=1000, flops_of={"NODE": 500})
    assert _cells(at_limit, 1.0, limits)[4:6] == ("1.00", "100.0%")
    # Unless no cache has room for a node's.
    for n, word in ((1, "noise"), (2, "cache")):
        row = Row("NODES", n, 1e-6, flops=0, bytes=1001, flops_of={})
        assert _cells(row, 1.0, replace(limits, cache_bytes=600))[5] == word


@pytest.mark.timing
@pytest.mark.parametrize("n_tokens", [1, 256])
def test_no_row_exceeds_the_peaks(tiny: Path, rng: Rng, n_tokens: int) -> None:
    """On this machine, with each instruction set: rows of ops, layers and nodes; but of memory's,
    which then say why."""
    for isa in cpu_library.usable():
        with Engine.load(tiny, backend="cpu", cpu_isa=isa, n_ctx=256) as engine:

            def highest(engine: Engine = engine) -> float:
                limits = engine.plan.backends[0].measure_limits()
                profile = profile_step(engine, n_tokens, 0, 3, rng)
                rows = [*by_op(profile), *by_layer_kind(profile, engine.plan.graph.layer_kinds)]
                rows += [Row.of(e.name, [e]) for e in profile.entries]
                shown = {_cells(row, profile.seconds, limits)[5] for row in rows}
                assert all(float(c[:-1]) <= 100 for c in shown - {"cache", "noise"}), shown
                return max(limits.least_s(r.flops_of) / r.seconds for r in rows if r.seconds)

            judge(f"{isa}, {n_tokens} tokens: of peak", highest, 0, 1)


def test_the_table(tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "measure_limits", lambda cpu: Limits(2e9, PEAKS, "probed"))
    status, out, _ = cli("profile", "-m", tiny, "-p", 20, "-d", 10, "-r", 1)
    assert status == 0
    assert "step of 20 tokens after 10" in out
    assert "2.0 GB/s (probed); GFLOP/s: 4 float32, 9 int8" in out
    rows = re.findall(r"^(\S.*?) +(\d+) +([\d.]+) +([\d.]+)% +([\d.]+) +([\d.]+) ", out, re.M)
    total = next(row for row in rows if row[0] == "total")
    ops = [row for row in rows if row[0].isupper()]
    assert {row[0] for row in ops} >= {"MUL_MAT", "GATED_DELTA_NET", "ATTENTION"}
    total_ms = float(total[2])
    for _, _, *cells in ops:
        # Each printed number stands for an interval of half its last digit.
        ms, share, mb, rate = map(float, cells)
        assert ms - 0.001 <= share / 100 * total_ms + 0.0005 * total_ms
        assert share / 100 * total_ms - 0.0005 * total_ms <= ms + 0.001
        assert (mb - 0.005) / (ms + 0.0005) <= rate + 0.005
        assert (rate - 0.005) * (ms - 0.0005) <= mb + 0.005


def test_a_terminal_shows_what_is_being_done(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On standard error only, and nothing where that is no terminal."""
    options = ("profile", "-m", tiny, "-p", 20, "-d", 10, "-r", 3)
    assert cli(*options).err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    # Every update is shown.
    monkeypatch.setattr("engine.commands.profile.tqdm", partial(tqdm, mininterval=0, miniters=1))
    status, out, err = cli(*options)
    assert (status, out.splitlines()[0][:26]) == (0, "step of 20 tokens after 10")
    shown = [line for line in err.split("\r") if "%|" in line]
    assert shown[0].startswith("10 tokens of context:   0%|")
    steps = [line for line in shown if line.startswith("steps of 20: ")]
    assert [f"| {n}/10 [" in line for n, line in enumerate(steps, 1)] == [True] * 9
    assert shown[-1].startswith("limits of this machine:  90%|")


def test_what_took_no_time_has_no_rate() -> None:
    """A GPU's clock may show no time for a small kernel."""
    limits = Limits(1e9, {"float32": 1e9}, "")
    row = Row("NODE", 1, 0.0, flops=5, bytes=7, flops_of={"NODE": 5})
    cells = _cells(row, total_s=1.0, limits=limits)
    assert cells == ("1", "0.000", "0.0%", "0.00", "0.00", "0.0%", "0.000", "0.0", "0.0%")


def test_verbose_names_nodes(tiny: Path, cli: Cli) -> None:
    status, out, _ = cli("profile", "-m", tiny, "-n", 1, "-v")
    assert status == 0
    assert "blk.0.gated_delta_net" in out


@pytest.mark.parametrize(
    ("options", "status", "expected"),
    [
        (("-p", 0), 2, "expected at least 1, got 0"),
        (("-p", 5, "-n", 5), 2, "not allowed with"),
        (("-p", 100, "-ub", 64), 2, "expected at most the 64 tokens of a step"),
        (("-d", 100, "-c", 50), 1, "1 tokens after 100: expected at most the 50 positions"),
    ],
)
def test_bad_input(
    tiny: Path, cli: Cli, options: tuple[object, ...], status: int, expected: str
) -> None:
    result = cli("profile", "-m", tiny, *options)
    assert result.status == status
    assert expected in result.err
    assert "Traceback" not in result.err
