"""ATTENTION on the CPU: row tiles as bfloat16 tiles, and long contexts in chunks.

Blocks are computed on any machine here (CpuBackend's `matrix`), if not by matrix units by vectors
that do the same. A row's result must have the same bits however its sequence is cut, at multiples
of 64 where there are row tiles, and whatever else is in the batch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from engine.backends.cpu.backend import CpuBackend
from engine.backends.native import library as cpu_library
from engine.formats.quants import F16, F32, DType, numpy_dtype
from engine.graph import Capacity, Dim, Graph, Kind, Live, Tensor
from engine.ops.attention import ATTENTION
from engine.placement.place import place
from engine.runtime.executor import Executable
from tests.ops import test_latent_attention
from tests.ops.cases.attention import cases as attention_cases
from tests.ops.cases.attention import random_operands
from tests.support.cases import Case, case
from tests.support.opcase import RawWeights, check_case, fresh_seed, nmse
from tests.support.states import load

Array = np.ndarray[Any, Any]
Span = tuple[int, int, int]  # A sequence, and the first and last + 1 of some of its positions.
ISAS = cpu_library.usable()
# What rounding a value to bfloat16 does to its square, on average: errors are uniform up to 2^-8 of
# the power of two below it, and values are not.
ROUNDED = 0.54 * 2.0**-16 / 3
# Weights and values are rounded. Cases' scores have a deviation of 3; over three runs of all cases
# it was at most 4.5e-6.
TILES_LIMIT = 2 * ROUNDED
EXACT_LIMIT = 1e-10
BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


def attention_case(
    heads: tuple[int, int],
    sizes: tuple[int, int],
    pasts: list[int],
    lengths: list[int],
    caches: tuple[DType, DType] = (F16, F16),
    gate: str = "",
) -> Case:
    params = {"heads": heads, "sizes": sizes, "pasts": pasts, "lengths": lengths}
    attrs = {"scale": 1 / math.sqrt(sizes[0])}
    return case(random_operands, attrs, **params, caches=caches, gate=gate)


TILE_CASES = [
    attention_case((2, 1), (32, 32), [0], [16]),
    attention_case((1, 1), (64, 64), [0], [128]),
    # Row tiles of 17, 64 and 47 rows among remainder rows; several spans of positions.
    attention_case((8, 2), (64, 64), [37, 3, 450, 47], [1, 2, 20, 128], gate="values"),
    attention_case((4, 2), (72, 40), [100], [50], (F32, F32)),
    attention_case((4, 2), (48, 80), [130, 5], [61, 1], (F16, F32), gate="values"),
    attention_case((4, 4), (16, 16), [64, 128], [64, 20], (F32, F16), gate="values"),
    attention_case((8, 1), (256, 256), [120], [24], gate="heads"),
    # As of MLA: more query heads than a task takes.
    attention_case((20, 1), (576, 512), [110], [30]),
]


def chunks_of(c: Case) -> tuple[tuple[int, int], ...]:
    """Cached positions and rows of a case's sequences."""
    operands = c.make(np.random.default_rng(0))
    starts, positions = operands["seq_starts"].values, operands["positions"].values
    return tuple(zip(positions[starts[:-1]].tolist(), np.diff(starts).tolist(), strict=True))


# A case on all of them in turn: what must come out is computed once.
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("c", [*TILE_CASES, *attention_cases()], ids=lambda c: c.name)
def test_row_tiles(c: Case, isa: str, strided: bool, seed: int) -> None:
    backend = CpuBackend(2, isa, matrix=True)
    check_case(backend, ATTENTION, c, seed, strided, TILES_LIMIT, chunks_of(c))


@pytest.mark.parametrize("cache_type", [F16, F32], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_values_within_keys(isa: str, cache_type: DType, seed: int) -> None:
    backend = CpuBackend(2, isa, matrix=True)
    test_latent_attention.check(backend, cache_type, seed, TILES_LIMIT)


class Attention:
    """One ATTENTION node, whose queries and keys are those of sequences of given lengths."""

    def __init__(
        self,
        backend: CpuBackend,
        rng: np.random.Generator,
        lengths: list[int],
        heads: tuple[int, int] = (4, 2),
        size: int = 24,
        cache_type: DType = F16,
        capacity: int = 400,
    ) -> None:
        self._backend, (n_q, n_kv) = backend, heads
        counts = [-(-n // BLOCK_SIZE) for n in lengths]
        order = rng.permutation(sum(counts)).astype(np.int32)
        self._tables = np.split(order, np.cumsum(counts)[:-1])
        self.q = [rng.normal(size=(n, n_q, size)).astype(np.float32) * 3 for n in lengths]
        self._kept = numpy_dtype(cache_type)
        self.keys, self.values = (
            [rng.normal(size=(n, n_kv, size)).astype(self._kept) for n in lengths] for _ in range(2)
        )
        self.scale = 1 / math.sqrt(size)

        graph, n_tokens, n_seqs = Graph(Capacity(capacity)), Dim(capacity, "n_tokens"), len(lengths)
        shape = (Dim(len(order), "n_blocks"), n_kv, BLOCK_SIZE, size)
        caches = {f"{x}_cache": graph.state(x, shape, cache_type) for x in "kv"}
        self._rows = Tensor("q", (n_tokens, n_q, size), F32, Kind.ACTIVATION)
        batch = {
            "positions": graph.input("positions", (n_tokens,)),
            "seq_starts": graph.input("seq_starts", (Dim(n_seqs + 1, "n_seqs + 1"),)),
            "block_tables": graph.input("block_tables", (Dim(n_seqs, "n_seqs"), max(counts))),
        }
        operands = {"q": self._rows, **caches, **batch}
        (graph.outputs["out"],) = graph.add(ATTENTION, "read", operands, scale=self.scale)
        self._executable = Executable(place(graph, [backend]), RawWeights({}))
        self.load()

    def load(self) -> None:
        """Put keys and values into the cache."""
        for s, table in enumerate(self._tables):
            for i, block in enumerate(table):
                rows = slice(i * BLOCK_SIZE, (i + 1) * BLOCK_SIZE)
                contents = {}
                for name, cached in (("k", self.keys[s][rows]), ("v", self.values[s][rows])):
                    shape = (cached.shape[1], BLOCK_SIZE, cached.shape[2])
                    contents[name] = np.full(shape, np.nan, self._kept)
                    contents[name][:, : len(cached)] = cached.transpose(1, 0, 2)
                load(self._backend.states, "n_blocks", int(block), contents)

    def run(self, *spans: Span) -> list[Array]:
        """The results of rows of several sequences in one step."""
        lengths = [end - begin for _, begin, end in spans]
        starts = np.cumsum([0, *lengths])
        tables = np.full((len(spans), max(map(len, self._tables))), -1, np.int32)
        for i, (seq, _, _) in enumerate(spans):
            tables[i, : len(self._tables[seq])] = self._tables[seq]
        batch = {
            "positions": np.concatenate([np.arange(begin, end) for _, begin, end in spans]),
            "seq_starts": starts,
            "block_tables": tables,
        }
        inputs = {name: np.asarray(values, np.int32) for name, values in batch.items()}
        self._backend.write(
            self._rows, np.concatenate([self.q[s][begin:end] for s, begin, end in spans])
        )
        chunks = tuple((begin, end - begin) for _, begin, end in spans)
        live = Live(int(starts[-1]), len(spans), 1, chunks=chunks)
        out = self._executable.run(inputs, live)["out"]
        return [out[starts[i] : starts[i + 1]] for i in range(len(spans))]

    def expected(self, seq: int, begin: int, end: int) -> Array:
        """The definition in float64."""
        q, n_kv = self.q[seq][begin:end].astype(np.float64), self.keys[seq].shape[1]
        keys, values = (x[seq][:end].astype(np.float64) for x in (self.keys, self.values))
        q = q.reshape(len(q), n_kv, -1, q.shape[2])
        scores = np.einsum("tgrd,cgd->tgrc", q, keys) * self.scale
        hidden = np.arange(end) > np.arange(begin, end)[:, np.newaxis]
        scores = np.where(hidden[:, np.newaxis, np.newaxis], -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("tgrc,cgd->tgrd", weights / weights.sum(-1, keepdims=True), values)
        return out.reshape(end - begin, -1, values.shape[2])


def check_same(op: Attention, want: list[Array], step: list[Span]) -> None:
    """Fail unless rows of a step have the bits that they have of their whole sequences."""
    for (seq, begin, end), got in zip(step, op.run(*step), strict=True):
        assert got.tobytes() == want[seq][begin:end].tobytes(), (seq, begin, end)


@pytest.mark.parametrize("isa", ISAS)
def test_row_tiles_have_the_same_bits_in_any_batch(isa: str, rng: np.random.Generator) -> None:
    lengths = [330, 64, 151]
    op = Attention(CpuBackend(3, isa, matrix=True), rng, lengths, heads=(12, 2))
    want = [op.run((seq, 0, n))[0] for seq, n in enumerate(lengths)]
    for seq, n in enumerate(lengths):
        assert nmse(want[seq], op.expected(seq, 0, n)) <= TILES_LIMIT
    check_same(op, want, [(2, 0, 64), (1, 0, 64), (0, 0, 192)])
    check_same(op, want, [(0, 192, 256), (2, 64, 151)])
    check_same(op, want, [(0, 256, 330)])
    check_same(op, want, [(0, 64, 128), (2, 128, 151)])


# Around the ends of chunks of 256, and where chunks begin to be of 512 and of 1024.
CUTS = (256, 512, 8192, 16384)


@pytest.mark.parametrize("isa", ISAS)
def test_chunks_have_the_same_bits_in_any_batch(isa: str, rng: np.random.Generator) -> None:
    """Chunks are tasks of their own in small steps; in larger ones they are not."""
    lengths = [16384 + 30, 700]
    op = Attention(CpuBackend(3, isa, matrix=False), rng, lengths)
    for cut in CUTS:
        begin, end = cut - 20, cut + 20
        many, other = op.run((0, begin, end), (1, 500, 700))
        (some,) = op.run((0, begin, end - 15))
        assert nmse(many, op.expected(0, begin, end)) <= EXACT_LIMIT
        assert nmse(other, op.expected(1, 500, 700)) <= EXACT_LIMIT
        assert some.tobytes() == many[:-15].tobytes()
        for row in (0, 19, 20, 39):
            few, beside = op.run((0, begin + row, begin + row + 1), (1, 600, 613))
            assert few.tobytes() == many[row : row + 1].tobytes(), (cut, row)
            assert beside.tobytes() == other[100:113].tobytes(), (cut, row)


@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("isa", ISAS)
def test_remainder_rows_beside_row_tiles(isa: str, matrix: bool, rng: np.random.Generator) -> None:
    op = Attention(CpuBackend(2, isa, matrix), rng, [3000, 200, 90], heads=(6, 1), cache_type=F32)
    loose, block, both = op.run((0, 2999, 3000), (1, 100, 200), (2, 60, 90))
    limit = TILES_LIMIT if matrix else EXACT_LIMIT
    assert nmse(loose, op.expected(0, 2999, 3000)) <= EXACT_LIMIT
    assert nmse(block, op.expected(1, 100, 200)) <= limit
    assert nmse(both, op.expected(2, 60, 90)) <= limit
    # Of the last rows, the first four are too few for a block.
    assert nmse(both[:4], op.expected(2, 60, 64)) <= EXACT_LIMIT


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("isa", ISAS)
def test_a_query_that_is_not_finite_shows(
    isa: str, matrix: bool, value: float, rng: np.random.Generator
) -> None:
    op = Attention(CpuBackend(2, isa, matrix), rng, [300])
    (want,) = op.run((0, 200, 300))
    op.q[0][270, 1, 3] = value
    (got,) = op.run((0, 200, 300))
    assert np.isnan(got[70, 1]).all()
    got[70, 1] = want[70, 1]
    assert np.array_equal(got, want)


@pytest.mark.parametrize("slope", [-1, 1])
@pytest.mark.parametrize("shift", [-3000, 0, 3000])
@pytest.mark.parametrize("isa", ISAS)
def test_scores_that_rise_or_fall_all_the_time(
    isa: str, shift: float, slope: int, rng: np.random.Generator
) -> None:
    """Later keys outweigh all earlier ones or the reverse, whatever is added to all scores."""
    op = Attention(CpuBackend(2, isa, matrix=True), rng, [600], heads=(1, 1))
    # Scores are powers of two with exponents that bfloat16 has.
    op.q[0][..., :] = 0
    op.q[0][..., 0], op.q[0][..., 1] = math.log(2) / op.scale, shift
    op.keys[0][:, 0, 0], op.keys[0][:, 0, 1] = slope * (np.arange(600) // 3), 1
    op.load()
    (got,) = op.run((0, 300, 600))
    # Few keys count, the same for all rows, so errors hardly average out. Rounding a weight and a
    # value to bfloat16 is off by at most 2^-9 of each: (2 · 2^-9)² = 1.5e-5 of their product.
    assert nmse(got, op.expected(0, 300, 600)) <= 2e-5


@pytest.mark.parametrize("heads", [(10, 2), (7, 1), (24, 1)])
@pytest.mark.parametrize("isa", ISAS)
def test_heads_are_divided_among_threads(
    isa: str, heads: tuple[int, int], rng: np.random.Generator
) -> None:
    """With more threads fewer heads share a task; no bit changes."""
    drawn = rng.integers(2**32)
    results = []
    for n_threads in (1, 3, 32):
        same = np.random.default_rng(drawn)
        op = Attention(CpuBackend(n_threads, isa, matrix=False), same, [600], heads, size=40)
        steps = [(0, end - n, end) for end, n in ((1, 1), (90, 2), (256, 1), (300, 5), (600, 16))]
        results.append([op.run(step)[0] for step in steps])
        for step, got in zip(steps, results[-1], strict=True):
            assert nmse(got, op.expected(*step)) <= EXACT_LIMIT
    for other in results[1:]:
        assert [x.tobytes() for x in other] == [x.tobytes() for x in results[0]]
