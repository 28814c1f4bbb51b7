"""A conversation: its messages as tokens, and how much of them memory holds already.

For every turn the template renders all messages anew. Memory holds the prefix that the last turn
left: segments, each a text with its tokens; an answer is one segment. If the new text starts with
the texts of all segments, only what follows is processed. If not (most templates remove the
thinking of earlier answers), a recurrent state can't be cut short: the turn continues from the
rollback point before the last answer, or from nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine import checks
from engine.kvcache.sequences import Checkpoint
from engine.runtime.owner import Owner
from engine.text.template import ChatError, ChatTemplate, Message, is_text_part
from engine.text.tokenizer import Tokenizer

_THINKING = ("<think>", "</think>")  # Templates look for these in what a model said.
# An answer that no template contains or changes; it shows what the template puts around answers.
_PROBE = "\ufdd0"
_Render = Callable[[Sequence[Message]], str]
# A text and its tokens; text None: the tokens decode to another text than was shown.
Segment = tuple[str | None, list[int]]


@dataclass
class ChatPrompt:
    """The prompt of a turn: a step processes `ids` after `n_kept` cached positions.

    `after`: their checkpoint, until a request takes it. `segments`: the whole prompt. `n_dropped`:
    cached positions that can't be used. `rollback_at`: up to this position (0: none) the next
    turn's prompt is the same whatever the answer is.
    """

    ids: list[int]
    segments: list[Segment]
    after: Checkpoint | None
    n_kept: int
    n_dropped: int
    rollback_at: int

    @property
    def before(self) -> list[int]:
        """The tokens at the positions that are kept."""
        return _ids(self.segments)[: self.n_kept]


def _ids(segments: Sequence[Segment]) -> list[int]:
    return [token for _, ids in segments for token in ids]


class Conversation:
    """The cached prefix of one conversation: nothing, or a checkpoint with its segments."""

    def __init__(self, tokenizer: Tokenizer, owner: Owner) -> None:
        self._tokenizer, self._owner = tokenizer, owner
        named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._special = {k: tokenizer.text(i) for k, i in named.items() if i is not None}
        self._cached: Checkpoint | None = None
        self._segments: list[Segment] = []

    def __repr__(self) -> str:
        cached = self._cached
        return f"<Conversation: {cached if cached else 'nothing is cached'}>"

    @property
    def n_tokens(self) -> int:
        return self._owner.call(lambda: self._cached.n_tokens if self._cached else 0)

    def release(self) -> bool:
        """Free the cached prefix; False if there was none."""
        return self._owner.call(self.reclaim)

    def reclaim(self) -> bool:
        """`release` for the step loop."""
        if self._cached is None:
            return False
        cached, self._cached, self._segments = self._cached, None, []
        cached.release()
        return True

    def prompt(
        self, template: ChatTemplate, messages: Sequence[Message], **options: Any
    ) -> ChatPrompt:
        """The prompt for the next answer; the caller takes its `after`.

        options: `tools` and `reasoning` of ChatTemplate.render. Control tokens that a message
        spells are text (in an answer, <think> and </think> excepted). Raises ChatError.
        """
        render, escaped = self._renderer(template, options), self._escaped_all(template, messages)
        text = render(escaped)
        same, end, n_kept, n_held, after = self._owner.call(partial(self._match, text))
        known, new = _ids(same), self._new_segments(text, end)
        rollback_at = _position([*same, *new], _n_stable(render, escaped, text))
        return ChatPrompt(
            # The last token of an answer that was cut short has not been processed yet.
            known[n_kept:] + _ids(new), [*same, *new], after, n_kept,
            n_held - n_kept, rollback_at if rollback_at > n_kept else 0,
        )  # fmt: skip

    def encode(
        self, template: ChatTemplate, messages: Sequence[Message], **options: Any
    ) -> list[int]:
        """The whole prompt for the next answer, whatever is held; as `prompt` otherwise."""
        text = self._renderer(template, options)(self._escaped_all(template, messages))
        return _ids(self._new_segments(text, 0))

    def _renderer(self, template: ChatTemplate, options: Mapping[str, Any]) -> _Render:
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

    def store(self, prompt: ChatPrompt, checkpoint: Checkpoint, text: str, ids: list[int]) -> None:
        """Make a turn that has ended, with the answer as it was shown and its tokens, the cached
        prefix, if all of its prompt was processed."""
        if checkpoint.n_tokens < len(_ids(prompt.segments)):
            checkpoint.release()
            return
        # A stop text is in the state, but was not shown.
        decoder = self._tokenizer.stream(at_start=False)
        spelled = "".join(map(decoder.push, ids)) + decoder.finish()
        is_whole = spelled.rstrip("\ufffd") == text.rstrip("\ufffd")
        shown = self._escaped({"role": "assistant", "content": text})["content"]
        segments: list[Segment] = [*prompt.segments, (shown if is_whole else None, ids)]
        before = self._cached
        self._cached, self._segments = checkpoint, segments
        if before is not None:
            before.release()

    def _match(self, text: str) -> tuple[list[Segment], int, int, int, Checkpoint | None]:
        """Find what a text can reuse; at least one token must follow it. Returns the segments that
        the text starts with, where their text ends, how many positions they have, how many are
        held, and a checkpoint after them."""
        cached, segments = self._cached, self._segments
        if cached is None:
            return [], 0, 0, 0, None
        ends = [0]
        for known, _ in segments:
            if known is None or not text.startswith(known, ends[-1]):
                break
            ends.append(ends[-1] + len(known))
        n_held = cached.n_tokens
        if len(ends) == len(segments) + 1 and ends[-1] < len(text):
            return segments, ends[-1], n_held, n_held, cached.fork()
        starts = {len(_ids(segments[:n])): n for n, end in enumerate(ends) if end < len(text)}
        n_kept = max(cached.rollback_points & starts.keys(), default=0)
        n_same = starts[n_kept] if n_kept else 0
        after = cached.rolled_back(n_kept) if n_kept else None
        return segments[:n_same], ends[n_same], n_kept, n_held, after

    def _escaped(self, message: Message) -> dict[str, Any]:
        is_answer = message["role"] == "assistant"
        if message.get("tool_calls"):
            message = {**message, "tool_calls": _with_objects(message["tool_calls"])}
        return {k: v if k == "role" else self._escape(v, is_answer) for k, v in message.items()}

    def _escape(self, value: Any, is_answer: bool) -> Any:
        """A value of a message with the special tokens escaped in all its texts."""
        if isinstance(value, str):
            text = self._tokenizer.escape_special_tokens(value)
            for tag in _THINKING if is_answer else ():
                text = text.replace(self._tokenizer.escape_special_tokens(tag), tag)
            return text
        if isinstance(value, Mapping):
            items = value.items()
            return {self._escape(k, is_answer): self._escape(v, is_answer) for k, v in items}
        if isinstance(value, list | tuple):
            return [self._escape(item, is_answer) for item in value]
        return value


def _n_stable(render: _Render, messages: Sequence[Message], text: str) -> int:
    """How many characters of `text` will begin the next turn's text, whatever the answer is."""
    following = [{"role": role, "content": _PROBE} for role in ("assistant", "user")]
    try:
        later = render([*messages, *following])
    except ChatError:  # The template allows no further turn.
        return 0
    pairs = zip(text, later, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(text), len(later)))


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


def _position(segments: Sequence[Segment], n_characters: int) -> int:
    """The last position between two segments within the first `n_characters` of their text."""
    position = end = 0
    for text, ids in segments:
        end += len(text or "")
        if end > n_characters:
            break
        position += len(ids)
    return position
