"""The package openai against the demo model: what it asks for and what it makes of answers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any, Literal

import pytest

openai = pytest.importorskip("openai", reason="openai: install the clients extra")
# Warnings of clients are not ours to fix.
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

QUESTION: Any = [{"role": "user", "content": "What is 23 times 45?"}]
ANSWER = "23 * 40 = 920, 23 * 5 = 115, 920 + 115 = 1035"
SURE = {"model": "gpt-4o", "messages": QUESTION, "temperature": 0}


@pytest.fixture
def client(demo: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=demo, api_key="key", max_retries=0, timeout=30) as made:
        yield made


def ask(client: Any, **fields: Any) -> Any:
    return client.chat.completions.create(**{**SURE, **fields})


def test_an_answer(client: Any) -> None:
    answer = ask(client, user="me", store=False, metadata={"a": "b"}, service_tier="auto")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWER)
    assert (choice.finish_reason, choice.message.tool_calls, choice.logprobs) == (
        "stop",
        None,
        None,
    )
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 <= usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens
    assert (answer.object, answer.model) == ("chat.completion", "demo")
    assert answer.timings["predicted_n"] == usage.completion_tokens


def test_a_form(client: Any) -> None:
    """The package makes a schema of a class, and an object of the answer."""
    pydantic = pytest.importorskip("pydantic")
    form = pydantic.create_model("Sure", sure=(bool, ...), sign=(Literal["+", "-"], ...))
    asked = {**SURE, "max_tokens": 200, "response_format": form}
    done = client.chat.completions.parse(**asked).choices[0]
    assert done.finish_reason == "stop"
    assert isinstance(done.message.parsed, form)


def test_a_stream_has_the_same_text(client: Any) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    *told, last = chunks
    assert "".join(c.choices[0].delta.content or "" for c in told) == ANSWER
    assert [c.choices[0].finish_reason for c in told if c.choices[0].finish_reason] == ["stop"]
    assert told[0].choices[0].delta.role == "assistant"
    assert last.choices == []
    assert {c.usage for c in told} == {None}
    assert last.usage == ask(client).usage.model_copy(
        update={"prompt_tokens_details": last.usage.prompt_tokens_details}
    )
    assert all(c.choices for c in ask(client, stream=True))


def test_the_helper_puts_a_stream_together(client: Any) -> None:
    with client.chat.completions.stream(
        **SURE, logprobs=True, stream_options={"include_usage": True}
    ) as stream:
        kinds = {event.type for event in stream}
        whole = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    (choice,) = whole.choices
    assert (choice.message.content, choice.finish_reason) == (ANSWER, "stop")
    assert whole.usage.completion_tokens == len(choice.logprobs.content)


def test_choices_have_the_seeds_after_the_first_one(client: Any) -> None:
    wild = {"temperature": 5, "top_p": 1, "max_tokens": 12, "extra_body": {"top_k": 0, "min_p": 0}}
    three = ask(client, n=3, seed=7, **wild)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert texts == [ask(client, seed=7 + i, **wild).choices[0].message.content for i in range(3)]
    streamed = ["", "", ""]
    for chunk in ask(client, n=3, seed=7, stream=True, **wild):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert len(set(texts)) > 1


def test_limits(client: Any) -> None:
    for stop in (",", ["#", ", 23"]):
        (choice,) = ask(client, stop=stop).choices
        assert (choice.message.content, choice.finish_reason) == ("23 * 40 = 920", "stop")
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(client, **{name: 3})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3
        assert ANSWER.startswith(answer.choices[0].message.content)


def test_log_probabilities(client: Any) -> None:
    (choice,) = ask(client, logprobs=True, top_logprobs=4).choices
    entries = choice.logprobs.content
    assert bytes(b for entry in entries for b in entry.bytes).decode() == ANSWER
    assert "".join(entry.token for entry in entries) == ANSWER
    for entry in entries:
        top = [t.logprob for t in entry.top_logprobs]
        assert (top[0], len(top)) == (entry.logprob, 4)
        assert top == sorted(top, reverse=True)
        assert sum(map(math.exp, top)) <= 1 + 1e-6
    told = [
        entry
        for chunk in ask(client, logprobs=True, top_logprobs=4, stream=True)
        for choice in chunk.choices if choice.logprobs
        for entry in choice.logprobs.content
    ]  # fmt: skip
    assert [e.token for e in told] == [e.token for e in entries]


def test_a_ban(client: Any) -> None:
    (choice,) = ask(client, logprobs=True, max_tokens=1, extra_body={"n_probs": 0}).choices
    first = choice.logprobs.content[0]
    banned = ask(client, logit_bias={str(first.id): -100}, max_tokens=1, logprobs=True)
    assert banned.choices[0].logprobs.content[0].token != first.token


def test_completions(client: Any) -> None:
    text = "Question: What is 27 plus 48?\nAnswer:"

    def complete(**fields: Any) -> Any:
        return client.completions.create(
            **{"model": "x", "prompt": text, "temperature": 0, "max_tokens": 30, **fields}
        )

    answer = complete()
    made = answer.choices[0].text
    assert "75" in made
    assert answer.choices[0].finish_reason == "stop"
    assert complete(echo=True).choices[0].text == text + made
    assert "".join(c.choices[0].text for c in complete(echo=True, stream=True)) == text + made
    both = complete(prompt=[text, "Question: What is 2 plus 2?\nAnswer:"], n=2)
    assert [c.text for c in both.choices[:2]] == [made, made]
    assert "4" in both.choices[3].text
    found = complete(logprobs=2).choices[0].logprobs
    assert "".join(found.tokens) == made
    assert all(len(top) == 2 for top in found.top_logprobs)
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]
    whole = found.token_logprobs
    assert whole == [max(top.values()) for top in found.top_logprobs]


def test_tokens_as_a_prompt(client: Any) -> None:
    content = {"content": "Question: What is 27 plus 48?\nAnswer:", "add_special": True}
    ids = client.post("/tokenize", body=content, cast_to=object)["tokens"]
    asked = {"model": "x", "temperature": 0, "max_tokens": 30}
    of_ids = client.completions.create(prompt=ids, **asked)
    of_text = client.completions.create(prompt=content["content"], **asked)
    assert of_ids.choices[0].text == of_text.choices[0].text
    assert of_ids.usage.prompt_tokens == len(ids) == of_text.usage.prompt_tokens


def test_models(client: Any) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object) == ("demo", "model")
    assert client.models.retrieve("demo") == model


def test_many_at_once(demo: str) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=demo, api_key="key", max_retries=0) as client:

            async def text() -> str:
                stream = await client.chat.completions.create(**SURE, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            assert set(await asyncio.gather(*(text() for _ in range(12)))) == {ANSWER}
            assert (await client.models.list()).data[0].id == "demo"
            answer = await client.chat.completions.create(**SURE)
            assert answer.choices[0].message.content == ANSWER

    asyncio.run(main())
