"""What tests read of session files."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.kvcache.store import Reader


def tensors_of(reader: Reader, n_bytes: int = 1 << 20) -> dict[str, NDArray[Any]]:
    """All tensors of a file, which is read by the MiB."""
    found: dict[str, list[NDArray[Any]]] = {}
    rows = dict.fromkeys(reader.shapes, 0)
    for name, first, values in reader.pieces(n_bytes):
        assert first == rows[name]
        rows[name] += len(values)
        found.setdefault(name, []).append(values.copy())
    return {
        name: np.concatenate(found[name]).reshape(shape)
        if name in found
        else np.empty(shape, dtype)
        for name, (dtype, shape) in reader.shapes.items()
    }
