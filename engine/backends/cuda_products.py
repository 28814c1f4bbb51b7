"""Matrix products and tables of packed weights as launches."""

from __future__ import annotations

from collections.abc import Callable

from engine.backends.cuda_device import Device
from engine.backends.cuda_program import Lowering
from engine.graph import Node

LOWERINGS: dict[str, Callable[[Lowering, Node], None]] = {}


def unsupported(node: Node, device: Device) -> str:
    """Why a node of LOWERINGS can't be run; an empty string if it can."""
    return ""
