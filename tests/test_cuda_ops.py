"""Every op with the CUDA backend on every device, against the naive definition."""

from __future__ import annotations

import pytest

from engine.backends.cuda import CudaBackend
from engine.backends.cuda_ops import OPS_WITH_KERNELS
from tests.cuda_devices import ON_DEVICES, MakeDevice
from tests.int8 import check_op
from tests.opcase import OpCase, check_case, every_case, fresh_seed

# Tensor cores take queries and weights of attention, and the matrices of the delta rule's chunks,
# as float16: each rounding has an NMSE of 2e-8, and their sums are float32.
FLOAT16_LIMIT = 2e-6
CASES = [c for c in every_case() if c.op.name in OPS_WITH_KERNELS]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


@ON_DEVICES
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("c", CASES, ids=[str(c) for c in CASES])
def test_op(make_device: MakeDevice, c: OpCase, strided: bool, seed: int) -> None:
    backend = CudaBackend(make_device(seed))
    if c.op.name == "ATTENTION" or c.case.attrs.get("algorithm") == "chunk":
        check_case(backend, c.op, c.case, seed, strided, FLOAT16_LIMIT)
    else:
        check_op(backend, c, strided, seed)
