"""Cases of MUL_MAT_HEADS."""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.cases import Case, Operand, Rng, activation, case, weight


def cases() -> Iterable[Case]:
    def make(
        rng: Rng, shape: tuple[int, int, int], n_tail: int, transposed: bool
    ) -> dict[str, Operand]:
        n_heads, n_in, n_out = shape
        matrix = (n_heads, n_in, n_out) if transposed else (n_heads, n_out, n_in)
        operands = {
            "x": activation(rng.normal(size=(5, n_heads, n_in))),
            "weight": weight(rng.normal(size=matrix)),
        }
        if n_tail:
            operands["tail"] = activation(rng.normal(size=(5, n_heads, n_tail)))
        return operands

    for shape, n_tail, transposed in (
        ((2, 16, 24), 0, False),
        ((3, 24, 64), 8, False),
        ((4, 32, 64), 8, True),
        ((2, 128, 40), 0, True),
    ):
        attrs = {"transposed": transposed}
        yield case(make, attrs, shape=shape, n_tail=n_tail, transposed=transposed)
