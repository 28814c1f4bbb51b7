"""One completion in the making: its prompt, what it has produced, and why it ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.kvcache.sequences import Checkpoint
from engine.runtime.conversation import ChatPrompt
from engine.sampling.chain import Sampler
from engine.sampling.params import SamplingParams
from engine.sampling.spec import SampleSpec
from engine.text.tokenizer import StreamDecoder


class FinishReason(StrEnum):
    """Why a completion ended: by itself, at a limit, because its user or an error said so."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class Token:
    """A generated token and the text it completes (empty inside a character or a stop text)."""

    text: str
    token: int


@dataclass
class Timings:
    """Seconds and token counts of one completion."""

    n_prompt: int = 0
    prompt_s: float = 0.0
    n_eval: int = 0
    eval_s: float = 0.0


class StopTexts:
    """Holds text back as long as it could be the start of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop text came up); what follows one is dropped."""
        held = self._held + text
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def finish(self) -> str:
        """What was held back and turned out to be no stop text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Request:
    """A prompt on its way to a completion.

    `limit`: most positions that it may fill in memory. `before`: the tokens that came before it,
    which penalties see. `mark_at`: a position of its prompt (0: none) at which a step ends and a
    mark is to be taken. `keep` is called when it ends, with a checkpoint to hold or release.
    """

    def __init__(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        sampler: Sampler,
        decoder: StreamDecoder,
        ends: Container[int],
        limit: int,
        n_past: int = 0,
        before: Sequence[int] = (),
    ) -> None:
        self.ids, self.params, self.limit = list(ids), params, limit
        self._sampler, self._decoder, self._ends = sampler, decoder, ends
        self._stops = StopTexts(params.stop)
        for token in (*before, *self.ids):
            sampler.accept(token)
        self.seq = -1
        self.mark_at, self.is_at_mark = 0, False
        self.keep: Callable[[Request, Checkpoint], None] | None = None
        self.n_past, self.n_done = n_past, 0
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.detail = ""
        self.ready: deque[Token] = deque()
        self.timings = Timings()

    @property
    def is_prefilling(self) -> bool:
        """Whether part of the prompt has not been processed yet."""
        return self.n_done < len(self.ids)

    @property
    def position(self) -> int:
        """How many positions precede what is left of its prompt."""
        return self.n_past + self.n_done

    @property
    def prompt_end(self) -> int:
        """The position after its prompt."""
        return self.n_past + len(self.ids)

    @property
    def chunk_limit(self) -> int:
        """The position that its next piece of prompt may not pass."""
        return self.mark_at if self.position < self.mark_at else self.prompt_end

    @property
    def needs_slot(self) -> bool:
        """Whether a mark is to come, or the step after it, which leaves the marked state alone."""
        return self.position < self.mark_at or self.is_at_mark

    def count(self, n_tokens: int, seconds: float) -> None:
        """Note that a step of so many seconds processed its next `n_tokens`."""
        self.is_at_mark = self.position < self.mark_at == self.position + n_tokens
        if self.is_prefilling:
            self.n_done += n_tokens
            self.timings.n_prompt += n_tokens
            self.timings.prompt_s += seconds
        else:
            self.timings.n_eval += n_tokens
            self.timings.eval_s += seconds

    def goes_on(self, n_more: int) -> bool:
        """Whether no limit ends it with its next `n_more` tokens."""
        return not self._limit_at(len(self.tokens) + n_more)

    def draw(self, ahead: int) -> SampleSpec | None:
        """How a device draws a token for `take`; see Sampler.draw."""
        return self._sampler.sample_spec(ahead)

    def receive(self, logits: NDArray[np.float32]) -> None:
        """SampleSpec the next token from the logits of the last one, and end if it is time to."""
        token = self._sampler.sample(logits)
        self._sampler.accept(token)
        self._continue(token)

    def take(self, token: int) -> None:
        """As `receive`, with the token that a device drew."""
        self._sampler.accept_sampled(token)
        self._continue(token)

    def _continue(self, token: int) -> None:
        if token in self._ends:
            self._emit(token, self._rest())
            self.finish(FinishReason.STOP, f"end-of-generation token {token}")
            return
        self.tokens.append(token)
        text, stopped = self._stops.push(self._decoder.push(token))
        if stopped:
            self._emit(token, text)
            self.finish(FinishReason.STOP, "stop text")
        elif limit := self._limit_at(len(self.tokens)):
            self._emit(token, text + self._rest(), always=True)
            self.finish(FinishReason.LENGTH, limit)
        else:
            self._emit(token, text, always=True)

    def _limit_at(self, n: int) -> str:
        """What ends it when it has n tokens; nothing if it may go on."""
        if n == self.params.max_tokens:
            return f"{n} tokens were asked for"
        full = self.prompt_end + n > self.limit
        return f"the context of {self.limit} positions is full" if full else ""

    def finish(self, reason: FinishReason, detail: str = "") -> None:
        """End it; the first reason counts."""
        if self.finish_reason is None:
            self.finish_reason, self.detail = reason, detail

    def _rest(self) -> str:
        text, stopped = self._stops.push(self._decoder.finish())
        return text if stopped else text + self._stops.finish()

    def _emit(self, token: int, text: str, always: bool = False) -> None:
        if text or always:
            self.ready.append(Token(text, token))
            self.text += text


class GenerationError(EngineError):
    """A completion that could not go on."""


class Runner(Protocol):
    """What a completion needs of its engine."""

    def advance(self) -> bool:
        """Run a step."""

    def cancel(self, request: Request) -> None:
        """End a request."""


class Completion:
    """An iterator of a completion's pieces, each with `.text` and `.token`.

    When it has ended: `finish_reason` (stop, length, cancelled, error), `detail` in words. `text`
    and `tokens` are what there is so far. Asking for the next piece runs steps until there is one;
    an error raises GenerationError. `close`, or forgetting it, cancels and frees its memory.
    """

    def __init__(self, engine: Runner, request: Request) -> None:
        self._engine, self._request = engine, request
        self._is_stopping = False

    def __iter__(self) -> Completion:
        return self

    def __next__(self) -> Token:
        request = self._request
        while not request.ready:
            if request.finish_reason is FinishReason.ERROR:
                raise GenerationError(request.detail)
            if request.finish_reason:
                raise StopIteration
            if self._is_stopping:
                self.cancel()
            else:
                self._engine.advance()
        return request.ready.popleft()

    @property
    def text(self) -> str:
        """The completion so far."""
        return self._request.text

    @property
    def tokens(self) -> list[int]:
        """Its tokens so far, without the one that ended it."""
        return self._request.tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it goes on."""
        return self._request.finish_reason

    @property
    def detail(self) -> str:
        """The reason in words."""
        return self._request.detail

    @property
    def timings(self) -> Timings:
        """What its steps took."""
        return self._request.timings

    def stop(self) -> None:
        """Let asking for the next piece cancel it. Unlike `cancel`, this may come in the middle of
        a step, from a signal's handler: the step ends as it would, and its memory is whole."""
        self._is_stopping = True

    def cancel(self) -> None:
        """End it; the reason is then `cancelled`, unless it had ended before."""
        self._engine.cancel(self._request)

    close = cancel

    def __del__(self) -> None:
        self._engine.cancel(self._request)


class ChatCompletion(Completion):
    """An answer of a chat: a Completion with its `prompt`, which says what was kept of the last
    turn's memory (`n_kept` positions) and what could not be (`n_dropped`)."""

    def __init__(self, engine: Runner, request: Request, prompt: ChatPrompt) -> None:
        super().__init__(engine, request)
        self.prompt = prompt
