"""The table of kernels agrees with the sources, and a constant that has drifted doesn't compile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.backends.cuda import kernels, nvrtc
from tests.backends.cuda.test_nvrtc import QUICK, missing
from tests.support.cuda_emulator import device as emulated
from tests.support.cuda_emulator.device import EmulatedDevice


@pytest.mark.skipif(bool(emulated.missing()), reason=emulated.missing())
def test_every_kernel_is_in_its_source() -> None:
    device = EmulatedDevice()
    for name, kernel in kernels.KERNELS.items():
        assert device.function(kernel.source, name, kernel.shared)
    assert {kernel.source for kernel in kernels.KERNELS.values()} == set(nvrtc.sources())


@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize(
    ("source", "name", "change"),
    [
        ("gemm", "gemm_64", {"shared": 28673}),
        ("attention", "attention_tiles_256", {"threads": 128}),
        ("gated_delta_net_prepare", "delta_net_kda_prepare_128", {"shared": 90560}),
    ],
)
def test_a_drifted_size_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, source: str, name: str, change: dict[str, Any]
) -> None:
    monkeypatch.setitem(kernels.KERNELS, name, replace(kernels.KERNELS[name], **change))
    nvrtc._headers.cache_clear()
    try:
        with pytest.raises(nvrtc.CompileError, match="static assertion failed"):
            nvrtc.compile_source(source, "sm_80", QUICK)
    finally:
        nvrtc._headers.cache_clear()
