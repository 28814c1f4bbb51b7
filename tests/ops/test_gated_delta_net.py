"""GATED_DELTA_NET: scan and chunk are the same recurrence, whatever gates, lengths and slots.

Everything here calls the op's reference. The naive definition says what is right; scan and chunk
are compared in float64, where they differ by rounding only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from engine.ops.gated_delta_net import CHUNK_GDA, CHUNK_KDA, GATED_DELTA_NET
from tests.support.naive import gated_delta_net as naive
from tests.support.opcase import assert_close, fresh_seed

Array = np.ndarray[Any, Any]
GATES = (0.0, -0.001, -0.1, -1.0, -5.0, -20.0, -100.0)
# Around the chunks of 16 (KDA) and 64 (GDA).
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 128, 200)
SAME = 1e-24


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


@dataclass
class Problem:
    """Operands of one call. Sequence s starts from slot 2s (even s: from zeros), ends in 2s + 1."""

    seed: int
    lengths: tuple[int, ...] = (40,)
    n_heads: tuple[int, int] = (2, 4)
    sizes: tuple[int, int] = (16, 24)
    gates: tuple[float, ...] = (-0.1,)
    kda: bool = False
    head_map: str = "tiled"
    n_snapshots: int = 0
    arrays: dict[str, Array] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        (n_k, n_v), (d_k, d_v) = self.n_heads, self.sizes
        n_seqs, n = len(self.lengths), sum(self.lengths)
        q, k = (
            x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rng.normal(size=(2, n, n_k, d_k))
        )
        shape = (n, n_v, d_k) if self.kda else (n, n_v)
        n_slots = (2 + self.n_snapshots) * n_seqs
        self.arrays = {
            "q": q,
            "k": k,
            "v": rng.normal(size=(n, n_v, d_v)),
            "g": rng.choice(self.gates, shape) * rng.uniform(0.5, 1.5, shape),
            "beta": rng.uniform(0, 1, (n, n_v)),
            "state": rng.normal(size=(n_slots, n_v, d_v, d_k)),
            "seq_starts": np.cumsum([0, *self.lengths]),
            "state_src": np.array([2 * s if s % 2 else -1 for s in range(n_seqs)]),
            "state_dst": 2 * np.arange(n_seqs) + 1,
            "snapshot_dst": np.arange(2 * n_seqs, n_slots).reshape(n_seqs, self.n_snapshots),
        }

    @property
    def attrs(self) -> dict[str, Any]:
        return {"head_map": self.head_map, "scale": self.sizes[0] ** -0.5}

    def run(self, algorithm: str, dtype: type = np.float64) -> tuple[Array, Array]:
        """(outputs, states after); the problem stays as it is."""
        arrays = dict(self.arrays)
        for name in ("q", "k", "v", "g", "beta", "state"):
            arrays[name] = arrays[name].astype(dtype)
        (out,) = GATED_DELTA_NET.reference(**arrays, **self.attrs, algorithm=algorithm)
        assert out.dtype == dtype
        return out, arrays["state"]

    def naive(self) -> tuple[Array, Array]:
        """What must come out."""
        operands: dict[str, Any] = self.arrays
        (out,), states = naive(**operands, **self.attrs)
        return out, states["state"]

    def part(self, start: int, stop: int) -> Problem:
        """The tokens start … stop - 1 of a problem of one sequence, from and to the same slots."""
        part = Problem(self.seed, (stop - start,), self.n_heads, self.sizes)
        part.kda, part.head_map = self.kda, self.head_map
        part.arrays = dict(self.arrays)
        for name in ("q", "k", "v", "g", "beta"):
            part.arrays[name] = self.arrays[name][start:stop]
        part.arrays |= {
            "seq_starts": np.array([0, stop - start]),
            "snapshot_dst": np.empty((1, 0), int),
        }
        return part


every_kind = pytest.mark.parametrize("kda", [False, True], ids=["gda", "kda"])
both_algorithms = pytest.mark.parametrize("algorithm", ["scan", "chunk"])


@every_kind
@pytest.mark.parametrize("head_map", ["tiled", "grouped"])
@pytest.mark.parametrize("gate", GATES)
def test_scan_and_chunk_are_the_same(gate: float, head_map: str, kda: bool, seed: int) -> None:
    problem = Problem(seed, LENGTHS, gates=(gate,), kda=kda, head_map=head_map)
    out, states = problem.run("scan")
    chunk_out, chunk_states = problem.run("chunk")
    assert_close(chunk_out, out, SAME, f"outputs, seed {seed}")
    assert_close(chunk_states, states, SAME, f"states, seed {seed}")


@every_kind
@pytest.mark.parametrize("head_map", ["tiled", "grouped"])
@pytest.mark.parametrize("algorithm", ["scan", "chunk", "auto"])
def test_all_gates_together_give_the_naive_result(
    algorithm: str, head_map: str, kda: bool, seed: int
) -> None:
    """Strong decays beside weak ones: the place where differences of cumulated decays suffer."""
    lengths = (CHUNK_KDA, 90, 3)
    problem = Problem(seed, lengths, (3, 6), (24, 16), GATES, kda, head_map, n_snapshots=2)
    out, states = problem.run(algorithm)
    want_out, want_states = problem.naive()
    assert_close(out, want_out, SAME, f"outputs, seed {seed}")
    assert_close(states, want_states, SAME, f"states, seed {seed}")


@every_kind
@pytest.mark.parametrize("n_heads", [(1, 1), (2, 2), (1, 5)])
@pytest.mark.parametrize("sizes", [(8, 40), (40, 8), (1, 1)])
def test_head_counts_and_sizes(
    n_heads: tuple[int, int], sizes: tuple[int, int], kda: bool, seed: int
) -> None:
    problem = Problem(seed, (20, 2), n_heads, sizes, (-0.5,), kda)
    want_out, want_states = problem.naive()
    for algorithm in ("scan", "chunk"):
        out, states = problem.run(algorithm)
        assert_close(out, want_out, SAME, f"{algorithm}, seed {seed}")
        assert_close(states, want_states, SAME, f"{algorithm}, seed {seed}")


def test_the_head_maps_differ(seed: int) -> None:
    tiled, grouped = (Problem(seed, head_map=m).run("scan")[0] for m in ("tiled", "grouped"))
    # With 2 key and 4 value heads: 0 1 0 1 and 0 0 1 1.
    for head, same in enumerate((True, False, False, True)):
        assert np.array_equal(tiled[:, head], grouped[:, head]) == same


@every_kind
@pytest.mark.parametrize("n_tokens", [64, 150])
def test_nearly_parallel_keys_with_full_steps(n_tokens: int, kda: bool, seed: int) -> None:
    """The worst conditioned systems: every token overwrites what the one before it wrote."""
    problem = Problem(seed, (n_tokens,), gates=(0.0, -0.001), kda=kda)
    rng = np.random.default_rng(seed)
    k = np.ones_like(problem.arrays["k"]) + 1e-3 * rng.normal(size=problem.arrays["k"].shape)
    problem.arrays["k"] = k / np.linalg.norm(k, axis=-1, keepdims=True)
    drawn = rng.uniform(size=problem.arrays["beta"].shape)
    problem.arrays["beta"] = np.asarray(1 - 1e-3 * drawn)
    want = problem.naive()
    for algorithm in ("scan", "chunk"):
        for got, right in zip(problem.run(algorithm), want, strict=True):
            assert_close(got, right, 1e-20, f"{algorithm}, seed {seed}")
        for got, right in zip(problem.run(algorithm, np.float32), want, strict=True):
            assert_close(got, right, 1e-8, f"{algorithm} in float32, seed {seed}")


@every_kind
@both_algorithms
def test_snapshots_are_the_states_of_runs_that_end_there(
    algorithm: str, kda: bool, seed: int
) -> None:
    n, n_snapshots = CHUNK_GDA + 6, 4
    problem = Problem(seed, (n,), kda=kda, n_snapshots=n_snapshots)
    problem.arrays["state_src"] = np.array([0])
    _, states = problem.run(algorithm)
    for j in range(n_snapshots):
        stop = n - n_snapshots + j + 1
        _, ended = problem.part(0, stop).run("scan")
        what = f"after {stop} tokens, seed {seed}"
        if algorithm == "scan":
            assert np.array_equal(states[2 + j], ended[1]), what
        assert_close(states[2 + j], ended[1], SAME, what)
    assert np.array_equal(states[1], states[2 + n_snapshots - 1])


@both_algorithms
def test_a_short_sequence_fills_the_last_snapshots(algorithm: str, seed: int) -> None:
    problem = Problem(seed, (2,), n_snapshots=3)
    problem.arrays["snapshot_dst"] = np.array([[-1, 3, 4]])
    before = problem.arrays["state"]
    _, states = problem.run(algorithm)
    assert np.array_equal(states[2], before[2])
    assert_close(states[3], problem.part(0, 1).run("scan")[1][1], SAME, f"seed {seed}")
    assert np.array_equal(states[4], states[1])


@both_algorithms
def test_snapshot_dst_minus_one_writes_nowhere(algorithm: str, seed: int) -> None:
    problem = Problem(seed, (20, 20), n_snapshots=2)
    problem.arrays["snapshot_dst"] = np.array([[-1, 5], [-1, -1]])
    before = problem.arrays["state"]
    out, states = problem.run(algorithm)
    changed = [not np.array_equal(a, b) for a, b in zip(states, before, strict=True)]
    assert changed == [slot in (1, 3, 5) for slot in range(len(before))]
    assert_close(out, problem.naive()[0], SAME, f"seed {seed}")


@both_algorithms
def test_another_destination_leaves_the_source_as_it_is(algorithm: str, seed: int) -> None:
    problem = Problem(seed, (70, 20), n_heads=(2, 2))
    problem.arrays |= {"state_src": np.array([0, 0]), "state_dst": np.array([3, 2])}
    before = problem.arrays["state"]
    out, states = problem.run(algorithm)
    assert np.array_equal(states[:2], before[:2])
    want_out, want_states = problem.naive()
    assert_close(out, want_out, SAME, f"seed {seed}")
    assert_close(states, want_states, SAME, f"seed {seed}")


@every_kind
@both_algorithms
def test_a_state_is_updated_in_place(algorithm: str, kda: bool, seed: int) -> None:
    problem = Problem(seed, (70, 20), kda=kda)
    want_out, want_states = problem.run(algorithm)
    problem.arrays["state_dst"] = np.array([1, 2])
    out, states = problem.run(algorithm)
    assert np.array_equal(out, want_out)
    assert np.array_equal(states[[1, 2]], want_states[[1, 3]])


@every_kind
@both_algorithms
def test_a_sequence_does_not_depend_on_the_others(algorithm: str, kda: bool, seed: int) -> None:
    problem = Problem(seed, (1, 70, 3, 64), kda=kda)
    out, states = problem.run(algorithm)
    for s, length in enumerate(problem.lengths):
        start = int(problem.arrays["seq_starts"][s])
        part = problem.part(start, start + length)
        for name in ("state_src", "state_dst"):
            part.arrays[name] = problem.arrays[name][s : s + 1]
        alone, after = part.run(algorithm)
        assert np.array_equal(alone, out[start : start + length]), f"sequence {s}, seed {seed}"
        assert np.array_equal(after[2 * s + 1], states[2 * s + 1]), f"sequence {s}, seed {seed}"


@every_kind
@both_algorithms
def test_pieces_carry_the_state_on(algorithm: str, kda: bool, seed: int) -> None:
    problem = Problem(seed, (150,), kda=kda)
    out, states = problem.run(algorithm)
    outs, carried = [], problem.arrays["state"]
    for start, stop in ((0, 1), (1, 64), (64, 81), (81, 150)):
        part = problem.part(start, stop)
        part.arrays |= {"state": carried, "state_src": np.array([1 if start else -1])}
        piece, carried = part.run(algorithm)
        outs.append(piece)
    assert_close(np.concatenate(outs), out, SAME, f"outputs, seed {seed}")
    assert_close(carried, states, SAME, f"states, seed {seed}")


@every_kind
@both_algorithms
def test_nan_in_slots_that_are_not_read_does_not_leak(algorithm: str, kda: bool, seed: int) -> None:
    problem = Problem(seed, (70, 3), kda=kda, n_snapshots=1)
    want = problem.run(algorithm)
    # Sequence 0 starts from zeros, sequence 1 from slot 2.
    problem.arrays["state"] = problem.arrays["state"].copy()
    problem.arrays["state"][[0, 1, 3, 4, 5]] = np.nan
    out, states = problem.run(algorithm)
    assert np.array_equal(out, want[0])
    assert np.array_equal(states[1:], want[1][1:])
    assert np.isnan(states[0]).all()


@every_kind
@both_algorithms
def test_rows_of_zero_step_and_decay_do_nothing(algorithm: str, kda: bool, seed: int) -> None:
    problem = Problem(seed, (70,), kda=kda)
    problem.arrays["state_src"] = np.array([0])
    for name in ("beta", "g"):
        problem.arrays[name] = np.zeros_like(problem.arrays[name])
    _, states = problem.run(algorithm)
    assert np.array_equal(states[1], problem.arrays["state"][0])


@every_kind
@both_algorithms
def test_padding_rows_leave_the_others_as_they_are(algorithm: str, kda: bool, seed: int) -> None:
    problem = Problem(seed, (70,), kda=kda)
    rng = np.random.default_rng(seed)
    padded = Problem(seed, (100,), kda=kda)
    rows = np.sort(rng.permutation(100)[:70])
    for name in ("q", "k", "v", "g", "beta"):
        padded.arrays[name] = rng.normal(size=(100, *problem.arrays[name].shape[1:]))
        if name in ("g", "beta"):
            padded.arrays[name][:] = 0
        padded.arrays[name][rows] = problem.arrays[name]
    padded.arrays["state"] = problem.arrays["state"]
    out, states = problem.run(algorithm)
    padded_out, padded_states = padded.run(algorithm)
    assert_close(padded_out[rows], out, SAME, f"outputs, seed {seed}")
    assert_close(padded_states, states, SAME, f"states, seed {seed}")


@every_kind
@both_algorithms
@pytest.mark.parametrize("gate", [0.0, -20.0, -100.0, -1e4, -1e30])
def test_float32_with_strong_gates_is_finite_and_right(
    gate: float, algorithm: str, kda: bool, seed: int
) -> None:
    problem = Problem(seed, LENGTHS, gates=(gate,), kda=kda)
    out, states = problem.run(algorithm, np.float32)
    want_out, want_states = problem.run("scan")
    assert_close(out, want_out, 1e-11, f"outputs, seed {seed}")
    assert_close(states, want_states, 1e-11, f"states, seed {seed}")


@every_kind
@pytest.mark.parametrize(("algorithm", "limit"), [("scan", 1e-12), ("chunk", 1e-8)])
def test_float32_with_strong_gates_among_weak_ones(
    algorithm: str, limit: float, kda: bool, seed: int
) -> None:
    """Cumulated decays in float32 lose what a weak gate adds behind a strong one."""
    problem = Problem(seed, LENGTHS, gates=GATES, kda=kda)
    for got, want in zip(problem.run(algorithm, np.float32), problem.run("scan"), strict=True):
        assert_close(got, want, limit, f"seed {seed}")


def test_empty_sequences_are_passed_over(seed: int) -> None:
    problem = Problem(seed, (0, 5, 0, 20, 0))
    before = problem.arrays["state"]
    out, states = problem.run("auto")
    assert_close(out, problem.naive()[0], SAME, f"seed {seed}")
    changed = [not np.array_equal(a, b) for a, b in zip(states, before, strict=True)]
    assert changed == [slot in (3, 7) for slot in range(len(before))]
