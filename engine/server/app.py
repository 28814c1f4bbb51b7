"""The HTTP application: routes, keys, limits, and errors in the protocol's form."""

from __future__ import annotations

import asyncio
import hmac
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from engine.engine import Engine
from engine.server import queries
from engine.server.bridge import Bridge, Call
from engine.server.chat import ChatCall, Shared
from engine.server.completions import CompletionCall
from engine.server.errors import ApiError
from engine.server.openapi import description
from engine.server.sending import Answer, failure, told

_MODEL = "/models/{name:path}"  # Names of models have slashes.
Handler = Callable[[Request, str], Awaitable[Response]]
_METRICS = "text/plain; version=1.0.0; charset=utf-8"


@dataclass(frozen=True)
class ServerConfig:
    """Options of the server. keys: API keys, none: everybody may ask; cors: origins whose pages
    may; max_body: bytes of a request; body_idle_s: how long its body may pause."""

    max_queue: int = 128
    keys: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    max_body: int = 32 << 20
    keep_alive_s: float = 15.0
    body_idle_s: float = 60.0


class Server:
    """The application `app`, and its `bridge` once it runs. `load` makes the engine in a thread of
    its own; `on_loaded` gets it, or the exception, in the event loop."""

    bridge: Bridge

    def __init__(
        self, load: Callable[[], Engine], shared: Shared, config: ServerConfig,
        on_loaded: Callable[[Engine | BaseException], object] = lambda result: None,
    ) -> None:  # fmt: skip
        self._load, self._shared, self._config, self._on_loaded = load, shared, config, on_loaded
        self._engine: Engine | None = None
        self._keys = [key.encode() for key in config.keys]
        middleware = []
        if config.cors:
            middleware.append(
                Middleware(CORSMiddleware, list(config.cors), ["GET", "POST"], allow_headers=["*"])
            )
        self.app = Starlette(
            routes=self._routes(),
            middleware=middleware,
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _refused},
        )

    def _routes(self) -> list[Route]:
        posts: dict[str, Handler] = {
            "/chat/completions": partial(self._generate, self._chat_call),
            "/completions": partial(self._generate, self._completion_call),
            "/tokenize": partial(self._work, queries.tokenize),
            "/detokenize": partial(self._work, queries.detokenize),
            "/apply-template": partial(self._work, queries.apply_template),
        }
        gets: dict[str, Handler] = {
            "/models": self._models, _MODEL: self._model, "/props": self._props,
            "/health": self._health, "/metrics": self._metrics, "/openapi.json": self._openapi,
        }  # fmt: skip
        is_open = {"/models", _MODEL, "/health"}
        routes = []
        for method, handlers in (("POST", posts), ("GET", gets)):
            for path, handler in handlers.items():
                guarded = partial(self._guarded, handler, path in is_open)
                routes += [_route(p, guarded, method) for p in (path, f"/v1{path}")]
        return routes

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.bridge = bridge = Bridge(self._config.max_queue, self._config.keep_alive_s)
        loop = bridge.loop

        def load() -> None:
            result: Engine | BaseException
            try:
                result = self._load()
            except BaseException as error:
                result = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._loaded, result)

        # Nobody waits for it where the server ends before.
        threading.Thread(target=load, name="load", daemon=True).start()
        try:
            yield
        finally:
            await bridge.end()
            if self._engine is not None:
                await asyncio.to_thread(self._engine.close)

    def _loaded(self, result: Engine | BaseException) -> None:
        if isinstance(result, Engine):
            self._engine = result
            self.bridge.attach(result)
        self._on_loaded(result)

    # What every request goes through.

    async def _guarded(self, handler: Handler, is_open: bool, request: Request) -> Response:
        try:
            key = self._key(request)
            if key is None and not is_open:
                raise ApiError(
                    "expected an API key in the header Authorization: Bearer KEY",
                    401, "invalid_api_key",
                )  # fmt: skip
            return await handler(request, key or "")
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception as error:
            return failure(told(error))

    def _key(self, request: Request) -> str | None:
        """The client's key; empty where none is needed, None for a wrong one. All keys are compared
        whole, so that time tells nothing."""
        if not self._keys:
            return ""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = request.headers.get("x-api-key", "")
        raw = given.strip().encode()
        is_known = [hmac.compare_digest(raw, key) for key in self._keys]
        return given.strip() if any(is_known) else None

    async def _body(self, request: Request) -> bytes:
        """The body. Raises ApiError for one that is too long, before all of it is read, and for one
        that does not come: its request has a place meanwhile."""
        most, body = self._config.max_body, bytearray()
        length = request.headers.get("content-length", "")
        n = int(length) if length.isdecimal() and len(length) < 19 else 0
        idle_s = self._config.body_idle_s
        try:
            async with asyncio.timeout(idle_s) as limit:
                async for part in request.stream():
                    limit.reschedule(self.bridge.loop.time() + idle_s)
                    body += part
                    if max(len(body), n) > most:
                        raise ApiError(f"expected a body of at most {most} bytes", 413)
        except TimeoutError:
            raise ApiError(
                f"expected more of the body within {idle_s:g} s, got {len(body)} bytes", 408
            ) from None
        return bytes(body)

    # What generates.

    async def _generate(
        self, read: Callable[[bytes, str], Call], request: Request, key: str
    ) -> Response:
        try:
            with self.bridge.place():
                body = await self._body(request)
                return Answer(self.bridge, await self.bridge.submit(lambda: read(body, key)))
        except Exception:
            self.bridge.metrics.count_refusal()
            raise

    def _chat_call(self, body: bytes, key: str) -> Call:
        return ChatCall(body, self._shared, key)

    def _completion_call(self, body: bytes, key: str) -> Call:
        return CompletionCall(body, self._shared)

    # What does not.

    async def _work(
        self, work: Callable[[bytes, Engine, Shared, str], Any], request: Request, key: str
    ) -> Response:
        self.bridge.take(1)
        try:
            engine, body = self.bridge.engine, await self._body(request)
            return _json(await self.bridge.run(lambda: work(body, engine, self._shared, key)))
        finally:
            self.bridge.give_back(1)

    async def _models(self, request: Request, key: str) -> Response:
        data = [queries.model(self.bridge.engine, self._shared)]
        return _json({"object": "list", "data": data})

    async def _model(self, request: Request, key: str) -> Response:
        return _json(queries.model(self.bridge.engine, self._shared))

    async def _props(self, request: Request, key: str) -> Response:
        return _json(queries.props(self.bridge.engine, self._shared))

    async def _health(self, request: Request, key: str) -> Response:
        _ = self.bridge.engine
        return _json({"status": "ok"})

    async def _metrics(self, request: Request, key: str) -> Response:
        return Response(await self.bridge.run(self.bridge.metrics.text), media_type=_METRICS)

    async def _openapi(self, request: Request, key: str) -> Response:
        return _json(description())


def _route(path: str, handler: Callable[[Request], Awaitable[Response]], method: str) -> Route:
    async def endpoint(request: Request) -> Response:
        return await handler(request)

    return Route(path, endpoint, methods=[method])


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    """What no route takes."""
    assert isinstance(error, HTTPException)
    came = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        text = f"expected a path that /openapi.json has, got {came}"
    else:
        text = f"expected {(error.headers or {}).get('Allow', error.detail)}, got {came}"
    response = failure(ApiError(text, error.status_code))
    response.headers.update(error.headers or {})
    return response
