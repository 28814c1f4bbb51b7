"""LangChain's ChatOpenAI: answers, streams, loops of calls, usage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.clients.conftest import Serve, replay
from tests.clients.test_openai import ANSWER
from tests.clients.test_openai_tools import CALLS, TOOLS, TWO_CALLS, call
from tests.support.scripted import Script

openai = pytest.importorskip("openai", reason="install the clients extra")
langchain = pytest.importorskip("langchain_openai", reason="install the clients extra")
httpx = pytest.importorskip("httpx")
messages = pytest.importorskip("langchain_core.messages")
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]


Chat = Callable[..., Any]


@pytest.fixture
def chat() -> Iterator[Chat]:
    """chat(address, **options): a model, whose connections are closed after the test."""
    with contextlib.ExitStack() as stack:

        def connect(address: str, **options: Any) -> Any:
            http = stack.enter_context(httpx.Client())
            given = {"api_key": "key", "model": "demo", "max_retries": 0, "timeout": 20, **options}
            return langchain.ChatOpenAI(base_url=address, http_client=http, **given)

        yield connect


def test_an_answer(chat: Chat, demo: str) -> None:
    model = chat(demo, temperature=0, seed=1)
    answer = model.invoke("What is 23 times 45?")
    assert answer.content == ANSWER
    assert answer.response_metadata["finish_reason"] == "stop"
    usage = answer.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0
    assert "cache_read" in usage["input_token_details"]


def test_a_stream(chat: Chat, demo: str) -> None:
    model = chat(demo, temperature=0, stream_usage=True)
    chunks = list(model.stream("What is 23 times 45?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert len(chunks) > 10
    assert whole.content == ANSWER
    assert whole.usage_metadata == model.invoke("What is 23 times 45?").usage_metadata | {
        "input_token_details": whole.usage_metadata["input_token_details"]
    }


def test_options(chat: Chat, demo: str) -> None:
    model = chat(demo, temperature=0, logprobs=True, top_logprobs=2, max_tokens=9, stop=[","])
    answer = model.invoke("What is 23 times 45?")
    assert answer.content == "23 * 40 = 920"[: len(answer.content)]
    assert len(answer.response_metadata["logprobs"]["content"]) <= 9
    batch = chat(demo, temperature=0).batch(["What is 23 times 45?"] * 3)
    assert [answer.content for answer in batch] == [ANSWER] * 3


@pytest.mark.parametrize("streams", [False, True])
def test_a_loop_of_calls(chat: Chat, serve: Serve, streams: bool) -> None:
    script, prompts = replay(TWO_CALLS, "So.\n</think>\n\nThe end.")
    server = serve(script)
    model = chat(server.address, streaming=streams).bind_tools(TOOLS)
    history = [
        messages.SystemMessage("Be brief."), messages.HumanMessage([{"type": "text", "text": "x"}])
    ]  # fmt: skip
    answer = model.invoke(history)
    assert answer.content == "Both:"
    assert tuple((c["name"], c["args"]) for c in answer.tool_calls) == CALLS
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    history += [answer, *(messages.ToolMessage(c["id"], tool_call_id=c["id"])
                          for c in answer.tool_calls)]  # fmt: skip
    last = model.invoke(history)
    assert (last.content, last.tool_calls) == ("The end.", [])
    assert prompts[1].startswith(prompts[0] + TWO_CALLS)
    assert [noted.status for noted in server.noted] == [200, 200]


def test_answers_of_a_form(chat: Chat, demo: str, serve: Serve) -> None:
    """By response_format, and by the call of a tool that the client names."""
    properties = {"a": {"type": "integer"}, "note": {"type": "string", "maxLength": 9}}
    schema = {"title": "T", "type": "object", "properties": properties, "required": ["a", "note"],
              "additionalProperties": False}  # fmt: skip
    sure = {"title": "S", "type": "object", "properties": {"sure": {"type": "boolean"}},
            "required": ["sure"], "additionalProperties": False}  # fmt: skip
    model = chat(demo, temperature=0, max_tokens=200)
    said = model.with_structured_output(sure, method="json_schema").invoke("What is 23 times 45?")
    assert said in ({"sure": True}, {"sure": False})
    model = chat(serve(Script("So.\n</think>\n\n" + call("T", "x", 1))).address)
    held = model.with_structured_output(schema, method="function_calling", strict=True)
    assert held.invoke("x") == {"note": "x", "a": 1}
