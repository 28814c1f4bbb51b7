"""Element types of tensors: the GGML types that GGUF files store, and how to decode them.

A type is a block of `block_elems` consecutive elements of a row, stored in `block_bytes` bytes. The
`gguf` package, imported when first used, decodes all but Q1_0 and Q2_0.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class DType:
    """One element type; `ggml_id` is its number in a GGUF file."""

    name: str
    ggml_id: int
    block_elems: int
    block_bytes: int

    @property
    def is_float(self) -> bool:
        """Whether numpy can hold it as a float without decoding blocks (BF16 cannot)."""
        return self.name in ("F32", "F16")

    def row_bytes(self, n_elems: int) -> int:
        """Bytes of a row of `n_elems` elements, which must be whole blocks."""
        assert n_elems % self.block_elems == 0, f"{n_elems} is no multiple of {self.block_elems}"
        return n_elems // self.block_elems * self.block_bytes

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])

    def __repr__(self) -> str:
        return self.name


F32 = DType("F32", 0, 1, 4)
F16 = DType("F16", 1, 1, 2)
BF16 = DType("BF16", 30, 1, 2)
I32 = DType("I32", 26, 1, 4)

_WEIGHT_TYPES = (
    F32,
    F16,
    BF16,
    DType("Q4_0", 2, 32, 18),
    DType("Q4_1", 3, 32, 20),
    DType("Q5_0", 6, 32, 22),
    DType("Q5_1", 7, 32, 24),
    DType("Q8_0", 8, 32, 34),
    DType("Q2_K", 10, 256, 84),
    DType("Q3_K", 11, 256, 110),
    DType("Q4_K", 12, 256, 144),
    DType("Q5_K", 13, 256, 176),
    DType("Q6_K", 14, 256, 210),
    DType("IQ2_XXS", 16, 256, 66),
    DType("IQ2_XS", 17, 256, 74),
    DType("IQ3_XXS", 18, 256, 98),
    DType("IQ1_S", 19, 256, 50),
    DType("IQ4_NL", 20, 32, 18),
    DType("IQ3_S", 21, 256, 110),
    DType("IQ2_S", 22, 256, 82),
    DType("IQ4_XS", 23, 256, 136),
    DType("IQ1_M", 29, 256, 56),
    DType("TQ1_0", 34, 256, 54),
    DType("TQ2_0", 35, 256, 66),
    DType("MXFP4", 39, 32, 17),
    DType("NVFP4", 40, 64, 36),
    DType("Q1_0", 41, 128, 18),
    DType("Q2_0", 42, 64, 18),
)
WEIGHT_TYPES: dict[str, DType] = {t.name: t for t in _WEIGHT_TYPES}
BY_GGML_ID: dict[int, DType] = {t.ggml_id: t for t in _WEIGHT_TYPES}

# Types whose block is a float16, and bits of each element that say how often it counts.
_MULTIPLES: dict[str, tuple[float, ...]] = {"Q1_0": (-1, 1), "Q2_0": (-1, 0, 1, 2)}
_NUMPY = {"F32": np.float32, "F16": np.float16, "I32": np.int32}


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """The numpy type of a plain type: F32, F16 or I32."""
    return np.dtype(_NUMPY[dtype.name])


def names(types: Iterable[DType]) -> str:
    return ", ".join(t.name for t in types)


def dequantize(
    dtype: DType,
    raw: NDArray[np.uint8],
    shape: tuple[int, ...],
    factors: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Decode stored bytes, the rows of a tensor of `shape`, to float32: the values are ggml's,
    times the one factor, or times that of each matrix along the first axis."""
    values = _decoded(dtype, raw, shape)
    if factors is None or (factors == 1).all():
        return values
    return values * factors.reshape(-1, *[1] * (len(shape) - 1))


def _decoded(dtype: DType, raw: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.float32]:
    if dtype.is_float:
        return raw.view(_NUMPY[dtype.name]).reshape(shape).astype(np.float32)
    if dtype.name in _MULTIPLES:
        return _multiples(dtype, raw).reshape(shape)
    from gguf import GGMLQuantizationType
    from gguf import quants as gguf_quants

    rows = raw.reshape(-1, dtype.row_bytes(shape[-1]))
    decoded = gguf_quants.dequantize(rows, GGMLQuantizationType(dtype.ggml_id))
    return np.ascontiguousarray(decoded, dtype=np.float32).reshape(shape)


def _multiples(dtype: DType, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Decode blocks of a type of _MULTIPLES: float32 [blocks, block_elems]."""
    blocks, values = raw.reshape(-1, dtype.block_bytes), _MULTIPLES[dtype.name]
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    n_bits = len(values) // 2
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").reshape(len(blocks), -1, n_bits)
    numbers = np.array(values, np.float32)[bits @ np.array([1, 2][:n_bits])]
    return np.asarray(scales * numbers, np.float32)


def quantize_q8_0(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Float32 rows, whole blocks of 32, rounded to Q8_0: the bytes of the rows, uint8."""
    from gguf import GGMLQuantizationType
    from gguf import quants as gguf_quants

    rows = gguf_quants.quantize(values, GGMLQuantizationType.Q8_0)
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
