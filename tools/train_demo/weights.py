"""bfloat16 weights in a few files that numpy can read: the numbers' upper halves, as uint16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 12 << 20  # of a file


def save_weights(directory: Path, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Write weights-0.npz, weights-1.npz …; each replaces an older one as a whole."""
    shards: list[dict[str, NDArray[np.uint16]]] = [{}]
    size = 0
    for name, values in weights.items():
        if size + 2 * values.size > MAX_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = _upper_half(values)
        size += 2 * values.size
    for i, shard in enumerate(shards):
        draft = directory / f"draft-{i}.npz"
        np.savez(draft, **shard)  # type: ignore[arg-type]
        draft.replace(directory / f"weights-{i}.npz")


def load_weights(directory: Path) -> dict[str, NDArray[np.float32]]:
    """All weights of the files, as float32."""
    weights = {}
    for path in sorted(directory.glob("weights-*.npz")):
        with np.load(path) as shard:
            for name in shard.files:
                weights[name] = (shard[name].astype(np.uint32) << 16).view(np.float32)
    if not weights:
        raise FileNotFoundError(f"{directory}: no weights-*.npz")
    return weights


def _upper_half(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
