"""Clients of the application on the scripted engine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from engine.server.app import Server, ServerConfig
from engine.server.chat import Shared
from tests.support.scripted import Script, ScriptedEngine

Connect = Callable[..., TestClient]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """connect(script, shared=…, n_parallel=…, **config): a client of a server that has loaded."""
    with contextlib.ExitStack() as stack:

        def run(
            script: Any = None, shared: Shared | None = None, n_parallel: int = 4, **config: Any
        ) -> TestClient:
            engine = ScriptedEngine(script or Script(), n_parallel)
            own = Shared("scripted") if shared is None else shared
            server = Server(lambda: engine, own, ServerConfig(**config))
            client = stack.enter_context(TestClient(server.app, raise_server_exceptions=False))
            end = time.monotonic() + 10
            while client.get("/health").status_code == 503 and time.monotonic() < end:
                time.sleep(0.01)
            return client

        yield run


def message_of(response: Any, status: int, param: str | None = None) -> str:
    """The text of an error, whose form is checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    message: str = error["message"]
    assert message.isprintable()
    assert "Traceback" not in message
    return message
