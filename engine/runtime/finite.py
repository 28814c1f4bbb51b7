"""The finite check: which sequences of a step have NaN or infinity, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.graph import Node, dim_name
from engine.runtime.batch import Batch


class NonFiniteError(EngineError):
    """NaN or infinity in a step's values."""


class FiniteCheck:
    """Checks one step over `batch`; `failures`: index of a chunk -> where it failed first."""

    def __init__(self, batch: Batch, seqs: Sequence[int]) -> None:
        self._inputs, self._seqs = batch.inputs, seqs
        self.failures: dict[int, str] = {}

    def watch(self, node: Node, outputs: Sequence[NDArray[Any]]) -> None:
        """Check a node's outputs; passed to the programs of a step."""
        for tensor, values in zip(node.outputs, outputs, strict=True):
            dim = dim_name(tensor)
            if dim in ("n_tokens", "n_outputs"):
                self.check(f"{node.name} ({node.op.name})", values, dim == "n_outputs")

    def check(self, what: str, values: NDArray[Any], is_output: bool) -> None:
        """Check rows of values: of the rows with logits if `is_output`, else of all tokens."""
        finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        bad = np.flatnonzero(~finite)
        rows = self._inputs["output_rows"][bad] if is_output else bad
        chunks = np.searchsorted(self._inputs["seq_starts"], rows, side="right") - 1
        for chunk, row in zip(chunks.tolist(), rows.tolist(), strict=True):
            position = self._inputs["positions"][row]
            self.failures.setdefault(chunk, failure(what, self._seqs[chunk], position))


def failure(what: str, seq: int, position: int) -> str:
    return f"non-finite values in {what}, sequence {seq}, position {position}"
