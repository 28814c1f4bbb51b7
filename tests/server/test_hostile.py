"""Bodies made to break things: each is answered, none with a 5xx, and nothing is left behind."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from engine.server import protocol
from engine.server.app import Server, ServerConfig
from engine.server.chat import Shared
from engine.text.template import ChatTemplate
from tests.server.conftest import message_of
from tests.support.scripted import Script, ScriptedEngine

TEMPLATE = Path(__file__).parents[1] / "support" / "templates" / "qwen35_style.jinja"
KINDS = {
    "/v1/chat/completions": protocol.ChatRequest,
    "/v1/completions": protocol.CompletionRequest,
    "/apply-template": protocol.ChatRequest,
    "/tokenize": protocol.TokenizeRequest,
    "/detokenize": protocol.DetokenizeRequest,
}
ATOMS = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([10**400, -(10**30), 2**63, 1e308, "", "auto", "required", "<think>",
                       "</tool_call>", "\x00", "\ufdd0", "5", "-inf", "none", "text"])
)  # fmt: skip
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.text(max_size=6) | st.sampled_from(["type", "text", "5"]), inner, max_size=4
    ),
    max_leaves=8,
)  # fmt: skip
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "user", "developer", "x"])},
        optional={
            "content": st.text(max_size=10) | st.text(max_size=10) | VALUES, "name": VALUES,
            "tool_call_id": VALUES,
            "tool_calls": VALUES | st.lists(st.fixed_dictionaries({
                "id": st.text(max_size=3), "type": st.just("function"),
                "function": st.fixed_dictionaries({
                    "name": st.text(max_size=3), "arguments": VALUES | st.text(max_size=8)})}),
                max_size=2),
            "reasoning_content": VALUES,
        },
    ),
    max_size=4,
)  # fmt: skip
TOOLS = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": VALUES | st.fixed_dictionaries(
        {"name": st.text(max_size=4), "parameters": VALUES})}),
    max_size=2,
)  # fmt: skip


# Fields that a request can hardly do without, as they should be.
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "messages": MESSAGES, "tools": TOOLS, "prompt": st.text(min_size=1, max_size=5),
    "content": st.text(), "tokens": st.lists(st.integers(0, 4095)), "n": st.integers(1, 3),
    "max_tokens": st.integers(0, 3), "tool_choice": st.sampled_from(["auto", "none"]),
    "suffix": st.none(), "grammar": st.none(), "json_schema": st.none(),
    "response_format": st.just({"type": "text"}), "best_of": st.none(),
}  # fmt: skip
BASIC: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-1, 9) | st.integers(), bool: st.booleans(), str: st.text(max_size=5),
    float: st.floats(0, 2) | st.floats(allow_nan=False, allow_infinity=False),
    Any: VALUES, type(None): st.none(),
    protocol.StreamOptions: st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
}  # fmt: skip


def typed(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    if hint in BASIC:
        return BASIC[hint]
    inner = [typed(arg) for arg in get_args(hint)]
    if get_origin(hint) is list:
        return st.lists(inner[0], max_size=3)
    if get_origin(hint) is dict:
        return st.dictionaries(inner[0], inner[1], max_size=3)
    return st.one_of(inner)


@st.composite
def bodies(draw: st.DrawFn, kind: Any) -> dict[str, Any]:
    """Some fields of the right types, and at times some of any kind."""
    hints = get_type_hints(kind)
    names = draw(st.lists(st.sampled_from(sorted(hints)), max_size=4))
    needed = [name for name in ("messages", "prompt", "content", "tokens") if name in hints]
    body = {n: draw(GOOD[n] if n in GOOD else typed(hints[n])) for n in [*needed, *names]}
    for name in draw(st.lists(st.sampled_from(sorted(hints)), max_size=2)):
        body[name] = draw(VALUES | typed(hints[name]))
    return body


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    shared = Shared("m", template=ChatTemplate(TEMPLATE.read_text()))
    engine = ScriptedEngine(Script("a </think> <tool_call>"))
    with TestClient(
        Server(lambda: engine, shared, ServerConfig()).app, raise_server_exceptions=False
    ) as made:
        while made.get("/health").status_code == 503:
            time.sleep(0.01)
        yield made


@pytest.mark.parametrize("path", KINDS)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_body_is_our_fault(client: TestClient, path: str, data: st.DataObject) -> None:
    body = data.draw(bodies(KINDS[path]))
    response = client.post(path, content=json.dumps(body).encode())
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert message_of(response, 400, response.json()["error"]["param"])
    elif not response.headers["content-type"].startswith("text/event-stream"):
        assert response.json()
    metrics = client.get("/metrics").text
    assert "gdn_requests_running 0.0" in metrics
    assert 'gdn_requests_total{outcome="error"} 0.0' in metrics
