"""Cases of ROUTER."""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.cases import Case, Operand, Rng, activation, case, weight


def cases() -> Iterable[Case]:
    def make(rng: Rng, n_experts: int, biased: bool) -> dict[str, Operand]:
        operands = {"logits": activation(rng.normal(size=(7, n_experts)) * 3)}
        if biased:
            operands["bias"] = weight(rng.normal(size=n_experts))
        return operands

    for n_experts, n_used, gating, biased, groups, normalized in (
        (4, 1, "softmax", False, (1, 1), True),
        (256, 8, "softmax", False, (1, 1), True),
        (8, 8, "sigmoid", True, (1, 1), True),
        (512, 10, "sigmoid", True, (8, 3), True),
        (24, 5, "sigmoid", True, (4, 2), False),
    ):
        attrs = {"n_used": n_used, "gating": gating, "scale": 2.5, "eps": 1e-20, "groups": groups}
        attrs["normalized"] = normalized
        yield case(make, attrs, n_experts=n_experts, biased=biased)
