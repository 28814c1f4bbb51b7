"""A minimal inference engine for hybrid language models: gated delta nets with full attention."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Import a name of engine/api.py when somebody uses it. So the command line starts where a
    package is missing, and names it."""
    # Other names are modules, which Python looks for here first.
    if not name[:1].isupper() and name not in ("__all__", "__version__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("engine.api"), name)


def __dir__() -> list[str]:
    return [*globals(), *import_module("engine.api").__all__]
