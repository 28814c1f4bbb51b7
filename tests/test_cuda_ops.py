"""Every op with the CUDA backend on every device, against the naive definition."""

from __future__ import annotations

import pytest

from engine.backends.cuda import CudaBackend
from engine.backends.cuda_ops import OPS_WITH_KERNELS
from tests.cuda_devices import ON_DEVICES, MakeDevice
from tests.int8 import check_op
from tests.opcase import OpCase, every_case, fresh_seed

CASES = [c for c in every_case() if c.op.name in OPS_WITH_KERNELS]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


@ON_DEVICES
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("c", CASES, ids=[str(c) for c in CASES])
def test_op(make_device: MakeDevice, c: OpCase, strided: bool, seed: int) -> None:
    check_op(CudaBackend(make_device(seed)), c, strided, seed)
