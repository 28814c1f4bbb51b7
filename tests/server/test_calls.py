"""Tool calls and thinking in what models write: the same events however the text is cut.

The reference for a call is what was rendered: a template writes known arguments, and the parser
gives them back.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.server.answers import (
    AnswerParser,
    CallArguments,
    CallStart,
    Content,
    Event,
    Reasoning,
    preserved_tokens,
)
from engine.server.arguments import typed, types_of
from engine.server.calls import CallFormat, find_format
from engine.text.template import BUILT_IN, ChatTemplate
from tests.support.chats import JSON_STYLE, KIMI_STYLE, LING_STYLE, QWEN35_STYLE

STYLES = {"xml": QWEN35_STYLE, "json": JSON_STYLE, "kimi": KIMI_STYLE, "pairs": LING_STYLE}
FORMATS = {name: find_format(source) for name, source in STYLES.items()}
TYPES = {
    "path": {"type": "string"}, "text": {"type": ["string", "null"]}, "n": {"type": "integer"},
    "x": {"type": "number"}, "on": {"type": "boolean"}, "items": {"type": "array"},
    "deep": {"$ref": "#/$defs/Deep"}, "nothing": {"anyOf": [{"type": "object"}, {"type": "null"}]},
}  # fmt: skip
TOOLS: Any = [
    {"type": "function", "function": {"name": "write", "parameters": {
        "type": "object", "properties": TYPES, "$defs": {"Deep": {"type": "object"}}}}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip
ARGUMENTS = {
    "path": 'a "b"\\ é\n\n <x> </parameter> {', "n": 12, "x": -1.5, "on": True,
    "items": [1, {"a": "</tool_call>"}], "deep": {"é": [None]}, "nothing": None, "text": "null x",
}  # fmt: skip
BEGIN, END = "<tool_call>\n", "\n</tool_call>"
JSON_CALL = BEGIN + '{"name": "now", "arguments": {}}' + END
XML_CALL = BEGIN + "<function=now>\n</function>" + END
Said = list[tuple[Any, ...]]


def parsed(
    format: CallFormat | None, pieces: Iterable[str], thinks: bool = False, tools: Any = TOOLS
) -> tuple[Said, AnswerParser]:
    """The events of an answer, those of a kind that follow each other as one; ids left out."""
    parser = AnswerParser(format, tools, thinks)
    events = list(itertools.chain.from_iterable(map(parser.push, pieces)))
    return joined([*events, *parser.finish()]), parser


def joined(events: Sequence[Event]) -> Said:
    said: Said = []
    for event in events:
        if isinstance(event, CallStart):
            said.append(("call", event.index, event.name))
            continue
        index = event.index if isinstance(event, CallArguments) else ""
        kind = (type(event).__name__, index)
        text = said.pop()[2] if said and said[-1][:2] == kind else ""
        said.append((*kind, text + event.text))
    return said


def cut(text: str, *places: int) -> list[str]:
    return [text[a:b] for a, b in itertools.pairwise([0, *sorted(places), len(text)])]


def answer_of(source: str, message: dict[str, Any]) -> tuple[str, bool]:
    """What a template writes for an answer, as if it had been sampled; whether it thinks."""
    template, user = ChatTemplate(source), {"role": "user", "content": "a"}
    prompt = template.render([user], TOOLS)
    text = template.render([user, message], TOOLS, add_generation_prompt=False)
    assert text.startswith(prompt)
    text = text.removeprefix(prompt).rstrip()
    return text.removesuffix("<|im_end|>").removesuffix("<|role_end|>"), "<think>" in prompt


def function(name: str, arguments: Any, i: int = 0) -> dict[str, Any]:
    call = {"name": name, "arguments": arguments}
    return {"type": "function", "id": f"functions.{name}:{i}", "function": call}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("content", ["", "I write it."])
def test_what_templates_write_is_read_back(style: str, content: str) -> None:
    calls = [function("write", ARGUMENTS), function("now", {}, 1)]
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    text, thinks = answer_of(STYLES[style], message | {"reasoning_content": "Hm,\n\nyes."})
    said, parser = parsed(FORMATS[style], [text], thinks)
    assert [(c.name, json.loads(c.arguments)) for c in parser.calls] == [
        ("write", ARGUMENTS), ("now", {}),
    ]  # fmt: skip
    assert [s for s in said if s[0] in ("Reasoning", "Content")] == [
        *([("Reasoning", "", "Hm,\n\nyes.")] if thinks else []),
        *([("Content", "", content)] if content else []),
    ]
    assert parser.sampled == text
    assert parser.sampled.content == content
    assert parser.sampled.n_thinking == (text.index("</think>") + 8 if thinks else None)
    # Its pieces may be cut anywhere.
    for places in ([i] for i in range(len(text))):
        assert parsed(FORMATS[style], cut(text, *places), thinks)[0] == said
    assert parsed(FORMATS[style], text, thinks)[0] == said


@pytest.mark.parametrize("style", STYLES)
def test_an_answer_that_is_cut_has_valid_arguments(style: str) -> None:
    """As where max_tokens ends it; what is complete is there, and no number is another one."""
    calls = [function("write", ARGUMENTS), function("now", {}, 1)]
    text, thinks = answer_of(STYLES[style], {"role": "assistant", "tool_calls": calls})
    for n in range(len(text)):
        said, parser = parsed(FORMATS[style], [text[:n]], thinks)
        assert parsed(FORMATS[style], text[:n], thinks)[0] == said
        for call in parser.calls[:1]:
            arguments = json.loads(call.arguments)
            *keys, last = arguments or [""]
            assert [arguments[key] for key in keys] == [ARGUMENTS[key] for key in keys]
            value = arguments.get(last)
            assert value == ARGUMENTS.get(last) or isinstance(value, str | list | dict)


@pytest.mark.parametrize("style", STYLES)
def test_arguments_come_while_they_are_generated(style: str) -> None:
    text, thinks = answer_of(
        STYLES[style], {"role": "assistant", "tool_calls": [function("write", {"path": "abcdef"})]}
    )
    parser = AnswerParser(FORMATS[style], TOOLS, thinks)
    before, after = text.split("abcdef")
    events = [*parser.push(before), *parser.push("abc")]
    assert joined(events)[-2:] == [("call", 0, "write"), ("CallArguments", 0, '{"path": "abc')]
    assert joined(parser.push("def")) == [("CallArguments", 0, "def")]
    assert joined([*parser.push(after), *parser.finish()]) == [("CallArguments", 0, '"}')]


def test_formats_are_found_from_templates() -> None:
    kinds = [type(form).__name__ for form in FORMATS.values()]
    assert kinds == ["_Xml", "_Json", "_Kimi", "_Pairs"]
    assert find_format(BUILT_IN["chatml"]) is None
    assert preserved_tokens(None) == ("<think>", "</think>")
    assert "<|tool_call_argument_begin|>" in preserved_tokens(FORMATS["kimi"])


def test_ids_are_new_but_kimi_s() -> None:
    ids = [parsed(FORMATS["json"], [JSON_CALL])[1].calls[0].id for _ in range(2)]
    assert ids[0] != ids[1]
    assert all(re.fullmatch("call_[A-Za-z0-9]{24}", id) for id in ids)
    for written, name in (("functions.a.b:12", "a.b"), ("now:0", "now"), ("c", "c")):
        text = f"<|tool_call_begin|>{written}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
        call = parsed(FORMATS["kimi"], [text])[1].calls[0]
        assert (call.id, call.name, call.arguments) == (written, name, "{}")


def content(text: str) -> tuple[Any, ...]:
    return ("Content", "", text)


def thought(text: str) -> tuple[Any, ...]:
    return ("Reasoning", "", text)


def call(arguments: str, name: str = "now", index: int = 0) -> Said:
    return [("call", index, name), ("CallArguments", index, arguments)]


@pytest.mark.parametrize(
    ("text", "thinks", "expected"),
    [
        ("a\n", False, [content("a\n")]),
        (" a", False, [content(" a")]),
        ("\n", False, [content("\n")]),
        ("\nHm.\n\n</think>\n\na ", True, [thought("Hm."), content("a ")]),
        ("<think>\nHm.</think>a", False, [thought("Hm."), content("a")]),
        ("\n<think>\n\n</think>\n\na", False, [content("a")]),
        ("<think>Hm.</think>a", True, [thought("Hm."), content("a")]),
        ("a<think>b</think>", False, [content("a<think>b</think>")]),
        ("Hm.\n", True, [thought("Hm.")]),
        ("</think>", True, []),
        (f"Hm.\n{XML_CALL}", True, [thought("Hm."), *call("{}")]),
        (f"Hm.{XML_CALL}\n</think>\n\na", True, [thought("Hm."), *call("{}"), content("a")]),
        (f"{XML_CALL}</think></think>", True, [*call("{}"), content("</think>")]),
        ("Use <tool_call>s.</think>a", True, [thought("Use <tool_call>s."), content("a")]),
        (f"a\n\n{XML_CALL}\n", False, [content("a"), *call("{}")]),
        (f"a {XML_CALL}\n\nb", False, [content("a"), *call("{}"), content("\n\nb")]),
        (f"{XML_CALL}\n\nb", False, [*call("{}"), content("b")]),
        (f"{XML_CALL}{XML_CALL}", False, [*call("{}"), *call("{}", index=1)]),
        ("<tool_call>a", False, [content("<tool_call>a")]),
        ("<tool_call>\n<function=>", False, [content("<tool_call>\n<function=>")]),
        ("<tool_call><tool_call>", False, [content("<tool_call><tool_call>")]),
        (f"<tool_call>{XML_CALL}", False, [content("<tool_call>"), *call("{}")]),
        ("<function=now></function>", False, [*call("{}")]),
        ("<function=now></function></tool_call>b", False, [*call("{}"), content("b")]),
        ("<function=other></function>", False, [content("<function=other></function>")]),
        ("<tool_call><function=x></function>", False, call("{}", "x")),
        ("<tool_call><function=now></tool_call>b", False, [*call("{}"), content("b")]),
        ("<tool_call><function=now>?</function>", False, [*call("{}"), content("?</function>")]),
    ],
)  # fmt: skip
def test_xml(text: str, thinks: bool, expected: Said) -> None:
    assert parsed(FORMATS["xml"], [text], thinks)[0] == expected
    assert parsed(FORMATS["xml"], text, thinks)[0] == expected


def parameters(*texts: str) -> str:
    return "<tool_call><function=write>" + "".join(texts) + "</function></tool_call>"


def parameter(key: str, value: str) -> str:
    return f"\n<parameter={key}>\n{value}\n</parameter>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<parameter=path>a</parameter>", {"path": "a"}),
        ("<parameter=path>\n</parameter>", {"path": ""}),
        (parameter("path", ""), {"path": ""}),
        (parameter("path", "\n"), {"path": "\n"}),
        (parameter("path", "12"), {"path": "12"}),
        (parameter("path", "a</parameter>b"), {"path": "a</parameter>b"}),
        (parameter("path", "a</function>b"), {"path": "a</function>b"}),
        ("<parameter=path>\na\n", {"path": "a"}),
        (parameter("x", "1e3") + parameter("n", "2"), {"x": 1000.0, "n": 2}),
        (parameter("n", "3.0"), {"n": 3}),
        (parameter("n", "3.5"), {"n": "3.5"}),
        (parameter("n", "three"), {"n": "three"}),
        (parameter("n", "1" * 5000), {"n": "1" * 5000}),
        (parameter("x", "NaN"), {"x": "NaN"}),
        (parameter("x", "3"), {"x": 3}),
        (parameter("on", "True"), {"on": True}),
        (parameter("on", "0"), {"on": False}),
        (parameter("on", "yes"), {"on": "yes"}),
        (parameter("text", "None"), {"text": None}),
        (parameter("text", "5"), {"text": "5"}),
        (parameter("nothing", "null"), {"nothing": None}),
        (parameter("nothing", '{"a": 1}'), {"nothing": {"a": 1}}),
        (parameter("items", "[1"), {"items": "[1"}),
        (parameter("items", "[" * 10**5), {"items": "[" * 10**5}),
        (parameter("deep", '{"a": {}}'), {"deep": {"a": {}}}),
        (parameter("unknown", '{"a": 1}'), {"unknown": '{"a": 1}'}),
        (parameter("path", "a") + parameter("path", "b"), {"path": "a"}),
        (parameter("n", "1") + parameter("n", "2") + parameter("x", "3"), {"n": 1, "x": 3}),
    ],
)
def test_values_are_typed_by_their_schema(text: str, expected: dict[str, Any]) -> None:
    said, parser = parsed(FORMATS["xml"], [parameters(text)])
    assert said == call(parser.calls[0].arguments, "write")
    assert json.loads(parser.calls[0].arguments) == expected
    assert parsed(FORMATS["xml"], parameters(text))[0] == said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path>\na", {"path": "a"}),
        ("path>\na\n", {"path": "a"}),
        ("path>\na\n</parame", {"path": "a"}),
        ("path>\na\n</parameter>\n", {"path": "a"}),
        ("path>\na\n</parameter>\n</func", {"path": "a"}),
        ("path>\na\n</parameter>\n<parameter=n", {"path": "a"}),
        ("n>\n12", {"n": "12"}),
        ("n>\n12\n</parameter>", {"n": 12}),
    ],
)
def test_a_parameter_that_is_cut(text: str, expected: dict[str, Any]) -> None:
    """No half of a tag is in the value, and what may be a part of a number is a text."""
    whole = "<tool_call><function=write><parameter=" + text
    assert json.loads(parsed(FORMATS["xml"], [whole])[1].calls[0].arguments) == expected
    assert json.loads(parsed(FORMATS["xml"], whole)[1].calls[0].arguments) == expected


NOW = "<tool_call>now\n</tool_call>"


def pair(key: str, value: str, space: str = "\n") -> str:
    return f"{space}<arg_key>{key}</arg_key>{space}<arg_value>{value}</arg_value>"


def write(*pairs: str) -> str:
    return "<tool_call>write" + "".join(pairs) + "\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "thinks", "expected"),
    [
        (NOW, False, call("{}")),
        ("<tool_call>now</tool_call>", False, call("{}")),
        (f"a\n{NOW}\n{NOW}", False, [content("a"), *call("{}"), *call("{}", index=1)]),
        (f"Hm.\n{NOW}", True, [thought("Hm."), *call("{}")]),
        (f"Hm.{NOW}\n</think>\n\na", True, [thought("Hm."), *call("{}"), content("a")]),
        ("<tool_call>now b</tool_call>", False, [content("<tool_call>now b</tool_call>")]),
        (JSON_CALL, False, [content(JSON_CALL)]),
        (f"<tool_call>{NOW}", False, [content("<tool_call>"), *call("{}")]),
        ("Use <tool_call>.", False, [content("Use <tool_call>.")]),
        ("<tool_call>now\n<arg_value>", False, [content("<tool_call>now\n<arg_value>")]),
        ("<tool_call>now<arg_key>a</arg_key>b", False,
         [*call("{}"), content("<arg_key>a</arg_key>b")]),
    ],
)  # fmt: skip
def test_pairs(text: str, thinks: bool, expected: Said) -> None:
    assert parsed(FORMATS["pairs"], [text], thinks)[0] == expected
    assert parsed(FORMATS["pairs"], text, thinks)[0] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (write(pair("path", "a")), {"path": "a"}),
        (write(pair("path", "a", "")), {"path": "a"}),
        (write(pair("path", "")), {"path": ""}),
        (write(pair("path", "\na\n\n")), {"path": "\na\n\n"}),
        (write(pair("path", "a</arg_value>b")), {"path": "a</arg_value>b"}),
        (write(pair("path", "</tool_call><arg_key>")), {"path": "</tool_call><arg_key>"}),
        (write(pair("n", "2"), pair("x", "1e3"), pair("on", "true")),
         {"n": 2, "x": 1000.0, "on": True}),
        (write(pair("n", "three"), pair("n", "3")), {"n": "three"}),
        (write(pair("items", '[1, "é"]'), pair("deep", "{}")), {"items": [1, "é"], "deep": {}}),
        (write(pair("unknown", "5")), {"unknown": "5"}),
        (write(pair("path", "a"))[:-25], {"path": "a"}),
        (write(pair("path", "a"))[:-20], {"path": "a"}),
        (write(pair("n", "12"))[:-25], {"n": "12"}),
        (write(pair("n", "12"))[:-13], {"n": 12}),
    ],
)  # fmt: skip
def test_values_of_pairs(text: str, expected: dict[str, Any]) -> None:
    said, parser = parsed(FORMATS["pairs"], [text])
    assert said == call(parser.calls[0].arguments, "write")
    assert json.loads(parser.calls[0].arguments) == expected
    assert parsed(FORMATS["pairs"], text)[0] == said


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"enum": ["a", 1, None]}, {"string", "integer", "number", "null"}),
        ({"const": True}, {"boolean"}),
        ({"allOf": [{"$ref": "#/a/b"}]}, {"array"}),
        ({"$ref": "#/loop"}, set()),
        ({"$ref": "elsewhere"}, set()),
        ({"type": 5, "enum": 5, "anyOf": 5, "oneOf": [5]}, set()),
        (5, set()),
    ],
)
def test_types_of_schemas(schema: Any, types: set[str]) -> None:
    root = {"a": {"b": {"type": "array"}}, "loop": {"$ref": "#/loop"}}
    assert types_of(schema, root) == types


def test_numbers_keep_their_digits() -> None:
    assert typed(" 0.10000000000000000000001 ", {"number"}) == "0.10000000000000000000001"


JSON_CASES = {
    '{"name": "now", "arguments": {}}': call("{}"),
    '{"arguments": {"a": 1}, "name": "now"}': call('{"a": 1}'),
    '{"name": "now", "parameters": {"a": 1}}': call('{"a": 1}'),
    '{"name": "now"}': call("{}"),
    '{"name": "now", "arguments": "{\\"a\\": 1}"}': call('{"a": 1}'),
    '{"name": "now", "arguments": {}': call("{}"),
    '{"name":"now","arguments":{"a":[1 , -2.5e+3,true,{"b":null}], "a":""}}':
        call('{"a":[1 , -2.5e+3,true,{"b":null}], "a":""}'),
    '{"name": "now", "arguments": {"a": "x\ny\\d\\u00e9"}}':
        call('{"a": "x\\ny\\\\d\\u00e9"}'),
    '{"name": "now", "arguments": {"a": 1, "b": [2,],}}': call('{"a": 1, "b": [2]}'),
}  # fmt: skip


@pytest.mark.parametrize("text", JSON_CASES)
def test_json(text: str) -> None:
    whole = BEGIN + text + END
    assert parsed(FORMATS["json"], [whole])[0] == JSON_CASES[text]
    assert parsed(FORMATS["json"], whole)[0] == JSON_CASES[text]


NO_CALLS = (
    "{", "5", '{"name": ""}', '{"arguments": {}, "name": "\\ud800"}', '{"name": 5}',
    "{'name': 'now'}", "[]", '{"name": "a", "arguments": [1]}',
)  # fmt: skip


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_is_content(text: str) -> None:
    whole = BEGIN + text + END
    assert parsed(FORMATS["json"], whole)[0] == [content(whole)]


def test_arguments_that_become_no_json_end_there() -> None:
    """What came is closed; the rest is content."""
    whole = BEGIN + '{"name": "now", "arguments": {"a": 1, "b": nope}}' + END
    expected = [*call('{"a": 1}'), content("nope}}" + END)]
    assert parsed(FORMATS["json"], whole)[0] == expected


def test_without_tools_calls_are_text() -> None:
    for form, tools in ((None, TOOLS), (FORMATS["json"], [])):
        assert parsed(form, JSON_CALL, False, tools)[0] == [content(JSON_CALL)]


def test_what_would_be_a_very_long_beginning_is_none() -> None:
    for form, begin in (("xml", "<tool_call>\n<function="), ("kimi", "<|tool_call_begin|>")):
        parser = AnswerParser(FORMATS[form], TOOLS, False)
        assert joined(parser.push(begin + "x" * 256)) == []
        assert joined(parser.push("x" * 256)) == [content(begin + "x" * 512)]


def test_no_more_is_held_back_than_may_be_a_marker() -> None:
    parser = AnswerParser(FORMATS["xml"], TOOLS, False)
    for piece, expected in (("a", "a"), (" <", ""), ("b", " <b"), ("<tool_", ""), ("x", "<tool_x")):
        assert "".join(e.text for e in parser.push(piece) if isinstance(e, Content)) == expected
    # Without calls nothing is.
    assert AnswerParser(None, (), False).push("a\n<") == [Content("a\n<")]
    assert AnswerParser(None, (), True).push("a <") == [Reasoning("a ")]


_WORDS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=write>", "<function=",
    "</function>", "<parameter=path>", "<parameter=n>", "</parameter>", '{"name": "now", ',
    '"arguments": ', '{"a": ', '"', "}", "]", "[1, ", "\\", "\n", " ", "é", "12", "true", "text",
    "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "functions.now:0",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>", "<", ">",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    words=st.lists(st.sampled_from(_WORDS), max_size=30), style=st.sampled_from([*STYLES]),
    thinks=st.booleans(), data=st.data(),
)  # fmt: skip
def test_any_text(words: list[str], style: str, thinks: bool, data: st.DataObject) -> None:
    """Cuts change nothing, arguments are objects, and outside of calls no character is lost."""
    text = "".join(words)
    said, parser = parsed(FORMATS[style], [text], thinks)
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=5))
    assert parsed(FORMATS[style], cut(text, *places), thinks)[0] == said
    assert parsed(FORMATS[style], text, thinks)[0] == said
    assert parser.sampled == text
    assert all(isinstance(json.loads(c.arguments), dict) for c in parser.calls)
    shown = "".join(s[2] for s in said if s[0] in ("Reasoning", "Content"))
    left = "".join(text.split())
    for character in "".join(shown.split()):
        at = left.find(character)
        assert at >= 0
        left = left[at + 1 :]
    if not parser.calls:
        tags = text.replace("<think>", "").replace("</think>", "")
        for tag in ("<think>", "</think>"):
            shown = shown.replace(tag, "")
        assert "".join(shown.split()) == "".join(tags.split())
