"""GATED_DELTA_NET on the CPU in chunk form: row tiles as products of bfloat16 tiles.

Machines without matrix units make the same products in vectors. Against the naive definition in
float64 the limit is what a kernel of such tiles may lose; which bits it gives is the sequence's
affair alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from engine.backends.base import Support
from engine.backends.cpu.backend import CpuBackend
from engine.backends.native import library as cpu_library
from engine.ops import OPS
from engine.ops.gated_delta_net import HEAD_MAPS
from engine.runtime.batch import BLOCK_POSITIONS
from tests.ops.cases.gated_delta_net import random_operands
from tests.support.cases import Case, Operand, Rng, activation, integers, single_node_graph, slots
from tests.support.opcase import assert_close, check_case, fresh_seed, make_operands, run_case

Array = np.ndarray[Any, Any]
OP = OPS["GATED_DELTA_NET"]
ISAS = cpu_library.usable()
LIMIT, STATE_LIMIT = 1e-5, 6e-6
GATES = (0.0, -0.1, -1.0, -20.0, -100.0, -1e4, "mixed")
KINDS = pytest.mark.parametrize("kda", [False, True], ids=["gda", "kda"])


@dataclass(frozen=True)
class Shape:
    """Sequences of these lengths and pasts; those in `fresh` begin with zeros, those in `lost`
    leave no state."""

    lengths: tuple[int, ...]
    pasts: tuple[int, ...]
    heads: tuple[int, int]
    sizes: tuple[int, int]
    fresh: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    n_snapshots: int = 0

    @property
    def chunks(self) -> tuple[tuple[int, int], ...]:
        return tuple(zip(self.pasts, self.lengths, strict=True))


SHAPES = [
    Shape((64,), (0,), (1, 1), (32, 32)),
    Shape((64, 16, 17, 48), (0, 0, 64, 128), (1, 2), (64, 96), fresh=(0, 3)),
    # Remainder rows before, behind and between row tiles; a sequence of remainder rows only.
    Shape((150, 1, 40, 20, 90), (10, 7, 30, 54, 100), (2, 4), (64, 32), (1,), (2, 4)),
    Shape((200, 130), (64, 0), (2, 2), (128, 128), lost=(1,)),
    Shape((33, 70), (0, 60), (1, 3), (96, 160), (0,), n_snapshots=2),
    Shape((128, 100, 5), (0, 0, 3), (1, 2), (32, 64), (1,), n_snapshots=20),
    Shape((80,), (48,), (1, 1), (256, 256)),
    Shape((64, 90), (0, 0), (1, 2), (256, 32), n_snapshots=1),
]


def operands_of(rng: Rng, shape: Shape, gate: float | str, kda: bool) -> dict[str, Operand]:
    typical = -1.0 if isinstance(gate, str) else gate
    operands = random_operands(
        rng,
        [*shape.lengths],
        shape.heads,
        shape.sizes,
        typical,
        kda,
        shape.fresh,
        shape.n_snapshots,
    )
    if gate == "mixed":
        g = operands["g"].values
        strength = rng.choice([0.0, 1e-3, 0.1, 1.0, 20.0, 100.0, 1e4], g.shape)
        operands["g"] = activation(g * strength)
    dst = operands["state_dst"].values.copy()
    dst[[*shape.lost]] = -1
    return operands | {"state_dst": integers(dst, "n_seqs")}


def attrs_of(head_map: str, sizes: tuple[int, int], algorithm: str = "auto") -> dict[str, Any]:
    return {"head_map": head_map, "scale": sizes[0] ** -0.5, "algorithm": algorithm}


@pytest.fixture(scope="module")
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


@cache
def numbered_case(i: int, gate: float | str, kda: bool) -> Case:
    shape = SHAPES[i]
    algorithm = ("auto", "chunk")[i // 2 % 2]
    return Case(
        f"{shape} gate={gate} kda={kda}",
        partial(operands_of, shape=shape, gate=gate, kda=kda),
        attrs_of(HEAD_MAPS[i % 2], shape.sizes, algorithm),
    )


# A case on all of them in turn: what must come out is computed once.
@pytest.mark.parametrize(("isa", "n_threads"), [(isa, n) for isa in ISAS for n in (1, 3)])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("i", range(len(SHAPES)))
@KINDS
def test_outputs_states_and_snapshots(
    kda: bool, i: int, gate: float | str, isa: str, n_threads: int, seed: int
) -> None:
    backend, case = CpuBackend(n_threads, isa, matrix=True), numbered_case(i, gate, kda)
    check_case(backend, OP, case, seed, bool(i % 2), LIMIT, SHAPES[i].chunks)


def case_of(operands: dict[str, Operand], algorithm: str = "auto") -> Case:
    sizes = operands["state"].values.shape[:1:-1]
    return Case("rows", lambda _: dict(operands), attrs_of("tiled", sizes, algorithm))


def run_rows(
    backend: CpuBackend, operands: dict[str, Operand], pasts: Sequence[int], algorithm: str = "auto"
) -> tuple[Array, Array]:
    """(outputs, each sequence's state behind them)."""
    case = case_of(operands, algorithm)
    lengths = np.diff(operands["seq_starts"].values)
    chunks = tuple(zip(pasts, lengths.tolist(), strict=True))
    (out,), _, after = run_case(backend, OP, case, 0, chunks=chunks)
    return out, after["state"][make_operands(OP, case, 0)["state_dst"].values]


def rows_of(
    operands: dict[str, Operand], start: int, stop: int, state: Array
) -> dict[str, Operand]:
    """The rows of one sequence, which starts from `state`."""
    part = {
        name: replace(operands[name], values=operands[name].values[start:stop])
        for name in ("q", "k", "v", "g", "beta")
    }
    return part | {
        "state": slots(np.stack([state, state])),
        "seq_starts": integers([0, stop - start], "n_seqs + 1"),
        "state_src": integers([0], "n_seqs"),
        "state_dst": integers([1], "n_seqs"),
        "snapshot_dst": integers(np.empty((1, 0)), "n_seqs"),
    }


def same(got: Array, want: Array) -> bool:
    return np.array_equal(got.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("isa", ISAS)
@KINDS
def test_a_sequence_has_the_same_bits_alone_and_among_others(
    kda: bool, isa: str, seed: int
) -> None:
    shape = Shape((150, 1, 40, 64, 90), (10, 7, 30, 64, 100), (2, 4), (64, 32))
    rng, backend = np.random.default_rng(seed), CpuBackend(2, isa, matrix=True)
    operands = operands_of(rng, shape, -0.1, kda)
    out, states = run_rows(backend, operands, shape.pasts)
    starts = operands["seq_starts"].values
    # As they were run: in other slots.
    sources = make_operands(OP, case_of(operands), 0)["state_src"].values
    for s, (start, stop) in enumerate(pairwise(starts)):
        initial = operands["state"].values[sources[s]]
        alone = rows_of(operands, start, stop, initial)
        alone_out, alone_state = run_rows(backend, alone, shape.pasts[s : s + 1])
        assert same(alone_out, out[start:stop]), f"sequence {s}, seed {seed}"
        assert same(alone_state[0], states[s]), f"sequence {s}, seed {seed}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n_past", [0, 37])
@KINDS
def test_cuts_at_row_tiles_change_no_bit(kda: bool, n_past: int, isa: str, seed: int) -> None:
    n = 460
    shape = Shape((n,), (n_past,), (1, 2), (64, 64))
    rng, backend = np.random.default_rng(seed), CpuBackend(2, isa, matrix=True)
    operands = operands_of(rng, shape, -0.05, kda)
    initial = operands["state"].values[0]
    whole, final = run_rows(backend, rows_of(operands, 0, n, initial), shape.pasts)
    for step in (64, 128, 192):
        assert step % BLOCK_POSITIONS == 0
        stops = [*range(step - n_past % step, n, step), n]
        outs, state = [], initial
        for start, stop in pairwise([0, *stops]):
            part = rows_of(operands, start, stop, state)
            out, (state,) = run_rows(backend, part, [n_past + start])
            outs.append(out)
        assert same(np.concatenate(outs), whole), f"pieces of {step}, seed {seed}"
        assert same(state, final[0]), f"pieces of {step}, seed {seed}"


@pytest.mark.parametrize("isa", ISAS)
@KINDS
def test_the_algorithm_decides_what_row_tiles_are_for(kda: bool, isa: str, seed: int) -> None:
    shape = Shape((64, 15), (0, 64), (1, 2), (32, 32))
    operands = operands_of(np.random.default_rng(seed), shape, -0.1, kda)
    scanned, states = run_rows(CpuBackend(2, isa, matrix=False), operands, shape.pasts)
    backend = CpuBackend(2, isa, matrix=True)
    forced, forced_states = run_rows(backend, operands, shape.pasts, "scan")
    assert same(forced, scanned)
    assert same(forced_states, states)
    out, chunk_states = run_rows(backend, operands, shape.pasts)
    assert not same(out[:64], scanned[:64])
    assert not same(chunk_states[0], states[0])
    # Remainder rows are scanned.
    assert same(out[64:], scanned[64:])
    assert same(chunk_states[1], states[1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sizes", [(48, 64), (64, 48), (16, 16)])
@KINDS
def test_sizes_that_fill_no_tile_are_scanned(
    kda: bool, sizes: tuple[int, int], isa: str, seed: int
) -> None:
    shape = Shape((100,), (0,), (1, 2), sizes)
    operands = operands_of(np.random.default_rng(seed), shape, -0.1, kda)
    scanned, _ = run_rows(CpuBackend(2, isa, matrix=False), operands, shape.pasts)
    out, _ = run_rows(CpuBackend(2, isa, matrix=True), operands, shape.pasts)
    assert same(out, scanned)


@pytest.mark.parametrize(
    ("matrix", "sizes", "reason"),
    [
        (True, (64, 32), ""),
        (False, (64, 32), "no matrix units"),
        (True, (64, 48), "no chunked kernel for heads of 64 and 48, no multiples of 32"),
    ],
)
@KINDS
def test_chunks_are_refused_with_a_reason(
    kda: bool, matrix: bool, sizes: tuple[int, int], reason: str, rng: Rng
) -> None:
    operands = random_operands(rng, [4], (1, 1), sizes, kda=kda)
    graph, _ = single_node_graph(OP, case_of(operands, "chunk"), operands)
    assert CpuBackend(1, matrix=matrix).supports(graph.nodes[0]) == Support(not reason, reason)


def similar_keys(rng: Rng, shape: tuple[int, ...]) -> Array:
    """Unit rows whose products are about 0.5: those of real models went through a SiLU."""
    x = rng.normal(size=shape) + 0.7 * rng.normal(size=shape[1:])
    x /= 1 + np.exp(-x)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def scan(operands: dict[str, Operand]) -> tuple[Array, Array]:
    """One sequence's outputs and final state in float64, from zeros, as many key as value heads."""
    values = (operands[name].values for name in ("q", "k", "v", "g", "beta"))
    q, k, v, g, beta = (x.astype(np.float32).astype(np.float64) for x in values)
    state = np.zeros((v.shape[1], v.shape[2], k.shape[2]))
    out = np.empty_like(v)
    for t in range(len(q)):
        state *= np.exp(g[t]).reshape(len(state), 1, -1)
        delta = beta[t][:, np.newaxis] * (v[t] - (state @ k[t][:, :, np.newaxis])[..., 0])
        state += delta[:, :, np.newaxis] * k[t][:, np.newaxis]
        out[t] = (state @ q[t][:, :, np.newaxis])[..., 0]
    return out * q.shape[2] ** -0.5, state


# Measured over 4 to 8 seeds, GDA and KDA: outputs at most 9.4e-6 and 6.1e-6, states 4.3e-6 and
# 3.2e-6.
@pytest.mark.parametrize("gate", [0.0, -1e-3, -0.05])
@KINDS
def test_errors_do_not_grow_over_32k_rows(kda: bool, gate: float, seed: int) -> None:
    n, size, step = 32768, 64, 8192
    rng, backend = np.random.default_rng(seed), CpuBackend(2, matrix=True)
    operands = random_operands(rng, [n], (2, 2), (size, size), gate, kda)
    for name in ("q", "k"):
        # One head's are independent of each other, the other's are not.
        operands[name].values[:, 1] = similar_keys(rng, (n, size))
    want, want_state = scan(operands)
    outs, state = [], np.zeros((2, size, size))
    for start in range(0, n, step):
        piece = rows_of(operands, start, start + step, state)
        out, (state,) = run_rows(backend, piece, [start])
        outs.append(out)
    out = np.concatenate(outs)
    for h in range(2):
        where = f"head {h}, seed {seed}"
        assert_close(state[h], want_state[h], STATE_LIMIT, f"state, {where}")
        for first in (0, n // 2, n - 2048):
            rows = slice(first, first + 2048)
            assert_close(out[rows, h], want[rows, h], LIMIT, f"rows from {first} on, {where}")
