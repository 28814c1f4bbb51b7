"""Cases of GATED_DELTA_NET."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from engine.ops.gated_delta_net import HEAD_MAPS
from tests.support.cases import Case, Operand, Rng, activation, case, recurrent_operands, slots

Array = np.ndarray[Any, Any]


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
    q, k, beta = _fair_draw(rng, (n, n_k, d_k), n_v)
    g = gate * rng.uniform(0.2, 2, size=(n, n_v, d_k) if kda else (n, n_v))
    n_slots = (2 + n_snapshots) * len(lengths)
    return {
        "q": activation(q),
        "k": activation(k),
        "v": activation(rng.normal(size=(n, n_v, d_v))),
        "g": activation(g),
        "beta": activation(beta),
        "state": slots(rng.normal(size=(n_slots, n_v, d_v, d_k))),
        **recurrent_operands(lengths, fresh, n_snapshots),
    }


def _fair_draw(rng: Rng, shape: tuple[int, int, int], n_v: int) -> tuple[Array, Array, Array]:
    """Unit q and k of a shape [n, n_k, d_k], and beta [n, n_v].

    Where the state has decayed, a token's output is beta · (q·k) · v. In a case of few tokens all
    q·k may nearly cancel; then the rounding of q and k to half precision is large beside them. Such
    a draw is made again: the mean of beta² · (q·k)² is at least half of what it tends to, which is
    1 / (3 · d_k).
    """
    n, n_k, d_k = shape
    while True:
        q, k = rng.normal(size=(2, *shape))
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        beta = rng.uniform(0, 1, size=(n, n_v))
        squares, repeats = np.square(np.sum(q * k, axis=-1)), n_v // n_k
        by_map = np.repeat(squares, repeats, axis=1), np.tile(squares, repeats)
        if all(np.sum(x * np.square(beta)) >= beta.size / (6 * d_k) for x in by_map):
            return q, k, beta


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
