"""Every CUDA source compiles without a warning for the oldest target, Hopper and the newest."""

from __future__ import annotations

import pytest

from engine.backends.cuda import nvrtc

TARGETS = ("sm_80", "sm_90a", "sm_120")
# Little optimisation: machine code of the same sources in a tenth of the time.
QUICK = ("--Ofast-compile=max",)


def missing() -> str:
    """Why nothing can be compiled here; an empty string if it can."""
    try:
        nvrtc.version()
    except nvrtc.CompileError as error:
        return str(error)
    return ""


@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", nvrtc.sources())
def test_source(name: str, target: str) -> None:
    assert nvrtc.compile_source(name, target, QUICK)
