"""What a model writes, as events: thinking, content, calls of tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.runtime.request import n_begun
from engine.server.calls import ArgumentParser, Call, CallFormat, schemas_of
from engine.server.replays import Replay
from engine.text.template import THINKING, opens_thinking

_OPEN, _CLOSE = THINKING


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class CallStart:
    """The name of call `index` of the answer is known."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of the JSON text of the arguments of call `index`."""

    index: int
    text: str


Event = Reasoning | Content | CallStart | CallArguments


def preserved_tokens(format: CallFormat | None) -> tuple[str, ...]:
    """The special tokens that an AnswerParser has to see: see SamplingParams."""
    return (_OPEN, _CLOSE, *(format.tokens if format else ()))


def is_thinking(prompt: str, continued: Mapping[str, Any] | None = None) -> bool:
    """Whether an answer begins inside of thinking: by the end of its prompt, or by the message that
    it continues."""
    if continued is None:
        return opens_thinking(prompt)
    content = continued["content"]
    if not content:
        return bool(continued.get("reasoning_content"))
    return content.lstrip().startswith(_OPEN) and _CLOSE not in content


class AnswerParser:
    """Parses one answer, which comes in pieces cut anywhere.

    format: how the model writes calls; tools: as the request has them; without one or the other
    calls are text. thinks: whether the prompt ended inside <think>. Of what may become a marker
    nothing is given before it is decided.
    """

    def __init__(
        self, format: CallFormat | None, tools: Sequence[Mapping[str, Any]], thinks: bool
    ) -> None:
        self._format = format if tools else None
        self._schemas = schemas_of(tools)
        self._text, self._written = "", list[str]()
        self._state: Callable[[bool], bool] = self._at_start
        self._is_thinking, self._is_closed_later = thinks, False
        self._n_written = 0
        self._n_thinking: int | None = None
        # Held back: it may be the end of the thinking, or of what precedes a call.
        self._space = ""
        self._has_thought, self._content = False, list[str]()
        self._parser: ArgumentParser | None = None
        self._calls: list[tuple[str, str, list[str]]] = []
        self._events: list[Event] = []

    @property
    def calls(self) -> list[Call]:
        return [Call(id, name, "".join(pieces)) for id, name, pieces in self._calls]

    @property
    def sampled(self) -> Replay:
        """The whole text, to be kept for the ids of its calls; see Replays."""
        text = "".join(self._written)
        n_thinking = len(text) if self._is_thinking else self._n_thinking
        tokens = preserved_tokens(self._format)
        return Replay(text, n_thinking, tokens, "".join(self._content), self.calls)

    def push(self, text: str) -> list[Event]:
        """What a piece of the answer makes certain."""
        self._written.append(text)
        self._n_written += len(text)
        self._text += text
        return self._run(False)

    def finish(self) -> list[Event]:
        """The rest, after the last piece. A call that has not ended is closed: its arguments are
        JSON, without what can't be told from a cut value."""
        return self._run(True)

    def _run(self, ended: bool) -> list[Event]:
        while self._state(ended):
            pass
        events, self._events = self._events, []
        return events

    # Each state reads what it can; whether another one, or itself, can go on.

    def _at_start(self, ended: bool) -> bool:
        text = self._text.lstrip()
        if not ended and text != _OPEN and _OPEN.startswith(text):
            return False
        if text.startswith(_OPEN):
            self._is_thinking, self._text = True, text.removeprefix(_OPEN)
        self._state = self._in_text
        return True

    def _in_text(self, ended: bool) -> bool:
        markers = self._format.opens if self._format else ()
        if self._is_thinking or self._is_closed_later:
            markers += (_CLOSE,)
        found = [(self._text.find(marker), marker) for marker in markers if marker in self._text]
        if not found:
            n_held = 0 if ended else n_begun(self._text, markers)
            self._say(len(self._text) - n_held)
            if ended and not self._is_thinking and not self._calls:
                self._emit(Content, self._space)
                self._space = ""
            return False
        at, marker = min(found)
        self._say(at)
        if marker != _CLOSE:
            self._state = self._at_call
        else:
            self._text = self._text.removeprefix(_CLOSE)
            self._end_thinking(is_closed=True)
        return True

    def _at_call(self, ended: bool) -> bool:
        assert self._format is not None
        begun = self._format.begin(self._text, self._schemas)
        if begun is None:
            if not ended and self._format.may_begin(self._text):
                return False
            self._say(1)  # It is no call; what follows may be one.
            self._state = self._in_text
            return True
        self._end_thinking(is_closed=False)
        self._space = ""
        self._events.append(CallStart(len(self._calls), begun.id, begun.name))
        self._calls.append((begun.id, begun.name, []))
        self._parser, self._text = begun.parser, begun.rest
        self._state = self._in_call
        return True

    def _in_call(self, ended: bool) -> bool:
        assert self._parser is not None
        piece, rest = self._parser.push(self._text, ended)
        self._text = rest or ""
        if piece:
            self._calls[-1][2].append(piece)
            self._events.append(CallArguments(len(self._calls) - 1, piece))
        if rest is None:
            return False
        self._state = self._after_call
        return True

    def _after_call(self, ended: bool) -> bool:
        assert self._format is not None
        for end in self._format.ends:
            if found := end.match(self._text):
                self._text = self._text[found.end() :]
                return True
        if any(end.may_become(self._text) for end in self._format.ends):
            return False
        self._state = self._in_text
        return True

    def _end_thinking(self, is_closed: bool) -> None:
        """By its tag, or by a call, which the tag may follow."""
        if self._is_thinking:
            self._is_thinking, self._space = False, ""
            self._n_thinking = self._n_written - len(self._text)
            self._is_closed_later = not is_closed
        elif is_closed:
            self._is_closed_later = False

    def _say(self, n: int) -> None:
        """Give the next `n` characters, without the space around thinking and before calls."""
        text, self._text = self._space + self._text[:n], self._text[n:]
        is_first = not (self._has_thought if self._is_thinking else self._content)
        if self._is_thinking:
            text = text.lstrip("\n") if is_first else text
            said = text.rstrip("\n")
        else:
            if is_first and (self._calls or self._n_thinking is not None):
                text = text.lstrip() if self._calls else text.lstrip("\n")
            said = text.rstrip() if self._format else text
        self._space = text[len(said) :]
        self._emit(Reasoning if self._is_thinking else Content, said)

    def _emit(self, kind: type[Reasoning | Content], text: str) -> None:
        """Give a text, as one event with what came just before it."""
        if not text:
            return
        if kind is Content:
            self._content.append(text)
        else:
            self._has_thought = True
        if self._events and isinstance(last := self._events[-1], kind):
            text = last.text + text
            self._events.pop()
        self._events.append(kind(text))
