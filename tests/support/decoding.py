"""Stored blocks to numbers, independently of the engine: by the gguf package, or value by value."""

from typing import Any

import gguf
import numpy as np

Array = np.ndarray[Any, Any]
# Types that the package does not decode: elements of a block, and the bits of each.
_BITS = {"Q1_0": (128, 1), "Q2_0": (64, 2)}


def decode(name: str, rows: Array) -> Array:
    """Rows of blocks, uint8 [..., bytes], of the type with this name: float32 [..., elements]."""
    if name not in _BITS:
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name])
    n_elems, n_bits = _BITS[name]
    blocks = rows.reshape(-1, 2 + n_elems * n_bits // 8)
    values = np.array([_block(block, n_elems, n_bits) for block in blocks], np.float32)
    return values.reshape(*rows.shape[:-1], -1)


def _block(block: Array, n_elems: int, n_bits: int) -> list[Any]:
    """A float16 d; then bits, the least significant first: -d or d, or (q - 1) · d."""
    d = np.float32(block[:2].copy().view(np.float16)[0])
    bits = int.from_bytes(block[2:].tobytes(), "little")
    quants = [bits >> n_bits * i & (1 << n_bits) - 1 for i in range(n_elems)]
    return [(2 * q - 1 if n_bits == 1 else q - 1) * d for q in quants]
