"""Cases of ATTENTION."""

from __future__ import annotations

import math
from collections.abc import Iterable

from engine.formats.quants import F16, F32, DType
from tests.support.cases import Case, Operand, Rng, activation, blocks, case, paged_operands


def random_operands(
    rng: Rng,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    pasts: list[int],
    lengths: list[int],
    caches: tuple[DType, DType],
    gate: str,
) -> dict[str, Operand]:
    """Sequences with a past; with a scale of 1 / sqrt(Dk), scores have a deviation of 3.

    `gate`: for all `values` or `heads`; empty for none."""
    (n_q, n_kv), (d_k, d_v), n = heads, sizes, sum(lengths)
    paged, n_blocks = paged_operands(rng, pasts, lengths, 16)
    operands = {
        "q": activation(rng.normal(size=(n, n_q, d_k)) * 3),
        "k_cache": blocks(rng.normal(size=(n_blocks, n_kv, 16, d_k)), caches[0]),
        "v_cache": blocks(rng.normal(size=(n_blocks, n_kv, 16, d_v)), caches[1]),
        **paged,
    }
    if gate:
        shape = (n, n_q, d_v) if gate == "values" else (n, n_q)
        operands["gate"] = activation(rng.normal(size=shape) * 5)
    return operands


def cases() -> Iterable[Case]:
    for heads, sizes, pasts, lengths, caches, gate in (
        ((1, 1), (16, 16), [0], [1], (F32, F32), ""),
        ((4, 2), (64, 64), [0, 37, 200], [3, 1, 20], (F16, F16), "values"),
        ((8, 2), (256, 256), [15, 16], [1, 1], (F16, F16), "values"),
        ((6, 1), (72, 64), [5], [33], (F32, F32), "heads"),
        ((4, 2), (48, 48), [70, 3], [1, 40], (F16, F32), ""),
        ((4, 2), (48, 48), [70, 3], [1, 40], (F32, F16), "values"),
        ((6, 3), (64, 64), [15, 70], [1, 1], (F16, F16), "heads"),
    ):
        params = {"heads": heads, "sizes": sizes, "pasts": pasts, "lengths": lengths}
        attrs = {"scale": 1 / math.sqrt(sizes[0])}
        yield case(random_operands, attrs, **params, caches=caches, gate=gate)
