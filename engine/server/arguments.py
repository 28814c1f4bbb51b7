"""Parsers of a call's arguments: from what the model writes to pieces of one JSON object."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from engine.runtime.request import n_begun

_DEPTH = 8  # References and choices in a schema that are followed.
_TYPES = {
    str: {"string"}, bool: {"boolean"}, int: {"integer", "number"}, float: {"number"},
    list: {"array"}, dict: {"object"}, type(None): {"null"},
}  # fmt: skip
_WORDS = {"true": True, "false": False, "none": None, "null": None}
# Parts of shapes. They are bounded, so that what may become a call is never long.
SPACE, NAME = r"\s{0,64}", r"([^<>\s][^<>\n]{0,255})"
_CLOSING = {"{": "}", "[": "]"}
_TOKEN = re.compile(r'[ \t\r\n]+|[{}\[\]:,"]|[^ \t\r\n{}\[\]:,"]+')
_SCALAR = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null", re.A)
# In a string: characters as they are, an escape, one that is cut, or one that JSON lacks.
_CHARS = re.compile(
    r'(?P<same>[^"\\\x00-\x1f]+|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))'
    r"|(?P<cut>\\(?:u[0-9a-fA-F]{0,3})?\Z)|(?P<other>[\\\x00-\x1f])"
)


class Shape:
    """A regular expression in parts: finds it at the start of a text, or that it may come."""

    def __init__(self, *parts: str) -> None:
        begun = ""
        for part in reversed(parts):
            begun = f"(?:{part}{begun})?"
        self.match = re.compile("".join(parts)).match
        self._begun = re.compile(begun + r"\Z")

    def may_become(self, text: str) -> bool:
        return self._begun.match(text) is not None


def each(text: str) -> tuple[str, ...]:
    """The parts of a Shape that is a text."""
    return tuple(map(re.escape, text))


class JsonArguments:
    """An object that the model writes as JSON, passed on as it comes.

    What can't be closed yet is held back: keys without a value, and numbers that may go on.
    Control characters and lone backslashes in texts are escaped. What is no JSON ends the object.
    """

    def __init__(self) -> None:
        self._text = self._held = self._out = ""
        self._stack: list[str] = []
        self._in_string = self._is_key = self._has_begun = False
        self._wanted = "{"  # The characters that may come next; v: any value.

    def push(self, text: str, ended: bool) -> tuple[str, str | None]:
        self._text, self._out = self._text + text, ""
        at, is_done = 0, False
        while at < len(self._text) and not is_done:
            step = self._in_text(at) if self._in_string else self._token(at)
            is_done = step < 0 or (self._has_begun and not self._stack)
            if step == 0:
                break
            at += max(step, 0)
        self._text = self._text[at:]
        if not is_done and not ended:
            return self._out, None
        self._out += '"' * (self._in_string and not self._is_key)
        self._out += "" if self._has_begun else "{}"
        self._out += "".join(reversed(self._stack))
        return self._out, self._text if is_done else ""

    def _pass(self, text: str, is_safe: bool) -> int:
        """Pass a text on, if what came with it can be closed, or hold it back."""
        self._held += text
        if is_safe:
            self._out, self._held = self._out + self._held, ""
        return len(text)

    def _in_text(self, at: int) -> int:
        """Read some of a string; returns how many characters, 0 to wait for more."""
        is_safe = not self._is_key
        if self._text[at] == '"':
            self._in_string = False
            self._wanted = ":" if self._is_key else ",]}"
            return self._pass('"', is_safe)
        found = _CHARS.match(self._text, at)
        assert found is not None
        if found["other"]:
            self._pass(json.dumps(found["other"])[1:-1], is_safe)
            return 1
        return 0 if found["cut"] else self._pass(found[0], is_safe)

    def _token(self, at: int) -> int:
        """Read a token outside of strings; -1 if it is none that may come."""
        found = _TOKEN.match(self._text, at)
        assert found is not None
        token = found[0]
        if token.isspace():
            self._held += token * self._has_begun
            return len(token)
        is_value = "v" in self._wanted and token not in _CLOSING.values()
        if len(token) > 1 or token not in '{}[]:,"':
            if not is_value:
                return -1
            if found.end() == len(self._text):  # It may go on.
                return 0
            self._wanted = ",]}"
            return self._pass(token, True) if _SCALAR.fullmatch(token) else -1
        if not (token in self._wanted or (is_value and token in '{["')):
            return -1
        return self._punctuation(token)

    def _punctuation(self, token: str) -> int:
        if token == '"':
            self._in_string, self._is_key = True, '"' in self._wanted
        elif token in _CLOSING:
            self._stack.append(_CLOSING[token])
            self._has_begun, self._wanted = True, '"}' if token == "{" else "v]"
        elif token in ",:":
            in_object = self._stack[-1] == "}"
            self._wanted = "v" if token == ":" else '"}' if in_object else "v]"
        elif token != self._stack[-1]:
            return -1
        else:
            self._stack.pop()
            self._held = self._held.replace(",", "")  # One after the last value.
            self._wanted = ",]}"
        return self._pass(token, token in "{}[]" or (token == '"' and not self._is_key))


class TagArguments:
    """Parameters between tags, typed by the tool's JSON schema.

    The text of a string comes as it is written; other values come when they have ended, as text
    where they are not of their type. Of parameters with the same name the first one counts.

    followers: what ends a value, if one of these follows it; else it is a part of the value. The
    first one is the value's own tag. parameter: what begins one, with its name. last: what ends the
    arguments; missing: what shows that this is missing. is_padded: whether a value has line breaks
    around it.
    """

    followers: Mapping[str, tuple[str, ...]]
    parameter: Shape
    last: Shape
    missing: Shape
    is_padded: bool

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._end = re.compile("|".join(self.followers))
        self._schema, self._text, self._out = schema, "", ""
        self._keys = set[str]()
        self._types: set[str] | None = None  # Of the value that is read; None between values.
        self._value: list[str] = []
        self._is_new = self._is_repeated = False

    def push(self, text: str, ended: bool) -> tuple[str, str | None]:
        self._text, self._out = self._text + text, ""
        while self._begins_value() if self._types is None else self._ends_value(ended):
            pass
        rest = None
        if self._types is not None:
            if ended:
                self._close_value(is_cut=True)
                rest = ""
        elif found := self.last.match(self._text):
            rest = self._text[found.end() :]
        elif self.missing.match(self._text) or not self._may_go_on():
            rest = self._text
        elif ended:
            rest = ""
        if rest is not None:
            self._out += "}" if self._keys else "{}"
        return self._out, rest

    def _may_go_on(self) -> bool:
        shapes = (self.parameter, self.last, self.missing)
        return any(shape.may_become(self._text) for shape in shapes)

    def _begins_value(self) -> bool:
        found = self.parameter.match(self._text)
        if found is None:
            return False
        self._text, key = self._text[found.end() :], found[1].strip()
        properties = self._schema.get("properties")
        own = properties.get(key) if isinstance(properties, Mapping) else None
        self._types = types_of(own, self._schema)
        self._is_new, self._is_repeated, self._value = True, key in self._keys, []
        if not self._is_repeated:
            before = ", " if self._keys else "{"
            self._out += f"{before}{_json(key)}: " + '"' * self._is_streamed
        self._keys.add(key)
        return True

    @property
    def _is_streamed(self) -> bool:
        return self._types is not None and self._types <= {"string"}

    def _ends_value(self, ended: bool) -> bool:
        """Read what is sure to be of the value; whether it has ended."""
        n = len(self._text) - n_begun(self._text, self.followers)
        for found in self._end.finditer(self._text):
            after, followers = self._text[found.end() :].lstrip(), self.followers[found[0]]
            may_follow = any(f.startswith(after) for f in followers)
            if after.startswith(followers) or (may_follow and ended):
                value = self._text[: found.start()]
                self._take(value.removesuffix("\n") if self.is_padded else value)
                at = found.end() if found[0] == next(iter(self.followers)) else found.start()
                self._text = self._text[at:]
                self._close_value()
                return True
            if may_follow:
                n = found.start()
                break
        n -= self.is_padded and self._text[:n].endswith("\n")
        self._take(self._text[:n])
        self._text = self._text[n:]
        return False

    def _take(self, text: str) -> None:
        if self.is_padded and self._is_new and text:
            text, self._is_new = text.removeprefix("\n"), False
        if self._is_streamed and not self._is_repeated:
            self._out += _json(text)[1:-1]
        else:
            self._value.append(text)

    def _close_value(self, is_cut: bool = False) -> None:
        """End the value; one that is cut may be of no type but a string."""
        assert self._types is not None
        if self._is_streamed:
            self._out += '"' * (not self._is_repeated)
        elif not self._is_repeated:
            text = "".join(self._value)
            self._out += (None if is_cut else typed(text, self._types)) or _json(text)
        self._types = None


class XmlArguments(TagArguments):
    """Qwen3.5's: `<parameter=name>`, a line break, the value, a line break, `</parameter>`."""

    followers: Mapping[str, tuple[str, ...]] = {
        "</parameter>": ("<parameter=", "</function>", "</tool_call>"),
        "</function>": ("</tool_call>",),
    }
    parameter = Shape(SPACE, *each("<parameter="), NAME, ">")
    last = Shape(SPACE, *each("</function>"))
    missing = Shape(SPACE, *each("</tool_call>"))
    is_padded = True


class PairArguments(TagArguments):
    """Ling's: `<arg_key>name</arg_key>`, `<arg_value>`, the value, `</arg_value>`."""

    followers: Mapping[str, tuple[str, ...]] = {"</arg_value>": ("<arg_key>", "</tool_call>")}
    parameter = Shape(
        SPACE, *each("<arg_key>"), NAME, *each("</arg_key>"), SPACE, *each("<arg_value>")
    )
    last = missing = Shape(SPACE, *each("</tool_call>"))
    is_padded = False


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def types_of(schema: Any, root: Mapping[str, Any], depth: int = 0) -> set[str]:
    """The types that a JSON schema allows, if it says so; root: where its references begin."""
    if not isinstance(schema, Mapping) or depth > _DEPTH:
        return set()
    of = schema.get("type")
    types = {t for t in (of if isinstance(of, list) else [of]) if isinstance(t, str)}
    for value in _listed(schema.get("enum")) + ([schema["const"]] if "const" in schema else []):
        types |= _TYPES.get(type(value), set())
    ref = schema.get("$ref")
    if isinstance(ref, str) and ref.startswith("#/"):
        target: Any = root
        for name in ref[2:].split("/"):
            target = target.get(name) if isinstance(target, Mapping) else None
        types |= types_of(target, root, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        for option in _listed(schema.get(key)):
            types |= types_of(option, root, depth + 1)
    return types


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def typed(text: str, types: set[str]) -> str | None:
    """A value's text as JSON of one of these types; None if it is none, or a string."""
    word = text.strip()
    try:
        value = json.loads(word, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = _WORDS.get(word.lower(), "")
    if isinstance(value, int) and value in (0, 1) and not types & {"integer", "number"}:
        value = bool(value)
    if isinstance(value, float) and value.is_integer() and "number" not in types:
        value = int(value)
    if isinstance(value, str) or not _TYPES[type(value)] & types:
        return None
    # As it is written, unless it is another value: numbers may have more digits than ours.
    return json.dumps(value) if isinstance(value, bool | int | None) else word


def _refuse(word: str) -> None:
    raise ValueError(word)
