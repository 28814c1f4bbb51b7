"""Ops that are one launch each: where their kernels are, and how many blocks a batch needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.backends.cuda_device import Grid
from engine.graph import Live, Node


@dataclass(frozen=True)
class Small:
    """A kernel; `shared` is bytes of dynamic shared memory."""

    source: str
    kernel: str
    threads: int
    grid: Callable[[Node, Live], Grid]
    shared: Callable[[Node], int] = lambda node: 0


SMALL: dict[str, Small] = {}
