"""Backends by name, in the order of preference of `--backend auto`."""

from __future__ import annotations

from engine.errors import EngineError
from engine.planner import Backend

# Every name that the command line knows; the ones below it are what this version has built.
NAMES = ("auto", "cpu", "cuda", "reference")


class BackendError(EngineError):
    """A backend that is unknown or not there."""


def create(name: str) -> list[Backend]:
    """Backends in priority order for a name of NAMES. Raises BackendError if there is none."""
    from engine.backends.reference import ReferenceBackend

    if name in ("auto", "reference"):
        return [ReferenceBackend()]
    if name in NAMES:
        raise BackendError(f"backend {name}: not part of this version; available: auto, reference")
    raise BackendError(f"backend: expected one of {', '.join(NAMES)}, got {name}")
