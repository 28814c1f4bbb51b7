"""Decoding streams weights: single rows times a matrix that no cache holds, beside the read probe.

What is held is a floor, 60 % of what was measured when the kernels landed. It is a ratio of two
figures of the same minute, taken in turns; but on a shared machine neighbours take arithmetic from
the products that the probe doesn't need (74 % was seen for many minutes).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import pytest

from engine.backends.cpu.backend import CpuBackend
from engine.formats.quants import F32, WEIGHT_TYPES
from engine.graph import Capacity, Dim, Graph, Kind, Live, Tensor
from engine.ops.mul_mat import mul_mat
from engine.placement.place import place
from engine.runtime.executor import Executable
from tests.support.opcase import RawWeights
from tests.support.timing import judge
from tools.randblocks import TYPES, random_panel, repeated

N_IN, N_BYTES, TURNS = 1024, 1 << 27, 9
# Bytes of the file's type a second, as a share of the probe's: AVX2 on two cores of a Zen 1 EPYC,
# which its arithmetic holds up; AVX-512 and AMX on two of a Xeon (Sapphire Rapids).
LANDED = {
    "avx2": {"Q4_0": 0.85, "Q8_0": 0.91, "Q4_K": 0.78, "BF16": 0.91},
    "avx512": {"Q4_0": 0.86, "Q8_0": 0.85, "Q4_K": 0.79, "BF16": 0.88},
    "amx": {"Q4_0": 0.86, "Q8_0": 0.85, "Q4_K": 0.79, "BF16": 0.88},
}
FLOOR = 0.6


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.mark.timing
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "BF16"])
def test_products_of_one_row_read_as_fast_as_the_probe(name: str, rng: np.random.Generator) -> None:
    backend, dtype = CpuBackend(), WEIGHT_TYPES[name]
    landed = LANDED.get(backend.library.isa)
    if landed is None:
        pytest.skip(f"no figures for {backend.library.isa} kernels")
    row_bytes = N_IN // dtype.block_elems * dtype.block_bytes
    n_out = N_BYTES // row_bytes // 16 * 16
    panel = random_panel(TYPES[name], 0.05, rng)
    raw = np.concatenate(list(repeated(panel, 0, n_out * row_bytes)))
    graph = Graph(Capacity(1))
    x = Tensor("x", (Dim(1, "n_tokens"), N_IN), F32, Kind.ACTIVATION)
    (out,) = mul_mat(graph, "product", x, graph.weight("w", (n_out, N_IN), dtype))
    graph.outputs = {"out": out}
    executable = Executable(place(graph, [backend], strict=True), RawWeights({"w": raw}))
    backend.write(x, rng.normal(size=(1, N_IN)).astype(np.float32))
    probed = np.ones((N_BYTES // 4096, 1024), np.float32)

    def product_to_probe() -> float:
        ratios = []
        for _ in range(TURNS):
            product = seconds(lambda: executable.run({}, Live(1, 1, 1))) / (n_out * row_bytes)
            ratios.append(seconds(lambda: backend.read_probe(probed)) / probed.nbytes / product)
        return median(ratios)

    judge(f"{name}, {backend.detail}: product to probe", product_to_probe, FLOOR * landed[name])
