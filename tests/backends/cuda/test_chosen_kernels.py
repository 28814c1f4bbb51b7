"""The kernels that products launch, by their numbers of rows, weights and copies."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.program import CudaProgram
from engine.formats.quants import I32, WEIGHT_TYPES
from engine.graph import Capacity, Graph, Live
from engine.ops.mul_mat import mul_mat
from engine.ops.mul_mat_id import mul_mat_id
from engine.runtime.executor import Executable
from tests.backends.cuda.test_mul_mat import (
    CAPACITY,
    Rng,
    activation,
    backend_of,
    executable,
    weight_bytes,
)
from tests.support.cuda_emulator import device as emulated
from tests.support.cuda_emulator.device import EmulatedDevice

pytestmark = pytest.mark.skipif(bool(emulated.missing()), reason=emulated.missing())
N_IN = 768
# Rows up to which kernels are launched, and these. Conversions of rows serve all nodes that read
# them, so some steps launch one that no product of theirs needs.
Table = Sequence[tuple[int, str]]
PLAIN = [(1, "mul_mat_1"), (2, "mul_mat_floats_2"), (4, "mul_mat_floats_4")]
FEW = [(1, "mul_mat_1"), *((n, f"stage_rows mul_mat_rows_{n}") for n in (4, 8, 16))]
WITHOUT_COPY = [
    (128, "round_rows gemm_64"),
    (255, "round_rows gemm_128"),
    (CAPACITY, "round_rows expand gemm_bf16"),
]
WITH_COPY = [(CAPACITY, "round_rows gemm_bf16")]
INVARIANT = [*FEW, (CAPACITY, "stage_rows mul_mat_rows_16")]


def check(run: Executable, table: Table) -> None:
    """Both ends of each range of rows launch what the table says."""
    ((_, program),) = run._programs
    assert isinstance(program, CudaProgram)
    more_than = 0
    for most, kernels in table:
        for n in (more_than + 1, most):
            chosen = [program.instructions[i].kernel for i in program._chosen(Live(n, 1, 1))]
            assert chosen == kernels.split(), n
        more_than = most


def product(backend: CudaBackend, types: Sequence[str], rng: Rng) -> Executable:
    """One MUL_MAT with a weight of each type."""
    graph, raws, weights = Graph(Capacity(CAPACITY)), {}, []
    for i, name in enumerate(types):
        dtype = WEIGHT_TYPES[name]
        raws[f"w{i}"], _ = weight_bytes(dtype, 37, N_IN, rng=rng)
        weights.append(graph.weight(f"w{i}", (37, N_IN), dtype))
    return executable(
        backend, graph, mul_mat(graph, "product", activation("x", N_IN), *weights), raws
    )


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_K"])
def test_quantized(rng: Rng, dtype: str) -> None:
    device = EmulatedDevice()
    check(product(backend_of(device), [dtype], rng), [*FEW, *WITH_COPY])
    check(product(backend_of(device, copies=False), [dtype], rng), [*FEW, *WITHOUT_COPY])
    invariant = backend_of(device, batch_invariant=True)
    check(product(invariant, [dtype], rng), INVARIANT)
    assert not invariant.weights.bf16


def test_plain(rng: Rng) -> None:
    device = EmulatedDevice()
    check(product(backend_of(device), ["F32"], rng), [*PLAIN, (CAPACITY, "mul_mat_floats_8")])
    few = [*PLAIN, (16, "mul_mat_floats_8")]
    check(product(backend_of(device, copies=False), ["BF16"], rng), [*few, *WITHOUT_COPY])


def test_several_weights(rng: Rng) -> None:
    """Few rows take one launch, more rows one for each weight, plain weights together."""
    run = product(backend_of(EmulatedDevice(), copies=False), ["F32", "Q8_0", "F16", "Q4_K"], rng)
    check(run, [*FEW, (128, "mul_mat_floats_8 round_rows gemm_64 gemm_64")])


@pytest.mark.parametrize("summed", [False, True])
def test_experts(rng: Rng, summed: bool) -> None:
    device, (n_experts, n_used) = EmulatedDevice(), (5, 2)
    end = " sum_experts" if summed else ""
    tiles = f"sort_by_expert mul_mat_id_rows{end}"
    large_from = 48 * n_experts // n_used
    many = [
        (large_from, f"round_rows sort_by_expert gemm_experts_32{end}"),
        (CAPACITY, f"round_rows sort_by_expert gemm_experts_64{end}"),
    ]
    few, converted, every = (16, tiles), (64, f"{tiles} round_rows"), [(CAPACITY, tiles)]
    for dtype, invariant, table in (
        ("Q8_0", False, [few, converted, *many]), ("F32", False, every), ("Q8_0", True, every)
    ):  # fmt: skip
        graph, weight = Graph(Capacity(CAPACITY)), WEIGHT_TYPES[dtype]
        raw, _ = weight_bytes(weight, n_experts, 37, N_IN, rng=rng)
        outputs = mul_mat_id(
            graph, "product", activation("x", *((n_used, N_IN) if summed else (N_IN,))),
            activation("ids", n_used, dtype=I32), graph.weight("w", (n_experts, 37, N_IN), weight),
            weights=activation("shares", n_used) if summed else None,
        )  # fmt: skip
        backend = CudaBackend(device, batch_invariant=invariant)
        check(executable(backend, graph, outputs, {"w": raw}), table)
