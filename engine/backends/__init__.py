"""Backends by name, in the order of preference of `--backend auto`."""

from __future__ import annotations

from engine.errors import EngineError
from engine.planner import Backend

# Every name that the command line knows.
NAMES = ("auto", "cpu", "cuda", "reference")


class BackendError(EngineError):
    """A backend that is unknown or not there."""


def create(name: str, n_threads: int | None = None, cpu_isa: str | None = None) -> list[Backend]:
    """Backends in priority order for a name of NAMES; the reference takes what others refuse.

    n_threads: of the CPU backend (None: all cores); cpu_isa: its instruction set (None: the best).
    Raises BackendError if there is none of that name, LibraryError without usable CPU kernels.
    """
    from engine.backends.reference import ReferenceBackend

    if name == "reference":
        return [ReferenceBackend()]
    if name in ("auto", "cpu"):
        from engine.backends.cpu import CpuBackend

        return [CpuBackend(n_threads, cpu_isa), ReferenceBackend()]
    if name in NAMES:
        raise BackendError(f"backend {name}: not part of this version; available: cpu, reference")
    raise BackendError(f"backend: expected one of {', '.join(NAMES)}, got {name}")


def describe() -> str:
    """The backends that are there, the best first, and the instruction set that the CPU's uses."""
    from engine.backends import cpu_library

    usable, built = cpu_library.usable(), cpu_library.built()
    cpu = f"cpu ({usable[0]}; built: {', '.join(built)})" if usable else "no cpu (not built)"
    return f"{cpu}, reference"
