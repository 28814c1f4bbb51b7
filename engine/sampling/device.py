"""Decode steps whose tokens a device draws: what an engine asks of one, and what it must give.

Only the ids come back, and they are there for the next step before the host has seen them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from engine.graph import Live, Tensor

# What every decoder can do.
MAX_TOP_K, MAX_BANNED = 128, 16


class Draw(NamedTuple):
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


class Ticket(Protocol):
    """A step on its way."""

    def ids(self) -> list[int]:
        """Waits for this step only; each row's token, -1 where a logit was not finite."""


class Decoder(Protocol):
    """Runs steps of one row for each sequence, in order with all else that its backend does."""

    def launch(
        self,
        inputs: Mapping[str, NDArray[np.int32]],
        live: Live,
        draws: Sequence[Draw],
        feed: Sequence[int],
    ) -> Ticket:
        """Start a step, and return without waiting for it.

        feed: for each row the row of the step launched before whose token it continues with, or -1
        for the one in `inputs`. At most the last two tickets may be asked for ids.
        """


@runtime_checkable
class DrawingBackend(Protocol):
    """What a backend is that has decoders."""

    def decoder(self, program: Any, inputs: Sequence[Tensor], logits: Tensor) -> Decoder | None:
        """A decoder of a program of its own which is the whole graph; None if it can't."""
