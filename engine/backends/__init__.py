"""Backends by name, in the order of preference of `--backend auto`.

To add one: a folder with a `Registration`, and its line in REGISTRY (docs/adding-a-backend.md).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache

from engine.backends import cpu, cuda, reference
from engine.backends.base import Backend, BackendOptions, Registration, Traits
from engine.errors import EngineError
from engine.threads import n_cores

_log = logging.getLogger(__name__)
# The best first. A backend takes what the ones before it refuse.
REGISTRY: tuple[Registration, ...] = (cuda.REGISTRATION, cpu.REGISTRATION, reference.REGISTRATION)
_DEFAULTS = BackendOptions()


class BackendError(EngineError):
    """A backend that is unknown or not there."""


def names() -> tuple[str, ...]:
    """Every name that `create` knows."""
    return ("auto", *sorted(r.name for r in REGISTRY))


def create(name: str, options: BackendOptions = _DEFAULTS) -> list[Backend]:
    """The backend of a name of `names()` and those that follow it, in priority order. Raises
    BackendError for an unknown name, and what a backend raises that can't run here."""
    chosen = _from(name)
    if options.n_threads is not None:
        _warn_of_threads(options.n_threads, chosen)
        options = replace(options, n_threads=n_threads(options.n_threads))
    if options.gpu_memory is not None and not any(r.traits.own_memory for r in chosen):
        _log.warning("gpu_memory (--gpu-memory) is ignored: no GPU is used")
    return [registration.make(options) for registration in chosen]


def traits(name: str) -> Traits:
    """Traits of the backend that comes first for a name of `names()`."""
    return _from(name)[0].traits


@cache
def missing(name: str) -> str:
    """Why `auto` passes a backend by, or ""."""
    return next(r for r in REGISTRY if r.name == name).missing()


def _from(name: str) -> list[Registration]:
    if name not in names():
        raise BackendError(f"backend: expected one of {', '.join(names())}, got {name}")
    if name == "auto":
        name = next(r.name for r in REGISTRY if not missing(r.name))
    return list(REGISTRY[[r.name for r in REGISTRY].index(name) :])


def n_threads(asked: int | None) -> int:
    """The threads that run where so many are asked for (None: all cores): no more than cores."""
    most = n_cores()
    return min(asked or most, most)


def _warn_of_threads(asked: int, chosen: list[Registration]) -> None:
    if chosen == [reference.REGISTRATION]:
        _log.warning("n_threads is ignored: numpy chooses the reference backend's threads")
    elif asked > (most := n_cores()):
        cores = "1 core" if most == 1 else f"{most} cores"
        _log.warning(
            "n_threads %d is more than the %s this process may use: %d run", asked, cores, most
        )


def unusable() -> list[str]:
    """A line for all hardware that is here, but that its backend can't use."""
    lines = [(r.hardware(), missing(r.name)) for r in REGISTRY]
    return [f"{here} is here but not used: {why}" for here, why in lines if here and why]


def describe() -> str:
    """What every backend would run with, the best first."""
    return ", ".join(registration.describe() for registration in REGISTRY)
