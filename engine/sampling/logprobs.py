"""Log probabilities of a token and of the likeliest ones, of the model's own distribution."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities: of the token that was taken, and `top`, (token, logprob)
    of the likeliest ones, highest first; of equal ones, the lower id first.

    They are the softmax of the model's logits, before bias, penalties, temperature and samplers.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprobs(logits: NDArray[np.float32], token: int, n_top: int) -> Logprobs:
    """The log probabilities in logits [n_vocab] of a token and of the `n_top` likeliest ones."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    n_top = min(n_top, len(values))
    # Without a sort of the whole vocabulary.
    least = np.partition(values, -n_top)[-n_top] if n_top else np.inf
    top = np.flatnonzero(values >= least)
    top = top[np.argsort(-values[top], kind="stable")][:n_top]
    pairs = zip(top.tolist(), values[top].tolist(), strict=True)
    return Logprobs(float(values[token]), tuple(pairs))
