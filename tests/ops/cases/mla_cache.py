"""Cases of MLA_CACHE."""

from __future__ import annotations

from collections.abc import Iterable

from engine.formats.quants import F16, F32, DType
from tests.support.cases import Case, Operand, Rng, activation, blocks, case, paged_operands, weight


def cases() -> Iterable[Case]:
    def make(
        rng: Rng, rank: int, n_pe: int, lengths: list[int], cache: DType
    ) -> dict[str, Operand]:
        pasts = rng.integers(0, 100, len(lengths)).tolist()
        paged, n_blocks = paged_operands(rng, pasts, lengths, 16)
        return {
            "kv": activation(rng.normal(size=(sum(lengths), rank + n_pe))),
            "norm": weight(rng.normal(size=rank)),
            "k_cache": blocks(rng.normal(size=(n_blocks, 1, 16, rank + n_pe)), cache),
            **paged,
        }

    for rank, n_pe, lengths, cache in ((16, 8, [1], F32), (512, 64, [3, 1, 20], F16)):
        yield case(make, {"eps": 1e-6}, rank=rank, n_pe=n_pe, lengths=lengths, cache=cache)
