"""The command line: picks a command, runs it, and answers errors in one line."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from engine.commands.streams import standard_streams
from engine.errors import EngineError, has_memory, thread_refused

# Others are imported where they are used, so that `main` can name a package that is missing.
if TYPE_CHECKING:
    from engine.commands.options import Parser

COMMANDS = ("graph", "tokenize", "perplexity", "sweep-bench", "plot-bench", "bench",
            "batched-bench", "profile", "serve")  # fmt: skip
# A process that can't get so many bytes has no memory left.
_SPARE_BYTES = 8 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Before numpy is imported, whose threads would take 40 MiB of address space each, and end the
    # process where the system refuses one.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with standard_streams():
        try:
            try:
                return _run(words)
            finally:
                sys.stdout.flush()
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            return 1  # Whoever read our output is gone, and knows.
        except Exception as error:
            text = _explained(error)
            if text is None:
                raise
            if {"-v", "--verbose"} & set(words):
                traceback.print_exc()
            else:  # A file's name may hold line ends.
                print("error:", *text.splitlines(), file=sys.stderr)
            return 1


def _run(words: list[str]) -> int:
    from engine.commands.words import Reader

    command, parser, words = _command(words)
    reader = Reader(parser, lambda: (made(name)[1] for name in ("", *COMMANDS)))
    args = parser.parse_args(reader.read(words))
    for note in reader.notes:
        print(note, file=sys.stderr)
    _show_warnings()
    from tqdm import tqdm

    # Its thread would only redraw bars that stand still.
    tqdm.monitor_interval = 0
    status: int = command.run(parser, args)
    return status


def _command(words: list[str]) -> tuple[ModuleType, Parser, list[str]]:
    """The command that the words name, its parser, and the other words; `help` is --help."""
    from engine import checks

    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    name = words[0] if words and not words[0].startswith("-") else ""
    if name not in ("", *COMMANDS):
        hint = checks.did_you_mean(name, COMMANDS) or " (-m names a model)" * name.endswith(".gguf")
        expected = f"expected one of {', '.join(COMMANDS)}, or options such as -p TEXT"
        made("")[1].error(f"unknown command {name!r}{hint}: {expected}")
    return *made(name), words[bool(name) :]


def made(name: str) -> tuple[ModuleType, Parser]:
    """A command's module, and its parser; without a name, of what completes and chats."""
    from engine.commands.options import Parser

    command = importlib.import_module(f"engine.commands.{(name or 'run').replace('-', '_')}")
    prog = _prog()
    about = command.ABOUT if name else command.ABOUT % ", ".join(f"{prog} {c}" for c in COMMANDS)
    parser = Parser(prog=f"{prog} {name}".strip(), allow_abbrev=False, description=about)
    command.add_options(parser)
    return command, parser


def _prog() -> str:
    """What a user types to get here: `gdn`, `python -m engine` or `cli.py`."""
    name = Path(sys.argv[0]).name
    return f"{Path(sys.executable).name} -m engine" if name == "__main__.py" else name


def _show_warnings() -> None:
    """Print warnings in a line, and each once: `graph` places a model several times."""
    shown = set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        n_shown = len(shown)
        shown.add(record.getMessage())
        return len(shown) > n_shown

    handler = logging.StreamHandler()
    handler.addFilter(is_new)
    logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[handler])


def _explained(error: Exception) -> str | None:
    """What a user can do something about; None for a bug of ours."""
    if isinstance(error, EngineError):
        return str(error)
    if isinstance(error, RuntimeError) and "new thread" in str(error):
        return str(thread_refused("one more thread", error))
    is_memory = isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM
    is_plain = isinstance(error, OSError | ModuleNotFoundError)
    if is_memory or (not is_plain and not has_memory(_SPARE_BYTES)):
        what = getattr(error, "strerror", None) or str(error)
        return f"out of memory{what and f': {what}'}; lower -c, -ub, -np or -t"
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        return f"{named}{error.strerror or error}"
    if isinstance(error, ImportError):
        return _explained_import(error)
    return None


def _explained_import(error: ImportError) -> str | None:
    while isinstance(error.__cause__, ImportError):
        error = error.__cause__
    package = (error.name or "").partition(".")[0]
    if package == __name__.partition(".")[0]:
        return None
    if isinstance(error, ModuleNotFoundError):
        lacks = f"expected the package {package}, which {sys.executable} does not have"
        root = Path(__file__).parents[2]
        python = root / ".venv" / "bin" / "python"
        is_other = python.exists() and sys.prefix != str(root / ".venv")
        return f"{lacks}: {f'run {python} {root}/cli.py' if is_other else f'pip install {package}'}"
    return f"the package {package} can't be imported: {' '.join(str(error).split())}"
