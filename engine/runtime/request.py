"""A request (prompt, tokens so far, why it ended), and the completion that its user sees."""

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
from engine.text.tokenizer import StreamDecoder


class FinishReason(StrEnum):
    """Why a completion ended: an end token or stop text, a limit, its user, or an error."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class Token:
    """A generated token and the text it completes, which may be empty."""

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
    """Finds stop texts in text that comes in pieces; holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._pending = stops, ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop text was found); what follows one is dropped."""
        text, self._pending = self._pending + text, ""
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            return text[: min(found)], True
        n_shown = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._pending = text[n_shown:]
        return text[:n_shown], False

    def finish(self) -> str:
        """The text still held back: no stop text followed."""
        pending, self._pending = self._pending, ""
        return pending


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the start of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Request:
    """A prompt, which comes after `n_past` positions, with what was generated for it so far.

    ends: tokens that end it. limit: the most positions that it may fill in memory. `rollback_at`:
    the position in the prompt (0: none) at which a step ends and a rollback point is kept.
    `on_finish` is called when it ends, with a checkpoint that the callee keeps or releases.
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
    ) -> None:
        self.ids, self.params, self.limit = list(ids), params, limit
        self.sampler, self._decoder, self._ends = sampler, decoder, ends
        self._stops = StopTexts(params.stop)
        sampler.accept(*self.ids)
        self.seq = -1
        self.rollback_at, self.is_at_rollback = 0, False
        self.on_finish: Callable[[Request, Checkpoint], None] | None = None
        self.n_past, self.n_done = n_past, 0
        self.prompt_end = n_past + len(self.ids)
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.text = self.detail = ""
        self.ready: deque[Token] = deque()
        self.timings = Timings()

    @property
    def is_prefilling(self) -> bool:
        return self.n_done < len(self.ids)

    @property
    def position(self) -> int:
        return self.n_past + self.n_done

    @property
    def chunk_limit(self) -> int:
        """The position at which its next chunk has to end at the latest."""
        return self.rollback_at if self.position < self.rollback_at else self.prompt_end

    @property
    def needs_slot(self) -> bool:
        """Whether its rollback point will take a state slot: with it, or with the step after it."""
        return self.position < self.rollback_at or self.is_at_rollback

    def count_step(self, n_tokens: int, seconds: float) -> None:
        """Note that a step of so many seconds processed its next `n_tokens`."""
        self.is_at_rollback = self.position < self.rollback_at == self.position + n_tokens
        if self.is_prefilling:
            self.n_done += n_tokens
            self.timings.n_prompt += n_tokens
            self.timings.prompt_s += seconds
        else:
            self.timings.n_eval += n_tokens
            self.timings.eval_s += seconds

    def can_continue(self, n_more: int) -> bool:
        """Whether it may have `n_more` tokens without reaching a limit."""
        return not self._limit_at(len(self.tokens) + n_more)

    def accept_logits(self, logits: NDArray[np.float32]) -> None:
        """Sample the next token from logits [n_vocab]; it may end it. Raises SamplingError."""
        token = self.sampler.sample(logits)
        self.sampler.accept(token)
        self._append(token)

    def accept_token(self, token: int) -> None:
        """As `accept_logits`, with a token that a device sampled."""
        self.sampler.accept_sampled(token)
        self._append(token)

    def _append(self, token: int) -> None:
        if token in self._ends:
            if text := self._rest():
                self._emit(token, text)
            self.finish(FinishReason.STOP, f"end-of-generation token {token}")
            return
        self.tokens.append(token)
        text, is_stopped = self._stops.push(self._decoder.push(token))
        limit = "" if is_stopped else self._limit_at(len(self.tokens))
        if limit:
            text += self._rest()
        if text or not is_stopped:
            self._emit(token, text)
        if is_stopped:
            self.finish(FinishReason.STOP, "stop text")
        elif limit:
            self.finish(FinishReason.LENGTH, limit)

    def _limit_at(self, n: int) -> str:
        """The limit that ends it when it has n tokens; empty if it may continue."""
        if n == self.params.max_tokens:
            return f"{n} tokens were asked for"
        is_full = self.prompt_end + n > self.limit
        return f"the context of {self.limit} positions is full" if is_full else ""

    def finish(self, reason: FinishReason, detail: str = "") -> None:
        """End it; of several calls the first one counts."""
        if self.finish_reason is None:
            self.finish_reason, self.detail = reason, detail

    def _rest(self) -> str:
        """The text that decoder and stop texts still hold back."""
        text, is_stopped = self._stops.push(self._decoder.finish())
        return text if is_stopped else text + self._stops.finish()

    def _emit(self, token: int, text: str) -> None:
        self.ready.append(Token(text, token))
        self.text += text


class GenerationError(EngineError):
    """A completion that could not go on."""


class Runner(Protocol):
    """What a completion needs of its engine."""

    def advance(self) -> bool: ...

    def cancel(self, request: Request) -> None: ...


class Completion:
    """An iterator of a completion's tokens, each with `.text` and `.token`.

    `next` runs steps until a token is there, and raises GenerationError if the completion ended by
    an error. `text` and `tokens` (without an end-of-generation token) are what came so far,
    `timings` what its steps took. When it has ended, `finish_reason` says why, and `detail` says it
    in words. `close`, or dropping the last reference, cancels it and frees its memory.
    """

    def __init__(self, engine: Runner, request: Request) -> None:
        self._engine, self._request = engine, request
        self.tokens, self.timings = request.tokens, request.timings
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
        return self._request.text

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._request.finish_reason

    @property
    def detail(self) -> str:
        return self._request.detail

    def stop(self) -> None:
        """Cancel it at the next call of `next`; a signal handler may call this within a step."""
        self._is_stopping = True

    def cancel(self) -> None:
        """End it with the reason `cancelled`, unless it has ended already."""
        self._engine.cancel(self._request)

    close = cancel

    def __del__(self) -> None:
        self._engine.cancel(self._request)


class ChatCompletion(Completion):
    """An answer of a chat: a Completion with its `prompt`."""

    def __init__(self, engine: Runner, request: Request, prompt: ChatPrompt) -> None:
        super().__init__(engine, request)
        self.prompt = prompt
