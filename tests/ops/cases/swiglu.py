"""Cases of SWIGLU."""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.cases import Case, Operand, Rng, activation, case


def cases() -> Iterable[Case]:
    def make(rng: Rng, shapes: list[tuple[int, ...]]) -> dict[str, Operand]:
        operands: dict[str, Operand] = {}
        for i, shape in enumerate(shapes):
            gate, up = f"gate{i or ''}", f"up{i or ''}"
            values = rng.normal(size=(2, 4, *shape))
            operands |= {gate: activation(values[0] * 20), up: activation(values[1])}
        return operands

    for shapes, limits in (
        ([(4,)], (0,)),
        ([(67,)], (0.5,)),
        ([(3584,)], (0,)),
        ([(3, 24), (40,)], (0, 1.5)),
        ([(3, 25), (40,)], (0.75, 0)),
    ):
        yield case(make, {"limits": limits}, shapes=shapes)
