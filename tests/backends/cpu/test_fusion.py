"""Fusions of the CPU compute what their nodes do, and are used where they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from engine.backends.cpu.backend import CpuBackend
from engine.backends.cpu.fusion import FUSIONS
from engine.backends.cpu.lower import Lowering
from engine.backends.native import library as cpu_library
from engine.backends.native.fusion import Readers, match_fusions
from engine.formats.quants import F32, WEIGHT_TYPES, dequantize
from engine.graph import Capacity, Dim, Graph, Kind, Live, Tensor
from engine.ops.mul_mat import mul_mat
from engine.ops.swiglu import swiglu
from engine.placement.place import place
from engine.runtime.executor import Executable
from tests.support.int8 import INT8_LIMIT
from tests.support.opcase import RawWeights, assert_close
from tools.randblocks import TYPES, random_blocks

Array = np.ndarray[Any, Any]
N_IN, N_OUT, CAPACITY, N_TOKENS = 256, 128, 150, 141
# Row tiles are rows 1 to 64, 65 to 104 and 110 to 125.
CHUNKS = ((9, 1), (0, 104), (0, 5), (0, 16), (0, 15))
LIVE = Live(N_TOKENS, 1, 1, chunks=CHUNKS)


@pytest.fixture(params=[(i, m) for i in cpu_library.usable() for m in (False, True)], ids=str)
def backend(request: pytest.FixtureRequest) -> CpuBackend:
    isa, matrix = request.param
    return CpuBackend(2, isa, matrix)


class Ffn:
    """SWIGLU of two products and the product of that, with random weights."""

    def __init__(
        self, rng: np.random.Generator, types: Sequence[str], n_ff: int, limit: float = 0.0
    ) -> None:
        self.graph = Graph(Capacity(CAPACITY))
        self.x = Tensor("x", (Dim(CAPACITY, "n_tokens"), N_IN), F32, Kind.ACTIVATION)
        self.raw: dict[str, Array] = {}
        gate, up, down = (
            self._weight(rng, name, kind, shape)
            for name, kind, shape in zip(
                ("gate", "up", "down"), types, [(n_ff, N_IN)] * 2 + [(N_OUT, n_ff)], strict=True
            )
        )
        a, b = self.products = mul_mat(self.graph, "gate and up", self.x, gate, up)
        (self.h,) = swiglu(self.graph, "act", (a, b), limits=(limit,))
        (self.out,) = mul_mat(self.graph, "down", self.h, down)
        self.graph.outputs = {"out": self.out}

    def _weight(self, rng: Any, name: str, kind: str, shape: tuple[int, int]) -> Tensor:
        dtype = WEIGHT_TYPES[kind]
        n_blocks = int(np.prod(shape)) // dtype.block_elems
        self.raw[name] = random_blocks(TYPES[kind], n_blocks, 0.06, rng)
        return self.graph.weight(name, shape, dtype)

    def run(self, backend: CpuBackend, x: Array) -> tuple[dict[str, Array], list[str]]:
        """The outputs, and the kernels that made them."""
        executable = Executable(
            place(self.graph, [backend], strict=True), RawWeights(dict(self.raw))
        )
        backend.write(self.x, x)
        outputs = executable.run({}, LIVE)
        ((_, program),) = executable._programs
        return outputs, [i.kernel for i in program.instructions]

    def expected(self, x: Array) -> tuple[Array, Array]:
        """SWIGLU's result and the last product, in float64."""
        gate, up, down = (
            dequantize(w.dtype, self.raw[w.name], w.shape).astype(np.float64)
            for w in self.graph.weights.values()
        )
        g = x.astype(np.float64) @ gate.T
        h = g / (1 + np.exp(-g)) * (x.astype(np.float64) @ up.T)
        return h, h @ down.T


@pytest.mark.parametrize(
    ("types", "n_ff"),
    [
        (("Q8_0", "Q8_0", "Q8_0"), 544),
        (("Q4_K", "Q4_K", "Q6_K"), 1280),
        (("BF16", "BF16", "BF16"), 240),
        (("BF16", "BF16", "BF16"), 1088),
        (("F32", "F32", "F32"), 75),
        (("Q4_0", "Q8_0", "F16"), 160),
    ],
    ids=str,
)
def test_gate_and_up_with_swiglu(
    backend: CpuBackend, types: tuple[str, ...], n_ff: int, rng: np.random.Generator
) -> None:
    ffn, x = Ffn(rng, types, n_ff), rng.normal(size=(N_TOKENS, N_IN)).astype(np.float32)
    outputs, kernels = ffn.run(backend, x)
    assert "MUL_MAT_SWIGLU" in kernels
    assert "SWIGLU" not in kernels
    has_tiles = backend.matrix and not {"F16", "F32"} & set(types) and n_ff % 32 == 0
    assert kernels.count("ROUND_ROWS") <= (1 if has_tiles else 2), kernels
    # SWIGLU doubles a small relative error of both its sides; the last product adds its own.
    plain = all(WEIGHT_TYPES[t].block_elems == 1 for t in types)
    limit = (3e-5 if backend.matrix else 1e-10) if plain else 5 * INT8_LIMIT
    assert_close(outputs["out"], ffn.expected(x)[1], limit, "fused")
    # The same nodes one by one, as a program that keeps their results has to run them.
    alone = Ffn(np.random.default_rng(0), types, n_ff)
    alone.raw = ffn.raw
    alone.graph.outputs = {"out": alone.out, "gate": alone.products[0], "h": alone.h}
    composed, kernels = alone.run(backend, x)
    assert "MUL_MAT_SWIGLU" not in kernels
    assert_close(outputs["out"], composed["out"], 1e-9, "fused and not")


def test_swiglu_with_a_limit_is_an_instruction_of_its_own(
    backend: CpuBackend, rng: np.random.Generator
) -> None:
    limit = 0.5
    ffn = Ffn(rng, ("F32",) * 3, 75, limit)
    x = rng.normal(size=(N_TOKENS, N_IN)).astype(np.float32)
    outputs, kernels = ffn.run(backend, x)
    assert "SWIGLU" in kernels
    assert "MUL_MAT_SWIGLU" not in kernels
    gate, up, down = (ffn.raw[n].view(np.float32).astype(np.float64) for n in ffn.graph.weights)
    g, u = (x.astype(np.float64) @ w.reshape(75, N_IN).T for w in (gate, up))
    h = np.minimum(g / (1 + np.exp(-g)), limit) * np.clip(u, -limit, limit)
    assert (np.abs(h) < np.abs(g / (1 + np.exp(-g)) * u) / 2).mean() > 0.1
    assert_close(outputs["out"], h @ down.reshape(N_OUT, 75).T, 1e-10, "clamped")


def test_results_that_are_read_elsewhere_are_there(
    backend: CpuBackend, rng: np.random.Generator
) -> None:
    """What SWIGLU makes is written for all rows if it is an output, and read by another node."""
    ffn, x = Ffn(rng, ("Q8_0",) * 3, 96), rng.normal(size=(N_TOKENS, N_IN)).astype(np.float32)
    ffn.graph.outputs = {"h": ffn.h, "out": ffn.out}
    outputs, kernels = ffn.run(backend, x)
    assert "MUL_MAT_SWIGLU" in kernels
    h, out = ffn.expected(x)
    assert_close(outputs["h"], h, 3 * INT8_LIMIT, "h")
    assert_close(outputs["out"], out, 5 * INT8_LIMIT, "out")


def test_one_weight_of_two_in_float16(backend: CpuBackend, rng: np.random.Generator) -> None:
    """Its product takes no tiles, and the other's do: not fused, and right."""
    ffn, x = Ffn(rng, ("Q8_0", "F16", "Q8_0"), 96), rng.normal(size=(N_TOKENS, N_IN))
    outputs, kernels = ffn.run(backend, x.astype(np.float32))
    assert "MUL_MAT_SWIGLU" not in kernels
    assert_close(outputs["out"], ffn.expected(x)[1], 5 * INT8_LIMIT, "out")


def test_every_fusion_has_a_kernel(backend: CpuBackend, rng: np.random.Generator) -> None:
    graph = Ffn(rng, ("Q8_0",) * 3, 96).graph
    readers = Readers(graph.nodes, graph.outputs.values())
    lowering = Lowering(backend.library, readers, backend.matrix)
    matched = [f for f, nodes in match_fusions(graph.nodes, readers, FUSIONS) if f]
    assert matched == [*FUSIONS]
    for fusion in matched:
        fusion.lower(lowering, graph.nodes[: len(fusion.pattern)])
    assert all(backend.library.kernel_address(call.kernel) for call in lowering.calls)
