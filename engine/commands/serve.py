"""`serve`: an HTTP server with OpenAI's protocol."""

from __future__ import annotations

import argparse
from typing import Any

from engine.commands import chat
from engine.commands.options import Parser, at_least
from engine.config import ConfigError

ABOUT = "Serve a model over HTTP: OpenAI's protocol for chats and completions."
_N_PARALLEL, _MAX_PORT = 4, 65_535
# Options that mean something else here than their help says.
_OTHERWISE = {
    "-np": f"sequences that run at the same time ({_N_PARALLEL})",
    "-c": "context in tokens, which sequences share (for each of them 4096, or the model's if that "
    "is less; 0: the model's)",
    "-n": "most tokens of an answer whose request does not say (the context's share of a sequence; "
    "-1: until full)",
}


def add_options(p: Parser) -> None:
    p.common_options()
    group = p.add_argument_group("server")
    add = group.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS",
        help="address to listen on (127.0.0.1: this machine only)")  # fmt: skip
    add("--port", type=_port, default=8080, metavar="N",
        help="port to listen on; 0: any that is free (8080)")  # fmt: skip
    add("-a", "--alias", metavar="NAME", help="name of the model in answers (the file's)")
    listed: dict[str, Any] = {"action": "append", "default": []}
    add("--api-key", metavar="KEY[,KEY…]", help="key that clients must send", **listed)
    add("--api-key-file", metavar="FILE", help="file with such keys, one a line")
    add("--cors", metavar="ORIGIN[,ORIGIN…]", **listed,
        help="let pages of an origin use it, such as http://localhost:3000; *: all")  # fmt: skip
    p.number("--max-queue", "requests that may wait; more are answered 503 (128)", 0, group,
             default=128)  # fmt: skip
    p.number("--drain-timeout", "seconds that running answers get to finish after SIGTERM or "
             "Ctrl-C; a second signal ends them (30)", 0, group, default=30)  # fmt: skip
    chat.add_template_options(p.add_argument_group("chat"))
    p.set_defaults(escape=True, n_parallel=_N_PARALLEL)
    p.engine_options()
    p.sampling_options()
    for name, about in _OTHERWISE.items():
        if action := p.option(name):
            action.help = about


def _port(text: str) -> int:
    if (port := at_least(0)(text)) > _MAX_PORT:
        raise argparse.ArgumentTypeError(f"expected at most {_MAX_PORT}, got {text}")
    return port


_port.__name__ = "integer"


def run(parser: Parser, args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    try:
        import msgspec  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the server needs {error.name}: pip install 'gdn-engine[server]'"
        ) from None
    from engine.commands.serving import serve

    return serve(args)
