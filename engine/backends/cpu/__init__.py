"""The CPU backend."""

from __future__ import annotations

from engine.backends.base import Registration
from engine.backends.cpu.backend import CpuBackend
from engine.backends.native import library


def _describe() -> str:
    usable, built = library.usable(), library.built()
    return f"cpu ({usable[0]}; built: {', '.join(built)})" if usable else "no cpu (not built)"


REGISTRATION = Registration(
    "cpu",
    CpuBackend.traits,
    make=lambda options: CpuBackend(
        options.n_threads, options.cpu_isa, activations=options.activations
    ),
    # `auto` takes it even where it isn't built: its error says how to build it.
    missing=lambda: "",
    describe=_describe,
)
