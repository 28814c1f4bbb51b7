"""The one kernel that no op has: no other test than those of speed runs it."""

from __future__ import annotations

import numpy as np
import pytest

from engine.backends.cpu.backend import CpuBackend
from engine.backends.native import library as cpu_library


@pytest.mark.parametrize("isa", cpu_library.usable())
@pytest.mark.parametrize(("n", "width"), [(1, 64), (37, 192)])
def test_the_probe_stays_within_its_rows(isa: str, n: int, width: int) -> None:
    """A sanitizer says so; here nothing is changed."""
    rows = np.ones((n, width), np.float32)
    CpuBackend(2, isa).read_probe(rows)
    assert (rows == 1).all()
