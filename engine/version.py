"""The engine's version, and what it can run on."""

from __future__ import annotations

__version__ = "0.1.0"


def version_line() -> str:
    """One line for `--version`."""
    return f"gdn-engine {__version__}, backends: reference"
