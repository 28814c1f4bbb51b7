"""Prompts of chats: messages as a text, and the tokens of what of it is not known yet.

For every turn the template renders all messages anew. The prefix cache knows the texts of prompts
and answers that ran, and the ids that a state has read for each; only what follows the longest one
is tokenized. So an answer whose tokens are not what the tokenizer makes of its text stays whole.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from engine import checks
from engine.formats.gguf import GGUFFile
from engine.kvcache.entries import Text
from engine.kvcache.policy import Kind
from engine.kvcache.prefix import characters, n_common, unpacked
from engine.runtime.requests import FindText, spelled
from engine.runtime.reuse import Answer, Source
from engine.text.template import (
    THINKING,
    ChatError,
    ChatTemplate,
    Message,
    Sampled,
    check_variables,
    find_template,
    is_text_part,
    name_for,
)
from engine.text.tokenizer import Tokenizer

# An answer that no template contains or changes; it shows what the template puts around answers.
_PROBE = "\ufdd0"
_Render = Callable[[Sequence[Message]], str]
Segment = tuple[str, list[int]]  # A text and its tokens.
# Before a rendered text in the cache: other texts are tokenized otherwise.
_KIND = "chat:"
_N_LAST = 8  # Prompts whose messages are compared, where less of a text is known than should be.
# Tokens. The end of a shorter first message costs more, in a step of its own, than it saves.
_LEAST_FIRST = 16


def _ids(segments: Sequence[Segment]) -> list[int]:
    return [token for _, ids in segments for token in ids]


class Chats:
    """Makes prompts of messages. `find(key)`: what of a text is known (PrefixCache.match_text)."""

    def __init__(self, file: GGUFFile, tokenizer: Tokenizer, find: FindText) -> None:
        self._file, self._tokenizer, self._find = file, tokenizer, find
        self._templates: dict[str | None, ChatTemplate] = {}
        named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._special = {k: tokenizer.text(i) for k, i in named.items() if i is not None}
        # (messages, options, text, how much of it was sure to stay) of the last prompts.
        self._last: deque[tuple[Any, Any, str, int]] = deque(maxlen=_N_LAST)

    def checked(
        self, template: ChatTemplate | None, tools: Any, reasoning: bool | None,
        template_kwargs: Any, continue_last: bool,
    ) -> ChatTemplate:  # fmt: skip
        """The template, or the model's own. Raises ChatError for what doesn't go with it."""
        if template is None:
            name = name_for(self._file, tools)
            template = self._templates.get(name) or find_template(self._file, name)
            self._templates[name] = template
        checks.instance(ChatError, "template", template, ChatTemplate)
        if tools is not None:
            for tool in checks.sequence(ChatError, "tools", tools, "JSON schemas"):
                checks.mapping(ChatError, "tools", tool, "a JSON schema")
            if "tools" not in template.variables:
                raise ChatError(f"{template.name} takes no tools: it reads no tools")
        if reasoning is not None:
            checks.flag(ChatError, "reasoning", reasoning)
            if "enable_thinking" not in template.variables:
                raise ChatError(f"{template.name} takes no reasoning: it reads no enable_thinking")
        checks.flag(ChatError, "continue_last", continue_last)
        check_variables(template_kwargs, reasoning)
        return template

    def prompt(
        self, template: ChatTemplate, messages: Sequence[Message], is_new: bool, **options: Any
    ) -> Source:
        """The prompt for the next answer; is_new: nothing of it may be known.

        options: those of ChatTemplate.render. Control tokens that a message, a tool or a variable
        spells are text (in an answer, <think> and </think> excepted, and those of a Sampled).
        Raises ChatError.
        """
        render, escaped = self._renderer(template, options), self._escaped_all(template, messages)
        text = render(escaped)
        # Other messages are rendered to their end.
        probe = partial(render, continue_last=False)
        end, known = (0, None) if is_new else self._known(text)
        before = [] if known is None else unpacked(known.ids)
        new = self._new_segments(text, end)
        source = Source(before + _ids(new), _KIND + text, answer=self._answer)
        ends = known.ends if known else (self._first_end(probe, escaped, text, new), (0, 0))
        source.first_end, turn_end = ends
        sure = _n_stable(probe, escaped, text)
        if sure > end:
            n, n_ids = _position(new, sure - end)
            source.turn_end = len(_KIND) + end + n, len(before) + n_ids
        elif turn_end[0] <= len(_KIND) + sure:  # That of the prompt whose text is known.
            source.turn_end = turn_end
        source.marks = {source.turn_end[1]: Kind.TURN, source.first_end[1]: Kind.FIRST}
        if not is_new:
            source.reason = self._note(render, escaped, (template, options), (text, sure), end)
        return source

    def _known(self, text: str) -> tuple[int, Text | None]:
        """The longest known text that a text starts with, if no special token lies across its end:
        an answer may end like the beginning of one."""
        end, known = self._find(_KIND + text)
        while self._tokenizer.has_special_across(text, end - len(_KIND)):
            end, known = self._find(_KIND + text[: end - len(_KIND) - 1])
        return max(0, end - len(_KIND)), known

    def encode(
        self, template: ChatTemplate, messages: Sequence[Message], **options: Any
    ) -> list[int]:
        """The ids of the prompt for the next answer, whatever is known; as `prompt` otherwise."""
        text = self._renderer(template, options)(self._escaped_all(template, messages))
        return _ids(self._new_segments(text, 0))

    def _first_end(
        self, render: _Render, messages: Sequence[Message], text: str, new: Sequence[Segment]
    ) -> tuple[int, int]:
        """Where the first message (system and tools) ends: characters of the key, and ids."""
        first = messages[:1] if messages[0]["role"] == "system" else []
        probe = {"role": "user", "content": _PROBE}
        try:
            n = n_common(characters(text), characters(render([*first, probe])))
        except ChatError:  # The template wants another order.
            return 0, 0
        n, n_ids = _position(new, n)
        return (len(_KIND) + n, n_ids) if n_ids >= _LEAST_FIRST else (0, 0)

    def _note(
        self, render: _Render, messages: Sequence[Message], options: Any, text: tuple[str, int],
        n_known: int,
    ) -> str:  # fmt: skip
        """Note a prompt's text, and how much of it is sure to stay; why a text that should be known
        is not, if the template is to blame."""
        reason = ""
        for earlier, earlier_options, before, n_sure in list(self._last):
            if options != earlier_options or messages[: len(earlier)] != earlier:
                continue
            is_other = n_known < n_sure and not text[0].startswith(before[:n_sure])
            # With a counter, or a clock that moves between two renderings, little is sure.
            if not n_known:
                is_less = messages != earlier and 2 * n_sure < len(before)
                is_other |= is_less or render(earlier) != before
            if is_other:
                reason = "the template renders the same messages differently each time"
        self._last.append((messages, options, *text))
        return reason

    def _renderer(self, template: ChatTemplate, options: dict[str, Any]) -> partial[str]:
        for name in ("tools", "template_kwargs"):
            try:
                options[name] = self._escape(options.get(name), ())
            except RecursionError:
                raise ChatError(f"{name}: expected values that don't hold themselves") from None
        return partial(template.render, special=self._special, **options)

    def _escaped_all(
        self, template: ChatTemplate, messages: Sequence[Message]
    ) -> list[dict[str, Any]]:
        try:
            return [self._escaped(_joined(m, template)) for m in _checked(messages)]
        except RecursionError:
            raise ChatError("messages: expected values that don't hold themselves") from None

    def _new_segments(self, text: str, begin: int) -> list[Segment]:
        """The segments of a text from `begin` on; at its start with a BOS if the model adds one."""
        new: list[Segment] = [*self._tokenizer.segments(text[begin:], continues=begin > 0)]
        bos_id = self._tokenizer.bos_id
        if not begin and self._tokenizer.add_bos and _ids(new)[:1] != [bos_id]:
            assert bos_id is not None
            new = [("", [bos_id]), *new]
        return new

    def _answer(self, answer: Answer) -> str | None:
        """The text of an answer in the next prompt; None if its tokens have another one."""
        # A stop text is in the state, but was not shown.
        if spelled(self._tokenizer, answer).rstrip("\ufffd") != answer.text.rstrip("\ufffd"):
            return None
        return self._escape_text(answer.text, (*THINKING, *answer.params.preserved_tokens))

    def _escaped(self, message: Message) -> dict[str, Any]:
        kept = THINKING if message["role"] == "assistant" else ()
        if message.get("tool_calls"):
            message = {**message, "tool_calls": _with_objects(message["tool_calls"])}
        return {k: v if k == "role" else self._escape(v, kept) for k, v in message.items()}

    def _escape(self, value: Any, kept: Sequence[str]) -> Any:
        """A value with the special tokens escaped in all its texts, but for those that are kept."""
        if isinstance(value, Sampled):
            kept, n = (*kept, *value.tokens), value.n_thinking
            parts = [self._escape_text(part, kept) for part in (value[: n or 0], value[n or 0 :])]
            return Sampled("".join(parts), None if n is None else len(parts[0]))
        if isinstance(value, str):
            return self._escape_text(value, kept)
        if isinstance(value, Mapping):
            return {self._escape(k, kept): self._escape(v, kept) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._escape(item, kept) for item in value]
        return value

    def _escape_text(self, text: str, kept: Sequence[str]) -> str:
        text = self._tokenizer.escape_special_tokens(text)
        for token in kept:
            text = text.replace(self._tokenizer.escape_special_tokens(token), token)
        return text


def _n_stable(render: _Render, messages: Sequence[Message], text: str) -> int:
    """How many characters of `text` will begin the next turn's text, whatever the answer is."""
    following = [{"role": role, "content": _PROBE} for role in ("assistant", "user")]
    try:
        later = render([*messages, *following])
    except ChatError:  # The template allows no further turn.
        return 0
    return n_common(characters(text), characters(later))


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages. Raises ChatError for values of another type."""
    if not len(checks.sequence(ChatError, "messages", messages, "messages")):
        raise ChatError("the conversation is empty: expected at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            checks.refuse(ChatError, f"message {i}", "a role and a content", message)
        if "content" not in message and "tool_calls" not in message:
            checks.refuse(ChatError, f"message {i}", "a content", message)
        if not isinstance(content := message.get("content"), str | list | tuple | None):
            checks.refuse(ChatError, f"message {i}: content", "a text, or a list of parts", content)
        for part in content if isinstance(content, list | tuple) else ():
            if not is_text_part(part):
                checks.refuse(ChatError, f"message {i}: content", "parts of type text", part)
    return messages


def _joined(message: Message, template: ChatTemplate) -> Message:
    """A message whose content in parts is one text, as in llama.cpp, if the template takes none."""
    parts = message.get("content")
    if not isinstance(parts, list | tuple) or template.takes_parts:
        return message
    return {**message, "content": "\n".join(part["text"] for part in parts)}


def _with_objects(calls: Any) -> Any:
    """Tool calls whose arguments are objects, as templates read them, where they come as the JSON
    text that OpenAI's protocol has."""
    if not isinstance(calls, list | tuple) or not all(isinstance(c, Mapping) for c in calls):
        checks.refuse(ChatError, "tool_calls", "a list of calls", calls)
    made = []
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(arguments, str):
            # If it is none: the template may take a text, too.
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(parsed := json.loads(arguments), dict):
                    function = {**function, "arguments": parsed}
                    call = {**call, "function": function} if "function" in call else function
        made.append(call)
    return made


def _position(segments: Sequence[Segment], n_characters: int) -> tuple[int, int]:
    """The last place between two segments within the first `n_characters` of their text: so many
    characters, and ids."""
    n_ids = end = 0
    for text, ids in segments:
        if end + len(text) > n_characters:
            break
        end += len(text)
        n_ids += len(ids)
    return end, n_ids
