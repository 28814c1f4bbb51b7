"""Copies of weights in bfloat16: of which weights, in what order, and never too many."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engine.backends.base import Copies
from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.sampling import CudaSampler
from engine.errors import NotEnoughMemoryError
from engine.formats.quants import F32, WEIGHT_TYPES
from engine.graph import Capacity, Dim, Graph, Kind, Live, Tensor
from engine.ops.mul_mat import mul_mat
from engine.placement.estimate import estimate
from engine.placement.place import Plan
from engine.runtime.executor import DeviceRunner, Executable
from tests.backends.cuda.test_mul_mat import CAPACITY, Rng, activation, executable, weight_bytes
from tests.support.cuda_devices import engine_on
from tests.support.cuda_emulator import device as emulated
from tests.support.cuda_emulator.device import EmulatedDevice

pytestmark = pytest.mark.skipif(bool(emulated.missing()), reason=emulated.missing())
N_IN = 768
OPTIONS = {"n_ctx": 256, "n_parallel": 3, "cache_ram": 0}


def products(
    backend: CudaBackend, weights: Sequence[tuple[str, int]], rng: Rng, n_tokens: int = CAPACITY
) -> Executable:
    """A MUL_MAT for each weight: its type, and its rows."""
    graph, raws = Graph(Capacity(n_tokens)), {}
    x = Tensor("x", (Dim(n_tokens, "n_tokens"), N_IN), F32, Kind.ACTIVATION)
    outputs: list[Tensor] = []
    for i, (name, n_out) in enumerate(weights):
        dtype = WEIGHT_TYPES[name]
        raws[f"w{i}"], _ = weight_bytes(dtype, n_out, N_IN, rng=rng)
        outputs += mul_mat(graph, f"n{i}", x, graph.weight(f"w{i}", (n_out, N_IN), dtype))
    return executable(backend, graph, outputs, raws)


def copied(backend: CudaBackend) -> list[str]:
    return [t.name for t in backend.weights.bf16]


def test_small_weights_and_those_of_many_bits_come_first(rng: Rng) -> None:
    """By what a step without the copy moves for a byte of it; plain weights have no copies."""
    kinds = [("Q4_K", 640), ("F32", 64), ("Q8_0", 640), ("Q4_K", 320), ("BF16", 640), ("F16", 32)]
    backend = CudaBackend(EmulatedDevice())
    products(backend, kinds, rng)
    assert copied(backend) == ["w3", "w4", "w2", "w0"]


def test_a_weight_that_does_not_fit_leaves_its_room_to_the_next_ones(rng: Rng) -> None:
    kinds = [("Q8_0", 64), ("Q4_K", 640), ("Q4_K", 656), ("Q4_K", 32)]
    rows = dict(zip(("w3", "w0", "w1", "w2"), (32, 64, 640, 656), strict=True))
    size = 2 * N_IN
    plenty = CudaBackend(EmulatedDevice())
    run = products(plenty, kinds, rng)
    assert copied(plenty) == list(rows)
    splits = run.plan.splits
    for room, expected in (
        (0, []), (32, ["w3"]), (95, ["w3"]), (96, ["w3", "w0"]), (735, ["w3", "w0"]),
        (736, ["w3", "w0", "w1"]), (752, ["w3", "w0", "w1"]), (1391, ["w3", "w0", "w1"]),
        (1392, ["w3", "w0", "w1", "w2"]),
    ):  # fmt: skip
        n_bytes = size * sum(rows[name] for name in expected)
        # Half of what is left is theirs.
        assert plenty.copies(splits, 2 * room * size) == Copies(n_bytes, len(expected), 4)


@pytest.mark.parametrize(("n_tokens", "n_copies"), [(1, 0), (16, 0), (17, 1), (CAPACITY, 1)])
def test_no_copy_where_no_step_has_more_than_a_few_rows(
    rng: Rng, n_tokens: int, n_copies: int
) -> None:
    backend = CudaBackend(EmulatedDevice())
    run = products(backend, [("Q8_0", 37)], rng, n_tokens)
    assert len(copied(backend)) == n_copies
    kernels = [i.kernel for _, program in run._programs for i in program.instructions]
    assert ("gemm_bf16" in kernels) == bool(n_copies)
    assert not {"gemm_64", "gemm_128", "expand"} & set(kernels)


def test_a_weight_of_several_products_has_one_copy(rng: Rng) -> None:
    graph, dtype = Graph(Capacity(CAPACITY)), WEIGHT_TYPES["Q8_0"]
    w, outputs = graph.weight("w", (N_IN, N_IN), dtype), [activation("x", N_IN)]
    for i in range(2):
        outputs += mul_mat(graph, f"n{i}", outputs[-1], w)
    backend = CudaBackend(EmulatedDevice())
    raw, _ = weight_bytes(dtype, N_IN, N_IN, rng=rng)
    run = executable(backend, graph, outputs[1:], {"w": raw})
    assert backend.copies(run.plan.splits) == Copies(2 * N_IN * N_IN, 1, 1)


def test_results_do_not_depend_on_which_weights_have_copies(rng: Rng) -> None:
    """But for the rounding of cuBLAS's sums, of 300 rows."""
    kinds = [("Q8_0", 64), ("Q4_K", 200), ("BF16", 37)]
    x = rng.normal(size=(CAPACITY, N_IN)).astype(np.float32)
    raws = [weight_bytes(WEIGHT_TYPES[name], n, N_IN, rng=rng) for name, n in kinds]
    rounded = (x.view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32).astype(np.float64)
    for share in (0.0, 1.0):
        backend = CudaBackend(EmulatedDevice(), copy_share=share)
        graph, outputs = Graph(Capacity(CAPACITY)), list[Tensor]()
        at = activation("x", N_IN)
        for i, (name, n) in enumerate(kinds):
            w = graph.weight(f"w{i}", (n, N_IN), WEIGHT_TYPES[name])
            outputs += mul_mat(graph, f"n{i}", at, w)
        run = executable(backend, graph, outputs, {f"w{i}": r for i, (r, _) in enumerate(raws)})
        assert len(copied(backend)) == 3 * int(share)
        backend.write(at, x)
        for i, values in enumerate(run.run({}, Live(CAPACITY, 1, 1)).values()):
            want = rounded @ raws[i][1].T
            assert np.abs(values - want).max() < 0.01 * np.abs(want).max()


def _needed(plan: Plan, backend: CudaBackend) -> int:
    return estimate(plan, [backend]).total


@pytest.fixture(scope="module")
def preset(models: object) -> Path:
    path: Path = models("tiny", "Q4_K_M")  # type: ignore[operator]
    return path


def test_what_is_estimated_is_what_is_taken(preset: Path) -> None:
    """All that a loaded engine holds on the device, to the byte; the sampler's buffers and the
    copies are beside the estimate."""
    device = EmulatedDevice()
    before = device.free_bytes()
    backend = CudaBackend(device)
    with engine_on(preset, [backend], **OPTIONS, n_ubatch=64) as engine:
        need = estimate(engine.plan, [backend])
        assert isinstance(engine.loop.runner, DeviceRunner)
        sampler = engine.loop.runner._device
        assert isinstance(sampler, CudaSampler)
        own = sum(memory.nbytes for memory in sampler._memory) + backend.sample_specs.nbytes
        taken = before - device.free_bytes() - backend.copies(engine.plan.splits).n_bytes - own
        # Inputs lie at multiples of 64 bytes, behind the live counts.
        assert 0 <= taken - need.total < 256 + 64 * (1 + len(engine.plan.graph.inputs))


def test_a_plan_that_fits_is_never_kept_from_loading(preset: Path, rng: Rng) -> None:
    """With a little more than it needs, whatever that is: half of the rest is left."""
    device = EmulatedDevice()
    with engine_on(preset, [CudaBackend(device)], **OPTIONS, n_ubatch=64) as engine:
        need = _needed(engine.plan, engine.plan.backends[0])  # type: ignore[arg-type]
        tokens = rng.integers(0, engine.model.n_vocab, 40).tolist()
    for extra in (2 << 20, int(rng.integers(2 << 20, 4 << 20)), 6 << 20):
        small = EmulatedDevice(need + (128 << 20) + extra)
        backend = CudaBackend(small)
        with engine_on(preset, [backend], **OPTIONS, n_ubatch=64, n_gpu_layers=99) as engine:
            copies = backend.copies(engine.plan.splits)
            assert copies.n_bytes <= extra // 2
            engine.logits(tokens)
            assert len(list(engine.generate(tokens))) > 0
    with (
        pytest.raises(NotEnoughMemoryError, match="not enough memory on cuda: expected at most"),
        engine_on(
            preset, [CudaBackend(EmulatedDevice(need + (128 << 20) - 1))], **OPTIONS,
            n_ubatch=64, n_gpu_layers=99,
        ),
    ):  # fmt: skip
        pass


def test_the_estimate_takes_no_memory_of_the_device(preset: Path) -> None:
    device = EmulatedDevice()
    with engine_on(preset, [CudaBackend(device)], **OPTIONS) as engine:
        before, n_launches = device.free_bytes(), device.n_launches
        assert estimate(engine.plan).activations > 0
        assert (device.free_bytes(), device.n_launches) == (before, n_launches)


def test_batch_invariant_engines_have_none(rng: Rng) -> None:
    backend = CudaBackend(EmulatedDevice(), batch_invariant=True)
    run = products(backend, [("Q8_0", 37)], rng)
    assert backend.copies(run.plan.splits) == backend.copies(run.plan.splits, 1 << 30) == Copies()


def test_engines_of_small_steps_have_none(preset: Path) -> None:
    backend = CudaBackend(EmulatedDevice())
    with engine_on(preset, [backend], **OPTIONS, n_ubatch=16, n_batch=16):
        assert copied(backend) == []
    with engine_on(preset, [backend], **OPTIONS, n_ubatch=17, n_batch=17):
        assert copied(backend)
