"""Products of every weight type on CUDA, by each way that row counts and memory choose.

As in test_cpu_weights.py: with operands rounded as the kernels round them, what is left is float32
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.copies import SHARE
from engine.backends.cuda.device import Device
from engine.backends.cuda.kernels import threads
from engine.backends.cuda.lower import gemv
from engine.backends.cuda.lower import mul_mat as products
from engine.backends.cuda.lower import mul_mat_id as experts
from engine.formats.quants import BF16, F32, I32, WEIGHT_TYPES, DType, dequantize, quantize_q8_0
from engine.graph import Capacity, Dim, Graph, Kind, Live, Tensor
from engine.ops.get_rows import GET_ROWS
from engine.ops.mul_mat import mul_mat
from engine.ops.mul_mat_id import mul_mat_id
from engine.placement.place import place
from engine.runtime.executor import Executable
from tests.backends.cpu.test_weights import ROUNDED, TIPPED_LIMIT, random_rows, rounded, to_bfloat16
from tests.support.cuda_devices import DEVICES
from tests.support.cuda_emulator import device as emulated
from tests.support.cuda_emulator.device import EmulatedDevice
from tests.support.opcase import RawWeights, assert_close
from tools.randblocks import TYPES, random_blocks

Array = np.ndarray[Any, Any]
Rng = np.random.Generator
CAPACITY, N_OUT, N_EXPERTS, N_USED = 300, 37, 3, 2
# One of each pass over the panels, all of them, and numbers beside their sizes.
ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 40, 64, 65, 130)


# Up to how many rows they are integers.
FEW, OF_EXPERTS = products.FEW_ROWS, experts.PANEL_TOKENS
# A row is rounded to so many steps; a part of 1,000 lies within float32's error of a tie.
STEPS, ROW_LIMIT = 127 * 128, 1e-9
every_type = pytest.mark.parametrize("dtype", WEIGHT_TYPES.values(), ids=str)
SOME = [
    F32,
    BF16,
    *(WEIGHT_TYPES[name] for name in ("Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "NVFP4", "Q1_0")),
]
some_types = pytest.mark.parametrize("dtype", SOME, ids=str)


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Device:
    made: Device = request.param()
    return made


@pytest.fixture(autouse=True)
def shared_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks share columns where these are fewer than would pay, and have several panels where
    these are few."""
    monkeypatch.setattr(gemv, "GEMV_WARPS", 4)
    monkeypatch.setattr(gemv, "RESIDENT_WARPS", 1)


def backend_of(device: Device, copies: bool = True, **options: Any) -> CudaBackend:
    """A backend, with or without room for weights' copies in bfloat16."""
    return CudaBackend(device, copy_share=SHARE if copies else 0.0, **options)


def activation(name: str, *shape: int, dtype: DType = F32) -> Tensor:
    return Tensor(name, (Dim(CAPACITY, "n_tokens"), *shape), dtype, Kind.ACTIVATION)


def executable(
    backend: CudaBackend, graph: Graph, outputs: Sequence[Tensor], raws: dict[str, Array]
) -> Executable:
    graph.outputs = {f"out{i}": t for i, t in enumerate(outputs)}
    return Executable(place(graph, [backend], strict=True), RawWeights(dict(raws)))


def columns(dtype: DType, n_batches: int = 0) -> int:
    """An odd number of blocks, or of columns where the type allows; with `n_batches`, more than so
    many batches of 256 columns."""
    n = {1: 77 if dtype is F32 else 160, 32: 96, 64: 320, 128: 384, 256: 768}[dtype.block_elems]
    return 256 * n_batches + n


def weight_bytes(dtype: DType, *shape: int, rng: Rng) -> tuple[Array, Array]:
    """A weight's bytes, and in float64 the values that the backend has of it."""
    block = replace(TYPES[dtype.name], high=(0, 0, 0))
    raw = random_blocks(block, int(np.prod(shape)) // dtype.block_elems, 0.5, rng)
    values = dequantize(dtype, raw, shape)
    if dtype.name in ROUNDED:
        values = dequantize(WEIGHT_TYPES["Q8_0"], quantize_q8_0(values), values.shape)
    return raw, values.astype(np.float64)


class Product:
    """MUL_MAT with one weight of random values, at a capacity of CAPACITY rows."""

    def __init__(self, backend: CudaBackend, dtype: DType, n_out: int, n_in: int, rng: Rng) -> None:
        raw, self.values = weight_bytes(dtype, n_out, n_in, rng=rng)
        graph = Graph(Capacity(CAPACITY))
        self._backend, self._x = backend, activation("x", n_in)
        outputs = mul_mat(graph, "product", self._x, graph.weight("w", (n_out, n_in), dtype))
        self._executable = executable(backend, graph, outputs, {"w": raw})

    def __call__(self, x: Array) -> Array:
        self._backend.write(self._x, x)
        return self._executable.run({}, Live(len(x), 1, 1))["out0"]


def limit(n_rows: int, few: int) -> float:
    return ROW_LIMIT if n_rows <= few else TIPPED_LIMIT


def wanted(dtype: DType, n_rows: int, x: Array, w: Array, product: Any, few: int) -> Array:
    """What comes of operands rounded as kernels for so many rows round them."""
    if n_rows > few and (dtype.block_elems > 1 or dtype is BF16):
        return np.asarray(product(to_bfloat16(x), to_bfloat16(w)))
    if dtype.block_elems == 1:
        return np.asarray(product(x.astype(np.float64), w))
    return np.asarray(product(rounded_batches(x), w))


def rounded_batches(x: Array) -> Array:
    """Rows rounded to STEPS steps of the largest value of each 256 columns."""
    return np.concatenate(
        [rounded(x[..., i : i + 256], STEPS, 256) for i in range(0, x.shape[-1], 256)], axis=-1
    )


def check_product(
    product: Product, dtype: DType, rng: Rng, rows: Sequence[int], few: int = FEW
) -> None:
    for n in rows:
        x = random_rows(rng, n, product.values.shape[1])
        want = wanted(dtype, n, x, product.values, lambda x, w: x @ w.T, few)
        assert_close(product(x), want, limit(n, few), f"{dtype}, {n} rows")


@every_type
def test_tables(device: Device, dtype: DType, rng: Rng) -> None:
    """Bit for bit."""
    n_in = columns(dtype)
    raw, values = weight_bytes(dtype, N_OUT, n_in, rng=rng)
    graph = Graph(Capacity(CAPACITY))
    table = graph.weight("w", (N_OUT, n_in), dtype)
    operand = graph.input("ids", (Dim(CAPACITY, "n_tokens"),))
    (out,) = graph.add(GET_ROWS, "rows", {"table": table, "ids": operand})
    ids = rng.permutation(N_OUT).astype(np.int32)
    run = executable(backend_of(device), graph, (out,), {"w": raw}).run
    assert np.array_equal(run({"ids": ids}, Live(N_OUT, 1, 1))["out0"], values[ids])


@every_type
def test_products(device: Device, dtype: DType, rng: Rng) -> None:
    product = Product(backend_of(device), dtype, N_OUT, columns(dtype), rng)
    check_product(product, dtype, rng, ROWS)


@every_type
def test_products_without_room_for_copies(device: Device, dtype: DType, rng: Rng) -> None:
    """By gemm.cu, and of more rows with a buffer."""
    product = Product(backend_of(device, copies=False), dtype, N_OUT, columns(dtype), rng)
    check_product(product, dtype, rng, (16, 17, 65, 130, 256))


@some_types
@pytest.mark.parametrize("n_out", [N_OUT, 150])
def test_wide_and_deep_products(device: Device, dtype: DType, n_out: int, rng: Rng) -> None:
    """More columns than a block's warps have at once, and more rows than a tile; of few outputs
    several blocks share the columns."""
    product = Product(backend_of(device, copies=False), dtype, n_out, columns(dtype, 9), rng)
    check_product(product, dtype, rng, (1, 2, 3, 7, 16, 33, 65))
    check_product(product, dtype, rng, (1, 2))


class SmallDevice(EmulatedDevice):
    """With the shared memory of compute capabilities 8.6 to 12.0 but for servers'."""

    shared_bytes = 99 << 10


@pytest.mark.skipif(bool(emulated.missing()), reason=emulated.missing())
@pytest.mark.parametrize("name", ["Q8_0", "Q6_K"])
def test_little_shared_memory(name: str, monkeypatch: pytest.MonkeyPatch, rng: Rng) -> None:
    """Fewer warps share the columns, and passes have 8 rows."""
    monkeypatch.setattr(gemv, "GEMV_WARPS", threads("mul_mat_1") // 32)
    dtype = WEIGHT_TYPES[name]
    for invariant in (False, True):
        backend = backend_of(SmallDevice(), batch_invariant=invariant)
        product = Product(backend, dtype, N_OUT, columns(dtype, 20), rng)
        check_product(product, dtype, rng, (1, 3, FEW), CAPACITY)
    for summed in (False, True):
        experts_ = Experts(backend, dtype, columns(dtype, 20), summed, rng)
        given = experts_.rows(5, rng)
        for got, of_first in zip(experts_(*given), experts_(*(a[:1] for a in given)), strict=True):
            assert np.array_equal(got[:1], of_first)


@some_types
def test_a_row_has_the_same_bits_alone_and_among_others(
    device: Device, dtype: DType, rng: Rng
) -> None:
    """However many there are, if that is asked for; else up to FEW."""
    n_in = columns(dtype, 2)
    for batch_invariant in (False, True):
        backend = backend_of(device, batch_invariant=batch_invariant)
        product = Product(backend, dtype, N_OUT, n_in, rng)
        x = random_rows(rng, 130, n_in)
        want = np.concatenate([product(x[i : i + 1]) for i in range(20)])
        for n in (2, 3, 5, 8, 9, FEW, *((17, 50, 130) if batch_invariant else ())):
            got = product(x[:n])[:20]
            assert np.array_equal(got, want[: len(got)]), f"{n} rows"


@pytest.mark.parametrize("dtype", [BF16, WEIGHT_TYPES["Q8_0"], WEIGHT_TYPES["Q5_K"]], ids=str)
def test_a_row_of_a_tile_has_the_same_bits_wherever_it_is(
    device: Device, dtype: DType, rng: Rng
) -> None:
    n_in = columns(dtype)
    product = Product(backend_of(device, copies=False), dtype, N_OUT, n_in, rng)
    x = random_rows(rng, 200, n_in)
    want, order = product(x), rng.permutation(200)
    assert np.array_equal(product(x[order]), want[order])
    assert np.array_equal(product(x[:65]), want[:65])


@pytest.mark.parametrize("n", [1, 5, 8, 16, 260])
@pytest.mark.parametrize(("copies", "n_in"), [(False, 256), (True, 256), (False, 768)])
def test_mixed_weights_and_what_follows(
    device: Device, n: int, copies: bool, n_in: int, rng: Rng
) -> None:
    """Several weights of one node; and a product that is gated and added to something."""
    backend, graph = backend_of(device, copies), Graph(Capacity(CAPACITY))
    types = [WEIGHT_TYPES[name] for name in ("Q4_K", "F32", "Q8_0", "BF16", "F16", "Q6_K")]
    made = [weight_bytes(t, 16 * i + 7, n_in, rng=rng) for i, t in enumerate(types)]
    weights = [graph.weight(f"w{i}", (16 * i + 7, n_in), t) for i, t in enumerate(types)]
    x, gate, add = activation("x", n_in), activation("gate", 1), activation("add", 7)
    outputs = mul_mat(graph, "several", x, *weights)
    (last,) = mul_mat(graph, "gated", x, weights[0], gate=gate, add=add)
    run = executable(
        backend, graph, (*outputs, last), {f"w{i}": r for i, (r, _) in enumerate(made)}
    )
    rows, gates = random_rows(rng, n, n_in), random_rows(rng, n, 1)
    added = random_rows(rng, n, 7)
    for tensor, values in ((x, rows), (gate, gates), (add, added)):
        backend.write(tensor, values)
    got = run.run({}, Live(n, 1, 1))
    for i, (dtype, (_, w)) in enumerate(zip(types, made, strict=True)):
        want = wanted(dtype, n, rows, w, lambda x, w: x @ w.T, FEW)
        assert_close(got[f"out{i}"], want, limit(n, FEW), f"{dtype}")
    want = wanted(types[0], n, rows, made[0][1], lambda x, w: x @ w.T, FEW)
    want = added + want / (1 + np.exp(-gates.astype(np.float64)))
    assert_close(got["out6"], want, limit(n, FEW), "gated")


class Experts:
    """MUL_MAT_ID with two matrices and a row per token, or one and a row per choice, summed."""

    def __init__(
        self, backend: CudaBackend, dtype: DType, n_in: int, summed: bool, rng: Rng
    ) -> None:
        sizes = (N_OUT,) if summed else (N_OUT, 150)
        made = [weight_bytes(dtype, N_EXPERTS, n, n_in, rng=rng) for n in sizes]
        self.values, self.summed, graph = [v for _, v in made], summed, Graph(Capacity(CAPACITY))
        self._backend, self.x = backend, activation("x", *((N_USED, n_in) if summed else (n_in,)))
        self._ids, self._shares = activation("ids", N_USED, dtype=I32), activation("shares", N_USED)
        outputs = mul_mat_id(
            graph, "product", self.x, self._ids,
            *(graph.weight(f"w{i}", (N_EXPERTS, n, n_in), dtype) for i, n in enumerate(sizes)),
            weights=self._shares if summed else None,
        )  # fmt: skip
        raws = {f"w{i}": raw for i, (raw, _) in enumerate(made)}
        self._executable = executable(backend, graph, outputs, raws)

    def __call__(self, x: Array, ids: Array, shares: Array) -> list[Array]:
        for tensor, rows in ((self.x, x), (self._ids, ids), (self._shares, shares)):
            if tensor is not self._shares or self.summed:
                self._backend.write(tensor, rows)
        return list(self._executable.run({}, Live(len(x), 1, 1)).values())

    def rows(self, n: int, rng: Rng) -> tuple[Array, Array, Array]:
        ids = np.argsort(rng.random((n, N_EXPERTS)), axis=1)[:, :N_USED].astype(np.int32)
        shares = rng.uniform(0, 1, (n, N_USED)).astype(np.float32)
        return random_rows(rng, n, *self.x.shape[1:]), ids, shares


@every_type
@pytest.mark.parametrize("summed", [False, True])
def test_experts(device: Device, dtype: DType, summed: bool, rng: Rng) -> None:
    product = Experts(backend_of(device), dtype, columns(dtype), summed, rng)
    for n in (1, 3, 9, 40, 70, 130):
        x, ids, shares = product.rows(n, rng)

        exact = shares.astype(np.float64)

        def by_expert(x: Array, w: Array, ids: Array = ids, shares: Array = exact) -> Array:
            rows = x if summed else np.repeat(x[:, np.newaxis], N_USED, axis=1)
            out = np.einsum("tui,tuoi->tuo", rows, w[ids])
            return np.einsum("tu,tuo->to", shares, out) if summed else out

        for got, w in zip(product(x, ids, shares), product.values, strict=True):
            want = wanted(dtype, n, x, w, by_expert, OF_EXPERTS)
            assert_close(got, want, limit(n, OF_EXPERTS), f"{n} tokens")


@some_types
@pytest.mark.parametrize("summed", [False, True])
def test_a_token_of_experts_has_the_same_bits(
    device: Device, dtype: DType, summed: bool, rng: Rng
) -> None:
    """However many there are, if that is asked for; else up to OF_EXPERTS."""
    for batch_invariant in (False, True):
        backend = backend_of(device, batch_invariant=batch_invariant)
        product = Experts(backend, dtype, columns(dtype, 2), summed, rng)
        given = product.rows(70, rng)
        parts = [product(*(a[i : i + 1] for a in given)) for i in range(10)]
        for n in (2, 5, 30, OF_EXPERTS, *([70] if batch_invariant else [])):
            for i, got in enumerate(product(*(a[:n] for a in given))):
                want = np.concatenate([outputs[i] for outputs in parts])[:n]
                assert np.array_equal(got[:10], want), f"{n} tokens, output {i}"


@pytest.mark.parametrize("n", [1, 4, 18, 70])
@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_K", "IQ4_XS"])
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_what_is_not_finite_is_not_lost(
    device: Device, name: str, value: float, n: int, rng: Rng
) -> None:
    """It shows in all products of its row, and in no other row's."""
    dtype, at = WEIGHT_TYPES[name], n // 2
    product = Product(backend_of(device), dtype, N_OUT, columns(dtype), rng)
    x = random_rows(rng, n, columns(dtype))
    want = product(x)
    x[at, 5] = value
    got = product(x)
    assert not np.isfinite(got[at]).any()
    others = np.delete(np.arange(n), at)
    assert np.array_equal(got[others], want[others])
