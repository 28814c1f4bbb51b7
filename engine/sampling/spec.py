"""How a device samples a token: what every DeviceSampler can do."""

from typing import NamedTuple

# The most that every device sampler takes.
MAX_TOP_K, MAX_BANNED = 128, 16


class SampleSpec(NamedTuple):
    """How a row's token is sampled, in this order.

    banned: left out. top_k: keep the highest logits; of equal ones, the lower ids. top_p: keep the
    likeliest until their probability reaches it. min_p: keep those with this share of the highest
    probability. Then divide by the temperature and sample with the random number `uniform`, [0, 1).
    is_masked: before all that, leave out what the mask of a grammar forbids.
    """

    banned: tuple[int, ...] = ()
    top_k: int = 1
    top_p: float = 1.0
    min_p: float = 0.0
    temperature: float = 1.0
    uniform: float = 0.0
    is_masked: bool = False
