"""Answers in OpenAI's form: chunks of a stream, or one object, of the completions of a request."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from engine.runtime.completion import Completion
from engine.runtime.request import FinishReason, Token
from engine.sampling.grammar import GrammarError
from engine.sampling.logprobs import Logprobs
from engine.sampling.params import NoTokenError
from engine.server.errors import ApiError
from engine.server.protocol import Sampling
from engine.text.tokenizer import Tokenizer

Json = dict[str, Any]
_encode = msgspec.json.encode
DONE = b"data: [DONE]\n\n"


class Choice(Protocol):
    """One completion of an answer. prompt: which of the prompts it is of."""

    completion: Completion
    prompt: int

    def push(self, tokens: Sequence[Token]) -> list[Json]:
        """What a stream says of new tokens: each what an entry of `choices` has but the index."""

    def finish(self) -> list[Json]:
        """The same when it has ended, with the last of what was held back."""

    @property
    def finish_reason(self) -> str: ...

    def whole(self) -> Json:
        """The entry of `choices` of an object."""


class Reply:
    """The answer to a request; kind: `chat.completion` or `text_completion`."""

    def __init__(
        self, kind: str, chunk_kind: str, model: str, request: Sampling, choices: Sequence[Choice]
    ) -> None:
        self._chunk_kind, self._choices = chunk_kind, choices
        self.completions = [choice.completion for choice in choices]
        self.streams = bool(request.stream)
        options = request.stream_options
        self._has_usage = bool(options and options.include_usage)
        begin = "chatcmpl-" if kind.startswith("chat") else "cmpl-"
        self._head = {
            "id": begin + secrets.token_urlsafe(18), "object": kind, "created": int(time.time()),
            "model": model,
        }  # fmt: skip
        self._left = dict(enumerate(choices))

    @property
    def is_done(self) -> bool:
        return not self._left

    def news(self) -> list[bytes]:
        """See bridge.Reply."""
        events = []
        for index, choice in list(self._left.items()):
            # Asked first: no token comes after the end.
            has_ended = choice.completion.finish_reason is not None
            tokens = choice.completion.take_ready()
            entries = choice.push(tokens) if tokens else []
            if has_ended:
                if choice.completion.finish_reason is FinishReason.ERROR:
                    cause = choice.completion.request.cause
                    is_its_own = isinstance(cause, NoTokenError | GrammarError)
                    raise ApiError(choice.completion.detail, 400 if is_its_own else 500)
                entries += choice.finish()
                del self._left[index]
            events += [self._event(index, entry, has_ended) for entry in entries]
        return events if self.streams else []

    def _event(self, index: int, entry: Json, is_last: bool) -> bytes:
        entry = {"index": index, **entry, "finish_reason": entry.get("finish_reason")}
        chunk = {**self._head, "object": self._chunk_kind, "choices": [entry]}
        if self._has_usage:
            chunk["usage"] = None
        elif is_last and self.is_done and entry["finish_reason"]:
            chunk["timings"] = self._timings()
        return b"data: %b\n\n" % _encode(chunk)

    def last(self) -> list[bytes]:
        """See bridge.Reply."""
        if not self._has_usage:
            return [DONE]
        chunk = {**self._head, "object": self._chunk_kind, "choices": []}
        chunk |= {"usage": self._usage(), "timings": self._timings()}
        return [b"data: %b\n\n" % _encode(chunk), DONE]

    def whole(self) -> bytes:
        """See bridge.Reply."""
        entries = [
            {"index": i, **choice.whole(), "finish_reason": choice.finish_reason}
            for i, choice in enumerate(self._choices)
        ]
        ends = {"usage": self._usage(), "timings": self._timings()}
        return _encode({**self._head, "choices": entries, **ends})

    def _usage(self) -> Json:
        first = {c.prompt: c.completion.reuse for c in reversed(self._choices)}.values()
        n_prompt = sum(reuse.n_prompt for reuse in first)
        n_generated = sum(len(c.tokens) for c in self.completions)
        return {
            "prompt_tokens": n_prompt, "completion_tokens": n_generated,
            "total_tokens": n_prompt + n_generated,
            "prompt_tokens_details": {"cached_tokens": sum(reuse.n_reused for reuse in first)},
        }  # fmt: skip

    def _timings(self) -> Json:
        """llama-server's; with `reuse`: what was reused, and why not more."""
        each = [c.timings for c in self.completions]
        made: Json = {"cache_n": sum(c.reuse.n_reused for c in self.completions)}
        for name, n, seconds in (
            ("prompt", sum(t.n_prompt for t in each), sum(t.prompt_s for t in each)),
            ("predicted", sum(len(c.tokens) for c in self.completions),
             sum(t.eval_s for t in each)),
        ):  # fmt: skip
            made |= {
                f"{name}_n": n, f"{name}_ms": 1e3 * seconds,
                f"{name}_per_token_ms": 1e3 * seconds / n if n else 0.0,
                f"{name}_per_second": n / seconds if seconds else 0.0,
            }  # fmt: skip
        return made | {"reuse": str(self.completions[0].reuse)}


def piece(tokenizer: Tokenizer, token: int) -> tuple[str, list[int]]:
    """A token's text, also of a control token, and its bytes."""
    raw = tokenizer.token_bytes(token, special=True)
    return raw.decode("utf-8", "replace"), list(raw)


def chat_logprobs(tokenizer: Tokenizer, found: Sequence[tuple[int, Logprobs]]) -> Json:
    """Log probabilities of tokens as chats have them."""

    def entry(token: int, logprob: float) -> Json:
        text, raw = piece(tokenizer, token)
        return {"id": token, "token": text, "bytes": raw, "logprob": logprob}

    return {
        "content": [
            {**entry(token, own.logprob), "top_logprobs": [entry(t, p) for t, p in own.top]}
            for token, own in found
        ]
    }
