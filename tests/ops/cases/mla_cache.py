"""Cases of MLA_CACHE."""

from __future__ import annotations

from collections.abc import Iterable

from engine.formats.quants import F16, F32, DType
from engine.ops.rope import RopeScaling
from tests.support.cases import Case, Operand, Rng, activation, blocks, case, paged_operands, weight


def cases() -> Iterable[Case]:
    def make(
        rng: Rng, rank: int, n_pe: int, n_heads: int, lengths: list[int], cache: DType
    ) -> dict[str, Operand]:
        pasts = rng.integers(0, 100, len(lengths)).tolist()
        paged, n_blocks = paged_operands(rng, pasts, lengths, 16)
        queries = {"q_pe": activation(rng.normal(size=(sum(lengths), n_heads, n_pe)))}
        return {
            **(queries if n_heads else {}),
            "kv": activation(rng.normal(size=(sum(lengths), rank + n_pe))),
            "norm": weight(rng.normal(size=rank)),
            "k_cache": blocks(rng.normal(size=(n_blocks, 1, 16, rank + n_pe)), cache),
            **paged,
        }

    plain, yarn = RopeScaling(), RopeScaling(1, 0.25, 5, 21, 1.14)
    for rank, n_pe, n_heads, lengths, cache, n_rot, scaling in (
        (16, 8, 0, [1], F32, 0, plain),
        (16, 8, 3, [1], F32, 8, plain),
        (20, 11, 3, [2, 3], F16, 6, yarn),
        (16, 8, 0, [3], F32, 8, plain),
        (512, 64, 5, [3, 1, 20], F16, 64, yarn),
    ):
        attrs = {"eps": 1e-6, "n_rot": n_rot, "rope_base": 1e4, "rope_scaling": scaling}
        shape = {"rank": rank, "n_pe": n_pe, "n_heads": n_heads, "lengths": lengths}
        yield case(make, attrs, **shape, cache=cache)
