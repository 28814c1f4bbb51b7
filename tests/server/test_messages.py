"""Messages as clients send them, and what templates get of them."""

from __future__ import annotations

import copy
import json
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.server.answers import AnswerParser
from engine.server.calls import Call, find_format
from engine.server.messages import MessageError, normalized
from engine.server.replays import Replay, Replays
from engine.text.template import ChatTemplate, Sampled
from tests.support.chats import QWEN35_STYLE, TOOLS

USER: dict[str, Any] = {"role": "user", "content": "a"}


def made(*messages: Any, replay: Replay | None = None) -> Any:
    return normalized(messages, lambda id: replay if replay and id == "i" else None)


def answer(*calls: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [*calls], **more}


def call(id: Any = "i", name: str = "f", arguments: Any = "{}") -> dict[str, Any]:
    return {"type": "function", "id": id, "function": {"name": name, "arguments": arguments}}


def result(id: Any, content: Any = "r", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content, **more}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (USER | {"name": "Anna", "cache_control": {"type": "x"}, "extra": None}, USER),
        ({"role": "user", "content": None}, {"role": "user", "content": ""}),
        ({"role": "user"}, {"role": "user", "content": ""}),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        ({"role": "user", "content": parts("a", "b")}, {"role": "user", "content": "a\nb"}),
        ({"role": "user", "content": ["a", {"type": "input_text", "text": "b"}]},
         {"role": "user", "content": "a\nb"}),
        ({"role": "user", "content": [{"type": "text", "text": None}]},
         {"role": "user", "content": ""}),
        ({"role": "developer", "content": "s"}, {"role": "system", "content": "s"}),
        ({"role": "system", "content": ""}, {"role": "system", "content": ""}),
        ({"role": "assistant", "content": None, "tool_calls": None, "function_call": None},
         {"role": "assistant", "content": ""}),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
         {"role": "assistant", "content": "no"}),
        ({"role": "assistant", "content": "a", "tool_calls": []},
         {"role": "assistant", "content": "a"}),
        ({"role": "assistant", "content": "a", "reasoning": "r"},
         {"role": "assistant", "content": "a", "reasoning_content": "r"}),
        ({"role": "assistant", "content": "a", "reasoning_content": "r", "reasoning": "x"},
         {"role": "assistant", "content": "a", "reasoning_content": "r"}),
        ({"role": "assistant", "content": "a", "reasoning": None},
         {"role": "assistant", "content": "a"}),
    ],
)  # fmt: skip
def test_one_message(message: dict[str, Any], expected: dict[str, Any]) -> None:
    given_before = copy.deepcopy(message)
    assert made(message) == [expected]
    assert message == given_before


def test_system_messages_are_merged_at_the_front() -> None:
    system = [{"role": role, "content": role[0]} for role in ("system", "developer", "system")]
    merged = {"role": "system", "content": "s\n\nd\n\ns"}
    assert made(*system, USER) == [merged, USER]
    assert made(system[0], USER, system[1], USER, system[2]) == [merged, USER, USER]
    assert made(USER, {"role": "system", "content": ""}, system[1]) == [
        {"role": "system", "content": "d"}, USER,
    ]  # fmt: skip
    # So a template that wants it there takes it.
    ChatTemplate(QWEN35_STYLE).render(made(USER, *system))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": [1]}', {"a": [1]}), ({"a": 1}, {"a": 1}), ("", {}), (" ", {}), (None, {}),
        ('{"a"', {"input": '{"a"'}), ("[1]", {"input": "[1]"}), ("5", {"input": "5"}),
        ("[" * 10**5, {"input": "[" * 10**5}),
    ],
)  # fmt: skip
def test_arguments_become_objects(arguments: Any, expected: dict[str, Any]) -> None:
    (message,) = made(answer(call(arguments=arguments)))
    assert message == answer(call(arguments=expected), content="")
    ChatTemplate(QWEN35_STYLE).render([USER, message])


def test_calls_of_other_forms() -> None:
    without_id = {"function": {"name": "f"}}
    assert made(answer(without_id, without_id))[0]["tool_calls"] == [
        call("call_0", arguments={}), call("call_1", arguments={}),
    ]  # fmt: skip
    custom = {"type": "custom", "id": "i", "custom": {"name": "f", "input": "x = 1"}}
    assert made(answer(custom))[0]["tool_calls"] == [call(arguments={"input": "x = 1"})]


def test_the_old_protocol_of_functions() -> None:
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    returned = {"role": "function", "name": "f", "content": "r"}
    assert made(USER, old, returned, old, returned) == [
        USER,
        answer(call("call_0", arguments={}), content=""), result("call_0"),
        answer(call("call_1", arguments={}), content=""), result("call_1"),
    ]  # fmt: skip


def ids(*messages: Any) -> list[str]:
    return [m["tool_call_id"] for m in made(*messages) if m["role"] == "tool"]


def test_results_come_in_the_order_of_their_calls() -> None:
    calls = answer(call("a"), call("b"), call("c"))
    assert ids(calls, result("c"), result("a"), result("b")) == ["a", "b", "c"]
    # One call has none; one has two.
    assert ids(calls, result("c"), result("a"), result("c")) == ["a", "c", "c"]
    # Not across other messages.
    assert ids(calls, result("c"), USER, result("a")) == ["c", "a"]
    # An id that comes again, as Kimi's do, is that of the call before it.
    again = answer(call("b"), call("a"))
    turns = [calls, result("b"), result("a"), again, result("a"), result("b")]
    assert ids(*turns) == ["a", "b", "b", "a"]
    # Of an earlier answer.
    assert ids(answer(call("a")), answer(call("b")), result("b"), result("a")) == ["a", "b"]


def test_results_without_an_id_are_matched_by_name_or_order() -> None:
    calls = answer(call("a", "f"), call("b", "g"))
    assert ids(calls, result("", name="g"), result("", name="f")) == ["a", "b"]
    assert ids(calls, result(""), result("")) == ["a", "b"]
    assert [m["content"] for m in made(calls, result("", "1"), result("", "2"))[1:]] == ["1", "2"]


def test_results_whose_calls_were_dropped_are_taken() -> None:
    assert ids(USER, result("x"), answer(call("a")), result("a")) == ["x", "a"]


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        ([], "messages", "expected a list of messages, got ()"),
        (["a"], "messages[0]", "expected a message with a role and a content, got 'a'"),
        ([USER, {"content": "a"}], "messages[1].role", "got None"),
        ([{"role": "robot", "content": "a"}], "messages[0].role",
         "expected one of system, developer, user, assistant, tool, function, got 'robot'"),
        ([{"role": ["user"], "content": "a"}], "messages[0].role", "got ['user']"),
        ([{"role": "user", "content": 5}], "messages[0].content", "expected a text, or a list"),
        ([{"role": "user", "content": {"a": 1}}], "messages[0].content", "expected a text, or a"),
        ([{"role": "user", "content": [5]}], "messages[0].content[0]", "a part with a type, got 5"),
        ([USER, {"role": "user", "content": [*parts("a"), {"type": "image_url", "image_url": {}}]}],
         "messages[1].content[1]", "expected a part of type text, got 'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}],
         "messages[0].content[0].text", "expected a text, got 5"),
        ([answer(5)], "messages[0].tool_calls[0]", "expected a call with a function and its name"),
        ([answer({"function": {}})], "messages[0].tool_calls[0]", "a function and its name"),
        ([answer(tool_calls="a")], "messages[0].tool_calls", "expected a list of calls, got 'a'"),
        ([answer(call(arguments=5))], "messages[0].tool_calls[0].arguments", "a JSON text, got 5"),
        ([answer(call(5))], "messages[0].tool_calls[0].id", "expected a text, got 5"),
        ([answer(reasoning=5)], "messages[0].reasoning_content", "expected a text, got 5"),
        ([answer(call("a")), result("b")], "messages[1].tool_call_id",
         "expected the id of a call before it (a), got 'b'"),
        ([result(5)], "messages[0].tool_call_id", "expected a text, got 5"),
        ([{"role": "assistant", "function_call": "f"}], "messages[0].function_call", "its name"),
    ],
)  # fmt: skip
def test_refused(messages: list[Any], param: str, words: str) -> None:
    with pytest.raises(MessageError) as error:
        made(*messages)
    assert error.value.param == param
    assert str(error.value).startswith(f"{param}: expected ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(
        ["user", "assistant", "tool", "system", "text", "a", "{}", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "tool_calls", "function", "name", "arguments", "id",
                         "tool_call_id", "type", "text", "function_call", "reasoning", "custom"]),
        inner, max_size=6),
    max_leaves=20,
)  # fmt: skip
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "function", "system"])},
    optional=dict.fromkeys(
        ("content", "tool_calls", "tool_call_id", "function_call", "name"), _JSON
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_MESSAGE, max_size=4) | st.lists(_JSON, max_size=3))
def test_any_json_is_taken_or_refused_in_one_line(messages: Any) -> None:
    taken: list[dict[str, Any]] = []
    refusal = ""
    try:
        taken = normalized(messages, lambda id: None)
    except MessageError as error:
        refusal = str(error)
    assert bool(taken) != bool(refusal)
    assert "\n" not in refusal
    known = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id"}
    assert all(set(m) <= known and isinstance(m["content"], str) for m in taken)


# What was sampled.


def replay(text: str = "Hm.</think>It.\n<x>", content: str = "It.") -> Replay:
    return Replay(text, 11, content=content, calls=[Call("i", "f", '{"a": 1, "b": 2}')])


def test_an_answer_comes_back_as_it_was_sampled() -> None:
    kept = replay()
    for content in ("It.", " It.\n", None, ""):
        for arguments in ('{"a": 1, "b": 2}', '{"b":2,"a":1}', {"b": 2, "a": 1}):
            message = answer(call(arguments=arguments), content=content, reasoning="Hm.")
            (got,) = made(message, replay=kept)
            assert got == {"role": "assistant", "content": kept}
            assert isinstance(got["content"], Sampled)
            # Its results are known.
            assert ids(message, result("i")) == ["i"]


@pytest.mark.parametrize(
    "message",
    [
        answer(call(arguments='{"a": 1, "b": 3}'), content="It."),
        answer(call(name="g", arguments='{"a": 1, "b": 2}'), content="It."),
        answer(call(arguments='{"a": 1, "b": 2}'), content="It was changed."),
        answer(call(arguments='{"a": 1, "b": 2}'), call("j"), content="It."),
        answer(call("j", arguments='{"a": 1, "b": 2}'), content="It."),
    ],
)
def test_an_answer_that_was_changed_counts_as_it_is(message: dict[str, Any]) -> None:
    """Or is another one: Kimi's ids come in each conversation."""
    assert made(message, replay=replay()) == made(message)


def test_a_sampled_answer_renders_exactly() -> None:
    """Where parsing and rendering again gives another text."""
    template = ChatTemplate(QWEN35_STYLE)
    prompt = template.render([USER], TOOLS)
    text = (
        "\nHm. \n</think>\nIt.  <tool_call><function=product>\n<parameter=exact>True</parameter>"
        "<parameter=factors>\n[6,7]\n</parameter></function>\n</tool_call>\n"
    )
    parser = AnswerParser(find_format(QWEN35_STYLE), TOOLS, True)
    parser.push(text)
    parser.finish()
    (found,) = parser.calls
    store = Replays()
    store.keep("key", [found.id], parser.sampled)
    back = answer(call(found.id, found.name, found.arguments), content="It.")
    history = [USER, back, result(found.id)]
    replayed = normalized(history, lambda id: store.find("key", id))
    assert template.render(replayed, TOOLS).startswith(prompt + text + "<|im_end|>")
    # In the next turn the template leaves out the thinking.
    later = template.render([*replayed, {"role": "assistant", "content": "42"}, USER], TOOLS)
    assert text[text.index("It.") :] + "<|im_end|>" in later
    assert "Hm." not in later
    # Without it the text is another one.
    assert prompt + text[:20] not in template.render(made(*history), TOOLS)
    assert json.loads(found.arguments) == {"exact": "True", "factors": [6, 7]}


def test_replays_are_bounded_and_of_their_key() -> None:
    one, n_bytes = replay("x" * 1000), replay("x" * 1000).n_bytes
    store = Replays(3 * n_bytes)
    store.keep("k", ["a"], one)
    store.keep("k", ["b", "c"], one)
    assert store.find("k", "a") is one
    assert store.find("other", "a") is None
    store.keep("k", ["d"], one)  # In place of b, which was not used.
    assert [store.find("k", id) is one for id in "abcd"] == [True, False, True, True]
    # An id that comes again has its last text, and counts once.
    other = replay("y" * 1000)
    for _ in range(5):
        store.keep("k", ["a"], other)
    assert store.find("k", "a") is other
    assert store.find("k", "c") is one
    store.keep("k", ["e"], replay("x" * 4 * n_bytes))
    assert store.find("k", "e") is None
    store.keep("k", ["f"], one)
    assert store.find("k", "f") is one


def test_replays_by_many_threads() -> None:
    store = Replays(20 * replay().n_bytes)

    def work(n: int) -> None:
        for i in range(300):
            store.keep(f"k{n % 2}", [f"{i % 30}"], replay())
            store.find(f"k{n % 2}", f"{(i + n) % 30}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    n_kept = sum(store.find(f"k{n}", str(i)) is not None for n in range(2) for i in range(30))
    assert n_kept == 20
