"""What a request has to do with the prefix cache: what it may find there, reused, and leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from engine.kvcache.policy import Kind
from engine.sampling.params import SamplingParams


class Answer(Protocol):
    """What a request generated."""

    tokens: list[int]
    params: SamplingParams

    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class Reuse:
    """What a prompt of `n_prompt` tokens reused; as a text, also why not more.

    n_known: so many of its first tokens were known; a state after all of them may not be kept.
    `reason`: why nothing was looked for, or why no more is known.
    """

    n_prompt: int
    n_reused: int = 0
    n_known: int = 0
    reason: str = ""

    def __str__(self) -> str:
        said = f"reused {self.n_reused} of {self.n_prompt} tokens"
        return f"{said} ({reason})" if (reason := self._why()) else said

    def _why(self) -> str:
        """Why it is not all, and why less than is known."""
        if self.n_reused == self.n_prompt:
            return ""
        if self.n_reused == self.n_known:
            new = "the rest is new" if self.n_known else "nothing known begins like it"
            return self.reason or new
        known = f"diverged at {self.n_known}" if self.n_known < self.n_prompt else "all are known"
        state = f"nearest state at {self.n_reused}" if self.n_reused else "no state before"
        return f"{known}, {state}" + (f": {self.reason}" if self.reason else "")


@dataclass
class Source:
    """A prompt as it was given: its `ids`; with a `key` if it was a text, which is found in the
    cache by it. marks: positions where it is cut and states are kept. first_end, turn_end:
    (characters of `key`, ids) of its first message, and of what the next turn is sure to keep; 0 of
    both if there is none. `answer`: what of a text the next prompt will have of an answer (None:
    unknown). reason: why not more of it is known."""

    ids: list[int]
    key: str = ""
    marks: dict[int, Kind] = field(default_factory=dict)
    first_end: tuple[int, int] = (0, 0)
    turn_end: tuple[int, int] = (0, 0)
    answer: Callable[[Answer], str | None] = lambda answer: None
    reason: str = ""
