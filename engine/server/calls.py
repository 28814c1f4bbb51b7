"""Tool calls as models write them: the formats, and parsers of text that comes in pieces.

A format is found from the source of a chat template. It knows where a call begins; the parser that
it makes then turns what follows into the JSON text of the call's arguments. That text comes in
pieces, which joined are one JSON object, also where the model stops in the midst of a call.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.server.arguments import (
    NAME,
    SPACE,
    JsonArguments,
    PairArguments,
    Shape,
    XmlArguments,
    each,
)

_ID_LETTERS = string.ascii_letters + string.digits
Schemas = Mapping[str, Mapping[str, Any]]  # The parameters of each tool, by its name.


class ArgumentParser(Protocol):
    """Reads the arguments of one call."""

    def push(self, text: str, ended: bool) -> tuple[str, str | None]:
        """(the next piece of JSON, what follows the arguments; None while they may go on); ended:
        whether this is the last text."""
        ...


@dataclass(frozen=True)
class Call:
    """A call as the protocol has it; arguments: JSON text of an object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Beginning:
    """How a call begins: `rest` is the text from its arguments on, which `parser` reads."""

    id: str
    name: str
    parser: ArgumentParser
    rest: str


class CallFormat(Protocol):
    """A way to write calls. opens: the texts that may begin one. ends: what may follow the
    arguments of one, and is no content. tokens: the special tokens that it is written with."""

    name: str
    opens: tuple[str, ...]
    ends: tuple[Shape, ...]
    tokens: tuple[str, ...]

    def begin(self, text: str, schemas: Schemas) -> Beginning | None:
        """The call with which a text begins; None if it begins with none, or not yet."""
        ...

    def may_begin(self, text: str) -> bool:
        """Whether more text can make it begin with a call."""
        ...


def new_id() -> str:
    return "call_" + "".join(secrets.choice(_ID_LETTERS) for _ in range(24))


class _Xml(CallFormat):
    """Qwen3.5, Qwen3-Coder: `<tool_call><function=name><parameter=key>` and values as text.

    Some calls lack `<tool_call>`; they are calls if a tool has their name.
    """

    name = "xml"
    opens = ("<tool_call>", "<function=")
    tokens = ("<tool_call>", "</tool_call>")
    ends = (Shape(SPACE, *each("</tool_call>")),)
    _function = *each("<function="), NAME, ">"
    _begin = Shape(*each("<tool_call>"), SPACE, *_function)
    _bare = Shape(*_function)

    def begin(self, text: str, schemas: Schemas) -> Beginning | None:
        found, bare = self._begin.match(text), self._bare.match(text)
        if bare is not None and bare[1].strip() in schemas:
            found = bare
        if found is None:
            return None
        name = found[1].strip()
        parser = XmlArguments(schemas.get(name, {}))
        return Beginning(new_id(), name, parser, text[found.end() :])

    def may_begin(self, text: str) -> bool:
        return self._begin.may_become(text) or (
            self._bare.may_become(text) and self._bare.match(text) is None
        )


class _Pairs(CallFormat):
    """Ling, Ring: a name in `<tool_call>`, then `<arg_key>` and `<arg_value>` for each argument."""

    name = "pairs"
    opens = ("<tool_call>",)
    tokens = (
        "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
    )  # fmt: skip
    ends = ()
    _named = (*each(opens[0]), SPACE, r"([^<>\s{]{1,256})", SPACE)
    _shapes = Shape(*_named, *each("<arg_key>")), Shape(*_named, *each("</tool_call>"))

    def begin(self, text: str, schemas: Schemas) -> Beginning | None:
        found = self._shapes[0].match(text) or self._shapes[1].match(text)
        if found is None:
            return None
        parser = PairArguments(schemas.get(found[1], {}))
        return Beginning(new_id(), found[1], parser, text[found.end(1) :])

    def may_begin(self, text: str) -> bool:
        return any(shape.may_become(text) for shape in self._shapes)


class _Json(CallFormat):
    """Qwen3, Qwen3-Next: `{"name": …, "arguments": {…}}` in `<tool_call>`."""

    name = "json"
    opens = ("<tool_call>",)
    tokens = ("<tool_call>", "</tool_call>")
    ends = (Shape(SPACE, r"\}?", SPACE, *each("</tool_call>")),)
    _open = Shape(*each("<tool_call>"), SPACE, r"\{")
    _begin = Shape(
        *each("<tool_call>"), SPACE, r"\{", SPACE, '"name"', SPACE, ":", SPACE,
        r'"([^"\\]{1,256})"', SPACE, ",", SPACE, '"arguments"', SPACE, ":", SPACE, r"(?=\{)",
    )  # fmt: skip

    def begin(self, text: str, schemas: Schemas) -> Beginning | None:
        if found := self._begin.match(text):
            return Beginning(new_id(), found[1], JsonArguments(), text[found.end() :])
        if not self._open.match(text) or "</tool_call>" not in text:
            return None
        # Keys in another order, no arguments, or arguments as a text: read as a whole.
        whole, _, rest = text.removeprefix("<tool_call>").partition("</tool_call>")
        try:
            call = json.loads(whole)
            arguments = call.get("arguments") or call.get("parameters") or {}
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            return None
        name = call.get("name")
        is_name = isinstance(name, str) and name.isprintable() and name
        if not is_name or not isinstance(arguments, dict):
            return None
        rest = json.dumps(arguments) + "}</tool_call>" + rest
        return Beginning(new_id(), name, JsonArguments(), rest)

    def may_begin(self, text: str) -> bool:
        if self._open.match(text):
            return "</tool_call>" not in text
        return self._open.may_become(text)


class _Kimi(CallFormat):
    """Kimi: `functions.name:0` and JSON between tokens of its own."""

    name = "kimi"
    opens = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>")
    tokens = (
        *opens, "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>"
    )  # fmt: skip
    ends = tuple(Shape(SPACE, *each(token)) for token in tokens[-2:])
    _call = (*each(tokens[1]), SPACE, r"([^<>\s]{1,256})", SPACE, *each(tokens[2]))
    _shapes = Shape(*each(tokens[0]), SPACE, *_call), Shape(*_call)

    def begin(self, text: str, schemas: Schemas) -> Beginning | None:
        found = self._shapes[0].match(text) or self._shapes[1].match(text)
        if found is None:
            return None
        # The template writes the id again, so it is the model's own.
        name = re.sub(r":\d+$", "", found[1].removeprefix("functions."))
        return Beginning(found[1], name, JsonArguments(), text[found.end() :])

    def may_begin(self, text: str) -> bool:
        return any(shape.may_become(text) for shape in self._shapes)


def find_format(source: str) -> CallFormat | None:
    """The format of calls that a chat template writes; None if it writes none that is known."""
    if _Kimi.opens[0] in source:
        return _Kimi()
    if "<arg_key>" in source:
        return _Pairs()
    if "<tool_call>" in source:
        return _Xml() if "<function=" in source else _Json()
    return None


def schemas_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The JSON schema of each tool's parameters, by its name."""
    schemas = {}
    for tool in tools:
        function = tool.get("function")
        function = function if isinstance(function, Mapping) else tool
        parameters = function.get("parameters")
        schemas[str(function.get("name"))] = parameters if isinstance(parameters, Mapping) else {}
    return schemas
