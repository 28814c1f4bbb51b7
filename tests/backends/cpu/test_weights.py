"""Packed weights of every type: what tables give back, and what products compute, exactly.

A product rounds its activation to int8 or 15-bit integers as QUANTIZE_ROWS does; in row tiles,
both sides to bfloat16 (on AMX, or emulated), but for quantized weights of experts. With them
rounded the same way here, what is left is float32 arithmetic; only against what is not rounded must
the limit be as lax as the rounding is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.backends.cpu.backend import CpuBackend
from engine.backends.native import library as cpu_library
from engine.formats.quants import F16, F32, I32, WEIGHT_TYPES, DType, dequantize, quantize_q8_0
from engine.graph import Capacity, Dim, Graph, Kind, Live, Tensor
from engine.ops.get_rows import GET_ROWS
from engine.ops.mul_mat import mul_mat
from engine.ops.mul_mat_id import mul_mat_id
from engine.placement.place import place
from engine.runtime.executor import Executable
from tests.support.int8 import INT8_LIMIT
from tests.support.opcase import RawWeights, assert_close, nmse
from tools.randblocks import TYPES, random_blocks

Array = np.ndarray[Any, Any]
Chunks = tuple[tuple[int, int], ...]
ISAS = cpu_library.usable()
# They have no layout of their own and are rounded to Q8_0 when they are loaded.
ROUNDED = {"IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ3_S", "IQ2_S", "IQ1_M"}
# Half a step of 1/127 of the largest of 32, and the step itself rounded to float16, which moves up
# to 127 steps by 2^-11 of themselves.
ROUNDING_BOUND = 1 / 254 + 2**-11
# Sums of float32 products, in any order.
EXACT_LIMIT = 1e-10
# A weight is computed in another order than gguf's, which moves it by up to 2^-8 of a step and tips
# some over to the next bfloat16, 2^-8 away: seldom more than one in 200. Of three values all that
# are not 0 have one size in a block, so that they tip over together; but none does where products
# and sums are rounded at once (25 weights: 1e-14 on AVX2, up to 6e-7 on portable).
TIPPED_LIMIT, TIPPED_TOGETHER_LIMIT = 5e-7, 2e-6
# Rounding two operands to bfloat16: at most 2^-9 of a value each, a third of its square on average.
TILES_LIMIT = 2 * 2.0**-18 / 3
STEPS, FINE_STEPS = 127, 127 * 128  # Of the largest value of a k-block.
N_OUT, N_EXPERTS, N_USED = 37, 3, 2
CAPACITY = 160
N_TOKENS = (1, 3, 64, 65, 130)
# Sequences whose rows have row tiles, and remainder rows before, between and after them, by number
# of rows. Row tiles are (first row, rows).
CHUNKS = {
    64: ((0, 64),),
    65: ((5, 2), (0, 17), (0, 1), (0, 16), (0, 15), (0, 14)),
    130: ((0, 39), (0, 64), (0, 1), (0, 23), (0, 3)),
}
TILES = {64: [(0, 64)], 65: [(2, 17), (20, 16)], 130: [(0, 39), (39, 64), (104, 23)]}

every_type = pytest.mark.parametrize("dtype", WEIGHT_TYPES.values(), ids=str)


# Matrix units; bits of rows outside row tiles.
KINDS = ((False, 8), (False, 15), (True, 8), (True, 15))


@pytest.fixture(params=[(isa, *kind) for isa in ISAS for kind in KINDS], ids=str)
def backend(request: pytest.FixtureRequest) -> CpuBackend:
    isa, matrix, activations = request.param
    return CpuBackend(2, isa, matrix, activations)


def columns_of(dtype: DType) -> int:
    """An odd number, or an odd number of blocks or tiles."""
    return {1: 77 if dtype is F32 else 160, 32: 96, 64: 320, 128: 384, 256: 768}[dtype.block_elems]


def random_weight(dtype: DType, *lead: int, rng: np.random.Generator, std: float = 0.5) -> Array:
    """Bytes of [*lead, columns], with sub-scales of all sizes."""
    block = replace(TYPES[dtype.name], high=(0, 0, 0))
    n_blocks = int(np.prod(lead)) * columns_of(dtype) // dtype.block_elems
    return random_blocks(block, n_blocks, std, rng)


def kept(dtype: DType, raw: Array, *lead: int) -> Array:
    """The values that the backend has of a weight."""
    values = dequantize(dtype, raw, (*lead, columns_of(dtype)))
    if dtype.name not in ROUNDED:
        return values
    return dequantize(WEIGHT_TYPES["Q8_0"], quantize_q8_0(values), values.shape)


def activation(name: str, *shape: int, dtype: DType = F32) -> Tensor:
    return Tensor(name, (Dim(CAPACITY, "n_tokens"), *shape), dtype, Kind.ACTIVATION)


def run(
    backend: CpuBackend,
    graph: Graph,
    outputs: tuple[Tensor, ...],
    raw: Array,
    factors: Array | None = None,
) -> Executable:
    graph.outputs = {f"out{i}": t for i, t in enumerate(outputs)}
    return Executable(place(graph, [backend], strict=True), RawWeights({"w": raw}, factors))


def rounded(x: Array, steps: int = STEPS, group: int = 32) -> Array:
    """x [..., in] in float64 as QUANTIZE_ROWS leaves it: per 32 columns, `steps` to max |x|. A last
    group may have fewer columns."""
    groups = x.astype(np.float32).reshape(-1, min(group, x.shape[-1]))
    scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(steps)
    inverse = np.divide(np.float32(1), scale, where=scale > 0, out=np.zeros_like(scale))
    # np.rint rounds halves to even.
    return (np.rint(groups * inverse).astype(np.float64) * scale).reshape(x.shape)


def to_bfloat16(x: Array) -> Array:
    """x in float64 as bfloat16 has it: a float32's upper half, to the nearest, ties to even."""
    bits: Array = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def random_rows(rng: np.random.Generator, *shape: int) -> Array:
    """Normal float32 values, none so close to half a step that a last bit decides over a step."""
    x = rng.normal(size=shape).astype(np.float32)
    groups = x.reshape(-1, 32) if shape[-1] % 32 == 0 else x[:0]
    near = np.array([True])
    while near.any():
        units = groups / np.abs(groups.astype(np.float64)).max(axis=1, keepdims=True)
        near = np.zeros(groups.shape, bool)
        for n_steps, distance in ((STEPS, 1e-3), (FINE_STEPS, 5e-3)):
            steps = units * n_steps
            near |= np.abs(steps - np.floor(steps) - 0.5) < distance
        groups[near] *= np.float32(0.9)
    return x


def test_which_types_are_kept_exactly() -> None:
    library = cpu_library.load()
    rounded = {t.name for t in WEIGHT_TYPES.values() if library.layout_of(t.ggml_id) < 0}
    assert rounded == ROUNDED


@every_type
# The second makes scales that float16 has as subnormal numbers only.
@pytest.mark.parametrize("std", [0.5, 1e-5])
def test_rows_of_a_table(
    backend: CpuBackend, dtype: DType, std: float, rng: np.random.Generator
) -> None:
    """Bit for bit: a decoded value is rounded once, as gguf's is."""
    raw = random_weight(dtype, N_OUT, rng=rng, std=std)
    graph = Graph(Capacity(CAPACITY))
    table = graph.weight("w", (N_OUT, columns_of(dtype)), dtype)
    operand = graph.input("ids", (Dim(CAPACITY, "n_tokens"),))
    (out,) = graph.add(GET_ROWS, "rows", {"table": table, "ids": operand})
    ids = rng.permutation(N_OUT).astype(np.int32)
    got = run(backend, graph, (out,), raw).run({"ids": ids}, Live(N_OUT, 1, 1))["out0"]
    assert np.array_equal(got, kept(dtype, raw, N_OUT)[ids])


@pytest.mark.parametrize("name", sorted(ROUNDED))
def test_a_rounded_type_is_off_by_at_most_half_a_step(name: str, rng: np.random.Generator) -> None:
    dtype = WEIGHT_TYPES[name]
    raw = random_weight(dtype, 999, rng=rng)
    values = dequantize(dtype, raw, (999, columns_of(dtype))).reshape(-1, 32)
    error = np.abs(kept(dtype, raw, 999).reshape(-1, 32).astype(np.float64) - values)
    largest = np.abs(values).max(axis=1)
    assert (error.max(axis=1) <= ROUNDING_BOUND * largest).all()
    # The bound is no wider than it has to be, where values are on no coarse grid.
    if name in ("IQ2_XS", "IQ3_S", "IQ3_XXS"):
        assert (error.max(axis=1) > 0.9 / 254 * largest).any()


def rows_in_tiles(n: int) -> Array:
    """Whether each of n rows is in a row tile: bool [n]."""
    in_tiles = np.zeros(n, bool)
    for row, length in TILES.get(n, ()):
        in_tiles[row : row + length] = True
    return in_tiles


class Check:
    """Products against float64 ones with rounded operands; and with such that are not, all row
    counts together, since a few outputs may by chance be smaller than their terms."""

    def __init__(self, backend: CpuBackend, dtype: DType, raw: Array, *lead: int) -> None:
        self._dtype = dtype
        self._kept = kept(dtype, raw, *lead).astype(np.float64)
        self._true = dequantize(dtype, raw, self._kept.shape).astype(np.float64)
        plain = dtype.block_elems == 1
        self._has_tiles = backend.matrix and dtype not in (F32, F16) and columns_of(dtype) % 32 == 0
        self._has_tiles &= plain or len(lead) == 1
        tip_together = backend.library.isa == "portable" and dtype.name in ("TQ1_0", "TQ2_0")
        self._limit = TIPPED_TOGETHER_LIMIT if tip_together else TIPPED_LIMIT
        self._has_fine = backend.has_fine
        self._got: list[Array] = []
        self._want: list[Array] = []

    def add(self, live: Live, got: Array, x: Array, product: Any) -> None:
        in_tiles = rows_in_tiles(len(got))
        if self._has_tiles:
            tiles = product(to_bfloat16(x), to_bfloat16(self._kept))
            assert_close(got[in_tiles], tiles[in_tiles], self._limit, "in tiles")
        coarse = fine = product(x.astype(np.float64), self._kept)
        if self._dtype.block_elems > 1:
            coarse, fine = (product(rounded(x, n), self._kept) for n in (STEPS, FINE_STEPS))
        if not self._has_tiles:
            assert_close(got[in_tiles], coarse[in_tiles], EXACT_LIMIT, "rows of row tiles")
        want = fine if self._has_fine else coarse
        assert_close(got[~in_tiles], want[~in_tiles], EXACT_LIMIT, "other rows")
        self._got.append(got)
        self._want.append(product(x.astype(np.float64), self._true))

    def end(self) -> None:
        # Weights that are rounded to int8 too add as much again.
        limit = INT8_LIMIT * (2 if self._dtype.name in ROUNDED else 1)
        limit = TILES_LIMIT if self._dtype.block_elems == 1 else limit
        pooled = np.concatenate(self._got), np.concatenate(self._want)
        assert_close(*pooled, limit, "operands as they are")


@every_type
def test_products(backend: CpuBackend, dtype: DType, rng: np.random.Generator) -> None:
    n_in = columns_of(dtype)
    raw, graph = random_weight(dtype, N_OUT, rng=rng), Graph(Capacity(CAPACITY))
    x = activation("x", n_in)
    outputs = mul_mat(graph, "product", x, graph.weight("w", (N_OUT, n_in), dtype))
    executable, check = run(backend, graph, outputs, raw), Check(backend, dtype, raw, N_OUT)
    for n in N_TOKENS:
        values, live = random_rows(rng, n, n_in), Live(n, 1, 1, chunks=CHUNKS.get(n, ()))
        backend.write(x, values)
        check.add(live, executable.run({}, live)["out0"], values, lambda x, w: x @ w.T)
    check.end()


@every_type
def test_rows_that_share_a_pass_have_the_bits_of_one(
    backend: CpuBackend, dtype: DType, rng: np.random.Generator
) -> None:
    n_in = columns_of(dtype)
    raw, graph = random_weight(dtype, N_OUT, rng=rng), Graph(Capacity(CAPACITY))
    x = activation("x", n_in)
    outputs = mul_mat(graph, "product", x, graph.weight("w", (N_OUT, n_in), dtype))
    executable, values = run(backend, graph, outputs, raw), random_rows(rng, 65, n_in)

    def products(rows: Array, chunks: Chunks) -> Array:
        backend.write(x, rows)
        return executable.run({}, Live(len(rows), 1, 1, chunks=chunks))["out0"].copy()

    one = ((5, 1),)
    alone = np.concatenate([products(row[np.newaxis], one) for row in values])
    for n in (*range(2, 10), 13, 16, 19, 37, 65):
        assert products(values[:n], one * n).tobytes() == alone[:n].tobytes(), n
    # Those between row tiles.
    others = ~rows_in_tiles(65)
    assert products(values, CHUNKS[65])[others].tobytes() == alone[others].tobytes()


@every_type
@pytest.mark.parametrize("per_expert", [False, True])
def test_products_with_experts(
    backend: CpuBackend, dtype: DType, per_expert: bool, rng: np.random.Generator
) -> None:
    """A row for all experts of a token, or one for each and their weighted sum."""
    n_in, lead = columns_of(dtype), (N_EXPERTS, N_OUT)
    raw, graph = random_weight(dtype, *lead, rng=rng), Graph(Capacity(CAPACITY))
    x = activation("x", *((N_USED, n_in) if per_expert else (n_in,)))
    ids, shares = activation("ids", N_USED, dtype=I32), activation("shares", N_USED)
    given = {"weights": shares} if per_expert else {}
    outputs = mul_mat_id(graph, "product", x, ids, graph.weight("w", (*lead, n_in), dtype), **given)
    executable, check = run(backend, graph, outputs, raw), Check(backend, dtype, raw, *lead)
    for n in N_TOKENS:
        values, live = random_rows(rng, n, *x.shape[1:]), Live(n, 1, 1, chunks=CHUNKS.get(n, ()))
        chosen = np.argsort(rng.random((n, N_EXPERTS)), axis=1)[:, :N_USED].astype(np.int32)
        share = rng.uniform(0, 1, (n, N_USED)).astype(np.float32)
        for tensor, rows in ((x, values), (ids, chosen), (shares, share)):
            backend.write(tensor, rows)

        def product(x: Array, w: Array, chosen: Array = chosen, share: Array = share) -> Array:
            rows = x if per_expert else np.repeat(x[:, np.newaxis], N_USED, axis=1)
            # Of every expert: one product of matrices is faster than many with vectors.
            every = (rows @ w.reshape(-1, n_in).T).reshape(*rows.shape[:2], *lead)
            out = np.take_along_axis(every, chosen[..., np.newaxis, np.newaxis], 2)[:, :, 0]
            return np.einsum("tu,tuo->to", share.astype(np.float64), out) if per_expert else out

        check.add(live, executable.run({}, live)["out0"], values, product)
    check.end()


def test_factors_of_matrices(backend: CpuBackend, rng: np.random.Generator) -> None:
    """Of a table, whose values are exact; and of each expert, in rows one by one and in tiles."""
    dtype = WEIGHT_TYPES["NVFP4"]
    n_in, lead = columns_of(dtype), (N_EXPERTS, N_OUT)
    factors = rng.uniform(1e-4, 3, N_EXPERTS).astype(np.float32)
    raw = random_weight(dtype, *lead, rng=rng)
    weight = kept(dtype, raw, *lead).astype(np.float64) * factors[:, np.newaxis, np.newaxis]
    graph = Graph(Capacity(CAPACITY))
    table = graph.weight("w", (N_OUT, n_in), dtype)
    (out,) = graph.add(GET_ROWS, "rows", {"table": table, "ids": graph.input("ids", (5,))})
    got = run(backend, graph, (out,), raw[: raw.size // N_EXPERTS], factors[:1])
    rows = got.run({"ids": np.arange(5, dtype=np.int32)}, Live(5, 1, 1))["out0"]
    np.testing.assert_allclose(rows, weight[0, :5], rtol=3e-7)

    graph, x, ids = (
        Graph(Capacity(CAPACITY)),
        activation("x", n_in),
        activation("ids", 1, dtype=I32),
    )
    outputs = mul_mat_id(graph, "product", x, ids, graph.weight("w", (*lead, n_in), dtype))
    executable = run(backend, graph, outputs, raw, factors)
    for n in N_TOKENS:
        values, live = random_rows(rng, n, n_in), Live(n, 1, 1, chunks=CHUNKS.get(n, ()))
        chosen = rng.integers(0, N_EXPERTS, (n, 1)).astype(np.int32)
        backend.write(x, values)
        backend.write(ids, chosen)
        fine = rows_in_tiles(n) < backend.has_fine
        x_rounded = np.where(fine[:, np.newaxis], rounded(values, FINE_STEPS), rounded(values))
        want = np.einsum("ti,toi->to", x_rounded, weight[chosen[:, 0]])
        assert_close(executable.run({}, live)["out0"][:, 0], want, EXACT_LIMIT, f"{n} rows")


@pytest.mark.parametrize("dtype", [t for t in WEIGHT_TYPES.values() if t.block_elems > 1], ids=str)
@pytest.mark.parametrize("activations", [8, 15])
@pytest.mark.parametrize("isa", ISAS)
def test_experts_by_tiles_of_int8(
    isa: str, activations: int, dtype: DType, rng: np.random.Generator
) -> None:
    """The bits of rows one by one: dot products are exact, and summed in the same order."""
    n_in, lead = columns_of(dtype), (N_EXPERTS, N_OUT)
    raw, graph = random_weight(dtype, *lead, rng=rng), Graph(Capacity(CAPACITY))
    x, ids = activation("x", n_in), activation("ids", N_USED, dtype=I32)
    outputs = mul_mat_id(graph, "product", x, ids, graph.weight("w", (*lead, n_in), dtype))
    backends = [CpuBackend(2, isa, matrix, activations) for matrix in (False, True)]
    executables = [run(backend, graph, outputs, raw) for backend in backends]
    # One expert has a pair of each token: tiles that are full, and rests of all sizes.
    for n in (2, 8, 9, 13, 16, 19, 27, 31, 64, 65, 77, 130, 160):
        values, live = random_rows(rng, n, n_in), Live(n, 1, 1, chunks=CHUNKS.get(n, ()))
        chosen = np.stack([np.zeros(n), rng.integers(1, N_EXPERTS, n)], axis=1).astype(np.int32)
        for backend in backends:
            backend.write(x, values)
            backend.write(ids, chosen)
        rows, tiles = (executable.run({}, live)["out0"] for executable in executables)
        assert rows.tobytes() == tiles.tobytes(), n


def test_halves_are_rounded_to_even(backend: CpuBackend, rng: np.random.Generator) -> None:
    """Steps of exactly 1: a largest value of as many steps as there are, and halves between."""
    largest = FINE_STEPS if backend.has_fine else STEPS
    dtype, n_in = WEIGHT_TYPES["Q8_0"], 96
    raw, graph = random_weight(dtype, N_OUT, rng=rng), Graph(Capacity(CAPACITY))
    x = activation("x", n_in)
    outputs = mul_mat(graph, "product", x, graph.weight("w", (N_OUT, n_in), dtype))
    values = (rng.integers(1 - largest, largest - 1, (9, n_in)) + 0.5).astype(np.float32)
    values[:, ::32] = largest
    values[0, :32] = 0
    executable = run(backend, graph, outputs, raw)
    backend.write(x, values)
    got = executable.run({}, Live(9, 1, 1))["out0"]
    weights = kept(dtype, raw, N_OUT).astype(np.float64)
    assert_close(got, rounded(values, largest) @ weights.T, EXACT_LIMIT, "halves")
    # Another rule is told apart.
    up = np.where(np.abs(values) == largest, values, np.floor(values + 0.5)).astype(np.float64)
    assert nmse(got, up @ weights.T) > EXACT_LIMIT


@pytest.mark.parametrize("in_tile", [False, True])
@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_K", "IQ4_XS", "MXFP4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-40], ids=str)
def test_what_is_not_finite_is_not_lost(
    backend: CpuBackend, name: str, value: float, in_tile: bool, rng: np.random.Generator
) -> None:
    """It shows in all products of its row, and in no other row's; tiny numbers are no trouble."""
    dtype = WEIGHT_TYPES[name]
    n_in = columns_of(dtype)
    raw, graph = random_weight(dtype, N_OUT, rng=rng), Graph(Capacity(CAPACITY))
    x = activation("x", n_in)
    outputs = mul_mat(graph, "product", x, graph.weight("w", (N_OUT, n_in), dtype))
    executable = run(backend, graph, outputs, raw)
    values, live = (
        random_rows(rng, 18, n_in),
        Live(18, 1, 1, chunks=((0, 1), (0, 16), (0, 1)) if in_tile else ()),
    )
    backend.write(x, values)
    want = executable.run({}, live)["out0"]
    values[4, : n_in // 2] = 0 if np.isfinite(value) else values[4, : n_in // 2]
    values[4, 5] = value
    backend.write(x, values)
    got = executable.run({}, live)["out0"]
    assert (np.isfinite(got[4]) == np.isfinite(value)).all()
    others = np.delete(np.arange(18), 4)
    assert np.array_equal(got[others], want[others])
