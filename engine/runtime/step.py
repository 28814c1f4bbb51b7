"""A step as a record: its rows, each the part of one sequence, and what each row gave.

The record exists before the step touches memory, and until its last row is delivered.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.runtime.batch import Chunk
from engine.runtime.request import Request
from engine.sampling.spec import SampleSpec


class Outcome(NamedTuple):
    """What a step gave a row: a token, or logits [n_vocab] to sample from, or the reason why its
    values can't be used; nothing of these if the row asked for no logits."""

    token: int | None = None
    logits: NDArray[np.float32] | None = None
    failure: str = ""


@dataclass(eq=False)
class Row:
    """A sequence's part of a step; `request`: whose it is, None for chunks that a user runs."""

    chunk: Chunk
    request: Request | None = None
    is_taken = is_delivered = False

    def take(self) -> None:
        """Note in the request that a step has its chunk."""
        if (request := self.request) is not None:
            self.n_ahead, self.is_prompt = request.n_pending, request.is_prefilling
            self._before = request.n_done
            self.is_taken = True
            request.take(len(self.chunk.tokens), self.chunk.n_outputs)

    def give_back(self) -> None:
        """Undo `take`, whether it was done or broke off; the step before has none of its tokens
        left to give."""
        if self.is_taken and self.request is not None:
            self.request.n_done = self._before
            self.request.n_pending = 0

    def spec(self) -> SampleSpec | None:
        """How a device samples its token; None if only the host can."""
        assert self.request is not None
        return self.request.sampler.sample_spec(self.n_ahead)


# Waits for a step; what each of its rows gave, in their order.
Outcomes = Callable[[], list[Outcome]]


@dataclass(eq=False)
class Step:
    """The record. `is_launched`: it may have changed states. `sample`: comes before the launch of
    the next step, which is fed by its tokens. `outcomes`: None until there are any to wait for."""

    rows: list[Row]
    sample: Callable[[], None] = lambda: None
    outcomes: Outcomes | None = None
    is_launched: bool = False
    start: float = field(default_factory=time.perf_counter)

    @property
    def live(self) -> list[Row]:
        """The rows whose requests have not ended meanwhile."""
        return [r for r in self.rows if r.request is None or not r.request.finish_reason]

    @property
    def sampled(self) -> list[Row]:
        """The rows that give logits, in the order of the batch's outputs."""
        return [row for row in self.rows if row.chunk.n_outputs]
