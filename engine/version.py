"""The engine's version: packaging and `--version` read it from here."""

from __future__ import annotations

__version__ = "0.1.0"
