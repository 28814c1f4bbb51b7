"""/v1/chat/completions: from a body to a chat of the engine, and from its tokens to messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from engine.engine import Engine
from engine.runtime.completion import Completion
from engine.runtime.request import FinishReason, Token
from engine.runtime.requests import ending
from engine.sampling.params import SamplingParams
from engine.server import answers, calls, constraints
from engine.server.messages import normalized
from engine.server.protocol import ChatRequest, check_chat, check_common, read
from engine.server.replays import Replay, Replays
from engine.server.replies import Json, Reply, chat_logprobs
from engine.server.sampling import params, seeds
from engine.text.template import THINKING, ChatTemplate, find_template, name_for

Keep = Callable[[Sequence[str], Replay], None]


@dataclass
class Shared:
    """What all requests share: the model's name; defaults: fields of SamplingParams for what a
    request does not say; template: None for the model's own; reasoning: whether to think,
    template_kwargs: variables of templates, where a request does not say."""

    name: str
    created: int = field(default_factory=lambda: int(time.time()))
    defaults: Json = field(default_factory=dict)
    template: ChatTemplate | None = None
    reasoning: bool | None = None
    template_kwargs: Json | None = None
    replays: Replays = field(default_factory=Replays)
    _own: dict[str | None, ChatTemplate] = field(default_factory=dict)

    def template_for(self, engine: Engine, tools: Any) -> ChatTemplate:
        """The template of a request with these tools."""
        if self.template is not None:
            return self.template
        name = name_for(engine.file, tools)
        if name not in self._own:
            self._own[name] = template = find_template(engine.file, name)
            template.name = "the chat template"  # Its own name has the file's path.
        return self._own[name]


class ChatPrompt:
    """What of a request makes its prompt."""

    def __init__(self, request: ChatRequest, shared: Shared, key: str) -> None:
        check_chat(request)
        self.messages = normalized(request.messages, partial(shared.replays.find, key))
        # What a model does not see it does not call.
        self.tools = None if request.tool_choice == "none" else request.tools or None
        self._shared, self._request = shared, request
        last = self.messages[-1]
        begun = last.get("content") or last.get("reasoning_content")
        # Where a client says how the answer begins.
        self.continues = last["role"] == "assistant" and bool(begun) and "tool_calls" not in last

    def options(self, engine: Engine) -> Json:
        """The keywords of Engine.chat and Engine.encode_chat."""
        template = self._shared.template_for(engine, self.tools)
        variables = dict(self._shared.template_kwargs or {})
        variables |= self._request.chat_template_kwargs or {}
        reasoning, effort = self._shared.reasoning, self._request.reasoning_effort
        if effort is not None:
            reasoning = False if effort == "none" else reasoning
            variables = {"reasoning_effort": effort, **variables}
        is_switch = "enable_thinking" in template.variables
        if is_switch and isinstance(own := variables.pop("enable_thinking", None), bool):
            reasoning = own
        return {
            "tools": self.tools,
            "template": template,
            "reasoning": reasoning if is_switch else None,
            "template_kwargs": variables or None,
            "continue_last": self.continues,
        }


class ChatCall:
    """A request that was read. key: the client's API key, of which no other sees anything."""

    def __init__(self, body: bytes, shared: Shared, key: str) -> None:
        self._request = request = read(body, ChatRequest)
        check_common(request)
        self._prompt = ChatPrompt(request, shared, key)
        self.n = request.n or 1
        self._shared, self._key = shared, key

    def start(self, engine: Engine) -> Reply:
        """See bridge.Call."""
        request, tools = self._request, self._prompt.tools
        n_top = (request.top_logprobs or 0) if request.logprobs else None
        options = self._prompt.options(engine)
        form = calls.find_format(options["template"].source) if tools else None
        defaults = {**self._shared.defaults, "preserved_tokens": answers.preserved_tokens(form)}
        continued = self._prompt.messages[-1] if self._prompt.continues else None
        held = constraints.constraint(request, tools, form, engine.tokenizer)
        if held is not None:
            is_begun = continued is not None and answers.is_thinking("", continued)
            defaults["grammar"] = replace(held[1], after=THINKING[1] * is_begun)
        own = params(request, engine, defaults, n_top)
        with constraints.named(held[0] if held else "grammar"):
            first = engine.chat(
                self._prompt.messages, own, cache_prompt=request.cache_prompt, **options
            )
        completions = with_others(engine, first, own, self.n, request.cache_prompt)
        end = ending(engine.tokenizer, first.request.ids)
        thinks = answers.is_thinking(end, continued)
        keep = partial(self._shared.replays.keep, self._key)
        choices = [
            ChatChoice(c, answers.AnswerParser(form, tools or (), thinks), engine, keep,
                       request.parallel_tool_calls is not False)
            for c in completions
        ]  # fmt: skip
        return Reply(
            "chat.completion", "chat.completion.chunk", self._shared.name, request, choices
        )


def with_others(
    engine: Engine, first: Completion, own: SamplingParams, n: int, cache_prompt: bool | None
) -> list[Completion]:
    """The completions of n choices: the others get the first one's prompt, with seeds after its
    own. They wait for its state, if the cache is used."""
    others = seeds(own.seed, n)[1:]
    return [
        first,
        *(
            engine.generate(first.request.ids, replace(own, seed=seed), cache_prompt=cache_prompt)
            for seed in others
        ),
    ]


class ChatChoice:
    """One answer. `keep(ids, text)` gets the exact text of one with calls; is_parallel: whether it
    may have several of them."""

    prompt = 0

    def __init__(
        self, completion: Completion, parser: answers.AnswerParser, engine: Engine,
        keep: Keep, is_parallel: bool,
    ) -> None:  # fmt: skip
        self.completion, self._parser, self._keep = completion, parser, keep
        self._tokenizer, self._is_parallel = engine.tokenizer, is_parallel
        self._has_begun = self._is_cut = False
        self._content, self._reasoning = list[str](), list[str]()
        self._logprobs: list[Any] = []
        self._n_told = 0

    def push(self, tokens: Sequence[Token]) -> list[Json]:
        self._logprobs += [(t.token, t.logprobs) for t in tokens if t.logprobs is not None]
        return self._entries(self._parser.push("".join(t.text for t in tokens)))

    def finish(self) -> list[Json]:
        found = self._parser.calls
        entries = self._entries([] if self._is_cut else self._parser.finish(), is_last=True)
        if self.finish_reason == "tool_calls" and not self._is_cut:
            self._keep([call.id for call in found], self._parser.sampled)
        return [*entries, {"delta": {}, "finish_reason": self.finish_reason}]

    @property
    def finish_reason(self) -> str:
        if self._is_cut:
            return "tool_calls"
        reason = self.completion.finish_reason
        has_calls = bool(self._parser.calls) and reason is FinishReason.STOP
        return "tool_calls" if has_calls else str(reason)

    def _entries(self, events: Sequence[answers.Event], is_last: bool = False) -> list[Json]:
        deltas = [] if self._has_begun else [{"role": "assistant", "content": ""}]
        self._has_begun = True
        for event in events:
            if not self._is_cut:
                deltas += self._delta(event)
        entries: list[Json] = [{"delta": delta} for delta in deltas]
        told, self._n_told = self._logprobs[self._n_told :], len(self._logprobs)
        if told and not entries:
            entries = [{"delta": {}}]
        if told:
            entries[-1]["logprobs"] = chat_logprobs(self._tokenizer, told)
        return entries

    def _delta(self, event: answers.Event) -> list[Json]:
        match event:
            case answers.Reasoning(text):
                self._reasoning.append(text)
                return [{"reasoning_content": text}]
            case answers.Content(text):
                self._content.append(text)
                return [{"content": text}]
            case answers.CallStart(index, id, name):
                if index and not self._is_parallel:
                    self._is_cut = True
                    self.completion.stop()
                    return []
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": id, "type": "function", "function": function}
                return [{"tool_calls": [call]}]
            case answers.CallArguments(index, text):
                return [{"tool_calls": [{"index": index, "function": {"arguments": text}}]}]

    def whole(self) -> Json:
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        found = self._parser.calls[:1] if not self._is_parallel else self._parser.calls
        message: Json = {"role": "assistant", "content": content if content or not found else None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if found:
            message["tool_calls"] = [
                {"id": call.id, "type": "function",
                 "function": {"name": call.name, "arguments": call.arguments}}
                for call in found
            ]  # fmt: skip
        logprobs = chat_logprobs(self._tokenizer, self._logprobs) if self._logprobs else None
        return {"message": message, "logprobs": logprobs}
