"""Calls of the server's application without a socket: what comes when, and clients that vanish."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from engine.engine import Engine
from engine.server.app import Server, ServerConfig
from engine.server.chat import Shared


class Exchange:
    """One request and what the server sent so far: `events` of a stream, `status`, `headers`."""

    def __init__(
        self, server: Server, path: str, body: Any, is_whole: bool, headers: dict[str, str]
    ) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": raw, "more_body": not is_whole})
        self.status, self.headers, self.sends = 0, dict[str, str](), list[bytes]()
        self.news = asyncio.Condition()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "server": ("test", 80), "client": ("test", 1),
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        }  # fmt: skip
        self.task = asyncio.create_task(server.app(scope, self._inbox.get, self._send))

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            self.sends.append(message["body"])
        async with self.news:
            self.news.notify_all()

    def send(self, part: bytes, is_last: bool) -> None:
        """Send more of the body."""
        self._inbox.put_nowait({"type": "http.request", "body": part, "more_body": not is_last})

    def vanish(self) -> None:
        """The client closes its connection."""
        self._inbox.put_nowait({"type": "http.disconnect"})

    @property
    def events(self) -> list[Any]:
        """What comes after `data: ` in all events, parsed but for [DONE]."""
        data = b"".join(self.sends).split(b"\n\n")
        lines = [d.removeprefix(b"data: ") for d in data if d.startswith(b"data: ")]
        return [line if line == b"[DONE]" else json.loads(line) for line in lines]

    @property
    def json(self) -> Any:
        return json.loads(b"".join(self.sends))

    async def until(self, n_sends: int) -> None:
        """Wait until so much was sent."""
        async with self.news, asyncio.timeout(20):
            await self.news.wait_for(lambda: len(self.sends) >= n_sends)

    async def end(self) -> Exchange:
        async with asyncio.timeout(20):
            await self.task
        return self


class Running:
    """A server that runs."""

    def __init__(self, server: Server, engine: Engine) -> None:
        self.server, self.engine = server, engine

    def post(self, path: str, body: Any, is_whole: bool = True, **headers: str) -> Exchange:
        """Send a request; if it is not whole, more of its body is to come."""
        return Exchange(self.server, path, body, is_whole, headers)


@contextlib.asynccontextmanager
async def running(
    engine: Engine, shared: Shared | None = None, **config: Any
) -> AsyncIterator[Running]:
    """A server of an engine, which is loaded."""
    loaded = asyncio.Event()
    server = Server(
        lambda: engine,
        Shared("scripted") if shared is None else shared,
        ServerConfig(**config),
        lambda result: loaded.set(),
    )
    async with server.app.router.lifespan_context(server.app):
        await loaded.wait()
        yield Running(server, engine)


async def settled(condition: Any, seconds: float = 10) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
