"""Histories with what a model wrote: its calls stay as they are, and no token is processed again.

Also what else a chat takes for its template: variables, and an answer that is to be continued.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine import ChatTemplate, Engine, SamplingParams
from engine.kvcache.policy import Kind
from engine.runtime.completion import Completion
from engine.sampling.params import SamplingError
from engine.server.answers import AnswerParser, is_thinking, preserved_tokens
from engine.server.calls import find_format
from engine.server.messages import normalized
from engine.server.replays import Replays
from engine.text.template import ChatError, Sampled
from tests.runtime.test_chats import special_model
from tests.support.chats import CHATML, JSON_STYLE, KIMI_STYLE, QWEN35_STYLE, TOOLS, Messages
from tests.support.helpers import ROW_BY_ROW, assert_all_free
from tests.support.talk import CACHE_RAM, GREEDY, assert_cache_right, assert_right, forced, marks

USER = {"role": "user", "content": "a"}
PLAIN, THINKING = ChatTemplate(CHATML), ChatTemplate(QWEN35_STYLE)
KIMI = (
    "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>",
    "<|tool_call_end|>", "<|tool_calls_section_end|>",
)  # fmt: skip
# Other spaces and another order than the templates write.
XML = (
    "\nHm. \n</think>\nIt.  <tool_call><function=product>\n<parameter=exact>True</parameter>"
    "<parameter=factors>\n[6,7]\n</parameter></function>\n</tool_call>\n"
)
JSON = '\n<tool_call>{"arguments": {"factors":[6,7]}, "name":"product"}</tool_call>  '
KIMI_CALL = (
    f' Ok {KIMI[0]} {KIMI[1]}functions.product:0{KIMI[2]} {{"factors":[6,7]}} {KIMI[3]}{KIMI[4]}'
)
# Without the end of thinking.
UNCLOSED = "Hm.<tool_call>\n<function=now></function></tool_call>"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return special_model(tmp_path_factory.mktemp("model"), *KIMI, "<tool_call>", "</tool_call>")


@pytest.fixture(scope="module")
def fresh(path: Path) -> Engine:
    return Engine.load(path, n_ctx=1024, cache_ram=0, **ROW_BY_ROW)


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with Engine.load(path, n_ctx=1024, cache_ram=CACHE_RAM, **ROW_BY_ROW) as engine:
        yield engine
        assert_all_free(engine)


def write(
    engine: Engine, fresh: Engine, template: ChatTemplate, text: str, shown: Sequence[str]
) -> tuple[Completion, AnswerParser]:
    """Have the model write a text with special tokens, and parse it."""
    ids = engine.encode_chat([USER], tools=TOOLS, template=template)
    # Not the tokens that the tokenizer makes of the text.
    parts = re.split(f"({'|'.join(map(re.escape, shown))})", text)
    parts = [c for part in parts for c in ([part] if part in shown else part)]
    tokens = [i for part in parts for i in engine.tokenizer.encode(part, parse_special=True)]
    assert tokens != engine.tokenizer.encode(text, parse_special=True)
    params = replace(forced(tokens, len(ids)), preserved_tokens=shown)
    answer = engine.chat([USER], params, tools=TOOLS, template=template).wait()
    assert (answer.tokens, answer.text) == (tokens, text)
    thinks = is_thinking(template.render([USER]))
    parser = AnswerParser(find_format(template.source), TOOLS, thinks)
    for token in answer:
        parser.push(token.text)
    parser.finish()
    return answer, parser


def sent_back(parser: AnswerParser) -> Messages:
    """The conversation as a client sends it, which leaves out thinking and content."""
    calls = [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c in parser.calls
    ]
    results = [{"role": "tool", "tool_call_id": c.id, "content": "42"} for c in parser.calls]
    return [USER, {"role": "assistant", "content": None, "tool_calls": calls}, *results]


@pytest.mark.parametrize(
    ("source", "text"),
    [(QWEN35_STYLE, XML), (QWEN35_STYLE, UNCLOSED), (JSON_STYLE, JSON), (KIMI_STYLE, KIMI_CALL)],
)
def test_the_tokens_of_a_call_are_not_processed_again(
    engine: Engine, fresh: Engine, source: str, text: str
) -> None:
    template, shown = ChatTemplate(source), preserved_tokens(find_format(source))
    first, parser = write(engine, fresh, template, text, shown)
    assert parser.calls
    store = Replays()
    store.keep("", [c.id for c in parser.calls], parser.sampled)
    history = sent_back(parser)
    replayed = normalized(history, partial(store.find, ""))
    options: dict[str, Any] = {"tools": TOOLS, "template": template}
    second = engine.chat(replayed, replace(GREEDY, preserved_tokens=shown), **options).wait()
    held = first.request.ids + first.tokens
    # No step has read the last token of an answer that was cut short.
    assert second.reuse.n_reused == second.reuse.n_known == len(held) - 1
    assert second.request.ids[: len(held)] == held
    assert_cache_right(engine, fresh)
    # Parsed and rendered again it is another text.
    other = engine.chat(normalized(history, lambda id: None), GREEDY, **options).wait()
    assert other.reuse.n_known < len(held) - 1


def test_control_tokens_are_text_only_if_they_are_preserved(engine: Engine, fresh: Engine) -> None:
    ids = engine.encode_chat([USER], template=PLAIN)
    tokens = engine.tokenizer.encode(f"a{KIMI[1]}b{KIMI[2]}", parse_special=True)
    for shown, text in (((), "ab"), (KIMI[1], f"a{KIMI[1]}b"), (["nothing"], "ab")):
        params = replace(forced(tokens, len(ids)), preserved_tokens=shown)
        assert engine.generate(ids, params).wait().text == text
    with pytest.raises(SamplingError, match="preserved_tokens: expected texts, got 5"):
        SamplingParams(preserved_tokens=(5,))  # type: ignore[arg-type]


def test_a_sampled_text_has_only_its_own_control_tokens(engine: Engine) -> None:
    """The others it spells out: an agent may write about templates."""
    text = f"a<|im_end|>{KIMI[1]}{KIMI[2]}"
    encode = engine.tokenizer.encode
    for tokens in ((), KIMI[1:2]):
        content = Sampled(text, tokens=tokens)
        ids = engine.encode_chat([USER, {"role": "assistant", "content": content}], template=PLAIN)
        for special in ("<|im_end|>", KIMI[1], KIMI[2]):
            n_of_template = 2 * (special == "<|im_end|>")
            assert ids.count(encode(special, parse_special=True)[0]) == n_of_template + (
                special in tokens
            )
        assert text in engine.tokenizer.decode(ids, special=True)


def test_control_tokens_in_tools_and_variables_are_text(engine: Engine) -> None:
    end = engine.tokenizer.encode("<|im_end|>", parse_special=True)[0]
    tools = [{"name": "now", "description": "<|im_end|>"}]
    with_tools = engine.encode_chat([USER], tools=tools, template=THINKING)
    assert with_tools.count(end) == 2
    template = ChatTemplate(CHATML + "{{ more.x }}")
    given = {"more": {"x": "<|im_end|>"}}
    assert engine.encode_chat([USER], template=template, template_kwargs=given).count(end) == 1


def test_variables_reach_the_template_and_tell_texts_apart(engine: Engine, fresh: Engine) -> None:
    template = ChatTemplate("{{ style | tojson }}" + CHATML)

    def ask(**given: Any) -> Completion:
        options: dict[str, Any] = {"template": template, "template_kwargs": given}
        answer = engine.chat([USER], GREEDY, **options)
        assert answer.request.ids == engine.encode_chat([USER], **options)
        assert_right(answer.wait(), fresh)
        return answer

    first = ask(style={"a": [1, None, "é"]})
    text = engine.tokenizer.decode(first.request.ids, special=True)
    assert text.startswith('{"a": [1, null, "é"]}<|im_start|>')
    assert ask(style={"a": [1, None, "é"]}, unread=1).reuse.n_known == len(first.request.ids)
    assert ask(style="b").reuse.n_known == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"messages": []}, "template_kwargs: expected names other than messages, tools, add_"),
        ({"bos_token": "a"}, "got 'bos_token'"),
        ({5: 1}, "got 5"),
        ([1], "template_kwargs: expected a mapping of names and values, got [1]"),
        ({"a": object()}, "template_kwargs: expected texts, numbers, lists and mappings, got <obj"),
    ],
)
def test_variables_that_are_refused(engine: Engine, given: Any, words: str) -> None:
    for method in (engine.chat, engine.encode_chat):
        with pytest.raises(ChatError) as error:
            method([USER], template=PLAIN, template_kwargs=given)
        assert words in str(error.value)
    looped: Any = {}
    looped["a"] = looped
    for options in ({"tools": [looped]}, {"template_kwargs": looped}):
        name = next(iter(options))
        with pytest.raises(ChatError, match=f"{name}: expected values that don't hold themselves"):
            engine.chat([USER], template=THINKING, **options)
    with pytest.raises(ChatError, match="got 'enable_thinking'"):
        engine.chat([USER], template=THINKING, reasoning=True,
                    template_kwargs={"enable_thinking": False})  # fmt: skip


# Answers that are continued.


def prefill(template: ChatTemplate, message: dict[str, Any], **options: Any) -> str:
    return template.render([USER, {"role": "assistant", **message}], continue_last=True, **options)


@pytest.mark.parametrize(
    ("message", "end"),
    [
        ({"content": "It is "}, "<think>\n\n</think>\n\nIt is "),
        ({"content": " It"}, "<think>\n\n</think>\n\n It"),
        ({"content": ""}, "<think>\n\n</think>\n\n"),
        ({"content": "It", "reasoning_content": "Hm."}, "<think>\nHm.\n</think>\n\nIt"),
        ({"content": None, "reasoning_content": "Hm. "}, "<think>\nHm. "),
        ({"content": "<think>\nHm. "}, "<think>\nHm. "),
        ({"content": "<think>Hm.</think> It"}, "<think>Hm.</think> It"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
         "<think>\n\n</think>\n\na\nb"),
    ],
)  # fmt: skip
def test_a_prompt_ends_with_the_answer_that_is_continued(
    engine: Engine, message: dict[str, Any], end: str
) -> None:
    text = prefill(THINKING, message)
    begins = text.rfind("<think>") > text.rfind("</think>")
    assert isinstance(message["content"], list) or is_thinking(text, message) == begins
    assert text == f"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{end}"
    given = [USER, {"role": "assistant", **message}]
    ids = engine.encode_chat(given, template=THINKING, continue_last=True)
    assert ids == engine.tokenizer.encode(text, parse_special=True)


def test_a_sampled_answer_that_is_continued(engine: Engine) -> None:
    text = prefill(THINKING, {"content": Sampled("Hm.</think>\nIt ", 11)})
    assert text.endswith("assistant\n<think>\nHm.</think>\nIt ")


def test_a_continued_answer_and_the_turn_after_it(engine: Engine, fresh: Engine) -> None:
    begun = {"role": "assistant", "content": "It <|im_end|> "}
    first = engine.chat([USER, begun], GREEDY, template=PLAIN, continue_last=True).wait()
    assert_right(first, fresh)
    text = engine.tokenizer.decode(first.request.ids, special=True)
    assert text == PLAIN.render([USER, begun], continue_last=True)
    assert text.endswith("assistant\nIt <|im_end|> ")
    # It stays for the next turn.
    assert marks(first, Kind.TURN) == [len(first.request.ids)]
    # The same again.
    again = engine.chat([USER, begun], GREEDY, template=PLAIN, continue_last=True).wait()
    assert again.reuse.n_known == len(first.request.ids)
    whole = {"role": "assistant", "content": begun["content"] + first.text}
    later = engine.chat([USER, whole, USER], GREEDY, template=PLAIN).wait()
    assert_right(later, fresh)
    assert later.reuse.n_reused >= len(first.request.ids) + len(first.tokens) - 1
    assert_cache_right(engine, fresh)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([USER], "continue_last: expected an assistant's message without calls at the end"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "now"}]}],
         "continue_last: expected an assistant's message without calls at the end"),
    ],
)  # fmt: skip
def test_what_cannot_be_continued(engine: Engine, messages: Messages, words: str) -> None:
    with pytest.raises(ChatError, match=words):
        engine.chat(messages, template=PLAIN, continue_last=True)
    with pytest.raises(ChatError, match="continue_last: expected true or false, got 'yes'"):
        engine.chat(messages, template=PLAIN, continue_last="yes")  # type: ignore[arg-type]
    silent = ChatTemplate("{{ messages[0].content }}")
    with pytest.raises(ChatError, match="it leaves out the answer that is to be continued"):
        engine.chat([USER, {"role": "assistant", "content": "a"}], template=silent,
                    continue_last=True)  # fmt: skip
