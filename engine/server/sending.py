"""An answer on its way to a client: events of a stream, or one object."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import EngineError
from engine.server.bridge import Bridge, Job
from engine.server.errors import ApiError, as_api_error

_log = logging.getLogger(__name__)
_KEEP_ALIVE = b": keep-alive\n\n"
_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]  # fmt: skip


def failure(error: ApiError) -> Response:
    """The answer with an error."""
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    body = msgspec.json.encode(error.body)
    return Response(body, error.status, headers, "application/json")


def told(error: Exception) -> ApiError:
    """What a client gets of an error; of a bug of ours nothing but that it is one."""
    if isinstance(error, EngineError):
        return as_api_error(error)
    _log.error("a bug in the server: %r", error, exc_info=_log.isEnabledFor(logging.INFO))
    return ApiError("internal error", 500)


class Answer(Response):
    """Runs a job until it has ended, or its client is gone, and closes it."""

    def __init__(self, bridge: Bridge, job: Job) -> None:
        self._bridge, self._job, self._has_begun = bridge, job, False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await (self._stream if self._job.reply.streams else self._object)(send)
        except Exception as error:
            await self._fail(told(error), scope, receive, send)
        finally:
            watcher.cancel()
            self._bridge.close(self._job)

    async def _watch(self, receive: Receive) -> None:
        """Notice that the client is gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._job.leave()

    async def _news(self) -> AsyncIterator[list[bytes]]:
        """Events as they come; an empty list where nothing came for long."""
        job = self._job
        while not job.reply.is_done:
            await job.news.wait()
            job.news.clear()
            if job.is_gone:
                return
            job.measure()
            if job.is_cancelled:
                raise ApiError("the server ends: the answer was cut short", 503)
            yield job.reply.news()

    async def _stream(self, send: Send) -> None:
        job = self._job
        async for events in self._news():
            if job.reply.is_done:
                events += job.reply.last()
            elif not events:
                if time.monotonic() - job.sent_at < self._bridge.keep_alive_s:
                    continue
                events = [_KEEP_ALIVE]
            await self._begin(send)
            await _send(send, b"".join(events), has_more=not job.reply.is_done)
            job.sent_at = time.monotonic()

    async def _begin(self, send: Send) -> None:
        if not self._has_begun:
            self._has_begun = True
            await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})

    async def _object(self, send: Send) -> None:
        async for _ in self._news():
            pass
        if not self._job.is_gone:
            body = self._job.reply.whole()
            headers = [
                (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)),
            ]  # fmt: skip
            self._has_begun = True
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await _send(send, body, has_more=False)

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if self._job.is_gone:
            return
        if not self._has_begun:
            await failure(error)(scope, receive, send)
        elif self._job.reply.streams:
            await _send(send, b"data: %b\n\n" % msgspec.json.encode(error.body), has_more=False)


async def _send(send: Send, body: bytes, has_more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": has_more})
