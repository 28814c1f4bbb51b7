"""Cases of L2_NORM."""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.cases import Case, Operand, Rng, activation, case


def cases() -> Iterable[Case]:
    def make(rng: Rng, shape: tuple[int, ...], scale: float) -> dict[str, Operand]:
        return {"x": activation(rng.normal(size=shape) * scale)}

    for shape in ((3, 2, 16), (5, 3, 128), (1, 1, 40)):
        for scale in (1.0, 1e-3):
            yield case(make, {"eps": 1e-6}, shape=shape, scale=scale)
