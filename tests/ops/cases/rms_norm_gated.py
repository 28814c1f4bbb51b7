"""Cases of RMS_NORM_GATED."""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.cases import Case, Operand, Rng, activation, case, weight


def cases() -> Iterable[Case]:
    def make(rng: Rng, shape: tuple[int, ...]) -> dict[str, Operand]:
        x, gate = rng.normal(size=(2, *shape))
        return {
            "x": activation(x),
            "gate": activation(gate * 10),
            "weight": weight(rng.normal(size=shape[-1])),
        }

    for act in ("silu", "sigmoid"):
        for shape in ((3, 2, 16), (2, 5, 128)):
            yield case(make, {"eps": 1e-6, "act": act}, shape=shape)
