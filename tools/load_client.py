"""A server in a process of its own, and clients that are cheap beside it, for tools/load_server.py.

A client is one connection of asyncio. It looks for the first event and for the end of a stream,
and parses the last event alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from engine.errors import EngineError

HOST = "127.0.0.1"
CHAT = "/v1/chat/completions"
_ROOT = Path(__file__).resolve().parent.parent
_LOADING_S, _CALL_S = 300, 120
_FIRST, _DONE, _END = b"data: ", b"data: [DONE]\n\n", b"\r\n0\r\n\r\n"
_N_GENERATED = re.compile(rb'"predicted_n":(\d+)')
_GAUGE = re.compile(r"^(gdn_\w+) (\S+)$", re.M)


class LoadError(EngineError):
    """A server that did not do what was asked of it."""


class ServerProcess:
    """`gdn serve` with some options, on a free port; ended with its `with`."""

    def __init__(self, *options: object) -> None:
        command = [sys.executable, str(_ROOT / "cli.py"), "serve", "--port", "0"]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by __exit__)
        self.process = subprocess.Popen(
            [*command, *map(str, options)], stderr=self._log, stdout=self._log
        )
        self.port = 0

    def __enter__(self) -> Self:
        end = time.monotonic() + _LOADING_S
        while not self._is_loaded():
            if self.process.poll() is not None or time.monotonic() > end:
                said = self.said()
                self.__exit__(None, None, None)
                raise LoadError(f"expected a server that loads, got: {said}")
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        status = self.process.poll()
        self.process.kill()
        self.process.wait()
        with self._log:
            if status is not None and isinstance(error, LoadError) and self.port:
                raise LoadError(f"{error}; it had ended by {status}: {self.said()}") from error

    def said(self) -> str:
        """What it wrote so far."""
        self._log.seek(0)
        return self._log.read().strip()

    def _is_loaded(self) -> bool:
        if not self.port and (found := re.search(r" at http://\S+:(\d+)$", self.said(), re.M)):
            self.port = int(found[1])
        return bool(self.port) and self.ask("GET", "/health")[0] == 200

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """(status, body) of a call whose answer does not stream."""
        connection = HTTPConnection(HOST, self.port, timeout=_CALL_S)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def post(self, path: str, body: Any) -> Any:
        """The object that answers a call. Raises LoadError for another status than 200."""
        status, text = self.ask("POST", path, body)
        if status != 200:
            raise LoadError(f"{path}: expected status 200, got {status}: {text}")
        return json.loads(text)

    def gauges(self) -> dict[str, float]:
        """The values of /metrics that have no labels."""
        return {name: float(x) for name, x in _GAUGE.findall(self.ask("GET", "/metrics")[1])}

    @property
    def loop_seconds(self) -> float:
        """Processor time of its event loop, which is its main thread."""
        n = self.process.pid
        fields = Path(f"/proc/{n}/task/{n}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    @property
    def n_files(self) -> int:
        """Its file descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def resident(self) -> int:
        """Its memory, in bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def request_bytes(body: Any, path: str = CHAT) -> bytes:
    """A request as a client sends it."""
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(raw)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + raw


@dataclass
class Streamed:
    """What came of one stream: seconds to its first event and to its end; tokens; what went
    wrong, empty if nothing did."""

    first_s: float
    seconds: float
    n_tokens: int
    error: str = ""


class Client(asyncio.Protocol):
    """One connection. `stream` sends a request and waits for the end of its answer."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._tail, self._sent_at, self._first_at = b"", 0.0, 0.0

    @classmethod
    async def connected(cls, port: int) -> Client:
        return (await asyncio.get_running_loop().create_connection(cls, HOST, port))[1]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if not self._first_at and (_FIRST in data or b" 200 " not in data[:20]):
            self._first_at = time.perf_counter()
        self._tail = (self._tail + data)[-2048:]
        if self._tail.endswith(_END) and not self._ended.done():
            self._ended.set_result("")

    def connection_lost(self, error: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(f"the connection ended: {error}")

    async def stream(self, request: bytes) -> Streamed:
        assert self._transport is not None
        self._ended = asyncio.get_running_loop().create_future()
        self._tail, self._first_at = b"", 0.0
        self._sent_at = time.perf_counter()
        self._transport.write(request)
        error = await self._ended
        if error:
            error += f" after {self._tail!r}"
        now = time.perf_counter()
        found = _N_GENERATED.search(self._tail)
        if not error and (_DONE not in self._tail or not found):
            error = self._tail.decode(errors="replace")
        n_tokens = int(found[1]) if found else 0
        return Streamed(self._first_at - self._sent_at, now - self._sent_at, n_tokens, error)

    def close_half(self) -> None:
        """Say that nothing more is sent; answers can still be read."""
        assert self._transport is not None
        self._transport.write_eof()

    def close(self, is_abrupt: bool = False) -> None:
        assert self._transport is not None
        (self._transport.abort if is_abrupt else self._transport.close)()
