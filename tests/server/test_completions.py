"""/v1/completions: texts and ids, echo, log probabilities, several prompts and choices."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.conftest import Connect
from tests.support.scripted import Script

PATH = "/v1/completions"


def chunks(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_an_object_and_a_stream(connect: Connect) -> None:
    client = connect(Script("a b c"))
    body = client.post(PATH, json={"prompt": "x"}).json()
    assert (body["object"], body["id"][:5]) == ("text_completion", "cmpl-")
    assert body["choices"] == [
        {"index": 0, "text": "a b c", "logprobs": None, "finish_reason": "stop"}
    ]
    found = chunks(client.post(PATH, json={"prompt": "x", "stream": True}))
    assert "".join(c["choices"][0]["text"] for c in found) == "a b c"
    reasons = [c["choices"][0]["finish_reason"] for c in found]
    assert reasons == [None] * (len(found) - 1) + ["stop"]


@pytest.mark.parametrize("prompt", ["x y", [60, 61]])
def test_echo(connect: Connect, prompt: Any) -> None:
    client = connect(Script("a b"))
    body = {"prompt": prompt, "echo": True}
    text = prompt
    if not isinstance(prompt, str):
        text = client.post("/detokenize", json={"tokens": prompt}).json()["content"]
    assert client.post(PATH, json=body).json()["choices"][0]["text"] == text + "a b"
    found = chunks(client.post(PATH, json=body | {"stream": True}))
    assert "".join(c["choices"][0]["text"] for c in found) == text + "a b"
    body |= {"max_tokens": 0}
    (choice,) = client.post(PATH, json=body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "length")
    found = chunks(client.post(PATH, json=body | {"stream": True}))
    assert "".join(c["choices"][0]["text"] for c in found) == text


def test_prompts_and_choices(connect: Connect) -> None:
    client = connect(lambda prompt: Script(f"<{prompt}>"), n_parallel=8)
    body = client.post(PATH, json={"prompt": ["x", "y"], "n": 2}).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [
        (0, "<x>"), (1, "<x>"), (2, "<y>"), (3, "<y>")
    ]  # fmt: skip
    assert body["usage"]["prompt_tokens"] == 2
    assert body["timings"]["prompt_n"] == 4
    ids = client.post("/tokenize", json={"content": "x"}).json()["tokens"]
    assert client.post(PATH, json={"prompt": ids}).json()["choices"][0]["text"] == "<x>"
    both = client.post(PATH, json={"prompt": [ids, ids]}).json()["choices"]
    assert [c["text"] for c in both] == ["<x>", "<x>"]


def test_logprobs(connect: Connect) -> None:
    client, ask = connect(Script("é a")), {"prompt": "x", "logprobs": 2}
    (choice,) = client.post(PATH, json=ask).json()["choices"]
    told = choice["logprobs"]
    assert told["text_offset"][0] == 0
    n = len(told["tokens"])
    assert n == len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(told["text_offset"])
    assert all(1 <= len(top) <= 2 for top in told["top_logprobs"])
    assert told["token_logprobs"] == [-0.5] * n
    streamed: dict[str, list[Any]] = {name: [] for name in told}
    for chunk in chunks(client.post(PATH, json=ask | {"stream": True})):
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            streamed[name] += values
    assert streamed == told
    plain = client.post(PATH, json={"prompt": "x", "logprobs": 0}).json()["choices"][0]
    assert plain["logprobs"]["top_logprobs"] == [{}] * n
