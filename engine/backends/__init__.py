"""Backends by name, in the order of preference of `--backend auto`."""

from __future__ import annotations

from functools import cache

from engine.backends.base import Backend
from engine.errors import EngineError

# Every name that the command line knows.
NAMES = ("auto", "cpu", "cuda", "reference")


class BackendError(EngineError):
    """A backend that is unknown or not there."""


def create(
    name: str,
    n_threads: int | None = None,
    cpu_isa: str | None = None,
    batch_invariant: bool = False,
) -> list[Backend]:
    """Backends in priority order for a name of NAMES; later ones take what earlier ones refuse.

    n_threads: of the CPU backend (None: all cores); cpu_isa: its instruction set (None: the best);
    batch_invariant: see CudaBackend. Raises BackendError for an unknown name, CudaError without a
    usable GPU, LibraryError without usable CPU kernels.
    """
    from engine.backends.reference import ReferenceBackend

    if name not in NAMES:
        raise BackendError(f"backend: expected one of {', '.join(NAMES)}, got {name}")
    if name == "reference":
        return [ReferenceBackend()]
    from engine.backends.cpu.backend import CpuBackend

    others: list[Backend] = [CpuBackend(n_threads, cpu_isa), ReferenceBackend()]
    if first_of(name) != "cuda":
        return others
    from engine.backends.cuda.backend import CudaBackend
    from engine.backends.cuda.cupy_device import CupyDevice

    return [CudaBackend(CupyDevice(), batch_invariant), *others]


def first_of(name: str) -> str:
    """The backend that comes first for a name of NAMES: `auto` is a GPU where there is one."""
    if name != "auto":
        return name
    return "cpu" if cuda_missing() else "cuda"


@cache
def cuda_missing() -> str:
    """Why `auto` takes no GPU; an empty string if it does."""
    from engine.backends.cuda.cupy_device import missing

    return missing()


def describe() -> str:
    """The backends that are there, the best first, and the instruction set that the CPU's uses."""
    from engine.backends.native import library as cpu_library

    usable, built = cpu_library.usable(), cpu_library.built()
    cpu = f"cpu ({usable[0]}; built: {', '.join(built)})" if usable else "no cpu (not built)"
    why = cuda_missing()
    return f"{f'no cuda ({why})' if why else 'cuda'}, {cpu}, reference"
