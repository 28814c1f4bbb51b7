"""A server on a free port of this machine, in a thread, that notes what clients send."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn

from engine.commands.serving import open_listener
from engine.engine import Engine
from engine.server.app import Server, ServerConfig
from engine.server.chat import Shared


@dataclass
class Noted:
    """A request and its answer's status; 0 while there is none."""

    path: str
    raw: bytes = b""
    status: int = 0

    @property
    def body(self) -> Any:
        return json.loads(self.raw)


class Live:
    """A server of an engine; `noted`: all POST requests so far."""

    def __init__(self, engine: Engine, shared: Shared, **config: Any) -> None:
        self.noted: list[Noted] = []
        self._loaded = threading.Event()
        self._server = Server(
            lambda: engine, shared, ServerConfig(**config), lambda result: self._loaded.set()
        )
        self._listener = open_listener("127.0.0.1", 0)
        settings = uvicorn.Config(
            self._app, interface="asgi3", log_config=None, lifespan="on", ws="none"
        )
        self._uvicorn = uvicorn.Server(settings)
        sockets = [self._listener]
        self._thread = threading.Thread(target=self._uvicorn.run, args=[sockets], daemon=True)
        self._thread.start()
        assert self._loaded.wait(20)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    @property
    def n_taken(self) -> int:
        """Completions that wait or run."""
        return self._server.bridge.n_taken

    def wait_until_idle(self, seconds: float = 5) -> None:
        end = time.monotonic() + seconds
        while self.n_taken:
            assert time.monotonic() < end, f"{self.n_taken} requests are still there"
            time.sleep(0.005)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._server.app(scope, receive, send)
            return
        self.noted.append(noted := Noted(scope["path"]))

        async def note_body() -> Any:
            message = await receive()
            noted.raw += message.get("body", b"")
            return message

        async def note_status(message: Any) -> None:
            noted.status = message.get("status", noted.status)
            await send(message)

        await self._server.app(scope, note_body, note_status)

    def close(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._listener.close()


@contextlib.contextmanager
def live(engine: Engine, shared: Shared, **config: Any) -> Iterator[Live]:
    server = Live(engine, shared, **config)
    try:
        yield server
    finally:
        server.close()
