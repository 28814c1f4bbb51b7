"""A request: its prompt, the tokens and the text so far, and why it ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from engine.kvcache.entries import Entry
from engine.kvcache.policy import Kind
from engine.kvcache.prefix import Node
from engine.kvcache.sequences import Checkpoint
from engine.runtime.owner import Signal
from engine.runtime.reuse import Reuse, Source
from engine.sampling.chain import Sampler
from engine.sampling.logprobs import Logprobs, logprobs
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
    """A generated token and the text it completes, which may be empty; with SamplingParams.logprobs
    its log probabilities."""

    text: str
    token: int
    logprobs: Logprobs | None = None


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
        n_shown = len(text) - n_begun(text, self._stops)
        self._pending = text[n_shown:]
        return text[:n_shown], False

    def finish(self) -> str:
        """The text still held back: no stop text followed."""
        pending, self._pending = self._pending, ""
        return pending


def n_begun(text: str, markers: Iterable[str]) -> int:
    """How many characters at the end of a text are the beginning of a marker, but not all of it."""
    longest = 0
    for marker in markers:
        sizes = range(min(len(text), len(marker) - 1), longest, -1)
        longest = next((n for n in sizes if text.endswith(marker[:n])), longest)
    return longest


class Request:
    """A prompt, which comes after `n_past` positions, with what was generated for it so far.

    ends: tokens that end it. limit: the most positions that it may fill in memory. `after`: the
    checkpoint that it continues from. `source`: the prompt as it was given, until what the request
    leaves is in the prefix cache; None for one that has nothing to do with it. `stops`: positions
    in the prompt at which a step ends, and what kind of state is kept there. `packed`: its ids as
    the cache has them. `n_done`: tokens of the prompt that memory has, or steps have got; `reuse`:
    those that it had. `n_pending`: tokens that steps in flight will give it; `is_for_host`: the
    host samples the next of these. `logits`: of its last token, if they are there and its next one
    was not sampled: the cache had all of the prompt, or its grammar's mask is not ready. `entries`:
    what it left in the cache.
    `end_logits`: those of its last token, if it ended by another one.
    `cause`: the exception that ended it.
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
        self.seq, self.is_admitted = -1, False
        self.after: Checkpoint | None = None
        self.source: Source | None = None
        self.stops: dict[int, Kind] = {}
        self.packed, self.has_looked_further = b"", False
        self.reuse = Reuse(len(self.ids), reason="it has not begun")
        self.logits: NDArray[np.float32] | None = None
        self.end_logits: NDArray[np.float32] | None = None
        self.entries: list[Node[Entry]] = []
        self.n_past, self.n_done, self.n_pending, self.is_for_host = n_past, 0, 0, False
        self.prompt_end = n_past + len(self.ids)
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.finish_reason: FinishReason | None = None
        self.detail = ""
        self.cause: BaseException | None = None
        self.ready: deque[Token] = deque()
        self.signal = Signal()
        self.timings = Timings()
        # The text in pieces, and what is joined of them: (how many, their text).
        self._pieces: list[str] = []
        self._joined = 0, ""

    @property
    def text(self) -> str:
        """The text so far; any thread may ask for it."""
        n, text = self._joined
        if n < len(self._pieces):
            new = self._pieces[n:]
            text += "".join(new)
            self._joined = n + len(new), text
        return text

    @property
    def is_prefilling(self) -> bool:
        return self.n_done < len(self.ids)

    @property
    def position(self) -> int:
        return self.n_past + self.n_done

    @property
    def n_read(self) -> int:
        """Tokens of the prompt whose steps have ended; their states are kept."""
        return self.reuse.n_reused + self.timings.n_prompt

    @property
    def chunk_limit(self) -> int:
        """The position at which its next chunk has to end at the latest."""
        ahead = (at for at in self.stops if self.position < at < self.prompt_end)
        return min(ahead, default=self.prompt_end)

    @property
    def has_run(self) -> bool:
        """Whether a step has got tokens of it."""
        return self.n_done > self.reuse.n_reused

    def replay(self, tokens: Sequence[int]) -> None:
        """Have decoder and stop texts hold back what they did after tokens that came before, and go
        on in the grammar. Raises GrammarError if they don't fit."""
        if self.sampler.matcher is not None:
            self.sampler.matcher.accept(*tokens)
        for token in tokens:
            self._stops.push(self._decoder.push(token))

    def take(self, n_tokens: int, n_outputs: int) -> None:
        """Note that a step has got its next `n_tokens`, and will give `n_outputs` tokens."""
        self.n_done += n_tokens if self.is_prefilling else 0
        self.n_pending += n_outputs

    def count_step(self, n_tokens: int, seconds: float, is_prompt: bool) -> None:
        """Note how long the step that processed `n_tokens` took."""
        if is_prompt:
            self.timings.n_prompt += n_tokens
            self.timings.prompt_s += seconds
        else:
            self.timings.n_eval += n_tokens
            self.timings.eval_s += seconds

    @property
    def can_decode(self) -> bool:
        """Whether a step can have its next token: it is known, or a device will feed it."""
        if self.logits is not None or self.is_for_host:
            return False
        if not self.n_pending:
            return True
        return self.sampler.is_for_device and not self._limit_at(len(self.tokens) + self.n_pending)

    @property
    def has_known_logits(self) -> bool:
        """Say whether the host can sample the next token now: its logits are there, and no running
        step samples it."""
        return self.logits is not None and not self.n_pending and self.is_ready

    @property
    def is_ready(self) -> bool:
        """Say whether the mask of the next token is there; without a grammar none is needed."""
        return self.sampler.matcher is None or self.sampler.matcher.is_ready

    def wait_until_ready(self, seconds: float) -> None:
        """Until it `is_ready`, or the time is over."""
        if self.sampler.matcher is not None:
            self.sampler.matcher.wait(seconds)

    def accept_logits(self, logits: NDArray[np.float32]) -> None:
        """Sample the next token from logits [n_vocab], which may end it, or keep them until the
        mask of its grammar is ready. Raises SamplingError and GrammarError."""
        if not self.is_ready:
            self.logits = logits
            return
        self.is_for_host = False
        token = self.sampler.sample(logits)
        self.sampler.accept_output(token)
        self.logits = None
        self.end_logits = logits if token in self._ends else None
        n_top = self.params.logprobs
        self._append(token, None if n_top is None else logprobs(logits, token, n_top))

    def accept_token(self, token: int) -> None:
        """As `accept_logits`, with a token that a device sampled."""
        self.sampler.accept_sampled(token)
        self._append(token)

    def _append(self, token: int, found: Logprobs | None = None) -> None:
        if token in self._ends:
            if text := self._rest():
                self._emit(text, token, found)
            self.finish(FinishReason.STOP, f"end-of-generation token {token}")
            return
        self.tokens.append(token)
        self.logprobs += [] if found is None else [found]
        text, is_stopped = self._stops.push(self._decoder.push(token))
        matcher = self.sampler.matcher
        is_complete = not is_stopped and matcher is not None and matcher.is_complete
        limit = "" if is_stopped else self._limit_at(len(self.tokens))
        if limit or is_complete:
            text += self._rest()
        if text or not is_stopped:
            self._emit(text, token, found)
        if is_stopped or is_complete:
            self.finish(FinishReason.STOP, "stop text" if is_stopped else "its grammar is complete")
        elif limit:
            self.finish(FinishReason.LENGTH, limit)

    def _limit_at(self, n: int) -> str:
        """The limit that ends it when it has n tokens; empty if it may continue."""
        if n == self.params.max_tokens:
            return f"{n} tokens were asked for"
        is_full = self.prompt_end + n > self.limit
        return f"the context of {self.limit} positions is full" if is_full else ""

    def finish(
        self, reason: FinishReason, detail: str = "", cause: BaseException | None = None
    ) -> None:
        """End it; of several calls the first one counts. Where tokens did not end it, the text that
        was held back is that of the last ones."""
        if self.finish_reason is None:
            if reason in (FinishReason.CANCELLED, FinishReason.ERROR):
                self._pieces.append(self._rest())
            self.detail, self.cause = detail, cause
            self.finish_reason = reason

    def cancel(self) -> None:
        self.finish(FinishReason.CANCELLED, "by its user")

    def _rest(self) -> str:
        """The text that decoder and stop texts still hold back."""
        text, is_stopped = self._stops.push(self._decoder.finish())
        return text if is_stopped else text + self._stops.finish()

    def _emit(self, text: str, token: int, found: Logprobs | None) -> None:
        self._pieces.append(text)
        self.ready.append(Token(text, token, found))
