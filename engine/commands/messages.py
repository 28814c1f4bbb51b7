"""Messages of a chat from standard input, typed or piped: one a line, or several lines together."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from engine.commands.options import InputError

_QUOTES = '"""'


def read_messages() -> Iterator[str]:
    """Messages from standard input until it ends. Empty ones are left out."""
    while (line := _read_line()) is not None:
        start = line.lstrip()
        if start.startswith(_QUOTES):
            message = _block(start.removeprefix(_QUOTES))
        else:
            message = _continued(line)
        if message.strip():
            yield message


def _block(line: str | None) -> str:
    """The lines up to one that ends in quotes."""
    lines = []
    while line is not None:
        if line.rstrip().endswith(_QUOTES):
            lines.append(line.rstrip().removesuffix(_QUOTES))
            break
        lines.append(line)
        line = _read_line()
    return "\n".join(lines).strip("\n")


def _continued(line: str) -> str:
    """A line, with those after it as long as each ends in a backslash."""
    lines = []
    while line.endswith("\\"):
        lines.append(line.removesuffix("\\"))
        following = _read_line()
        if following is None:
            return "\n".join(lines)
        line = following
    return "\n".join([*lines, line])


def is_interactive() -> bool:
    """Whether messages are typed."""
    return sys.stdin is not None and sys.stdin.isatty()


def _read_line() -> str | None:
    """A line without its end; None at the end of the input."""
    if is_interactive():
        if sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (with it, input() edits lines)
            try:
                return input("> ")
            except EOFError:
                print(file=sys.stderr)
                return None
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
    else:
        data = sys.stdin.buffer.readline()
        try:
            line = data.decode()
        except UnicodeDecodeError as error:
            came = f"byte 0x{data[error.start]:02x} in {data[:40]!r}"
            raise InputError(f"standard input: expected UTF-8, got {came}") from None
    return line.rstrip("\r\n") if line else None
