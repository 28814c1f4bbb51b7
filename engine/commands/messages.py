"""Messages of a chat from standard input, typed or piped: one a line, or several lines together."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from engine.commands.options import InputError

_QUOTES = '"""'


def read_messages() -> Iterator[str]:
    """Messages from standard input until it ends, except empty ones."""
    while (line := _read_line()) is not None:
        start = line.lstrip()
        if start.startswith(_QUOTES):
            message = _quoted(start.removeprefix(_QUOTES))
        else:
            message = _continued(line)
        if message.strip():
            yield message


def _quoted(line: str | None) -> str:
    """The lines up to one that ends in quotes."""
    lines = []
    while line is not None:
        text = line.rstrip()
        lines.append(text.removesuffix(_QUOTES) if text.endswith(_QUOTES) else line)
        line = None if text.endswith(_QUOTES) else _read_line()
    return "\n".join(lines).strip("\n")


def _continued(line: str | None) -> str:
    """A line, and the next as long as a line ends in a backslash."""
    lines = []
    while line is not None:
        lines.append(line.removesuffix("\\"))
        line = _read_line() if line.endswith("\\") else None
    return "\n".join(lines)


def is_interactive() -> bool:
    """Whether messages are typed on a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def _read_line() -> str | None:
    """A line without its end; None at the end of the input. Raises InputError."""
    if not is_interactive():
        data = sys.stdin.buffer.readline()
        try:
            line = data.decode()
        except UnicodeDecodeError as error:
            came = f"byte 0x{data[error.start]:02x} in {data[:40]!r}"
            raise InputError(f"standard input: expected UTF-8, got {came}") from None
    elif sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (with it, input() edits lines)
        try:
            return input("> ")
        except EOFError:
            print(file=sys.stderr)
            return None
    else:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None
