"""Routes, keys, origins, limits, and errors in the protocol's form."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from engine import EngineError
from engine.server import protocol
from engine.server.app import Server, ServerConfig
from engine.server.chat import Shared
from engine.server.openapi import description
from engine.text.template import BUILT_IN, ChatTemplate
from tests.server.conftest import Connect, message_of
from tests.support.asgi import running
from tests.support.scripted import Script, ScriptedEngine

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"prompt": "hi", "max_tokens": 2}
OPEN = ("/health", "/v1/health", "/v1/models", "/models", "/v1/models/m")


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_all_paths_are_there_with_and_without_a_prefix(connect: Connect, prefix: str) -> None:
    client = connect()
    bodies: dict[str, Any] = {
        "/chat/completions": CHAT, "/completions": TEXT, "/apply-template": CHAT,
        "/tokenize": {"content": "a"}, "/detokenize": {"tokens": [1]},
    }  # fmt: skip
    for path, body in bodies.items():
        assert client.post(prefix + path, json=body).status_code == 200, path
    for path in ("/models", "/props", "/health", "/metrics", "/openapi.json"):
        assert client.get(prefix + path).status_code == 200, path


def test_what_no_route_takes(connect: Connect) -> None:
    client = connect()
    said = message_of(client.get("/v2/chat"), 404)
    assert said == "expected a path that /openapi.json has, got GET /v2/chat"
    response = client.put("/v1/completions")
    assert message_of(response, 405) == "expected POST, got PUT /v1/completions"
    assert response.headers["allow"] == "POST"
    assert message_of(client.get("/v1/completions"), 405).startswith("expected POST")


def test_health_says_loading_until_the_model_is_there() -> None:
    go = threading.Event()

    def load() -> ScriptedEngine:
        go.wait(10)
        return ScriptedEngine(Script())

    with TestClient(Server(load, Shared("m"), ServerConfig()).app) as client:
        for response in (client.get("/health"), client.post("/v1/completions", json=TEXT)):
            assert message_of(response, 503) == "the model is being loaded"
            assert response.json()["error"]["code"] == "loading"
            assert response.headers["retry-after"] == "1"
        assert client.get("/metrics").status_code == 200
        go.set()
        end = time.monotonic() + 10
        while client.get("/health").status_code != 200 and time.monotonic() < end:
            time.sleep(0.01)
        assert client.get("/health").json() == {"status": "ok"}


def test_an_engine_that_can_t_be_loaded_is_told() -> None:
    told: list[Any] = []

    def load() -> ScriptedEngine:
        raise EngineError("no such model")

    server = Server(load, Shared("m"), ServerConfig(), told.append)

    async def main() -> None:
        async with server.app.router.lifespan_context(server.app):
            async with asyncio.timeout(10):
                while not told:
                    await asyncio.sleep(0.01)

    asyncio.run(main())
    assert str(told[0]) == "no such model"


# Keys and origins.


def test_keys(connect: Connect) -> None:
    client = connect(keys=("one", "two"))
    for path in OPEN:
        assert client.get(path).status_code == 200
    for headers in (
        {}, {"Authorization": "Bearer three"}, {"Authorization": "Bearer "},
        {"Authorization": "Basic one"}, {"X-Api-Key": "on"}, {"Authorization": "one"},
    ):  # fmt: skip
        response = client.post("/v1/completions", json=TEXT, headers=headers)
        assert message_of(response, 401).startswith("expected an API key in the header")
        assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/metrics", headers=headers).status_code == 401
    for headers in ({"Authorization": "Bearer two"}, {"authorization": "bearer one"},
                    {"X-Api-Key": "two"}):  # fmt: skip
        assert client.post("/v1/completions", json=TEXT, headers=headers).status_code == 200


def test_no_key_is_asked_for_without_keys(connect: Connect) -> None:
    headers = {"Authorization": "Bearer anything"}
    assert connect().post("/v1/completions", json=TEXT, headers=headers).status_code == 200


def test_pages_of_other_origins_need_cors(connect: Connect) -> None:
    ask = {"Origin": "http://a.test", "Access-Control-Request-Method": "POST"}
    plain = connect()
    assert message_of(plain.options("/v1/completions", headers=ask), 405)
    response = plain.get("/health", headers=ask)
    assert not [name for name in response.headers if name.startswith("access-control")]
    allowed = connect(cors=("http://a.test",))
    response = allowed.options("/v1/completions", headers=ask)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "http://a.test"
    other = allowed.get("/health", headers={"Origin": "http://b.test"})
    assert "access-control-allow-origin" not in other.headers


# Limits, and what bodies must be.


def test_a_body_that_is_too_long_is_refused_before_it_is_read(connect: Connect) -> None:
    client = connect(max_body=1000)
    response = client.post("/v1/completions", json={"prompt": "a" * 1000})
    assert message_of(response, 413) == "expected a body of at most 1000 bytes"
    parts = iter([b'{"prompt": "', b"a" * 1000, b'"}'])  # Of no length that is told.
    assert client.post("/v1/completions", content=parts).status_code == 413
    assert client.post("/v1/completions", json={**TEXT, "user": "a" * 900}).status_code == 200


LIMITS: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("chat", {"messages": [CHAT] * 10_001}, "messages", "at most 10000, got 10001"),
    ("chat", {"messages": []}, "messages", "messages"),
    ("chat", {"messages": None}, "messages", "expected a value, got none"),
    ("chat", {"messages": "hi"}, "messages", "expected a list, got a text"),
    ("chat", {"messages": ["hi"]}, "messages[0]", "expected an object, got a text"),
    ("chat", {"tools": [{}] * 1001}, "tools", "at most 1000, got 1001"),
    ("chat", {"tool_choice": "required"}, "tool_choice", "expected tools with it, got required"),
    ("chat", {"tool_choice": {"type": "function"}}, "tool_choice", "expected a tool (none), got"),
    ("chat", {"tool_choice": "some"}, "tool_choice", "one of none, auto, required, got some"),
    ("chat", {"logprobs": True, "top_logprobs": 101}, "top_logprobs", "at most 100, got 101"),
    ("chat", {"top_logprobs": 1}, "top_logprobs", "expected logprobs, too"),
    ("chat", {"logprobs": True, "top_logprobs": -1}, "logprobs", "logprobs"),
    ("text", {"prompt": []}, "prompt", "expected a text or token ids, got an empty list"),
    ("text", {"prompt": [1, "a"]}, "prompt", "expected texts or lists of token ids, got 1"),
    ("text", {"prompt": [[1], ["a"]]}, "prompt", "expected texts or lists of token ids"),
    ("text", {"prompt": [-1]}, "prompt", "token id -1: expected 0 to 4095"),
    ("text", {"prompt": ["a"] * 33}, "prompt", "at most 32 choices, got 33"),
    ("text", {"prompt": ""}, None, "the prompt is empty"),
    ("text", {"prompt": {}}, "prompt", "expected a text or a list, got an object"),
    ("text", {"suffix": "x"}, "suffix", "expected none"),
    ("text", {"best_of": 2}, "best_of", "expected at most n (1), got 2"),
    ("text", {"echo": True, "logprobs": 1}, "echo", "expected no logprobs with it"),
    ("both", {"n": 0}, "n", "expected at least 1, got 0"),
    ("both", {"n": 33}, "n", "expected at most 32, got 33"),
    ("both", {"stop": ["a"] * 65}, "stop", "at most 64 texts, got 65"),
    ("both", {"stop": "a" * 1001}, "stop", "at most 1000 characters, got 1001"),
    ("both", {"stop": [1]}, "stop[0]", "expected a text, got an integer"),
    ("both", {"temperature": "hot"}, "temperature", "expected a number, got a text"),
    ("both", {"max_tokens": -2}, "max_tokens", "expected at least -1, got -2"),
    ("both", {"max_tokens": 1.5}, "max_tokens", "expected an integer, got a number"),
    ("both", {"top_p": 2}, "top_p", "expected 0 to 1, got 2"),
    ("both", {"seed": -2}, "seed", "expected"),
    ("both", {"seed": 10**30}, "seed", "expected"),
    ("both", {"stream": "yes"}, "stream", "expected true or false, got a text"),
    ("both", {"logit_bias": {"99999": 1}}, "logit_bias", "token id 99999: expected 0 to 4095"),
    ("both", {"logit_bias": {"5": "x"}}, "logit_bias", "expected numbers, or false, got 'x'"),
    ("both", {"logit_bias": [5]}, "logit_bias", "expected pairs of a token and a number, got 5"),
    ("both", {"logit_bias": [[[], 1]]}, "logit_bias", "expected token ids or texts, got []"),
    ("both", {"logit_bias": {str(i): 1 for i in range(4097)}}, "logit_bias", "at most 4096"),
    ("both", {"samplers": ["top_q"]}, "samplers", "expected one of penalties"),
    ("both", {"mirostat": 1}, "mirostat", "expected 0 or 2, got 1"),
    ("both", {"response_format": {"type": "xml"}}, "response_format.type", "json_schema, got xml"),
    ("both", {"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema",
     "expected a JSON schema, got none"),
    ("both", {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
     "response_format", "expected keywords that can be enforced, got #/not"),
    ("both", {"grammar": "root ::= x"}, "grammar", "expected a rule x somewhere, got 'x'"),
    ("both", {"grammar": 5}, "grammar", "expected a text, got an integer"),
    ("both", {"json_schema": {"$ref": "#"}}, "json_schema", "recursion without end"),
    ("both", {"json_schema": {"title": "x" * 1_000_000}}, "json_schema", "at most 524288 bytes"),
    ("both", {"guided_regex": "(?=a)"}, "guided_regex", "got one where look-around"),
    ("both", {"guided_regex": "a", "grammar": 'root ::= "a"'}, "grammar", "got guided_regex, too"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change", "param", "words"), LIMITS, ids=[next(iter(c[1])) for c in LIMITS]
)
def test_what_is_refused(
    connect: Connect, kind: str, change: dict[str, Any], param: str | None, words: str
) -> None:
    client = connect()
    kinds: dict[str, Any] = {"chat": CHAT, "text": TEXT}
    for name, path in (("chat", "/v1/chat/completions"), ("text", "/v1/completions")):
        if kind in (name, "both"):
            response = client.post(path, json=kinds[name] | change)
            assert words in message_of(response, 400, param)


@pytest.mark.parametrize("value", ["\x1f", "a\nb", "x" * 100_000])
def test_what_came_is_shown_in_one_short_line(connect: Connect, value: str) -> None:
    client = connect()
    for field, path, body in (
        ("samplers", "/v1/completions", TEXT | {"samplers": [value]}),
        ("tool_choice", "/v1/chat/completions", CHAT | {"tool_choice": value}),
    ):
        said = message_of(client.post(path, json=body), 400, field)
        assert len(said) < 300


def test_a_prompt_that_is_too_long_has_a_code_of_its_own(connect: Connect) -> None:
    client = connect()
    for path, body in (
        ("/v1/completions", {"prompt": "a " * 3000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a " * 3000}]}),
    ):
        response = client.post(path, json=body)
        assert "the context 2048" in message_of(response, 400)
        assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"a"', b"\xff", b'{"prompt": "\\ud800",}', b"[" * 100_000,
     b'{"prompt": NaN}', b'{"prompt": "a",}', b"\xef\xbb\xbf{}"],
)  # fmt: skip
def test_bodies_that_are_no_json_object(connect: Connect, body: bytes) -> None:
    client = connect()
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        assert message_of(client.post(path, content=body), 400)


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (rb"cut \uD83D", "cut \ufffd"), (rb"\udE00 rest", "\ufffd rest"),
        (rb"\ud83d\ude00 \ud83d", "\U0001f600 \ufffd"), (rb"\\ud83d", r"\ud83d"),
        ("é \\ud800".encode(), "é \ufffd"),
    ],
)  # fmt: skip
def test_half_a_surrogate_pair_is_replaced(connect: Connect, sent: bytes, read: str) -> None:
    client = connect()
    ids = client.post("/tokenize", content=b'{"content": "%b"}' % sent).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": ids}).json()["content"] == read
    body = b'{"messages": [{"role": "user", "content": "%b"}]}' % sent
    assert client.post("/v1/chat/completions", content=body).status_code == 200


def test_nulls_are_absent_and_unknown_fields_ignored(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    client, more = connect(), {"top_q": 1, "metadata": {"a": 1}, "store": True}
    for path, body, kind in (
        ("/v1/chat/completions", CHAT, protocol.ChatRequest),
        ("/v1/completions", TEXT, protocol.CompletionRequest),
    ):
        fields = dict.fromkeys(kind.__struct_fields__)
        for _ in range(2):
            assert client.post(path, json=fields | body | more).status_code == 200
        assert client.post(path, json={**body, "model": "gpt-9"}).status_code == 200
    assert caplog.messages == ["requests have the field 'top_q', which has no effect here"]


def test_the_description_has_what_requests_have() -> None:
    made = description()
    schema = made["components"]["schemas"]["ChatRequest"]
    assert schema["required"] == ["messages"]
    assert schema["properties"].keys() == set(protocol.ChatRequest.__struct_fields__)
    refs = {p["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            for p in made["paths"].values() if "post" in p}  # fmt: skip
    known = {f"#/components/schemas/{name}" for name in made["components"]["schemas"]}
    assert len(refs) == 4
    assert refs <= known


# What generates nothing.


def test_tokens_and_back(connect: Connect) -> None:
    client, text = connect(), "Hello é <|im_start|>"
    ids = client.post("/tokenize", json={"content": text}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"content": text}
    plain = client.post("/tokenize", json={"content": text, "parse_special": False}).json()
    assert len(plain["tokens"]) > len(ids)
    pieces = client.post("/tokenize", json={"content": "é☃", "with_pieces": True}).json()["tokens"]
    raw = b"".join(
        p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces
    )
    assert raw.decode() == "é☃"
    assert "expected" in message_of(client.post("/detokenize", json={"tokens": [9999]}), 400)


def test_a_template_without_tools(connect: Connect) -> None:
    client = connect(shared=Shared("m", template=ChatTemplate(BUILT_IN["chatml"])))
    response = client.post("/v1/chat/completions", json={**CHAT, "tools": [{"type": "function"}]})
    assert "chat template takes no tools: it reads no tools" in message_of(response, 400)


def test_the_text_of_a_chat(connect: Connect) -> None:
    text = connect().post("/apply-template", json=CHAT).json()["prompt"]
    assert text == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_models_and_properties(connect: Connect) -> None:
    client = connect(shared=Shared("my-model"))
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("my-model", "model")
    for name in ("my-model", "Qwen/Qwen3.5-0.8B", "gpt-4o"):  # As requests may have any.
        assert client.get(f"/v1/models/{name}").json() == model
    props = client.get("/props").json()
    assert (props["total_slots"], props["model_path"]) == (4, "demo.gguf")
    assert "<|im_start|>" in props["chat_template"]


def test_metrics(connect: Connect) -> None:
    client = connect(Script("a b c"))
    client.post("/v1/completions", json={"prompt": "x y", "max_tokens": 3})
    client.post("/v1/completions", json={"prompt": "x y", "n": 2, "stream": True})
    client.post("/v1/completions", json={"prompt": ""})
    text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert values['gdn_requests_total{outcome="length"}'] == "1.0"
    assert values['gdn_requests_total{outcome="stop"}'] == "2.0"
    assert values['gdn_requests_total{outcome="refused"}'] == "1.0"
    n_prompt = len(client.post("/tokenize", json={"content": "x y"}).json()["tokens"])
    assert float(values['gdn_tokens_total{kind="prompt"}']) == 3 * n_prompt
    n_generated = float(values['gdn_tokens_total{kind="generated"}'])
    assert n_generated > 3
    assert values["gdn_time_to_first_token_seconds_count"] == "3.0"
    assert float(values["gdn_requests_running"]) == float(values["gdn_requests_waiting"]) == 0
    assert "gdn_cache_bytes" in values


def test_running_and_waiting_are_counted() -> None:
    async def main() -> None:
        script = Script("a ", token_s=0.01, is_endless=True)
        async with running(ScriptedEngine(script, 1)) as on:
            asked = [on.post("/v1/completions", {"prompt": "x", "stream": True}) for _ in range(3)]
            await asked[0].until(1)
            text = on.server.bridge.metrics.text().decode()
            assert "gdn_requests_running 1.0" in text
            assert "gdn_requests_waiting 2.0" in text
            for exchange in asked:
                exchange.vanish()

    asyncio.run(main())
