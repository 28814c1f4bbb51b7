"""The package openai on the scripted engine: thinking, calls, errors, clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.clients.conftest import Serve, replay
from tests.support.live import Live
from tests.support.scripted import Script

openai = pytest.importorskip("openai", reason="openai: install the clients extra")
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

ClientOf = Callable[..., Any]
USER: Any = {"role": "user", "content": "hi"}
ASK = {"model": "m", "messages": [USER]}
_PROPERTIES = {"a": {"type": "integer"}, "note": {"type": "string"}}
TOOLS: Any = [
    {"type": "function", "function": {
        "name": name, "description": "Does it.", "strict": True,
        "parameters": {"type": "object", "properties": _PROPERTIES, "required": ["a", "note"],
                       "additionalProperties": False}}}
    for name in ("add", "look")
]  # fmt: skip
ENDLESS = Script("a </think> b c ", token_s=0.005, is_endless=True)


def call(name: str, note: Any, a: Any) -> str:
    """As a model writes it, with its parameters in its own order."""
    return (
        f"<tool_call>\n<function={name}>\n<parameter=note>\n{note}\n</parameter>\n"
        f"<parameter=a>\n{a}\n</parameter>\n</function>\n</tool_call>"
    )


CALLS = (("add", {"note": "x", "a": 1}), ("look", {"note": 'q "ü"', "a": -2}))
TWO_CALLS = "I look.\n</think>\n\nBoth:\n\n" + "\n".join(call(name, **v) for name, v in CALLS)


def given(calls: Any) -> Any:
    return tuple((c.function.name, json.loads(c.function.arguments)) for c in calls)


@pytest.fixture
def client_of() -> Iterator[ClientOf]:
    """client_of(server, **options): a client, which is closed after the test."""
    with contextlib.ExitStack() as stack:

        def connect(server: Live, **options: Any) -> Any:
            given = {"api_key": "k", "max_retries": 0, "timeout": 20, **options}
            return stack.enter_context(openai.OpenAI(base_url=server.address, **given))

        yield connect


def test_thinking_is_beside_the_text(serve: Serve, client_of: ClientOf) -> None:
    client = client_of(serve(Script("So it is.\n</think>\n\nHello.")))
    message = client.chat.completions.create(**ASK).choices[0].message
    assert (message.content, message.reasoning_content) == ("Hello.", "So it is.")
    found = {"content": "", "reasoning_content": ""}
    for chunk in client.chat.completions.create(**ASK, stream=True):
        for name in found:
            found[name] += getattr(chunk.choices[0].delta, name, None) or ""
    assert found == {"content": "Hello.", "reasoning_content": "So it is."}


@pytest.mark.parametrize("streams", [False, True])
def test_a_loop_of_calls(serve: Serve, client_of: ClientOf, streams: bool) -> None:
    script, prompts = replay(TWO_CALLS, "So.\n</think>\n\nThe end.")
    server = serve(script)
    client, messages = client_of(server), [USER]

    def turn() -> Any:
        asked = {"model": "m", "messages": messages, "tools": TOOLS}
        if not streams:
            return client.chat.completions.create(**asked).choices[0]
        with client.chat.completions.stream(**asked) as stream:
            return stream.get_final_completion().choices[0]

    choice = turn()
    calls = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Both:")
    assert given(calls) == CALLS
    # The client's own form of the message, and results in another order.
    messages.append(choice.message.model_dump(exclude_none=True))
    messages += [{"role": "tool", "tool_call_id": c.id, "content": c.id} for c in calls[::-1]]
    assert turn().message.content == "The end."
    # What the model wrote stands in its history as it was.
    assert prompts[1].startswith(prompts[0] + TWO_CALLS)
    assert prompts[1].index(calls[0].id) < prompts[1].index(calls[1].id)
    assert [noted.status for noted in server.noted] == [200, 200]


def test_calls_come_while_they_are_written(serve: Serve, client_of: ClientOf) -> None:
    client = client_of(serve(Script(TWO_CALLS, token_s=0.002)))
    stream = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice="auto", stream=True)
    deltas = [c.choices[0].delta.tool_calls[0] for c in stream if c.choices[0].delta.tool_calls]
    names = {d.index: d.function.name for d in deltas if d.id}
    assert names == {0: "add", 1: "look"}
    pieces = ["".join(d.function.arguments for d in deltas if d.index == i) for i in names]
    assert [json.loads(piece)["a"] for piece in pieces] == [1, -2]
    assert len(deltas) > 8
    with client.chat.completions.stream(**ASK, tools=TOOLS) as events:
        done = [e for e in events if e.type == "tool_calls.function.arguments.done"]
    assert tuple((e.name, e.parsed_arguments) for e in done) == CALLS


def test_one_call_or_none(serve: Serve, client_of: ClientOf) -> None:
    client = client_of(serve(Script(TWO_CALLS)))
    asked = {**ASK, "tools": TOOLS}
    choice = client.chat.completions.create(**asked, parallel_tool_calls=False).choices[0]
    assert [c.function.name for c in choice.message.tool_calls] == ["add"]
    choice = client.chat.completions.create(**asked, tool_choice="none").choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)


def test_errors_have_the_package_s_types(serve: Serve, client_of: ClientOf) -> None:
    server = serve(Script(), keys=("k",), max_body=10_000)
    client = client_of(server)
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        create(**ASK, top_p=2)
    assert (bad.value.param, bad.value.type) == ("top_p", "invalid_request_error")
    assert "expected" in bad.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        create(**ASK, tool_choice="required")
    assert bad.value.param == "tool_choice"
    form = {"name": "x", "schema": {"type": "array", "contains": {"type": "integer"}}}
    with pytest.raises(openai.BadRequestError, match="got #/contains") as bad:
        create(**ASK, response_format={"type": "json_schema", "json_schema": form})
    assert bad.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as bad:
        create(model="m", messages=[{"role": "user", "content": "a b " * 2_400}])
    assert bad.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError) as large:
        create(model="m", messages=[{"role": "user", "content": "a" * 10_000}])
    assert large.value.status_code == 413
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="m", input="hi")
    stranger = client_of(server, api_key="other")
    with pytest.raises(openai.AuthenticationError) as unknown:
        stranger.chat.completions.create(**ASK)
    assert unknown.value.code == "invalid_api_key"
    assert stranger.models.list().data[0].id == "scripted"


def test_an_image_is_refused_by_name(serve: Serve, client_of: ClientOf) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError) as bad:
        client_of(serve()).chat.completions.create(
            model="m", messages=[{"role": "user", "content": [part]}]
        )
    assert bad.value.param == "messages[0].content[0]"
    assert "image_url" in bad.value.message


@pytest.mark.parametrize("streams", [False, True])
def test_a_sequence_that_fails(serve: Serve, client_of: ClientOf, streams: bool) -> None:
    server = serve(lambda prompt: Script("a b </think>c", error="it broke" * ("bad" in prompt)))
    client = client_of(server)
    asked = {"model": "m", "messages": [{"role": "user", "content": "bad"}], "stream": streams}
    kind = openai.APIError if streams else openai.InternalServerError
    with pytest.raises(kind, match="it broke"):
        list(client.chat.completions.create(**asked))
    assert client.chat.completions.create(**ASK).choices[0].message.content == "c"


def test_a_full_server(serve: Serve, client_of: ClientOf) -> None:
    server = serve(ENDLESS, n_parallel=1, max_queue=0)
    client = client_of(server)
    stream = client.chat.completions.create(**ASK, stream=True)
    next(stream)
    with pytest.raises(openai.InternalServerError) as full:
        client.chat.completions.create(**ASK)
    assert (full.value.status_code, full.value.code) == (503, "queue_full")
    assert float(full.value.response.headers["retry-after"]) > 0
    # With its retries the client waits, and gets an answer.
    stream.close()
    again = client_of(server, max_retries=1).chat.completions.create(**ASK, max_tokens=2)
    assert again.choices[0].finish_reason == "length"


def test_a_stream_that_is_closed_frees_its_place(serve: Serve, client_of: ClientOf) -> None:
    server = serve(ENDLESS, n_parallel=1)
    for _ in range(3):
        with client_of(server).chat.completions.create(**ASK, stream=True) as stream:
            for _, _ in zip(range(4), stream):  # noqa: B905
                pass
        begun = time.monotonic()
        server.wait_until_idle()
        assert time.monotonic() - begun < 1


def test_a_task_that_is_cancelled_frees_its_place(serve: Serve) -> None:
    server = serve(ENDLESS, n_parallel=1)

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=server.address, api_key="k") as client:
            asked = [
                asyncio.create_task(client.chat.completions.create(**ASK, max_tokens=3000))
                for _ in range(3)
            ]
            while server.n_taken < 3:
                await asyncio.sleep(0.01)
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(main())
    server.wait_until_idle()


def test_a_client_s_timeout(serve: Serve, client_of: ClientOf) -> None:
    server = serve(Script("a</think>b", prompt_s=30), n_parallel=1)
    client = client_of(server, timeout=0.3)
    for streams in (False, True):
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**ASK, stream=streams)
        server.wait_until_idle()


def test_keep_alives_hold_a_stream_open_while_a_prompt_is_read(
    serve: Serve, client_of: ClientOf
) -> None:
    server = serve(Script("a</think>b", prompt_s=1.5), keep_alive_s=0.1)
    client = client_of(server, timeout=0.5)
    chunks = list(client.chat.completions.create(**ASK, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "b"
