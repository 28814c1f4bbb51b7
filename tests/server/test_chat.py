"""/v1/chat/completions: chunks and objects, thinking, calls, choices, log probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.server.chat import Shared
from engine.text.template import ChatTemplate
from tests.server.conftest import Connect, message_of
from tests.support.scripted import Script

PATH = "/v1/chat/completions"
USER = {"messages": [{"role": "user", "content": "hi"}]}
TEMPLATE = Path(__file__).parents[1] / "support" / "templates" / "qwen35_style.jinja"
TOOLS = [
    {"type": "function", "function": {
        "name": "add", "description": "Adds.",
        "parameters": {"type": "object", "properties": {
            "a": {"type": "integer"}, "b": {"type": "integer"}}}}}
]  # fmt: skip
CALL = (
    "<tool_call>\n<function=add>\n<parameter=a>\n%d\n</parameter>\n<parameter=b>\n2\n"
    "</parameter>\n</function>\n</tool_call>"
)


def with_template() -> Shared:
    return Shared("m", template=ChatTemplate(TEMPLATE.read_text()))


def events(response: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, whose form is checked, without [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert len({c["id"] for c in chunks}) == 1
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    return chunks


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The message that a client puts together of a stream, with its `finish_reason`."""
    made: dict[str, Any] = {"calls": {}}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            assert "finish_reason" not in made, "a chunk after the last one"
            delta = choice["delta"]
            for key in ("role", "content", "reasoning_content"):
                if key in delta:
                    made[key] = made.get(key, "") + delta[key]
            for call in delta.get("tool_calls", ()):
                own = made["calls"].setdefault(call["index"], {"arguments": ""})
                own["arguments"] += call["function"]["arguments"]
                if "id" in call:
                    own |= {"id": call["id"], "name": call["function"]["name"]}
            if choice["finish_reason"]:
                made["finish_reason"] = choice["finish_reason"]
    return made


def test_an_object(connect: Connect) -> None:
    client = connect(Script("Hello there."), Shared("the-model"))
    body = client.post(PATH, json=USER | {"model": "gpt-4o"}).json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "the-model"
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there."}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    n_prompt = body["usage"]["prompt_tokens"]
    n = len(client.post("/tokenize", json={"content": "Hello there."}).json()["tokens"])
    assert body["usage"] == {
        "prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    timings = body["timings"]
    assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (0, n_prompt, n)
    assert timings["predicted_per_second"] == pytest.approx(n / timings["predicted_ms"] * 1e3)
    assert timings["reuse"] == f"reused 0 of {n_prompt} tokens (it is scripted)"


def test_a_stream(connect: Connect) -> None:
    client = connect(Script("Hello there."))
    chunks = events(client.post(PATH, json=USER | {"stream": True}))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(chunks) == {
        "role": "assistant", "content": "Hello there.", "finish_reason": "stop", "calls": {}
    }  # fmt: skip
    assert all("usage" not in c for c in chunks)
    assert chunks[-1]["timings"]["predicted_n"] > 1


def test_the_usage_of_a_stream_comes_last_and_alone(connect: Connect) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(connect().post(PATH, json=USER | options))
    assert [c["usage"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 1
    assert chunks[-1]["timings"]["prompt_n"] == chunks[-1]["usage"]["prompt_tokens"]


def test_choices_are_streamed_together(connect: Connect) -> None:
    client = connect(Script("a b"))
    chunks = events(client.post(PATH, json=USER | {"n": 3, "stream": True}))
    for index in range(3):
        assert joined(chunks, index)["content"] == "a b"
    body = client.post(PATH, json=USER | {"n": 3}).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert body["usage"]["prompt_tokens"] == body["timings"]["prompt_n"] / 3


def test_limits_and_stops(connect: Connect) -> None:
    client = connect(Script("one two three four"))
    for limit in ("max_tokens", "max_completion_tokens", "n_predict"):
        body = client.post(PATH, json=USER | {limit: 2}).json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 2
    for stop in (" three", [" three"], ["", " three", "zzz"]):
        for streams in (False, True):
            response = client.post(PATH, json=USER | {"stop": stop, "stream": streams})
            if streams:
                found = joined(events(response))
                assert (found["content"], found["finish_reason"]) == ("one two", "stop")
            else:
                (choice,) = response.json()["choices"]
                assert choice["message"]["content"] == "one two"
                assert choice["finish_reason"] == "stop"


def test_without_a_limit_an_answer_gets_its_share_of_the_context(connect: Connect) -> None:
    script = Script("a ", is_endless=True)
    body = connect(script, n_parallel=16).post(PATH, json=USER).json()
    assert body["usage"]["completion_tokens"] == 2048 // 16
    shared = Shared("m", defaults={"max_tokens": 5})
    body = connect(script, shared, n_parallel=16).post(PATH, json=USER).json()
    assert body["usage"]["completion_tokens"] == 5


def test_logprobs(connect: Connect) -> None:
    client, ask = connect(Script("é☃ a")), USER | {"logprobs": True, "top_logprobs": 2}
    (choice,) = client.post(PATH, json=ask).json()["choices"]
    content = choice["logprobs"]["content"]
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == "é☃ a"
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["top_logprobs"][1]["logprob"] == -1.5
    chunks = events(client.post(PATH, json=ask | {"stream": True}))
    told = [c["choices"][0]["logprobs"]["content"] for c in chunks
            if c["choices"][0].get("logprobs")]  # fmt: skip
    assert [entry for entries in told for entry in entries] == content
    (plain,) = client.post(PATH, json=USER | {"logprobs": True}).json()["choices"]
    assert plain["logprobs"]["content"][0]["top_logprobs"] == []


# Thinking and calls.


@pytest.mark.parametrize("streams", [False, True])
def test_thinking_is_no_content(connect: Connect, streams: bool) -> None:
    client = connect(Script("Hm, so.\n</think>\n\nYes."), with_template())
    response = client.post(PATH, json=USER | {"stream": streams})
    found = joined(events(response)) if streams else response.json()["choices"][0]["message"]
    assert (found["reasoning_content"], found["content"]) == ("Hm, so.", "Yes.")


def test_who_asks_for_no_effort_gets_no_thinking(connect: Connect) -> None:
    prompts: list[str] = []

    def script(prompt: str) -> Script:
        prompts.append(prompt)
        return Script("Yes.")

    client = connect(script, with_template())
    for more in (
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        body = client.post(PATH, json=USER | more).json()
        assert body["choices"][0]["message"] == {"role": "assistant", "content": "Yes."}
        assert prompts.pop().endswith("</think>\n\n")
    client.post(PATH, json=USER)
    assert prompts.pop().rstrip().endswith("<think>")


@pytest.mark.parametrize("streams", [False, True])
def test_calls(connect: Connect, streams: bool) -> None:
    text = f"Let me see.\n</think>\n\nI add.\n\n{CALL % 1}\n{CALL % 7}"
    client = connect(Script(text), with_template())
    response = client.post(PATH, json=USER | {"tools": TOOLS, "stream": streams})
    if streams:
        found = joined(events(response))
        calls = [found["calls"][i] for i in range(2)]
        reason = found["finish_reason"]
    else:
        (choice,) = response.json()["choices"]
        found, reason = choice["message"], choice["finish_reason"]
        calls = [{"id": c["id"], **c["function"]} for c in found["tool_calls"]]
        assert {c["type"] for c in found["tool_calls"]} == {"function"}
    assert reason == "tool_calls"
    assert (found["reasoning_content"], found["content"]) == ("Let me see.", "I add.")
    assert [(c["name"], json.loads(c["arguments"])) for c in calls] == [
        ("add", {"a": 1, "b": 2}), ("add", {"a": 7, "b": 2})
    ]  # fmt: skip
    assert len({c["id"] for c in calls}) == 2


def test_arguments_come_while_they_are_generated(connect: Connect) -> None:
    client = connect(Script(f"</think>\n\n{CALL % 1}"), with_template())
    chunks = events(client.post(PATH, json=USER | {"tools": TOOLS, "stream": True}))
    deltas = [c["choices"][0]["delta"].get("tool_calls") for c in chunks]
    calls = [d[0] for d in deltas if d]
    assert calls[0]["function"] == {"name": "add", "arguments": ""}
    assert len(calls) >= 3
    assert all("id" not in call for call in calls[1:])


@pytest.mark.parametrize("streams", [False, True])
def test_one_call_at_a_time_where_that_is_asked_for(connect: Connect, streams: bool) -> None:
    text = f"</think>\n\n{CALL % 1}\n{CALL % 7}"
    client = connect(Script(text, is_endless=True, token_s=0.001), with_template())
    ask = {"tools": TOOLS, "parallel_tool_calls": False, "stream": streams}
    response = client.post(PATH, json=USER | ask)
    if streams:
        found = joined(events(response))
        assert (len(found["calls"]), found["finish_reason"]) == (1, "tool_calls")
        assert json.loads(found["calls"][0]["arguments"]) == {"a": 1, "b": 2}
    else:
        (choice,) = response.json()["choices"]
        assert len(choice["message"]["tool_calls"]) == 1
        assert choice["finish_reason"] == "tool_calls"
    text = client.get("/metrics").text
    assert 'gdn_requests_total{outcome="cancelled"} 1.0' in text


def test_a_call_that_is_cut_off_is_length(connect: Connect) -> None:
    client = connect(Script(f"</think>\n\n{CALL % 1}"), with_template())
    body = client.post(PATH, json=USER | {"tools": TOOLS, "max_tokens": 14}).json()
    assert body["choices"][0]["finish_reason"] == "length"


def test_no_tools_are_shown_where_none_may_be_called(connect: Connect) -> None:
    prompts: list[str] = []

    def script(prompt: str) -> Script:
        prompts.append(prompt)
        return Script(f"</think>\n\n{CALL % 1}")

    client = connect(script, with_template())
    body = client.post(PATH, json=USER | {"tools": TOOLS, "tool_choice": "none"}).json()
    assert body["choices"][0]["message"]["content"] == CALL % 1
    assert body["choices"][0]["finish_reason"] == "stop"
    client.post(PATH, json=USER | {"tools": TOOLS, "tool_choice": "auto"})
    assert ["Adds." in prompt for prompt in prompts] == [False, True]


def test_a_history_with_calls_has_the_text_that_was_sampled(connect: Connect) -> None:
    """Whatever spaces the model wrote; another key's client gets the template's own."""
    odd, prompts = CALL.replace("\n1", "1").replace("%d", " 1 "), list[str]()

    def script(prompt: str) -> Script:
        prompts.append(prompt)
        return Script(f"</think>\n\n{odd}" if len(prompts) == 1 else "Done.")

    client = connect(script, with_template(), keys=("one", "two"))
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    first = client.post(PATH, json=USER | {"tools": TOOLS}, headers=one).json()
    message = first["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "3"}
    turn = {"messages": [*USER["messages"], message, result], "tools": TOOLS}
    client.post(PATH, json=turn, headers=one)
    client.post(PATH, json=turn, headers=two)
    assert [odd in prompt for prompt in prompts] == [False, True, False]
    assert all("3\n</tool_response>" in prompt for prompt in prompts[1:])


def test_messages_that_can_t_be_used_are_named(connect: Connect) -> None:
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    bad = {"messages": [{"role": "user", "content": image}]}
    response = connect().post(PATH, json=bad)
    param = response.json()["error"]["param"]
    assert param.startswith("messages[0].content")
    assert "image" in message_of(response, 400, param)


def test_an_answer_goes_on_with_what_a_client_begins(connect: Connect) -> None:
    prompts: list[str] = []

    def script(prompt: str) -> Script:
        prompts.append(prompt)
        return Script("so on.\n</think>\n\nYes." if "Hm" in prompt else " and so on.")

    client = connect(script, with_template())
    begun: list[Any] = [*USER["messages"], {"role": "assistant", "content": "</think>\n\nWell,"}]
    message = client.post(PATH, json={"messages": begun}).json()["choices"][0]["message"]
    assert prompts.pop().endswith("Well,")
    assert message["content"] == " and so on."
    thought = {"role": "assistant", "content": None, "reasoning_content": "Hm, "}
    begun = [*USER["messages"], thought]
    message = client.post(PATH, json={"messages": begun}).json()["choices"][0]["message"]
    assert prompts.pop().endswith("<think>\nHm, ")
    assert (message["reasoning_content"], message["content"]) == ("so on.", "Yes.")
    empty = [*USER["messages"], {"role": "assistant", "content": ""}]
    assert client.post(PATH, json={"messages": empty}).status_code == 200
    assert prompts.pop().rstrip().endswith("<think>")
