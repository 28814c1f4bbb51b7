"""Random tensor data in every weight type of GGUF files, with mean 0 and a chosen deviation.

A quantized block is random bytes in which only the scale fields are set, so no quantizer is
needed. `BlockType.rms` is the root mean square of what such blocks decode to at scale 1;
tests/tools/test_synth.py measures it with the gguf package. Used by tools/synth.py; needs only
numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

CHUNK_BYTES = 4 << 20
PANEL_BYTES = 16 << 20
# Scales vary by a quarter from block to block; this is the rms of that factor.
_JITTER, _JITTER_RMS = 0.25, (1 + 0.25**2 / 3) ** 0.5


@dataclass(frozen=True)
class BlockType:
    """A type's number and block size, and where its scales lie.

    `d`, `m`: byte offsets of the f16 scale and min (m = m_per_d · d centres the values);
    `signed`: let half of the scales be negative, because the quants' mean is not 0;
    `high`: (start, stop, mask) of sub-scale bytes whose high bits are set, which keeps the
    sub-scales of one block within a factor of two.
    """

    name: str
    ggml_id: int
    elems: int
    nbytes: int
    rms: float = 1.0
    d: int = 0
    m: int | None = None
    m_per_d: float = 0.0
    signed: bool = False
    high: tuple[int, int, int] = (0, 0, 0)


_TYPES = (
    BlockType("F32", 0, 1, 4),
    BlockType("F16", 1, 1, 2),
    BlockType("BF16", 30, 1, 2),
    BlockType("Q4_0", 2, 32, 18, 4.637, signed=True),
    BlockType("Q4_1", 3, 32, 20, 4.610, m=2, m_per_d=-7.5),
    BlockType("Q5_0", 6, 32, 22, 9.247, signed=True),
    BlockType("Q5_1", 7, 32, 24, 9.233, m=2, m_per_d=-15.5),
    BlockType("Q8_0", 8, 32, 34, 73.9),
    BlockType("Q2_K", 10, 256, 84, 13.98, d=80, m=82, m_per_d=1.5, high=(0, 16, 0x88)),
    BlockType("Q3_K", 11, 256, 110, 43.3, d=108),
    BlockType("Q4_K", 12, 256, 144, 243.7, m=2, m_per_d=7.5, high=(4, 12, 0xA0)),
    BlockType("Q5_K", 13, 256, 176, 490.6, m=2, m_per_d=15.5, high=(4, 12, 0xA0)),
    BlockType("Q6_K", 14, 256, 210, 1366, d=208),
    BlockType("IQ2_XXS", 16, 256, 66, 53.4),
    BlockType("IQ2_XS", 17, 256, 74, 55.8),
    BlockType("IQ3_XXS", 18, 256, 98, 142.1),
    BlockType("IQ1_S", 19, 256, 50, 7.20),
    BlockType("IQ4_NL", 20, 32, 18, 67.5, signed=True),
    BlockType("IQ3_S", 21, 256, 110, 140.0),
    BlockType("IQ2_S", 22, 256, 82, 56.4),
    BlockType("IQ4_XS", 23, 256, 136, 1246),
    BlockType("IQ1_M", 29, 256, 56, 7.20, d=48),
    BlockType("TQ1_0", 34, 256, 54, 0.821, d=52, signed=True),
    BlockType("TQ2_0", 35, 256, 66, 0.820, d=64, signed=True),
    BlockType("MXFP4", 39, 32, 17, 5.852),
    BlockType("NVFP4", 40, 64, 36, 5.852),
    BlockType("Q1_0", 41, 128, 18, 1.0, signed=True),
    BlockType("Q2_0", 42, 64, 18, 1.225, signed=True),
)
TYPES: dict[str, BlockType] = {t.name: t for t in _TYPES}


def _valid_bytes() -> dict[str, np.ndarray]:
    """Per type whose quantizer does not emit every byte: 256 bytes that it does emit."""
    byte = np.arange(256)
    trits = [b for b in byte if all((b >> shift) & 3 != 3 for shift in (0, 2, 4, 6))]
    valid = {
        "Q8_0": np.where(byte == 128, 129, byte),
        "TQ1_0": np.resize((np.arange(243) * 256 + 242) // 243, 256),
        "TQ2_0": np.resize(trits, 256),
    }
    return {name: table.astype(np.uint8) for name, table in valid.items()}


def _scale_codes() -> dict[str, np.ndarray]:
    """The types with 8-bit float scales (E8M0, unsigned E4M3): code -> value, ascending.

    Values are halved, as ggml does, because its table of 4-bit floats is doubled."""
    exponent, mantissa = np.divmod(np.arange(127), 8)
    e4m3 = np.where(exponent == 0, mantissa / 512, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return {"MXFP4": 2.0 ** (np.arange(255) - 128), "NVFP4": e4m3 / 2}


_VALID_BYTES, _SCALE_CODES = _valid_bytes(), _scale_codes()


def generator(*seed: int) -> np.random.Generator:
    """The random numbers of one tensor or panel."""
    return np.random.Generator(np.random.SFC64(seed))


def random_blocks(
    block: BlockType, n_blocks: int, std: float, rng: np.random.Generator
) -> np.ndarray:
    """`n_blocks` random blocks as uint8 [n_blocks · nbytes], decoding to mean 0 and `std`."""
    if block.elems == 1:
        return _floats(block.name, rng.standard_normal(n_blocks, np.float32) * np.float32(std))
    n_words = -(-n_blocks * block.nbytes // 8)
    words = rng.integers(0, 2**64, n_words, np.uint64)
    blocks = words.view(np.uint8)[: n_blocks * block.nbytes]
    if (valid := _VALID_BYTES.get(block.name)) is not None:
        blocks = valid[blocks]
    _set_scales(block, blocks.reshape(n_blocks, block.nbytes), std / block.rms, rng)
    return blocks


def random_pieces(
    block: BlockType, n_elems: int, std: float, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """A whole tensor as pieces of at most CHUNK_BYTES."""
    n_blocks, step = n_elems // block.elems, CHUNK_BYTES // block.nbytes
    for start in range(0, n_blocks, step):
        yield random_blocks(block, min(step, n_blocks - start), std, rng)


def random_panel(block: BlockType, std: float, rng: np.random.Generator) -> np.ndarray:
    """About PANEL_BYTES of blocks to repeat; a prime number of them, so that the rows of a
    tensor start at different blocks of the panel."""
    n_blocks = PANEL_BYTES // block.nbytes
    while any(n_blocks % i == 0 for i in range(2, int(n_blocks**0.5) + 1)):
        n_blocks -= 1
    return np.concatenate(list(random_pieces(block, n_blocks * block.elems, std, rng)))


def repeated(panel: np.ndarray, start: int, nbytes: int) -> Iterator[np.ndarray]:
    """`nbytes` of the panel, repeated, from offset `start` on."""
    while nbytes > 0:
        piece = panel[start : start + nbytes]
        yield piece
        nbytes, start = nbytes - len(piece), 0


def _floats(name: str, values: np.ndarray) -> np.ndarray:
    if name == "F16":
        values = values.astype(np.float16)
    elif name == "BF16":
        values = ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    return values.view(np.uint8)


def _set_scales(
    block: BlockType, blocks: np.ndarray, scale: float, rng: np.random.Generator
) -> None:
    n_blocks = len(blocks)
    if (codes := _SCALE_CODES.get(block.name)) is not None:
        n_scales = block.elems // (32 if block.name == "MXFP4" else 16)
        blocks[:, :n_scales] = _random_codes(codes, scale, (n_blocks, n_scales), rng)
        return
    d = scale / _JITTER_RMS * rng.uniform(1 - _JITTER, 1 + _JITTER, n_blocks)
    if block.signed:
        d = np.where(rng.random(n_blocks) < 0.5, -d, d)
    if block.name == "IQ1_M":
        _set_nibbles(blocks[:, block.d :], d.astype("<f2").view("<u2"))
        return
    start, stop, mask = block.high
    blocks[:, start:stop] |= np.uint8(mask)
    _set_f16(blocks, block.d, d)
    if block.m is not None:
        _set_f16(blocks, block.m, d * block.m_per_d)


def _set_f16(blocks: np.ndarray, offset: int, values: np.ndarray) -> None:
    blocks[:, offset : offset + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _set_nibbles(fields: np.ndarray, values: np.ndarray) -> None:
    """IQ1_M spreads its f16 scale over the top nibbles of four 16-bit fields."""
    for i in range(4):
        nibble = (values >> np.uint16(4 * i)) & np.uint16(15)
        high = fields[:, 2 * i + 1]
        high[:] = (high & 15) | (nibble << 4).astype(np.uint8)


def _random_codes(
    values: np.ndarray, target: float, shape: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Codes of the two values around `target`, mixed so that their mean square is its square."""
    i = int(np.clip(np.searchsorted(values, target), 1, len(values) - 1))
    low, high = values[i - 1] ** 2, values[i] ** 2
    codes: np.ndarray = i - 1 + (rng.random(shape) < (target**2 - low) / (high - low))
    return codes
