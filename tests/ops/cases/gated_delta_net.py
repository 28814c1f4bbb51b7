"""Cases of GATED_DELTA_NET."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from engine.ops.gated_delta_net import HEAD_MAPS
from tests.support.cases import Case, Operand, Rng, activation, case, recurrent_operands, slots


def random_operands(
    rng: Rng,
    lengths: list[int],
    heads: tuple[int, int],
    sizes: tuple[int, int],
    gate: float = -0.1,
    kda: bool = False,
    fresh: tuple[int, ...] = (),
    n_snapshots: int = 0,
) -> dict[str, Operand]:
    """Operands at the scales of real models: unit keys, decays around `gate` (0: no decay)."""
    (n_k, n_v), (d_k, d_v), n = heads, sizes, sum(lengths)
    q, k = rng.normal(size=(2, n, n_k, d_k))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    g = gate * rng.uniform(0.2, 2, size=(n, n_v, d_k) if kda else (n, n_v))
    n_slots = (2 + n_snapshots) * len(lengths)
    return {
        "q": activation(q),
        "k": activation(k),
        "v": activation(rng.normal(size=(n, n_v, d_v))),
        "g": activation(g),
        "beta": activation(rng.uniform(0, 1, size=(n, n_v))),
        "state": slots(rng.normal(size=(n_slots, n_v, d_v, d_k))),
        **recurrent_operands(lengths, fresh, n_snapshots),
    }


def cases() -> Iterable[Case]:
    shapes: list[dict[str, Any]] = [
        {"lengths": [1], "heads": (2, 2), "sizes": (16, 16)},
        {"lengths": [3, 1, 70], "heads": (2, 4), "sizes": (32, 16), "fresh": (1,)},
        {"lengths": [200], "heads": (1, 3), "sizes": (64, 128), "n_snapshots": 2},
        {"lengths": [65, 64], "heads": (4, 4), "sizes": (128, 128), "fresh": (0, 1)},
        {"lengths": [2, 130], "heads": (1, 2), "sizes": (40, 24), "n_snapshots": 4},
        {"lengths": [1, 1, 1], "heads": (2, 4), "sizes": (256, 256)},
    ]
    for i, shape in enumerate(shapes):
        for algorithm in ("scan", "chunk"):
            for kda in (False, True):
                gate = (-0.1, 0.0, -20.0, -100.0)[(i + kda) % 4]
                head_map = HEAD_MAPS[i % 2]
                attrs = {"head_map": head_map, "scale": 0.1, "algorithm": algorithm}
                yield case(random_operands, attrs, **shape, gate=gate, kda=kda)
