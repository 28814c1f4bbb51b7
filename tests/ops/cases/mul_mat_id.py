"""Cases of MUL_MAT_ID."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engine.formats.quants import F32, WEIGHT_TYPES, DType
from tests.support.cases import Case, Operand, Rng, activation, case, weight


def cases() -> Iterable[Case]:
    def make(
        rng: Rng, n_tokens: int, experts: tuple[int, int], per_expert: bool, dtype: DType
    ) -> dict[str, Operand]:
        n_experts, n_used = experts
        ids = np.argsort(rng.random((n_tokens, n_experts)), axis=1)[:, :n_used]
        shape = (n_tokens, n_used, 64) if per_expert else (n_tokens, 64)
        operands = {
            "x": activation(rng.normal(size=shape)),
            "ids": activation(ids.astype(np.int32)),
        }
        if per_expert:
            operands["weights"] = activation(rng.uniform(0, 1, (n_tokens, n_used)))
        sizes = (24,) if per_expert else (24, 40)
        for i, n_out in enumerate(sizes):
            operands[f"matrix{i}"] = weight(rng.normal(size=(n_experts, n_out, 64)), dtype)
        return operands

    for n_tokens, experts, per_expert, dtype in (
        (1, (4, 2), False, F32),
        (1, (4, 2), True, WEIGHT_TYPES["Q8_0"]),
        (9, (8, 3), False, WEIGHT_TYPES["Q4_0"]),
        (9, (8, 8), True, F32),
        (40, (3, 1), True, WEIGHT_TYPES["Q8_0"]),
    ):
        params = {"n_tokens": n_tokens, "experts": experts}
        yield case(make, {}, **params, per_expert=per_expert, dtype=dtype)
