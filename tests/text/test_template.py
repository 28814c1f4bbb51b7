"""Chat templates alone: where they come from, what they may do, and the errors of bad ones.

tests/parity/test_chat_template.py compares what they render with transformers.
"""

from __future__ import annotations

import copy
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from engine import Engine
from engine.formats.gguf import GGUFFile
from engine.text.template import BUILT_IN, ChatError, ChatTemplate, Sampled, find_template
from tests.support.chats import CHATML, CHATS, QWEN35_STYLE, TOOLS
from tools.ggufwrite import write_gguf
from tools.synth import write_model

USER = [{"role": "user", "content": "a & <b>"}]


def render(source: str, **options: Any) -> str:
    return ChatTemplate(source).render(USER, **options)


def test_chatml() -> None:
    expected = (
        "<|im_start|>system\n  Be brief.\n<|im_end|>\n"
        "<|im_start|>user\nWhat is 6 · 7?<|im_end|>\n"
        "<|im_start|>assistant\n42<|im_end|>\n"
        "<|im_start|>user\nAnd <b>8 · 9</b>?<|im_end|>\n"
    )
    for source in (CHATML, BUILT_IN["chatml"]):
        template = ChatTemplate(source)
        text = template.render(CHATS["turns"], add_generation_prompt=False)
        assert text == expected
        assert template.render(CHATS["turns"]) == expected + "<|im_start|>assistant\n"


def test_thinking_of_earlier_turns_is_left_out() -> None:
    template = ChatTemplate(QWEN35_STYLE)
    assert template.variables >= {"messages", "tools", "enable_thinking"}
    text = template.render(CHATS["thinking"])
    assert text.count("<think>") == 1
    assert text.endswith("72<|im_end|>\n" + template.render([CHATS["thinking"][-1]]))
    assert template.render(USER).endswith("assistant\n<think>\n")
    assert template.render(USER, reasoning=True) == template.render(USER)
    assert template.render(USER, reasoning=False).endswith("assistant\n<think>\n\n</think>\n\n")
    assert '"name": "product"' in template.render(USER, TOOLS)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("  {% if true %}\na\n  {% endif %}\n", "a\n"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "a & <b>"}'),
        ("{{ 'é' | tojson }}{{ 'é' | tojson(ensure_ascii=true) }}", '"é""\\u00e9"'),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
         "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}", "023"),
        ("{% generation %}{% set a = 1 %}b{% endgeneration %}{{ a is defined }}", "bFalse"),
        ("{{ bos_token }}{{ eos_token }}", "<s>"),
        ("{{ tools is none and documents is none and enable_thinking is not defined }}", "True"),
    ],
)  # fmt: skip
def test_what_a_template_may_use(source: str, text: str) -> None:
    assert render(source, special={"bos_token": "<s>"}) == text


def test_a_template_may_ask_for_the_date() -> None:
    before, year = datetime.now().year, render("{{ strftime_now('%Y') }}")
    assert str(before) <= year <= str(datetime.now().year)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", "line 1: Expected an expression"),
        ("a\n{% for x in y %}", "line 2: Unexpected end of template"),
        ("a\n\n{{ a b }}", "line 3: expected token 'end of print statement', got 'b'"),
        ("{{ x | nothing }}", "line 1: No filter named 'nothing'"),
        ("{% include 'x' %}{% generation %}", "line 1: "),
        ("(" * 20 + "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ""),
    ],
)
def test_templates_that_do_not_parse(source: str, words: str) -> None:
    with pytest.raises(ChatError) as error:
        ChatTemplate(source, "mine")
    assert str(error.value).startswith(f"mine: {words}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles\nmust alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ raise_exception.__globals__['json'] }}", "access to attribute '__globals__'"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "access to attribute '__init__'"),
        ("{{ messages.clear() }}", "access to attribute 'clear' of 'list' object is unsafe"),
        ("{{ messages[0].update(role='x') }}", "access to attribute 'update' of 'dict' object"),
        ("{{ '{0.__class__}'.format(1).x.y }}", "'str object' has no attribute 'x'"),
        ("{% include 'x' %}", "TypeError('no loader for this environment"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError('Range too big"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ none.a.b }}", "'None' has no attribute 'a'"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_templates_that_fail(source: str, words: str) -> None:
    template = ChatTemplate(source, "mine")
    with pytest.raises(ChatError) as error:
        template.render(USER)
    assert str(error.value).startswith(f"mine: {words}")
    assert "\n" not in str(error.value)
    assert USER == [{"role": "user", "content": "a & <b>"}]


@pytest.fixture
def file(tmp_path: Path) -> GGUFFile:
    """A model's file with two templates."""
    values = {"tokenizer.chat_template": "own", "tokenizer.chat_template.tool_use": "tools"}
    write_gguf(tmp_path / "m.gguf", values, [])
    return GGUFFile(tmp_path / "m.gguf")


def test_where_a_template_comes_from(file: GGUFFile, tmp_path: Path) -> None:
    assert find_template(file).render(USER) == "own"
    assert find_template(file, "tool_use").render(USER) == "tools"
    (tmp_path / "t.jinja").write_text("{{ 'é' }}", "utf-8")
    assert find_template(file, str(tmp_path / "t.jinja")).render(USER) == "é"
    expected = "<|im_start|>user\na & <b><|im_end|>\n<|im_start|>assistant\n"
    assert find_template(file, "chatml").render(USER) == expected


def test_a_model_without_a_template(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_gguf(tmp_path / "m.gguf", {}, [])
    with caplog.at_level(logging.WARNING):
        template = find_template(GGUFFile(tmp_path / "m.gguf"))
    assert template.render(USER) == ChatTemplate(BUILT_IN["chatml"]).render(USER)
    (record,) = caplog.records
    assert record.getMessage() == f"{tmp_path / 'm.gguf'} has no chat template: taking chatml"


def test_templates_that_cannot_be_found(file: GGUFFile, tmp_path: Path) -> None:
    def refused(choice: object) -> str:
        with pytest.raises(ChatError) as error:
            find_template(file, str(choice))
        return str(error.value)

    expected = "expected a file or one of chatml, tool_use (No such file or directory)"
    assert refused("nothing") == f"chat template nothing: {expected}"
    assert refused(tmp_path).endswith("(Is a directory)")
    assert "(embedded null byte)" in refused("a\0b")
    (tmp_path / "binary").write_bytes(b"a\xff")
    assert refused(tmp_path / "binary").endswith("expected UTF-8, got byte 0xff at offset 1")
    (tmp_path / "bad").write_text("{% if %}")
    assert "bad: line 1: " in refused(tmp_path / "bad")


# Contents in parts, lists that grow.


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", False),
        ("{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}", False),
        ("{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
         "{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}", True),
        (BUILT_IN["chatml"], False),
        (QWEN35_STYLE, True),
    ],
)  # fmt: skip
def test_templates_that_take_contents_in_parts(source: str, takes: bool) -> None:
    assert ChatTemplate(source).takes_parts == takes


def test_a_template_may_append_to_lists_of_its_own() -> None:
    """Kimi-K2's does; what the caller gave stays as it was."""
    source = (
        "{% set seen = [] %}{% for m in messages %}{% set _ = seen.append(m.role) %}"
        "{% set _ = m.content.append({'type': 'text', 'text': 'x'}) %}{% endfor %}"
        "{{ seen | join('+') }}{% for p in messages[0].content %}{{ p.text }}{% endfor %}"
    )
    messages = [{"role": "user", "content": parts("a")}, {"role": "tool", "content": parts("b")}]
    kept = copy.deepcopy(messages)
    for _ in range(2):
        assert ChatTemplate(source).render(messages) == "user+toolax"
    assert messages == kept


def test_messages_that_hold_themselves() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    both: list[Any] = [[{"role": "user", "content": cycle}], cycle]
    for given in both:
        with pytest.raises(ChatError, match="hold themselves"):
            ChatTemplate("{{ messages }}").render(given)


def test_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    key = "tokenizer.chat_template"
    both = {key: "plain", f"{key}.tool_use": "{{ tools[0].n }}"}
    with Engine.load(write_model(tmp_path / "m", "tiny", overrides=both)) as engine:
        user = [{"role": "user", "content": "a"}]
        assert engine.encode_chat(user) == engine.tokenizer.encode("plain")
        assert engine.encode_chat(user, tools=[{"n": "now"}]) == engine.tokenizer.encode("now")


@pytest.mark.parametrize(
    "source",
    [
        "{% break %}",
        "{% continue %}",
        "{% for a in b %}" * 21 + "{% endfor %}" * 21,
        "{{ " + "(" * 999,
    ],
)
def test_a_template_that_makes_no_program_is_refused(source: str) -> None:
    with pytest.raises(ChatError, match=r"^chat template: "):
        ChatTemplate(source)


@pytest.mark.parametrize("text", ["\x1b[2Jgone\x07", "a\u202eb", "x" * 10**6])
def test_what_a_template_raises_is_safe_to_print(text: str) -> None:
    template = ChatTemplate("{{ raise_exception(messages[0].content) }}")
    with pytest.raises(ChatError) as raised:
        template.render([{"role": "user", "content": text}])
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 350
    with pytest.raises(ChatError, match=r"chat template: .*digits"):
        ChatTemplate("{{ 10**5000 }}").render([])


# What a model wrote.


@pytest.mark.parametrize(
    ("sampled", "rendered"),
    [
        (Sampled(" a\n"), "<think>\n\n</think>\n\n a\n"),
        (Sampled("Hm.</think>  a ", 11), "<think>\nHm.</think>  a "),
        (Sampled("\n<think>Hm.</think>a", 20), "\n<think>Hm.</think>a"),
        (Sampled("Hm.\n</think>\n\na\n", 12), "<think>\nHm.\n</think>\n\na\n"),
        (Sampled("Hm. a", 5), "<think>\nHm. a"),
        (Sampled("a", 0), "<think>\na"),
    ],
)
def test_what_was_sampled_is_rendered_exactly(sampled: Sampled, rendered: str) -> None:
    template = ChatTemplate(QWEN35_STYLE)
    messages = [*USER, {"role": "assistant", "content": sampled}]
    kept = copy.deepcopy(messages)
    text = template.render(messages, add_generation_prompt=False)
    assert text.endswith(f"assistant\n{rendered}<|im_end|>\n")
    # In the next turn without its thinking.
    text = template.render([*messages, *messages], add_generation_prompt=False)
    after = sampled[sampled.n_thinking or 0 :].lstrip("\n")
    assert text.count("<think>") == 1
    assert f"assistant\n{after}<|im_end|>\n<|im_start|>user" in text
    assert text.endswith(f"assistant\n{rendered}<|im_end|>\n")
    assert messages == kept
    # A template without thinking has all but that.
    text = ChatTemplate(CHATML).render(messages, add_generation_prompt=False)
    assert text.endswith(f"assistant\n{after}<|im_end|>\n")


def test_variables() -> None:
    source = "{{ enable_thinking }} {{ documents }} {{ more | tojson }}"
    text = render(source, template_kwargs={"enable_thinking": False, "more": {"a": [1.5, None]}})
    assert text == 'False None {"a": [1.5, null]}'
    more = {"documents": 1, "more": 2}
    assert render(source, reasoning=True, template_kwargs=more) == "True 1 2"
