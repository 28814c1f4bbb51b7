"""Every op on the CPU, with the kernels of every instruction set that this machine has.

Products with quantized weights round activations to int8; their limit is what that rounding allows
(see INT8_LIMIT). All else is float32, against the naive definition in float64.
"""

from __future__ import annotations

import pytest

from engine.backends.cpu.backend import CpuBackend
from engine.backends.native import library as cpu_library
from tests.support.int8 import check_op
from tests.support.opcase import OpCase, every_case, fresh_seed

ISAS = cpu_library.usable()


def runs_on_cpu(c: OpCase) -> bool:
    return c.case.attrs.get("algorithm") != "chunk"


CASES = [c for c in every_case() if runs_on_cpu(c)]


@pytest.fixture(scope="module")
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


# A case on all of them in turn: what must come out is computed once.
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("isa", "n_threads"), [(isa, n) for isa in ISAS for n in (1, 3)])
@pytest.mark.parametrize("c", CASES, ids=[str(c) for c in CASES])
def test_op(c: OpCase, isa: str, n_threads: int, strided: bool, seed: int) -> None:
    check_op(CpuBackend(n_threads, isa), c, strided, seed)
