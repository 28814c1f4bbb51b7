"""A conversation: its messages as tokens, and how much of them memory holds already.

For every turn the template renders all messages anew. Memory holds the prefix that the last turn
left: segments, each a text with its tokens; an answer is one segment. If the new text starts with
the texts of all segments, only what follows is processed. If not (most templates remove the
thinking of earlier answers), a recurrent state can't be cut short: the turn continues from the
rollback point before the last answer, or from nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.kvcache.sequences import Checkpoint
from engine.text.template import ChatError, ChatTemplate, Message
from engine.text.tokenizer import Tokenizer

_THINKING = ("<think>", "</think>")  # Templates look for these in what a model said.
# An answer that no template contains or changes; it shows what the template puts around answers.
_PROBE = "\ufdd0"
_Render = Callable[[Sequence[Message]], str]
# A text and its tokens; text None: the tokens decode to another text than was shown.
Segment = tuple[str | None, list[int]]


@dataclass(frozen=True)
class ChatPrompt:
    """What a turn processes: `ids`, after the `n_kept` cached positions of checkpoint `after`.

    `segments`: the whole prompt. `n_dropped`: cached positions that can't be used. `rollback_at`:
    up to this position (0: none) the next turn's prompt is the same whatever the answer is.
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

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._special = {k: tokenizer.text(i) for k, i in named.items() if i is not None}
        self._cached: Checkpoint | None = None
        self._segments: list[Segment] = []

    @property
    def n_tokens(self) -> int:
        return self._cached.n_tokens if self._cached else 0

    def release(self) -> bool:
        """Free the cached prefix; False if there was none."""
        if self._cached is None:
            return False
        self._cached.release()
        self._cached, self._segments = None, []
        return True

    def prompt(
        self, template: ChatTemplate, messages: Sequence[Message], **options: Any
    ) -> ChatPrompt:
        """The prompt for the next answer; the caller releases its `after`.

        options: `tools` and `reasoning` of ChatTemplate.render. Control tokens that a message
        spells are text (in an answer, <think> and </think> excepted). Raises ChatError.
        """
        render: _Render = partial(template.render, special=self._special, **options)
        escaped = [self._escaped(message) for message in _checked(messages)]
        text = render(escaped)
        n_same, end, n_kept = self._match(text)
        same = self._segments[:n_same]
        known = _ids(same)
        new: list[Segment] = [*self._tokenizer.segments(text[end:], continues=end > 0)]
        bos_id = self._tokenizer.bos_id
        if not known and self._tokenizer.add_bos and _ids(new)[:1] != [bos_id]:
            assert bos_id is not None
            new = [("", [bos_id]), *new]
        rollback_at = _position([*same, *new], _n_stable(render, escaped, text))
        return ChatPrompt(
            # The last token of an answer that was cut short has not been processed yet.
            known[n_kept:] + _ids(new), [*same, *new], self._checkpoint(n_kept), n_kept,
            self.n_tokens - n_kept, rollback_at if rollback_at > n_kept else 0,
        )  # fmt: skip

    def store(self, prompt: ChatPrompt, checkpoint: Checkpoint, text: str, ids: list[int]) -> None:
        """Make a turn that has ended, with the answer as it was shown and its tokens, the cached
        prefix, if all of its prompt was processed."""
        if checkpoint.n_tokens < len(_ids(prompt.segments)):
            checkpoint.release()
            return
        self.release()
        self._cached = checkpoint
        # A stop text is in the state, but was not shown.
        decoder = self._tokenizer.stream(at_start=False)
        spelled = "".join(map(decoder.push, ids)) + decoder.finish()
        is_whole = spelled.rstrip("\ufffd") == text.rstrip("\ufffd")
        shown = self._escaped({"role": "assistant", "content": text})["content"]
        self._segments = [*prompt.segments, (shown if is_whole else None, ids)]

    def _match(self, text: str) -> tuple[int, int, int]:
        """(segments that `text` starts with, the end of their text, their positions) to reuse;
        at least one token must follow them."""
        if self._cached is None:
            return 0, 0, 0
        ends = [0]
        for known, _ in self._segments:
            if known is None or not text.startswith(known, ends[-1]):
                break
            ends.append(ends[-1] + len(known))
        if len(ends) == len(self._segments) + 1 and ends[-1] < len(text):
            return len(self._segments), ends[-1], self._cached.n_tokens
        starts = {len(_ids(self._segments[:n])): n for n, end in enumerate(ends) if end < len(text)}
        n_kept = max(self._cached.rollback_points & starts.keys(), default=0)
        n_same = starts[n_kept] if n_kept else 0
        return n_same, ends[n_same], n_kept

    def _checkpoint(self, n_tokens: int) -> Checkpoint | None:
        """The cached prefix up to a position that `_match` gave."""
        if self._cached is None or not n_tokens:
            return None
        is_end = n_tokens == self._cached.n_tokens
        return self._cached.fork() if is_end else self._cached.rolled_back(n_tokens)

    def _escaped(self, message: Message) -> dict[str, Any]:
        is_answer = message["role"] == "assistant"
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
    if not messages:
        raise ChatError("the conversation is empty: expected at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatError(f"message {i}: expected a role and a content, got {message!r}")
    return messages


def _position(segments: Sequence[Segment], n_characters: int) -> int:
    """The last position between two segments within the first `n_characters` of their text."""
    position = end = 0
    for text, ids in segments:
        end += len(text or "")
        if end > n_characters:
            break
        position += len(ids)
    return position
