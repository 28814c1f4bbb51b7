"""Every CUDA source compiles without a warning for the oldest target, Hopper and the newest."""

from __future__ import annotations

import pytest

from engine.backends import nvrtc

# What is compiled as users do; and what with little optimisation, in a tenth of the time.
TARGET, QUICK_TARGETS, QUICK = "sm_90a", ("sm_80", "sm_120"), ("--Ofast-compile=max",)


def missing() -> str:
    """Why nothing can be compiled here; an empty string if it can."""
    try:
        nvrtc.version()
    except nvrtc.CompileError as error:
        return str(error)
    return ""


@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("target", [TARGET, *QUICK_TARGETS])
@pytest.mark.parametrize("name", nvrtc.sources())
def test_source(name: str, target: str) -> None:
    assert nvrtc.compile_source(name, target, QUICK if target in QUICK_TARGETS else ())
