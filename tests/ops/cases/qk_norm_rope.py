"""Cases of QK_NORM_ROPE; some are scaled as by a factor of 4, linear or YaRN."""

from __future__ import annotations

from collections.abc import Iterable

from engine.formats.quants import F16, F32, DType
from engine.ops.rope import RopeScaling
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

    plain, linear = RopeScaling(), RopeScaling(0.25, 0.25)
    yarn, step = RopeScaling(1, 0.25, 5, 21, 1.14), RopeScaling(0.8, 0.25, 2, 0.001, 0.9)
    for heads, size, lengths, types, n_rot, scaling in (
        ((2, 1), 16, [1], (F32, F32), 8, plain),
        ((4, 2), 64, [3, 1, 40], (F16, F16), 64, plain),
        ((8, 2), 256, [5], (F32, F16), 64, plain),
        ((3, 3), 24, [2, 2], (F16, F32), 0, plain),
        ((4, 2), 64, [3, 1, 40], (F32, F32), 64, yarn),
        ((8, 2), 256, [5], (F32, F16), 64, yarn),
        ((3, 3), 24, [2, 2], (F32, F32), 8, step),
        ((2, 1), 16, [7], (F32, F32), 16, linear),
        ((3, 3), 24, [2, 2], (F16, F32), 0, yarn),
    ):
        attrs = {"eps": 1e-6, "n_rot": n_rot, "rope_base": 1e6, "rope_scaling": scaling}
        yield case(make, attrs, heads=heads, size=size, lengths=lengths, types=types)
