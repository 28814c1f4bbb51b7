"""The server's process: its socket, its signals, and the engine that it loads."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from types import FrameType

import uvicorn

from engine.commands import chat
from engine.commands.options import (
    InputError,
    given_fields,
    load_engine,
    read_text,
    sampling_params,
)
from engine.config import context_size
from engine.engine import Engine
from engine.formats.gguf import GGUFFile
from engine.models import load_model
from engine.sampling.params import SamplingParams
from engine.server.app import Server, ServerConfig
from engine.server.chat import Shared

# Longer than answers that were cut short take to say so.
_LAST_WORDS_S, _BACKLOG = 5, 2_048


class _Process(uvicorn.Server):
    """Ends at the first signal, when answers have finished or the time for that is over; at the
    second one at once."""

    app: Server
    drain_s: float

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        loop, bridge = self.app.bridge.loop, self.app.bridge
        if self.should_exit:
            loop.call_soon_threadsafe(bridge.cancel_all)
            return
        self.should_exit = True
        loop.call_soon_threadsafe(bridge.refuse)
        loop.call_soon_threadsafe(loop.call_later, self.drain_s, bridge.cancel_all)


def serve(args: argparse.Namespace) -> int:
    """Serve until a signal comes. Raises EngineError, also of the model."""
    shared, config = _shared(args), _config(args)
    if args.verbose:
        _log_requests()
    n_parallel = args.n_parallel
    if not hasattr(args, "n_ctx"):  # Each sequence gets what one alone would get.
        file = GGUFFile(args.model)
        args.n_ctx = context_size(None, load_model(file).n_ctx_train) * n_parallel
    listener = open_listener(args.host, args.port)
    failures: list[BaseException] = []

    def loaded(result: Engine | BaseException) -> None:
        if isinstance(result, BaseException):
            failures.append(result)
            process.should_exit = True

    server = Server(lambda: load_engine(args), shared, config, loaded)
    settings = uvicorn.Config(
        server.app, log_level="info" if args.verbose else "warning", log_config=None,
        access_log=args.verbose, server_header=False, lifespan="on", ws="none",
        timeout_graceful_shutdown=args.drain_timeout + _LAST_WORDS_S,
    )  # fmt: skip
    process = _Process(settings)
    process.app, process.drain_s = server, args.drain_timeout
    host, port = listener.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    print(f"{shared.name} at http://{where}:{port}", file=sys.stderr, flush=True)
    process.run(sockets=[listener])
    if failures:
        raise failures[0]
    return 0


def _log_requests() -> None:
    """Log each request, and tracebacks of bugs; the command line's own log says nothing twice."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    uvicorn_log = logging.getLogger("uvicorn")
    uvicorn_log.addHandler(handler)
    uvicorn_log.propagate = False
    logging.getLogger("engine.server").setLevel(logging.INFO)


def open_listener(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises InputError."""
    made: socket.socket | None = None
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With its protocol, asyncio knows that small packets must not wait for each other.
        made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(_BACKLOG)
    except (OSError, UnicodeError) as error:
        if made is not None:
            made.close()
        told = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} --port {port}: {told}") from None
    return made


def _shared(args: argparse.Namespace) -> Shared:
    given = given_fields(args, SamplingParams)
    params = sampling_params(args)
    defaults = {name: getattr(params, name) for name in given}
    name = args.alias or GGUFFile(args.model).path.name
    return Shared(name, defaults=defaults, **chat.template_options(args))


def _config(args: argparse.Namespace) -> ServerConfig:
    """Raises InputError for a key that no header can have."""
    keys = [key.strip() for text in args.api_key for key in text.split(",")]
    if args.api_key_file is not None:
        lines = read_text(args.api_key_file).splitlines()
        keys += [line.strip() for line in lines if line.strip()]
        if not keys:
            raise InputError(f"{args.api_key_file}: expected keys, one a line, got none")
    if not all(key.isascii() and key.isprintable() and key for key in keys):
        raise InputError("--api-key: expected keys of printable ASCII characters")
    origins = [origin.strip().rstrip("/") for text in args.cors for origin in text.split(",")]
    return ServerConfig(args.max_queue, tuple(keys), tuple(origins))
