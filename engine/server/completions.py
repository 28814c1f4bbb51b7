"""/v1/completions: what follows a text, or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine import checks
from engine.engine import Engine
from engine.runtime.completion import Completion
from engine.runtime.request import FinishReason, Token
from engine.runtime.requests import Prompt
from engine.server.chat import Shared, with_others
from engine.server.constraints import form_of, named
from engine.server.errors import ApiError
from engine.server.protocol import MAX_CHOICES, CompletionRequest, at_most, check_common, read
from engine.server.replies import Json, Reply, piece
from engine.server.sampling import params


class CompletionCall:
    """A request that was read."""

    def __init__(self, body: bytes, shared: Shared) -> None:
        self._request, self._shared = read(body, CompletionRequest), shared
        check_common(self._request)
        self._prompts = _prompts(self._request.prompt)
        self._each = self._request.n or 1
        self.n = self._each * len(self._prompts)
        at_most("prompt", self.n, MAX_CHOICES, " choices")
        self._n_top = _n_top(self._request)

    def start(self, engine: Engine) -> Reply:
        """See bridge.Call."""
        request = self._request
        held = form_of(request)
        defaults = self._shared.defaults | ({"grammar": held[1]} if held else {})
        own = params(request, engine, defaults, self._n_top)
        choices = list[TextChoice]()
        try:
            for i, prompt in enumerate(self._prompts):
                with named(held[0] if held else "grammar"):
                    first = engine.generate(prompt, own, cache_prompt=request.cache_prompt)
                echo = _text(engine, prompt) if request.echo else ""
                for c in with_others(engine, first, own, self._each, request.cache_prompt):
                    choices.append(TextChoice(c, i, engine, echo))
        except BaseException:
            for choice in choices:
                choice.completion.stop()
            raise
        return Reply("text_completion", "text_completion", self._shared.name, request, choices)


def _text(engine: Engine, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else engine.tokenizer.decode(prompt, special=True)


def _prompts(given: str | list[Any]) -> Sequence[Prompt]:
    """The prompts of a field that may have one, or a list. Raises ApiError."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError("prompt: expected a text or token ids, got an empty list")
    if all(map(checks.is_integer, given)):
        return [given]
    for one in given:
        if not isinstance(one, str) and not (
            isinstance(one, list) and all(map(checks.is_integer, one))
        ):
            raise ApiError(f"prompt: expected texts or lists of token ids, got {checks.shown(one)}")
    return given


def _n_top(request: CompletionRequest) -> int | None:
    """How many likely tokens are wanted beside each. Raises ApiError for what is not there."""
    if request.suffix:
        raise ApiError("suffix: expected none, got a text: these models fill no gaps")
    if (request.best_of or 1) > (request.n or 1):
        raise ApiError(f"best_of: expected at most n ({request.n or 1}), got {request.best_of}")
    n_top = request.logprobs
    if isinstance(n_top, bool):  # llama-server's clients, and some of chats, send it so.
        n_top = 0 if n_top else None
    if request.echo and n_top is not None:
        raise ApiError(f"echo: expected no logprobs with it, got {n_top}: prompts have none here")
    return n_top


class TextChoice:
    """One completion; echo: what comes before it."""

    def __init__(self, completion: Completion, prompt: int, engine: Engine, echo: str) -> None:
        self.completion, self.prompt, self._echo = completion, prompt, echo
        self._tokenizer, self._texts = engine.tokenizer, list[str]()
        self._logprobs: Json = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        self._offset = 0

    def push(self, tokens: Sequence[Token]) -> list[Json]:
        text = "".join(t.text for t in tokens)
        if not self._texts:
            text = self._echo + text
        self._texts.append(text)
        new = [t for t in tokens if t.logprobs is not None]
        entry: Json = {"text": text, "logprobs": self._note(new) if new else None}
        return [entry] if text or new else []

    def _note(self, tokens: Sequence[Token]) -> Json:
        """The log probabilities of new tokens; they are kept for the whole, too."""
        made: Json = {name: [] for name in self._logprobs}
        for token in tokens:
            assert token.logprobs is not None
            text = piece(self._tokenizer, token.token)[0]
            made["tokens"].append(text)
            made["token_logprobs"].append(token.logprobs.logprob)
            top = ((piece(self._tokenizer, i)[0], p) for i, p in token.logprobs.top)
            made["top_logprobs"].append(dict(top))
            made["text_offset"].append(self._offset)
            self._offset += len(text)
        for name, values in made.items():
            self._logprobs[name] += values
        return made

    def finish(self) -> list[Json]:
        entries = [] if self._texts or not self._echo else self.push(())
        return [*entries, {"text": "", "logprobs": None, "finish_reason": self.finish_reason}]

    @property
    def finish_reason(self) -> str:
        is_length = self.completion.finish_reason is FinishReason.LENGTH
        return "length" if is_length else "stop"

    def whole(self) -> Json:
        has = bool(self._logprobs["tokens"])
        return {"text": "".join(self._texts), "logprobs": self._logprobs if has else None}
