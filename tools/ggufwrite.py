"""Write GGUF files: metadata, a tensor table, and tensor data that callers hand over in pieces.

Used by tools/synth.py and the tests; needs only numpy. Version 3, little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

ALIGNMENT = 32
_NUMPY_KINDS = {
    "uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5,
    "float32": 6, "bool": 7, "uint64": 10, "int64": 11, "float64": 12,
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to write: row-major shape, GGML type number, size, and who supplies the bytes."""

    name: str
    shape: tuple[int, ...]
    ggml_id: int
    nbytes: int
    data: Callable[[], Iterable[bytes | memoryview | np.ndarray]]


def f32_tensor(name: str, values: np.ndarray) -> TensorSpec:
    """A float32 tensor held in memory."""
    values = np.ascontiguousarray(values, np.float32)
    return TensorSpec(name, values.shape, 0, values.nbytes, lambda: [values.tobytes()])


def write_gguf(path: str | Path, metadata: dict[str, Any], tensors: list[TensorSpec]) -> None:
    """Write `path`. Metadata values: bool, int (u32, or i64 where it doesn't fit), float (f32),
    str, list of str, or a numpy scalar or 1-D array, whose type is kept."""
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _value(value))
        offset = 0
        for t in tensors:
            dims = t.shape[::-1]
            file.write(_string(t.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
            file.write(struct.pack("<IQ", t.ggml_id, offset))
            offset += -(-t.nbytes // ALIGNMENT) * ALIGNMENT
        _pad(file)
        for t in tensors:
            start = file.tell()
            for piece in t.data():
                file.write(piece)
            written = file.tell() - start
            if written != t.nbytes:
                raise ValueError(f"{t.name}: expected {t.nbytes} bytes of data, got {written}")
            _pad(file)


def _pad(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        kind = _NUMPY_KINDS[value.dtype.name]
        return struct.pack("<IIQ", 9, kind, len(value)) + value.tobytes()
    if isinstance(value, np.generic):
        return struct.pack("<I", _NUMPY_KINDS[value.dtype.name]) + value.tobytes()
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return _value(np.uint32(value) if 0 <= value < 2**32 else np.int64(value))
    return _value(np.float32(value))
