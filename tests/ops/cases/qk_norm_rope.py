"""Cases of QK_NORM_ROPE."""

from __future__ import annotations

from collections.abc import Iterable

from engine.formats.quants import F16, F32, DType
from tests.support.cases import Case, Operand, Rng, activation, blocks, case, paged_operands, weight


def cases() -> Iterable[Case]:
    def make(
        rng: Rng, heads: tuple[int, int], size: int, lengths: list[int], types: tuple[DType, DType]
    ) -> dict[str, Operand]:
        (n_q, n_kv), n = heads, sum(lengths)
        pasts = rng.integers(0, 100, len(lengths)).tolist()
        paged, n_blocks = paged_operands(rng, pasts, lengths, 16)
        caches = rng.normal(size=(2, n_blocks, n_kv, 16, size))
        return {
            "q": activation(rng.normal(size=(n, n_q, size))),
            "k": activation(rng.normal(size=(n, n_kv, size))),
            "v": activation(rng.normal(size=(n, n_kv, size))),
            "q_norm": weight(rng.normal(size=size)),
            "k_norm": weight(rng.normal(size=size)),
            "k_cache": blocks(caches[0], types[0]),
            "v_cache": blocks(caches[1], types[1]),
            **paged,
        }

    for heads, size, lengths, types, n_rot in (
        ((2, 1), 16, [1], (F32, F32), 8),
        ((4, 2), 64, [3, 1, 40], (F16, F16), 64),
        ((8, 2), 256, [5], (F32, F16), 64),
        ((3, 3), 24, [2, 2], (F16, F32), 0),
    ):
        attrs = {"eps": 1e-6, "n_rot": n_rot, "rope_base": 1e6}
        yield case(make, attrs, heads=heads, size=size, lengths=lengths, types=types)
