"""Grammars of answers and calls: what they take, and that random calls parse and validate."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from engine import Engine
from engine.sampling.grammar import Grammar
from engine.server.answers import AnswerParser
from engine.server.calls import CallFormat, _Json, _Kimi, _Pairs, _Xml
from engine.server.chat import ChatCall, Shared
from engine.server.constraints import constraint
from engine.server.errors import ApiError
from engine.server.protocol import ChatRequest, read
from engine.text.template import ChatTemplate
from tests.server.conftest import Connect, message_of
from tests.support.grammars import TOKENIZER, accepts, written
from tests.support.scripted import Script

pytest.importorskip("llguidance")
FORMATS: dict[str, CallFormat] = {"xml": _Xml(), "json": _Json(), "kimi": _Kimi()}


def tool(name: str, strict: bool | None = True, **parameters: Any) -> dict[str, Any]:
    function = {"name": name, "strict": strict, "parameters": {"type": "object", **parameters}}
    return {"type": "function", "function": function}


WEATHER = tool("get_weather", required=["city"], additionalProperties=False, properties={
    "city": {"type": "string"}, "unit": {"enum": ["C", "F", 1]}, "days": {"type": "integer"},
    "now": {"type": "boolean"}, "tags": {"type": "array", "items": {"type": "string"}},
})  # fmt: skip
STOP = tool("stop", properties={}, additionalProperties=False)
TOOLS = [WEATHER, STOP]


def grammar(format: str, tools: list[dict[str, Any]] = TOOLS, **more: Any) -> tuple[str, Grammar]:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": tools, **more}
    request = read(json.dumps(body).encode(), ChatRequest)
    found = constraint(request, tools, FORMATS[format], TOKENIZER)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("strict", "choice", "field"), [(True, None, "tools"), (None, "required", "tool_choice")]
)
def test_calls_in_pairs_are_not_enforced(strict: bool | None, choice: Any, field: str) -> None:
    """They are refused by name; tools that are not strict go unconstrained."""

    def constrained(choice: Any, strict: bool | None) -> Any:
        body = {"messages": [{"role": "user", "content": "x"}], "tool_choice": choice}
        request = read(json.dumps(body).encode(), ChatRequest)
        return constraint(request, [tool("stop", strict)], _Pairs(), TOKENIZER)

    got = (
        "expected calls in a format that can be enforced, got <tool_call>, </tool_call>, <arg_key>"
    )
    with pytest.raises(ApiError, match=f"^{field}: {got}, "):
        constrained(choice, strict)
    assert constrained(None, None) is None


def xml(name: str, **values: str) -> str:
    inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def as_json(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


PARIS = xml("get_weather", city="Paris </b> <parameter>", unit="1", days="3", now="True",
            tags='["a", "b"]')  # fmt: skip
REQUIRED = {"tool_choice": "required"}
BY_NAME = {"tool_choice": {"type": "function", "function": {"name": "stop"}}}
KIMI = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.stop:0"
    "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
)
TAKEN: list[tuple[str, dict[str, Any], str, bool]] = [
    ("xml", {}, "Hello, no <call> here.", True),
    ("xml", {}, "", True),
    ("xml", {}, f"I look.\n\n{PARIS}\n{PARIS} Done.", True),
    ("xml", {}, "<function=stop>\n</function>\n</tool_call>", True),
    ("xml", {}, "a <tool_call> b", False),
    ("xml", {}, "<function=go>\n</function>\n</tool_call>", False),
    ("xml", {}, xml("get_weather", days="3"), False),
    ("xml", {}, xml("get_weather", city="a", days="x"), False),
    ("xml", {}, xml("get_weather", city="a", unit="K"), False),
    ("xml", {}, xml("get_weather", city="a", more="x"), False),
    ("xml", {}, xml("get_weather", city="a</parameter>\n<parameter=days>"), False),
    ("xml", {}, xml("get_weather", city="a</function>\n</tool_call>"), False),
    ("xml", REQUIRED, PARIS, True),
    ("xml", REQUIRED, f"{PARIS}\n{xml('stop')}", True),
    ("xml", REQUIRED, f"Hm. {PARIS}", False),
    ("xml", REQUIRED, "", False),
    ("xml", BY_NAME, xml("stop"), True),
    ("xml", BY_NAME, PARIS, False),
    ("xml", {**REQUIRED, "parallel_tool_calls": False}, f"{PARIS}\n{PARIS}", False),
    ("xml", {"parallel_tool_calls": False}, f"Hm. {PARIS}", True),
    ("xml", {"parallel_tool_calls": False}, f"{PARIS} {PARIS}", False),
    ("xml", {"response_format": {"type": "json_object"}}, '{"a": 1}', True),
    ("xml", {"response_format": {"type": "json_object"}}, PARIS, True),
    ("xml", {"response_format": {"type": "json_object"}}, "Hm.", False),
    ("json", {}, "Hm. " + as_json("get_weather", '{"city": "P", "days": 3}'), True),
    ("json", {}, as_json("get_weather", '{"days": 3}'), False),
    ("json", REQUIRED, as_json("stop", "{}"), True),
    ("json", REQUIRED, as_json("go", "{}"), False),
    ("kimi", {}, f"Hm. {KIMI}", True),
    ("kimi", REQUIRED, KIMI, True),
    ("kimi", REQUIRED, KIMI.replace("{}", '{"a": 1}'), False),
]  # fmt: skip


@pytest.mark.parametrize(("format", "more", "text", "is_taken"), TAKEN)
def test_what_is_taken(format: str, more: dict[str, Any], text: str, is_taken: bool) -> None:
    _, made = grammar(format, **more)
    assert accepts(made, text, by_bytes=False) == is_taken
    assert accepts(made, text) == is_taken


@pytest.mark.parametrize("format", FORMATS)
def test_random_calls_parse_and_validate(format: str) -> None:
    limits = {"city": {"type": "string", "minLength": 2, "maxLength": 4},
              "code": {"type": "string", "pattern": "^[A-C]{2}"}}  # fmt: skip
    properties = {**limits, "days": {"type": "integer", "minimum": 0, "maximum": 99},
                  "now": {"type": "boolean"}, "unit": {"enum": ["C", "F", 1, None]},
                  "point": {"type": "object", "properties": {"x": {"type": "boolean"}},
                            "required": ["x"], "additionalProperties": False}}  # fmt: skip
    one = tool("measure", properties=properties, required=["city", "days"],
               additionalProperties=False)  # fmt: skip
    _, made = grammar(format, [one, STOP], **REQUIRED, parallel_tool_calls=False)
    texts = [written(made, random.Random(seed), 400) for seed in range(25)]
    found = [text for text in texts if text is not None]
    assert len(found) > 8
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in (one, STOP)}
    names = set()
    for text in found:
        parser = AnswerParser(FORMATS[format], [one, STOP], False)
        parser.push(text)
        parser.finish()
        (call,) = parser.calls
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])
        names.add(call.name)
    assert "measure" in names


def test_a_tool_that_is_not_strict_is_held_as_far_as_can_be() -> None:
    loose = tool("f", strict=None, minProperties=1, properties={
        "when": {"type": "string", "format": "frob"}, "n": {"type": "integer", "not": {}},
    })  # fmt: skip
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [loose]}
    request = read(json.dumps(body).encode(), ChatRequest)
    assert constraint(request, [loose], FORMATS["xml"], TOKENIZER) is None
    _, made = grammar("xml", [loose], **REQUIRED)
    assert accepts(made, xml("f", when="now", n="5"))
    assert not accepts(made, xml("f", n="x"))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"properties": {"x": {"type": "string", "format": "date"}}}, "got format in x"),
        ({"properties": {"x": {"type": "array", "contains": {}}}}, "got #/contains"),
        ({"minProperties": 1}, "got minProperties"),
        ({"required": ["y"]}, "expected required ones in properties, got 'y'"),
        ({"properties": {"x>": {}}}, "expected names that calls can spell, got 'x>'"),
        ({"properties": {"x": {"type": "string", "pattern": "^a|b$"}}}, "got pattern in x"),
        ({"properties": {"x": {"type": "string", "minLength": "2"}}}, "counts as minLength"),
        (
            {
                "required": [{}],
                "properties": {"x": {"type": "array", "items": {"x\n": 5, "not": {}}}},
            },
            "expected keywords that can be enforced, got #/items/not",
        ),
        (
            {"properties": {"x": {"type": "object", "properties": {"a\n": {"not": {}}}}}},
            "got #/properties/a /not",
        ),
    ],
)
def test_what_calls_in_xml_cannot_hold(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ApiError) as raised:
        grammar("xml", [tool("f", **parameters)])
    assert raised.value.param == "tools"
    assert str(raised.value).startswith("tools: f: ")
    assert words in str(raised.value)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("function", "words"),
    [
        ({"name": "f", "parameters": [1]}, "f: parameters: expected an object, got [1]"),
        ({"parameters": {}}, "expected names that calls can spell, got None"),
        ({"name": "f\n"}, "expected names that calls can spell, got 'f\\n'"),
    ],
)
def test_what_is_no_function(format: str, function: dict[str, Any], words: str) -> None:
    with pytest.raises(ApiError) as raised:
        grammar(format, [{"type": "function", "function": function}], **REQUIRED)
    assert words in str(raised.value)
    assert str(raised.value).isprintable()


def test_templates_without_known_calls() -> None:
    request = read(
        json.dumps({"messages": [{"role": "user", "content": "x"}], "tools": TOOLS}).encode(),
        ChatRequest,
    )
    with pytest.raises(ApiError, match="tools: expected calls of a known format"):
        constraint(request, TOOLS, None, TOKENIZER)


CHATML = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}<tool_call><function="


def test_over_http(connect: Connect) -> None:
    """A request's form reaches the engine, and errors name its field."""
    shared = Shared("scripted", template=ChatTemplate(CHATML))
    client = connect(Script("Hi."), shared)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS}
    forms: tuple[dict[str, Any], ...] = ({}, {"type": "text"}, {"type": "json_object"})
    cases: list[dict[str, Any]] = [{"response_format": form} for form in forms]
    for more in [*cases, REQUIRED, BY_NAME]:
        response = client.post("/v1/chat/completions", json=body | more)
        assert response.status_code == 200, response.text
    wrong = {"tool_choice": {"type": "function", "function": {"name": "fly"}}}
    response = client.post("/v1/chat/completions", json=body | wrong)
    told = message_of(response, 400, "tool_choice")
    assert told == "tool_choice: expected a tool (get_weather, stop), got 'fly'"
    response = client.post("/v1/chat/completions", json=body | {"guided_regex": "a"})
    assert "expected none beside calls" in message_of(response, 400, "guided_regex")


def test_the_demo_model_calls() -> None:
    """It has never seen a call, and writes valid ones."""
    template = ChatTemplate(CHATML)
    with Engine.load(n_parallel=2, n_ctx=1024) as engine:
        for seed in range(3):
            body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "n": 2,
                    "seed": seed, "max_tokens": 400, **BY_NAME,
                    "parallel_tool_calls": False}  # fmt: skip
            call = ChatCall(json.dumps(body).encode(), Shared("demo", template=template), "")
            reply = call.start(engine)
            for completion in reply.completions:
                completion.wait()
            while not reply.is_done:
                reply.news()
            for choice in json.loads(reply.whole())["choices"]:
                assert choice["finish_reason"] == "tool_calls"
                (made,) = choice["message"]["tool_calls"]
                assert made["function"] == {"name": "stop", "arguments": "{}"}
        thinking = ChatTemplate(CHATML + "{# #}" + "<think>\n")
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9,
                "response_format": {"type": "json_object"}}  # fmt: skip
        reply = ChatCall(json.dumps(body).encode(), Shared("d", template=thinking), "").start(
            engine
        )
        (completion,) = reply.completions
        held = completion.request.params.grammar
        assert held is not None
        assert held.after == "</think>"
