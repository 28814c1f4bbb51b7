"""The program of the process that runs chat templates: jinja2's sandbox, bounded by the kernel.

The environment is that of transformers' `apply_chat_template`: trimmed blocks, `tojson` that
leaves HTML alone, `raise_exception`, `strftime_now`, loop controls, the tag `generation`. Nothing
of the engine is imported, so that the process starts soon. A request comes on standard input: a
header, and `marshal` bytes of a source and of variables, or None. Standard output gets a header,
and UTF-8.
"""

import errno
import functools
import gc
import json
import marshal
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, meta, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def main(request_format: str, reply_format: str) -> None:
    """Answer requests until the other end is closed; formats: of the headers, as jinja_process.py
    describes them."""
    request, reply = struct.Struct(request_format), struct.Struct(reply_format)
    # The parent may ignore or block signals, which its children inherit.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    gc.freeze()
    while header := sys.stdin.buffer.read(request.size):
        n_bytes, seconds, memory = request.unpack(header)
        # No limit is -1, and the largest number here.
        resource.setrlimit(resource.RLIMIT_AS, (min(taken + memory, soft % 2**63), hard))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            failed, text = _answer(*marshal.loads(sys.stdin.buffer.read(n_bytes)))
        except MemoryError:
            os._exit(errno.ENOMEM)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply.pack(failed, len(text)))
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        # Jinja's contexts are in cycles, and may hold a long chat.
        gc.collect()


def _answer(source: str, given: dict[str, Any] | None) -> tuple[bool, bytes]:
    """(whether it failed, what a template renders, or the names that it reads, or an error)."""
    try:
        if given is None:
            names = meta.find_undeclared_variables(_ENVIRONMENT.parse(source))
            _compiled(source)
            return False, " ".join(names).encode()
        return False, _compiled(source).render(given).encode("utf-8", "surrogatepass")
    except MemoryError:
        raise
    except Exception as error:  # An untrusted program may raise anything.
        if isinstance(error, jinja2.TemplateSyntaxError) and given is None:
            said = f"line {error.lineno}: {error.message}"
        elif isinstance(error, jinja2.TemplateError) or given is None:
            said = str(error)
        else:
            said = repr(error)
        return True, (said or type(error).__name__).encode("utf-8", "surrogatepass")


@functools.lru_cache(8)
def _compiled(source: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(source)


class _Sandbox(ImmutableSandboxedEnvironment):
    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As llama.cpp's, it lets templates append to lists, which are copies of a user's."""
        is_append = isinstance(obj, list) and attr == "append"
        return is_append or super().is_safe_attribute(obj, attr, value)


class _GenerationTag(ext.Extension):
    """`{% generation %}` marks a model's own text, for training; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own type)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: variables set inside are not visible outside.
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _environment() -> jinja2.Environment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


_ENVIRONMENT = _environment()
