"""The completion that a user sees of a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self

from engine import checks
from engine.errors import EngineError
from engine.runtime.owner import Signal
from engine.runtime.request import FinishReason, Request, Token
from engine.runtime.reuse import Reuse


class GenerationError(EngineError):
    """A completion that could not go on."""


class Loop(Protocol):
    """The step loop, as completions use it."""

    def wait(self, signal: Signal, is_done: Callable[[], bool]) -> None: ...

    async def wait_async(self, signal: Signal, is_done: Callable[[], bool]) -> None: ...

    def cancel(self, request: Request) -> None: ...

    def cancel_soon(self, request: Request) -> None: ...


class Completion:
    """An iterator of a completion's tokens, each with `.text` and `.token`; also `async for`.

    `next` waits until a token is there, or runs the steps for it (see Engine.start), and raises
    GenerationError if the completion ended by an error. `text` and `tokens` (without an
    end-of-generation token) are what came so far, `logprobs` those of `tokens` if they were asked
    for, `timings` what its steps took, `reuse` what they need not process. When it has ended,
    `finish_reason` says why, and `detail` says it in words. `close`, or dropping the last
    reference, cancels it and frees its memory; so does the end of a task that waits in `async for`.
    """

    def __init__(self, loop: Loop, request: Request) -> None:
        self.loop, self.request = loop, request
        self.tokens, self.timings = request.tokens, request.timings
        self.logprobs = request.logprobs

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Token:
        token = None
        while token is None:
            self.loop.wait(self.request.signal, lambda: self.has_news)
            token = self._take(StopIteration)
        return token

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        token = None
        while token is None:
            try:
                await self.loop.wait_async(self.request.signal, lambda: self.has_news)
            except BaseException:
                self.stop()
                raise
            token = self._take(StopAsyncIteration)
        return token

    def wait(self) -> Self:
        """Wait until it has ended; its tokens can be iterated over afterwards, too."""
        self.loop.wait(self.request.signal, lambda: self.request.finish_reason is not None)
        self._raise_error()
        return self

    def wait_for_token(self) -> None:
        """Wait until the next token, or the end, can be read."""
        self.loop.wait(self.request.signal, lambda: self.has_news)

    def tell(self, signal: Signal) -> None:
        """Have `signal` get the news of it from now on, and those that were not read yet."""
        self.request.signal = signal
        signal.notify()

    def take_ready(self) -> list[Token]:
        """The tokens that are there and were not read; never waits. After the end of what was
        `finish_reason` before, no further ones come."""
        ready = self.request.ready
        return [ready.popleft() for _ in range(len(ready))]

    @property
    def has_news(self) -> bool:
        """True if a token, or the end, can be read."""
        return bool(self.request.ready) or self.request.finish_reason is not None

    def _take(self, end: type[Exception]) -> Token | None:
        """The next token; None if another reader took it. Raises `end` at the end, and
        GenerationError after an error."""
        # Read first: a request that has ended gets no further token.
        has_ended = self.request.finish_reason is not None
        try:
            return self.request.ready.popleft()
        except IndexError:
            if not has_ended:
                return None
        self._raise_error()
        raise end

    def _raise_error(self) -> None:
        if self.request.finish_reason is FinishReason.ERROR:
            raise GenerationError(self.request.detail) from self.request.cause

    def __repr__(self) -> str:
        state = str(self.finish_reason or "not finished")
        text = checks.shown(self.text)
        return f"<{type(self).__name__} {state}, {len(self.tokens)} tokens: {text}>"

    @property
    def text(self) -> str:
        return self.request.text

    @property
    def progress(self) -> tuple[int, int]:
        """(tokens of the prompt that steps have taken, all that they have to process)."""
        n_reused = self.request.reuse.n_reused
        return self.request.n_done - n_reused, len(self.request.ids) - n_reused

    @property
    def reuse(self) -> Reuse:
        """What of the prompt was known when it began, and why not more."""
        return self.request.reuse

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.request.finish_reason

    @property
    def detail(self) -> str:
        return self.request.detail

    def stop(self) -> None:
        """Cancel it when the step that runs has ended; never waits, so that a signal handler or an
        event loop can call it."""
        self.loop.cancel_soon(self.request)

    def cancel(self) -> None:
        """End it with the reason `cancelled`, unless it has ended already."""
        if self.request.finish_reason is None:
            self.loop.cancel(self.request)

    close = cancel

    def __del__(self) -> None:
        request = self.__dict__.get("request")  # None if `__init__` broke off.
        if request is not None and request.finish_reason is None:
            self.loop.cancel_soon(request)
