"""The command line: picks a command, runs it, and answers errors in one line."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from engine.commands.options import Parser
from engine.errors import EngineError

COMMANDS = ("graph", "tokenize", "perplexity", "sweep-bench", "plot-bench", "bench",
            "batched-bench", "profile")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and words[0] in COMMANDS else ""
    command = importlib.import_module(f"engine.commands.{(name or 'run').replace('-', '_')}")
    about = command.ABOUT if name else command.ABOUT % ", ".join(f"cli.py {c}" for c in COMMANDS)
    parser = Parser(prog=f"cli.py {name}".strip(), allow_abbrev=False, description=about)
    command.add_options(parser)
    args = parser.parse_args(words)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status: int = command.run(parser, args)
        print(end="", flush=True)
        return status
    except EngineError as error:
        if args.verbose:
            raise
        # A file's name may hold line ends.
        print("error:", *str(error).splitlines(), file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"error: out of memory: {error or 'lower -c or -ub'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output is gone; nothing is to be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
