"""The non-finite guard: which sequences of a step went wrong, and where.

The logits of every step are looked at; with `--check` every node's outputs are too, so that the
first one that is not finite is named, with its sequence and position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.graph import Node, dim_name
from engine.runtime.batch import Batch


class NonFiniteError(EngineError):
    """NaN or infinity where there must be numbers."""


class FiniteCheck:
    """Watches one step over `batch`; `failures` maps a chunk's index to where it failed first."""

    def __init__(self, batch: Batch, seqs: Sequence[int]) -> None:
        self._inputs, self._seqs = batch.inputs, seqs
        self.failures: dict[int, str] = {}

    def watch(self, node: Node, outputs: Sequence[NDArray[Any]]) -> None:
        """Look at a node's outputs."""
        for tensor, values in zip(node.outputs, outputs, strict=True):
            dim = dim_name(tensor)
            if dim in ("n_tokens", "n_outputs"):
                self._look(f"{node.name} ({node.op.name})", values, dim == "n_outputs")

    def check_logits(self, logits: NDArray[Any]) -> None:
        """Look at the step's result."""
        self._look("the logits", logits, True)

    def _look(self, what: str, values: NDArray[Any], selected: bool) -> None:
        finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        bad = np.flatnonzero(~finite)
        rows = self._inputs["output_rows"][bad] if selected else bad
        chunks = np.searchsorted(self._inputs["seq_starts"], rows, side="right") - 1
        for chunk, row in zip(chunks.tolist(), rows.tolist(), strict=True):
            position = self._inputs["positions"][row]
            self.failures.setdefault(chunk, failure(what, self._seqs[chunk], position))


def failure(what: str, seq: int, position: int) -> str:
    """Where a sequence went wrong, in words."""
    return f"non-finite values in {what}, sequence {seq}, position {position}"
