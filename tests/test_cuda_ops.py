"""Every op with the CUDA backend on the emulated device, against the naive definition."""

from __future__ import annotations

import pytest

from engine.backends.cuda import CudaBackend
from engine.backends.cuda_ops import OPS_WITH_KERNELS
from tests.cuda_emulator import device as emulated
from tests.cuda_emulator.device import EmulatedDevice
from tests.int8 import check_op
from tests.opcase import OpCase, every_case, fresh_seed

pytestmark = pytest.mark.skipif(bool(emulated.missing()), reason=emulated.missing())

CASES = [c for c in every_case() if c.op.name in OPS_WITH_KERNELS]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("c", CASES, ids=[str(c) for c in CASES])
def test_op(c: OpCase, strided: bool, seed: int) -> None:
    device = EmulatedDevice(seed=seed)
    check_op(CudaBackend(device), c, strided, seed)
