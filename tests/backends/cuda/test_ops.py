"""Every op with the CUDA backend on every device, against the naive definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.lower import LOWERINGS
from engine.formats.quants import F16
from tests.support.cuda_devices import ON_DEVICES, MakeDevice
from tests.support.int8 import check_op
from tests.support.opcase import OpCase, every_case, fresh_seed

# Operands of products are rounded to float16, whose relative error is 2^-11 at most (a variance of
# 2^-22 / 12 to 2^-22 / 3); some are rounded twice or thrice.
HALF_LIMIT = 1e-6


def with_limit(c: OpCase) -> OpCase:
    """A case with the limit of the kernels that take it."""
    operands = c.case.make(np.random.default_rng(0)).values()
    in_half = c.op.name == "ATTENTION" and any(o.dtype is F16 for o in operands)
    if in_half or c.case.attrs.get("algorithm") == "chunk":
        return replace(c, limit=HALF_LIMIT)
    return c


CASES = [with_limit(c) for c in every_case() if c.op.name in LOWERINGS]


@pytest.fixture(scope="module")
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


@ON_DEVICES
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("c", CASES, ids=[str(c) for c in CASES])
def test_op(make_device: MakeDevice, c: OpCase, strided: bool, seed: int) -> None:
    check_op(CudaBackend(make_device(seed)), c, strided, seed)
