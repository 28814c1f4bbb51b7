"""How a device samples a row's token: what every device sampler can do."""

from __future__ import annotations

from typing import NamedTuple

# What every decoder can do.
MAX_TOP_K, MAX_BANNED = 128, 16


class SampleSpec(NamedTuple):
    """How a row's token is drawn: of the tokens that are not `banned`, the `top_k` of the highest
    logits (equal ones by their ids), of these the likeliest until they reach `top_p`, of these what
    has `min_p` times the highest probability; then by probability at a temperature, where `uniform`
    of [0, 1) falls.
    """

    banned: tuple[int, ...] = ()
    top_k: int = 1
    top_p: float = 1.0
    min_p: float = 0.0
    temperature: float = 1.0
    uniform: float = 0.0
