"""Hostile bodies beside valid ones: `serve` refuses the ones, and answers the others.

Schemathesis reads the served description and makes bodies that break it. Others keep to it and are
wrong otherwise, or are no JSON. Every valid body is checked by the description, too.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.server.test_serve import Process, serving

schemathesis = pytest.importorskip("schemathesis", reason="install the clients extra")
jsonschema = pytest.importorskip("jsonschema_rs", reason="install the clients extra")
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

TEMPLATE = Path(__file__).parents[1] / "support" / "templates" / "qwen35_style.jinja"
CHAT, TEXT, TOKENS = "/v1/chat/completions", "/v1/completions", "/detokenize"
PATHS = (CHAT, TEXT, "/apply-template", "/tokenize", TOKENS)
# Bodies of each kind for each path in each round: in four rounds 2,000 that are refused, and 200
# that are answered.
N_BROKEN, N_WRONG, N_VALID, N_ROUNDS = 60, 40, 10, 4
# MiB by which a process that leaks nothing may grow in so many rounds, once the prefix cache is
# full and the allocator has what it wants; in the first rounds that is some ten MiB at times.
MAX_GROWTH, MAX_ROUNDS = 4, 24
Json = dict[str, Any]

words = st.text(max_size=12)
ids = st.integers(0, 4_000)
unknown = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | words, lambda v: st.lists(v)
)


def or_null(values: Any) -> Any:
    return st.none() | values


def some(**fields: Any) -> Any:
    return st.fixed_dictionaries({}, optional=fields)


SAMPLING = {
    "model": words, "temperature": or_null(st.floats(-1, 0) | st.floats(0.05, 5)),
    "top_p": or_null(st.floats(0, 1)), "top_k": st.integers(-1, 100), "min_p": st.floats(0, 1),
    "typical_p": st.floats(0, 1),
    "n": or_null(st.integers(1, 4)), "seed": or_null(st.integers(-1, 2**64 - 1)),
    "stop": or_null(words | st.lists(words, max_size=4)), "repeat_penalty": st.floats(0.5, 2),
    "presence_penalty": st.floats(-2, 2), "frequency_penalty": st.floats(-2, 2),
    "repeat_last_n": st.integers(-1, 64), "dry_multiplier": st.floats(0, 2),
    "dry_base": st.floats(1, 3), "mirostat": st.sampled_from([0, 2]), "n_probs": st.integers(0, 9),
    "logit_bias": st.dictionaries(ids.map(str), st.floats(-100, 100), max_size=3)
    | st.lists(st.tuples(ids | st.just("a"), st.just(False) | st.integers(-9, 9)), max_size=3),
    "samplers": st.lists(st.sampled_from(["top_k", "min_p", "temperature"]), max_size=3),
    "ignore_eos": st.booleans(), "cache_prompt": or_null(st.booleans()), "stream": st.booleans(),
    "stream_options": or_null(some(include_usage=or_null(st.booleans()))),
    "response_format": st.just({"type": "text"}), "user": words, "x-unknown": unknown,
}  # fmt: skip
# Without a limit of their own they would run until the context is full.
LIMIT = {"max_tokens": st.integers(0, 4)}
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": words}), max_size=3)
CONTENTS = words | PARTS
FUNCTION = st.fixed_dictionaries(
    {"name": st.from_regex("[a-z_]{1,9}", fullmatch=True)},
    optional={"description": words, "strict": st.booleans(), "parameters": st.just(
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": ["string"]}}})},
)  # fmt: skip
TOOLS = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION}))


@st.composite
def conversations(draw: st.DrawFn) -> list[Json]:
    """Messages with calls and their results, and system messages anywhere."""
    made: list[Json] = []
    for i in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            role = draw(st.sampled_from(["system", "developer"]))
            made.append({"role": role, "content": draw(CONTENTS)})
        made.append({"role": "user", "content": draw(CONTENTS), "name": draw(or_null(words))})
        arguments = draw(st.sampled_from(["{}", '{"a": 1}', "", "no JSON"]))
        call = {"id": f"call{i}", "type": "function",
                "function": {"name": "f", "arguments": arguments}}  # fmt: skip
        if draw(st.booleans()):
            made.append(
                {
                    "role": "assistant",
                    "content": draw(or_null(words)),
                    "refusal": None,
                    "tool_calls": [call],
                    "reasoning_content": draw(or_null(words)),
                }
            )
            made.append({"role": "tool", "tool_call_id": f"call{i}", "content": draw(CONTENTS)})
        if draw(st.booleans()):
            made.append({"role": "assistant", "content": draw(words)})
    return made


CHATS = st.fixed_dictionaries(
    {"messages": conversations(), **LIMIT},
    optional={
        **SAMPLING, "tools": or_null(TOOLS), "tool_choice": st.sampled_from(["auto", "none", None]),
        "parallel_tool_calls": st.booleans(), "logprobs": st.just(True),
        "reasoning_effort": st.sampled_from(["none", "low", "high"]),
        "chat_template_kwargs": or_null(st.fixed_dictionaries({"enable_thinking": st.booleans()})),
    },
)  # fmt: skip
FULL_WORDS = st.text(min_size=1, max_size=12)
VALID = {
    CHAT: CHATS,
    "/apply-template": CHATS,
    TEXT: st.fixed_dictionaries(
        {"prompt": FULL_WORDS | st.lists(FULL_WORDS, min_size=1, max_size=3)
         | st.lists(ids, min_size=1, max_size=9), **LIMIT},
        optional={**SAMPLING, "logprobs": st.integers(0, 5)},
    ),
    "/tokenize": st.fixed_dictionaries(
        {"content": words},
        optional={name: or_null(st.booleans())
                  for name in ("add_special", "parse_special", "with_pieces")},
    ),
    TOKENS: st.fixed_dictionaries({"tokens": st.lists(ids)}),
}  # fmt: skip


def user(content: Any, **more: Any) -> Json:
    return {"messages": [{"role": "user", "content": content, **more}]}


# Of the types that the description has, but nothing that can be done.
_LIMITS: list[Json] = [
    {"top_p": 1.01}, {"top_p": -0.5}, {"min_p": 2}, {"temperature": 1e-310}, {"n": 0}, {"n": 33},
    {"n": -(2**70)},
    {"seed": 2**64}, {"seed": -2}, {"repeat_penalty": 0}, {"repeat_last_n": -2}, {"mirostat": 3},
    {"mirostat": 1}, {"dry_base": 0.5}, {"samplers": ["best"]}, {"stop": ["a"] * 65},
    {"stop": "a" * 1001}, {"max_tokens": -2}, {"n_probs": 101},
    {"logit_bias": {"99999999": 1}}, {"logit_bias": {"5": "x"}}, {"logit_bias": [[1]]},
    {"logit_bias": [[1, 2, 3]]}, {"logit_bias": {str(i): 1 for i in range(4097)}},
    {"logit_bias": [[-1, 1.0]]}, {"logit_bias": [[None, 1.0]]}, {"logit_bias": {"5": 10**400}},
    {"response_format": {"type": "json_schema"}}, {"response_format": {"type": ["x"]}},
    {"grammar": "root ::= x"}, {"json_schema": {"not": {}}}, {"guided_regex": "["},
    {"json_schema": True, "guided_regex": "a"},
]  # fmt: skip
_CHATS: list[Json] = [
    {"messages": []}, {"messages": [{}]}, user([{"type": "image_url", "image_url": {"url": "x"}}]),
    user([{"type": "input_audio"}]), user([{}]), user([1]), user({"a": 1}), user(5), user([None]),
    {"messages": [{"role": "root", "content": "x"}]}, {"messages": [{"role": ["user"]}]},
    {"messages": [{"role": "system", "content": "only"}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]},
                  {"role": "tool", "tool_call_id": "b", "content": "x"}]},
    {"messages": [{"role": "assistant", "tool_calls": 5}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}]},
    {"messages": [{"role": "user", "content": "x"}] * 10_001}, {"tools": [{}] * 1_001},
    {"tool_choice": "required"}, {"tool_choice": {"type": "function"}}, {"tool_choice": "maybe"},
    {**user("long " * 20_000), "n": 1},
    {"top_logprobs": 5}, {"logprobs": True, "top_logprobs": 101},
    {"logprobs": True, "top_logprobs": -1}, {"chat_template_kwargs": {"messages": []}},
    {"chat_template_kwargs": {"tools": 1}},
]  # fmt: skip
_TEXTS: list[Json] = [
    {"prompt": []}, {"prompt": [[1, "a"]]}, {"prompt": [10**9]}, {"prompt": [-1]},
    {"prompt": [10**30]}, {"prompt": [True]}, {"prompt": [{}]}, {"prompt": [["a"]]},
    {"prompt": ["a"] * 33}, {"prompt": "long " * 20_000}, {"suffix": "x"}, {"best_of": 2},
    {"echo": True, "logprobs": 1}, {"prompt": [[]]}, {"prompt": ["a"] * 20, "n": 2},
    {"logprobs": -1}, {"logprobs": 101},
]  # fmt: skip
_TOKENS: list[Json] = [{"tokens": [10**9]}, {"tokens": [-1]}, {"tokens": [10**30]}]
WRONG = {
    CHAT: _LIMITS + _CHATS, TEXT: _LIMITS + _TEXTS, TOKENS: _TOKENS, "/tokenize": [],
    "/apply-template": [chat for chat in _CHATS if chat.keys() == {"messages"}],
}  # fmt: skip
BASES: Json = {
    CHAT: {**user("hi"), "max_tokens": 1}, TEXT: {"prompt": "hi", "max_tokens": 1},
    "/apply-template": user("hi"), "/tokenize": {"content": "hi"}, TOKENS: {"tokens": [5]},
}  # fmt: skip
NO_JSON = st.one_of(
    st.binary(max_size=20).map(lambda raw: raw + b"\xff"),
    st.integers(1, 200_000).map(lambda n: b"[" * n),
    st.integers(1_500, 200_000).map(lambda n: b'{"messages":' + b"[" * n + b"]" * n + b"}"),
    st.sampled_from([b"", b"nul", b'{"a":NaN}', b'{"a":1e}', b"{'a':1}", b"5",
                     b'{"messages":"\x00"}', b"\xef\xbb\xbf{}", b'{"a":1}{"a":1}', b'"text"',
                     b"\x1f\x8b\x08\x00", b"{" + b'"a":' * 999, b"9" * 5_000]),
)  # fmt: skip


@st.composite
def wrong(draw: st.DrawFn, path: str) -> bytes:
    """A body that keeps to the description but can't be answered, or that is no JSON."""
    kind = draw(st.sampled_from(["wrong", "wrong", "cut", "no JSON"]))
    if kind == "wrong" and WRONG[path]:
        return json.dumps(BASES[path] | draw(st.sampled_from(WRONG[path]))).encode()
    if kind == "no JSON":
        return draw(NO_JSON)
    whole = json.dumps(draw(VALID[path])).encode()
    return whole[: draw(st.integers(0, len(whole) - 1))]


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    options = ("--chat-template", TEMPLATE, "-np", 4, "--cache-ram", 4, "-c", 8192)
    with serving(*options) as made:
        yield made


class Client:
    """One connection to a server."""

    def __init__(self, server: Process) -> None:
        self._server = server
        self._connection = HTTPConnection("127.0.0.1", server.port, timeout=60)

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        self._connection.request("POST", path, body)
        response = self._connection.getresponse()
        return response.status, response.read()

    def check_idle(self) -> None:
        metrics = self._server.ask("GET", "/metrics")[1]
        assert "gdn_requests_running 0.0" in metrics
        assert "gdn_requests_waiting 0.0" in metrics

    def close(self) -> None:
        self._connection.close()

    def mib(self) -> float:
        """Memory of the process."""
        pid = str(self._server.process.pid)
        return int(subprocess.check_output(["ps", "-o", "rss=", "-p", pid])) / 1024


def each(n: int, strategy: Any, check: Callable[[Any], None]) -> None:
    """Check n values."""

    @settings(max_examples=n, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def run(value: Any) -> None:
        check(value)

    run()


def body_of(case: Any) -> bytes:
    """The bytes of what schemathesis made."""
    return case.body if isinstance(case.body, bytes) else json.dumps(case.body).encode()


@pytest.fixture
def client(server: Process) -> Iterator[Client]:
    with contextlib.closing(Client(server)) as made:
        yield made


def test_bodies(server: Process, client: Client) -> None:
    n_posted, sizes = Counter[int](), list[float]()
    served = json.loads(server.ask("GET", "/openapi.json")[1])
    schema = schemathesis.openapi.from_dict(served)
    mode = schemathesis.GenerationMode.NEGATIVE

    def refused(path: str, body: bytes) -> None:
        status, told = client.post(path, body)
        assert 400 <= status < 500, (path, body[:2000], told[:2000])
        assert json.loads(told).keys() == {"error"}, (path, body[:2000], told)
        n_posted[400] += 1

    def answered(path: str, body: Json) -> None:
        jsonschema.validate(_described(served, path), body)
        status, told = client.post(path, json.dumps(body).encode())
        assert status == 200, (path, body, told)
        assert b'"error"' not in told, (path, body, told)
        n_posted[200] += 1

    while len(sizes) <= N_ROUNDS or sizes[-1] - sizes[-1 - N_ROUNDS] > MAX_GROWTH:
        assert len(sizes) < MAX_ROUNDS, sizes
        for path in PATHS:
            broken = schema[path]["POST"].as_strategy(generation_mode=mode).map(body_of)
            each(N_BROKEN, broken, partial(refused, path))
            each(N_WRONG, wrong(path), partial(refused, path))
            each(N_VALID, VALID[path], partial(answered, path))
        client.check_idle()
        sizes.append(client.mib())
    assert n_posted[400] >= 2_000, n_posted
    assert n_posted[200] >= 200, n_posted


def _described(served: Json, path: str) -> Json:
    """The description of a body, with what it refers to."""
    content = served["paths"][path]["post"]["requestBody"]["content"]
    return {**content["application/json"]["schema"], "components": served["components"]}
