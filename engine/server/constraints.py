"""Grammars of requests: of an answer's form, and of the calls that a model writes.

The grammar of a call follows from the tools' schemas and the format that the model was trained on.
It holds from the first marker of a call on, or at once where a call is required.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from engine import checks
from engine.sampling.grammar import (
    FORMS,
    Grammar,
    GrammarError,
    embedded,
    slashed,
    spelled,
    token_id,
)
from engine.sampling.schema import SchemaError
from engine.server.arguments import NAME, types_of
from engine.server.calls import CallFormat
from engine.server.errors import ApiError
from engine.server.protocol import ChatRequest, Sampling
from engine.text.template import THINKING
from engine.text.tokenizer import Tokenizer

Json = dict[str, Any]
# Of a schema: what says nothing about values, and what a string in XML can be held to.
_NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "strict",
          "deprecated", "readOnly", "writeOnly"}  # fmt: skip
_OF_OBJECTS = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_OF_STRINGS = {"type", "minLength", "maxLength", "pattern"}
_BEGIN = {"xml": "\n<function=", "json": '\n{"name": "', "kimi": "functions."}
_WORDS = {"boolean": ("true", "false", "True", "False"), "null": ("null", "None")}


def form_of(request: Sampling) -> tuple[str, Grammar] | None:
    """(the field, its grammar) that the answer must match; None for any answer. Raises ApiError."""
    found: list[tuple[str, Grammar]] = []
    for name, make in _FORMS.items():
        value = getattr(request, name)
        is_text = name == "response_format" and (value or {}).get("type", "text") == "text"
        if value not in (None, "") and not is_text:  # Clients send empty texts for none.
            with named(name):
                found.append((name, make(value)))
    if len(found) > 1:
        raise ApiError(f"{found[0][0]}: expected one form of the answer, got {found[1][0]}, too")
    return found[0] if found else None


@contextmanager
def named(field: str) -> Iterator[None]:
    """Within it, errors of a grammar name its field."""
    try:
        yield
    except GrammarError as error:
        raise ApiError(f"{field}: {error.why}") from None


def _of_format(wanted: Mapping[str, Any]) -> Grammar:
    """The grammar of a response_format."""
    kind = wanted["type"]
    checks.one_of(ApiError, "response_format.type", kind, ("text", "json_object", "json_schema"))
    if kind == "json_object":  # llama-server's clients send a schema here.
        return Grammar.json(wanted.get("schema"))
    given = wanted.get("json_schema")
    schema = given.get("schema") if isinstance(given, Mapping) else None
    if schema is None:
        raise ApiError("response_format.json_schema.schema: expected a JSON schema, got none")
    return Grammar.json(schema)


_FORMS: dict[str, Callable[[Any], Grammar]] = {"response_format": _of_format, **FORMS}


def constraint(
    request: ChatRequest, tools: Sequence[Json] | None, format: CallFormat | None,
    tokenizer: Tokenizer,
) -> tuple[str, Grammar] | None:  # fmt: skip
    """(the field, its grammar) of a chat's answer; None for any answer. Raises ApiError."""
    form, functions = form_of(request), [_function(tool) for tool in tools or ()]
    chosen, is_required = _chosen(request.tool_choice, functions)
    name = "tool_choice" if is_required else "tools"
    if not is_required and not any(f.get("strict") is True for f in functions):
        return form
    if format is None:
        raise ApiError(f"{name}: expected calls of a known format, got a model with another one")
    if format.name not in _BEGIN:
        tags = ", ".join(format.tokens)
        raise ApiError(f"{name}: expected calls in a format that can be enforced, got {tags}")
    if form is not None and form[1].kind != "json_schema":
        raise ApiError(f"{form[0]}: expected none beside calls, got {checks.shown(form[1].text)}")
    writer = _Writer(format, tokenizer, request.parallel_tool_calls is not False)
    schema = None if form is None or is_required else json.loads(form[1].text)
    with named(name):
        return name, writer.grammar(chosen, is_required, schema)


def _function(tool: Json) -> Json:
    function = tool.get("function")
    return function if isinstance(function, dict) else tool


def _chosen(choice: Any, functions: list[Json]) -> tuple[list[Json], bool]:
    """The functions that may be called, and whether one must be. Raises ApiError."""
    if choice in (None, "none", "auto"):
        return functions, False
    names = [str(function.get("name")) for function in functions]
    if choice == "required" and names:
        return functions, True
    if not isinstance(choice, dict):
        checks.one_of(ApiError, "tool_choice", choice, ("none", "auto", "required"))
        raise ApiError(f"tool_choice: expected tools with it, got {choice} alone")
    wanted = _function(choice).get("name")
    if wanted not in names:
        known = ", ".join(names) or "none"
        raise ApiError(f"tool_choice: expected a tool ({known}), got {checks.shown(wanted)}")
    return [function for function in functions if function.get("name") == wanted], True


class _Writer:
    """Writes the grammar of calls in one format. is_parallel: an answer may have several."""

    def __init__(self, format: CallFormat, tokenizer: Tokenizer, is_parallel: bool) -> None:
        self._format, self._tokenizer, self._is_parallel = format, tokenizer, is_parallel
        self._rules: dict[str, str] = {}  # The name of each.

    def grammar(self, functions: list[Json], is_required: bool, schema: Any) -> Grammar:
        """Of an answer; where no call is required, a text with calls in it, or no calls but JSON of
        a schema. Raises GrammarError."""
        named = " | ".join(self._rule(self._function(function)) for function in functions)
        first, tail = self._format.opens[0], f"{_quoted(_BEGIN[self._format.name])} ({named})"
        calls = "call"
        if self._format.name == "kimi":
            begin, _, end, close = map(self._mark, self._format.tokens[1:])
            tail = f"({begin} {tail} {end}){'+' * self._is_parallel} {close}"
        elif self._is_parallel:
            calls = 'call ("\\n" call)*'
        self._rules |= {tail: "tail", f"{self._mark(first)} tail": "call"}
        if is_required:
            start = calls
        elif schema is not None:
            start = f"{calls} | {embedded(schema)}"
        else:
            start = self._in_text(first, named)
        rules = [f"{name}: {text}" for text, name in self._rules.items()]
        return Grammar.lark("\n".join([f"start: {start}", *rules]))

    def _rule(self, text: str, letter: str = "r") -> str:
        """The name of a rule; of a lexeme, whose letter is large."""
        return self._rules.setdefault(text, f"{letter}{len(self._rules)}")

    def _control(self, text: str) -> str | None:
        """A control token; None if a text is none."""
        i = token_id(self._tokenizer, text)
        return None if i is None or self._tokenizer.token_bytes(i) else f"<[{i}]>"

    def _mark(self, text: str) -> str:
        return self._control(text) or _quoted(text)

    def _in_text(self, first: str, named: str) -> str:
        """Calls within a text, from their first marker on."""
        self._rules["/(?s:.)*/"] = "text"
        thinking = " | ".join(filter(None, map(self._control, THINKING)))
        lead = f"(text ({thinking}))* " if thinking else ""
        mark = self._control(first)
        begun = [f"{lead}{f'text {mark}' if mark else self._until(first)} tail"]
        if self._format.name == "xml":  # Some calls lack their first marker.
            begun.append(f"{lead}{self._until('<function=')} ({named})")
        self._rules[" | ".join(begun)] = "begun"
        return f"begun* {lead}text" if self._is_parallel else f"begun | {lead}text"

    def _until(self, marker: str) -> str:
        name = f"until{len(self._rules)}"
        self._rules[f"/(?s:.)*{spelled(marker)}/"] = f"{name}[lazy]"
        return name

    def _function(self, function: Json) -> str:
        """A call from the name on. Errors say which tool they are about."""
        name, schema = _name(function.get("name")), function.get("parameters") or {}
        is_lenient, format = function.get("strict") is not True, self._format.name
        try:
            if not isinstance(schema, dict):
                checks.refuse(GrammarError, "parameters", "an object", schema)
            if format == "xml":
                parameters = _Parameters(schema, is_lenient, self._rule).rules()
                end = self._mark("</tool_call>")
                return " ".join([_quoted(f"{name}>\n"), *parameters, _quoted("</function>\n"), end])
            arguments = embedded({"type": "object", **schema}, is_lenient)
        except (GrammarError, SchemaError) as error:
            raise GrammarError(f"{name}: {getattr(error, 'why', error)}") from None
        if format == "json":
            begin = _quoted(json.dumps(name)[1:] + ', "arguments": ')
            return f"{begin} {arguments} {_quoted('}' + chr(10))} {self._mark('</tool_call>')}"
        return (
            f"{_quoted(name + ':')} /[0-9]{{1,3}}/ {self._mark(self._format.tokens[2])} {arguments}"
        )


class _Parameters:
    """The parameters of one tool in XML, in the order of its schema."""

    def __init__(self, schema: Json, is_lenient: bool, rule: Callable[..., str]) -> None:
        self._schema, self._is_lenient, self._rule = schema, is_lenient, rule

    def _hold(self, keys: Iterable[str], known: set[str], where: str = "") -> None:
        """Raise GrammarError for a keyword that is not held, if all must be."""
        for key in sorted(set(keys) - known - _NOTES):
            if not self._is_lenient:
                expected = "expected keywords that can be enforced in such calls"
                raise GrammarError(f"{expected}, got {key}{where}")

    def rules(self) -> list[str]:
        self._hold(self._schema, _OF_OBJECTS)
        properties, required = self._schema.get("properties"), self._schema.get("required")
        properties = properties if isinstance(properties, dict) else {}
        required = required if isinstance(required, list) else []
        required = [name for name in required if isinstance(name, str)]
        if not self._is_lenient and (lost := set(required) - properties.keys()):
            shown = checks.shown(min(lost))
            raise GrammarError(f"expected required ones in properties, got {shown}")
        return [
            self._rule(self._parameter(name, own)) + "?" * (name not in required)
            for name, own in properties.items()
        ]

    def _parameter(self, name: str, schema: Any) -> str:
        schema = schema if isinstance(schema, dict) else {}
        where, types = f" in {name}", types_of(schema, self._schema)
        begin, end = _quoted(f"<parameter={_name(name)}>\n"), _quoted("\n</parameter>\n")
        listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(listed, list) and listed:
            self._hold(schema, {"enum", "const", "type"}, where)
            texts = [v if isinstance(v, str) else json.dumps(v) for v in listed]
        elif types and not types - _WORDS.keys():
            self._hold(schema, {"type"}, where)
            texts = [word for kind in sorted(types) for word in _WORDS[kind]]
        elif types and "string" not in types:
            shared = {k: self._schema[k] for k in ("$defs", "definitions") if k in self._schema}
            return f"{begin} {embedded({**shared, **schema}, self._is_lenient)} {end}"
        else:
            limits = self._limits(schema, types, where)
            both = [f"/{_FREE}{_END}/", *(rf"/{limit}\n{_END}/" for limit in limits)]
            return f"{begin} {self._rule(' & '.join(both), 'V')}"
        return f"{begin} ({' | '.join(map(_quoted, texts))}) {end}"

    def _limits(self, schema: Json, types: set[str], where: str) -> list[str]:
        """What a string must match; nothing for any value where strings may be anything."""
        limits = []
        if types == {"string"} and not {"anyOf", "oneOf", "allOf", "$ref"} & schema.keys():
            self._hold(schema, _OF_STRINGS, where)
            counts = [schema.get(key, "") for key in ("minLength", "maxLength")]
            if any(n != "" and (not checks.is_integer(n) or n < 0) for n in counts):
                raise GrammarError(f"expected counts as minLength and maxLength, got others{where}")
            if counts != ["", ""]:
                limits.append(f"(?s:.){{{counts[0] or 0},{counts[1]}}}")
            if "pattern" in schema:
                limits.append(self._pattern(str(schema["pattern"]), where))
        elif not _has_any_string(schema):
            self._hold(schema, set(), where)
        return limits

    def _pattern(self, pattern: str, where: str) -> str:
        """A pattern, which may match anywhere in a text, as a regex of the whole text."""
        plain = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "", pattern)
        begins, ends = plain.startswith("^"), plain.endswith("$")
        body = pattern[begins : len(pattern) - ends]
        if re.search(r"[$^]", plain[begins : len(plain) - ends]) or (
            "|" in plain and (begins or ends)
        ):
            self._hold(["pattern"], set(), where)
            return "(?s:.)*"
        return f"{'' if begins else '(?s:.)*'}(?:{slashed(body)}){'' if ends else '(?s:.)*'}"


def _has_any_string(schema: Json) -> bool:
    """Whether it matches every string, as its keywords say at once."""
    options = schema.get("anyOf")
    if isinstance(options, list) and not schema.keys() - {"anyOf"} - _NOTES:
        return any(isinstance(one, dict) and _has_any_string(one) for one in options)
    return not schema.keys() - {"type"} - _NOTES


def _name(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(NAME, name) or name != name.strip():
        raise GrammarError(f"expected names that calls can spell, got {checks.shown(name)}")
    return name


def _quoted(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


def _without(*ends: str) -> str:
    """A regex of the texts without any of these ends, which all begin with `<` and have no other.
    In this form, without `~`, a mask takes a tenth of the time."""

    def part(rests: Sequence[str], is_over: bool) -> str:
        """What may follow a `<`: a piece of an end, and if it is over, what does not go on."""
        after = {c: [r[1:] for r in rests if r[0] == c and r[1:]] for c in {r[0] for r in rests}}
        found = [f"[^<{''.join(map(re.escape, sorted(after)))}]".replace("/", r"\/")] * is_over
        for c, own in sorted(after.items()):
            if own:
                found.append(c.replace("/", r"\/") + part(own, is_over))
        return f"(?:{'|'.join(found)}){'' if is_over else '?'}" if found else ""

    rests = [end[1:] for end in ends]
    begun = f"(?:<{part(rests, False)})*"
    return f"(?:{begun}<{part(rests, True)}|[^<])*{begun}"


# How a value in XML ends, and what it holds: no end of its own, nor that of a call.
_END, _FREE = r"<\/parameter>\n", _without("</parameter>", "</tool_call>")
