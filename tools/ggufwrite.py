"""Write GGUF files: metadata, a tensor table, and tensor data that callers hand over in pieces.

Used by tools/synth.py and the tests; needs only numpy. Version 3, little-endian.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

ALIGNMENT = 32
_NUMPY_KINDS = {
    "uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5,
    "float32": 6, "bool": 7, "uint64": 10, "int64": 11, "float64": 12,
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to write: row-major shape, GGML type number, size, and what supplies the bytes, as
    bytes, memory views or arrays; an integer is a hole of so many bytes, which reads as zeros."""

    name: str
    shape: tuple[int, ...]
    ggml_id: int
    nbytes: int
    data: Callable[[], Iterable[Any]]


def f32_tensor(name: str, values: np.ndarray) -> TensorSpec:
    """A float32 tensor held in memory."""
    values = np.ascontiguousarray(values, np.float32)
    return TensorSpec(name, values.shape, 0, values.nbytes, lambda: [values.tobytes()])


def write_gguf(path: str | Path, metadata: dict[str, Any], tensors: list[TensorSpec]) -> None:
    """Write `path`. Metadata values: bool, int (u32, or i64 where it doesn't fit), float (f32),
    str, list of str, or a numpy scalar or 1-D array, whose type is kept. `general.alignment`,
    if it is there, is obeyed."""
    alignment = int(metadata.get("general.alignment", ALIGNMENT))
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _value(value))
        offset = 0
        for t in tensors:
            dims = t.shape[::-1]
            file.write(_string(t.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
            file.write(struct.pack("<IQ", t.ggml_id, offset))
            offset += -(-t.nbytes // alignment) * alignment
        _pad(file, alignment)
        for t in tensors:
            start = file.tell()
            for piece in t.data():
                file.seek(piece, os.SEEK_CUR) if isinstance(piece, int) else file.write(piece)
            written = file.tell() - start
            if written != t.nbytes:
                raise ValueError(f"{t.name}: expected {t.nbytes} bytes of data, got {written}")
            _pad(file, alignment)
        file.truncate()  # Where the last hole ends.


def split_path(path: str | Path, i: int, n: int) -> Path:
    """The name of file `i` (from 0) of the `n` files that `path` is split into."""
    path = Path(path)
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{i + 1:05d}-of-{n:05d}.gguf")


def write_split(
    path: str | Path, metadata: dict[str, Any], tensors: list[TensorSpec], n: int
) -> list[Path]:
    """Write the model as `n` files of about the same size; returns their paths.

    As llama.cpp's gguf-split does: all metadata is in the first file, `split.*` in each.
    """
    if not 1 <= n <= len(tensors):
        raise ValueError(f"cannot split {len(tensors)} tensors over {n} files")
    starts, paths = _split_starts([t.nbytes for t in tensors], n), []
    for i, (start, stop) in enumerate(zip(starts, [*starts[1:], len(tensors)], strict=True)):
        own = metadata if i == 0 else {}
        own = {k: v for k, v in metadata.items() if k == "general.alignment"} | own
        own |= {
            "split.no": np.uint16(i),
            "split.count": np.uint16(n),
            "split.tensors.count": np.int32(len(tensors)),
        }
        paths.append(split_path(path, i, n))
        write_gguf(paths[-1], own, tensors[start:stop])
    return paths


def _split_starts(sizes: list[int], n: int) -> list[int]:
    """The first tensor of each of `n` groups, none of them empty."""
    ends = np.cumsum(sizes)
    starts = [0]
    for i in range(1, n):
        start = int(np.searchsorted(ends, ends[-1] * i // n))
        starts.append(min(max(start, starts[-1] + 1), len(sizes) - (n - i)))
    return starts


def _pad(file: IO[bytes], alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


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
    if isinstance(value, Sized):
        texts = map(_string, cast(Iterable[str], value))
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(texts)
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return _value(np.uint32(value) if 0 <= value < 2**32 else np.int64(value))
    return _value(np.float32(value))
