"""A conversation: its messages as tokens, and how much of them memory holds already.

The template renders all messages anew for every turn. What the state of the last turn holds is a
list of parts, of which the answer's tokens are the model's own, whatever its text would be cut to.
Where the new text starts with the texts of all parts, only what follows them is processed. Else the
template rewrote something (most drop the thinking of earlier answers): a recurrent state can't be
cut, so the conversation goes on from the mark that was taken before the last answer, or from the
start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.kvcache.sequences import Checkpoint
from engine.text.template import ChatError, ChatTemplate, Message
from engine.text.tokenizer import Tokenizer

# Templates look for these in what a model said.
_THINKING = ("<think>", "</think>")
# A text that no template has and none strips, to see what becomes of an answer.
_PROBE = "\ufdd0"


@dataclass(frozen=True)
class Part:
    """A text and its tokens; None for tokens that don't spell what was shown of them."""

    text: str | None
    ids: list[int]


@dataclass(frozen=True)
class ChatPrompt:
    """What a turn processes: `ids`, on top of the `n_kept` positions of `after`.

    `parts` are what memory then holds. `mark_at`: the position (0: none) up to which the next
    turn's prompt is sure to be the same. `n_dropped`: positions that were held and can't be used,
    for the text differs from some place on that lies before them.
    """

    ids: list[int]
    parts: list[Part]
    after: Checkpoint | None
    n_kept: int
    n_dropped: int
    mark_at: int

    @property
    def before(self) -> list[int]:
        """The tokens at the positions that are kept."""
        return _ids(self.parts)[: self.n_kept]


def _ids(parts: Sequence[Part]) -> list[int]:
    return [token for part in parts for token in part.ids]


class Conversation:
    """What memory holds of one conversation: nothing, or a checkpoint with the parts it is of."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._special = {k: tokenizer.text(i) for k, i in named.items() if i is not None}
        self._held: Checkpoint | None = None
        self._parts: list[Part] = []

    @property
    def n_tokens(self) -> int:
        """Positions that it holds."""
        return self._held.n_tokens if self._held else 0

    def release(self) -> bool:
        """Give its memory back; the next turn starts from nothing. False if there was none."""
        if self._held is None:
            return False
        self._held.release()
        self._held, self._parts = None, []
        return True

    def prompt(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning: bool | None = None,
    ) -> ChatPrompt:
        """The prompt for the next answer; release its `after` when it was used.

        Special tokens come from the template alone: control tokens that a message spells are
        text (in an answer, <think> and </think> excepted). Raises ChatError.
        """
        guarded = [self._guarded(message) for message in _checked(messages)]
        text = template.render(guarded, tools, reasoning, special=self._special)
        n_parts, end, n_kept = self._agreement(text)
        parts = self._parts[:n_parts]
        known = _ids(parts)
        new = [Part(*piece) for piece in self._tokenizer.pieces(text[end:], continues=end > 0)]
        if not known and self._tokenizer.add_bos and _first_id(new) != self._tokenizer.bos_id:
            assert self._tokenizer.bos_id is not None
            new = [Part("", [self._tokenizer.bos_id]), *new]
        same = self._same_next_time(template, guarded, text, tools, reasoning)
        mark_at = _position([*parts, *new], same)
        return ChatPrompt(
            # The last token of an answer that was cut short has not been processed yet.
            known[n_kept:] + _ids(new),
            [*parts, *new],
            self._checkpoint(n_kept),
            n_kept,
            self.n_tokens - n_kept,
            mark_at if mark_at > n_kept else 0,
        )

    def keep(self, prompt: ChatPrompt, checkpoint: Checkpoint, text: str, ids: list[int]) -> None:
        """A turn has ended: what it holds takes the place of what was held before.

        text, ids: the answer as it was shown, and its tokens. If not all of the prompt was
        processed, everything stays as it was before the turn.
        """
        if checkpoint.n_tokens < len(_ids(prompt.parts)):
            checkpoint.release()
            return
        self.release()
        self._held = checkpoint
        # A stop text is not shown but lies in the state.
        decoder = self._tokenizer.stream(at_start=False)
        spelled = "".join(map(decoder.push, ids)) + decoder.finish()
        is_whole = spelled.rstrip("\ufffd") == text.rstrip("\ufffd")
        shown = self._guarded({"role": "assistant", "content": text})["content"]
        self._parts = [*prompt.parts, Part(shown if is_whole else None, ids)]

    def _agreement(self, text: str) -> tuple[int, int, int]:
        """(parts that stay, the end of their text, positions of them): see the module.

        Some text must follow them, for the logits of its last token.
        """
        if self._held is None:
            return 0, 0, 0
        ends = [0]
        for part in self._parts:
            if part.text is None or not text.startswith(part.text, ends[-1]):
                break
            ends.append(ends[-1] + len(part.text))
        if len(ends) == len(self._parts) + 1 and ends[-1] < len(text):
            return len(self._parts), ends[-1], self._held.n_tokens
        starts = {len(_ids(self._parts[:n])): n for n in range(len(ends)) if ends[n] < len(text)}
        marks = self._held.rollback_points & starts.keys()
        if not marks:
            return 0, 0, 0
        n_parts = starts[max(marks)]
        return n_parts, ends[n_parts], max(marks)

    def _checkpoint(self, n_tokens: int) -> Checkpoint | None:
        if self._held is None or not n_tokens:
            return None
        is_end = n_tokens == self._held.n_tokens
        return self._held.fork() if is_end else self._held.rolled_back(n_tokens)

    def _same_next_time(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        text: str,
        tools: Sequence[Mapping[str, Any]] | None,
        reasoning: bool | None,
    ) -> int:
        """How many characters of `text` begin the next turn's text, whatever the answer is."""
        following = [{"role": role, "content": _PROBE} for role in ("assistant", "user")]
        try:
            messages = [*messages, *following]
            later = template.render(messages, tools, reasoning, special=self._special)
        except ChatError:  # It refuses a turn after these messages, so there is nothing to expect.
            return 0
        pairs = zip(text, later, strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(text), len(later)))

    def _guarded(self, message: Message) -> dict[str, Any]:
        is_answer = message["role"] == "assistant"
        return {
            key: value if key == "role" else self._guard(value, is_answer)
            for key, value in message.items()
        }

    def _guard(self, value: Any, is_answer: bool) -> Any:
        """A value of a message, with guards in all texts of it."""
        if isinstance(value, str):
            text = self._tokenizer.guard(value)
            for mark in _THINKING if is_answer else ():
                text = text.replace(self._tokenizer.guard(mark), mark)
            return text
        if isinstance(value, Mapping):
            items = value.items()
            return {self._guard(k, is_answer): self._guard(v, is_answer) for k, v in items}
        if isinstance(value, list | tuple):
            return [self._guard(item, is_answer) for item in value]
        return value


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    if not messages:
        raise ChatError("the conversation is empty: expected at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatError(f"message {i}: expected a role and a content, got {message!r}")
    return messages


def _first_id(parts: Sequence[Part]) -> int | None:
    return next((token for part in parts for token in part.ids), None)


def _position(parts: Sequence[Part], n_characters: int) -> int:
    """The last position between two parts that lies within so many characters of their text."""
    position = end = 0
    for part in parts:
        end += len(part.text or "")
        if end > n_characters:
            break
        position += len(part.ids)
    return position
