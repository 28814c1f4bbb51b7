"""Cases of ADD_RMS_NORM."""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.cases import Case, Operand, Rng, activation, case, weight


def cases() -> Iterable[Case]:
    def make(rng: Rng, n_embd: int, residual: bool) -> dict[str, Operand]:
        operands = {
            "x": activation(rng.normal(size=(5, n_embd)) * 3),
            "weight": weight(rng.normal(size=n_embd)),
        }
        if residual:
            operands["delta"] = activation(rng.normal(size=(5, n_embd)))
        return operands

    for n_embd in (8, 130, 1024):
        for residual in (False, True):
            yield case(make, {"eps": 1e-5}, n_embd=n_embd, residual=residual)
