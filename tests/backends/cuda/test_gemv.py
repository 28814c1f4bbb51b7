"""Products of few rows on CUDA with the op before them in their launches, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.device import Device
from engine.backends.cuda.lower import gemv
from engine.backends.cuda.program import CudaProgram
from engine.formats.quants import F32, WEIGHT_TYPES
from engine.graph import Capacity, Graph, Live, Tensor
from engine.ops.add_rms_norm import ADD_RMS_NORM, add_rms_norm
from engine.ops.mul_mat import mul_mat
from engine.ops.rms_norm_gated import RMS_NORM_GATED
from engine.ops.swiglu import SWIGLU, swiglu
from tests.backends.cuda.test_mul_mat import activation, executable, weight_bytes
from tests.support.cuda_devices import DEVICES
from tests.support.opcase import assert_close

Array = np.ndarray[Any, Any]
Rng = np.random.Generator
# Rows are rounded to 15 bits of the largest of 256 columns: the squares of errors are 1/12 of a
# unit's on average. The largest value is seldom more than 30 times the root mean square.
LIMIT = (30 / (127 * 128)) ** 2 / 12
TYPES = [WEIGHT_TYPES[name] for name in ("Q4_K", "Q8_0", "Q6_K")]
N_IN, N_OUT, EPS = 768, 37, 1e-5


@pytest.fixture(params=DEVICES)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    """With few warps to a block, so that these have several batches, and blocks share columns."""
    monkeypatch.setattr(gemv, "GEMV_WARPS", 2)
    monkeypatch.setattr(gemv, "RESIDENT_WARPS", 1)
    device: Device = request.param()
    return CudaBackend(device)


class Fused:
    """An op, and the product that reads what it makes."""

    def __init__(self, backend: CudaBackend, rng: Rng) -> None:
        self.backend, self.rng, self.graph = backend, rng, Graph(Capacity(300))
        self.values: dict[Tensor, Array] = {}
        self.raws: dict[str, Array] = {}

    def rows(self, name: str, *shape: int, scale: float = 1.0) -> Tensor:
        """An activation of random rows; some are much larger than others."""
        tensor = activation(name, *shape)
        sizes = self.rng.uniform(0.1, 2, (11, *(1 for _ in shape))) * scale
        self.values[tensor] = (self.rng.normal(size=(11, *shape)) * sizes).astype(np.float32)
        return tensor

    def weight(self, name: str, *shape: int, dtype: Any = F32) -> tuple[Tensor, Array]:
        """A weight of random values, and these in float64."""
        self.raws[name], values = weight_bytes(dtype, *shape, rng=self.rng)
        return self.graph.weight(name, shape, dtype), values

    def run(self, outputs: Sequence[Tensor], n: int, fuses: bool = True) -> list[Array]:
        """What a step of n rows makes. If the op `fuses`, one row is a single launch and more are
        two; each row has the same bits alone."""
        run = executable(self.backend, self.graph, outputs, self.raws)
        for tensor, values in self.values.items():
            self.backend.write(tensor, values[:n])
        got = run.run({}, Live(n, 1, 1))
        ((_, program),) = run._programs
        assert isinstance(program, CudaProgram)
        n_launches = len(program._chosen(Live(n, 1, 1)))
        assert n_launches == (1 if n == 1 else 2) + (not fuses)
        for i in range(n):
            for tensor, values in self.values.items():
                self.backend.write(tensor, values[i : i + 1])
            for name, alone in run.run({}, Live(1, 1, 1)).items():
                assert np.array_equal(alone[0], got[name][i]), f"row {i} of {name}"
        return list(got.values())

    def f64(self, tensor: Tensor, n: int) -> Array:
        """An activation's rows."""
        return self.values[tensor][:n].astype(np.float64)


both = pytest.mark.parametrize("n", [1, 3, 11])


@both
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_swiglu(backend: CudaBackend, dtype: Any, n: int, rng: Rng) -> None:
    f = Fused(backend, rng)
    gate, up = f.rows("gate", N_IN, scale=3), f.rows("up", N_IN)
    w, values = f.weight("w", N_OUT, N_IN, dtype=dtype)
    (hidden,) = swiglu(f.graph, "swiglu", (gate, up))
    (got,) = f.run(mul_mat(f.graph, "product", hidden, w), n)
    (want,) = SWIGLU.reference(gate=f.f64(gate, n), up=f.f64(up, n), limits=(0,))
    assert_close(got, want @ values.T, LIMIT, f"{dtype}, {n} rows")


@both
def test_swiglu_with_a_limit_is_a_launch_of_its_own(backend: CudaBackend, n: int, rng: Rng) -> None:
    f = Fused(backend, rng)
    gate, up = f.rows("gate", N_IN, scale=3), f.rows("up", N_IN)
    w, values = f.weight("w", N_OUT, N_IN, dtype=TYPES[0])
    (hidden,) = swiglu(f.graph, "swiglu", (gate, up), limits=(0.75,))
    (got,) = f.run(mul_mat(f.graph, "product", hidden, w), n, fuses=False)
    (want,) = SWIGLU.reference(gate=f.f64(gate, n), up=f.f64(up, n), limits=(0.75,))
    assert_close(got, want @ values.T, LIMIT, f"{n} rows")


@both
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_norm(backend: CudaBackend, dtype: Any, residual: bool, n: int, rng: Rng) -> None:
    """With weights of several types, plain ones too; the sum is an output of its own."""
    f = Fused(backend, rng)
    x, delta = f.rows("x", N_IN, scale=3), f.rows("delta", N_IN) if residual else None
    norm, factors = f.weight("norm", N_IN)
    made = [f.weight(f"w{i}", N_OUT + i, N_IN, dtype=t) for i, t in enumerate((dtype, F32))]
    h, total = add_rms_norm(f.graph, "norm", x, delta, norm, EPS)
    outs = mul_mat(f.graph, "product", h, *(w for w, _ in made))
    got = f.run([*outs, *([total] if residual else [])], n)
    more = {"delta": f.f64(delta, n)} if delta else {}
    want, *totals = ADD_RMS_NORM.reference(f.f64(x, n), factors, **more, eps=EPS)
    for out, (_, values) in zip(got, made, strict=False):
        assert_close(out, want @ values.T, LIMIT, f"{dtype}, {n} rows")
    for out, want in zip(got[2:], totals, strict=True):
        assert_close(out, want, 1e-13, "sum")


@both
@pytest.mark.parametrize("act", ["silu", "sigmoid"])
@pytest.mark.parametrize("head", [32, 128, 256])
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_gated_norm(
    backend: CudaBackend, dtype: Any, head: int, act: str, n: int, rng: Rng
) -> None:
    f = Fused(backend, rng)
    x, gate = (f.rows(name, N_IN // head, head, scale=3) for name in ("x", "gate"))
    norm, factors = f.weight("norm", head)
    w, values = f.weight("w", N_OUT, N_IN, dtype=dtype)
    normed = {"x": x, "gate": gate, "weight": norm}
    (y,) = f.graph.add(RMS_NORM_GATED, "norm", normed, eps=EPS, act=act)
    (got,) = f.run(mul_mat(f.graph, "product", y.flatten(1), w), n)
    operands = f.f64(x, n), f.f64(gate, n), factors
    (want,) = RMS_NORM_GATED.reference(*operands, eps=EPS, act=act)
    assert_close(got, want.reshape(n, N_IN) @ values.T, LIMIT, f"{dtype}, {n} rows")
