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
            # With a lower bound it is positive, which the op does not rely on.
            "a": weight(np.exp(rng.normal(size=heads[0])) * rng.choice([-1, 1], heads[0])),
            "dt": weight(rng.normal(size=heads)),
        }

    for heads in ((4,), (3, 16)):  # GDA, KDA
        yield case(make, {"lower_bound": 0.0}, heads=heads)
    for heads in ((5,), (3, 20)):
        yield case(make, {"lower_bound": -5.0}, heads=heads)
