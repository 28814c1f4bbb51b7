"""Messages as clients send them, in the one form that chat templates take.

Templates expect what their models were trained on: one system message, first; texts; arguments that
are objects; the results of calls in the order of the calls. Clients send OpenAI's protocol of any
year.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NoReturn

from engine import checks
from engine.errors import EngineError
from engine.server.replays import Replay

Messages = list[dict[str, Any]]
Find = Callable[[str], Replay | None]
_SYSTEM = ("system", "developer")
_ROLES = (*_SYSTEM, "user", "assistant", "tool", "function")
# The types of parts that are texts, and where they have them.
_TEXT_PARTS = {
    "text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal",
}  # fmt: skip

_PLACE = "place"  # In a result, for a while: the place of its call among all.


class MessageError(EngineError):
    """A message that can't be used; `param` is its place, such as messages[3].content[1]."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


def _refuse(param: str, expected: str, value: object) -> NoReturn:
    raise MessageError(param, f"expected {expected}, got {checks.shown(value)}")


def normalized(messages: Sequence[Mapping[str, Any]], sampled: Find) -> Messages:
    """OpenAI's messages as templates take them; none of what came is changed.

    Texts of several system messages become one at the front. An answer whose calls `sampled` finds
    by id, unchanged, has the text that the model wrote as its content (a Sampled), and no calls.
    Raises MessageError.
    """
    if not isinstance(messages, list | tuple) or not messages:
        _refuse("messages", "a list of messages", messages)
    made, calls, system = Messages(), _Calls(sampled), list[str]()
    for i, message in enumerate(messages):
        param = f"messages[{i}]"
        if not isinstance(message, Mapping):
            _refuse(param, "a message with a role and a content", message)
        given = {k: v for k, v in message.items() if v is not None}
        if (role := given.get("role")) not in _ROLES:
            _refuse(f"{param}.role", f"one of {', '.join(_ROLES)}", role)
        text = _text(given.get("content", ""), f"{param}.content")
        if role in _SYSTEM:
            system.append(text)
        elif role == "assistant":
            made.append(calls.answer(given, text, param))
        elif role == "user":
            made.append({"role": "user", "content": text})
        else:
            made.append(calls.result(given, text, param))
    if system:
        made.insert(0, {"role": "system", "content": "\n\n".join(filter(None, system))})
    return _in_order(made)


def _text(content: Any, param: str) -> str:
    """A content as a text: parts are joined by newlines, as in llama.cpp."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        _refuse(param, "a text, or a list of parts", content)
    return "\n".join(_part(part, f"{param}[{i}]") for i, part in enumerate(content))


def _part(part: Any, param: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        _refuse(param, "a part with a type", part)
    if kind not in _TEXT_PARTS:
        raise MessageError(param, f"expected a part of type text, got {checks.shown(kind)}: "
                           "the engine reads and writes text only")  # fmt: skip
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str | None):
        _refuse(f"{param}.{_TEXT_PARTS[kind]}", "a text", text)
    return text or ""


class _Calls:
    """The calls of a conversation so far, and whose results have come."""

    def __init__(self, sampled: Find) -> None:
        self._sampled = sampled
        self._places: dict[str, int] = {}  # Of the last call with an id, among all calls.
        self._open: list[tuple[str, str]] = []  # (name, id) of those without a result.
        self._n_calls = 0

    def answer(self, given: Mapping[str, Any], text: str, param: str) -> dict[str, Any]:
        """A message of the assistant."""
        made: dict[str, Any] = {"role": "assistant", "content": text}
        thinking = given.get("reasoning_content", given.get("reasoning", ""))
        if not isinstance(thinking, str):
            _refuse(f"{param}.reasoning_content", "a text", thinking)
        if thinking:
            made["reasoning_content"] = thinking
        calls = self._calls(given, param)
        for call in calls:
            self._places[call["id"]] = self._n_calls
            self._open.append((call["function"]["name"], call["id"]))
            self._n_calls += 1
        if not calls:
            return made
        replay = self._sampled(calls[0]["id"])
        if replay is not None and _is_same(replay, text, calls):
            return {"role": "assistant", "content": replay}
        return {**made, "tool_calls": calls}

    def _calls(self, given: Mapping[str, Any], param: str) -> Messages:
        calls, param_calls = given.get("tool_calls", []), f"{param}.tool_calls"
        if not isinstance(calls, list | tuple):
            _refuse(param_calls, "a list of calls", calls)
        made = [self._call(call, f"{param_calls}[{i}]", i) for i, call in enumerate(calls)]
        if not made and "function_call" in given:  # As it was before there were tools.
            place = f"{param}.function_call"
            made = [self._call({"function": given["function_call"]}, place, 0)]
        return made

    def _call(self, call: Any, param: str, i: int) -> dict[str, Any]:
        function = call.get("function", call.get("custom")) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            _refuse(param, "a call with a function and its name", call)
        if not isinstance(id := call.get("id") or f"call_{self._n_calls + i}", str):
            _refuse(f"{param}.id", "a text", id)
        arguments = function.get("arguments", function.get("input"))
        if not isinstance(arguments, str | Mapping | None):
            _refuse(f"{param}.arguments", "a JSON text", arguments)
        made = {"name": function["name"], "arguments": _object(arguments)}
        return {"type": "function", "id": id, "function": made}

    def result(self, given: Mapping[str, Any], text: str, param: str) -> dict[str, Any]:
        """A message with what a call returned; without any call before it, as it is."""
        id = given.get("tool_call_id", "")
        if not isinstance(id, str):
            _refuse(f"{param}.tool_call_id", "a text", id)
        if not id and self._open:  # That of the first call of this name, or of any.
            named = [call for call in self._open if call[0] == given.get("name")]
            id = (named or self._open)[0][1]
        elif id and self._places and id not in self._places:
            known = ", ".join(list(self._places)[-8:])
            raise MessageError(f"{param}.tool_call_id", "expected the id of a call before it "
                               f"({known}), got {checks.shown(id)}")  # fmt: skip
        self._open = [call for call in self._open if call[1] != id]
        return {
            "role": "tool",
            "content": text,
            "tool_call_id": id,
            _PLACE: self._places.get(id, 0),
        }


def _in_order(made: Messages) -> Messages:
    """The messages with each run of results in the order of their calls."""
    runs = (list(run) for _, run in groupby(made, lambda message: _PLACE in message))
    return [m for run in runs for m in sorted(run, key=lambda message: message.pop(_PLACE, 0))]


def _object(arguments: str | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Arguments as an object. A text that is none stays one: a model may have written it, and the
    conversation goes on."""
    if isinstance(arguments, Mapping):
        return arguments
    if not arguments or not arguments.strip():
        return {}
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, dict) else {"input": arguments}


def _is_same(replay: Replay, text: str, calls: Messages) -> bool:
    """Whether an answer is what the client got; many leave out its content."""
    functions = [call["function"] for call in calls]
    given = [{"name": c.name, "arguments": _object(c.arguments)} for c in replay.calls]
    return functions == given and text.strip() in ("", replay.content.strip())
