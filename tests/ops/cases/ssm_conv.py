"""Cases of SSM_CONV."""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.cases import (
    Case,
    Operand,
    Rng,
    activation,
    case,
    recurrent_operands,
    slots,
    weight,
)


def cases() -> Iterable[Case]:
    def make(
        rng: Rng, sizes: tuple[int, ...], n_taps: int, lengths: list[int], fresh: list[int], k: int
    ) -> dict[str, Operand]:
        operands: dict[str, Operand] = {}
        for i, n_channels in enumerate(sizes):
            x = rng.normal(size=(sum(lengths), n_channels))
            taps = rng.normal(size=(n_channels, n_taps))
            operands |= {f"x{i or ''}": activation(x), f"weight{i or ''}": weight(taps)}
        state = rng.normal(size=((2 + k) * len(lengths), n_taps - 1, sum(sizes)))
        return {**operands, "state": slots(state), **recurrent_operands(lengths, fresh, k)}

    for sizes, n_taps, lengths, fresh, k in (
        ((16,), 4, [1], [], 0),
        ((32,), 4, [1, 5, 2], [1], 0),
        ((40,), 2, [3, 1], [], 1),
        ((64,), 4, [7, 1, 70], [0, 2], 3),
        ((24, 8, 16), 4, [2, 1, 9], [1], 2),
    ):
        yield case(make, {}, sizes=sizes, n_taps=n_taps, lengths=lengths, fresh=fresh, k=k)
