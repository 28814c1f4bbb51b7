"""Cases of GET_ROWS."""

from __future__ import annotations

from collections.abc import Iterable

from engine.formats.quants import BF16, F32, WEIGHT_TYPES, DType
from tests.support.cases import Case, Operand, Rng, activation, case, integers, weight


def cases() -> Iterable[Case]:
    def embed(rng: Rng, dtype: DType) -> dict[str, Operand]:
        table = weight(rng.normal(size=(11, 64)), dtype)
        return {"table": table, "ids": integers(rng.integers(0, 11, 5), "n_tokens")}

    def pick(rng: Rng) -> dict[str, Operand]:
        table = activation(rng.normal(size=(9, 8)))
        return {"table": table, "ids": integers([8, 0, 8], "n_outputs")}

    for dtype in (F32, BF16, WEIGHT_TYPES["Q8_0"]):
        yield case(embed, {}, dtype=dtype)
    yield case(pick, {})
