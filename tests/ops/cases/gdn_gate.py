"""Cases of GDN_GATE."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tests.support.cases import Case, Operand, Rng, activation, case, weight


def cases() -> Iterable[Case]:
    def make(rng: Rng, heads: tuple[int, ...]) -> dict[str, Operand]:
        return {
            "alpha": activation(rng.normal(size=(6, *heads)) * 15),
            "beta": activation(rng.normal(size=(6, heads[0])) * 10),
            "a": weight(-np.exp(rng.normal(size=heads[0]))),
            "dt": weight(rng.normal(size=heads)),
        }

    for heads in ((4,), (3, 16)):  # GDA, KDA
        yield case(make, {}, heads=heads)
