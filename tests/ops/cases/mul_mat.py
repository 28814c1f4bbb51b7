"""Cases of MUL_MAT."""

from __future__ import annotations

from collections.abc import Iterable

from engine.formats.quants import BF16, F16, F32, WEIGHT_TYPES, DType
from tests.support.cases import Case, Operand, Rng, activation, case, weight


def cases() -> Iterable[Case]:
    def make(rng: Rng, n_tokens: int, n_in: int, sizes: dict[int, DType]) -> dict[str, Operand]:
        weights = {
            f"weight{i}": weight(rng.normal(size=(n_out, n_in)) * 0.05, dtype)
            for i, (n_out, dtype) in enumerate(sizes.items())
        }
        return {"x": activation(rng.normal(size=(n_tokens, n_in))), **weights}

    mixed = {48: WEIGHT_TYPES["Q8_0"], 7: F32, 33: WEIGHT_TYPES["Q4_0"], 16: BF16, 5: F16}
    for n_tokens in (1, 2, 17):
        yield case(make, {}, n_tokens=n_tokens, n_in=96, sizes=mixed)
    yield case(make, {}, n_tokens=3, n_in=2048, sizes={130: F32})

    def gated(rng: Rng, n_tokens: int, with_gate: bool) -> dict[str, Operand]:
        operands = make(rng, n_tokens, 64, {24: WEIGHT_TYPES["Q8_0"]})
        operands["add"] = activation(rng.normal(size=(n_tokens, 24)))
        if with_gate:
            operands["gate"] = activation(rng.normal(size=(n_tokens, 1)) * 5)
        return operands

    for with_gate in (False, True):
        yield case(gated, {}, n_tokens=6, with_gate=with_gate)
